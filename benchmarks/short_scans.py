"""What a scan that shows a short piece of the body gains by being laid into air.

    python benchmarks/short_scans.py DATA --cases NAME ... --pieces 110 170

DATA is a training set. Of each case a piece of so many mm about its pancreas is cut out (none
named: the scan as it is) and labelled with the shipped weights or --weights, once stretched
over the whole grid (0) and once for each length of --shortest, in mm. Printed: mean DSC of the
organs that are labelled in the piece with more than 50 voxels.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from flare_clef import preparation
from flare_clef.images import Image, read_image
from flare_clef.inference import FoldedNetwork
from flare_clef.limits import usable_cores
from flare_clef.metrics import dice_per_organ
from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.restoration import restore
from flare_clef.training.cases import read_labels
from flare_clef.training.datasets import read_dataset
from flare_clef.weights import load_weights


def piece_about_pancreas(scan: Image, labels: np.ndarray, length_mm: float) -> tuple[slice, ...]:
    """Where ``length_mm`` along the body's axis about the pancreas lie, stored (z, y, x)."""
    axis = preparation.canonical_axes(scan.direction)[0][0]
    shown = (labels == ORGAN_BY_NAME["pancreas"].index).any(axis=tuple({0, 1, 2} - {axis}))
    middle, half = int(np.flatnonzero(shown).mean()), int(length_mm / scan.spacing_mm[2 - axis] / 2)
    cut = [slice(None)] * 3
    cut[axis] = slice(max(0, middle - half), middle + half)
    return tuple(cut)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--pieces", type=float, nargs="*", default=[])
    parser.add_argument("--shortest", type=float, nargs="+", default=[220.0, 260.0])
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    weights = load_weights(options.weights)
    network = FoldedNetwork(weights.network(), torch.device("cpu"), "fp32")
    lengths = [0.0, *options.shortest]
    print("| piece | " + " | ".join(f"{mm:.0f} mm" for mm in lengths) + " |")
    print("| --- " * (1 + len(lengths)) + "|")
    for case in read_dataset(options.data).cases:
        if options.cases and case.name not in options.cases:
            continue
        whole, reference = read_image(case.image), read_labels(case).array
        for length_mm in options.pieces or [0.0]:
            cut = piece_about_pancreas(whole, reference, length_mm) if length_mm else ...
            scan, truth = replace(whole, array=whole.array[cut]), reference[cut]
            row = []
            for shortest in lengths:
                preparation.SHORTEST_MM = shortest
                prepared = preparation.prepare(
                    scan.array, scan.direction, weights.grid, spacing_mm=scan.spacing_mm
                )
                assert prepared is not None
                found = restore(network(prepared[0]), prepared[1])
                scores = dice_per_organ(found, truth, case.organs)
                counted = [s for name, s in scores.items()
                           if (truth == ORGAN_BY_NAME[name].index).sum() > 50]  # fmt: skip
                row.append(f"{np.mean(counted):.3f}")
            name = f"{case.name}, {length_mm:.0f} mm" if length_mm else case.name
            print(f"| {name} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()

"""How good could any network be through its grid? Labels down to the grid and up again.

    python benchmarks/ceilings.py DATA --cases btcv_06 btcv_13 btcv_20 btcv_28 [--grid 192]

DATA is a training set (images/, labels/). Each case's own labels are placed on the network's grid
as training sees them, turned into logits of +-1, and restored as ``predict`` does. Printed: DSC per
organ against the labels themselves, mean and lowest over the cases.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from flare_clef.images import read_image
from flare_clef.metrics import dice_per_organ
from flare_clef.organs import ORGANS
from flare_clef.preparation import prepare
from flare_clef.restoration import restore
from flare_clef.training.cases import place_labels, read_labels
from flare_clef.training.datasets import read_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cases", nargs="+", default=[])
    parser.add_argument("--grid", type=int, default=192)
    options = parser.parse_args()
    cases = [c for c in read_dataset(options.data).cases if c.labels is not None]
    tables = []
    for case in cases:
        if options.cases and case.name not in options.cases:
            continue
        image, truth = read_image(case.image), read_labels(case).array
        prepared = prepare(image.array, image.direction, options.grid, spacing_mm=image.spacing_mm)
        assert prepared is not None
        _, placement = prepared
        placed = torch.from_numpy(place_labels(truth, placement).copy())
        logits = torch.stack([2 * (placed == o.index).float() - 1 for o in ORGANS])
        tables.append(dice_per_organ(restore(logits, placement), truth, case.organs))
    print(f"| organ | mean of {len(tables)} | lowest |\n| --- | --- | --- |")
    every = []
    for organ in ORGANS:
        found = [table[organ.name] for table in tables if organ.name in table]
        if found:
            every.append(np.mean(found))
            print(f"| {organ.name.replace('_', ' ')} | {np.mean(found):.3f} | {min(found):.3f} |")
    print(f"| mean of {len(every)} | {np.mean(every):.3f} | |")


if __name__ == "__main__":
    main()

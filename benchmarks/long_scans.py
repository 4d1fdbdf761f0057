"""What a second look gains on long scans (second_look.py).

    python benchmarks/long_scans.py WEIGHTS DATA [--cases NAME ...] [--lengths 650 800 1000]
                                    [--precision bf16]

DATA is a training set. No long scan in it need have labels: every case is made so many mm long by
its own lowest 80 mm and highest 60 mm, mirrored to and fro below and above it, 3 : 2; those are
labelled as background. Printed: what the second look shows in mm, and the mean DSC of one look
and of two.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from measuring import in_canonical_axes

from flare_clef import Segmenter, segmenter
from flare_clef.images import Image, read_image
from flare_clef.limits import usable_cores
from flare_clef.metrics import dice_per_organ
from flare_clef.organs import ORGANS
from flare_clef.training.cases import read_labels
from flare_clef.training.datasets import read_dataset

BELOW_MM, ABOVE_MM, SHARE_BELOW = 80.0, 60.0, 0.6


def to_and_fro(block: np.ndarray, count: int) -> np.ndarray:
    """``count`` slices that begin next to the first of ``block``."""
    both = np.concatenate([block, block[::-1]])
    return both[np.arange(count) % len(both)]


def lengthened(scan: Image, truth: np.ndarray, length_mm: float) -> tuple[Image, np.ndarray]:
    """``scan`` and ``truth`` in canonical axes, with slices below and above."""
    scan, truth = in_canonical_axes(scan, truth)
    hu, (_, _, z_mm) = scan.array, scan.spacing_mm
    missing = max(0, round(length_mm / z_mm) - len(hu))
    below = round(missing * SHARE_BELOW)
    low = to_and_fro(hu[: round(BELOW_MM / z_mm)], below)[::-1]
    high = to_and_fro(hu[-round(ABOVE_MM / z_mm) :][::-1], missing - below)
    longer = np.concatenate([low, hu, high])
    truth = np.pad(truth, ((below, missing - below), (0, 0), (0, 0)))
    return replace(scan, array=longer), truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("weights", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--lengths", type=float, nargs="+", default=[650.0, 800.0, 1000.0])
    parser.add_argument("--precision", default="fp32")
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    network = Segmenter(weights=options.weights, precision=options.precision)
    all_means: dict[float, list[list[float]]] = {mm: [] for mm in options.lengths}
    for case in read_dataset(options.data).cases:
        if case.labels is None or (options.cases and case.name not in options.cases):
            continue
        whole, labels = read_image(case.image), read_labels(case).array
        present = [o.name for o in ORGANS if o.name in case.organs and (labels == o.index).any()]
        for length_mm in options.lengths:
            scan, truth = lengthened(whole, labels, length_mm)
            twice = network.segment(scan)
            with mock.patch.object(segmenter, "slices_to_look_at", lambda *_: None):
                once = network.segment(scan)
            means = [
                float(np.mean(list(dice_per_organ(found.labels, truth, present).values())))
                for found in (once, twice)
            ]
            all_means[length_mm].append(means)
            assert twice.placement is not None
            shown_mm = twice.placement.box_shape[0] * scan.spacing_mm[2]
            print(
                f"{case.name:20s} {length_mm:5.0f} mm, {shown_mm:4.0f} shown   "
                f"{means[0]:.3f} {means[1]:.3f}",
                flush=True,
            )
    for length_mm, rows in all_means.items():
        once_mean, twice_mean = np.mean(rows, axis=0)
        print(f"mean of the cases    {length_mm:5.0f} mm   {once_mean:.3f} {twice_mean:.3f}")


if __name__ == "__main__":
    main()

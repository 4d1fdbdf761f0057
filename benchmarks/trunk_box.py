"""What labels gain where the grid shows the trunk alone, not the table below it (torso.py).

    python benchmarks/trunk_box.py WEIGHTS DATA [DATA ...] [--cases NAME ...] [--precision bf16]
                                   [--table-mm 80]

DATA are training sets. Every case is labelled twice by the same weights, as `predict` does: in the
paper's box, which holds every voxel above -500 HU, and in the trunk's. Printed: how much larger
the paper's box is from front to back and from side to side, and the DSC of the organs labelled.
--table-mm lays a shell of 4 mm so far below every scan, which becomes half as much wider on either
side: the scan of a patient whose images are not cut to the body.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from measuring import in_canonical_axes

from flare_clef import Segmenter, preparation
from flare_clef.images import Image, read_image
from flare_clef.limits import usable_cores
from flare_clef.metrics import dice_per_organ
from flare_clef.organs import ORGANS
from flare_clef.training.cases import read_labels
from flare_clef.training.datasets import read_dataset

NAMES = [organ.name for organ in ORGANS]


def on_a_table(scan: Image, truth: np.ndarray, below_mm: float) -> tuple[Image, np.ndarray]:
    """``scan`` and ``truth`` in canonical axes, with air and a table below and at the sides."""
    scan, truth = in_canonical_axes(scan, truth)
    x_mm, y_mm, _ = scan.spacing_mm
    side, below = round(below_mm / 2 / x_mm), round(below_mm / y_mm)
    around = ((0, 0), (0, below), (side, side))
    hu = np.pad(scan.array, around, constant_values=-1000)
    hu[:, -max(1, round(4 / y_mm)) :] = 300
    return replace(scan, array=hu), np.pad(truth, around)


def paper_box(view, box, voxel_mm):  # type: ignore[no-untyped-def]
    """In place of ``preparation.without_table``."""
    return box


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("weights", type=Path)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--table-mm", type=float, default=0.0)
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    segmenter = Segmenter(weights=options.weights, precision=options.precision)
    both: list[np.ndarray] = []
    for folder in options.data:
        for case in read_dataset(folder).cases:
            if case.labels is None or (options.cases and case.name not in options.cases):
                continue
            scan, truth = read_image(case.image), read_labels(case).array
            if options.table_mm:
                scan, truth = on_a_table(scan, truth, options.table_mm)
            present = [o.name for o in ORGANS if o.name in case.organs and (truth == o.index).any()]
            scores, boxes = [], []
            for how in (paper_box, preparation.without_table):
                with mock.patch.object(preparation, "without_table", how):
                    prepared = preparation.prepare(
                        scan.array, scan.direction, 8, spacing_mm=scan.spacing_mm
                    )
                    assert prepared is not None, case.image
                    boxes.append(prepared[1].box_shape)
                    found = dice_per_organ(segmenter.segment(scan).labels, truth, present)
                scores.append([found.get(name, np.nan) for name in NAMES])
            both.append(np.array(scores))
            larger = np.divide(*np.array(boxes, float))
            means = np.nanmean(both[-1], axis=1)
            print(
                f"{case.name:24s} {larger[1]:.2f} {larger[2]:.2f}   {means[0]:.3f} {means[1]:.3f}",
                flush=True,
            )
    print(f"\n{'organ':24s} paper trunk")
    for i, name in enumerate(NAMES):
        column = np.array([scores[:, i] for scores in both])
        if not np.isnan(column).all():
            paper, trunk = np.nanmean(column, axis=0)
            print(f"{name:24s}  {paper:.3f} {trunk:.3f}")
    paper, trunk = np.mean([np.nanmean(scores, axis=1) for scores in both], axis=0)
    print(f"{'mean of the cases':24s}  {paper:.3f} {trunk:.3f}")


if __name__ == "__main__":
    main()

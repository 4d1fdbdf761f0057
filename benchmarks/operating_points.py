"""What the offsets of the organs' logits are worth: on the cases that chose them, and elsewhere.

    python benchmarks/operating_points.py WEIGHTS [WEIGHTS ...] --choose DATA --cases A B C D
        [--elsewhere DATA ...]

DATA is a training set (images/, labels/, cases.json); voxels of 255 count neither way, so that an
organ that ``train propagate`` labelled is judged where it is certain. Offsets that a file was
exported with are taken out first. Printed for each file: mean DSC on the network's grid without
offsets, and for each case with those that the other cases choose; per organ the DSC without, the
best, and the offset chosen. Then, with the offsets the file was exported with, mean DSC of each
case of ``--elsewhere`` on its own grid without and with them, and of a synthetic abdomen.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from flare_clef.images import Image, image_from_array, read_image
from flare_clef.inference import FoldedNetwork
from flare_clef.metrics import dice_per_organ
from flare_clef.organs import ORGANS
from flare_clef.phantom import PhantomOptions, make_phantom
from flare_clef.preparation import prepare
from flare_clef.restoration import restore
from flare_clef.training.cases import place_labels, read_labels
from flare_clef.training.datasets import read_dataset
from flare_clef.training.doubt import UNDECIDED
from flare_clef.training.operating_points import (
    OFFSETS,
    choose,
    dice_by_offset,
    points_of,
    without_points,
)
from flare_clef.weights import load_weights

NAMES = [organ.name for organ in ORGANS]


def report_choice(folded: FoldedNetwork, data: Path, names: list[str]) -> None:
    tables = []
    for case in read_dataset(data).cases:
        if case.labels is None or (names and case.name not in names):
            continue
        image = read_image(case.image)
        prepared = prepare(image.array, image.direction, 192, spacing_mm=image.spacing_mm)
        assert prepared is not None
        volume, placement = prepared
        labels = np.array(place_labels(read_labels(case).array, placement))
        labelled = np.array([name in case.organs for name in NAMES])
        tables.append(dice_by_offset(folded(volume), labels, labelled))
    table = np.stack(tables)
    found = choose(table)
    print(f"mean on the grid without {found.before:.3f}, left out {found.left_out:.3f}")
    print("| organ | without | best | offset |\n| --- | --- | --- | --- |")
    none = int(np.argmin(np.abs(OFFSETS)))
    for k, name in enumerate(NAMES):
        if not np.isnan(table[:, k]).all():
            curve = np.nanmean(table[:, k], axis=0)
            print(f"| {name} | {curve[none]:.3f} | {curve.max():.3f} | {found.offsets[k]:+.2f} |")


def scans(folders: list[Path]) -> Iterator[tuple[str, Image, np.ndarray, list[str]]]:
    """Name, image, labels and the organs to judge of each case, and of a synthetic abdomen."""
    for folder in folders:
        for case in read_dataset(folder).cases:
            if case.labels is not None:
                yield case.name, read_image(case.image), read_labels(case).array, [*case.organs]
    body = make_phantom(PhantomOptions(seed=1))
    yield "phantom", image_from_array(body.hu, body.spacing_mm, body.origin_mm), body.labels, NAMES


def report_elsewhere(folded: FoldedNetwork, offsets: np.ndarray, folders: list[Path]) -> None:
    print("| scan | organs | without | with | duodenum with |\n| --- | --- | --- | --- | --- |")
    for name, image, truth, organs in scans(folders):
        prepared = prepare(image.array, image.direction, 192, spacing_mm=image.spacing_mm)
        assert prepared is not None
        volume, placement = prepared
        logits = folded(volume)
        means, duodenum = [], float("nan")
        for part in (0.0, 1.0):
            moved = logits + part * torch.from_numpy(offsets).float()[:, None, None, None]
            labels = restore(moved, placement)
            labels[truth == UNDECIDED] = 0
            shown = [o.name for o in ORGANS if o.name in organs and (truth == o.index).any()]
            scores = dice_per_organ(labels, truth, shown)
            means.append(float(np.mean(list(scores.values()))))
            duodenum = scores.get("duodenum", float("nan"))
        print(f"| {name} | {len(shown)} | {means[0]:.3f} | {means[1]:.3f} | {duodenum:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("weights", type=Path, nargs="+")
    parser.add_argument("--choose", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=[])
    parser.add_argument("--elsewhere", type=Path, nargs="*")
    options = parser.parse_args()
    for path in options.weights:
        weights = load_weights(path)
        folded = FoldedNetwork(without_points(weights), torch.device("cpu"), "fp32")
        print(path.name)
        report_choice(folded, options.choose, options.cases)
        if options.elsewhere is not None:
            report_elsewhere(folded, points_of(weights), options.elsewhere)


if __name__ == "__main__":
    main()

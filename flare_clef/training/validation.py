"""What a network is worth, judged by the product's own path on each case's own grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np
import torch

from flare_clef.inference import FoldedNetwork
from flare_clef.metrics import dice_per_organ
from flare_clef.network import SegmentationNetwork
from flare_clef.organs import ORGANS
from flare_clef.segmenter import label_scan
from flare_clef.training.cases import Case, read_labels
from flare_clef.training.doubt import UNDECIDED

DiceTable = dict[str, dict[str, float]]
"""Dice by case and organ; organs that a case has no labels by people for are left out."""


def validate(
    network: SegmentationNetwork,
    cases: Sequence[Case],
    grid: int,
    precision: str,
    on_case: Callable[[Case, np.ndarray, np.ndarray, dict[str, float]], None] | None = None,
) -> DiceTable:
    """Labels as ``predict`` makes them, compared with the true ones.

    ``on_case`` is given each case, its predicted and its true labels, and its scores.
    """
    from flare_clef.images import read_image

    folded = FoldedNetwork(network, torch.device("cpu"), precision)
    table: DiceTable = {}
    for case in cases:
        image, reference = read_image(case.image), read_labels(case)
        found = label_scan(folded, image, grid)
        if found is None:
            continue
        labels = found.labels
        labels[reference.array == UNDECIDED] = 0
        scores = dice_per_organ(labels, reference.array, case.judged)
        table[case.name] = {name: round(value, 4) for name, value in scores.items()}
        if on_case is not None:
            on_case(case, labels, reference.array, table[case.name])
    return table


def means(table: DiceTable) -> dict[str, float]:
    """Mean over cases per organ, and ``mean`` over the organs that any case has labels for."""
    by_organ = {
        organ.name: fmean(row[organ.name] for row in table.values() if organ.name in row)
        for organ in ORGANS
        if any(organ.name in row for row in table.values())
    }
    return {**by_organ, "mean": fmean(by_organ.values())} if by_organ else {}

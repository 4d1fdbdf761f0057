"""What each organ's logit must gain or lose for the best Dice: offsets for the head's last bias.

A loss in which rare classes weigh more (``ce_balance`` above 0,
:func:`flare_clef.training.losses.balanced_weights`)
teaches logits for a world where they are frequent: with weights w the best logit of organ k is
off by log(w_k / w_0), at 192^3 some 1.5 for a liver and 5 for an adrenal gland. Soft Dice pulls
a part of it back. What is left shows in labels that are too large. The offset is found on
labelled cases, best those that training did not see, and costs inference nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from flare_clef.inference import FoldedNetwork
from flare_clef.network import SegmentationNetwork
from flare_clef.organs import ORGANS
from flare_clef.training.batches import batch_of
from flare_clef.training.cases import PreparedCase
from flare_clef.training.doubt import CLASSES, UNDECIDED
from flare_clef.training.finetuning_plan import Stage
from flare_clef.weights import Weights

LOWEST, HIGHEST, STEP = -1.0, 1.0, 0.25
"""Candidates. Four cases asked for -2.75 for a left kidney, to lose what lay in their bowel; six
scans of other sources had nothing false to lose, and lost an eighth to six tenths of the kidney."""
OFFSETS = np.arange(LOWEST, HIGHEST + STEP / 2, STEP)
NO_WORSE = 0.003
"""In Dice. Of offsets that differ by less the one nearest to 0 is taken: cases are few."""
_SLICES = 16


@dataclass(frozen=True)
class OperatingPoints:
    """Offsets of the 13 logits, and the mean Dice on the network's grid that speaks for them."""

    offsets: np.ndarray
    before: float
    """With no offset."""
    left_out: float
    """Each case judged with the offsets that the other cases choose; NaN for a single case."""


def find_operating_points(
    network: SegmentationNetwork, cases: Sequence[PreparedCase], grid: int, precision: str
) -> OperatingPoints:
    """Judges ``network`` (in evaluation mode) on ``cases``, prepared and not augmented."""
    folded = FoldedNetwork(network, torch.device("cpu"), precision)
    whole = Stage(grid, augmentation=None)
    tables = []
    for case in cases:
        batch = batch_of(case, whole, torch.Generator())
        logits = folded(batch.image[0, 0])
        judged = np.array([organ.name in case.case.judged for organ in ORGANS])
        tables.append(dice_by_offset(logits, batch.labels.numpy(), judged))
    return choose(np.stack(tables))


def dice_by_offset(logits: Tensor, labels: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """(13, len(OFFSETS)) Dice of each organ if its logit alone is raised by each offset.

    ``logits``: (13, z, y, x); ``labels``: (z, y, x), bytes as in
    :mod:`flare_clef.training.doubt`; ``labelled``: (13,) bool. NaN for organs that are not
    labelled or not in the volume.
    """
    found = np.zeros((len(ORGANS), len(OFFSETS)))
    right, size = np.zeros_like(found), np.zeros(len(ORGANS))
    for start in range(0, labels.shape[0], _SLICES):
        raw = labels[start : start + _SLICES]
        known = torch.from_numpy(raw != UNDECIDED)
        truth = torch.from_numpy(CLASSES[raw])[known]
        rows = logits[:, start : start + _SLICES].float()[:, known]
        highest = torch.cat([torch.zeros_like(rows[:1]), rows]).topk(2, dim=0)
        for k in np.flatnonzero(labelled):
            first = highest.indices[0] == k + 1
            others = torch.where(first, highest.values[1], highest.values[0])
            own = truth == k + 1
            wins_from = _first_offset_above(others - rows[k])
            found[k] += _wins(wins_from)
            right[k] += _wins(wins_from[own])
            size[k] += int(own.sum())
    dice = np.full_like(found, np.nan)
    seen = size > 0
    dice[seen] = 2 * right[seen] / (found[seen] + size[seen, None])
    return dice


def _first_offset_above(gap: Tensor) -> Tensor:
    """Per voxel the index of the first offset that lifts the organ over the others."""
    return ((gap - LOWEST) / STEP).floor_().add_(1).clamp_(0, len(OFFSETS)).long()


def _wins(wins_from: Tensor) -> np.ndarray:
    """(len(OFFSETS),) number of voxels that are the organ's at each offset."""
    counts = torch.bincount(wins_from, minlength=len(OFFSETS) + 1)
    return counts.cumsum(0)[: len(OFFSETS)].numpy()


def choose(tables: np.ndarray) -> OperatingPoints:
    """From (cases, 13, len(OFFSETS)) Dice, NaN where there is none to judge."""
    none = int(np.argmin(np.abs(OFFSETS)))
    count = len(tables)
    picks = _best(_mean(tables))
    left_out = float("nan")
    if count > 1:
        own = np.full((count, len(ORGANS)), np.nan)
        for case in range(count):
            others = _best(_mean(np.delete(tables, case, axis=0)))
            own[case] = tables[case, np.arange(len(ORGANS)), others]
        left_out = float(_mean(_mean(own)))
    return OperatingPoints(OFFSETS[picks], float(_mean(_mean(tables[:, :, none]))), left_out)


def _mean(tables: np.ndarray) -> np.ndarray:
    """Over the first axis; NaN where there is nothing to judge (no case has the organ)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(tables, axis=0)


def _best(curves: np.ndarray) -> np.ndarray:
    """(13,) index of each organ's offset; no offset where nothing is known of it."""
    picks = []
    for curve in np.nan_to_num(curves):
        good = np.flatnonzero(curve >= curve.max() - NO_WORSE)
        picks.append(good[np.abs(OFFSETS[good]).argmin()])
    return np.array(picks)


def points_of(weights: Weights) -> np.ndarray:
    """The offsets, (13,), that a weights file was exported with; 0 where it names none."""
    points: dict[str, float] = weights.record.get("operating_points") or {}
    return np.array([points.get(organ.name, 0.0) for organ in ORGANS])


def without_points(weights: Weights) -> SegmentationNetwork:
    """The network as it was trained: what its export moved is moved back."""
    network = weights.network()
    move(network, -points_of(weights))
    return network


def move(network: SegmentationNetwork, offsets: np.ndarray) -> None:
    """Adds ``offsets`` to the logits of ``network``, in place."""
    last = cast(nn.Conv3d, network.head[-1])
    assert last.bias is not None
    with torch.no_grad():
        last.bias += torch.from_numpy(offsets).to(last.bias)

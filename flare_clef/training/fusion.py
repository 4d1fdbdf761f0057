"""Votes of many atlases for one organ: how well each fits, the fused vote, its certainty.

Arrays are (z, y, x) on the working grid of one case.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from flare_clef.training.registration import Grid

_SURROUNDINGS_MM = 10.0
_MISFIT_SCALE = 0.05
_BINS = 20
CERTAIN, POSSIBLE = 0.55, 0.10
"""Probability from which a voxel is taken as the organ, and below which as not the organ."""
HU_RANGE = (-60, 400)
"""No soft organ lies outside: fat (about -100) below, bone above. Gas (below -700) may be
inside one; contrast in the gut reaches some 400 HU. -60 against -120: DSC + 0.01 to + 0.10 on
the three scans with a labelled duodenum."""
_GAS_HU = -700


def blurred(array: np.ndarray, grid: Grid) -> np.ndarray:
    """``array`` averaged over the surroundings of each voxel, float32."""
    image = grid.image(array.astype(np.float32))
    return sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(image, _SURROUNDINGS_MM))


def agreement(
    target: dict[int, np.ndarray], moved: dict[int, np.ndarray], near: np.ndarray
) -> float:
    """DSC of all organs' shares together, each voxel counted by ``near``; 0 to 1."""
    overlap = sum(float((np.minimum(target[k], moved[k]) * near).sum()) for k in target)
    total = sum(float(((target[k] + moved[k]) * near).sum()) for k in target)
    return 2 * overlap / total if total > 0 else 0.0


def misfit(target: dict[int, np.ndarray], moved: dict[int, np.ndarray], grid: Grid) -> np.ndarray:
    """How far the organs around each voxel are from agreeing: 0 where all lie alike, or none."""
    apart = np.zeros(grid.shape, np.float32)
    for organ, share in target.items():
        apart += np.abs(share - moved[organ])
    return blurred(apart, grid)


def fuse(votes: np.ndarray, misfits: np.ndarray) -> np.ndarray:
    """Mean of ``votes`` (atlases, z, y, x), weighted where ``misfits`` are small."""
    weights = np.exp(-(misfits - misfits.min(0)) / _MISFIT_SCALE)
    return (weights * votes).sum(0) / weights.sum(0)


def possible_values(hu: np.ndarray) -> np.ndarray:
    """Where a scan's values (HU) leave the organ possible: bool."""
    return ((hu >= HU_RANGE[0]) & (hu <= HU_RANGE[1])) | (hu < _GAS_HU)


@dataclass(frozen=True)
class Calibration:
    """From a fused vote to a probability, as counted on atlases that were left out."""

    votes: tuple[float, ...]
    probabilities: tuple[float, ...]
    threshold: float
    """The vote at which the left-out organs agree best (DSC)."""
    expected_dsc: tuple[float, ...]
    """DSC at ``threshold`` of each left-out atlas."""

    def probability(self, vote: np.ndarray) -> np.ndarray:
        return np.interp(vote, self.votes, self.probabilities)


def dsc(predicted: np.ndarray, true: np.ndarray) -> float:
    """Dice similarity of two bool arrays; 1 when both are empty."""
    total = int(predicted.sum()) + int(true.sum())
    return 2 * int((predicted & true).sum()) / total if total else 1.0


def calibrate(fused: list[np.ndarray], true: list[np.ndarray]) -> Calibration:
    """Learns what a vote is worth from ``fused`` votes and ``true`` organs (bool), paired."""
    votes = np.concatenate([vote.ravel() for vote in fused])
    truth = np.concatenate([organ.ravel() for organ in true])
    bins = np.minimum((votes * _BINS).astype(int), _BINS - 1)
    counts = np.bincount(bins, minlength=_BINS)
    hits = np.bincount(bins, truth, minlength=_BINS)
    filled = counts > 0
    # More votes never mean less: bins with few voxels must not turn the curve round.
    shares = np.maximum.accumulate(hits[filled] / counts[filled])
    middles = (np.flatnonzero(filled) + 0.5) / _BINS
    thresholds = np.arange(0.1, 0.71, 0.05)
    table = np.array(
        [[dsc(v >= t, o) for v, o in zip(fused, true, strict=True)] for t in thresholds]
    )
    best = int(table.mean(1).argmax())
    return Calibration(
        (0.0, *middles.tolist()),
        (0.0, *shares.tolist()),
        float(thresholds[best]),
        tuple(table[best].tolist()),
    )

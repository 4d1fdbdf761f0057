"""What the atlases say about one organ of one body: which fit, where they put it, how well.

An atlas is a label map that has the organ; the target one that lacks it. Arrays are (z, y, x)
on the target's working grid, cut to the surroundings of the organ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flare_clef.errors import UserError
from flare_clef.training.fusion import agreement, blurred, fuse, misfit
from flare_clef.training.registration import (
    Grid,
    OrganMaps,
    affine_map,
    deformable_map,
    warp,
)

FUSED_ATLASES = 12
"""So many are deformed and vote. With all 50 deformed and the best twelve chosen then, the vote
alone gained 0.012 in DSC and took four times as long (docs/propagation.md)."""
_SURROUNDINGS_MM = 24.0
_FAINTEST_VOTE = 0.02


@dataclass(frozen=True)
class Surroundings:
    """The part of a target that the organ may lie in, by the affine vote of all atlases."""

    grid: Grid
    organs: dict[int, np.ndarray]
    """The target's other organs: shares 0 to 1 (z, y, x)."""
    affine_vote: np.ndarray
    """Mean of all atlases' organs, affinely placed."""
    near: np.ndarray
    """Weight of a voxel in judging how an atlas fits: 1 where the organ is likeliest."""
    ranking: tuple[int, ...]
    """Atlases by how well they fit near the organ, best first."""

    @property
    def taken(self) -> np.ndarray:
        """bool: voxels that belong to another organ."""
        return np.any([share > 0.5 for share in self.organs.values()], axis=0)


@dataclass(frozen=True)
class Votes:
    """Of each deformed atlas: its organ, and how badly the others fit around each voxel."""

    organ: np.ndarray
    """(atlases, z, y, x), 0 to 1."""
    misfit: np.ndarray
    agreement: tuple[float, ...]

    def fused(self, taken: np.ndarray) -> np.ndarray:
        """The locally weighted vote, 0 where another organ lies."""
        return np.where(taken, 0.0, fuse(self.organ, self.misfit)).astype(np.float32)


def survey(
    target: OrganMaps, atlases: list[OrganMaps], organ: int, weights: dict[int, float]
) -> Surroundings:
    """Places every atlas affinely and ranks them. Raises UserError where none can be."""
    placed = {}
    for number, atlas in enumerate(atlases):
        try:
            placed[number] = affine_map(target, atlas, organ, weights)
        except UserError:
            continue
    if not placed:
        raise UserError("shares fewer than four organs with every atlas; label more of it")
    mean = np.zeros(target.grid.shape, np.float32)
    for number, affine in placed.items():
        mean += warp(atlases[number], organ, target.grid, affine) / len(placed)
    likely = np.argwhere(mean > _FAINTEST_VOTE)
    if not len(likely):
        raise UserError("the organ would lie outside its labelled part; leave it out")
    margin = int(_SURROUNDINGS_MM / target.grid.spacing_mm)
    low = np.maximum(likely.min(0) - margin, 0)
    high = np.minimum(likely.max(0) + margin + 1, mean.shape)
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    grid = target.grid.part(box)  # type: ignore[arg-type]
    organs = {
        k: share[box] / np.float32(255)
        for k, share in target.shares.items()
        if k != organ and (share[box] > 127).any()
    }
    near = blurred(mean[box], grid)
    near /= near.max()
    # Every second voxel tells good from bad just as well.
    seen = {k: share[::2, ::2, ::2] for k, share in organs.items()}
    fits = {}
    for number, affine in placed.items():
        moved = {k: warp(atlases[number], k, grid.coarser(), affine) for k in organs}
        fits[number] = agreement(seen, moved, near[::2, ::2, ::2])
    ranking = tuple(sorted(fits, key=lambda number: -fits[number]))
    return Surroundings(grid, organs, mean[box], near, ranking)


def vote_of(
    target: OrganMaps,
    around: Surroundings,
    atlas: OrganMaps,
    organ: int,
    weights: dict[int, float],
) -> tuple[np.ndarray, np.ndarray, float]:
    """One atlas deformed onto the target: its organ, its misfit, its agreement."""
    affine = affine_map(target, atlas, organ, weights)
    deformed = deformable_map(around.organs, atlas, around.grid, affine)
    moved = {k: warp(atlas, k, around.grid, deformed) for k in around.organs}
    return (
        warp(atlas, organ, around.grid, deformed),
        misfit(around.organs, moved, around.grid),
        agreement(around.organs, moved, around.near),
    )


def collect(votes: list[tuple[np.ndarray, np.ndarray, float]]) -> Votes:
    """``votes`` of deformed atlases together, those that fit best first."""
    best = sorted(votes, key=lambda vote: -vote[2])
    organs, misfits, agreements = zip(*best, strict=True)
    return Votes(np.array(organs), np.array(misfits), tuple(agreements))

"""Scans of bodies that nobody scanned: a labelled scan is bent until its organs lie as another's.

The other body needs a label map only, no image: few people have many labelled scans, and label
maps tell how organs differ in shape and place. Image and labels are bent alike, so that the
labels stay true of the image. Arrays are (z, y, x), points (x, y, z) in mm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from flare_clef.errors import UserError
from flare_clef.images import Image
from flare_clef.organs import ORGANS
from flare_clef.training.registration import (
    LEAST_COMMON_ORGANS,
    Grid,
    OrganMaps,
    affine_map,
    demons_field,
    distances,
    warp,
)
from flare_clef.writing import labels_to_sitk

SPACING_MM = 4.0
_MARGIN_VOXELS = 12
"""Around the organs the bend fades out, so that it ends where nothing is known."""
_FADE_VOXELS = 6
_ROUNDS, _CLIP_MM = 8, 16.0
_LEAST_JACOBIAN = 0.05
"""A voxel is squeezed to this share of its volume at most: no tissue is folded over."""
_LEAST_HEIGHT_MM = 16.0
_NO_ORGAN = 0


@dataclass(frozen=True)
class Bend:
    """How a scan is bent, and what that does to its organs."""

    transform: sitk.DisplacementFieldTransform
    """From places in the bent scan to places in the scan, (x, y, z) in mm, LPS."""
    dsc_before: float
    """Of the common organs and the other body's, mean; the other laid over it by an affine map."""
    dsc_after: float


def bend_towards(scan: OrganMaps, other: OrganMaps) -> Bend:
    """Bends the body ``scan`` until its organs have the shapes of ``other``'s.

    ``other`` is laid over the scan by an affine map of the organs' centres first: size and
    posture stay the scan's. Raises UserError where fewer than four organs are common, or fewer
    than four of them have a shape: a slice of an organ has none.
    """
    affine = affine_map(scan, other, _NO_ORGAN, {organ.index: 1.0 for organ in ORGANS})
    grid = _padded(scan.grid)
    shown = _shown_in_both(grid, scan, other, affine)
    common = [k for k in scan.shares if k in other.shares]
    wanted = [warp(other, k, grid, affine) for k in common]
    own = [warp(scan, k, grid, sitk.Transform()) for k in common]
    thick = sum(
        min(_height_mm(share, shown, grid) for share in pair) >= _LEAST_HEIGHT_MM
        for pair in zip(own, wanted, strict=True)
    )
    if thick < LEAST_COMMON_ORGANS:
        raise UserError(
            f"only {thick} organ(s) of which both show {_LEAST_HEIGHT_MM:g} mm of height; "
            f"{LEAST_COMMON_ORGANS} are needed to bend one to the other"
        )
    fixed, moving = (
        np.array([distances(share, grid, _CLIP_MM) * shown for share in shares])
        for shares in (wanted, own)
    )
    field = demons_field(fixed, moving, grid, _ROUNDS)
    transform = _unfolded(sitk.GetArrayFromImage(field), grid)
    after = [warp(scan, k, grid, transform) for k in common]
    return Bend(transform, _overlap(own, wanted, shown), _overlap(after, wanted, shown))


def _padded(grid: Grid) -> Grid:
    origin = tuple(o - _MARGIN_VOXELS * grid.spacing_mm for o in grid.origin_mm)
    shape = tuple(n + 2 * _MARGIN_VOXELS for n in grid.shape)
    return Grid(origin, shape, grid.spacing_mm)  # type: ignore[arg-type]


def _shown_in_both(
    grid: Grid, scan: OrganMaps, other: OrganMaps, affine: sitk.AffineTransform
) -> np.ndarray:
    """float32 (z, y, x): 1 at heights that both volumes show; a cut organ has no shape."""
    z, y, x = np.indices(grid.shape, dtype=np.float32)
    here = np.stack([x, y, z], -1) * grid.spacing_mm + np.array(grid.origin_mm)
    height = here @ np.reshape(affine.GetMatrix(), (3, 3))[2] + affine.GetTranslation()[2]
    shown = (here[..., 2] >= scan.volume_mm[0, 2]) & (here[..., 2] <= scan.volume_mm[1, 2])
    shown &= (height >= other.volume_mm[0, 2]) & (height <= other.volume_mm[1, 2])
    return shown.astype(np.float32)


def _height_mm(share: np.ndarray, shown: np.ndarray, grid: Grid) -> float:
    """Of an organ's highest column in what is shown, which is low in a slice that leans, too."""
    return float(((share > 0.5) & (shown > 0)).sum(axis=0).max()) * grid.spacing_mm


def _unfolded(field_mm: np.ndarray, grid: Grid) -> sitk.DisplacementFieldTransform:
    """``field_mm`` (z, y, x, 3: x, y, z), faded out at the rim and weakened until nothing folds.

    Raises UserError where it holds what is no number, which no weakening mends.
    """
    field_mm = field_mm.astype(np.float64)
    if not np.isfinite(field_mm).all():
        raise UserError("the shapes cannot be reached: the bend found is not finite")
    for axis, count in enumerate(grid.shape):
        steps = np.minimum(np.arange(count), np.arange(count)[::-1])
        fade = np.clip(steps / _FADE_VOXELS, 0, 1)
        field_mm *= fade.reshape([-1 if a == axis else 1 for a in range(4)])
    while True:
        image = grid.image(field_mm)
        squeezed = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(image))
        if squeezed.min() >= _LEAST_JACOBIAN:
            return sitk.DisplacementFieldTransform(image)
        field_mm *= 0.9


def _overlap(shares: list[np.ndarray], wanted: list[np.ndarray], shown: np.ndarray) -> float:
    found = [
        2 * float((np.minimum(a, b) * shown).sum()) / total
        for a, b in zip(shares, wanted, strict=True)
        if (total := float(((a + b) * shown).sum())) > 0
    ]
    return float(np.mean(found)) if found else 0.0


def bent(image: Image, bend: Bend, *, labels: bool) -> np.ndarray:
    """``image`` bent, (z, y, x) on its own grid; ``labels``: nearest neighbour, else linear.

    Where the bend asks for what lies beyond the scan, its nearest voxel is taken.
    """
    scan = labels_to_sitk(image.array, image)
    moved = sitk.Resample(
        scan,
        scan,
        bend.transform,
        sitk.sitkNearestNeighbor if labels else sitk.sitkLinear,
        0.0,
        sitk.sitkUnknown,
        True,
    )
    return sitk.GetArrayFromImage(moved)

"""Lays one labelled body over another by the organs that both have. No image is needed.

Label maps are brought to LPS axes and cubic voxels; of each organ the share of every voxel is
kept. An affine map comes from the organs' centres, a deformable one from SimpleITK's demons
on distance maps of the organs. Arrays are (z, y, x), points (x, y, z) in mm.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from flare_clef.errors import UserError
from flare_clef.images import Image, read_image
from flare_clef.organs import ORGANS
from flare_clef.training.doubt import UNDECIDED
from flare_clef.writing import labels_to_sitk

LEAST_COMMON_ORGANS = 4
"""Twelve numbers of an affine map need four centres."""
_MARGIN_MM = 12.0
_CLIP_MM = 12.0
_NEAR_MM = 80.0
_ROUNDS, _STEPS_A_ROUND, _SMOOTHING_VOXELS = 4, 6, 1.5
_VIEWS = 4


@dataclass(frozen=True)
class Grid:
    """Cubic voxels along LPS axes."""

    origin_mm: tuple[float, float, float]
    shape: tuple[int, int, int]
    """(z, y, x)."""
    spacing_mm: float

    def image(self, array: np.ndarray) -> sitk.Image:
        """``array`` (z, y, x), or (z, y, x, 3) of vectors, as a SimpleITK image on this grid."""
        image = sitk.GetImageFromArray(array, isVector=array.ndim == 4)
        image.SetOrigin(self.origin_mm)
        image.SetSpacing((self.spacing_mm,) * 3)
        return image

    def coarser(self) -> Grid:
        """Every second voxel along each axis: the grid of ``array[::2, ::2, ::2]``."""
        half = tuple((n + 1) // 2 for n in self.shape)
        return Grid(self.origin_mm, half, 2 * self.spacing_mm)  # type: ignore[arg-type]

    def part(self, box: tuple[slice, slice, slice]) -> Grid:
        """The grid of ``array[box]``."""
        start = [box[axis].start for axis in (2, 1, 0)]
        origin = tuple(o + self.spacing_mm * s for o, s in zip(self.origin_mm, start, strict=True))
        return Grid(origin, tuple(b.stop - b.start for b in box), self.spacing_mm)  # type: ignore[arg-type]


@dataclass(frozen=True)
class OrganMaps:
    """The organs of one label map on a cubic grid around all of them."""

    grid: Grid
    shares: dict[int, np.ndarray]
    """Organ index to uint8 (z, y, x): the organ's share of each voxel, 255 being all of it."""
    volume_mm: np.ndarray
    """(2, 3): ends of the box around all voxel centres of the label map, (x, y, z) in LPS."""

    @cached_property
    def points(self) -> dict[int, np.ndarray]:
        """Of each organ the places (n, 3) in mm of at most some 4,000 of its voxels."""
        found = {}
        for organ, share in self.shares.items():
            places = np.argwhere(share > 127)[:, ::-1]
            places = places[:: max(1, len(places) // 2000)]
            found[organ] = places * self.grid.spacing_mm + np.array(self.grid.origin_mm)
        return found

    def is_cut(self, organ: int) -> bool:
        """Whether ``organ`` reaches the lowest or highest slice, so that part may be missing."""
        z = self.points[organ][:, 2]
        edge = 1.5 * self.grid.spacing_mm
        return bool(z.min() < self.volume_mm[0, 2] + edge or z.max() > self.volume_mm[1, 2] - edge)


def load_organ_maps(path: Path, spacing_mm: float) -> OrganMaps:
    """The organs of the label map at ``path``. Raises UserError, one line."""
    image = read_image(path)
    with np.errstate(invalid="ignore"):
        array = image.array.astype(np.uint8)  # some write whole numbers as floats
    odd = image.array[(array != image.array) | ((array > len(ORGANS)) & (array != UNDECIDED))]
    if odd.size:
        raise UserError(
            f"{path}: holds the value {odd.flat[0]:g}; only 0 to {len(ORGANS)} name organs here; "
            "translate its labels first"
        )
    try:
        return organ_maps_of(array, image, spacing_mm)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def organ_maps_of(array: np.ndarray, image: Image, spacing_mm: float) -> OrganMaps:
    """The organs of ``array`` (z, y, x; 0 to 13 or ``UNDECIDED``) on the grid of ``image``.

    Raises UserError where no voxel is labelled.
    """
    array = np.where(array == UNDECIDED, 0, array)
    if not array.any():
        raise UserError("no voxel is labelled; leave it out or label it")
    labels = sitk.DICOMOrient(labels_to_sitk(array, image), "LPS")
    spacing, size = np.array(labels.GetSpacing()), np.array(labels.GetSize())
    corners = _corners(labels, np.zeros(3, int), size)
    volume = np.array([corners.min(0), corners.max(0)])
    statistics = sitk.LabelShapeStatisticsImageFilter()
    statistics.Execute(labels)
    boxes = {k: np.reshape(statistics.GetBoundingBox(k), (2, 3)) for k in statistics.GetLabels()}
    ends = np.concatenate([_corners(labels, start, extent) for start, extent in boxes.values()])
    low = np.maximum(ends.min(0) - _MARGIN_MM, volume[0])
    high = np.minimum(ends.max(0) + _MARGIN_MM, volume[1])
    cells = np.floor((high - low) / spacing_mm).astype(int) + 1
    grid = Grid(tuple(map(float, low)), tuple(map(int, cells[::-1])), spacing_mm)  # type: ignore[arg-type]
    reference = grid.image(np.zeros(grid.shape, np.uint8))
    pad = np.ceil(2 * spacing_mm / spacing).astype(int)
    shares = {}
    for organ, (start, extent) in boxes.items():
        first = np.maximum(start - pad, 0)
        last = np.minimum(start + extent + pad, size)
        window = tuple(slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
        share = sitk.Cast(labels[window] == organ, sitk.sitkFloat32)
        # Half a coarse voxel of blur, so that thin organs leave a share and no stairs.
        share = sitk.DiscreteGaussian(share, [spacing_mm**2 / 8] * 3)
        share = sitk.Resample(share, reference, sitk.Transform(), sitk.sitkLinear, 0.0)
        shares[organ] = np.rint(255 * sitk.GetArrayFromImage(share)).clip(0, 255).astype(np.uint8)
    kept = {organ: share for organ, share in shares.items() if (share > 127).any()}
    return OrganMaps(grid, kept, volume)


def _corners(image: sitk.Image, start: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """(8, 3): places in mm of the corner voxels of a box; where axes lean no two bound it."""
    return np.array(
        [
            image.TransformIndexToPhysicalPoint([int(v) for v in start + corner * (extent - 1)])
            for corner in np.array(list(np.ndindex(2, 2, 2)))
        ]
    )


def nearness_weights(maps: list[OrganMaps], organ: int) -> dict[int, float]:
    """How much each organ's centre counts in the affine map: more the nearer to ``organ``."""
    distances: dict[int, list[float]] = {}
    for one in maps:
        if organ not in one.shares:
            continue
        middle = one.points[organ].mean(0)
        for other in one.shares:
            away = float(np.linalg.norm(one.points[other].mean(0) - middle))
            distances.setdefault(other, []).append(away)
    return {
        k: 0.05 + float(np.exp(-0.5 * (np.mean(away) / _NEAR_MM) ** 2))
        for k, away in distances.items()
    }


def affine_map(
    target: OrganMaps, atlas: OrganMaps, organ: int, weights: dict[int, float]
) -> sitk.AffineTransform:
    """From places of ``target`` to places of ``atlas``, by the centres of common organs.

    Weighted least squares, drawn a little towards a pure shift so that few or aligned centres
    cannot shear the body. Organs that a volume cuts off have other centres than whole ones:
    then only what lies within both volumes counts, found in a few rounds from a pure shift.
    Raises UserError when fewer than four organs are common.
    """
    common = [k for k in target.shares if k in atlas.shares and k != organ and k in weights]
    if len(common) < LEAST_COMMON_ORGANS:
        raise UserError(
            f"only {len(common)} organ(s) in common; {LEAST_COMMON_ORGANS} are needed to place it"
        )
    here = {k: target.points[k] for k in common}
    there = {k: atlas.points[k] for k in common}
    cut = any(target.is_cut(k) or atlas.is_cut(k) for k in common)
    matrix, shift = _fit(here, there, weights, stiff=cut)
    for _ in range(_VIEWS if cut else 0):
        mapped = {k: p @ matrix.T + shift for k, p in here.items()}
        back = {k: (p - shift) @ np.linalg.inv(matrix).T for k, p in there.items()}
        seen_here = {k: here[k][_within(mapped[k], atlas.volume_mm)] for k in common}
        seen_there = {k: there[k][_within(back[k], target.volume_mm)] for k in common}
        seen = [k for k in common if len(seen_here[k]) > 9 and len(seen_there[k]) > 9]
        if len(seen) < LEAST_COMMON_ORGANS:
            break
        matrix, shift = _fit(
            {k: seen_here[k] for k in seen}, {k: seen_there[k] for k in seen}, weights
        )
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(matrix.ravel().tolist())
    transform.SetTranslation(shift.tolist())
    return transform


def _within(points: np.ndarray, volume_mm: np.ndarray) -> np.ndarray:
    return np.all((points >= volume_mm[0]) & (points <= volume_mm[1]), axis=1)


def _fit(
    here: dict[int, np.ndarray],
    there: dict[int, np.ndarray],
    weights: dict[int, float],
    stiff: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (3, 3) and shift (3,): there = matrix @ here + shift. ``stiff``: shift alone."""
    w = np.array([weights[k] for k in here])
    w = w / w.sum()
    p = np.array([here[k].mean(0) for k in here])
    q = np.array([there[k].mean(0) for k in here])
    middle_p, middle_q = w @ p, w @ q
    if stiff:
        return np.eye(3), middle_q - middle_p
    x, y = p - middle_p, q - middle_q
    spread = (x * w[:, None]).T @ x
    ridge = 0.02 * np.trace(spread) / 3 * np.eye(3)
    matrix = np.linalg.solve(spread + ridge, (x * w[:, None]).T @ y + ridge).T
    return matrix, middle_q - matrix @ middle_p


def warp(atlas: OrganMaps, organ: int, grid: Grid, transform: sitk.Transform) -> np.ndarray:
    """Share of ``organ`` of ``atlas`` on ``grid``, float32 0 to 1; 0 where it has none."""
    if organ not in atlas.shares:
        return np.zeros(grid.shape, np.float32)
    image = atlas.grid.image(atlas.shares[organ])
    reference = grid.image(np.zeros(grid.shape, np.uint8))
    moved = sitk.Resample(image, reference, transform, sitk.sitkLinear, 0.0, sitk.sitkFloat32)
    return sitk.GetArrayFromImage(moved) / np.float32(255)


def distances(share: np.ndarray, grid: Grid, clip_mm: float) -> np.ndarray:
    """Distance to the surface of {share > 1/2}, positive inside, clipped, scaled to (-1, 1)."""
    image = grid.image((share > 0.5).astype(np.uint8))
    distance = sitk.SignedMaurerDistanceMap(
        image, insideIsPositive=True, squaredDistance=False, useImageSpacing=True
    )
    return np.clip(sitk.GetArrayFromImage(distance), -clip_mm, clip_mm) / clip_mm


def demons_field(fixed: np.ndarray, moving: np.ndarray, grid: Grid, rounds: int) -> sitk.Image:
    """Displacements in mm on ``grid`` that lay ``moving`` over ``fixed``, each (maps, z, y, x).

    The library's demons see one image at a time, so each round shows them the maps summed
    with other signs: what looks alike in one round differs in the next.
    """
    generator = np.random.default_rng(0)
    field = grid.image(np.zeros((*grid.shape, 3)))
    for _ in range(rounds):
        signs = generator.choice([-1.0, 1.0], len(fixed))
        demons = sitk.FastSymmetricForcesDemonsRegistrationFilter()
        demons.SetNumberOfIterations(_STEPS_A_ROUND)
        demons.SetSmoothDisplacementField(True)
        demons.SetStandardDeviations(_SMOOTHING_VOXELS)
        images = [
            grid.image(np.tensordot(signs, maps, 1).astype(np.float32)) for maps in (fixed, moving)
        ]
        field = demons.Execute(*images, field)
    return field


def deformable_map(
    target: dict[int, np.ndarray],
    atlas: OrganMaps,
    grid: Grid,
    affine: sitk.AffineTransform,
) -> sitk.Transform:
    """Refines ``affine`` until the organs of ``atlas`` lie on those of ``target``.

    ``target`` holds the organs' shares (z, y, x) on ``grid``, 0 to 1; without any ``affine`` stays.
    """
    if not target:
        return affine
    fixed = [distances(share, grid, _CLIP_MM) for share in target.values()]
    moving = [distances(warp(atlas, k, grid, affine), grid, _CLIP_MM) for k in target]
    field = demons_field(np.array(fixed), np.array(moving), grid, _ROUNDS)
    moved = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
    return sitk.CompositeTransform([affine, moved])

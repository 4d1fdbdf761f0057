"""Distances between two surfaces, every surface element weighted by its area.

The definition is that of Nikolov et al., "Deep learning to achieve clinically applicable
segmentation of head and neck anatomy for radiotherapy" (arXiv:1809.04430), which the FLARE22
challenge uses. Every 2x2x2 block of neighbouring voxels that holds both inside and outside
is one surface element; it sits at the corner that its eight voxels share, and its area is
that of the marching-cubes patch through the block (Lorensen and Cline, 1987), in mm².

Arrays and points are (z, y, x); spacing is (x, y, z) in mm, as SimpleITK gives it.
Nothing here imports the rest of the package.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from scipy.spatial import cKDTree

Corner = tuple[int, int, int]
Point = tuple[float, float, float]

_CORNERS: tuple[Corner, ...] = tuple((z, y, x) for z, y, x in product((0, 1), repeat=3))


@dataclass(frozen=True)
class Surface:
    """The surface elements of one mask."""

    points: np.ndarray
    """(n, 3) int32: the shared corner of a block, (z, y, x); corner ``k`` of an axis lies
    between voxels ``k - 1`` and ``k``."""
    areas_mm2: np.ndarray
    """(n,) float64."""


@dataclass(frozen=True)
class SurfaceDistances:
    """From each element of either surface to the nearest one of the other, in mm.

    Where the other surface is empty, the distance is infinite.
    """

    from_reference_mm: np.ndarray
    reference_areas_mm2: np.ndarray
    from_prediction_mm: np.ndarray
    prediction_areas_mm2: np.ndarray


def extract_surface(
    mask: np.ndarray,
    spacing_mm: tuple[float, float, float],
    offset: tuple[int, int, int] = (0, 0, 0),
) -> Surface:
    """The surface of ``mask`` (bool, z, y, x); what lies beyond the array is outside.

    ``offset`` (z, y, x) is added to the points: the place of ``mask`` in a larger array.
    """
    # One axis after the other: 3 passes over the array where the 8 voxels of a block take 8.
    codes = np.pad(mask, 1).view(np.uint8)
    for axis, shift in ((2, 1), (1, 2), (0, 4)):
        along = np.moveaxis(codes, axis, 0)
        codes = np.moveaxis(along[:-1] | (along[1:] << np.uint8(shift)), 0, axis)
    codes = np.ascontiguousarray(codes)
    # 0 and 255, the blocks without a surface, become 255 and 254.
    where = np.flatnonzero(codes.ravel() - np.uint8(1) < 254)
    points = np.stack(np.unravel_index(where, codes.shape), axis=1).astype(np.int32)
    areas_mm2 = patch_areas_mm2(spacing_mm)[codes.ravel()[where]]
    return Surface(points + np.asarray(offset, dtype=np.int32), areas_mm2)


def surface_distances(
    reference: Surface,
    prediction: Surface,
    spacing_mm: tuple[float, float, float],
    workers: int = 1,
) -> SurfaceDistances:
    """Euclidean distances between the elements of two surfaces, on ``workers`` threads."""
    return SurfaceDistances(
        _nearest_mm(reference.points, prediction.points, spacing_mm, workers),
        reference.areas_mm2,
        _nearest_mm(prediction.points, reference.points, spacing_mm, workers),
        prediction.areas_mm2,
    )


def surface_dice(distances: SurfaceDistances, tolerance_mm: float) -> float:
    """Share of both surfaces' area that lies within ``tolerance_mm`` of the other (NSD).

    0 where exactly one surface is empty, nan where both are.
    """
    total = distances.reference_areas_mm2.sum() + distances.prediction_areas_mm2.sum()
    if total == 0:
        return float("nan")
    near = distances.reference_areas_mm2[distances.from_reference_mm <= tolerance_mm].sum()
    near += distances.prediction_areas_mm2[distances.from_prediction_mm <= tolerance_mm].sum()
    return float(near / total)


def hausdorff_mm(distances: SurfaceDistances, percent: float = 95.0) -> float:
    """The distance that ``percent`` of a surface's area stays within; the larger direction's.

    Infinite where exactly one surface is empty, nan where both are.
    """
    reach_mm = [
        _percentile_mm(distances.from_reference_mm, distances.reference_areas_mm2, percent),
        _percentile_mm(distances.from_prediction_mm, distances.prediction_areas_mm2, percent),
    ]
    known = [mm for mm in reach_mm if not np.isnan(mm)]
    return max(known) if known else float("nan")


def _percentile_mm(distances_mm: np.ndarray, areas_mm2: np.ndarray, percent: float) -> float:
    if len(distances_mm) == 0:
        return float("nan")
    order = np.argsort(distances_mm, kind="stable")
    covered = np.cumsum(areas_mm2[order])
    place = int(np.searchsorted(covered / covered[-1], percent / 100))
    return float(distances_mm[order[min(place, len(order) - 1)]])


def _nearest_mm(
    points: np.ndarray, targets: np.ndarray, spacing_mm: tuple[float, float, float], workers: int
) -> np.ndarray:
    """(n,) distance of each of ``points`` to the nearest of ``targets``.

    A tree of surface points in place of a distance map of the volume: it grows with the
    surface, so that a stray voxel in a far corner costs nothing.
    """
    if len(points) == 0 or len(targets) == 0:
        return np.full(len(points), np.inf)
    size_mm = np.asarray(spacing_mm[::-1], dtype=np.float64)
    # Sliding midpoints build fast; points on a grid are even enough for them.
    tree = cKDTree(targets * size_mm, balanced_tree=False)
    _, nearest = tree.query(points * size_mm, workers=workers)
    # Again from whole steps: 105 * 0.6 - 100 * 0.6 exceeds 3 mm by a rounding, 5 * 0.6 does
    # not, and a tolerance of 3 mm asks exactly that.
    steps = (targets[nearest] - points) * size_mm
    squares = steps * steps
    return np.sqrt((squares[:, 2] + squares[:, 1]) + squares[:, 0])


def patch_areas_mm2(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """(256,) area in mm² of the surface within a block of 2x2x2 voxels, by its code.

    Bit ``4 dz + 2 dy + dx`` of the code says whether voxel (dz, dy, dx) is inside.
    """
    codes, triangles = _triangles()
    corners_mm = triangles * np.asarray(spacing_mm[::-1], dtype=np.float64)
    first = corners_mm[:, 0]
    normals = np.cross(corners_mm[:, 1] - first, corners_mm[:, 2] - first)
    return np.bincount(codes, np.linalg.norm(normals, axis=1) / 2, minlength=256)


@lru_cache(maxsize=1)
def _triangles() -> tuple[np.ndarray, np.ndarray]:
    """Every triangle of the 256 blocks: its code (t,), its corners (t, 3, zyx) in voxels."""
    codes, triangles = [], []
    for code in range(256):
        inside = {c for c in _CORNERS if code >> (4 * c[0] + 2 * c[1] + c[2]) & 1}
        # The side with fewer voxels is the one cut off, piece by piece; at 4 to 4 both sides
        # give the same area.
        fewer = inside if len(inside) <= 4 else set(_CORNERS) - inside
        for piece in _pieces(fewer):
            polygon = _polygon(piece)
            for second, third in zip(polygon[1:], polygon[2:], strict=False):
                codes.append(code)
                triangles.append((polygon[0], second, third))
    return np.array(codes), np.array(triangles)


def _pieces(corners: set[Corner]) -> list[list[Corner]]:
    """``corners`` of the cube in groups that hang together along its edges."""
    left, pieces = set(corners), []
    while left:
        piece = [left.pop()]
        for corner in piece:
            linked = list(_links(corner, left).values())
            left.difference_update(linked)
            piece += linked
        pieces.append(piece)
    return pieces


def _polygon(piece: list[Corner]) -> list[Point]:
    """The patch that cuts ``piece`` (1 to 4 linked corners) off the cube.

    Its vertices are midpoints of cube edges, and it is the fan of triangles from the first.
    The order matters for the two shapes that are not flat, the L and the chain: it is the
    one behind the published areas.
    """
    links = {corner: _links(corner, piece) for corner in piece}
    by_links = sorted(piece, key=lambda corner: -len(links[corner]))
    centre = by_links[0]
    linked = list(links[centre].items())
    free = [axis for axis in range(3) if axis not in links[centre]]
    if len(piece) == 1:
        return [_cut(centre, axis) for axis in range(3)]
    if len(piece) == 2:
        other, (u, v) = by_links[1], free
        return [_cut(centre, u), _cut(centre, v), _cut(other, v), _cut(other, u)]
    if len(piece) == 3:  # an L
        (u, at_u), (v, at_v) = linked
        (normal,) = free
        top = [_cut(corner, normal) for corner in (at_u, centre, at_v)]
        return [*top, _cut(at_v, u), _cut(at_u, v)]
    if len(linked) == 3:  # a corner and its three neighbours: a flat hexagon
        (u, at_u), (v, at_v), (w, at_w) = linked
        rim = [(at_u, v), (at_v, u), (at_v, w), (at_w, v), (at_w, u), (at_u, w)]
        return [_cut(corner, axis) for corner, axis in rim]
    if all(len(links[corner]) == 2 for corner in piece):  # a whole side of the cube
        (u, at_u), (v, at_v) = linked
        (normal,) = free
        opposite = links[at_u][v]
        return [_cut(corner, normal) for corner in (centre, at_u, opposite, at_v)]
    # A chain along all three axes: first - centre - third - fourth.
    third = by_links[1]
    (middle,) = (axis for axis, corner in links[centre].items() if corner == third)
    ((start, first),) = ((a, c) for a, c in links[centre].items() if a != middle)
    ((end, fourth),) = ((a, c) for a, c in links[third].items() if a != middle)
    return [
        _cut(first, middle),
        _cut(third, start),
        _cut(fourth, start),
        _cut(fourth, middle),
        _cut(centre, end),
        _cut(first, end),
    ]


def _links(corner: Corner, others: Iterable[Corner]) -> dict[int, Corner]:
    """Those of ``others`` one edge of the cube away, by the axis of that edge."""
    neighbours = {}
    for other in others:
        differing = [axis for axis in range(3) if corner[axis] != other[axis]]
        if len(differing) == 1:
            neighbours[differing[0]] = other
    return neighbours


def _cut(corner: Corner, axis: int) -> Point:
    """Midpoint of the cube's edge that leaves ``corner`` along ``axis``."""
    point = [float(value) for value in corner]
    point[axis] = 0.5
    return tuple(point)  # type: ignore[return-value]

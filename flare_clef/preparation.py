"""Steps 1 to 6 of the paper (section 2.1): from a scan to the network's input.

1. body mask: voxels above -500 HU          4. flip to the canonical orientation
2. crop to the smallest box that holds it   5. clip to (-200, 300) HU
3. resize to 192 x 192 x 192                6. scale to (-1, 1)

Arrays are (z, y, x). *Canonical* is LPS, ITK's own frame: z grows towards the head
(Superior), y towards the back (Posterior), x towards the patient's Left. Step 4 is a
relabelling of axes that commutes with steps 1 to 3, so it is done first, as a view that
costs nothing: a scan stored in any of the 48 orientations then runs through the very same
arithmetic, and its 48 results are equal to the last bit.

Two departures: in-plane the box holds the trunk alone, not the table below it, see
:func:`without_table`; and a scan that shows a short piece of the body is not stretched to the
whole grid, see :func:`with_air`.

Training and inference both call :func:`prepare`, so that the two cannot drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import torch

from flare_clef.torso import Box, cells_of, steps_of, trunk_in_plane

BODY_THRESHOLD_HU = -500
WINDOW_HU = (-200.0, 300.0)
ONE_HU = 2 / (WINDOW_HU[1] - WINDOW_HU[0])
"""A difference of 1 HU in a prepared volume, whose scale is -1 to 1."""
GRID = 192
AIR_HU = -1024.0
"""What a voxel without a usable value (NaN, infinite) counts as."""

SHORTEST_MM = 220.0
"""The shortest extent from feet to head that is spread over the whole grid."""
MOST_STRETCH = 4
"""And so many times its length at most."""

# Slices resized at a time: bounds the memory above the scan itself to a few tens of MB.
_CHUNK_SLICES = 16


@dataclass(frozen=True)
class Placement:
    """Where a prepared volume lies in its scan: all that the way back needs."""

    shape: tuple[int, int, int]
    """Shape of the scan's array as stored, (z, y, x)."""
    axes: tuple[int, int, int]
    """Canonical axis ``i`` is the stored array's axis ``axes[i]``."""
    flips: tuple[bool, bool, bool]
    """Whether canonical axis ``i`` runs against the stored one."""
    box: Box
    """(start, stop) along each canonical axis, in voxels of the canonical view; along z it may
    reach beyond the scan, see :func:`with_air`."""
    grid: tuple[int, int, int]
    """Shape of the prepared volume, canonical (z, y, x)."""

    @property
    def box_shape(self) -> tuple[int, int, int]:
        """Voxels in the box along each canonical axis."""
        return tuple(stop - start for start, stop in self.box)  # type: ignore[return-value]

    @property
    def box_in_scan(self) -> Box:
        """The part of ``box`` that the scan has voxels for."""
        return tuple(
            (max(start, 0), min(stop, self.shape[axis]))
            for (start, stop), axis in zip(self.box, self.axes, strict=True)
        )  # type: ignore[return-value]

    def canonical_view(self, array: np.ndarray) -> np.ndarray:
        """A view of ``array`` (stored axes) in canonical axes; writing to it writes through."""
        return canonical_view(array, self.axes, self.flips)

    def grid_spacing_mm(self, spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
        """Size in mm of one voxel of the prepared volume, canonical (z, y, x).

        ``spacing_mm`` is the scan's, (x, y, z) as SimpleITK gives it.
        """
        voxel_mm = canonical_voxel_mm(spacing_mm, self.axes)
        return tuple(
            mm * extent / cells
            for mm, extent, cells in zip(voxel_mm, self.box_shape, self.grid, strict=True)
        )  # type: ignore[return-value]

    def of_slices(self, part: slice, inner: Placement) -> Placement:
        """Where ``inner`` lies in the whole scan, whose placement this is.

        ``part``: the slices along the canonical z axis, in voxels, that ``inner`` is the placement
        of, taken in canonical axes as a scan of their own.
        """
        (start, stop), *sides = inner.box
        box = ((start + part.start, stop + part.start), *sides)
        return replace(self, box=box, grid=inner.grid)  # type: ignore[arg-type]


def canonical_axes(
    direction: tuple[float, ...],
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Which stored array axis lies nearest to each canonical one, and whether it is reversed.

    ``direction`` holds nine numbers, row by row, whose columns are the stored x, y and z axes
    in LPS space, as SimpleITK gives them; they may be oblique or sheared. Of the six
    assignments the one with the largest sum of absolute cosines is taken.
    """
    cosines = np.asarray(direction, dtype=np.float64).reshape(3, 3)
    lengths = np.linalg.norm(cosines, axis=0)
    cosines = cosines / np.where(lengths > 0, lengths, 1)
    best = max(permutations(range(3)), key=lambda p: sum(abs(cosines[i, p[i]]) for i in range(3)))
    # Array axis k is image axis 2 - k; canonical array axis a is physical axis 2 - a.
    axes = tuple(2 - best[2 - a] for a in range(3))
    flips = tuple(bool(cosines[2 - a, best[2 - a]] < 0) for a in range(3))
    return axes, flips  # type: ignore[return-value]


def canonical_voxel_mm(
    spacing_mm: tuple[float, float, float], axes: tuple[int, int, int]
) -> tuple[float, float, float]:
    """Size in mm of a voxel of the scan along canonical (z, y, x).

    ``spacing_mm`` is (x, y, z) as stored, as SimpleITK gives it; ``axes`` as in
    :func:`canonical_axes`.
    """
    z, y, x = (spacing_mm[::-1][axis] for axis in axes)
    return z, y, x


def canonical_view(
    array: np.ndarray, axes: tuple[int, int, int], flips: tuple[bool, bool, bool]
) -> np.ndarray:
    """``array`` (stored z, y, x) seen in canonical axes, without a copy."""
    steps = tuple(slice(None, None, -1) if flip else slice(None) for flip in flips)
    return np.transpose(array, axes)[steps]


def body_box(array: np.ndarray) -> Box | None:
    """Smallest box that holds every voxel above -500 HU (steps 1 and 2).

    ``array`` has any axis order; the box has the same. NaN and infinite voxels are outside.
    None if no voxel is above the threshold.
    """
    # Walk along the axis of the largest stride, whatever view we were given.
    order = tuple(int(i) for i in np.argsort([-abs(s) for s in array.strides], kind="stable"))
    stored: np.ndarray = np.transpose(array, order)
    hits = [np.zeros(n, dtype=bool) for n in stored.shape]
    check_finite = np.issubdtype(stored.dtype, np.floating)
    for start in range(0, stored.shape[0], _CHUNK_SLICES):
        chunk = stored[start : start + _CHUNK_SLICES]
        mask: np.ndarray = chunk > BODY_THRESHOLD_HU
        if check_finite:
            mask &= np.isfinite(chunk)
        rows: np.ndarray = np.any(mask, axis=2)
        hits[0][start : start + _CHUNK_SLICES] = rows.any(axis=1)
        hits[1] |= rows.any(axis=0)
        hits[2] |= np.any(mask, axis=(0, 1))
    if not hits[0].any():
        return None
    box: list[tuple[int, int]] = [(0, 0)] * 3
    for axis, hit in zip(order, hits, strict=True):
        where = np.flatnonzero(hit)
        box[axis] = (int(where[0]), int(where[-1]) + 1)
    return tuple(box)  # type: ignore[return-value]


def without_table(view: np.ndarray, box: Box, voxel_mm: tuple[float, float, float]) -> Box:
    """``box`` (canonical, voxels) in-plane no larger than the trunk in it, see ``torso.py``.

    ``view``: the scan in canonical axes, HU; ``voxel_mm``: size of its voxels, (z, y, x). The box
    as it is where no trunk stands out. No part of the paper's section 2.1.
    """
    cells, steps = cells_of(box, voxel_mm), steps_of(voxel_mm)
    samples = view[tuple(slice(*side, step) for side, step in zip(box, steps, strict=True))]
    trunk = trunk_in_plane(resize(samples, cells))
    if trunk is None:
        return box
    sides = []
    for (start, stop), (first, last), count in zip(box[1:], trunk, cells[1:], strict=True):
        extent = stop - start
        sides.append((start + first * extent // count, start + -(-last * extent // count)))
    return (box[0], *sides)  # type: ignore[return-value]


def with_air(box: Box, slice_mm: float) -> Box:
    """``box`` (canonical, voxels) made ``SHORTEST_MM`` long in z, by air on both sides.

    ``slice_mm``: size of a voxel in z. Stretched over the whole grid, a piece of 110 mm shows
    organs some three times as long as those of a whole abdomen; what not stretching it gains
    stands in docs/experiments.md. The box grows to four times its length at most.
    """
    (start, stop), *others = box
    shown = stop - start
    wanted = int(np.ceil(min(SHORTEST_MM / slice_mm, MOST_STRETCH * shown)))
    missing = max(0, wanted - shown)
    below = missing // 2
    return ((start - below, stop + missing - below), *others)  # type: ignore[return-value]


def resize_matrix(size: int, cells: int) -> np.ndarray:
    """Weights (cells, size), float32, that resize one axis of ``size`` voxels to ``cells``.

    Linear interpolation between voxel centres, the outer *edges* of both grids lying on each
    other. When the axis shrinks, the triangle widens with the factor, so that every voxel
    counts and a 512-pixel scan's noise is averaged rather than sampled. Rows sum to one.
    """
    factor = size / cells
    centres = (np.arange(cells) + 0.5) * factor - 0.5
    reach = max(1.0, factor)
    if factor <= 1:
        centres = np.clip(centres, 0, size - 1)
    distance = np.abs(centres[:, None] - np.arange(size)[None, :]) / reach
    weights = np.clip(1 - distance, 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def scale_to_window(volume_hu: torch.Tensor) -> torch.Tensor:
    """Steps 5 and 6, in place: clip to (-200, 300) HU and scale that to (-1, 1)."""
    low, high = WINDOW_HU
    return volume_hu.clamp_(low, high).sub_((low + high) / 2).div_((high - low) / 2)


def scaled(value_hu: float) -> float:
    """What :func:`scale_to_window` makes of a value in HU, without the clip."""
    return (value_hu - WINDOW_HU[0]) * ONE_HU - 1


def _to_hu(chunk: np.ndarray) -> torch.Tensor:
    # A copy always: torch takes no negative stride, which an axis of one voxel may keep.
    values = np.array(chunk, dtype=np.float32, order="C")
    if np.issubdtype(chunk.dtype, np.floating):
        bad = ~np.isfinite(values)
        if bad.any():
            values = np.where(bad, np.float32(AIR_HU), values)
    return torch.from_numpy(values)


def place(
    shape: tuple[int, int, int],
    direction: tuple[float, ...],
    box: Box,
    grid: int | tuple[int, int, int] = GRID,
) -> Placement:
    """The :class:`Placement` of a scan of ``shape`` whose canonical body box is ``box``."""
    axes, flips = canonical_axes(direction)
    cells = (grid, grid, grid) if isinstance(grid, int) else grid
    return Placement(shape, axes, flips, box, cells)


def prepare(
    array: np.ndarray,
    direction: tuple[float, ...],
    grid: int | tuple[int, int, int] = GRID,
    *,
    spacing_mm: tuple[float, float, float] | None = None,
) -> tuple[torch.Tensor, Placement] | None:
    """The network's input for a scan, and where it lies (section 2.1, steps 1 to 6).

    ``array`` holds HU, (z, y, x) as stored; ``direction`` as in :func:`canonical_axes`.
    ``spacing_mm`` (x, y, z as SimpleITK gives it) tells the trunk from the table, see
    :func:`without_table`, and short scans, see :func:`with_air`; without it the body box is taken
    as it is.
    Returns a float32 tensor of shape ``grid`` in canonical (z, y, x) with values in (-1, 1),
    and its placement; None if the scan holds no voxel above -500 HU.
    """
    axes, flips = canonical_axes(direction)
    view = canonical_view(array, axes, flips)
    box = body_box(view)
    if box is None:
        return None
    if spacing_mm is not None:
        voxel_mm = canonical_voxel_mm(spacing_mm, axes)
        box = with_air(without_table(view, box, voxel_mm), voxel_mm[0])
    placement = place(array.shape, direction, box, grid)  # type: ignore[arg-type]
    inside = placement.box_in_scan
    body = view[tuple(slice(*bounds) for bounds in inside)]
    below, above = inside[0][0] - box[0][0], box[0][1] - inside[0][1]
    volume = resize(body, placement.grid, (below, above))
    return scale_to_window(volume), placement


def resize(
    body: np.ndarray, grid: tuple[int, int, int], air_slices: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """``body`` (z, y, x; HU) resized to ``grid`` by :func:`resize_matrix` along each axis.

    ``air_slices``: so many slices of air lie before its first and after its last slice.
    """
    below, above = air_slices
    depth = body.shape[0]
    to_z, to_y, to_x = (
        torch.from_numpy(resize_matrix(size, cells))
        for size, cells in zip((below + depth + above, *body.shape[1:]), grid, strict=True)
    )
    volume = torch.zeros(grid, dtype=torch.float32)
    if below or above:
        to_air = to_z[:, :below].sum(1) + to_z[:, below + depth :].sum(1)
        volume += (AIR_HU * to_air)[:, None, None]
        to_z = to_z[:, below : below + depth]
    flat = volume.view(grid[0], -1)
    for start in range(0, body.shape[0], _CHUNK_SLICES):
        slices = _to_hu(body[start : start + _CHUNK_SLICES])
        slices = torch.matmul(to_y, torch.matmul(slices, to_x.T))
        weights = to_z[:, start : start + slices.shape[0]]
        rows = torch.nonzero(weights.any(dim=1))
        if len(rows) == 0:
            continue
        first, last = int(rows[0]), int(rows[-1]) + 1
        flat[first:last].addmm_(weights[first:last], slices.reshape(slices.shape[0], -1))
    return volume

"""Where the trunk lies within the body box: without the table, its rails, blankets and free arms.

The paper's box holds every voxel above -500 HU, so a table may make it half as large again as the
patient, and organs on the network's grid as much smaller. What leaving it out gains stands in
docs/experiments.md.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn import functional

from flare_clef.label_parts import connected_parts

CELL_MM = 4.0
"""Size of the cells in which the trunk is looked for."""
TISSUE_HU = -200.0
"""Fat has -100 HU; what a cell shares between a thin shell and air or foam lies below."""
_OPENING_CELLS = 5
"""What is thinner in-plane, 20 mm, is no trunk: shells of a table, sheets, cables."""
_SMALLEST_SHARE = 0.5
"""Of all tissue so thick: where no part has as much, none is the trunk."""

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""(start, stop) along canonical z, y and x, in voxels."""


def cells_of(box: Box, voxel_mm: tuple[float, float, float]) -> tuple[int, int, int]:
    """Cells along (z, y, x) of ``box``, in voxels of that size; no more of them than voxels."""
    sizes = [stop - start for start, stop in box]
    z, y, x = (
        min(n, max(1, round(n * mm / CELL_MM))) for n, mm in zip(sizes, voxel_mm, strict=True)
    )
    return z, y, x


def steps_of(voxel_mm: tuple[float, float, float]) -> tuple[int, int, int]:
    """Every so manyth voxel along (z, y, x) will do: some two samples a cell."""
    z, y, x = (max(1, round(CELL_MM / (2 * mm))) for mm in voxel_mm)
    return z, y, x


def trunk_in_plane(coarse_hu: Tensor) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(start, stop) along y and x, in cells, of the largest part of tissue.

    ``coarse_hu``: (z, y, x) in cells of :func:`cells_of`, HU. A border of one cell is added where
    there is one. None where no part stands out.
    """
    thick = _opened(coarse_hu > TISSUE_HU)
    parts, sizes = connected_parts(thick)
    if sizes.max() == 0 or sizes.max() < _SMALLEST_SHARE * sizes.sum():
        return None
    trunk = (parts == sizes.argmax()).any(axis=0)
    y, x = (np.flatnonzero(trunk.any(axis=axis)) for axis in (1, 0))
    return _with_border(y, trunk.shape[0]), _with_border(x, trunk.shape[1])


def _opened(mask: Tensor) -> np.ndarray:
    """``mask`` (z, y, x) without what a square of ``_OPENING_CELLS`` does not fit into, by slice.

    What lies beyond the box counts as whatever keeps the mask: a trunk that it cuts stays.
    """
    eroded = -_highest_near(-mask.float()[:, None])
    return _highest_near(eroded)[:, 0].numpy() > 0


def _highest_near(planes: Tensor) -> Tensor:
    """Highest value in the square about each cell; ``planes``: (z, 1, y, x)."""
    size, reach = _OPENING_CELLS, _OPENING_CELLS // 2
    rows = functional.max_pool2d(planes, (1, size), 1, (0, reach))
    return functional.max_pool2d(rows, (size, 1), 1, (reach, 0))


def _with_border(where: np.ndarray, count: int) -> tuple[int, int]:
    return max(0, int(where[0]) - 1), min(count, int(where[-1]) + 2)

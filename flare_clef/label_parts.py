"""Where each label lies, and the connected parts it is made of."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import SimpleITK as sitk

from flare_clef.itk_turn import ITK_TURN

Box = tuple[slice, slice, slice]


def masks_in_boxes(
    labels: np.ndarray, indices: Collection[int]
) -> Iterator[tuple[int, Box, np.ndarray]]:
    """Of each label of ``indices`` that is there: its value, the smallest box that holds it, its
    mask in that box. ``labels``: (z, y, x), uint8.

    One pass over the slices finds where labels lie; all else looks at those slices only. Labels
    that are changed meanwhile are looked for in the slices in which they lay before.
    """
    counts = np.stack([np.bincount(plane.ravel(), minlength=256) for plane in labels])
    for index in indices:
        slices = np.flatnonzero(counts[:, index])
        if len(slices) == 0:
            continue
        first, last = int(slices[0]), int(slices[-1]) + 1
        mask = labels[first:last] == index
        flat = mask.any(axis=0)
        y, x = np.flatnonzero(flat.any(axis=1)), np.flatnonzero(flat.any(axis=0))
        if len(y) == 0:
            continue
        rows, columns = slice(int(y[0]), int(y[-1]) + 1), slice(int(x[0]), int(x[-1]) + 1)
        box = (slice(first, last), rows, columns)
        yield index, box, np.ascontiguousarray(mask[:, rows, columns])


def connected_parts(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The parts of a mask (z, y, x), numbered from 1 in the same shape, and the voxels of each.

    ``sizes[k]`` is that of part k; ``sizes[0]``, of what is no part, is 0. Voxels touch by a
    face, an edge or a corner.
    """
    # Another thread may read a scan meanwhile. No image outlives the turn.
    with ITK_TURN:
        parts = sitk.GetArrayFromImage(
            sitk.ConnectedComponent(sitk.GetImageFromArray(mask.astype(np.uint8)), True)
        )
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts, sizes


def part_sizes(mask: np.ndarray) -> np.ndarray:
    """Voxels of each connected part of a mask (z, y, x), the largest first."""
    return np.sort(connected_parts(mask)[1][1:])[::-1]

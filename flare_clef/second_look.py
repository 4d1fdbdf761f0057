"""Which part of a long scan is looked at once more, on a grid of its own.

A grid of 192 slices over a scan from head to thigh shows organs half as long as training did, and
a gland in two slices. What a second look gains stands in docs/experiments.md.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from flare_clef.label_parts import connected_parts, masks_in_boxes
from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.preparation import Placement, canonical_voxel_mm

LONG_MM = 600.0
"""A body longer than this, from feet to head, is looked at twice; few of the training's are."""
BORDER_MM = 60.0
"""Seen above the highest and below the lowest of ``ANCHORS``."""
SHORTEST_VIEW_MM = 400.0
"""What the second look shows at least: about what most scans of an abdomen do."""
ANCHORS = ("liver", "right_kidney", "left_kidney", "spleen", "pancreas")
"""By their main parts the abdomen is found; vessels and gut reach out of it."""
REACHING_OUT = ("aorta", "inferior_vena_cava", "esophagus", "stomach", "duodenum")
"""What the first look finds outside those slices is kept of these alone."""
_SMALLEST_ML = 10.0
_LARGEST_SHARE = 0.8
"""Of the first look: what shows more gains nothing."""


def slices_to_look_at(
    winners: Tensor, placement: Placement, spacing_mm: tuple[float, float, float]
) -> slice | None:
    """Along the canonical z axis, in voxels of the scan; None where one look is enough.

    ``winners``: (z, y, x), uint8, the labels of the first look on ``placement.grid``;
    ``spacing_mm``: the scan's, (x, y, z) as SimpleITK gives it.
    """
    bottom, top = placement.box_in_scan[0]
    slice_mm, _, _ = canonical_voxel_mm(spacing_mm, placement.axes)
    if (top - bottom) * slice_mm <= LONG_MM:
        return None
    cell_mm = placement.grid_spacing_mm(spacing_mm)
    ends_mm = [
        (first * cell_mm[0], last * cell_mm[0])
        for first, last in _main_parts(winners.numpy(), math.prod(cell_mm) / 1000)
    ]
    if not ends_mm:
        return None
    low_mm = min(low for low, _ in ends_mm) - BORDER_MM
    high_mm = max(high for _, high in ends_mm) + BORDER_MM
    missing_mm = max(0.0, SHORTEST_VIEW_MM - (high_mm - low_mm)) / 2
    start = max(bottom, bottom + math.floor((low_mm - missing_mm) / slice_mm))
    stop = min(top, bottom + math.ceil((high_mm + missing_mm) / slice_mm))
    # What an end of the body cuts off is shown at the other end instead.
    shortest = math.ceil(SHORTEST_VIEW_MM / slice_mm)
    part = slice(max(bottom, min(start, stop - shortest)), min(top, max(stop, start + shortest)))
    return part if part.stop - part.start <= _LARGEST_SHARE * (top - bottom) else None


def drop_outside(labels: np.ndarray, part: slice) -> None:
    """Makes background of all but ``REACHING_OUT`` in the slices outside ``part``, in place.

    ``labels``: (z, y, x), uint8, the scan's in canonical axes; ``part``: slices along z, in
    voxels. A liver that lies 60 mm from all main parts is none.
    """
    kept = np.zeros(256, dtype=np.uint8)
    for name in REACHING_OUT:
        kept[ORGAN_BY_NAME[name].index] = ORGAN_BY_NAME[name].index
    for outside in (labels[: part.start], labels[part.stop :]):
        outside[...] = kept[outside]


def _main_parts(labels: np.ndarray, cell_ml: float) -> list[tuple[int, int]]:
    """(first slice, last + 1) of the largest part of each anchor that is no speck.

    ``labels``: (z, y, x), uint8, on the grid; ``cell_ml``: volume of one of its nodes.
    """
    ends = []
    anchors = [ORGAN_BY_NAME[name].index for name in ANCHORS]
    for _, box, mask in masks_in_boxes(labels, anchors):
        parts, sizes = connected_parts(mask)
        if sizes.max() * cell_ml >= _SMALLEST_ML:
            shown = np.flatnonzero((parts == sizes.argmax()).any(axis=(1, 2)))
            ends.append((box[0].start + int(shown[0]), box[0].start + int(shown[-1]) + 1))
    return ends

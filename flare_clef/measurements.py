"""What a segmentation measures: volume, HU, size, parts, and hints that something is odd.

One pass over the slices finds where each organ lies; all else looks at that box only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flare_clef.images import Image
from flare_clef.label_parts import Box, masks_in_boxes, part_sizes
from flare_clef.metrics import voxel_ml
from flare_clef.organs import ORGANS, Organ
from flare_clef.preparation import canonical_axes

PERCENTILES = (5, 25, 75, 95)

ADULT_ML: dict[str, tuple[float, float]] = {
    "liver": (700, 3000),
    "right_kidney": (70, 350),
    "spleen": (40, 600),
    "pancreas": (25, 180),
    "aorta": (20, 300),
    "inferior_vena_cava": (15, 200),
    "right_adrenal_gland": (1, 15),
    "left_adrenal_gland": (1, 15),
    "gallbladder": (2, 150),
    "esophagus": (3, 70),
    "stomach": (30, 1500),
    "duodenum": (15, 200),
    "left_kidney": (70, 350),
}
"""Volumes that would surprise nobody in an adult, ml, rounded outwards. Our own choice, wide on
purpose: a hint to look, not a verdict, and no reference values."""

_SIDES = (
    ("right_kidney", "left_kidney"),
    ("right_adrenal_gland", "left_adrenal_gland"),
    ("liver", "spleen"),
)
"""The first of each pair lies further to the patient's right."""

_EDGES = (("inferior", "superior"), ("anterior", "posterior"), ("right", "left"))
"""Names of the first and last slice along each canonical axis (z, y, x)."""


@dataclass(frozen=True)
class OrganMeasurement:
    """One organ of one case. HU figures are None where the organ was not found."""

    organ: str
    label: int
    volume_ml: float
    hu_mean: float | None = None
    hu_sd: float | None = None
    hu_p05: float | None = None
    hu_p25: float | None = None
    hu_median: float | None = None
    hu_p75: float | None = None
    hu_p95: float | None = None
    box_mm: tuple[float, float, float] | None = None
    """Width (right to left), depth (front to back) and height of the box along the scan's axes."""
    parts: int = 0
    """Connected parts; voxels that touch by a face, an edge or a corner are one part."""
    largest_part_percent: float | None = None
    touches_edge: tuple[str, ...] = ()
    """Sides of the scan that the organ reaches: it is probably cut there."""
    confidence: float | None = None
    """Mean sigmoid of the organ's logit over the grid nodes that it won, 0.5 to 1."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaseMeasurement:
    """All organs of one case, in the order of ``ORGANS``."""

    case: str
    organs: tuple[OrganMeasurement, ...]
    warnings: tuple[str, ...] = ()
    """What concerns the case: a kidney missing, sides swapped."""

    def all_warnings(self) -> list[str]:
        """The case's and the organs', each with the organ's name before it."""
        named = [f"{o.organ.replace('_', ' ')}: {w}" for o in self.organs for w in o.warnings]
        return [*self.warnings, *named]


def measure(
    case: str,
    labels: np.ndarray,
    image: Image,
    *,
    organs: Collection[int] | None = None,
    confidence: Mapping[int, float] | None = None,
) -> CaseMeasurement:
    """Measures ``labels`` (z, y, x; uint8) on the scan ``image`` of the same shape.

    ``organs`` are the label values that were asked for (None: all). ``confidence`` gives the
    mean confidence per label value, where it is known.
    """
    axes, flips = canonical_axes(image.direction)
    wanted = [o for o in ORGANS if organs is None or o.index in organs]
    found = {o.index: OrganMeasurement(o.name, o.index, 0.0) for o in wanted}
    centres = {}
    for index, box, mask in masks_in_boxes(labels, found):
        organ = ORGANS[index - 1]
        centres[organ.name] = _centre_mm(mask, box, image)
        one = _measure_organ(organ, mask, box, image, axes, flips)
        if confidence is not None and index in confidence:
            one = replace(one, confidence=round(confidence[index], 4))
        found[index] = replace(one, warnings=_organ_warnings(one))
    organs_found = tuple(found.values())
    return CaseMeasurement(case, organs_found, _case_warnings(organs_found, centres))


def _centre_mm(mask: np.ndarray, box: Box, image: Image) -> np.ndarray:
    """Centre of mass in LPS mm."""
    index = []
    for axis in range(3):
        along = mask.sum(axis=tuple(a for a in range(3) if a != axis), dtype=np.int64)
        index.append(box[axis].start + (along * np.arange(len(along))).sum() / along.sum())
    steps = np.array(index[::-1]) * image.spacing_mm
    return np.array(image.origin_mm) + np.reshape(image.direction, (3, 3)) @ steps


def _measure_organ(
    organ: Organ,
    mask: np.ndarray,
    box: Box,
    image: Image,
    axes: tuple[int, int, int],
    flips: tuple[bool, bool, bool],
) -> OrganMeasurement:
    voxels = int(mask.sum())
    sizes = part_sizes(mask)
    stored_mm = np.array(mask.shape) * image.spacing_mm[::-1]
    z, y, x = (float(stored_mm[a]) for a in axes)
    edges = []
    for axis, flip, names in zip(axes, flips, _EDGES, strict=True):
        ends = [box[axis].start == 0, box[axis].stop == image.array.shape[axis]]
        edges += [name for name, at in zip(names, ends[::-1] if flip else ends, strict=True) if at]
    return OrganMeasurement(
        organ.name,
        organ.index,
        round(voxels * voxel_ml(image.spacing_mm, image.direction), 3),
        **_hu(image.array[box][mask]),
        box_mm=(round(x, 1), round(y, 1), round(z, 1)),
        parts=len(sizes),
        largest_part_percent=round(100 * float(sizes[0]) / voxels, 2),
        touches_edge=tuple(edges),
    )


def _hu(values: np.ndarray) -> dict[str, Any]:
    values = values.astype(np.float64)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return {}
    low, first, median, third, high = np.percentile(
        values, [*PERCENTILES[:2], 50, *PERCENTILES[2:]]
    )
    figures = {
        "hu_mean": values.mean(), "hu_sd": values.std(), "hu_p05": low, "hu_p25": first,
        "hu_median": median, "hu_p75": third, "hu_p95": high,
    }  # fmt: skip
    return {name: round(float(value), 2) for name, value in figures.items()}


def _organ_warnings(one: OrganMeasurement) -> tuple[str, ...]:
    low, high = ADULT_ML[one.organ]
    if one.volume_ml > high:
        return (f"{one.volume_ml:.0f} ml is more than {high:g} ml, the most expected in adults",)
    # An organ that the scan cuts is small for a reason.
    if one.volume_ml < low and not one.touches_edge:
        return (f"{one.volume_ml:.1f} ml is less than {low:g} ml, the least expected in adults",)
    return ()


def _case_warnings(
    found: Sequence[OrganMeasurement], centres: Mapping[str, np.ndarray]
) -> tuple[str, ...]:
    warnings = []
    absent = [one.organ for one in found if not one.parts]
    for name in absent:
        if name.endswith("kidney"):
            warnings.append(f"{name.replace('_', ' ')} missing: removed, outside, or overlooked")
    others = [name.replace("_", " ") for name in absent if not name.endswith("kidney")]
    if others:
        warnings.append(f"not found: {', '.join(others)}")
    for right, left in _SIDES:
        if right in centres and left in centres and centres[right][0] > centres[left][0]:
            names = right.replace("_", " "), left.replace("_", " ")
            warnings.append(
                f"sides implausible: the {names[0]} lies to the left of the {names[1]}; "
                "is the scan mirrored or its orientation wrong?"
            )
    return tuple(warnings)

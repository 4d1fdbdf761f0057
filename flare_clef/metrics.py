"""DSC and NSD per organ by the FLARE22 challenge's rules, Hausdorff distance and volumes.

Pure functions on label maps: integer arrays of one shape, (z, y, x) as stored, 0 background,
1 to 13 the organs of :mod:`flare_clef.organs`; other values count as background. Spacing is
(x, y, z) in mm. The challenge scores the arrays as they are stored, whatever their headers
say of orientation, so *slices* are those of the file's third axis.

Conventions of the challenge: absent from both maps is 1, absent from exactly one is 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from flare_clef.organs import ORGAN_BY_NAME, ORGANS, Organ

Rules = Literal["2022", "later", "plain"]
"""Version of the scoring rules.

``2022``: the contest's. Aorta, inferior vena cava and esophagus are scored only on the slices
from the reference's first up to, not including, its last. ``later``: the same, and NSD is 0
where DSC < 0.2. ``plain``: every organ on all slices, NSD always.
"""
RULES: tuple[Rules, ...] = get_args(Rules)

SCORED_WITHIN_REFERENCE = ("aorta", "inferior_vena_cava", "esophagus")
"""Tubes that leave the field of view: where their labels end is the annotator's choice."""

LATER_NSD_MIN_DSC = 0.2

Box = tuple[slice, slice, slice]

_OUTSIDE = len(ORGANS) + 1
"""Stands for every value outside 0 to 13 in the joint histogram."""
_CHUNK_VOXELS = 1 << 21


@dataclass(frozen=True)
class OrganScore:
    """One organ of one case."""

    dsc: float
    nsd: float
    hd95_mm: float | None
    """95 % Hausdorff distance over the slices that were scored; None where the organ is
    absent from either map there, so that no distance exists."""
    volume_ml: float | None
    """Of the prediction, all slices; None where there is no prediction."""
    reference_ml: float

    @property
    def difference_ml(self) -> float | None:
        """Prediction less reference."""
        return None if self.volume_ml is None else self.volume_ml - self.reference_ml


def dice(prediction: np.ndarray, reference: np.ndarray, organ_index: int) -> float:
    """Dice similarity 2|A∩B| / (|A| + |B|) of one organ over all slices.

    1 where the organ is absent from both maps, 0 where it is absent from one.
    """
    _check_shapes(prediction, reference)
    predicted, referenced = prediction == organ_index, reference == organ_index
    return _dice(_count(predicted & referenced), _count(predicted), _count(referenced))


def dice_per_organ(
    prediction: np.ndarray, reference: np.ndarray, organs: Iterable[str]
) -> dict[str, float]:
    """:func:`dice` of several organs, by name, in one pass over both maps."""
    counts = _joint_histogram(prediction, reference)
    predicted, referenced = counts.sum(axis=1), counts.sum(axis=0)
    return {
        name: _dice(int(counts[i, i]), int(predicted[i]), int(referenced[i]))
        for name in organs
        for i in (ORGAN_BY_NAME[name].index,)
    }


def volumes_ml(
    labels: np.ndarray,
    spacing_mm: tuple[float, float, float],
    direction: tuple[float, ...] | None = None,
) -> dict[str, float]:
    """Volume of each of the 13 organs of uint8 ``labels`` in ml.

    ``direction``: nine numbers, row by row; without it the axes stand upright on each other.
    """
    voxels = np.zeros(256, dtype=np.int64)
    for plane in labels:  # bincount copies what it counts, 8 bytes a voxel
        voxels += np.bincount(plane.ravel(), minlength=256)
    one_ml = voxel_ml(spacing_mm, direction)
    return {organ.name: float(voxels[organ.index]) * one_ml for organ in ORGANS}


def score_organs(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing_mm: tuple[float, float, float],
    organs: Iterable[str],
    rules: Rules = "2022",
    workers: int = 1,
    direction: tuple[float, ...] | None = None,
) -> dict[str, OrganScore]:
    """Every figure of the named organs of one case, on ``workers`` threads.

    ``direction`` as in :func:`volumes_ml`; surface distances take the axes to stand upright.

    Each organ is looked at only inside the box that holds it in both maps, which changes no
    result.
    """
    from scipy.ndimage import find_objects

    _check_shapes(prediction, reference)
    predicted_boxes = find_objects(prediction, max_label=len(ORGANS))
    reference_boxes = find_objects(reference, max_label=len(ORGANS))
    one_ml = voxel_ml(spacing_mm, direction)
    scores = {}
    for name in organs:
        organ = ORGAN_BY_NAME[name]
        predicted = _Part(prediction, organ.index, predicted_boxes[organ.index - 1])
        referenced = _Part(reference, organ.index, reference_boxes[organ.index - 1])
        volume_ml, reference_ml = predicted.voxels * one_ml, referenced.voxels * one_ml
        if rules != "plain" and name in SCORED_WITHIN_REFERENCE and referenced.box is not None:
            first, last = referenced.box[0].start, referenced.box[0].stop - 1
            # A reference of one slice would leave none to score: it is scored on that one.
            stop = max(last, first + 1)
            predicted, referenced = predicted.between(first, stop), referenced.between(first, stop)
        dsc, nsd, hd95_mm = _agreement(predicted, referenced, spacing_mm, organ, workers)
        if rules == "later" and dsc < LATER_NSD_MIN_DSC:
            nsd = 0.0
        scores[name] = OrganScore(dsc, nsd, hd95_mm, volume_ml, reference_ml)
    return scores


@dataclass(frozen=True)
class _Part:
    """The voxels of ``labels`` that are ``index`` inside ``box``; no box, no voxels."""

    labels: np.ndarray
    index: int
    box: Box | None

    @cached_property
    def voxels(self) -> int:
        return 0 if self.box is None else _count(self.mask)

    @cached_property
    def mask(self) -> np.ndarray:
        """bool, (z, y, x) of the box."""
        return self.labels[self.box] == self.index

    def between(self, first: int, stop: int) -> _Part:
        """The part on the slices from ``first`` up to, not including, ``stop``."""
        return self.inside((slice(first, stop), slice(None), slice(None)))

    def inside(self, box: Box | None) -> _Part:
        """The part that lies in ``box`` too."""
        if self.box is None or box is None:
            return _Part(self.labels, self.index, None)
        sides = tuple(
            slice(max(own.start, other.start or 0), min(own.stop, other.stop or own.stop))
            for own, other in zip(self.box, box, strict=True)
        )
        empty = any(side.start >= side.stop for side in sides)
        return _Part(self.labels, self.index, None if empty else sides)  # type: ignore[arg-type]


def _agreement(
    predicted: _Part,
    referenced: _Part,
    spacing_mm: tuple[float, float, float],
    organ: Organ,
    workers: int,
) -> tuple[float, float, float | None]:
    """DSC, NSD and 95 % Hausdorff distance in mm."""
    from flare_clef.surface import extract_surface, hausdorff_mm, surface_dice, surface_distances

    if predicted.voxels == 0 or referenced.voxels == 0:
        score = 1.0 if predicted.voxels == referenced.voxels else 0.0
        return score, score, None
    in_both_boxes = predicted.inside(referenced.box)
    common = 0
    if in_both_boxes.box is not None:
        common = _count(in_both_boxes.mask & referenced.inside(predicted.box).mask)
    reference_surface, predicted_surface = (
        extract_surface(part.mask, spacing_mm, tuple(side.start for side in part.box))  # type: ignore
        for part in (referenced, predicted)
    )
    distances = surface_distances(reference_surface, predicted_surface, spacing_mm, workers)
    return (
        _dice(common, predicted.voxels, referenced.voxels),
        surface_dice(distances, organ.nsd_tolerance_mm),
        hausdorff_mm(distances),
    )


def voxel_ml(
    spacing_mm: tuple[float, float, float], direction: tuple[float, ...] | None = None
) -> float:
    """Volume of a voxel in ml; ``direction`` as in :func:`volumes_ml`."""
    leaning = 1.0 if direction is None else abs(np.linalg.det(np.reshape(direction, (3, 3))))
    return float(leaning * np.prod(np.asarray(spacing_mm, dtype=np.float64)) / 1000)


def _count(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask))


def _dice(common: int, in_prediction: int, in_reference: int) -> float:
    total = in_prediction + in_reference
    return 1.0 if total == 0 else 2.0 * common / total


def _joint_histogram(prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(15, 15) voxel counts by label in ``prediction`` and in ``reference``; 14: any other."""
    _check_shapes(prediction, reference)
    side = _OUTSIDE + 1
    counts = np.zeros(side * side, dtype=np.int64)
    slices = max(1, _CHUNK_VOXELS // max(1, prediction[:1].size))
    for start in range(0, len(prediction), slices):
        rows = _folded(prediction[start : start + slices]) * np.uint8(side)
        rows += _folded(reference[start : start + slices])
        counts += np.bincount(rows.ravel(), minlength=side * side)
    return counts.reshape(side, side)


def _folded(labels: np.ndarray) -> np.ndarray:
    """``labels`` as uint8 from 0 to 14, where 14 stands for all that is no label."""
    if labels.dtype == np.uint8:
        return np.minimum(labels, np.uint8(_OUTSIDE))
    known = (labels >= 0) & (labels < _OUTSIDE)
    return np.where(known, labels, _OUTSIDE).astype(np.uint8)


def _check_shapes(prediction: np.ndarray, reference: np.ndarray) -> None:
    if prediction.shape != reference.shape or prediction.ndim != 3:
        raise ValueError(
            f"label maps must be 3-D and of one shape, got {prediction.shape} and {reference.shape}"
        )

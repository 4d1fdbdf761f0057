"""Robustness as a number: a scan as a user might have it, and how much the labels change.

Each perturbation takes an :class:`~flare_clef.images.Image` and gives another on a grid of its
own; the reference is brought to that grid, so that only what is left of the body is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from flare_clef.images import Image
from flare_clef.metrics import dice_per_organ, voxel_ml
from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.orientation import nearest_axes, reorient

AIR_HU = -1000
_BODY_HU = -500
_THICK_MM = 5.0

Change = Callable[[Image], Image]


@dataclass(frozen=True)
class Perturbation:
    """One way in which a scan may differ."""

    name: str
    change: Change
    """On the scan."""
    on_labels: Change
    """On its labels: the same change of the grid, nothing else."""


def perturbations(
    image: Image, orientations: Sequence[str] = ("RAS", "PIR", "SRP")
) -> list[Perturbation]:
    """Those that ``stress`` tries on ``image``, ``orientations`` among them."""
    same: Change = _unchanged
    grid: list[tuple[str, Change]] = [
        ("third cut off above", lambda image: crop_third(image, above=True)),
        ("third cut off below", lambda image: crop_third(image, above=False)),
        (_thinned_name(image), lambda image: thin_out(image, _THICK_MM)),
        ("field of view -20 %", lambda image: narrow(image, 0.8)),
    ]
    grid += [(f"stored as {code}", partial(reorient, code=code)) for code in orientations]
    values: list[tuple[str, Change]] = [
        ("HU + 20", lambda image: shift_hu(image, 20)),
        ("HU - 20", lambda image: shift_hu(image, -20)),
        ("noise of 30 HU", lambda image: add_noise(image, 30)),
        ("table removed", remove_table),
    ]
    return [Perturbation(name, change, change) for name, change in grid] + [
        Perturbation(name, change, same) for name, change in values
    ]


def crop_third(image: Image, *, above: bool) -> Image:
    """Without the third of its slices nearest the head (``above``) or the feet."""
    stored, upwards = _stored_axis(image, 2)
    count = image.array.shape[2 - stored]
    cut = count // 3
    at_end = above == upwards
    return _part(image, stored, 0 if at_end else cut, count - cut if at_end else count)


def narrow(image: Image, share: float) -> Image:
    """The middle ``share`` of its width and depth, as a smaller field of view shows."""
    for axis in (0, 1):
        stored, _ = _stored_axis(image, axis)
        count = image.array.shape[2 - stored]
        cut = round(count * (1 - share) / 2)
        image = _part(image, stored, cut, count - cut)
    return image


def thin_out(image: Image, thickness_mm: float) -> Image:
    """Every n-th slice along the body, n the number nearest to ``thickness_mm``.

    A scan whose slices are that thick already keeps them all.
    """
    stored, step = _thinning(image, thickness_mm)
    index: list[slice] = [slice(None)] * 3
    index[2 - stored] = slice(None, None, step)
    spacing = list(image.spacing_mm)
    spacing[stored] *= step
    return _with(image, image.array[tuple(index)], spacing_mm=tuple(spacing))


def _thinning(image: Image, thickness_mm: float) -> tuple[int, int]:
    """The stored axis along the body, and every how many-th slice of it is kept."""
    stored, _ = _stored_axis(image, 2)
    return stored, max(1, round(thickness_mm / image.spacing_mm[stored]))


def _thinned_name(image: Image) -> str:
    """By the spacing that is reached, as slices can be left out only, not moved."""
    stored, step = _thinning(image, _THICK_MM)
    as_is = " (as is)" if step == 1 else ""
    return f"slices of {step * image.spacing_mm[stored]:.3g} mm{as_is}"


def shift_hu(image: Image, hu: float) -> Image:
    """All values higher by ``hu``."""
    return _with(image, image.array.astype(np.float32) + hu)


def add_noise(image: Image, hu: float, seed: int = 0) -> Image:
    """Independent normal noise with standard deviation ``hu``."""
    noise = np.random.default_rng(seed).standard_normal(image.array.shape, dtype=np.float32)
    return _with(image, image.array + np.float32(hu) * noise)


def remove_table(image: Image) -> Image:
    """Air outside the largest connected piece above -500 HU, gaps within it filled by slice."""
    from scipy import ndimage

    pieces, count = ndimage.label(image.array > _BODY_HU)
    if count == 0:
        return image
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    body = pieces == sizes.argmax()
    stored, _ = _stored_axis(image, 2)
    for plane in np.moveaxis(body, 2 - stored, 0):
        plane[...] = ndimage.binary_fill_holes(plane)
    return _with(image, np.where(body, image.array, AIR_HU).astype(image.array.dtype))


def agreement(
    labels: np.ndarray, reference: np.ndarray, organs: Sequence[str]
) -> dict[str, float | None]:
    """DSC of ``organs``, by name; None where an organ is in neither of the two."""
    scores = dice_per_organ(labels, reference, organs)
    here = np.bincount(labels.ravel(), minlength=14) + np.bincount(reference.ravel(), minlength=14)
    return {name: scores[name] if here[ORGAN_BY_NAME[name].index] else None for name in organs}


def found_though_cut_off(
    labels: np.ndarray,
    reference: np.ndarray,
    organs: Sequence[str],
    spacing_mm: tuple[float, float, float],
    direction: tuple[float, ...] | None = None,
) -> dict[str, float]:
    """By name, the volume in ml that is labelled as an organ of which nothing is left.

    ``labels`` and ``reference``: uint8 (z, y, x) on the same grid, of ``spacing_mm`` (x, y, z);
    ``direction`` as in :func:`flare_clef.metrics.volumes_ml`.
    The DSC of such an organ is 0 whether a litre of it is found or a few voxels.
    """
    counts = np.bincount(labels.ravel(), minlength=14)
    left = np.bincount(reference.ravel(), minlength=14)
    one_ml = voxel_ml(spacing_mm, direction)
    return {
        name: round(float(counts[index]) * one_ml, 2)
        for name, index in ((name, ORGAN_BY_NAME[name].index) for name in organs)
        if counts[index] and not left[index]
    }


def mean_dsc(scores: dict[str, float | None]) -> float | None:
    """Over the organs that there are."""
    values = [score for score in scores.values() if score is not None]
    return sum(values) / len(values) if values else None


def _unchanged(image: Image) -> Image:
    return image


def _stored_axis(image: Image, axis: int) -> tuple[int, bool]:
    """Which stored axis (0 x, 1 y, 2 z) runs along the patient's ``axis``, and whether it grows."""
    direction = np.asarray(image.direction).reshape(3, 3)
    stored = nearest_axes(direction).index(axis)
    return stored, bool(direction[axis, stored] > 0)


def _part(image: Image, stored: int, first: int, end: int) -> Image:
    """Voxels ``first`` to ``end`` along a stored axis; they stay where they are in space."""
    index: list[slice] = [slice(None)] * 3
    index[2 - stored] = slice(first, end)
    step = np.asarray(image.direction).reshape(3, 3)[:, stored] * image.spacing_mm[stored]
    origin = tuple((np.asarray(image.origin_mm) + first * step).tolist())
    return _with(image, image.array[tuple(index)], origin_mm=origin)


def _with(image: Image, array: np.ndarray, **geometry: Any) -> Image:
    return replace(
        image,
        array=np.ascontiguousarray(array),
        nifti_header=None,
        nrrd_geometry=(),
        **geometry,
    )

"""A volume with its axes stored in another order or the other way round; nothing moves in space.

An orientation is three letters, the directions in which the stored x, y and z axes grow:
``LPS`` grows to the patient's left, to the back and to the head (ITK's own axes), ``RAS`` to
the right, to the front and to the head. There are 48.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import numpy as np

from flare_clef.errors import UsageError
from flare_clef.images import Image

_LETTERS = (("L", "R"), ("P", "A"), ("S", "I"))
ORIENTATIONS = tuple(
    "".join(_LETTERS[axis][sign] for axis, sign in zip(order, signs, strict=True))
    for order in permutations(range(3))
    for signs in product((0, 1), repeat=3)
)


def check_orientation(code: str) -> str:
    """``code`` in capitals. Raises UserError where it is none of the 48."""
    if code.upper() not in ORIENTATIONS:
        raise UsageError(
            f"orientation {code}: expected one each of L or R, P or A, S or I, such as LPS or RAS"
        )
    return code.upper()


def reorient(image: Image, code: str) -> Image:
    """``image`` with its stored axes as ``code`` says; oblique axes count as the nearest."""
    wanted = [_axis_and_sign(letter) for letter in check_orientation(code)]
    direction = np.asarray(image.direction).reshape(3, 3)
    world = nearest_axes(direction)
    order = [world.index(axis) for axis, _ in wanted]
    array = image.array.transpose([2 - order[2 - k] for k in range(3)])
    origin = np.asarray(image.origin_mm, dtype=float)
    columns = direction[:, order].copy()
    spacing = [image.spacing_mm[axis] for axis in order]
    for stored, (axis, sign) in enumerate(wanted):
        if np.sign(columns[axis, stored]) != sign:
            place = 2 - stored
            last = array.shape[place] - 1
            origin = origin + columns[:, stored] * spacing[stored] * last
            columns[:, stored] *= -1
            array = np.flip(array, place)
    return replace(
        image,
        array=np.ascontiguousarray(array),
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        origin_mm=tuple(origin.tolist()),
        direction=tuple(columns.ravel().tolist()),
        nifti_header=None,
        nrrd_geometry=(),
    )


def nearest_axes(direction: np.ndarray) -> list[int]:
    """For each stored axis x, y, z the patient's axis (0 left, 1 back, 2 head) nearest to it."""
    sizes = np.abs(np.asarray(direction, dtype=float).reshape(3, 3))
    return list(
        max(permutations(range(3)), key=lambda axes: sum(sizes[a, k] for k, a in enumerate(axes)))
    )


def _axis_and_sign(letter: str) -> tuple[int, int]:
    axis = next(i for i, pair in enumerate(_LETTERS) if letter in pair)
    return axis, 1 if letter == _LETTERS[axis][0] else -1

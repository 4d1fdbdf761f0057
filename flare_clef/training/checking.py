"""Whether a case's label map can be what it claims to be.

What makes a case unusable is a problem; what may be true of a patient is a warning.
"""

from __future__ import annotations

import numpy as np

from flare_clef.organs import ORGAN_BY_NAME, ORGANS
from flare_clef.training.cases import Case

_SIDES = (
    ("right_kidney", "left_kidney"),
    ("right_adrenal_gland", "left_adrenal_gland"),
    ("liver", "spleen"),
)
"""The first lies on the patient's right of the second."""
_USUAL_SIDES = (("inferior_vena_cava", "aorta"), ("liver", "stomach"))
"""Likewise, but variants of these are known: a left vena cava, a stomach behind the liver."""


def problems_of(case: Case, counts: np.ndarray, placed: np.ndarray) -> list[str]:
    """What is wrong with the labels of ``case``, a line each, without the file's name.

    ``counts``: (256,) voxels of each label in the label map; ``placed``: the labels on the
    prepared grid, canonical (z, y, x), where x grows towards the patient's left.
    """
    if not counts[1 : len(ORGANS) + 1].any():
        return ["no voxel of any organ; take the label map away to pre-train on the image"]
    found = []
    beyond = [o for o in ORGANS if counts[o.index] and o.name not in case.organs]
    if beyond:
        listed = ", ".join(f"{organ.name} ({counts[organ.index]})" for organ in beyond)
        found.append(f"voxels of organs that the case doesn't claim to label: {listed}")
    return found + [
        f"its {right} lies on the patient's left of its {left}; are image and labels "
        "mirrored, or the two labels swapped?"
        for right, left in _mirrored(case, placed, _SIDES)
    ]


def _mirrored(
    case: Case, placed: np.ndarray, sides: tuple[tuple[str, str], ...]
) -> list[tuple[str, str]]:
    centres = _centres_x(placed)
    return [
        pair
        for pair in sides
        if set(pair) <= set(case.organs)
        and centres[ORGAN_BY_NAME[pair[0]].index] > centres[ORGAN_BY_NAME[pair[1]].index]
    ]


def warnings_of(case: Case, counts: np.ndarray, placed: np.ndarray) -> list[str]:
    """What may be true of a patient and should be looked at; see :func:`problems_of`."""
    if not counts[1 : len(ORGANS) + 1].any():
        return []
    found = [
        f"its {right} lies on the patient's left of its {left}; right only in a rare patient"
        for right, left in _mirrored(case, placed, _USUAL_SIDES)
    ]
    absent = [name for name in case.organs if not counts[ORGAN_BY_NAME[name].index]]
    if absent:
        found.append(f"no voxel of {', '.join(absent)}; right only if the scan doesn't show it")
    return found


def _centres_x(placed: np.ndarray) -> np.ndarray:
    """(256,) mean x index of each label; NaN where it has no voxel."""
    columns = placed.shape[2]
    joint = np.zeros(256 * columns, np.int64)
    at = np.arange(columns, dtype=np.int32)
    for plane in placed:
        joint += np.bincount((plane.astype(np.int32) * columns + at).ravel(), minlength=len(joint))
    counts = joint.reshape(256, columns)
    with np.errstate(invalid="ignore"):
        return (counts * np.arange(columns)).sum(axis=1) / counts.sum(axis=1)

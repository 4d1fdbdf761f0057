"""Whether a case's label map can be what it claims to be.

What makes a case unusable is a problem; what may be true of a patient is a warning.
"""

from __future__ import annotations

import numpy as np

from flare_clef.organs import ORGAN_BY_NAME, ORGANS
from flare_clef.training.cases import Case

_SIDES = (("right_kidney", "left_kidney"), ("liver", "spleen"))
"""The first lies on the patient's right of the second."""


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
    centres = _centres_x(placed)
    for right, left in _SIDES:
        if right not in case.organs or left not in case.organs:
            continue
        x_right, x_left = (centres[ORGAN_BY_NAME[name].index] for name in (right, left))
        if x_right > x_left:
            found.append(
                f"its {right} lies on the patient's left of its {left}; are image and labels "
                "mirrored, or the two labels swapped?"
            )
    return found


def warnings_of(case: Case, counts: np.ndarray) -> list[str]:
    """What may be true of a patient and should be looked at."""
    if not counts[1 : len(ORGANS) + 1].any():
        return []
    absent = [name for name in case.organs if not counts[ORGAN_BY_NAME[name].index]]
    if not absent:
        return []
    return [f"no voxel of {', '.join(absent)}; right only if the scan doesn't show it"]


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

"""``--postprocess largest``: of each organ only its largest part. The paper has none.

Not for the aorta: a scan that reaches the heart cuts it into two true parts, one rising and one
falling. All others are one piece in nearly everybody; who was operated on is the exception
(a split liver, what is left of a kidney), so it is off unless asked for.
"""

from __future__ import annotations

import numpy as np

from flare_clef.label_parts import connected_parts, masks_in_boxes
from flare_clef.organs import ORGANS

SINGLE = tuple(organ for organ in ORGANS if organ.name != "aorta")
"""The organs of which only the largest part is kept."""


def keep_largest(labels: np.ndarray) -> np.ndarray:
    """Sets all but the largest part of each of ``SINGLE`` to 0, in place; returns ``labels``.

    (z, y, x), uint8; voxels touch by a face, an edge or a corner. The first of equals stays.
    """
    for _, box, mask in masks_in_boxes(labels, [organ.index for organ in SINGLE]):
        parts, sizes = connected_parts(mask)
        labels[box][(parts > 0) & (parts != sizes.argmax())] = 0
    return labels

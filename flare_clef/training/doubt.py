"""How sure a training label is: a byte a voxel holds the class and the doubt about it.

Labels by hand have no doubt. Those of :mod:`flare_clef.training.propagation` come with a
probability P of the organ; a voxel's weight in the loss is its certainty, ``|2 P - 1|``: 1
where the organ is certainly there or certainly not, 0 where nobody knows.

The byte is ``class + 16 * doubt``; weight is ``1 - doubt / 15``, with doubt 0 to 14. So the
augmentation moves one array, by nearest neighbour. 255 stays what it is in label maps.
"""

from __future__ import annotations

import numpy as np

UNDECIDED = 255
"""The value of a voxel whose label is not known at all; it stays out of the loss."""
_STEPS = 15
_BITS = np.arange(256, dtype=np.uint8)
CLASSES = np.where(_BITS == UNDECIDED, 0, _BITS & 15).astype(np.uint8)
"""(256,) uint8: the class, 0 to 13, of each byte; 0 for ``UNDECIDED``."""
WEIGHTS = np.where(_BITS == UNDECIDED, 0, 1 - (_BITS >> 4) / _STEPS).astype(np.float32)
"""(256,) float32: the weight of each byte in the loss."""


def with_doubt(labels: np.ndarray, chance: np.ndarray, organ: int) -> np.ndarray:
    """``labels`` (uint8, 0 to 13 or ``UNDECIDED``) with the doubt about ``organ``.

    ``chance``: uint8 of the same shape, 255 where the organ has probability 1. Doubt is given
    to the organ's voxels and to background; other organs and ``UNDECIDED`` stay.
    """
    certainty = np.abs(2 * chance.astype(np.float32) / 255 - 1)
    doubt = np.minimum(np.rint(_STEPS * (1 - certainty)), _STEPS - 1).astype(np.uint8)
    open_ = (labels == organ) | (labels == 0)
    return np.where(open_, labels + 16 * doubt, labels).astype(np.uint8)

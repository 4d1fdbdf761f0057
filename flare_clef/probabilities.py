"""``--probabilities``: what the network thinks of every organ everywhere, on its own grid."""

from __future__ import annotations

import io

import numpy as np
import torch

from flare_clef.images import Image
from flare_clef.organs import ORGANS
from flare_clef.preparation import Placement

STEPS = 255


def probabilities_file(logits: torch.Tensor, placement: Placement, image: Image) -> bytes:
    """A compressed .npz of the 13 sigmoids and where they lie.

    ``probability_x255``: uint8 (13, z, y, x), 255 times the sigmoid, canonical axes (z to the
    head, y to the back, x to the patient's left). ``affine_lps_mm``: (4, 4), from grid indices
    (x, y, z, 1) to LPS mm of the scan. ``organs``: 13 names. ``labels``: their values.
    At 192^3 the array takes 92 MB in memory; the logits beside it 368 MB in fp32.
    """
    maps = np.empty(logits.shape, np.uint8)
    for number, one in enumerate(logits):
        sure = torch.sigmoid(one.detach().to("cpu", torch.float32))
        maps[number] = (sure * STEPS).round_().to(torch.uint8).numpy()
    file = io.BytesIO()
    np.savez_compressed(
        file,
        probability_x255=maps,
        affine_lps_mm=grid_affine(placement, image),
        organs=np.array([organ.name for organ in ORGANS]),
        labels=np.array([organ.index for organ in ORGANS], np.uint8),
    )
    return file.getvalue()


def grid_affine(placement: Placement, image: Image) -> np.ndarray:
    """(4, 4) from indices (x, y, z, 1) of the network's grid to LPS mm."""
    to_stored = np.zeros((4, 4))  # canonical grid (z, y, x, 1) to stored voxels (z, y, x, 1)
    to_stored[3, 3] = 1
    for axis in range(3):
        stored = placement.axes[axis]
        start = placement.box[axis][0]
        step = placement.box_shape[axis] / placement.grid[axis]
        first = start + 0.5 * step - 0.5
        if placement.flips[axis]:
            step, first = -step, placement.shape[stored] - 1 - first
        to_stored[stored, axis], to_stored[stored, 3] = step, first
    swap = np.eye(4)[[2, 1, 0, 3]]
    to_mm = np.eye(4)
    to_mm[:3, :3] = np.reshape(image.direction, (3, 3)) * image.spacing_mm
    to_mm[:3, 3] = image.origin_mm
    return to_mm @ swap @ to_stored @ swap

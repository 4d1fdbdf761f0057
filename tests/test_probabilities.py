"""Probabilities on the network's grid, and where they lie."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from flare_clef.images import image_from_array
from flare_clef.preparation import Placement, canonical_axes
from flare_clef.probabilities import grid_affine, probabilities_file


def test_values_and_names():
    logits = torch.zeros(13, 2, 2, 2)
    logits[3] = torch.log(torch.tensor(4.0))
    image = image_from_array(np.zeros((4, 4, 4), np.int16), (1.0, 1.0, 1.0))
    placement = Placement((4, 4, 4), (0, 1, 2), (False,) * 3, ((0, 4),) * 3, (2, 2, 2))
    found = np.load(io.BytesIO(probabilities_file(logits, placement, image)))
    assert (found["probability_x255"][3] == 204).all()  # 0.8 x 255
    assert (found["probability_x255"][0] == 128).all()
    assert found["organs"][3] == "pancreas" and found["labels"][3] == 4


@pytest.mark.parametrize(
    "direction",
    [(1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), (0, 0, -1.0, -1.0, 0, 0, 0, 1.0, 0)],
    ids=["stored canonically", "turned and flipped"],
)
def test_affine_puts_a_node_where_its_voxels_are(direction):
    shape, spacing, origin = (10, 12, 14), (0.7, 1.1, 2.5), (3.0, -4.0, 5.0)
    image = image_from_array(np.zeros(shape, np.int16), spacing, origin, direction)
    axes, flips = canonical_axes(direction)
    # One node per voxel: each must lie on the voxel that canonical_view shows there.
    box = ((1, 9), (2, 8), (3, 10))
    placement = Placement(shape, axes, flips, box, (8, 6, 7))
    numbers = np.arange(np.prod(shape)).reshape(shape)
    view = placement.canonical_view(numbers)[tuple(slice(*b) for b in box)]
    for z, y, x in ((0, 0, 0), (7, 5, 6), (2, 4, 1)):
        stored = np.unravel_index(view[z, y, x], shape)[::-1]
        expected = np.array(origin) + np.reshape(direction, (3, 3)) @ (np.array(stored) * spacing)
        found = grid_affine(placement, image) @ [x, y, z, 1]
        assert found[:3] == pytest.approx(expected)


def test_affine_of_a_coarser_grid():
    image = image_from_array(np.zeros((8, 8, 8), np.int16), (1.0, 1.0, 1.0))
    placement = Placement((8, 8, 8), (0, 1, 2), (False,) * 3, ((0, 8),) * 3, (4, 4, 4))
    # The first of four cells spans voxels 0 and 1, whose middle is 0.5 mm.
    assert grid_affine(placement, image) @ [0, 1, 3, 1] == pytest.approx([0.5, 2.5, 6.5, 1])

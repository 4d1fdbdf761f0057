"""The trunk within the body box, on bodies whose extent is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_preparation import IDENTITY, stored_every_way

from flare_clef.preparation import body_box, prepare, without_table
from flare_clef.restoration import restore
from flare_clef.torso import CELL_MM, cells_of, steps_of, trunk_in_plane

MM = (5.0, 2.0, 2.0)


def trunk_hu(shape=(20, 100, 130), middle=(45, 60), radii=(35, 50)):
    """An ellipse of fat in air, the same in every slice; (z, y, x), voxels of ``MM``."""
    y, x = np.ogrid[: shape[1], : shape[2]]
    inside = ((y - middle[0]) / radii[0]) ** 2 + ((x - middle[1]) / radii[1]) ** 2 <= 1
    return np.broadcast_to(np.where(inside, -100, -1000), shape).astype(np.int16)


def with_table(hu, top=88):
    """A shell of 4 mm with rails of 20 mm at both ends, at some distance below the trunk."""
    hu = hu.copy()
    hu[:, top : top + 2, 2:128] = 300
    hu[:, top - 5 : top + 5, 2:12] = 300
    hu[:, top - 5 : top + 5, 118:128] = 300
    return hu


def box_of(hu, voxel_mm=MM):
    return without_table(hu, body_box(hu), voxel_mm)


def test_the_table_is_left_out():
    hu = with_table(trunk_hu())
    assert body_box(hu) == ((0, 20), (10, 93), (2, 128))
    (z, y, x) = box_of(hu)
    assert z == (0, 20)
    # The trunk has rows 10 to 80 and columns 10 to 110. A tip narrower than 20 mm may be lost, then
    # comes a border of 4 mm: a cell, or two voxels, off at most.
    assert y[0] == 10 and 81 <= y[1] <= 85
    assert 6 <= x[0] <= 12 and 109 <= x[1] <= 115


def test_a_table_that_touches_the_back():
    _, y, x = box_of(with_table(trunk_hu(), top=80))
    assert y[0] == 10 and 81 <= y[1] <= 85
    assert 6 <= x[0] <= 12 and 109 <= x[1] <= 115


def test_without_a_table_the_box_is_the_bodys():
    hu = trunk_hu()
    assert box_of(hu) == body_box(hu) == ((0, 20), (10, 81), (10, 111))


def test_a_trunk_cut_by_the_field_of_view_keeps_its_sides():
    hu = with_table(trunk_hu(middle=(45, 60), radii=(35, 80)))
    _, y, x = box_of(hu)
    assert y[0] == 10 and 82 <= y[1] <= 85
    assert x == (0, 130)


def test_free_arms_are_left_out():
    hu = trunk_hu(middle=(45, 60), radii=(35, 38)).copy()
    hu[:, 35:55, 2:16] = 40
    hu[:, 35:55, 106:120] = 40
    _, y, x = box_of(hu)
    assert y[0] <= 12 and y[1] >= 79
    assert 18 <= x[0] <= 24 and 97 <= x[1] <= 103


def test_no_part_stands_out():
    """Three pieces of one size: which is the trunk cannot be told."""
    hu = np.full((4, 40, 120), -1000, np.int16)
    for left in (5, 45, 85):
        hu[:, 5:35, left : left + 30] = 40
    assert box_of(hu) == body_box(hu)


def test_nothing_as_thick_as_a_trunk():
    hu = np.full((4, 40, 120), -1000, np.int16)
    hu[:, 10:14, 5:100] = 40
    assert box_of(hu) == body_box(hu)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 2), (3, 1, 60)])
def test_the_smallest_scans(shape):
    hu = np.full(shape, 40, np.int16)
    assert box_of(hu) == body_box(hu)


def test_cells_are_no_finer_than_voxels():
    assert cells_of(((5, 25), (0, 100), (7, 307)), (5.0, 2.0, 0.8)) == (20, 50, 60)
    assert cells_of(((0, 3), (0, 3), (0, 2)), (1e6, 0.5, 1e-3)) == (3, 1, 1)


def test_some_two_samples_a_cell():
    assert steps_of((5.0, 1.4, 0.7)) == (1, 1, 3)
    assert steps_of((0.5, 1.0, 1.03)) == (4, 2, 2)


def test_fine_voxels_give_the_box_of_coarse_ones():
    fine = with_table(trunk_hu()).repeat(3, axis=1).repeat(3, axis=2)
    coarse_box, fine_box = box_of(with_table(trunk_hu())), box_of(fine, (5.0, 2 / 3, 2 / 3))
    for coarse, found in zip(coarse_box[1:], fine_box[1:], strict=True):
        assert np.abs(np.array(found) - 3 * np.array(coarse)).max() <= 6  # a cell


def test_border_by_hand():
    coarse = torch.full((3, 20, 30), -1000.0)
    coarse[:, 4:12, 10:30] = 0.0  # it reaches the edge of the box in x
    coarse[1, 16, :] = 300.0
    assert CELL_MM == 4.0
    assert trunk_in_plane(coarse) == ((3, 13), (9, 30))


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 30),
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(0, 2**31),
    st.floats(0.3, 9),
)
def test_never_larger_than_the_body_box(depth, height, width, seed, size_mm):
    hu = np.random.default_rng(seed).normal(-300, 300, (depth, height, width)).astype(np.float32)
    box = body_box(hu)
    if box is None:
        return
    smaller = without_table(hu, box, (size_mm, size_mm, size_mm))
    assert smaller[0] == box[0]
    for (start, stop), (first, last) in zip(box[1:], smaller[1:], strict=True):
        assert start <= first < last <= stop


def test_prepare_sees_the_same_with_and_without_a_table():
    """Where the table begins a cell below the trunk, the volumes differ by its grain at most."""
    bare = trunk_hu((50, 100, 130))
    on_table = with_table(bare)
    first, there = prepare(bare, IDENTITY, 64, spacing_mm=(2.0, 2.0, 5.0))
    second, here = prepare(on_table, IDENTITY, 64, spacing_mm=(2.0, 2.0, 5.0))
    for with_, without in zip(here.box[1:], there.box[1:], strict=True):
        assert abs(with_[0] - without[0]) <= 5 and abs(with_[1] - without[1]) <= 5
    literal, whole = prepare(on_table, IDENTITY, 64)
    assert whole.box == body_box(on_table)
    fat = [((v > -0.7) & (v < -0.5)).float().mean().item() for v in (first, second, literal)]
    assert fat[1] == pytest.approx(fat[0], rel=0.1)
    assert fat[1] > 1.3 * fat[2]


def test_48_orientations_with_a_table_are_bit_identical():
    hu = with_table(trunk_hu())
    expected, _ = prepare(hu, IDENTITY, 32, spacing_mm=(2.0, 2.0, 5.0))
    for stored, spacing_mm, direction, *_ in stored_every_way(hu, (2.0, 2.0, 5.0)):
        volume, placement = prepare(stored, direction, 32, spacing_mm=spacing_mm)
        assert torch.equal(volume, expected)
        labels = restore(volume.expand(13, -1, -1, -1), placement)
        assert labels.shape == stored.shape
        assert not np.any(labels[stored == 300])

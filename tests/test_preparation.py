"""Section 2.1 against its literal order of steps, and orientations against SimpleITK."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import body_hu
from torch.nn import functional

from flare_clef.preparation import (
    _to_hu,
    body_box,
    canonical_axes,
    canonical_view,
    place,
    prepare,
    resize_matrix,
    with_air,
)
from flare_clef.restoration import restore

IDENTITY = (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)


def all_48():
    """Every way to store a scan: array axes order, flips, and the direction to match."""
    for axes, flips in product(permutations(range(3)), product((False, True), repeat=3)):
        direction = np.zeros((3, 3))
        for canonical in range(3):
            stored = 2 - axes[canonical]
            direction[2 - canonical, stored] = -1 if flips[canonical] else 1
        yield axes, flips, tuple(direction.ravel())


def stored_as(array, axes, flips):
    """The array whose canonical view is ``array``."""
    flipped = array[tuple(slice(None, None, -1) if f else slice(None) for f in flips)]
    return np.ascontiguousarray(np.transpose(flipped, np.argsort(axes)))


def stored_every_way(hu, spacing_mm):
    """``hu`` in all 48 orientations: array, spacing (x, y, z), direction, axes and flips of each.

    ``spacing_mm``: of canonical x, y and z."""
    for axes, flips, direction in all_48():
        sizes = np.array(spacing_mm[::-1])[np.argsort(axes)][::-1]
        yield stored_as(hu, axes, flips), tuple(sizes.tolist()), direction, axes, flips


def test_48_orientations_give_bit_identical_volumes():
    hu = body_hu()
    expected, _ = prepare(hu, IDENTITY, 32)
    for axes, flips, direction in all_48():
        volume, placement = prepare(stored_as(hu, axes, flips), direction, 32)
        assert torch.equal(volume, expected)
        assert (placement.axes, placement.flips) == (axes, flips)


def test_orientation_agrees_with_simpleitk():
    hu = body_hu()
    for axes, flips, direction in all_48():
        image = sitk.GetImageFromArray(stored_as(hu, axes, flips))
        image.SetDirection(direction)
        oriented = sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))
        view = canonical_view(sitk.GetArrayFromImage(image), *canonical_axes(direction))
        assert np.array_equal(view, oriented)


def test_oblique_scans_take_the_nearest_axes():
    a = np.radians(30)
    turned = (np.cos(a), -np.sin(a), 0, np.sin(a), np.cos(a), 0, 0, 0, -1)
    assert canonical_axes(turned) == ((0, 1, 2), (True, False, False))


def test_literal_order_of_the_paper():
    """Mask, crop, resize (torch's own interpolation), flip, clip, scale."""
    hu = stored_as(body_hu(), (0, 1, 2), (True, False, True))
    direction = (-1.0, 0, 0, 0, 1.0, 0, 0, 0, -1.0)
    inside = np.nonzero(hu > -500)
    crop = hu[tuple(slice(i.min(), i.max() + 1) for i in inside)].astype(np.float32)
    resized = functional.interpolate(
        torch.from_numpy(crop)[None, None], size=(64, 64, 64), mode="trilinear"
    )[0, 0]
    flipped = resized.flip(0, 2)
    expected = (flipped.clip(-200, 300) - 50) / 250
    volume, _ = prepare(hu, direction, 64)
    assert torch.allclose(volume, expected, atol=1e-5)
    assert volume.min() >= -1 and volume.max() <= 1


def test_resize_matrix_by_hand():
    assert np.array_equal(resize_matrix(3, 3), np.eye(3, dtype=np.float32))
    assert resize_matrix(2, 4).tolist() == [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    # Shrinking by two: a triangle four voxels wide, its share beyond the edge left out.
    assert resize_matrix(4, 2) == pytest.approx(
        np.array([[3, 3, 1, 0], [0, 1, 3, 3]], np.float32) / 7
    )
    assert resize_matrix(1, 3).tolist() == [[1], [1], [1]]


@pytest.mark.parametrize(("size", "cells"), [(512, 192), (51, 192), (300, 64), (7, 7)])
def test_resize_matrix_properties(size, cells):
    matrix = resize_matrix(size, cells)
    assert matrix.sum(axis=1) == pytest.approx(1, abs=1e-6)
    assert matrix == pytest.approx(matrix[::-1, ::-1], abs=1e-6)
    ramp = matrix @ np.arange(size, dtype=np.float32)
    inner = slice(cells // 8, -cells // 8 or None)
    expected = (np.arange(cells) + 0.5) * size / cells - 0.5
    # A sampled triangle keeps a straight line to within a few hundredths of a voxel.
    assert ramp[inner] == pytest.approx(expected[inner], abs=0.05)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_body_box(order):
    array = np.full((20, 30, 40), -1000.0, np.float32)
    array[18, 4, 7] = -499
    array[3, 22, 39] = 100
    array[0, 0, 0] = -500
    array[1, 1, 1] = np.nan
    array[0, 29, 2] = np.inf
    shuffled = np.transpose(np.ascontiguousarray(np.transpose(array, order)), np.argsort(order))
    assert body_box(shuffled) == ((3, 19), (4, 23), (7, 40))


def test_all_air():
    assert body_box(np.full((3, 4, 5), -1000, np.int16)) is None
    assert prepare(np.full((3, 4, 5), np.nan), IDENTITY, 32) is None


def test_unusable_values_count_as_air():
    hu = body_hu().astype(np.float64)
    bad = hu.copy()
    bad[10, 20, 20], bad[10, 20, 21] = np.nan, -np.inf
    hu[10, 20, 20:22] = -1024
    assert torch.equal(prepare(bad, IDENTITY, 32)[0], prepare(hu, IDENTITY, 32)[0])


def test_tall_scans_in_chunks_equal_one_matrix_product():
    hu = body_hu((150, 24, 26))
    volume, placement = prepare(hu, IDENTITY, 32)
    body = hu[tuple(slice(*b) for b in placement.box)].astype(np.float64)
    for axis in range(3):
        weights = resize_matrix(body.shape[axis], 32).astype(np.float64)
        body = np.moveaxis(np.tensordot(weights, body, (1, axis)), 0, axis)
    assert volume.numpy() == pytest.approx((body.clip(-200, 300) - 50) / 250, abs=1e-5)


def test_a_short_scan_is_laid_into_air():
    rest = ((3, 9), (0, 4))
    assert with_air(((2, 24), *rest), 5.0) == ((-9, 35), *rest)  # 110 mm: 22 slices more
    assert with_air(((0, 3), *rest), 5.0) == ((-4, 8), *rest)  # never more than four times
    assert with_air(((0, 44), *rest), 5.0) == ((0, 44), *rest)  # 220 mm
    assert with_air(((7, 99), *rest), 2.5) == ((7, 99), *rest)


def test_a_short_scan_equals_one_stored_with_air():
    hu = body_hu((30, 24, 26))
    volume, placement = prepare(hu, IDENTITY, 32, spacing_mm=(1.5, 1.5, 4.0))  # 120 of 220 mm
    (start, stop), *_ = placement.box
    assert stop - start == 55 and placement.box_in_scan[0] == (0, 30)
    body = hu[tuple(slice(*b) for b in placement.box_in_scan)].astype(np.float64)
    body = np.pad(body, ((-start, stop - 30), (0, 0), (0, 0)), constant_values=-1024)
    for axis in range(3):
        weights = resize_matrix(body.shape[axis], 32).astype(np.float64)
        body = np.moveaxis(np.tensordot(weights, body, (1, axis)), 0, axis)
    assert volume.numpy() == pytest.approx((body.clip(-200, 300) - 50) / 250, abs=2e-5)


def test_48_orientations_of_a_short_scan_are_bit_identical():
    hu = body_hu((14, 24, 26))
    expected, _ = prepare(hu, IDENTITY, 32, spacing_mm=(1.0, 1.0, 3.0))
    assert not torch.equal(expected, prepare(hu, IDENTITY, 32)[0])
    for stored, spacing_mm, direction, *_ in stored_every_way(hu, (1.0, 1.0, 3.0)):
        volume, placement = prepare(stored, direction, 32, spacing_mm=spacing_mm)
        assert torch.equal(volume, expected)
        labels = restore(volume.expand(13, -1, -1, -1), placement)
        assert labels.shape == stored.shape


def test_grid_spacing():
    placement = place((10, 20, 30), (0, 0, 1, 1, 0, 0, 0, 1, 0), ((0, 30), (0, 10), (5, 20)), 10)
    # Stored x runs along P, y along S, z along L; 30 stored x voxels of 0.5 mm, and so on.
    expected = {0: 30, 1: 10, 2: 15}
    stored = (4.0, 2.0, 0.5)
    found = placement.grid_spacing_mm((0.5, 2.0, 4.0))
    for canonical in range(3):
        assert found[canonical] == stored[placement.axes[canonical]] * expected[canonical] / 10


def test_labels_there_and_back_where_the_resize_is_exact():
    hu = np.full((16, 16, 16), 40, np.int16)
    labels = np.random.default_rng(0).integers(0, 14, (16, 16, 16)).astype(np.uint8)
    _, placement = prepare(hu, IDENTITY, 16)
    one_hot = torch.full((13, 16, 16, 16), -1.0)
    for organ in range(1, 14):
        one_hot[organ - 1][torch.from_numpy(labels == organ)] = 1.0
    assert np.array_equal(restore(one_hot, placement), labels)


@pytest.mark.filterwarnings("error")
def test_a_chunk_of_one_flipped_slice_is_taken():
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    values.flags.writeable = False
    chunk = values[::-1][1:]
    assert _to_hu(chunk).tolist() == values[:1].tolist()

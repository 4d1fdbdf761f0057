from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from bodies import SPACING_MM, body_labels, write_volume

from flare_clef.errors import UserError
from flare_clef.training.registration import (
    Grid,
    affine_map,
    deformable_map,
    load_organ_maps,
    nearness_weights,
    warp,
)


def test_shares_keep_volume_and_place_whatever_the_stored_axes(tmp_path: Path) -> None:
    labels = body_labels(0)
    straight = load_organ_maps(write_volume(tmp_path / "a.nii.gz", labels), 4.0)
    flipped = load_organ_maps(write_volume(tmp_path / "b.nii.gz", labels, flipped=True), 4.0)
    assert straight.grid == flipped.grid
    for organ in (1, 4, 12):
        assert straight.shares[organ].sum() / 255 == pytest.approx(
            (labels == organ).sum(), rel=0.02
        )
        np.testing.assert_array_equal(straight.shares[organ], flipped.shares[organ])
        z, y, x = np.argwhere(labels == organ).mean(0)
        expected = np.array([x, y, z]) * SPACING_MM + (-100.0, -80.0, 30.0)
        np.testing.assert_allclose(straight.points[organ].mean(0), expected, atol=1.0)


def test_nothing_of_an_oblique_label_map_is_cut(tmp_path: Path) -> None:
    """Turned by 20 degrees about x: two corners of an organ's box are not its ends."""
    labels = body_labels(0)
    image = sitk.ReadImage(str(write_volume(tmp_path / "straight.nii.gz", labels)))
    c, s = np.cos(np.radians(20)), np.sin(np.radians(20))
    image.SetDirection((1, 0, 0, 0, c, -s, 0, s, c))
    sitk.WriteImage(image, str(tmp_path / "leaning.nii.gz"))
    maps = load_organ_maps(tmp_path / "leaning.nii.gz", 4.0)
    for organ in np.unique(labels)[1:]:
        share = maps.shares[int(organ)]
        assert share.sum() / 255 == pytest.approx((labels == organ).sum(), rel=0.01)
    # The whole volume, by hand: y and z of its corners, turned about the origin.
    depth, height = (4.0 * (n - 1) for n in labels.shape[:2])
    ends = [(c * y - s * z, s * y + c * z) for y in (0, height) for z in (0, depth)]
    wanted = np.array([np.min(ends, 0), np.max(ends, 0)]) + (-80.0, 30.0)
    np.testing.assert_allclose(maps.volume_mm[:, 1:], wanted, atol=1e-3)


def test_without_a_neighbour_an_atlas_stays_where_it_lies() -> None:
    affine = sitk.AffineTransform(3)
    atlas = SimpleNamespace(grid=None, shares={})
    assert deformable_map({}, atlas, Grid((0.0, 0.0, 0.0), (5, 6, 7), 4.0), affine) is affine  # type: ignore[arg-type]


def test_affine_map_finds_a_known_scale_and_shift(tmp_path: Path) -> None:
    labels = body_labels(0)
    target = load_organ_maps(write_volume(tmp_path / "a.nii.gz", labels), 4.0)
    image = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    image.SetSpacing((4.4, 4.0, 3.8))
    image.SetOrigin((0.0, 10.0, 20.0))
    sitk.WriteImage(image, str(tmp_path / "moved.nii.gz"))
    atlas = load_organ_maps(tmp_path / "moved.nii.gz", 4.0)
    transform = affine_map(target, atlas, 12, nearness_weights([atlas], 12))
    # The same voxel, seen in both: (x, y, z) index 24, 28, 22.
    here = np.array([24, 28, 22]) * 4.0 + (-100.0, -80.0, 30.0)
    there = np.array([24, 28, 22]) * (4.4, 4.0, 3.8) + (0.0, 10.0, 20.0)
    np.testing.assert_allclose(transform.TransformPoint(here.tolist()), there, atol=2.0)


def test_a_body_that_the_volume_cuts_is_placed_by_what_both_show(tmp_path: Path) -> None:
    labels = body_labels(0)
    whole = load_organ_maps(write_volume(tmp_path / "whole.nii.gz", labels), 4.0)
    image = sitk.ReadImage(str(tmp_path / "whole.nii.gz"))[:, :, 12:27]
    sitk.WriteImage(image, str(tmp_path / "slab.nii.gz"))
    slab = load_organ_maps(tmp_path / "slab.nii.gz", 4.0)
    transform = affine_map(slab, whole, 12, nearness_weights([whole], 12))
    guess = warp(whole, 12, slab.grid, transform) > 0.5
    true = slab.shares[12] > 127
    assert 2 * (guess & true).sum() / (guess.sum() + true.sum()) > 0.9


def test_too_few_common_organs_and_odd_values_are_named(tmp_path: Path) -> None:
    labels = body_labels(0)
    full = load_organ_maps(write_volume(tmp_path / "full.nii.gz", labels), 4.0)
    few = np.where(np.isin(labels, (1, 2, 12)), labels, 0)
    poor = load_organ_maps(write_volume(tmp_path / "few.nii.gz", few), 4.0)
    with pytest.raises(UserError, match="only 2 organ"):
        affine_map(full, poor, 12, nearness_weights([full], 12))
    odd = np.where(labels == 12, 57, labels).astype(np.uint8)
    with pytest.raises(UserError, match=r"odd.nii.gz: holds the value 57"):
        load_organ_maps(write_volume(tmp_path / "odd.nii.gz", odd), 4.0)
    with pytest.raises(UserError, match="no voxel is labelled"):
        load_organ_maps(write_volume(tmp_path / "none.nii.gz", labels * 0), 4.0)

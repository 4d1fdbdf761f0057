"""Reorientation: 48 codes, nothing moves in space, SimpleITK agrees."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from flare_clef.errors import UserError
from flare_clef.images import image_from_array
from flare_clef.orientation import ORIENTATIONS, check_orientation, reorient


def test_there_are_48() -> None:
    assert len(set(ORIENTATIONS)) == 48


def test_two_by_hand() -> None:
    image = image_from_array(np.arange(24).reshape(2, 3, 4), (1.0, 2.0, 5.0), (10.0, 20.0, 30.0))
    ras = reorient(image, "ras")
    # x and y turn round: the first voxel is now the one at x = 10 + 3, y = 20 + 2 * 2.
    assert ras.origin_mm == (13.0, 24.0, 30.0)
    assert ras.direction == (-1, 0, 0, 0, -1, 0, 0, 0, 1)
    assert ras.array[0, 0, 0] == 11 and ras.array[1, 2, 3] == 12
    slp = reorient(image, "SLP")
    assert slp.spacing_mm == (5.0, 1.0, 2.0)
    assert slp.array.shape == (3, 4, 2)
    assert slp.array[2, 1, 1] == image.array[1, 2, 1]


@pytest.mark.parametrize("code", ORIENTATIONS[::5])
def test_same_as_simpleitk(code: str) -> None:
    array = np.random.default_rng(0).integers(-100, 100, (3, 4, 5)).astype(np.int16)
    turned = reorient(image_from_array(array, (0.7, 0.8, 2.5), (-3.0, 4.0, 5.5)), code)
    reference = sitk.GetImageFromArray(array)
    reference.SetSpacing((0.7, 0.8, 2.5))
    reference.SetOrigin((-3.0, 4.0, 5.5))
    reference = sitk.DICOMOrient(reference, code)
    np.testing.assert_array_equal(turned.array, sitk.GetArrayFromImage(reference))
    np.testing.assert_allclose(turned.origin_mm, reference.GetOrigin())
    np.testing.assert_allclose(turned.direction, reference.GetDirection())
    np.testing.assert_allclose(turned.spacing_mm, reference.GetSpacing())


@pytest.mark.parametrize("code", ["LLS", "LP", "XYZ", ""])
def test_other_letters_are_refused(code: str) -> None:
    with pytest.raises(UserError, match="one each of"):
        check_orientation(code)

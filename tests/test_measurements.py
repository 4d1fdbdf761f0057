"""Measurements against figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flare_clef.images import image_from_array
from flare_clef.measurements import measure
from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.restoration import mean_confidence

LIVER, RIGHT, LEFT = (ORGAN_BY_NAME[n].index for n in ("liver", "right_kidney", "left_kidney"))


def scan(hu: np.ndarray, direction=(1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)):
    return image_from_array(hu, (2.0, 3.0, 5.0), (0.0, 0.0, 0.0), direction)


def organ(case, name):
    return next(one for one in case.organs if one.organ == name)


def test_volume_hu_box_and_parts():
    labels, hu = np.zeros((10, 12, 14), np.uint8), np.full((10, 12, 14), -1000, np.int16)
    labels[2:4, 3, 4:9] = LIVER
    labels[8, 9, 10] = LIVER
    hu[2:4, 3, 4:9] = np.arange(10).reshape(2, 5)
    hu[8, 9, 10] = 65
    liver = organ(measure("a", labels, scan(hu), confidence={LIVER: 0.75}), "liver")
    values = [*range(10), 65]
    assert liver.volume_ml == 0.33  # 11 voxels of 30 mm3
    assert liver.hu_mean == 10 and liver.hu_median == 5
    assert liver.hu_sd == pytest.approx((sum((v - 10) ** 2 for v in values) / 11) ** 0.5, abs=5e-3)
    assert (liver.hu_p25, liver.hu_p75) == (2.5, 7.5)
    assert liver.box_mm == (14.0, 21.0, 35.0)  # 7 x 2, 7 x 3, 7 x 5 mm
    assert (liver.parts, liver.largest_part_percent) == (2, 90.91)
    assert liver.touches_edge == () and liver.confidence == 0.75
    assert liver.warnings == ("0.3 ml is less than 700 ml, the least expected in adults",)


def test_edges_are_named_by_the_patient_not_by_storage():
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[0, 2, 5] = LIVER
    hu = np.zeros(labels.shape, np.int16)
    assert organ(measure("a", labels, scan(hu)), "liver").touches_edge == ("inferior", "left")
    turned = scan(hu, (-1.0, 0, 0, 0, 1.0, 0, 0, 0, -1.0))
    assert organ(measure("a", labels, turned), "liver").touches_edge == ("superior", "right")


def test_sides():
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[2, 2, 1], labels[2, 2, 4] = RIGHT, LEFT  # x grows to the patient's left
    hu = np.zeros(labels.shape, np.int16)
    assert not [w for w in measure("a", labels, scan(hu)).warnings if "sides" in w]
    mirrored = scan(hu, (-1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    assert any(
        "right kidney lies to the left of the left kidney" in w
        for w in measure("a", labels, mirrored).warnings
    )


def test_missing_kidney_is_said_only_of_what_was_asked():
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[2, 2, 1] = RIGHT
    image = scan(np.zeros(labels.shape, np.int16))
    assert (
        "left kidney missing: removed, outside, or overlooked"
        in measure("a", labels, image).warnings
    )
    one = measure("a", labels, image, organs={RIGHT})
    assert [o.organ for o in one.organs] == ["right_kidney"] and one.warnings == ()


def test_large_organ_is_hinted_at_and_a_cut_small_one_is_not():
    labels = np.zeros((60, 60, 60), np.uint8)
    labels[:, :, 50] = LEFT  # 3600 voxels of 0.03 ml, at the edge
    labels[5:55, 5:55, 5:45] = RIGHT  # 100,000 voxels
    case = measure("a", labels, scan(np.zeros(labels.shape, np.int16)))
    assert organ(case, "right_kidney").warnings == (
        "3000 ml is more than 350 ml, the most expected in adults",
    )
    labels[:, :, 50] = 0
    labels[0, :3, 50] = LEFT
    case = measure("a", labels, scan(np.zeros(labels.shape, np.int16)))
    assert organ(case, "left_kidney").volume_ml == 0.09
    assert organ(case, "left_kidney").warnings == ()


def test_an_organ_of_less_than_half_a_microlitre_is_not_missing():
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[2, 2, 1], labels[2, 2, 4] = RIGHT, LEFT
    image = image_from_array(np.zeros(labels.shape, np.int16), (0.5, 0.5, 0.5))
    case = measure("a", labels, image, organs={RIGHT, LEFT})
    assert organ(case, "left_kidney").parts == 1 and case.warnings == ()


def test_values_that_are_not_finite_are_left_out():
    labels = np.full((3, 3, 3), LIVER, np.uint8)
    hu = np.full((3, 3, 3), 50, np.float32)
    hu[0] = np.nan
    assert organ(measure("a", labels, scan(hu)), "liver").hu_mean == 50
    nothing = organ(measure("a", labels, scan(np.full((3, 3, 3), np.nan, np.float32))), "liver")
    assert nothing.hu_mean is None and nothing.volume_ml > 0


def test_mean_confidence_by_hand():
    logits = torch.full((13, 2, 2, 2), -5.0)
    logits[0, 0] = 0.0  # four nodes, sigmoid 0.5
    logits[4, 1, 0] = torch.log(torch.tensor(3.0))  # two nodes, sigmoid 0.75
    logits[4, 0, 0, 0] = torch.log(torch.tensor(9.0))  # taken from the liver, sigmoid 0.9
    assert mean_confidence(logits) == {1: pytest.approx(0.5), 5: pytest.approx(0.8)}

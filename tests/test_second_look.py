"""Long scans: which slices are looked at again, and labelled as if they came alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import body_hu
from test_preparation import IDENTITY, stored_as, stored_every_way

from flare_clef import Segmenter
from flare_clef.images import image_from_array
from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.preparation import place
from flare_clef.probabilities import grid_affine
from flare_clef.second_look import drop_outside, slices_to_look_at

REACHING_OUT = (5, 6, 10, 11, 12)
"""Aorta, vena cava, esophagus, stomach and duodenum."""
LIVER, SPLEEN, AORTA = (ORGAN_BY_NAME[name].index for name in ("liver", "spleen", "aorta"))


def winners_with(*blocks, grid=50):
    """Labels on a grid of ``grid``^3: (organ, first slice, last + 1), 10 x 10 nodes each."""
    labels = torch.zeros((grid,) * 3, dtype=torch.uint8)
    for organ, first, last in blocks:
        labels[first:last, 20:30, 20:30] = organ
    return labels


def placed(slices=200, grid=50, start=0):
    """A scan of ``slices`` slices whose box begins at slice ``start``; nodes of (20, 8, 8) mm for
    200 slices of 5 mm."""
    shape = (slices + start, 100, 100)
    box = ((start, slices + start), (0, 100), (0, 100))
    return place(shape, IDENTITY, box, grid)


SPACING = (4.0, 4.0, 5.0)


def test_slices_by_hand():
    """1,000 mm; liver at 400 to 600 mm, spleen at 440 to 640, so 340 to 700 and 400 in all."""
    winners = winners_with((LIVER, 20, 30))
    winners[22:32, 5:15, 5:15] = SPLEEN
    part = slices_to_look_at(winners, placed(), SPACING)
    assert (part.start * 5, part.stop * 5) == (320, 720)
    # 60 mm about what is longer than that.
    winners[10:32, 5:15, 5:15] = SPLEEN
    part = slices_to_look_at(winners, placed(), SPACING)
    assert (part.start * 5, part.stop * 5) == (140, 700)


def test_the_box_may_begin_within_the_scan():
    winners = winners_with((LIVER, 10, 32))
    part = slices_to_look_at(winners, placed(start=7), SPACING)
    assert (part.start, part.stop) == (7 + 28, 7 + 140)


def test_no_further_than_the_body_and_400_mm_at_least():
    """The liver at 0 to 200 mm, or at 800 to 1,000."""
    part = slices_to_look_at(winners_with((LIVER, 0, 10)), placed(start=7), SPACING)
    assert (part.start, part.stop) == (7, 7 + 80)
    part = slices_to_look_at(winners_with((LIVER, 40, 50)), placed(start=7), SPACING)
    assert (part.start, part.stop) == (7 + 120, 7 + 200)
    # Longer than that: only cut off.
    part = slices_to_look_at(winners_with((LIVER, 0, 25)), placed(start=7), SPACING)
    assert (part.start, part.stop) == (7, 7 + 112)


def test_main_parts_of_what_lies_in_the_abdomen_alone():
    winners = winners_with((LIVER, 20, 30), (LIVER, 45, 46), (AORTA, 35, 50))
    part = slices_to_look_at(winners, placed(), SPACING)
    assert (part.start * 5, part.stop * 5) == (300, 700)


def test_specks_say_nothing():
    winners = winners_with(grid=50)
    winners[3, 3:5, 3:5] = LIVER  # 4 nodes of 1.28 ml
    assert slices_to_look_at(winners, placed(), SPACING) is None


@pytest.mark.parametrize(("slices", "looks"), [(120, 1), (121, 2)])
def test_from_600_mm_on(slices, looks):
    part = slices_to_look_at(winners_with((LIVER, 20, 30)), placed(slices), SPACING)
    assert (part is not None) == (looks == 2)


def test_what_shows_nearly_all_gains_nothing():
    assert slices_to_look_at(winners_with((LIVER, 2, 48)), placed(), SPACING) is None
    assert slices_to_look_at(winners_with(), placed(), SPACING) is None


def test_what_is_dropped_outside():
    labels = np.arange(14, dtype=np.uint8)[None, :, None].repeat(9, axis=0)
    drop_outside(labels, slice(2, 6))
    assert np.array_equal(labels[2:6, :, 0], np.arange(14)[None].repeat(4, axis=0))
    for z in (0, 1, 6, 7, 8):
        assert labels[z, :, 0].tolist() == [0, 0, 0, 0, 0, 5, 6, 0, 0, 0, 10, 11, 12, 0]


def long_scan():
    """700 mm from feet to head."""
    return body_hu((70, 40, 44)), (8.0, 8.0, 10.0)


@pytest.fixture(scope="module")
def segmenter(tiny_weights):
    return Segmenter(tiny_weights, precision="fp32")


@pytest.fixture
def middle_again(monkeypatch):
    """The random network labels all slices; the middle third is taken for the abdomen."""

    def slices(winners, placement, spacing_mm):
        return slice(20, 45) if max(placement.shape) == 70 else None

    monkeypatch.setattr("flare_clef.segmenter.slices_to_look_at", slices)


def one_look(monkeypatch):
    monkeypatch.setattr("flare_clef.segmenter.slices_to_look_at", lambda *_: None)


def test_slices_as_if_they_came_alone(segmenter, middle_again, monkeypatch):
    hu, spacing_mm = long_scan()
    stages = []
    scan = image_from_array(hu, spacing_mm)
    twice = segmenter.segment(scan, with_logits=True, with_confidence=True, on_stage=stages.append)
    assert stages == ["prepare", "network", "restore"] * 2
    assert set(twice.seconds) == {"prepare", "network", "restore"}
    one_look(monkeypatch)
    once = segmenter.segment(scan)
    alone = segmenter.segment(
        image_from_array(hu[20:45], spacing_mm), with_logits=True, with_confidence=True
    )
    assert np.array_equal(twice.labels[20:45], alone.labels)
    outside = np.where(np.isin(once.labels, REACHING_OUT), once.labels, 0)
    assert np.array_equal(twice.labels[:20], outside[:20])
    assert np.array_equal(twice.labels[45:], outside[45:])
    assert outside[:20].any() and not np.array_equal(outside[:20], once.labels[:20])
    assert not np.array_equal(twice.labels[20:45], once.labels[20:45])
    assert torch.equal(twice.logits, alone.logits) and twice.confidence == alone.confidence
    # The grid lies where it lies in the slices alone, 20 slices of 10 mm higher.
    here, there = (
        grid_affine(found.placement, image)
        for found, image in ((twice, scan), (alone, replace(scan, array=hu[20:45])))
    )
    assert np.allclose(here[:3, :3], there[:3, :3])
    assert here[:3, 3] - there[:3, 3] == pytest.approx([0, 0, 200])


def test_organs_asked_for(segmenter, middle_again):
    hu, spacing_mm = long_scan()
    scan = image_from_array(hu, spacing_mm)
    everything = segmenter.segment(scan).labels
    found = [name for name, organ in ORGAN_BY_NAME.items() if (everything == organ.index).any()]
    assert len(found) > 3
    for name in found:
        index = ORGAN_BY_NAME[name].index
        only = segmenter.segment(scan, organs=[name]).labels
        assert np.array_equal(only, np.where(everything == index, index, 0))


def test_strays_kept(tiny_weights, middle_again):
    hu, spacing_mm = long_scan()
    scan = image_from_array(hu, spacing_mm)
    keeping = Segmenter(tiny_weights, precision="fp32", keep_strays=True)
    alone = keeping.segment(image_from_array(hu[20:45], spacing_mm)).labels
    assert np.array_equal(keeping.segment(scan).labels[20:45], alone)


def test_48_orientations_of_a_long_scan(segmenter, middle_again):
    hu, spacing_mm = long_scan()
    expected = segmenter.segment(image_from_array(hu, spacing_mm)).labels
    for stored, sizes, direction, axes, flips in list(stored_every_way(hu, spacing_mm))[::7]:
        found = segmenter.segment(image_from_array(stored, sizes, direction=direction))
        assert np.array_equal(found.labels, stored_as(expected, axes, flips))
        assert found.placement.box[0] == (20, 45)


def test_slices_without_a_body(segmenter, monkeypatch):
    hu, spacing_mm = long_scan()
    hu[20:45] = -1000
    monkeypatch.setattr("flare_clef.segmenter.slices_to_look_at", lambda *_: slice(20, 45))
    twice = segmenter.segment(image_from_array(hu, spacing_mm)).labels
    one_look(monkeypatch)
    assert np.array_equal(twice, segmenter.segment(image_from_array(hu, spacing_mm)).labels)

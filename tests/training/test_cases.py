"""Label maps in our numbers, on the prepared grid, and the checks of a case."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import body_hu, write_scan
from small_cases import LEFT, MIDDLE, RIGHT, SHAPE, label_map, liver, write_pair

from flare_clef.errors import UserError
from flare_clef.images import IDENTITY, read_image
from flare_clef.preparation import place
from flare_clef.training.cases import (
    Case,
    check_pair,
    find_cases,
    histogram,
    place_labels,
    read_labels,
)
from flare_clef.training.checking import problems_of, warnings_of
from flare_clef.training.doubt import UNDECIDED


def test_labels_on_the_grid_by_hand():
    labels = np.arange(8, dtype=np.uint8)[None, None]
    placement = place((1, 1, 8), IDENTITY, ((0, 1), (0, 1), (2, 8)), (1, 1, 3))
    # Six voxels from 2 on in three cells: their centres lie at 3, 5 and 7.
    assert place_labels(labels, placement).ravel().tolist() == [3, 5, 7]


def test_air_that_the_placement_adds_is_background():
    labels = np.arange(1, 5, dtype=np.uint8)[:, None, None]
    placement = place((4, 1, 1), IDENTITY, ((-3, 6), (0, 1), (0, 1)), (9, 1, 1))
    assert place_labels(labels, placement).ravel().tolist() == [0, 0, 0, 1, 2, 3, 4, 0, 0]


def test_labels_follow_the_canonical_axes():
    mirrored = (-1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)
    labels = label_map(liver=RIGHT)
    placement = place(SHAPE, mirrored, tuple((0, n) for n in SHAPE), SHAPE)
    assert np.array_equal(place_labels(labels, placement), labels[:, :, ::-1])


def test_undecided_voxels_are_allowed_and_kept(tmp_path: Path):
    labels = liver()
    labels[0, 0, :3] = UNDECIDED
    write_pair(tmp_path, "a", labels)
    (case,) = find_cases(tmp_path)
    assert np.array_equal(read_labels(case).array, labels)


def test_values_are_renumbered(tmp_path: Path):
    theirs = np.zeros(SHAPE, np.uint8)
    theirs[2], theirs[3], theirs[4] = 1, 2, 7
    path = write_scan(tmp_path / "l.nii.gz", theirs)
    case = Case("l", path, path, ("spleen",), renumbering=((0, 0), (1, 3), (2, 1), (7, 255)))
    ours = read_labels(case).array
    assert [int(ours[z].min()) for z in range(5)] == [0, 0, 3, 1, 255]
    assert np.array_equal(ours[2:5].min((1, 2)), ours[2:5].max((1, 2)))
    narrower = Case("l", path, path, (), renumbering=((0, 0), (1, 3), (2, 1)))
    with pytest.raises(UserError, match="holds the label 7; dataset.json gives .* 0, 1, 2 only"):
        read_labels(narrower)


@pytest.mark.parametrize(
    ("value", "shown"), [(1.5, "1.5"), (-1.0, "-1"), (300.0, "300"), (np.nan, "nan")]
)
def test_values_that_are_no_labels(tmp_path: Path, value: float, shown: str):
    labels = liver().astype(np.float32)
    labels[0, 0, 0] = value
    path = write_scan(tmp_path / "l.nii.gz", labels)
    with pytest.raises(UserError, match=f"holds the value {shown}.*only 0 to 13 and 255"):
        read_labels(Case("l", path, path, ("liver",)))


def test_whole_numbers_in_a_float_file_are_labels(tmp_path: Path):
    path = write_scan(tmp_path / "l.nii.gz", liver().astype(np.float32))
    assert np.array_equal(read_labels(Case("l", path, path, ("liver",))).array, liver())


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        ({"spacing": (1.5, 1.5, 2.5)}, r"spacing \(1.5, 1.5, 2.5\) mm, its image"),
        ({"origin": (-10.0, 5.0, 101.0)}, r"origin \(-10.0, 5.0, 101.0\) mm, its image"),
        ({"direction": (1.0, 0, 0, 0, 1.0, 0, 0, 0, -1.0)}, "axes point elsewhere"),
    ],
)
def test_geometry_must_be_the_images(tmp_path: Path, geometry: dict, words: str):
    scan = read_image(write_scan(tmp_path / "i_0000.nii.gz", body_hu(SHAPE)))
    labels = read_image(write_scan(tmp_path / "l.nii.gz", liver(), **geometry))
    case = Case("i", tmp_path / "i_0000.nii.gz", tmp_path / "l.nii.gz", ("liver",))
    with pytest.raises(UserError, match=words):
        check_pair(case, scan, labels)


def test_origins_may_differ_by_rounding(tmp_path: Path):
    scan = read_image(write_scan(tmp_path / "i.nii.gz", body_hu(SHAPE)))
    near = read_image(write_scan(tmp_path / "l.nii.gz", liver(), origin=(-10.001, 5.0, 100.0)))
    check_pair(Case("i", tmp_path, tmp_path, ("liver",)), scan, near)


def _judge(labels: np.ndarray, *organs: str) -> tuple[list[str], list[str]]:
    case = Case("a", Path("a_0000.nii.gz"), Path("a.nii.gz"), organs)
    counts = histogram(labels)
    return problems_of(case, counts, labels), warnings_of(case, counts, labels)


def test_sides_of_the_body():
    kidneys = "right_kidney", "left_kidney"
    assert _judge(label_map(right_kidney=RIGHT, left_kidney=LEFT), *kidneys) == ([], [])
    (problem,), _ = _judge(label_map(right_kidney=LEFT, left_kidney=RIGHT), *kidneys)
    assert "its right_kidney lies on the patient's left of its left_kidney" in problem
    (problem,), _ = _judge(label_map(liver=LEFT, spleen=MIDDLE), "liver", "spleen")
    assert "liver lies on the patient's left of its spleen" in problem
    glands = "right_adrenal_gland", "left_adrenal_gland"
    (problem,), _ = _judge(label_map(right_adrenal_gland=LEFT, left_adrenal_gland=RIGHT), *glands)
    assert "its right_adrenal_gland lies on the patient's left" in problem


def test_sides_that_some_patients_have_otherwise():
    vessels = "inferior_vena_cava", "aorta"
    assert _judge(label_map(inferior_vena_cava=RIGHT, aorta=MIDDLE), *vessels) == ([], [])
    problems, (warning,) = _judge(label_map(inferior_vena_cava=LEFT, aorta=MIDDLE), *vessels)
    assert problems == []
    assert "its inferior_vena_cava lies on the patient's left of its aorta" in warning


def test_organs_beyond_and_below_the_claim():
    labels = label_map(liver=RIGHT, aorta=MIDDLE)
    (problem,), warnings = _judge(labels, "liver")
    assert problem.endswith("doesn't claim to label: aorta (96)") and warnings == []
    problems, (warning,) = _judge(labels, "liver", "aorta", "gallbladder", "spleen")
    assert problems == [] and warning.startswith("no voxel of gallbladder, spleen;")


def test_an_empty_map_is_a_problem_even_with_undecided_voxels():
    empty = np.zeros(SHAPE, np.uint8)
    empty[0] = UNDECIDED
    (problem,), warnings = _judge(empty, "liver")
    assert "no voxel of any organ" in problem and warnings == []

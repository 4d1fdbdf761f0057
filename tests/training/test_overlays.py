"""Pictures of the best and the worst case: what is in them, and which cases they show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import body_hu
from matplotlib.image import imread
from small_cases import LEFT, MIDDLE, RIGHT, SHAPE, label_map, liver, write_pair

from flare_clef.images import image_from_array
from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.training.cases import Case, find_cases
from flare_clef.training.doubt import UNDECIDED
from flare_clef.training.overlays import BestAndWorst, _slices, write_overlays

SPACING = (2.0, 2.0, 4.0)
CASE = Case("a", Path("a_0000.nii.gz"), Path("a.nii.gz"), ("liver", "spleen"))


def draw(path: Path, labels: np.ndarray, reference: np.ndarray, case: Case = CASE) -> np.ndarray:
    """(rows, columns, 3) uint8 of the picture, without its list of organs."""
    write_overlays(path, case, image_from_array(body_hu(SHAPE), SPACING), labels, reference)
    picture = (imread(path)[..., :3] * 255).round().astype(np.uint8)
    return picture[:, : int(0.75 * picture.shape[1])]


def columns_of(picture: np.ndarray, organ: str) -> np.ndarray:
    """Columns with pixels of an organ's colour, as shares of the width."""
    near = np.abs(picture.astype(int) - ORGAN_BY_NAME[organ].colour).max(axis=2) < 12
    return np.flatnonzero(near.any(axis=0)) / picture.shape[1]


def test_the_patients_right_is_on_the_left(tmp_path: Path):
    both = label_map(liver=RIGHT, spleen=LEFT)
    picture = draw(tmp_path / "p.png", both, both)
    # The axial panel is the first of three.
    livers, spleens = (columns_of(picture, organ) for organ in ("liver", "spleen"))
    axial = 1 / 3
    assert livers[livers < axial].max() < spleens[spleens < axial].min()


def test_how_a_scan_is_stored_does_not_change_its_picture(tmp_path: Path):
    labels, truth = label_map(liver=RIGHT, spleen=LEFT), label_map(liver=MIDDLE, spleen=LEFT)
    hu = body_hu(SHAPE)
    mirrored = (-1.0, 0, 0, 0, 1.0, 0, 0, 0, -1.0)
    write_overlays(tmp_path / "a.png", CASE, image_from_array(hu, SPACING), labels, truth)
    turn = np.s_[::-1, :, ::-1]
    stored = image_from_array(hu[turn], SPACING, direction=mirrored)
    write_overlays(tmp_path / "b.png", CASE, stored, labels[turn], truth[turn])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_both_contours_are_drawn_and_organs_without_labels_are_not(tmp_path: Path):
    nothing = np.zeros(SHAPE, np.uint8)
    alone = columns_of(draw(tmp_path / "1.png", liver(), nothing), "liver")
    reference = columns_of(draw(tmp_path / "2.png", nothing, liver()), "liver")
    assert len(alone) > 20 and len(reference) > 20
    spleen_only = replace(CASE, organs=("spleen",))
    assert not len(columns_of(draw(tmp_path / "3.png", liver(), liver(), spleen_only), "liver"))
    undecided = np.full(SHAPE, UNDECIDED, np.uint8)
    assert not len(columns_of(draw(tmp_path / "4.png", liver(), undecided), "liver"))


def test_the_slices_are_those_that_differ_most():
    truth = np.zeros((4, 5, 6), np.uint8)
    truth[1, 2:4, 3] = 1
    guess = truth.copy()
    guess[3, 4, 1:3] = 1
    assert _slices(truth, guess) == [3, 4, 1]
    assert _slices(truth, truth) == [1, 2, 3]


def test_best_and_worst_of_many(tmp_path: Path):
    for name in "abc":
        write_pair(tmp_path, name, liver())
    judged = BestAndWorst()
    assert judged.write(tmp_path / "validation", 1) == []
    for case, score in zip(find_cases(tmp_path), (0.5, 0.9, 0.2), strict=True):
        judged.see(case, liver(), liver(), {"liver": score})
    judged.see(replace(CASE, name="no organ"), liver(), liver(), {})
    assert judged._best is not None and judged._best.case.name == "b"
    assert judged._worst is not None and judged._worst.case.name == "c"
    best, worst = judged.write(tmp_path / "validation", 300)
    assert [p.name for p in sorted((tmp_path / "validation").iterdir())] == [best.name, worst.name]
    assert imread(best).shape[1] == pytest.approx(1540, abs=10)

"""The challenge's rules against values worked out by hand and plainly written formulas."""

from __future__ import annotations

import numpy as np
import pytest

from flare_clef.metrics import dice, dice_per_organ, score_organs, volumes_ml
from flare_clef.organs import ORGANS

LIVER, AORTA = 1, 5


def cubes(shift):
    """Reference and prediction: 4 x 4 x 4 liver cubes, the second ``shift`` further in x."""
    reference, prediction = np.zeros((2, 8, 8, 16), np.uint8)
    reference[2:6, 2:6, 2:6] = LIVER
    prediction[2:6, 2:6, 2 + shift : 6 + shift] = LIVER
    return prediction, reference


@pytest.mark.parametrize(("shift", "wanted"), [(0, 1), (1, 0.75), (2, 0.5), (3, 0.25), (4, 0)])
def test_dice_of_shifted_cubes(shift, wanted):
    assert dice(*cubes(shift), LIVER) == wanted


def test_absent_from_both_is_one_and_from_one_is_zero():
    empty = np.zeros((4, 4, 4), np.uint8)
    spot = empty.copy()
    spot[1, 1, 1] = LIVER
    for pair, wanted in (((empty, empty), 1), ((spot, empty), 0), ((empty, spot), 0)):
        score = score_organs(*pair, (1, 1, 1), ["liver"])["liver"]
        assert (score.dsc, score.nsd, score.hd95_mm) == (wanted, wanted, None)


def test_dice_and_volumes_equal_the_plain_formulas():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 14, (2, 9, 10, 11), dtype=np.uint8)
    found = dice_per_organ(a, b, [organ.name for organ in ORGANS])
    volumes = volumes_ml(a, (0.5, 2, 3))
    for organ in ORGANS:
        p, r = a == organ.index, b == organ.index
        assert found[organ.name] == pytest.approx(
            2 * (p & r).sum() / (p.sum() + r.sum()), abs=1e-12
        )
        assert volumes[organ.name] == pytest.approx(p.sum() * 0.003, abs=1e-12)


def test_volumes_where_axes_lean():
    """By hand: 2 x 3 x 5 mm, the second axis leaning by 30 degrees: half of a root of 3."""
    labels = np.full((2, 2, 2), LIVER, np.uint8)
    leaning = (1.0, 0.5, 0.0, 0.0, 0.75**0.5, 0.0, 0.0, 0.0, 1.0)
    upright = volumes_ml(labels, (2, 3, 5))["liver"]
    assert upright == pytest.approx(0.24)
    assert volumes_ml(labels, (2, 3, 5), leaning)["liver"] == pytest.approx(0.24 * 0.8660254)
    score = score_organs(labels, labels, (2, 3, 5), ["liver"], direction=leaning)["liver"]
    assert score.volume_ml == score.reference_ml == pytest.approx(0.24 * 0.8660254)


def tube(first, last):
    """An aorta of 2 x 2 voxels through the slices ``first`` to ``last``."""
    labels = np.zeros((12, 8, 8), np.uint8)
    labels[first : last + 1, 3:5, 3:5] = AORTA
    return labels


def test_tubes_are_scored_between_the_references_first_and_last_slice():
    prediction, reference = tube(0, 11), tube(3, 8)
    assert score_organs(prediction, reference, (1, 1, 1), ["aorta"])["aorta"].dsc == 1
    plain = score_organs(prediction, reference, (1, 1, 1), ["aorta"], rules="plain")["aorta"]
    assert plain.dsc == pytest.approx(2 * 6 / 18)
    # The last slice of the reference is left out, as published: missing it costs nothing.
    assert score_organs(tube(3, 7), reference, (1, 1, 1), ["aorta"])["aorta"].dsc == 1
    short = score_organs(tube(4, 8), reference, (1, 1, 1), ["aorta"])["aorta"]
    assert short.dsc == pytest.approx(2 * 4 / 9)


def test_later_rules_drop_nsd_where_dsc_is_low():
    prediction, reference = np.zeros((2, 8, 8, 16), np.uint8)
    reference[2:6, 2:6, 2:6] = LIVER
    prediction[2:6, 2:6, 6:10] = LIVER
    # Side by side, 4 mm apart at most: all within the liver's 5 mm, and yet DSC is 0.
    assert score_organs(prediction, reference, (1, 1, 1), ["liver"])["liver"].nsd == 1
    later = score_organs(prediction, reference, (1, 1, 1), ["liver"], rules="later")["liver"]
    assert (later.dsc, later.nsd) == (0, 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_figure_equals_the_published_library():
    library = pytest.importorskip("surface_distance", reason="surface-distance is not installed")
    rng = np.random.default_rng(1)
    spacing_mm = (0.7, 0.9, 2.5)
    reference = np.zeros((20, 24, 28), np.uint8)
    reference[5:12, 6:15, 9:20] = LIVER
    reference[2:9, 16:22, 3:8] = 3
    prediction = np.roll(reference, (1, 2, -2), (0, 1, 2)) * (rng.random(reference.shape) < 0.9)
    prediction = prediction.astype(np.uint8)
    scores = score_organs(prediction, reference, spacing_mm, ["liver", "spleen"])
    for organ in ORGANS[0], ORGANS[2]:
        distances = library.compute_surface_distances(
            reference == organ.index, prediction == organ.index, spacing_mm[::-1]
        )
        score = scores[organ.name]
        wanted = library.compute_surface_dice_at_tolerance(distances, organ.nsd_tolerance_mm)
        assert score.nsd == pytest.approx(wanted, abs=1e-6)
        wanted = library.compute_robust_hausdorff(distances, 95)
        assert score.hd95_mm == pytest.approx(wanted, abs=1e-6)


def test_shapes_must_be_equal():
    with pytest.raises(ValueError, match="of one shape"):
        dice(np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 3), np.uint8), LIVER)

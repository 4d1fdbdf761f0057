from __future__ import annotations

import numpy as np
import pytest

from flare_clef.training.atlas_votes import collect
from flare_clef.training.fusion import agreement, calibrate, fuse, misfit, possible_values
from flare_clef.training.registration import Grid


def test_agreement_is_dsc_weighted_by_nearness() -> None:
    one = {1: np.array([[[1.0, 1.0, 0.0]]])}
    other = {1: np.array([[[1.0, 0.0, 1.0]]])}
    assert agreement(one, other, np.ones((1, 1, 3))) == pytest.approx(0.5)
    assert agreement(one, other, np.array([[[1.0, 0.0, 0.0]]])) == pytest.approx(1.0)


def test_the_atlas_that_fits_here_decides_here() -> None:
    votes = np.array([[[[1.0, 1.0]]], [[[0.0, 0.0]]]])
    misfits = np.array([[[[0.0, 0.5]]], [[[0.5, 0.0]]]])
    left, right = fuse(votes, misfits)[0, 0]
    assert left > 0.99 and right < 0.01
    assert fuse(votes, np.zeros_like(votes))[0, 0, 0] == pytest.approx(0.5)


def test_values_that_no_soft_organ_has() -> None:
    hu = np.array([-1000, -500, -100, -59, 40, 390, 900])
    assert possible_values(hu).tolist() == [True, False, False, True, True, True, False]


def test_calibration_gives_the_share_that_was_right() -> None:
    # Votes of 0.12 were right in 1 of 4, of 0.52 in 3 of 4, of 0.92 always.
    vote = np.repeat([0.02, 0.12, 0.52, 0.92], 4)
    true = np.array([0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1], bool)
    calibration = calibrate([vote], [true])
    assert calibration.probability(np.array([0.125, 0.525, 0.99])).tolist() == pytest.approx(
        [0.25, 0.75, 1.0]
    )
    # At 0.15 to 0.5 eight voxels are taken, seven of them rightly; eight are true.
    assert calibration.expected_dsc == pytest.approx((14 / 16,))


def test_more_votes_never_mean_less() -> None:
    vote = np.repeat([0.12, 0.52, 0.92], 4)
    true = np.array([0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0], bool)
    curve = calibrate([vote], [true]).probability(np.linspace(0, 1, 50))
    assert (np.diff(curve) >= 0).all()


def test_votes_that_fit_best_come_first() -> None:
    fits = np.random.default_rng(0).permutation(9) / 100
    votes = [(np.full((1, 1, 1), fit), np.zeros((1, 1, 1)), float(fit)) for fit in fits]
    kept = collect(votes)
    wanted = sorted(fits, reverse=True)
    assert list(kept.agreement) == wanted and kept.organ.ravel().tolist() == wanted


def test_without_a_neighbour_nothing_misfits() -> None:
    grid = Grid((0.0, 0.0, 0.0), (5, 6, 7), 4.0)
    np.testing.assert_array_equal(misfit({}, {}, grid), np.zeros((5, 6, 7), np.float32))
    half = {1: np.full(grid.shape, 0.5, np.float32)}
    whole = {1: np.ones(grid.shape, np.float32)}
    np.testing.assert_allclose(misfit(half, whole, grid), 0.5, rtol=1e-5)

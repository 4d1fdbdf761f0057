"""Doubt packed into labels: by hand, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest

from flare_clef.training.doubt import CLASSES, UNDECIDED, WEIGHTS, with_doubt


def test_by_hand():
    labels = np.array([12, 12, 12, 0, 0, 0, 4, UNDECIDED], np.uint8)
    chance = np.array([255, 204, 128, 0, 13, 20, 20, 100], np.uint8)
    packed = with_doubt(labels, chance, organ=12)
    assert CLASSES[packed].tolist() == [12, 12, 12, 0, 0, 0, 4, 0]
    # |2 P - 1| in fifteenths: 204 / 255 is 0.8, certainty 0.6; 13 / 255 is 0.051, 0.9 (13.5).
    expected = [1, 9 / 15, 1 / 15, 1, 13 / 15, 13 / 15, 1, 0]
    assert WEIGHTS[packed] == pytest.approx(expected, abs=0.04)
    assert packed[7] == UNDECIDED and packed[6] == 4 and packed[3] == 0


def test_every_byte_without_doubt_is_its_class():
    plain = np.arange(14, dtype=np.uint8)
    assert (CLASSES[plain] == plain).all() and (WEIGHTS[plain] == 1).all()


def test_classes_are_kept_and_weights_follow_certainty():
    random = np.random.default_rng(0)
    labels = random.choice([0, 3, 12, UNDECIDED], (20, 20, 20)).astype(np.uint8)
    chance = random.integers(0, 256, labels.shape, dtype=np.uint8)
    packed = with_doubt(labels, chance, organ=12)
    known = labels != UNDECIDED
    assert (CLASSES[packed][known] == labels[known]).all()
    assert (packed == UNDECIDED)[~known].all() and not (packed == UNDECIDED)[known].any()
    open_ = (labels == 0) | (labels == 12)
    certainty = np.abs(2 * chance[open_].astype(float) / 255 - 1)
    assert np.abs(WEIGHTS[packed][open_] - certainty).max() <= 1 / 15
    assert (WEIGHTS[packed][labels == 3] == 1).all()

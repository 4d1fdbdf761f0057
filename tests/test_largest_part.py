"""Only the largest part stays, but for the aorta."""

from __future__ import annotations

import numpy as np

from flare_clef.largest_part import SINGLE, keep_largest
from flare_clef.organs import ORGAN_BY_NAME


def test_largest_part_stays():
    liver, aorta = ORGAN_BY_NAME["liver"].index, ORGAN_BY_NAME["aorta"].index
    labels = np.zeros((8, 9, 10), np.uint8)
    labels[1:4, 1:4, 1:4] = liver
    labels[4, 4, 4] = liver  # touches by a corner
    labels[7, 8, 9] = liver
    labels[0, 0, 0:2] = aorta
    labels[7, 0, 0] = aorta
    expected = labels.copy()
    expected[7, 8, 9] = 0
    found = keep_largest(labels)
    assert found is labels
    assert np.array_equal(found, expected)


def test_nothing_and_all_but_the_aorta():
    assert not keep_largest(np.zeros((2, 3, 4), np.uint8)).any()
    assert len(SINGLE) == 12

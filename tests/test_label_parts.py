"""Boxes and parts of labels, by hand."""

from __future__ import annotations

import numpy as np

from flare_clef.label_parts import connected_parts, masks_in_boxes, part_sizes


def test_corners_touch():
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = True
    assert part_sizes(mask).tolist() == [2, 1]
    parts, sizes = connected_parts(mask)
    assert parts[0, 0, 0] == parts[1, 1, 1] != parts[3, 3, 3] and parts.max() == 2
    assert sizes[[0, parts[0, 0, 0], parts[3, 3, 3]]].tolist() == [0, 2, 1]


def test_boxes_of_the_labels_that_are_there():
    labels = np.zeros((5, 6, 7), np.uint8)
    labels[1:3, 2, 3:6] = 4
    labels[2, 5, 3] = 4
    labels[0, 0, 0] = 9
    found = list(masks_in_boxes(labels, [2, 4, 9]))
    assert [index for index, _, _ in found] == [4, 9]
    assert found[0][1] == (slice(1, 3), slice(2, 6), slice(3, 6))
    assert np.array_equal(found[0][2], labels[1:3, 2:6, 3:6] == 4)
    assert found[1][1] == (slice(0, 1),) * 3 and found[1][2].all()


def test_labels_that_go_meanwhile_are_passed_over():
    labels = np.zeros((3, 3, 3), np.uint8)
    labels[0, 0, 0], labels[1:, 1, 1] = 1, 2
    seen = []
    for index, _, _ in masks_in_boxes(labels, [1, 2]):
        seen.append(index)
        labels[labels == 2] = 0
    assert seen == [1]

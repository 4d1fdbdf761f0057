"""Pruned restoration against the plain way: interpolate all 13, sigmoid, threshold, argmax."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch.nn import functional

from flare_clef.preparation import Placement
from flare_clef.restoration import restore


def smooth_logits(grid=(24, 20, 28), seed=0, nodes=6, dtype=torch.float32):
    torch.manual_seed(seed)
    rough = torch.randn(1, 13, nodes, nodes, nodes) * 4 - 1
    return functional.interpolate(rough, size=grid, mode="trilinear")[0].to(dtype)


def plain(logits: torch.Tensor, placement: Placement):
    """Labels, and where the best two are too close for rounding to tell."""
    full = functional.interpolate(
        logits[None].float(), size=placement.box_shape, mode="trilinear", align_corners=False
    )[0]
    found = torch.where((torch.sigmoid(full) < 0.5).all(0), 0, full.argmax(0) + 1)
    top = torch.cat([torch.zeros_like(full[:1]), full]).topk(2, dim=0).values
    labels = np.zeros(placement.shape, np.uint8)
    close = np.zeros(placement.shape, bool)
    box = tuple(slice(*bounds) for bounds in placement.box)
    placement.canonical_view(labels)[box] = found.to(torch.uint8).numpy()
    placement.canonical_view(close)[box] = ((top[0] - top[1]) < 1e-5).numpy()
    return labels, close


def assert_equal(logits, placement):
    expected, close = plain(logits, placement)
    found = restore(logits, placement)
    assert found.dtype == np.uint8 and found.flags["C_CONTIGUOUS"]
    assert len(np.unique(expected)) > 5
    assert close.mean() < (1e-4 if logits.dtype == torch.float32 else 1e-3)
    assert np.array_equal(found[~close], expected[~close])


@pytest.mark.parametrize(
    "box", [((0, 61), (3, 50), (2, 70)), ((1, 9), (0, 12), (4, 15)), ((5, 6), (0, 90), (0, 70)),
            ((0, 24), (0, 20), (0, 28))],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_plain_way(box, dtype):
    placement = Placement((62, 90, 72), (0, 1, 2), (False,) * 3, box, (24, 20, 28))
    assert_equal(smooth_logits(dtype=dtype), placement)


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(20, 80, 3))
    box = tuple((int(rng.integers(0, n // 3)), int(rng.integers(n // 2, n + 1))) for n in shape)
    assert_equal(
        smooth_logits(seed=seed), Placement(shape, (0, 1, 2), (False,) * 3, box, (24, 20, 28))
    )


@pytest.mark.parametrize("axes", list(permutations(range(3))))
def test_every_orientation(axes):
    shape = (30, 35, 40)
    box = tuple((2, shape[a] - 3) for a in axes)
    for flips in product((False, True), repeat=3):
        assert_equal(smooth_logits(), Placement(shape, axes, flips, box, (24, 20, 28)))


def test_channels_innermost_give_the_same():
    logits = smooth_logits()
    inner = logits.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    placement = Placement((40, 40, 40), (0, 1, 2), (False,) * 3, ((0, 40),) * 3, (24, 20, 28))
    assert np.array_equal(restore(inner, placement), restore(logits, placement))


def test_zero_is_organ_and_the_first_of_equals_wins():
    logits = torch.full((13, 4, 4, 4), -1.0)
    logits[4] = 0.0
    logits[7] = 0.0
    placement = Placement((4, 4, 4), (0, 1, 2), (False,) * 3, ((0, 4),) * 3, (4, 4, 4))
    assert (restore(logits, placement) == 5).all()


def test_a_subset_of_organs_keeps_decisions():
    placement = Placement((40, 40, 40), (0, 1, 2), (False,) * 3, ((0, 40),) * 3, (24, 20, 28))
    everything = restore(smooth_logits(), placement)
    some = restore(smooth_logits(), placement, {1, 6})
    assert np.array_equal(some, np.where(np.isin(everything, (1, 6)), everything, 0))


@pytest.mark.parametrize("flip", [False, True])
def test_of_a_box_that_reaches_beyond_the_scan_only_the_scan_is_labelled(flip):
    logits = smooth_logits()
    whole = Placement(
        (60, 40, 50), (0, 1, 2), (False,) * 3, ((0, 60), (2, 40), (0, 50)), (24, 20, 28)
    )
    short = Placement((22, 40, 50), (0, 1, 2), (flip, False, False), ((-17, 43), *whole.box[1:]),
                      whole.grid)  # fmt: skip
    expected = restore(logits, whole)[17:39]
    found = restore(logits, short)
    assert len(np.unique(found)) > 5
    assert np.array_equal(found[::-1] if flip else found, expected)


def test_outside_the_box_is_background():
    logits = torch.full((13, 4, 4, 4), 1.0)
    placement = Placement((6, 6, 6), (0, 1, 2), (False,) * 3, ((1, 3), (2, 6), (0, 5)), (4, 4, 4))
    found = restore(logits, placement)
    assert found.sum() == 2 * 4 * 5 and (found[1:3, 2:6, 0:5] == 1).all()

from __future__ import annotations

import numpy as np
import pytest
import torch

from flare_clef.network import Architecture, SegmentationNetwork
from flare_clef.training import operating_points as points
from flare_clef.training.doubt import UNDECIDED

NONE = int(np.argmin(np.abs(points.OFFSETS)))


def plain_dice(logits: torch.Tensor, labels: np.ndarray, organ: int, offset: float) -> float:
    """Raise, decide as section 2.3 does, count."""
    raised = logits.clone()
    raised[organ - 1] += offset
    top, channel = raised.max(0)
    decided = torch.where(top > 0, channel + 1, 0).numpy()
    known = labels != UNDECIDED
    found, own = (decided == organ) & known, labels == organ
    return 2 * (found & own).sum() / (found.sum() + own.sum())


def test_equals_deciding_anew_with_each_offset() -> None:
    draws = np.random.default_rng(0)
    logits = torch.from_numpy(draws.normal(0, 2, (13, 20, 9, 8)).astype(np.float32))
    labels = draws.integers(0, 12, (20, 9, 8)).astype(np.uint8)  # neither 12 nor 13
    labels[:2] = UNDECIDED
    labelled = np.ones(13, bool)
    labelled[3] = False
    dice = points.dice_by_offset(logits, labels, labelled)
    for organ in (1, 2, 11):
        expected = [plain_dice(logits, labels, organ, o) for o in points.OFFSETS]
        np.testing.assert_allclose(dice[organ - 1], expected)
    assert np.isnan(dice[[3, 11, 12]]).all()


def test_labels_that_are_too_large_get_an_offset_below_zero() -> None:
    # A row of 8: the organ in 3 voxels; its logit is above 0 in 5, the last two at 0.6.
    logits = torch.full((13, 1, 1, 8), -9.0)
    logits[0, 0, 0, :5] = torch.tensor([3.0, 3.0, 3.0, 0.6, 0.6])
    labels = np.zeros((1, 1, 8), np.uint8)
    labels[..., :3] = 1
    table = points.dice_by_offset(logits, labels, np.arange(13) == 0)
    assert table[0, NONE] == pytest.approx(2 * 3 / (5 + 3))
    found = points.choose(table[None])
    # -0.75 is the first of the candidates that takes 0.6 away.
    assert found.offsets[0] == -0.75
    assert (found.offsets[1:] == 0).all()
    assert np.isnan(found.left_out)


def test_each_case_is_judged_by_what_the_others_choose() -> None:
    tables = np.full((2, 13, len(points.OFFSETS)), np.nan)
    tables[:, 0] = 0.5
    tables[0, 0, NONE - 4], tables[1, 0, NONE - 4] = 0.9, 0.2  # only the first gains at -1
    tables[1, 0, NONE + 2] = 0.6
    found = points.choose(tables)
    assert found.before == pytest.approx(0.5)
    # The first by the second's choice, + 0.5: 0.5. The second by the first's, - 1: 0.2.
    assert found.left_out == pytest.approx(0.35)
    assert found.offsets[0] == 0.5  # means: .55 at -1, .55 at + 0.5, which is nearer to 0


def test_moves_the_logits_by_the_offsets() -> None:
    torch.manual_seed(0)
    network = SegmentationNetwork(Architecture((4, 8), (1, 1), (1,), 4)).eval()
    volume = torch.randn(1, 1, 4, 4, 4)
    offsets = np.linspace(-3, 1, 13)
    with torch.no_grad():
        before = network(volume)
        points.move(network, offsets)
        moved = network(volume) - before
    expected = torch.from_numpy(offsets).float().view(1, 13, 1, 1, 1).expand_as(moved)
    torch.testing.assert_close(moved, expected)


@pytest.mark.filterwarnings("error")
def test_nothing_to_judge_leaves_the_logits_without_a_warning() -> None:
    found = points.choose(np.full((2, 13, len(points.OFFSETS)), np.nan))
    assert (found.offsets == 0).all()
    assert np.isnan([found.before, found.left_out]).all()

"""Losses against the plain formulas and values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from flare_clef.training.doubt import CLASSES, UNDECIDED, WEIGHTS
from flare_clef.training.losses import (
    balanced_weights,
    sigmoid_dice_loss,
    softmax_dice_loss,
)

ALL = torch.ones(13, dtype=torch.bool)


def plain_softmax_dice(logits, labels, labelled, ce_balance):
    """The docstring's formulas, one class after the other, differentiated by torch."""
    p = torch.cat([torch.zeros_like(logits[:, :1]), logits], 1).softmax(1)[0].flatten(1)
    weight = torch.from_numpy(WEIGHTS)[labels.flatten().long()]
    truth = torch.from_numpy(CLASSES)[labels.flatten().long()].long()
    organs = [k for k in range(1, 14) if labelled[k - 1]]
    missing = [k for k in range(1, 14) if not labelled[k - 1]]
    background = p[0] + p[missing].sum(0)
    classes = {0: background, **{k: p[k] for k in organs}}
    counts = {k: float(((truth == k) * weight).sum()) for k in classes}
    raw = {k: max(1, counts[k]) ** -ce_balance for k in classes}
    total = sum(raw[k] * counts[k] for k in classes)
    entropy = sum(
        -(raw[k] / total) * ((truth == k) * weight * classes[k].log()).sum() for k in classes
    )
    dice = 0
    for k in organs:
        g = (truth == k).float()
        total = ((p[k] + g) * weight).sum()
        dice = dice + 1 - (2 * (p[k] * g * weight).sum() + 1) / (total + 1)
    return entropy + dice / len(organs)


@pytest.mark.parametrize("missing", [(), (11,), (3, 11, 12)])
@pytest.mark.parametrize(("undecided", "doubt"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("ce_balance", [0.5, 0.0])
def test_fused_value_and_gradient_equal_torchs(missing, undecided, doubt, ce_balance, monkeypatch):
    monkeypatch.setattr("flare_clef.training.losses._CHUNK_VOXELS", 50)
    torch.manual_seed(0)
    logits = (torch.randn(1, 13, 5, 6, 7) * 2).requires_grad_()
    labels = torch.randint(0, 14, (5, 6, 7)).to(torch.uint8)
    labelled = ALL.clone()
    for channel in missing:
        labelled[channel] = False
        labels[labels == channel + 1] = 0
    labels[labels == 9] = 0  # labelled, but not in this body
    if doubt:
        labels += 16 * torch.randint(0, 15, (5, 6, 7)).to(torch.uint8)
    if undecided:
        labels[1, 2:5] = UNDECIDED
    plain = plain_softmax_dice(logits, labels, labelled, ce_balance)
    fused, terms = softmax_dice_loss(logits, labels, labelled, ce_balance=ce_balance)
    assert fused.item() == pytest.approx(plain.item(), rel=1e-5)
    assert terms.cross_entropy + terms.dice_loss == pytest.approx(plain.item(), rel=1e-5)
    (wanted,) = torch.autograd.grad(plain, logits)
    (found,) = torch.autograd.grad(3 * fused, logits)
    assert torch.allclose(found, 3 * wanted, atol=1e-6)
    assert math.isnan(terms.dice_per_organ[8])


def test_softmax_by_hand():
    """Two voxels, logits 0 everywhere: every class has 1/14. One liver, one background."""
    labels = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    labelled = torch.zeros(13, dtype=torch.bool)
    labelled[0] = True
    _, terms = softmax_dice_loss(torch.zeros(1, 13, 1, 1, 2), labels, labelled)
    # Background is merged with the 12 unlabelled organs: 13/14. Both voxels weigh one half.
    assert terms.cross_entropy == pytest.approx(-(math.log(13 / 14) + math.log(1 / 14)) / 2)
    assert terms.dice_loss == pytest.approx(1 - (2 / 14 + 1) / (2 / 14 + 1 + 1))


def test_sigmoid_by_hand():
    """Logit 0 is one half: cross entropy ln 2; Dice (2 * 0.5 + 1) / (0.5 * 2 + 1 + 1)."""
    labels = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    labelled = torch.zeros(13, dtype=torch.bool)
    labelled[0] = True
    loss, terms = sigmoid_dice_loss(torch.zeros(1, 13, 1, 1, 2), labels, labelled)
    assert terms.cross_entropy == pytest.approx(math.log(2))
    assert terms.dice_loss == pytest.approx(1 - 2 / 3)
    assert loss.item() == pytest.approx(math.log(2) + 1 / 3)


def test_doubtful_voxels_count_by_their_weight():
    """Two voxels of liver, one of them of doubt 9 (weight 0.4), all logits 0."""
    labels = torch.tensor([1, 1 + 16 * 9], dtype=torch.uint8).view(1, 1, 2)
    only = torch.zeros(13, dtype=torch.bool)
    only[0] = True
    loss, terms = sigmoid_dice_loss(torch.zeros(1, 13, 1, 1, 2), labels, only)
    assert terms.cross_entropy == pytest.approx(math.log(2))
    # sum(w p) = 0.7, sum(w g) = 1.4, sum(w p g) = 0.7: (1.4 + 1) / (2.1 + 1).
    assert terms.dice_loss == pytest.approx(1 - 2.4 / 3.1)
    # One class has all the weight, of which each voxel's share is its own; p is 1 / 14.
    softmax = softmax_dice_loss(torch.zeros(1, 13, 1, 1, 2), labels, ALL)[1]
    assert softmax.cross_entropy == pytest.approx(math.log(14), rel=1e-5)


def test_sigmoid_leaves_unlabelled_organs_alone():
    logits = torch.randn(1, 13, 2, 2, 2, requires_grad=True)
    labelled = ALL.clone()
    labelled[11] = False
    loss, _ = sigmoid_dice_loss(logits, torch.ones(2, 2, 2, dtype=torch.uint8), labelled)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 11].abs().max() == 0
    assert gradient[0, 10].abs().max() > 0


def test_balanced_weights():
    weights = balanced_weights(torch.tensor([900.0, 100.0, 0.0]).double())
    # 1/30 and 1/10, normalised so that 900 and 100 voxels of them sum to one: 30 + 10 = 40.
    assert weights.tolist() == pytest.approx([1 / 30 / 40, 1 / 10 / 40, 0])


def test_equal_weights_are_the_mean_over_voxels():
    weights = balanced_weights(torch.tensor([900.0, 100.0, 0.0]).double(), exponent=0)
    assert weights.tolist() == pytest.approx([1e-3, 1e-3, 0])


@pytest.mark.parametrize("loss_of", [sigmoid_dice_loss, softmax_dice_loss])
def test_a_block_that_is_undecided_as_a_whole_costs_nothing(loss_of):
    logits = torch.randn(1, 13, 2, 2, 2, requires_grad=True)
    labels = torch.full((2, 2, 2), UNDECIDED, dtype=torch.uint8)
    loss, terms = loss_of(logits, labels, ALL)
    assert loss.item() == 0 and terms.cross_entropy == 0 and terms.dice_loss == 0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient.any()

"""The losses of fine-tuning (paper, section 2.2 "Finetuning": Dice + cross entropy).

Logits are (1, 13, z, y, x), organ ``i`` in channel ``i - 1``; labels are (z, y, x), 0 to 13,
with their doubt as :mod:`flare_clef.training.doubt` packs it: each voxel counts by its weight
in all sums below. ``labelled`` says for each of the 13 organs whether this case has labels for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from flare_clef.training.doubt import CLASSES, WEIGHTS

_CLASSES = torch.from_numpy(CLASSES).long()
_WEIGHTS = torch.from_numpy(WEIGHTS)
_CHUNK_VOXELS = 1 << 18
_DICE_EPSILON_VOXELS = 1.0


@dataclass(frozen=True)
class LossTerms:
    """What one step's loss was made of, for the log."""

    cross_entropy: float
    dice_loss: float
    dice_per_organ: Tensor
    """(13,) soft Dice; NaN where the organ is not labelled or not in the volume."""


class _SoftmaxDice(torch.autograd.Function):
    """Value and gradient in two sweeps over chunks that stay in the cache.

    At 192^3 a plain implementation moves 14 maps of 28 MB through memory some thirty times.
    ``tests/training/test_losses.py`` holds this one against the plain formulas.
    """

    @staticmethod
    def forward(ctx, logits, labels, labelled, organ_weights, ce_share, dice_share):  # type: ignore[no-untyped-def]
        rows = logits[0].permute(1, 2, 3, 0).reshape(-1, logits.shape[1])
        target = labels.reshape(-1)
        device = logits.device
        group = torch.zeros(logits.shape[1] + 1, dtype=torch.long, device=device)
        group[1:][labelled] = torch.nonzero(labelled).flatten() + 1
        classes = len(group)

        counts = _weighted_counts(target)[:classes]
        weights = organ_weights(counts)
        sums = torch.zeros(classes, dtype=torch.float64, device=device)
        overlap = torch.zeros_like(sums)
        entropy = 0.0
        for chunk, truth, known in _chunks(rows, target):
            p = _probabilities(chunk, group)
            hit = p.gather(0, truth[None])[0]
            if known is not None:
                p *= known
            sums += p.sum(1).double()
            overlap.index_add_(0, truth, hit.double() if known is None else (hit * known).double())
            log = torch.log(hit.clamp_min(1e-8)) * weights[truth]
            entropy -= float(log.sum() if known is None else (log * known).sum())
        ctx.save_for_backward(rows, target)

        present = labelled & (counts[1:] > 0)
        total = sums[1:] + counts[1:] + _DICE_EPSILON_VOXELS
        dice = (2 * overlap[1:] + _DICE_EPSILON_VOXELS) / total
        judged = max(int(labelled.sum()), 1)
        dice_loss = float(((1 - dice) * labelled).sum()) / judged
        ctx.settings = (logits.shape, logits.dtype, group, weights.float())
        ctx.overlap_gain = torch.zeros(classes, device=device)
        ctx.overlap_gain[1:] = (-2 * dice_share / judged * labelled / total).float()
        ctx.sum_gain = torch.zeros(classes, device=device)
        ctx.sum_gain[1:] = (dice_share / judged * labelled * dice / total).float()
        ctx.ce_share = ce_share
        terms = torch.full((logits.shape[1] + 2,), float("nan"), device=device)
        terms[0], terms[1] = entropy, dice_loss
        terms[2:][present] = dice[present].float()
        ctx.mark_non_differentiable(terms)
        loss = torch.tensor(ce_share * entropy + dice_share * dice_loss, device=device)
        return loss, terms

    @staticmethod
    def backward(ctx, upstream, _):  # type: ignore[no-untyped-def]
        rows, target = ctx.saved_tensors
        shape, dtype, group, weights = ctx.settings
        gradient = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        start = 0
        every = ctx.sum_gain[:, None]
        for chunk, truth, known in _chunks(rows, target):
            whole = _softmax(chunk)
            p = _merge(whole, group)
            hit = p.gather(0, truth[None])[0]
            # Derivative by the target class's probability, beyond what every voxel gets.
            extra = ctx.overlap_gain[truth] - ctx.ce_share * weights[truth] / hit.clamp_min(1e-8)
            scale = upstream if known is None else upstream * known
            inner = (every * p).sum(0) + hit * extra
            by_class = every - inner
            by_class.scatter_add_(0, truth[None], extra[None])
            gradient[start : start + len(chunk)] = (
                (whole[1:] * by_class[group[1:]] * scale).t().to(dtype)
            )
            start += len(chunk)
        _, channels, *size = shape
        return (
            gradient.view(*size, channels).permute(3, 0, 1, 2)[None],
            None,
            None,
            None,
            None,
            None,
        )


def _chunks(rows: Tensor, target: Tensor):  # type: ignore[no-untyped-def]
    for start in range(0, len(rows), _CHUNK_VOXELS):
        truth = target[start : start + _CHUNK_VOXELS].to(torch.long)
        known = None
        if bool((truth > 15).any()):
            known = _WEIGHTS.to(truth.device)[truth]
            truth = _CLASSES.to(truth.device)[truth]
        yield rows[start : start + _CHUNK_VOXELS], truth, known


def _weighted_counts(target: Tensor) -> Tensor:
    """(16,) float64: the sum of the weights of each class's voxels."""
    voxels = torch.bincount(target.to(torch.long), minlength=256).double().cpu()
    counts = torch.zeros(16, dtype=torch.float64)
    return counts.index_add_(0, _CLASSES, voxels * _WEIGHTS).to(target.device)


def _softmax(chunk: Tensor) -> Tensor:
    """(voxels, 13) logits to (14, voxels) probabilities, the background's logit being 0."""
    x = torch.zeros(chunk.shape[1] + 1, chunk.shape[0], device=chunk.device)
    x[1:] = chunk.t()
    return torch.softmax(x, dim=0)


def _merge(p: Tensor, group: Tensor) -> Tensor:
    """Organs without labels add their probability to the background's."""
    merged = torch.nonzero(group[1:] == 0).flatten() + 1
    if len(merged) == 0:
        return p
    p = p.clone()
    p[0] += p[merged].sum(0)
    p[merged] = 0
    return p


def _probabilities(chunk: Tensor, group: Tensor) -> Tensor:
    return _merge(_softmax(chunk), group)


def balanced_weights(counts: Tensor, exponent: float = 0.5) -> Tensor:
    """Cross-entropy weight per voxel of each class: proportional to count ** -exponent.

    ``counts`` are the (weighted) voxels of each class in the volume. Normalised so that the
    weights of all voxels sum to one. With equal weights background alone decides, and an
    adrenal gland (some 300 of 7 M voxels at 192^3) can be forgotten at no cost; with 1/count a
    single voxel of it would outweigh 10,000 of liver. The price of any exponent above 0: what is
    learnt of a doubtful voxel leans towards the rarer class, so that organs come out too large.
    """
    weights = counts.clamp_min(1) ** -exponent
    weights = torch.where(counts > 0, weights, torch.zeros_like(weights))
    return weights / (weights * counts).sum().clamp_min(1e-12)


def softmax_dice_loss(
    logits: Tensor,
    labels: Tensor,
    labelled: Tensor,
    ce_share: float = 1.0,
    dice_share: float = 1.0,
    ce_balance: float = 0.5,
) -> tuple[Tensor, LossTerms]:
    """Cross entropy + Dice over (0, x1 ... x13), where organs compete.

    A background logit that is always 0 wins the arg max exactly where all 13 are below 0,
    that is where every sigmoid is below 0.5: the decision of section 2.3 is unchanged.

    Organs that a case has no labels for are merged with the background: its probability
    becomes p0 + p_unlabelled, so nothing is said about which of them a voxel is.

    Dice is 1 - mean over the labelled organs of (2 sum(p g) + 1) / (sum(p) + sum(g) + 1),
    sums over all voxels of the volume; cross entropy is weighted by :func:`balanced_weights`
    with the exponent ``ce_balance``.
    """
    weights = partial(balanced_weights, exponent=ce_balance)
    loss, terms = _SoftmaxDice.apply(logits, labels, labelled, weights, ce_share, dice_share)
    return loss, LossTerms(float(terms[0]), float(terms[1]), terms[2:])


def sigmoid_dice_loss(
    logits: Tensor,
    labels: Tensor,
    labelled: Tensor,
    ce_share: float = 1.0,
    dice_share: float = 1.0,
) -> tuple[Tensor, LossTerms]:
    """The paper's fine-tuning loss: Dice + binary cross entropy on sigmoid outputs.

    Each organ is a question of its own; those that a case has no labels for are left out.
    Cross entropy is the weighted mean over the volume's voxels and the labelled organs; Dice as
    in :func:`softmax_dice_loss`.
    """
    weights = _WEIGHTS.to(labels.device)[labels.reshape(-1).long()]
    known = weights > 0
    truth = _CLASSES.to(labels.device)[labels.reshape(-1)[known].long()]
    weights = weights[known]
    # A block may be undecided as a whole: its loss is 0, as the softmax's is.
    every = weights.sum().clamp_min(1e-12)
    entropy = dice_loss = logits.new_zeros((), dtype=torch.float32)
    dice_per_organ = torch.full((logits.shape[1],), float("nan"), device=logits.device)
    judged = max(int(labelled.sum()), 1)
    for channel in torch.nonzero(labelled).flatten().tolist():
        x = logits[0, channel].reshape(-1)[known].float()
        target = (truth == channel + 1).float()
        each = functional.binary_cross_entropy_with_logits(x, target, reduction="none")
        entropy = entropy + (each * weights).sum() / every / judged
        p = torch.sigmoid(x)
        total = ((p + target) * weights).sum() + _DICE_EPSILON_VOXELS
        dice = (2 * (p * target * weights).sum() + _DICE_EPSILON_VOXELS) / total
        dice_loss = dice_loss + (1 - dice) / judged
        if bool(target.any()):
            dice_per_organ[channel] = dice.detach()
    loss = ce_share * entropy + dice_share * dice_loss
    return loss, LossTerms(float(entropy.detach()), float(dice_loss.detach()), dice_per_organ)

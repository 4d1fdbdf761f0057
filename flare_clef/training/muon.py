"""Muon: a step whose directions are all of one size, for the convolutions of a network.

K. Jordan, Y. Jin, V. Boza, J. You, F. Cesista, L. Newhouse, J. Bernstein: Muon, an optimizer for
hidden layers in neural networks (2024). The momentum of each convolution, as a matrix of its
output channels, is replaced by the nearest matrix whose singular values are all one: directions
that the gradient is rarely large in are learnt as fast as the others. Biases and norms take
Adam's step. Not in the paper, which uses Adam; a recipe chooses with ``finetune.optimizer``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""a s + b s^3 + c s^5 takes singular values from (0.01, 1) to about one in five rounds."""
_ROUNDS = 5
_RMS = 0.2
"""Root mean square of a step at learning rate 1, as Adam's is: one rate serves both."""


class Muon(torch.optim.Optimizer):
    """Orthogonal steps for parameters of two and more axes, Adam's for the others.

    ``lr`` means what Adam's does (J. Liu et al., Muon is scalable for LLM training, 2025, 2.2);
    ``dtype`` is that of the last product: bf16 where it is fast.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "dtype": dtype}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = _orthogonal_step if parameter.ndim > 1 else _adam_step
                    update(parameter, self.state[parameter], group)


def _orthogonal_step(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    gradient = parameter.grad
    assert gradient is not None
    if not state:
        state["momentum"] = torch.zeros_like(parameter)
    momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
    ahead = torch.lerp(gradient, momentum, group["momentum"])
    # Channels last: the rows are then in memory as the matrix wants them, nothing is copied.
    rows = ahead.movedim(1, -1).reshape(len(ahead), -1)
    size = _RMS * math.sqrt(max(rows.shape))
    channels, *others = (parameter.shape[1], *parameter.shape[2:])
    back = orthogonal(rows, group["dtype"]).reshape(len(rows), *others, channels).movedim(-1, 1)
    parameter.add_(back, alpha=-group["lr"] * size)


def _adam_step(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    gradient = parameter.grad
    assert gradient is not None
    if not state:
        state["step"] = 0
        state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1
    first, second = group["betas"]
    mean = state["mean"].lerp_(gradient, 1 - first)
    square = state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    unbiased = square.div(1 - second ** state["step"]).sqrt_().add_(group["eps"])
    parameter.addcdiv_(mean, unbiased, value=-group["lr"] / (1 - first ** state["step"]))


def orthogonal(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """About the nearest matrix with all singular values one (they end in 0.7 to 1.2).

    Newton and Schulz's iteration is run on the smaller Gram matrix G alone: with R = a + b G +
    c G^2, which commutes with G, a round takes X to R X and G to R^2 G, so the long side of X is
    multiplied twice in all and not in every round.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T, dtype).T
    a, b, c = _QUINTIC
    # Rounded to bf16 the Gram matrix would have negative eigenvalues, and each round takes them
    # twelve times further away: it is computed in full.
    scaled = matrix / matrix.norm().clamp(min=1e-12)
    gram = scaled @ scaled.T
    turn = torch.eye(len(gram), device=gram.device)
    for _ in range(_ROUNDS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        turn = factor @ turn
        gram = factor @ gram @ factor
        gram = (gram + gram.T) / 2
    return (turn.to(dtype) @ scaled.to(dtype)).to(matrix.dtype)

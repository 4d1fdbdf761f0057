"""How a training step runs the network: number format, memory, statistics of the norms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flare_clef.network import ConvBlock, Head, norms


def forward_precision(precision: str, device: str = "cpu") -> AbstractContextManager[Any]:
    """Context in which the network computes in ``fp32`` or ``bf16``; parameters stay fp32."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def checkpoint_activations(network: nn.Module) -> None:
    """Blocks keep only their input and are computed again for the gradient.

    Less memory for a third more time. Running statistics see each volume twice; the loop takes
    them from the first time.
    """

    def again(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)

    for block in network.modules():
        if isinstance(block, (ConvBlock, Head)):
            block.forward = again(block.forward)  # type: ignore[method-assign]


class RunningStatistics:
    """All running means and variances of a network as one vector."""

    def __init__(self, network: nn.Module) -> None:
        self._buffers = [
            buffer
            for layer in norms(network)
            for buffer in (layer.running_mean, layer.running_var)
            if buffer is not None
        ]

    def read(self) -> Tensor:
        if not self._buffers:
            return torch.zeros(0)
        return torch.cat([buffer.flatten() for buffer in self._buffers])

    def write(self, values: Tensor) -> None:
        parts = values.split([buffer.numel() for buffer in self._buffers]) if self._buffers else ()
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))

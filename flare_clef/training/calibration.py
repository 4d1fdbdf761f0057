"""The ranges of activations for inference in 8-bit integers.

Per tensor the range is the one with the smallest mean squared error of rounding to 255 steps: a
few large values are clipped where that makes the steps of all others finer. A processor without
VNNI has 127 steps and the same range; the best one for 127 clips what small organs need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flare_clef.integer_convolution import FULL
from flare_clef.network import SegmentationNetwork
from flare_clef.quantised import Ranges, named_blocks
from flare_clef.training.batches import batch_of
from flare_clef.training.cases import PreparedCase
from flare_clef.training.finetuning_plan import Stage

BINS = 4096
_SHARES = [0.05 * step for step in range(2, 21)]


@torch.inference_mode()
def calibrate(network: SegmentationNetwork, volumes: Sequence[Callable[[], Tensor]]) -> Ranges:
    """Ranges of all activations of ``network`` (in evaluation mode) over ``volumes``.

    Each of ``volumes`` gives a prepared volume (1, 1, z, y, x) when called, twice.
    """
    largest = dict.fromkeys(named_blocks(network), 0.0)

    def widen(name: str, x: Tensor) -> None:
        largest[name] = max(largest[name], float(x.max()))

    _watch(network, volumes, widen)
    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in largest}

    def count(name: str, x: Tensor) -> None:
        if largest[name] > 0:
            counts[name] += torch.histc(x.flatten(), BINS, 0, largest[name]).double()

    _watch(network, volumes, count)
    return {name: best_range(counts[name], most) for name, most in largest.items()}


def calibrate_on(network: SegmentationNetwork, cases: Sequence[PreparedCase], grid: int) -> Ranges:
    """:func:`calibrate` over prepared ``cases``, not augmented, at ``grid``."""

    def volume_of(case: PreparedCase) -> Tensor:
        whole = Stage(grid, augmentation=None)
        return batch_of(case, whole, torch.Generator()).image

    return calibrate(network.eval(), [partial(volume_of, case) for case in cases])


def best_range(counts: Tensor, largest: float, highest: int = FULL) -> float:
    """The range with the least squared error for a histogram of equal bins from 0 to ``largest``.

    Zeros are exact whatever the range, and most activations are zero: the first bin is left out.
    """
    if largest <= 0:
        return 1.0
    values = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (largest / BINS)
    weight = counts.clone()
    weight[0] = 0

    def error(share: float) -> float:
        step = share * largest / highest
        rounded = (values / step).round().clamp(max=highest) * step
        return float((weight * (values - rounded) ** 2).sum())

    return min(_SHARES, key=error) * largest


def _watch(
    network: SegmentationNetwork,
    volumes: Iterable[Callable[[], Tensor]],
    see: Callable[[str, Tensor], None],
) -> None:
    with _hooked(network, see):
        for volume in volumes:
            network(volume())


@contextmanager
def _hooked(network: SegmentationNetwork, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook_for(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: see(name, output)

    hooks = [
        block.register_forward_hook(hook_for(name)) for name, block in named_blocks(network).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

"""Calibration for inference in 8-bit integers: ranges of activations, and what rounding shifts.

Per channel the range is the one with the smallest mean squared error of rounding to 255 steps: a
few large values are clipped where that makes the steps of all others finer. Coarse levels, where
a scan has few voxels, get one range for all channels, and nothing is clipped. A processor without
VNNI has 127 steps and the same range; the best one for 127 clips what small organs need.

Rounded weights and activations shift a layer's results in the mean, and a shift moves every
border of an organ the same way, where noise cancels. Offsets take it back, as in Nagel et al.
2019, "Data-free quantization through weight equalization and bias correction", section 4.2, here
with data: layer by layer, so that each sees what the corrected ones before it give.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flare_clef.calibration import HEAD, Calibration, last_layer
from flare_clef.integer_convolution import FULL, round_weight
from flare_clef.network import SegmentationNetwork
from flare_clef.quantised import balanced, input_ranges, is_coarse, named_blocks
from flare_clef.training.batches import batch_of
from flare_clef.training.cases import PreparedCase
from flare_clef.training.finetuning_plan import Stage

BINS = 4096
_SHARES = [0.05 * step for step in range(2, 21)]
_SAMPLE = 2**18
"""Voxels of a volume from which on a channel's histogram takes only some, evenly spread."""
_RARE = 1e-3
"""Of voxels: a channel seldom active tells no mean."""
_NEAR = 3.0
"""Logits this far from 0 and nearer may decide otherwise after rounding."""

Volumes = Sequence[Callable[[], Tensor]]


def calibrate(network: SegmentationNetwork, volumes: Volumes) -> Calibration:
    """Ranges and offsets for ``network`` (in evaluation mode) over ``volumes``.

    Each of ``volumes`` gives a prepared volume (1, 1, z, y, x) when called, four times.
    """
    with torch.no_grad():
        ranges = _ranges(network, volumes)
        return Calibration(ranges, _offsets(network, ranges, volumes))


def calibrate_on(
    network: SegmentationNetwork, cases: Sequence[PreparedCase], grid: int
) -> Calibration:
    """:func:`calibrate` over prepared ``cases``, not augmented, at ``grid``."""

    def volume_of(case: PreparedCase) -> Tensor:
        whole = Stage(grid, augmentation=None)
        return batch_of(case, whole, torch.Generator()).image

    return calibrate(network.eval(), [partial(volume_of, case) for case in cases])


def best_ranges(counts: Tensor, largest: Tensor, highest: int = FULL) -> Tensor:
    """The range with the least squared error, (channels,).

    ``counts`` (channels, bins): a histogram each, of equal bins from 0 to its ``largest``
    (channels,). Zeros are exact whatever the range, and most activations are zero: the first
    bin is left out. A channel that is never active has the range 0.
    """
    values = (torch.arange(counts.shape[1], dtype=torch.float64) + 0.5) / counts.shape[1]
    weight = counts.double()
    weight[:, 0] = 0
    errors = []
    for share in _SHARES:
        step = share / highest
        rounded = (values / step).round().clamp(max=highest) * step
        errors.append(weight @ (values - rounded) ** 2)
    chosen = torch.stack(errors).argmin(0)
    return torch.tensor(_SHARES)[chosen] * largest


def _ranges(network: SegmentationNetwork, volumes: Volumes) -> dict[str, Tensor]:
    largest = {
        name: torch.zeros(block.conv.out_channels) for name, block in named_blocks(network).items()
    }

    def widen(name: str, x: Tensor) -> None:
        largest[name] = torch.maximum(largest[name], x.amax((0, 2, 3, 4)))

    with _watched(network, widen):
        for volume in volumes:
            network(volume())
    del largest[last_layer(network.architecture)]
    counts = {name: torch.zeros(len(most), BINS) for name, most in largest.items()}

    def count(name: str, x: Tensor) -> None:
        if name not in counts or is_coarse(name):
            return
        # An odd stride meets all places of a row in turn.
        stride = (x[0, 0].numel() // _SAMPLE) | 1
        for channel, most in enumerate(largest[name].tolist()):
            if most > 0:
                some = x[0, channel].flatten()[::stride].contiguous()
                counts[name][channel] += torch.histc(some, BINS, 0, most)

    with _watched(network, count):
        for volume in volumes:
            network(volume())
    return {
        name: balanced(name, most if is_coarse(name) else best_ranges(counts[name], most))
        for name, most in largest.items()
    }


def _offsets(
    network: SegmentationNetwork, ranges: dict[str, Tensor], volumes: Volumes
) -> dict[str, Tensor]:
    rounded = _rounded(network, ranges)
    found = {
        name: torch.zeros(block.conv.out_channels) for name, block in named_blocks(network).items()
    }
    wanted: dict[str, Tensor] = {}
    active: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        wanted[name] = _mean(x.clamp(min=0))
        active[name] = _mean((x > 0).float())

    def correct(name: str, x: Tensor) -> Tensor:
        share = active[name]
        offset = torch.zeros_like(share)
        # What is below 0 stays unseen: a second step finds what the first one brought above.
        for _ in range(2):
            missing = wanted[name] - _mean((x + _column(offset)).clamp_(min=0))
            offset += torch.where(share > _RARE, missing / share.clamp_min(_RARE), 0.0)
        found[name] += offset / len(volumes)
        return x.add_(_column(offset))

    with _watched(network, note, norms=True), _watched(rounded, correct, norms=True):
        for volume in volumes:
            x = volume()
            network(x)
            with _activations_rounded(rounded, ranges):
                rounded(x)
    for name, block in named_blocks(rounded).items():
        block.norm.bias.add_(found[name])
    missing = torch.zeros(network.architecture.classes)
    near = torch.zeros_like(missing)
    with _activations_rounded(rounded, ranges):
        for volume in volumes:
            x = volume()
            logits = network(x)
            close = logits.abs() < _NEAR
            missing += ((logits - rounded(x)) * close).sum((0, 2, 3, 4))
            near += close.sum((0, 2, 3, 4))
    return {**found, HEAD: missing / near.clamp_min(1)}


def _rounded(network: SegmentationNetwork, ranges: dict[str, Tensor]) -> SegmentationNetwork:
    """``network`` with weights rounded as :class:`~flare_clef.quantised.QuantisedNetwork`'s."""
    rounded = copy.deepcopy(network)
    named = named_blocks(rounded)
    for name, inputs in input_ranges(network.architecture, ranges).items():
        _round(named[name].conv, inputs)
    return rounded


def _round(layer: nn.Conv3d, ranges: Tensor) -> None:
    # A norm that follows scales whole rows, and so does the range of what comes out: rounding
    # with one scale per row is the same before and after.
    row = ranges.view(1, -1, 1, 1, 1)
    whole, scale = round_weight(layer.weight * row)
    layer.weight.copy_(whole * scale.view(-1, 1, 1, 1, 1) / row)


def _mean(x: Tensor) -> Tensor:
    return x.mean((0, 2, 3, 4), dtype=torch.float32)


def _column(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1, 1)


@contextmanager
def _activations_rounded(network: SegmentationNetwork, ranges: dict[str, Tensor]) -> Iterator[None]:
    last = last_layer(network.architecture)

    def to_steps(name: str, x: Tensor) -> Tensor | None:
        if name == last:
            return None
        step = _column(ranges[name] / FULL)
        return x.div_(step).round_().clamp_(0, FULL).mul_(step)

    with _watched(network, to_steps):
        yield


@contextmanager
def _watched(
    network: SegmentationNetwork,
    see: Callable[[str, Tensor], Tensor | None],
    *,
    norms: bool = False,
) -> Iterator[None]:
    """``see`` gets every block's name and result; what it returns takes the result's place.

    With ``norms`` the result before the ReLU.
    """

    def hook_for(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        return lambda module, inputs, output: see(name, output)

    hooks = [
        (block.norm if norms else block).register_forward_hook(hook_for(name))
        for name, block in named_blocks(network).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

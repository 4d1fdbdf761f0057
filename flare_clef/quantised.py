"""The forward pass in 8-bit integers: the same slabs and levels, a quarter of the memory.

Weights are rounded when loaded, which takes less than half a second and keeps the file as small
as it is. Ranges of the activations and what rounding shifts were found in training
(:mod:`flare_clef.calibration`) and travel in the file; without them ranges follow from its norms.
Each channel has its own range, which costs nothing: it goes into the weights before these are
rounded. The first convolution computes in float32 (a scan has more than 256 values), and so does
the head, on sums that are not rounded to bytes again: its small differences decide between
organs. All between is whole numbers. Upsampled maps are stored here, as bytes they are small, so
that skip and upsampled path are summed before anything is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flare_clef.calibration import HEAD, Calibration, last_layer
from flare_clef.inference import FoldedNetwork, fold_norm
from flare_clef.integer_convolution import CHANNELS, IntegerConvolution, round_activation
from flare_clef.network import Architecture, ConvBlock, SegmentationNetwork, blocks, convolve

_DEVIATIONS = 10.0
"""How far above its mean an activation may lie; calibrated ranges ended at 8 to 14."""

_HEAP_GAPS = 1.65
"""As :data:`flare_clef.inference.HEAP_GAPS`; bytes beside float32 leave more, 1.59 was seen."""

_BLOCK = torch.complex128
"""Sixteen bytes that torch copies as one; nothing computes with them."""

_FIRST = "encoder.0.0"
_POWER = 0.75
"""Of :func:`balanced`; .5 and 1 gave larger errors (``docs/experiments.md``)."""
_LEAST_SHARE = 1e-3
"""Of the largest range in a layer: what a channel that was never active gets before the power."""
_COARSE_FROM = 4
"""Level; of 12 voxels a side where the finest has 192."""


def named_blocks(network: SegmentationNetwork) -> dict[str, ConvBlock]:
    """Every convolution of the backbone by the name that a :class:`Calibration` has for it."""
    backbone = network.backbone
    return {
        f"{side}.{level}.{number}": block
        for side, levels in (("encoder", backbone.encoder), ("decoder", backbone.decoder))
        for level, stack in enumerate(blocks(levels))
        for number, block in enumerate(stack)
    }


def calibration_from_norms(network: SegmentationNetwork) -> Calibration:
    """Without any data: a norm's output has the mean ``bias`` and the deviation ``weight``.

    As in Nagel et al. 2019, "Data-free quantization through weight equalization and bias
    correction", section 4.2.1; nothing is known of offsets.
    """
    architecture = network.architecture
    norms = {name: block.norm for name, block in named_blocks(network).items()}
    reached = {
        name: (norm.bias + _DEVIATIONS * norm.weight.abs()).detach()
        for name, norm in norms.items()
        if name != last_layer(architecture)
    }
    offsets = {name: torch.zeros(norm.num_features) for name, norm in norms.items()}
    return Calibration(
        {name: balanced(name, largest) for name, largest in reached.items()},
        {**offsets, HEAD: torch.zeros(architecture.classes)},
    )


def input_ranges(architecture: Architecture, ranges: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the channels that each layer takes in, (in,), by its name: skip first, then upsampled.

    ``ranges`` are those of what layers give, (out,). Not of the first layer: a scan has no range.
    """
    found: dict[str, Tensor] = {}
    skips: list[Tensor] = []
    given = torch.empty(0)
    for level, count in enumerate(architecture.encoder_convs):
        for number in range(count):
            name = f"encoder.{level}.{number}"
            if name != _FIRST:
                found[name] = given
            given = ranges[name]
        skips.append(given)
    for level, count in reversed(list(enumerate(architecture.decoder_convs))):
        given = torch.cat([skips[level], given])
        for number in range(count):
            name = f"decoder.{level}.{number}"
            found[name] = given
            given = ranges.get(name, given)
    return found


def is_coarse(layer: str) -> bool:
    """Whether ``layer`` sees so few voxels that one scan tells little of another's channels.

    Ranges of their own for its channels were measured to cut what the next scan has.
    """
    return int(layer.split(".")[1]) >= _COARSE_FROM


def balanced(layer: str, largest: Tensor) -> Tensor:
    """Ranges for channels whose activations go up to ``largest``, (channels,).

    The finer the steps of a channel's activations, the coarser those of the weights it meets,
    relative to the largest of them: between one range for all (power 0) and each its own (1).
    """
    most = largest.max().clamp_min(1e-6)
    if is_coarse(layer):
        return most.expand(len(largest)).clone()
    return most * (largest / most).clamp_min(_LEAST_SHARE) ** _POWER


@dataclass(frozen=True)
class _First:
    """The scan's own convolution, in float32, its result rounded."""

    weight: Tensor
    bias: Tensor
    """Both give steps, ``highest`` of which are a channel's range."""
    highest: int

    def __call__(self, x: Tensor) -> Tensor:
        # What is below 0 becomes 0 in rounding: there is no ReLU to compute.
        return round_activation(convolve(x, self.weight, self.bias), self.highest)


def _first(block: ConvBlock, calibration: Calibration, highest: int) -> _First:
    weight, bias = fold_norm(block)
    steps, offsets = highest / calibration.ranges[_FIRST], calibration.offsets[_FIRST]
    weight = weight * steps.view(-1, 1, 1, 1, 1)
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    return _First(weight, (bias + offsets) * steps, highest)


@dataclass(frozen=True)
class _JoinedMerge:
    """Doubles the coarse map, joins it to the skip (:func:`joined`), convolves both at once."""

    convolution: IntegerConvolution
    """Not padded along z."""

    def __call__(
        self, skip: Tensor, coarse: Tensor, first: int = 0, beyond: tuple[int, int] = (1, 1)
    ) -> Tensor:
        return self.convolution(joined(skip, coarse, first, beyond))


class QuantisedNetwork(FoldedNetwork):
    """A :class:`FoldedNetwork` on the CPU whose activations are bytes, up to ``highest``."""

    # Float32 results of the last convolution leave the cache where slabs are thicker.
    slab_slices = (8, 4, 2)

    def __init__(
        self, network: SegmentationNetwork, calibration: Calibration, highest: int
    ) -> None:
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.architecture = network.architecture
        ranges, offsets = calibration.ranges, calibration.offsets
        inputs = input_ranges(network.architecture, ranges)
        named = named_blocks(network)

        def conv(name: str, *, padded_z: bool = True) -> IntegerConvolution:
            weight, bias = fold_norm(named[name])
            # The last one has no range: float32 comes out.
            return IntegerConvolution.of(
                weight, bias + offsets[name], inputs[name], ranges.get(name), highest,
                padded_z=padded_z,
            )  # fmt: skip

        self._encoder: list[list[Callable[[Tensor], Tensor]]] = [  # type: ignore[assignment]
            [
                conv(name) if name != _FIRST else _first(named[name], calibration, highest)
                for name in (f"encoder.{level}.{number}" for number in range(count))
            ]
            for level, count in enumerate(self.architecture.encoder_convs)
        ]
        self._merges: list[_JoinedMerge] = [  # type: ignore[assignment]
            _JoinedMerge(conv(f"decoder.{level}.0", padded_z=False))
            for level in range(len(self.architecture.decoder_convs))
        ]
        self._decoder: list[list[IntegerConvolution]] = [  # type: ignore[assignment]
            [conv(f"decoder.{level}.{number}") for number in range(1, count)]
            for level, count in enumerate(self.architecture.decoder_convs)
        ]

        self._head = [
            (
                layer.weight.detach().contiguous(memory_format=torch.channels_last_3d),
                cast(Tensor, layer.bias).detach() + offset,
            )
            for layer, offset in (
                (cast(nn.Conv3d, network.head[0]), torch.tensor(0.0)),
                (cast(nn.Conv3d, network.head[2]), offsets[HEAD]),
            )
        ]

    def _peak_bytes(self, grid: tuple[int, int, int], slab_slices: int) -> int:
        depth, height, width = grid
        voxels = depth * height * width
        fine, coarse, coarser = self.architecture.widths[:3]
        halo = 2 * (self.architecture.decoder_convs[0] + self.architecture.encoder_convs[0])
        # Level 1 at its worst: skip, doubled map, both joined, result. The same at the finest
        # level, where the first convolution's float32 result and its rounding take more, and
        # more than the last one's.
        below = 2 * (2 * coarse + coarser) * voxels // 8
        of_fine = max(2 * (2 * fine + coarse), 9 * fine)
        slab = of_fine * height * width * min(depth, slab_slices + halo)
        logits = 4 * self.architecture.classes * voxels
        held = coarse * voxels // 8 + fine * voxels
        below += 2 * fine * voxels
        return int(_HEAP_GAPS * max(below, held + slab + logits))

    def _first_pass(self, x: Tensor, slabs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        # In bytes the skip is small enough to be kept.
        parts = [self._skip(x, *slab).permute(0, 2, 3, 4, 1) for slab in slabs]
        skip = torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3)
        return skip, self._pool(skip)

    def _skip_slices(self, source: Tensor, start: int, stop: int) -> Tensor:
        return source[:, :, start:stop]

    def _pool(self, x: Tensor) -> Tensor:
        for axis in (2, 3, 4):
            even, odd = (x.unfold(axis, 2, 2).select(-1, i) for i in (0, 1))
            x = torch.maximum(even, odd)
        return x

    def _merged_slices(
        self, skip: Tensor, below: Tensor, held: tuple[int, int], wanted: tuple[int, int]
    ) -> Tensor:
        first = held[0] // 2
        coarse = below[:, :, first : (held[1] + 1) // 2]
        # Where the volume ends, what is held ends with what is wanted.
        beyond = 1 - (wanted[0] - held[0]), 1 - (held[1] - wanted[1])
        return self._merges[0](skip, coarse, held[0] - 2 * first, beyond)

    def _logits(self, features: Tensor) -> Tensor:
        return super()._logits(functional.relu_(features))


def joined(
    skip: Tensor, coarse: Tensor, first: int = 0, beyond: tuple[int, int] = (0, 0)
) -> Tensor:
    """Channels of ``skip``, then of ``coarse`` with every voxel doubled along z, y and x.

    ``skip`` is (1, own, z, y, x), ``coarse`` (1, channels, n, y / 2, x / 2), the result (1, own +
    channels, below + z + above, y, x): ``skip`` begins ``first`` slices after the doubled map, and
    ``beyond`` it lie (below, above) slices of zeros. All of uint8, channels innermost in memory
    and multiples of 16. Written once, in
    place: a map that is doubled, cut and joined in turn moves through memory three times.
    """
    own, channels = skip.shape[1] // CHANNELS, coarse.shape[1] // CHANNELS
    slices, height, width = skip.shape[2:]
    below, above = beyond
    out = torch.empty((below + slices + above, height, width, own + channels), dtype=_BLOCK)
    out[:below], out[below + slices :] = 0, 0
    part = out[below : below + slices]
    _copy(part[..., :own], _blocks(skip))
    cells = _blocks(coarse)
    for parity in (0, 1):
        lower = (parity - first) % 2
        pairs = part[lower::2].unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        doubled = cells[(lower + first) // 2 :][: len(pairs)]
        for side in (0, 1):
            _copy(pairs[:, :, :, :, side, own:], doubled[:, :, None])
    return out.view(torch.uint8)[None].permute(0, 4, 1, 2, 3)


def _blocks(x: Tensor) -> Tensor:
    """(1, channels, z, y, x) bytes as (z, y, x, channels / 16) of 16 bytes each."""
    return x[0].permute(1, 2, 3, 0).view(_BLOCK)


def _copy(to: Tensor, of: Tensor) -> None:
    """Block by block: along x, not along the one or two blocks of a voxel, torch's loop is long."""
    for block in range(to.shape[-1]):
        to[..., block].copy_(of[..., block])

"""The forward pass: norms folded, upsampling folded, the finest level in slabs.

Folded into the convolutions, frozen normalisation leaves a purely local network: what a slab
of slices gives depends on the slab and a halo of a few slices alone. The finest level, where
seven tenths of the memory would go, therefore runs slab by slab: its skip is computed again
rather than stored, nothing upsampled or concatenated is stored, and the result is that of the
whole volume. Slabs also stay in the cache, so they are the way taken always; a memory limit
only makes them thinner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flare_clef.errors import UserError
from flare_clef.network import (
    ConvBlock,
    MergeBlock,
    SegmentationNetwork,
    blocks,
    channels_last,
    convolve,
    fold_upsampling,
)
from flare_clef.precision import PRECISIONS

HEAP_GAPS = 1.55
"""What blocks of unequal size leave unused between them in the heap; up to 1.51 was seen."""


@dataclass(frozen=True)
class _Conv:
    """A convolution with its normalisation folded in; ReLU follows."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return activated(x, self.weight, self.bias)


@dataclass(frozen=True)
class _Merge:
    """Convolution of (skip, upsampled) as a convolution and a transposed one, summed."""

    of_skip: Tensor
    of_coarse: Tensor
    bias: Tensor

    def coarse(self, x: Tensor) -> Tensor:
        return functional.conv_transpose3d(x, self.of_coarse, stride=2, padding=1)

    def skip(self, x: Tensor) -> Tensor:
        return convolve(x, self.of_skip, self.bias)

    def __call__(self, skip: Tensor, coarse: Tensor) -> Tensor:
        return functional.relu_(self.coarse(coarse).add_(self.skip(skip)))


@dataclass(frozen=True)
class MemoryPlan:
    """How a volume will be computed, and what that takes."""

    slab_slices: int
    peak_bytes: int
    """Estimate, beside the weights: activations and the logits."""


class FoldedNetwork:
    """A :class:`SegmentationNetwork` made ready for inference; callable from many threads.

    ``network`` must be in evaluation mode: its running statistics are what is folded in.
    """

    slab_slices: ClassVar[tuple[int, ...]] = (32, 16, 8, 4, 2)
    """Thicknesses to choose from, the fastest first."""

    def __init__(self, network: SegmentationNetwork, device: torch.device, precision: str) -> None:
        self.device, self.dtype = device, PRECISIONS[precision]
        self.architecture = network.architecture
        backbone = network.backbone
        encoder, decoder = blocks(backbone.encoder), blocks(backbone.decoder)
        self._encoder = [[self._conv(block) for block in stack] for stack in encoder]
        self._merges = [self._merge(cast(MergeBlock, stack[0])) for stack in decoder]
        self._decoder = [[self._conv(block) for block in stack[1:]] for stack in decoder]
        self._head = [
            (self._ready(layer.weight), cast(Tensor, layer.bias).detach().to(device, self.dtype))
            for layer in (cast(nn.Conv3d, network.head[0]), cast(nn.Conv3d, network.head[2]))
        ]

    def _ready(self, weight: Tensor) -> Tensor:
        weight = weight.detach().to(self.device, self.dtype)
        return weight.contiguous(memory_format=torch.channels_last_3d)

    def _conv(self, block: ConvBlock) -> _Conv:
        weight, bias = fold_norm(block)
        return _Conv(self._ready(weight), bias.to(self.device, self.dtype))

    def _merge(self, block: MergeBlock) -> _Merge:
        weight, bias = fold_norm(block)
        skip = block.skip_channels
        return _Merge(
            self._ready(weight[:, :skip]),
            self._ready(fold_upsampling(weight[:, skip:])),
            bias.to(self.device, self.dtype),
        )

    def plan(self, grid: tuple[int, int, int], memory_limit_bytes: int | None) -> MemoryPlan:
        """The thickest slabs that stay under the limit. Raises UserError, with the figure."""
        plans = [MemoryPlan(n, self._peak_bytes(grid, n)) for n in self.slab_slices]
        for candidate in plans:
            if memory_limit_bytes is None or candidate.peak_bytes <= memory_limit_bytes:
                return candidate
        raise UserError(
            f"the network needs at least {plans[-1].peak_bytes / 2**20:.0f} MiB at "
            f"{' x '.join(map(str, grid))}, {memory_limit_bytes / 2**20:.0f} MiB are left for it: "  # type: ignore[operator]
            "raise --memory-limit or free some memory"
        )

    def least_bytes(self, grid: tuple[int, int, int]) -> int:
        """What the thinnest slabs take."""
        return self._peak_bytes(grid, self.slab_slices[-1])

    def _peak_bytes(self, grid: tuple[int, int, int], slab_slices: int) -> int:
        depth, height, width = grid
        voxels = depth * height * width
        fine, coarse = self.architecture.widths[:2]
        halo = 2 * (self.architecture.decoder_convs[0] + self.architecture.encoder_convs[0])
        # Level 1 at its worst holds its skip, two halves of the merge and their result; the
        # levels below add an eighth each. At the finest level: skip, both halves, result.
        below = 5 * coarse * voxels // 8
        slab = 4 * fine * height * width * min(depth, slab_slices + halo)
        logits = self.architecture.classes * voxels
        held = coarse * voxels // 8
        # The engine keeps a convolution's weights in an order of its own beside ours.
        reordered = 2 * max(m.of_coarse.numel() for m in self._merges)
        return int(HEAP_GAPS * self.dtype.itemsize * (reordered + max(below, held + slab + logits)))

    @torch.inference_mode()
    def __call__(self, volume: Tensor, *, memory_limit_bytes: int | None = None) -> Tensor:
        """Logits (13, z, y, x) of ``volume`` (z, y, x), float32 in (-1, 1).

        The result lies on the CPU in the network's precision, channels innermost in memory.
        Every axis must be a multiple of the architecture's divisor.
        """
        grid: tuple[int, int, int] = tuple(volume.shape)  # type: ignore[assignment]
        slices = self.plan(grid, memory_limit_bytes).slab_slices
        slabs = [(a, min(a + slices, grid[0])) for a in range(0, grid[0], slices)]
        x = volume.to(self.device, self.dtype)[None, None]
        source, pooled = self._first_pass(x, slabs)
        below = self._below(pooled)
        logits = torch.empty(*grid, self.architecture.classes, dtype=self.dtype)
        for start, stop in slabs:
            self._finest(source, below, start, stop, logits[start:stop])
        return logits.permute(3, 0, 1, 2)

    def _first_pass(self, x: Tensor, slabs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """What :meth:`_skip_slices` takes the skip from, and the pooled skip."""
        return x, torch.cat([self._pool(self._skip(x, *slab)) for slab in slabs], dim=2)

    def _skip_slices(self, source: Tensor, start: int, stop: int) -> Tensor:
        return self._skip(source, start, stop)

    def _skip(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Slices [start, stop) of the finest encoder level."""
        depth, reach = x.shape[2], len(self._encoder[0])
        low, high = max(0, start - reach), min(depth, stop + reach)
        part = channels_last(x[:, :, low:high])
        for conv in self._encoder[0]:
            part = conv(part)
        # Slices near a cut saw zeros in place of their neighbours: only [start, stop) is right.
        return part[:, :, start - low : stop - low]

    def _pool(self, x: Tensor) -> Tensor:
        return functional.max_pool3d(x, 2)

    def _below(self, x: Tensor) -> Tensor:
        """All levels but the finest: pooled finest features in, level 1's features out."""
        skips = []
        for level in range(1, len(self._encoder)):
            if level > 1:
                x = self._pool(x)
            for conv in self._encoder[level]:
                x = conv(x)
            skips.append(x)
        skips.pop()
        for level in reversed(range(1, len(self._merges))):
            x = self._merges[level](skips.pop(), x)
            for conv in self._decoder[level]:
                x = conv(x)
        return x

    def _finest(self, source: Tensor, below: Tensor, start: int, stop: int, logits: Tensor) -> None:
        """Writes ``logits`` (z, y, x, classes) of slices [start, stop)."""
        depth, reach = source.shape[2], len(self._decoder[0])
        low, high = max(0, start - reach), min(depth, stop + reach)
        skip_low, skip_high = max(0, low - 1), min(depth, high + 1)
        skip = self._skip_slices(source, skip_low, skip_high)
        part = self._merged_slices(skip, below, (skip_low, skip_high), (low, high))
        for conv in self._decoder[0]:
            part = conv(part)
        part = part[:, :, start - low : stop - low]
        # Slice by slice what lies between the head's two convolutions stays in the cache.
        for z, plane in enumerate(logits):
            plane.copy_(self._logits(part[:, :, z : z + 1])[0, :, 0].permute(1, 2, 0))

    def _merged_slices(
        self, skip: Tensor, below: Tensor, held: tuple[int, int], wanted: tuple[int, int]
    ) -> Tensor:
        """The finest merge on the slices ``wanted``; ``skip`` holds the slices ``held``."""
        low, high = wanted
        # Output slice r of the transposed convolution reads coarse slices (r-1)//2 to (r+1)//2.
        coarse_low, coarse_high = max(0, (low - 1) // 2), min(below.shape[2], high // 2 + 1)
        merge = self._merges[0]
        part = merge.coarse(below[:, :, coarse_low:coarse_high])
        part = part[:, :, low - 2 * coarse_low : high - 2 * coarse_low]
        return functional.relu_(part + merge.skip(skip)[:, :, low - held[0] : high - held[0]])

    def _logits(self, features: Tensor) -> Tensor:
        (first, first_bias), (second, second_bias) = self._head
        hidden = activated(features, first, first_bias)
        return convolve(hidden, second, second_bias)


def activated(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """ReLU of :func:`convolve`, the same bits; where oneDNN can, before a voxel leaves the cache.

    The operator is the one that torch's own compiler fuses them with.
    """
    fused = (
        x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _bf16_is_fused()))
    )
    if not fused:
        return functional.relu_(convolve(x, weight, bias))
    padding, one = [weight.shape[-1] // 2] * 3, [1] * 3
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, one, one, 1, "relu", [], ""
    )
    return out


def _bf16_is_fused() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fold_norm(block: ConvBlock) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals ``block``'s convolution and norm."""
    norm = block.norm
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("only a norm with running statistics can be folded")
    gain = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = norm.bias.double() - norm.running_mean.double() * gain
    weight = block.conv.weight * gain.float().view(-1, 1, 1, 1, 1)
    return weight.detach(), bias.detach().float()

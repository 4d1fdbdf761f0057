"""The network: a plain 3D U-Net and a head of two 1x1x1 convolutions (section 2.2).

The paper gives 33.0 M parameters and "a simple 3D U-Net"; its figure is lost. Ours has six
levels of 16 to 512 channels, 3x3x3 convolutions, max-pooling down, parameter-free (nearest)
upsampling and concatenated skips. Convolutions follow the width: parameters sit where the
network is wide, time where voxels are many.

Tensors are (batch, channels, z, y, x).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

# Per axis, which of the 3 taps of a convolution after nearest-neighbour doubling fall on
# which of the 4 taps of the equal transposed convolution (kernel 4, stride 2, padding 1):
# tap k = r - 2 * floor((r + d - 1) / 2) + 1 receives tap d for output parity r.
_FOLD = torch.zeros(4, 3)
for _parity in range(2):
    for _tap in range(3):
        _FOLD[_parity - 2 * ((_parity + _tap - 1) // 2) + 1, _tap] = 1.0

_FOLD_FROM_CELLS = 8**3
"""Below so many coarse cells, folding the weights costs more than it saves."""


_DIRECT_FROM_VOXELS = 16**3
"""From so many voxels on, training too takes oneDNN's convolution (:func:`convolve`)."""


@dataclass(frozen=True)
class Architecture:
    """Everything that decides the network's shape; travels with the weights."""

    widths: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    """Channels per level, finest first."""
    encoder_convs: tuple[int, ...] = (1, 2, 2, 2, 2, 3)
    """3x3x3 convolutions per encoder level, finest first; the last is the bottom."""
    decoder_convs: tuple[int, ...] = (1, 2, 3, 3, 3)
    """3x3x3 convolutions per decoder level, finest first."""
    head_channels: int = 16
    """Channels between the head's two 1x1x1 convolutions."""
    classes: int = 13

    def __post_init__(self) -> None:
        if len(self.encoder_convs) != len(self.widths):
            raise ValueError("encoder_convs needs one number per level")
        if len(self.decoder_convs) != len(self.widths) - 1:
            raise ValueError("decoder_convs needs one number per level but the bottom")

    @property
    def levels(self) -> int:
        return len(self.widths)

    @property
    def divisor(self) -> int:
        """Each axis of the input must be a multiple of this many voxels."""
        return 2 ** (self.levels - 1)


class ConvBlock(nn.Module):
    """3x3x3 convolution without bias, batch normalisation, ReLU.

    Batch size is 1 and the volume whole, so statistics run over all voxels of one body. At
    evaluation the running statistics stand in; :mod:`flare_clef.training` re-estimates and
    freezes them for the last part of training, so that both see the same numbers.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        direct = x[0, 0].numel() >= _DIRECT_FROM_VOXELS
        out = convolve(x, self.conv.weight) if direct else self.conv(x)
        return functional.relu_(self.norm(out))


class MergeBlock(ConvBlock):
    """A :class:`ConvBlock` on (skip, upsampled) without upsampling or concatenating.

    A convolution of a concatenation is the sum of two convolutions, and one after
    nearest-neighbour doubling is a transposed convolution with 8 taps per output voxel in
    place of 27 (:func:`fold_upsampling`). Channels of ``conv``: skip first, then upsampled.
    """

    def __init__(self, skip: int, coarse: int, outputs: int) -> None:
        super().__init__(skip + coarse, outputs)
        self.skip_channels = skip

    def merge(self, skip: Tensor, coarse: Tensor) -> Tensor:
        """The convolution of the concatenation, before normalisation."""
        weight = self.conv.weight
        of_skip = weight[:, : self.skip_channels]
        of_coarse = weight[:, self.skip_channels :]
        if coarse[0, 0].numel() < _FOLD_FROM_CELLS:
            doubled = functional.interpolate(coarse, scale_factor=2.0, mode="nearest")
            return functional.conv3d(torch.cat([skip, doubled], dim=1), weight, padding=1)
        out = functional.conv_transpose3d(coarse, fold_upsampling(of_coarse), stride=2, padding=1)
        return out.add_(functional.conv3d(skip, of_skip, padding=1))

    def forward(self, skip: Tensor, coarse: Tensor) -> Tensor:  # type: ignore[override]
        return functional.relu_(self.norm(self.merge(skip, coarse)))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution of an odd cube, padded to the same size, by oneDNN wherever it can.

    torch leaves fp32 inputs with channels x depth x height <= 20,480 (the one-channel scan,
    thin slabs), and single voxels' kernels where there is one thread, to a plain form that first
    copies every voxel's neighbours: three to seven times slower here, and for 3x3x3 27 times the
    input's memory.
    """
    padding = weight.shape[-1] // 2
    direct = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )
    if not direct:
        return functional.conv3d(x, weight, bias, padding=padding)
    one = (1, 1, 1)
    return torch.mkldnn_convolution(x, weight, bias, (padding,) * 3, one, one, 1)


def channels_last(volume: Tensor) -> Tensor:
    """A contiguous (1, 1, z, y, x) volume, no copy, with the strides of ``channels_last_3d``.

    With one channel both layouts lie alike in memory and torch takes the strides' word for
    which one it is; what follows (pooling above all) is up to ten times faster in this one.
    """
    _, _, depth, height, width = volume.shape
    plane = height * width
    return volume.contiguous().as_strided(volume.shape, (depth * plane, 1, plane, width, 1))


def fold_upsampling(weight: Tensor) -> Tensor:
    """Kernel of the transposed convolution that equals "double, then convolve".

    ``weight`` is (out, in, 3, 3, 3); returns (in, out, 4, 4, 4) for stride 2, padding 1.
    """
    fold = _FOLD.to(weight)
    outputs, inputs = weight.shape[:2]
    taps = (
        weight.reshape(outputs * inputs, 27)
        @ torch.kron(torch.kron(fold, fold), fold).T.contiguous()
    )
    return taps.view(outputs, inputs, 4, 4, 4).transpose(0, 1)


class UNet(nn.Module):
    """The backbone: (B, 1, z, y, x) in (-1, 1) to (B, widths[0], z, y, x) features."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        widths = architecture.widths
        self.encoder = nn.ModuleList()
        inputs = 1
        for width, convs in zip(widths, architecture.encoder_convs, strict=True):
            self.encoder.append(_stack(inputs, width, convs))
            inputs = width
        self.decoder = nn.ModuleList()
        for level, convs in enumerate(architecture.decoder_convs):
            width = widths[level]
            first = MergeBlock(width, widths[level + 1], width)
            self.decoder.append(
                nn.ModuleList([first, *(ConvBlock(width, width) for _ in range(convs - 1))])
            )

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        x = channels_last(x)
        for level, stack in enumerate(blocks(self.encoder)):
            if level:
                x = functional.max_pool3d(x, 2)
            for block in stack:
                x = block(x)
            skips.append(x)
        skips.pop()
        for merge, *rest in reversed(blocks(self.decoder)):
            x = cast(MergeBlock, merge)(skips.pop(), x)
            for block in rest:
                x = block(x)
        return x


def blocks(levels: nn.ModuleList) -> list[list[ConvBlock]]:
    """The blocks of each level, finest first; a decoder level's first is a MergeBlock."""
    return [cast("list[ConvBlock]", list(cast(nn.ModuleList, level))) for level in levels]


def _stack(inputs: int, width: int, convs: int) -> nn.ModuleList:
    return nn.ModuleList([ConvBlock(inputs if i == 0 else width, width) for i in range(convs)])


class Head(nn.Sequential):
    """Two 1x1x1 convolutions with a ReLU between: features to ``outputs`` maps."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__(
            nn.Conv3d(inputs, hidden, 1), nn.ReLU(inplace=True), nn.Conv3d(hidden, outputs, 1)
        )


class SegmentationNetwork(nn.Module):
    """Backbone and head: (B, 1, z, y, x) to (B, 13, z, y, x) logits.

    Every axis must be a multiple of ``architecture.divisor`` voxels.
    """

    def __init__(self, architecture: Architecture | None = None) -> None:
        super().__init__()
        self.architecture = architecture or Architecture()
        self.backbone = UNet(self.architecture)
        self.head = Head(
            self.architecture.widths[0], self.architecture.head_channels, self.architecture.classes
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def parameter_count(module: nn.Module) -> int:
    """Number of trained parameters (33.0 M for the default architecture)."""
    return sum(p.numel() for p in module.parameters())


def norms(module: nn.Module) -> Sequence[nn.BatchNorm3d]:
    """All normalisation layers of ``module``."""
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm3d)]

"""Convolutions in 8-bit integers: rounding, packing, running; all of oneDNN's interface is here.

An activation is ``q / highest * range`` with ``q`` uint8, zero at 0 (it follows a ReLU) and one
range per channel. A weight is ``w * scale`` with ``w`` int8 in -127 to 127 and one scale per output
channel; the ranges of the input's channels are multiplied into it before rounding. Products and
sums are exact integers (int32), turned into float32 with bias once and rounded to the nearest
(ties to even), so that neither the order nor slabs can change a result.

The operator is ``torch.ops.onednn.qconv_pointwise``, which torch's own compiler uses; the eager
quantisation modules are deprecated. It takes plain tensors. Its results are compared with a
plain integer form in ``tests/test_integer_convolution.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flare_clef.network import Architecture

FULL, REDUCED = 255, 127
"""Highest activation. Processors without VNNI sum pairs of products in 16 bits: 127 * 127 * 2
fits, 255 * 127 * 2 does not."""

CHANNELS = 16
"""Blocks of channels that the tests cover; no network of ours has others."""


def fits_int8(architecture: Architecture) -> bool:
    """Whether all layers have channels in whole blocks."""
    return not any(n % CHANNELS for n in (*architecture.widths, architecture.head_channels))


@dataclass(frozen=True)
class IntegerConvolution:
    """A 3-D convolution of uint8 activations, stride 1, padded with zeros along y and x.

    Along z too, to the same size, if ``padded_z``; else it needs its neighbouring slices.
    """

    packed: Tensor
    weight_scale: Tensor
    """(out,) float32."""
    weight_zero: Tensor
    """(out,) zeros."""
    bias: Tensor
    """(out,) float32, in the output's units: shares of its ranges, or real ones."""
    side: int
    to_bytes: bool
    """The output is uint8, and what is negative becomes 0; else float32 in real units."""
    highest: int
    padded_z: bool

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor,
        input_ranges: Tensor,
        output_ranges: Tensor | None,
        highest: int,
        *,
        padded_z: bool = True,
    ) -> IntegerConvolution:
        """Rounds ``weight`` (out, in, k, k, k) float32.

        ``input_ranges`` (in,), ``output_ranges`` (out,): the real value of each channel that
        ``highest`` stands for; no ``output_ranges``: float32 comes out. Channels must be
        multiples of :data:`CHANNELS`.
        """
        if any(count % CHANNELS for count in weight.shape[:2]):
            raise ValueError(f"8-bit convolutions take multiples of {CHANNELS} channels")
        weight = weight * input_ranges.view(1, -1, 1, 1, 1)
        if output_ranges is not None:
            weight, bias = weight / output_ranges.view(-1, 1, 1, 1, 1), bias / output_ranges
        whole, weight_scale = round_weight(weight)
        side = weight.shape[-1]
        packed = torch.ops.onednn.qconv_prepack(
            whole, weight_scale, 1 / highest, 0, [1] * 3, _padding(side, padded_z), [1] * 3, 1, None
        )
        return cls(
            packed,
            weight_scale,
            torch.zeros(len(weight), dtype=torch.int32),
            bias.float().contiguous(),
            side,
            output_ranges is not None,
            highest,
            padded_z,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """(1, in, z, y, x) uint8 to (1, out, z, y, x), both in ``channels_last_3d``.

        Not ``padded_z``: the first and the last ``side // 2`` slices have no result.
        """
        kind, scale = (torch.uint8, 1 / self.highest) if self.to_bytes else (torch.float32, 1.0)
        out: Tensor = torch.ops.onednn.qconv_pointwise(
            x, 1 / self.highest, 0, self.packed, self.weight_scale, self.weight_zero, self.bias,
            [1] * 3, _padding(self.side, self.padded_z), [1] * 3, 1,
            scale, 0, kind, "none", [], "",
        )  # fmt: skip
        if self.to_bytes and self.highest < FULL:
            out.clamp_(max=self.highest)
        return out


def _padding(side: int, padded_z: bool) -> list[int]:
    return [side // 2 * padded_z, side // 2, side // 2]


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights (out, in, k, k, k) and their (out,) scales: the largest of each is 127."""
    largest = weight.abs().amax((1, 2, 3, 4)).clamp_min(1e-12)
    scale = largest / 127
    return torch.round(weight / scale.view(-1, 1, 1, 1, 1)).to(torch.int8), scale


def round_activation(x: Tensor, highest: int) -> Tensor:
    """Steps as uint8, below 0 as 0, above ``highest`` as ``highest``; ``x`` is used up."""
    return x.round_().clamp_(0, highest).to(torch.uint8)


def highest_activation() -> int | None:
    """What this processor and torch add up exactly: ``FULL``, ``REDUCED``, or None for neither.

    Found by trying, with the largest numbers there are.
    """
    for highest in (FULL, REDUCED):
        x = torch.full((1, 16, 4, 4, 4), highest, dtype=torch.uint8)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        weight = torch.ones(16, 16, 3, 3, 3)
        weight[1::2] = -1
        try:
            out = IntegerConvolution.of(
                weight, torch.zeros(16), torch.full((16,), float(highest)), None, highest
            )(x)
        except (AttributeError, RuntimeError):
            return None
        inside = out[0, :, 1:-1, 1:-1, 1:-1]
        wanted = 16 * 27 * highest * torch.tensor([1.0, -1.0]).repeat(8)
        if torch.allclose(inside, wanted.view(-1, 1, 1, 1).expand_as(inside), rtol=1e-5):
            return highest
    return None

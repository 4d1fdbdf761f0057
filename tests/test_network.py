"""The network against the plain torch form of what the paper says."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from conftest import TINY
from torch import nn
from torch.nn import functional

from flare_clef.network import (
    Architecture,
    MergeBlock,
    SegmentationNetwork,
    convolve,
    fold_upsampling,
    parameter_count,
)


def test_33_0_million_parameters():
    with torch.device("meta"):
        network = SegmentationNetwork()
    assert parameter_count(network) == 32_972_125
    assert f"{parameter_count(network) / 1e6:.1f}" == "33.0"


def test_head_is_two_pointwise_convolutions():
    convolutions = [m for m in SegmentationNetwork(TINY).head if isinstance(m, nn.Conv3d)]
    assert [c.kernel_size for c in convolutions] == [(1, 1, 1)] * 2
    assert convolutions[-1].out_channels == 13


def test_folded_upsampling_equals_doubling_and_convolving():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4, 5, 6, dtype=torch.float64)
    weight = torch.randn(2, 3, 3, 3, 3, dtype=torch.float64)
    plain = functional.conv3d(functional.interpolate(x, scale_factor=2), weight, padding=1)
    folded = functional.conv_transpose3d(x, fold_upsampling(weight), stride=2, padding=1)
    assert torch.allclose(folded, plain, atol=1e-12)


@pytest.mark.parametrize("size", [4, 10])
def test_merge_equals_upsample_concatenate_convolve(size: int):
    torch.manual_seed(0)
    block = MergeBlock(3, 5, 4).double()
    skip = torch.randn(1, 3, *(2 * size,) * 3, dtype=torch.float64)
    coarse = torch.randn(1, 5, *(size,) * 3, dtype=torch.float64)
    joined = torch.cat([skip, functional.interpolate(coarse, scale_factor=2)], 1)
    plain = functional.conv3d(joined, block.conv.weight, padding=1)
    assert torch.allclose(block.merge(skip, coarse), plain, atol=1e-12)


@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("channels", [1, 5])
def test_convolution_equals_the_sum_over_neighbours(side: int, channels: int):
    torch.manual_seed(side)
    x = torch.randn(1, channels, 3, 6, 5)
    weight, bias = torch.randn(4, channels, side, side, side), torch.randn(4)
    reach = side // 2
    padded = functional.pad(x, (reach,) * 6).double()
    expected = bias.double().view(1, 4, 1, 1, 1).expand(1, 4, *x.shape[2:]).clone()
    for z, y, x_ in product(range(side), repeat=3):
        part = padded[:, :, z : z + 3, y : y + 6, x_ : x_ + 5]
        expected += torch.einsum("oi,bizyx->bozyx", weight[:, :, z, y, x_].double(), part)
    for memory in (torch.contiguous_format, torch.channels_last_3d):
        found = convolve(x.to(memory_format=memory), weight, bias)
        assert torch.allclose(found.double(), expected, atol=1e-5)


def test_output_shape_on_an_anisotropic_grid():
    assert SegmentationNetwork(TINY)(torch.zeros(1, 1, 8, 12, 16)).shape == (1, 13, 8, 12, 16)


def test_architecture_is_checked():
    with pytest.raises(ValueError, match="encoder_convs"):
        Architecture(widths=(4, 8))

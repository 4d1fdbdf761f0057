"""8-bit convolutions against plain integers, value by value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from flare_clef.integer_convolution import (
    REDUCED,
    IntegerConvolution,
    highest_activation,
    round_activation,
    round_weight,
)

HIGHEST = highest_activation()
pytestmark = pytest.mark.skipif(HIGHEST is None, reason="this torch has no 8-bit convolution")


def plainly(
    x: Tensor, weight: Tensor, bias: Tensor, input_ranges: Tensor,
    output_ranges: Tensor | None, highest: int,
) -> Tensor:  # fmt: skip
    """Sums of whole numbers in int64 on padded input; scales, bias and rounding after them."""
    # Rounded as the packed ones are: half a step's rounding decides a whole step of a weight.
    scaled = weight * input_ranges.view(1, -1, 1, 1, 1)
    rows = torch.ones(len(weight)) if output_ranges is None else output_ranges
    whole, weight_scale = round_weight(scaled / rows.view(-1, 1, 1, 1, 1))
    side = weight.shape[-1]
    reach = side // 2
    padded = functional.pad(x[0].long(), (reach,) * 6)
    sums = torch.zeros(len(weight), *x.shape[2:], dtype=torch.int64)
    for z in range(side):
        for y in range(side):
            for across in range(side):
                part = padded[
                    :, z : z + x.shape[2], y : y + x.shape[3], across : across + x.shape[4]
                ]
                sums += torch.einsum("oi,izyx->ozyx", whole[:, :, z, y, across].long(), part)
    column = (-1, 1, 1, 1)
    real = sums.double() / highest * weight_scale.double().view(column)
    real += (bias / rows).double().view(column)
    if output_ranges is None:
        return real[None]
    return (real * highest).clamp(0, highest)[None]


@given(
    seed=st.integers(0, 1000),
    inputs=st.sampled_from([16, 32, 48]),
    outputs=st.sampled_from([16, 32]),
    side=st.sampled_from([1, 3]),
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    to_bytes=st.booleans(),
    padded_z=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_equals_plain_integers(seed, inputs, outputs, side, shape, to_bytes, padded_z):
    assert HIGHEST is not None
    cut = 0 if padded_z else side // 2
    shape = (shape[0] + 2 * cut, *shape[1:])
    generator = torch.Generator().manual_seed(seed)
    input_ranges = torch.rand(inputs, generator=generator) * 5 + 0.1
    weight = torch.randn(outputs, inputs, side, side, side, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    x = torch.randint(0, HIGHEST + 1, (1, inputs, *shape), generator=generator)
    x = x.to(torch.uint8).contiguous(memory_format=torch.channels_last_3d)
    output_ranges = torch.rand(outputs, generator=generator) * 20 + 1 if to_bytes else None
    wanted = plainly(x, weight, bias, input_ranges, output_ranges, HIGHEST)
    wanted = wanted[:, :, cut : shape[0] - cut]
    found = IntegerConvolution.of(
        weight, bias, input_ranges, output_ranges, HIGHEST, padded_z=padded_z
    )(x)
    if output_ranges is None:
        assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-4)
        return
    assert found.dtype == torch.uint8 and int(found.max()) <= HIGHEST
    # A sum that ends within a float's rounding of a half may go either way.
    near_half = ((wanted - wanted.floor()) - 0.5).abs() < 1e-3
    assert torch.equal(found[~near_half], wanted.round().to(torch.uint8)[~near_half])
    assert ((found.double() - wanted).abs() <= 0.51).all()


def test_the_largest_sums_do_not_overflow():
    """What made 255 impossible without VNNI: all weights and activations at their ends."""
    assert HIGHEST is not None
    weight = torch.ones(16, 64, 3, 3, 3)
    x = torch.full((1, 64, 5, 5, 5), HIGHEST, dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    convolution = IntegerConvolution.of(
        weight, torch.zeros(16), torch.full((64,), float(HIGHEST)), None, HIGHEST
    )
    assert float(convolution(x)[0, 0, 2, 2, 2]) == pytest.approx(64 * 27 * HIGHEST, rel=1e-5)


def test_other_numbers_of_channels_are_refused():
    for outputs, inputs in ((13, 16), (16, 4)):
        with pytest.raises(ValueError, match="multiples of 16"):
            weight = torch.ones(outputs, inputs, 1, 1, 1)
            IntegerConvolution.of(weight, torch.zeros(outputs), torch.ones(inputs), None, REDUCED)


def test_rounding_by_hand():
    whole, scale = round_weight(torch.tensor([[1.0, -0.5], [0.0, 0.0]]).view(2, 2, 1, 1, 1))
    assert whole.flatten().tolist() == [127, -64, 0, 0]
    assert scale[0] == pytest.approx(1 / 127)
    x = torch.tensor([-3.0, 0.0, 0.49, 1.0, 2.5, 63.6, 127.0, 200.0])
    assert round_activation(x, REDUCED).tolist() == [0, 0, 0, 1, 2, 64, 127, 127]


def test_a_range_of_its_own_for_each_channel_by_hand():
    """Channels with values up to 1 and up to 100: with one range the small one would be lost."""
    ranges = torch.full((16,), 100.0)
    ranges[0] = 1.0
    weight = torch.zeros(16, 16, 1, 1, 1)
    weight[0, 0], weight[1, 1] = 1.0, 1.0
    x = torch.zeros(1, 16, 1, 1, 1, dtype=torch.uint8)
    assert HIGHEST is not None
    x[0, 0], x[0, 1] = 3, HIGHEST
    x = x.contiguous(memory_format=torch.channels_last_3d)
    real = IntegerConvolution.of(weight, torch.zeros(16), ranges, None, HIGHEST)(x).flatten()
    assert real[:3].tolist() == pytest.approx([3 / HIGHEST, 100.0, 0.0])
    again = IntegerConvolution.of(weight, torch.zeros(16), ranges, ranges, HIGHEST)(x)
    assert again.flatten()[:3].tolist() == [3, HIGHEST, 0]

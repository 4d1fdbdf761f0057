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
    x: Tensor, weight: Tensor, bias: Tensor, inputs: list[tuple[int, float]],
    output_range: float | None, highest: int,
) -> Tensor:  # fmt: skip
    """Sums of whole numbers in int64 on padded input; scales, bias and rounding after them."""
    scales = [largest / highest for _, largest in inputs]
    # Rounded as the packed ones are: half a step's rounding decides a whole step of a weight.
    ratios = [torch.full((n,), s / scales[0]) for (n, _), s in zip(inputs, scales, strict=True)]
    whole, weight_scale = round_weight(weight * torch.cat(ratios).view(1, -1, 1, 1, 1))
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
    real = sums.double() * weight_scale.double().view(column) * scales[0]
    real += bias.double().view(column)
    if output_range is None:
        return real[None]
    return (real / (output_range / highest)).clamp(0, highest)[None]


@given(
    seed=st.integers(0, 1000),
    groups=st.sampled_from([[16], [32], [16, 32]]),
    outputs=st.sampled_from([16, 32]),
    side=st.sampled_from([1, 3]),
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    to_bytes=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_equals_plain_integers(seed, groups, outputs, side, shape, to_bytes):
    assert HIGHEST is not None
    generator = torch.Generator().manual_seed(seed)
    inputs = [(n, float(torch.rand((), generator=generator) * 5 + 0.1)) for n in groups]
    weight = torch.randn(outputs, sum(groups), side, side, side, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    x = torch.randint(0, HIGHEST + 1, (1, sum(groups), *shape), generator=generator)
    x = x.to(torch.uint8).contiguous(memory_format=torch.channels_last_3d)
    output_range = 20.0 if to_bytes else None
    wanted = plainly(x, weight, bias, inputs, output_range, HIGHEST)
    found = IntegerConvolution.of(weight, bias, inputs, output_range, HIGHEST)(x)
    if output_range is None:
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
        weight, torch.zeros(16), [(64, float(HIGHEST))], None, HIGHEST
    )
    assert float(convolution(x)[0, 0, 2, 2, 2]) == pytest.approx(64 * 27 * HIGHEST, rel=1e-5)


def test_other_numbers_of_channels_are_refused():
    for outputs, inputs in ((13, 16), (16, 4)):
        with pytest.raises(ValueError, match="multiples of 16"):
            weight = torch.ones(outputs, inputs, 1, 1, 1)
            IntegerConvolution.of(weight, torch.zeros(outputs), [(inputs, 1.0)], None, REDUCED)


def test_rounding_by_hand():
    whole, scale = round_weight(torch.tensor([[1.0, -0.5], [0.0, 0.0]]).view(2, 2, 1, 1, 1))
    assert whole.flatten().tolist() == [127, -64, 0, 0]
    assert scale[0] == pytest.approx(1 / 127)
    x = torch.tensor([0.0, 0.49, 1.0, 63.6, 127.0, 200.0])
    assert round_activation(x, 127.0, REDUCED).tolist() == [0, 0, 1, 64, 127, 127]

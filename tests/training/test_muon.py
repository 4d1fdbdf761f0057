"""Muon's step against singular value decompositions and torch's Adam."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flare_clef.training.muon import _QUINTIC, _ROUNDS, Muon, orthogonal


def by_decomposition(matrix: torch.Tensor) -> torch.Tensor:
    """The same polynomial, applied to the singular values themselves in double precision."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    a, b, c = _QUINTIC
    for _ in range(_ROUNDS):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 90), decades=st.floats(0, 3),
    scale=st.sampled_from([1e-6, 1.0, 1e4]), seed=st.integers(0, 9),
)  # fmt: skip
def test_singular_values_become_about_one_and_vectors_stay(rows, columns, decades, scale, seed):
    random = torch.Generator().manual_seed(seed)
    weights = torch.logspace(0, -decades, rows)[:, None]
    matrix = scale * weights * torch.randn(rows, columns, generator=random)
    found = orthogonal(matrix)
    assert found.shape == matrix.shape
    torch.testing.assert_close(found.double(), by_decomposition(matrix), atol=2e-3, rtol=0)
    if decades < 1 and max(rows, columns) > 2 * min(rows, columns):
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.6 and values.max() < 1.25


def test_a_gradient_of_low_rank_or_nothing_stays_finite():
    random = torch.Generator().manual_seed(0)
    thin = torch.randn(64, 3, generator=random) @ torch.randn(3, 500, generator=random)
    assert float(torch.linalg.matrix_norm(orthogonal(thin), 2)) < 1.3
    assert float(torch.linalg.matrix_norm(orthogonal(thin, torch.bfloat16), 2)) < 1.3
    assert not orthogonal(torch.zeros(4, 9)).any()


def test_a_step_by_hand():
    # The gradient is 3 times a rotation: its nearest orthogonal matrix is the rotation.
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = Muon([weight], lr=0.5)
    weight.grad = torch.tensor([[0.0, -3.0], [3.0, 0.0]])
    optimizer.step()
    a, b, c = _QUINTIC
    value = 0.5**0.5
    for _ in range(_ROUNDS):
        value = a * value + b * value**3 + c * value**5
    step = 0.5 * 0.2 * 2**0.5 * value
    torch.testing.assert_close(weight.data, torch.tensor([[0.0, step], [-step, 0.0]]))


def test_vectors_take_adams_step():
    random = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    optimizers = Muon([ours], lr=1e-2), torch.optim.Adam([theirs], lr=1e-2)
    for _ in range(5):
        ours.grad = torch.randn(7, generator=random)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(4, 3, 3, 3, 3), (4, 3, 1, 1, 1), (16, 2, 2, 2, 2)])
def test_a_convolution_is_a_matrix_of_its_output_channels(shape: tuple[int, ...]):
    random = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(shape, generator=random) for _ in range(2))
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        weight = torch.nn.Parameter(start.clone().to(memory_format=layout))
        weight.grad = gradient.clone().to(memory_format=layout)
        Muon([weight], lr=1.0).step()
        ends.append(weight.data)
    torch.testing.assert_close(ends[0], ends[1])
    # The momentum of a first step is 0.05 of the gradient; its scale does not matter.
    step = orthogonal(gradient.reshape(shape[0], -1))
    size = 0.2 * max(step.shape) ** 0.5
    torch.testing.assert_close(start - ends[0], size * step.reshape(shape), atol=1e-4, rtol=1e-4)

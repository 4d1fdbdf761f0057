"""The three losses of pre-training against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from flare_clef.training.pretraining_losses import (
    decoding_loss,
    defined,
    discriminativeness_loss,
    draw_transform,
    draw_voxels,
    effective_rank,
    equivariance_loss,
    flat_index,
    interpolate_rows,
    source_positions,
    unit_rows,
)
from flare_clef.training.resampling import resample


def test_decoding_is_the_mean_square():
    decoded = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 1, 1, 1, 4)
    volume = torch.tensor([0.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 1, 4)
    assert decoding_loss(decoded, volume).item() == (0 + 1 + 4 + 4) / 4


def test_discriminativeness_by_hand():
    """One anchor, four leaves; voxels of 5 x 2 x 1 mm."""
    anchors = torch.tensor([[1.0, 0.0]])
    leaves = torch.tensor([[1.0, 0.0], [0.95, math.sqrt(1 - 0.95**2)], [0.0, 1.0], [1.0, 0.0]])
    voxels = torch.tensor([[2, 0, 0], [0, 5, 0], [0, 0, 40], [1, 4, 3]])
    # Distances: 10, 10, 40 and sqrt(25 + 64 + 9) = 9.9 mm: the last is not far.
    # relu(-0.9 + 1) + relu(-0.9 + 0.95) + relu(-0.9 + 0) = 0.15 over three far pairs.
    found = discriminativeness_loss(
        anchors, leaves, torch.zeros(1, 3), voxels.float(), (5.0, 2.0, 1.0)
    )
    assert found.far_pairs == 3
    assert found.loss.item() == pytest.approx(0.15 / 3, abs=1e-6)
    assert found.similarity == pytest.approx(1.95 / 3, abs=1e-6)


def test_far_is_a_matter_of_millimetres_not_of_voxels():
    same = torch.ones(1, 1)
    voxels = torch.tensor([[6.0, 0.0, 0.0]])
    origin = torch.zeros(1, 3)
    assert discriminativeness_loss(same, same, origin, voxels, (2.0, 1.0, 1.0)).far_pairs == 1
    near = discriminativeness_loss(same, same, origin, voxels, (1.0, 2.0, 2.0))
    assert near.far_pairs == 0 and near.loss.item() == 0


def test_a_collapse_costs_a_tenth_and_shows_in_the_figures():
    equal = torch.tensor([[0.6, 0.8]]).expand(50, 2)
    voxels = torch.arange(50.0)[:, None].expand(50, 3) * 100
    found = discriminativeness_loss(equal[:5], equal, voxels[:5], voxels, (1.0, 1.0, 1.0))
    assert found.loss.item() == pytest.approx(0.1, abs=1e-6)
    assert found.similarity == pytest.approx(1, abs=1e-6)
    assert effective_rank(equal) == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.eye(4).repeat(3, 1)) == pytest.approx(4, abs=1e-6)


def test_a_rank_of_nothing_or_of_what_is_no_number_is_nan():
    assert math.isnan(effective_rank(torch.empty(0, 3)))
    assert math.isnan(effective_rank(torch.tensor([[1.0, 0.0], [math.nan, 0.0]])))


def test_unit_rows_keep_the_order_of_voxels():
    features = torch.randn(1, 3, 2, 4, 5)
    rows = unit_rows(features)
    voxel = torch.tensor([[1, 2, 3]])
    wanted = features[0, :, 1, 2, 3] / features[0, :, 1, 2, 3].norm()
    assert torch.allclose(rows[flat_index(voxel, (2, 4, 5))][0], wanted, atol=1e-6)


def test_voxels_are_of_the_body():
    volume = torch.full((6, 7, 8), -1.0)
    volume[2:4, 3, 5:] = 0.1
    voxels = draw_voxels(volume, 200, torch.Generator().manual_seed(0))
    assert (volume[tuple(voxels.t())] == 0.1).all()
    assert len(torch.unique(voxels, dim=0)) == 6
    assert draw_voxels(torch.full((2, 2, 2), -1.0), 5, torch.Generator()).shape == (0, 3)


def test_transform_acts_in_one_plane_within_its_ranges():
    generator = torch.Generator().manual_seed(0)
    planes = set()
    for _ in range(300):
        affine = draw_transform(generator)
        (still,) = [
            i for i in range(3) if torch.equal(affine[i], torch.eye(3, 4)[i])
            and torch.equal(affine[:, i], torch.eye(3)[:, i])
        ]  # fmt: skip
        planes.add(still)
        a, b = (i for i in range(3) if i != still)
        size = 1 / math.hypot(affine[a, a], affine[b, a])
        angle = math.degrees(math.atan2(affine[b, a], affine[a, a]))
        assert 1 - 1e-5 <= size <= 1.5 + 1e-5 and -30.001 <= angle <= 30.001
        assert affine[:, 3].abs().max() <= 0.2 + 1e-6  # 0.1 of a side that is 2 long
    assert planes == {0, 1, 2}


def test_source_positions_by_hand():
    """Magnified twice about the centre along x, shifted by a quarter of the side along y."""
    affine = torch.eye(3, 4)
    affine[0, 0] = 0.5
    affine[1, 3] = 0.5
    found = source_positions(torch.tensor([[2, 1, 7]]), affine, (8, 8, 8))
    # x: 7 is 3.5 right of the centre 3.5, half of that is 1.75; y: 1 + 8 / 4.
    assert found.tolist() == [pytest.approx([2.0, 3.0, 5.25], abs=1e-6)]
    assert defined(torch.tensor([[0.0, 0, 7], [0, 0, 7.1], [-0.1, 0, 0]]), (8, 8, 8)).tolist() == [
        True, False, False,
    ]  # fmt: skip


def test_interpolation_equals_grid_sample():
    torch.manual_seed(0)
    shape = (5, 6, 7)
    features = torch.randn(1, 3, *shape)
    positions = torch.rand(40, 3) * (torch.tensor(shape) - 1)
    positions[0] = torch.tensor([4.0, 5.0, 6.0])  # the very last voxel
    rows = features[0].permute(1, 2, 3, 0).reshape(-1, 3)
    grid = (positions / (torch.tensor(shape) - 1) * 2 - 1).flip(1).view(1, 1, 1, 40, 3)
    wanted = functional.grid_sample(features, grid, align_corners=True)[0, :, 0, 0].t()
    assert torch.allclose(interpolate_rows(rows, positions, shape), wanted, atol=1e-5)


def test_equivariance_where_the_answer_is_known():
    """A voxel's feature is its intensity as an angle: such an f commutes with any T.

    On a linear ramp interpolating the image is exact, so f(T(X)) is f at the source position;
    T(f(X)) falls short of length 1 only by the curvature between two neighbours.
    """
    shape = (16, 16, 16)
    ramp = torch.arange(16.0).view(1, 1, 16).expand(shape) / 16

    def f(volume):
        return torch.stack([volume.flatten().cos(), volume.flatten().sin()], dim=1)

    affine = draw_transform(torch.Generator().manual_seed(3))
    transformed, _ = resample(ramp, affine)
    voxels = torch.cartesian_prod(*[torch.arange(16)] * 3)
    positions = source_positions(voxels, affine, shape)
    inside = defined(positions, shape)
    assert 0.3 < inside.float().mean() <= 1
    moved = interpolate_rows(f(ramp), positions[inside], shape)
    loss = equivariance_loss(moved, f(transformed)[inside])
    assert -1 <= loss.item() < -1 + 1 / 16**2 / 4
    # A feature map that is not equivariant does worse: here one turned by a right angle.
    turned = torch.stack([-f(transformed)[:, 1], f(transformed)[:, 0]], dim=1)
    assert equivariance_loss(moved, turned[inside]).item() == pytest.approx(0, abs=1e-4)

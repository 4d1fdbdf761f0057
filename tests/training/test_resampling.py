"""The fast way to other places against torch's own, which is plain and slow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional

from flare_clef.training.augmentation import AugmentationSettings, draw_affine
from flare_clef.training.resampling import WHOLE, resample

HERE = torch.eye(3, 4)


def plain(
    image: Tensor,
    labels: Tensor,
    affine: Tensor,
    size: tuple[int, int, int],
    elastic: Tensor | None,
) -> tuple[Tensor, Tensor]:
    grid = functional.affine_grid(affine[None], [1, 1, *size], align_corners=False)
    if elastic is not None:
        field = functional.interpolate(
            elastic[None], size=size, mode="trilinear", align_corners=True
        )
        grid = grid + field.permute(0, 2, 3, 4, 1)
    moved = functional.grid_sample(image[None, None] + 1, grid, align_corners=False) - 1
    marks = functional.grid_sample(
        labels[None, None].float(), grid, mode="nearest", align_corners=False
    )
    return moved[0, 0], marks[0, 0].to(torch.uint8)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [(33, 20, 41), (24, 31, 28)])
def test_as_torch_in_three_dimensions(seed: int, size: tuple[int, int, int]) -> None:
    generator = Generator().manual_seed(seed)
    image = torch.rand(24, 31, 28, generator=generator) * 2 - 1
    labels = torch.randint(0, 256, image.shape, dtype=torch.uint8, generator=generator)
    affine = draw_affine(AugmentationSettings(shift=0.2, rotation_degrees=25), generator)
    elastic = torch.randn(3, 5, 4, 3, generator=generator) * 0.1 if seed % 2 else None
    wanted, wanted_labels = plain(image, labels, affine, size, elastic)
    found, marks = resample(image, affine, size, elastic=elastic, labels=labels)
    # A place is known to some 1e-5 of a voxel, and neighbours differ by up to 2.
    assert (found - wanted).abs().max() < 2e-4
    # So near the middle between two voxels the other one may be nearest.
    assert marks is not None and (marks != wanted_labels).float().mean() < 1e-3

    window = (slice(3, 19), slice(0, 16), slice(9, 25))
    part, part_marks = resample(image, affine, size, window, elastic, labels)
    assert torch.allclose(part, found[window], atol=2e-4) and part_marks is not None
    assert (part_marks != marks[window]).float().mean() < 1e-3


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_the_same_place_is_the_same_volume_and_the_input_stays(kind: torch.dtype) -> None:
    image = (torch.rand(9, 12, 10, generator=Generator().manual_seed(0)) * 2 - 1).to(kind)
    labels = torch.arange(image.numel()).view(image.shape).to(torch.uint8)
    before = image.clone()
    found, marks = resample(image, HERE, labels=labels)
    assert found.dtype == torch.float32 and torch.equal(image, before)
    assert torch.allclose(found, image.float(), atol=1e-5)
    assert marks is not None and torch.equal(marks, labels)
    assert resample(image, HERE)[1] is None


def test_places_worked_out_by_hand() -> None:
    # Four voxels along z, x and y alike: 0, 0.2, 0.4, 0.6 at -0.75, -0.25, 0.25, 0.75.
    image = torch.tensor([0.0, 0.2, 0.4, 0.6]).view(4, 1, 1).expand(4, 2, 2).contiguous()
    labels = torch.tensor([1, 2, 3, 4], dtype=torch.uint8).view(4, 1, 1).expand(4, 2, 2)
    up = HERE.clone()
    up[2, 3] = 0.375  # three quarters of a voxel
    found, marks = resample(image, up, labels=labels.contiguous())
    # The last place lies three quarters of a voxel beyond the last one: a quarter of 0.6, and air.
    wanted = torch.tensor([0.15, 0.35, 0.55, 0.25 * 0.6 - 0.75])
    assert torch.allclose(found[:, 0, 0], wanted, atol=1e-6)
    assert marks is not None and marks[:, 1, 1].tolist() == [2, 3, 4, 0]
    # Far away there is nothing but air, from whichever side.
    for axis in range(3):
        for far in (-9.0, 9.0):
            away = HERE.clone()
            away[axis, 3] = far
            found, marks = resample(image, away, labels=labels.contiguous())
            assert (found + 1).abs().max() < 1e-6 and marks is not None and not marks.any()


def test_a_bend_that_moves_everything_alike_is_a_shift() -> None:
    image = torch.rand(8, 8, 8, generator=Generator().manual_seed(1))
    shifted = HERE.clone()
    shifted[:, 3] = torch.tensor([0.25, -0.125, 0.5])
    bent = torch.tensor([0.25, -0.125, 0.5]).view(3, 1, 1, 1).expand(3, 5, 5, 5)
    by_bend, _ = resample(image, HERE, elastic=bent.contiguous())
    by_shift, _ = resample(image, shifted)
    assert torch.allclose(by_bend, by_shift, atol=1e-5)


def test_a_quarter_turn_keeps_every_voxel() -> None:
    image = torch.rand(10, 10, 10, generator=Generator().manual_seed(2))
    turn = torch.zeros(3, 4)
    turn[0, 1], turn[1, 0], turn[2, 2] = -1, 1, 1  # x of the input is -y, y is x
    found, _ = resample(image, turn)
    # found[y, x] is image[x, -y].
    assert torch.allclose(found, image.transpose(1, 2).flip(1), atol=1e-4)
    assert math.isclose(float(found.sum()), float(image.sum()), rel_tol=1e-5)


def test_a_window_of_one_slice(seed: int = 3) -> None:
    image = torch.rand(7, 9, 8, generator=Generator().manual_seed(seed))
    window = (slice(2, 3), slice(None), slice(None))
    assert torch.allclose(resample(image, HERE, None, window)[0], image[2:3], atol=1e-5)
    assert (slice(None),) * 3 == WHOLE

"""Short pieces look as ``prepare`` would show them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Generator

from flare_clef.preparation import prepare
from flare_clef.training.augmentation import AugmentationSettings, augment
from flare_clef.training.resampling import resample
from flare_clef.training.short_pieces import Piece, draw_piece

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
GRID = 48
HERE = torch.eye(3, 4)
STILL = AugmentationSettings(
    scale=0, axis_scale=0, rotation_degrees=0, shift=0, view_probability=0, elastic=0, gain=0,
    offset_hu=0, gamma=0, noise_hu=0, blur_probability=0, clip_probability=0,
    piece_probability=1,
)  # fmt: skip


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def scan(slices: int) -> np.ndarray:
    """(slices, 40, 40) HU, smooth, all of it body."""
    z, y, x = np.meshgrid(np.arange(slices), np.arange(40), np.arange(40), indexing="ij")
    return (100 * np.sin(z / 9) + 3 * y - 2 * x).astype(np.float32)


@pytest.mark.parametrize(("first", "count"), [(40, 28), (70, 12), (10, 50)])
def test_a_piece_is_what_prepare_makes_of_these_slices_alone(first: int, count: int):
    """160 slices of 4 mm: 112 mm, 48 mm (four times its length at most) and 200 mm of them."""
    spacing_mm = (4.0, 4.0, 4.0)
    array = scan(160)
    whole = prepare(array, IDENTITY, (96, GRID, GRID), spacing_mm=spacing_mm)
    wanted = prepare(array[first : first + count], IDENTITY, GRID, spacing_mm=spacing_mm)
    assert whole is not None and wanted is not None
    height_mm, length_mm = 640.0, 4.0 * count
    grid_mm = min(220.0, 4 * length_mm)
    middle_mm = 4 * (first + count / 2)
    piece = Piece(2 * middle_mm / height_mm - 1, grid_mm / height_mm, length_mm / grid_mm)
    found, _ = resample(whole[0], piece.zoom(HERE), (GRID,) * 3)
    found = piece.cut(found, -1, GRID, slice(None))
    air = (found == -1).flatten(1).all(1)
    air_wanted = (wanted[0] < -0.99).flatten(1).all(1)
    assert abs(int(air.sum()) - int(air_wanted.sum())) <= 2
    body = ~(air | air_wanted)
    body &= torch.roll(body, 1) & torch.roll(body, -1)  # at its ends a slice is half air
    assert body.sum() >= 8
    assert (found - wanted[0])[body].abs().max() < 0.04  # 10 HU, of interpolation


def test_pieces_lie_in_the_body_and_have_their_lengths():
    image = torch.full((90, 4, 4), -1.0)
    image[20:80] = 0.0  # 600 mm of 900
    lengths, middles = [], []
    for seed in range(300):
        piece = draw_piece(image, 900.0, seeded(seed))
        assert piece is not None
        grid_mm = piece.size * 900
        length_mm = piece.share * grid_mm
        assert grid_mm == pytest.approx(min(220, 4 * length_mm))
        middle_mm = (piece.middle + 1) * 450
        assert middle_mm - length_mm / 2 >= 200 - 1e-3
        assert middle_mm + length_mm / 2 <= 800 + 1e-3
        lengths.append(length_mm)
        middles.append(middle_mm)
    assert min(lengths) < 45 and max(lengths) > 180
    assert np.median(lengths) == pytest.approx(np.sqrt(40 * 200), abs=12)
    assert min(middles) < 260 and max(middles) > 740


def test_what_is_short_or_empty_stays():
    short = torch.full((44, 4, 4), -1.0)
    assert draw_piece(short, 220.0, seeded(0)) is None
    short[16:28] = 0.0
    assert draw_piece(short, 220.0, seeded(0)) is None


def test_image_and_labels_are_cut_alike_in_blocks_too():
    image = torch.full((60, 20, 20), 0.2)
    labels = torch.ones(60, 20, 20, dtype=torch.uint8)
    for seed in range(20):
        whole, marks = augment(image, labels, (32,) * 3, STILL, seeded(seed), height_mm=440.0)
        assert torch.equal(marks == 0, whole == -1) and (marks > 0).any()
        lengths = (marks[:, 10, 10] > 0).sum()
        assert 5 <= lengths <= 30
        middle = torch.nonzero(marks[:, 10, 10]).float().mean()
        assert middle == pytest.approx(15.5, abs=0.6)
        block, in_block = augment(
            image, labels, (32,) * 3, STILL, seeded(seed), block=24, height_mm=440.0
        )
        assert torch.equal(in_block == 0, block == -1)
        assert 0 < (in_block[:, 10, 10] > 0).sum() <= lengths  # a block may miss an end
    # Without the scan's height nothing is known of millimetres, and no piece is made.
    whole, marks = augment(image, labels, (32,) * 3, STILL, seeded(0))
    assert (marks == 1).all()


def test_a_recipe_without_pieces_draws_what_it_drew():
    image = torch.rand(20, 20, 20, generator=seeded(1)) * 2 - 1
    labels = torch.zeros(20, 20, 20, dtype=torch.uint8)
    plain = dataclasses.replace(AugmentationSettings(), piece_probability=0.0)
    one, _ = augment(image, labels, (20,) * 3, plain, seeded(5), height_mm=440.0)
    other, _ = augment(image, labels, (20,) * 3, plain, seeded(5))
    assert torch.equal(one, other)

from __future__ import annotations

import torch
from torch import Generator

from flare_clef.training.augmentation import AugmentationSettings, augment
from flare_clef.training.contents import fill_organs
from flare_clef.training.doubt import UNDECIDED

GALLBLADDER, STOMACH, LIVER = 9, 11, 1
GAS = -0.9


def _filled(seed: int, probability: float = 1.0):  # type: ignore[no-untyped-def]
    """Labels, image at 50 HU (0) with gas in the stomach's front, and the image filled."""
    labels = torch.zeros(40, 40, 40, dtype=torch.uint8)
    labels[2:30, 4:24, 2:16] = LIVER
    labels[8:20, 6:22, 18:26] = GALLBLADDER
    labels[10:24, 10:34, 28:38] = STOMACH + 16 * 4  # with doubt
    labels[0:2, 0:2, 0:2] = UNDECIDED
    image = torch.zeros(labels.shape)
    image[10:24, 10:15, 28:38] = GAS
    filled = fill_organs(image.clone(), labels, probability, Generator().manual_seed(seed))
    return labels, image, filled


def test_only_fluid_of_gallbladder_and_stomach_changes() -> None:
    for seed in range(60):
        labels, image, filled = _filled(seed)
        inside = (labels == GALLBLADDER) | (labels == STOMACH + 64)
        assert torch.equal(filled[~inside], image[~inside])
        assert torch.equal(filled[image == GAS], image[image == GAS])
        # 30 HU is -0.08 on the scale of (-200, 300) HU, and beyond 300 HU all is 1.
        assert filled[inside & (image != GAS)].min() >= -0.08 - 1e-6 and filled.max() <= 1


def test_the_edge_changes_in_part() -> None:
    """A whole filling: 1 in the middle, 18 of 27 neighbours at a face, 8 of 27 at a corner."""
    for seed in range(400):
        _, _, filled = _filled(seed)
        part = filled[8:20, 6:22, 18:26]
        value = part[6, 8, 4]
        if value > 0.1 and torch.allclose(part[1:-1, 1:-1, 1:-1], value):
            torch.testing.assert_close(part[0, 8, 4], value * 18 / 27)
            torch.testing.assert_close(part[0, 0, 0], value * 8 / 27)
            return
    raise AssertionError("no whole filling in 400")


def test_layers_lie_behind_a_level_and_grains_are_lumps() -> None:
    layers = grains = wholes = 0
    for seed in range(200):
        _, _, filled = _filled(seed)
        changed = filled[9:19, 7:21, 19:25].abs() > 1e-3
        rows = changed.any(0).any(1)
        if rows.any():
            first = int(rows.nonzero()[0])
            layers += first > 2 and bool(rows[-1])
            share = float(changed[:, first:].float().mean())
            grains += 0.05 < share < 0.95
            wholes += share == 1 and first == 0
    assert min(layers, grains, wholes) > 15


def test_how_often_and_by_the_seed_alone() -> None:
    changed = [not torch.equal(*_filled(seed, 0.2)[1:]) for seed in range(300)]
    # 1 - 0.8 * 0.8 of the steps change one organ at least, less those with an empty layer.
    assert 0.2 < sum(changed) / 300 < 0.42
    assert torch.equal(_filled(7)[2], _filled(7)[2])
    assert torch.equal(_filled(7, 0.0)[2], _filled(7)[1])


def test_a_step_fills_organs_where_its_settings_say_so() -> None:
    labels, image, _ = _filled(0)
    still = dict.fromkeys(
        ("scale", "axis_scale", "rotation_degrees", "shift", "view_probability", "elastic", "gain"),
        0,
    ) | dict.fromkeys(("offset_hu", "gamma", "noise_hu", "blur_probability", "clip_probability"), 0)
    for probability in (0.0, 1.0):
        settings = AugmentationSettings(**still, contents_probability=probability)
        made, _ = augment(image, labels, (40, 40, 40), settings, Generator().manual_seed(1))
        changed = (made - image).abs() > 0.02
        assert bool(changed[labels == GALLBLADDER].any()) == bool(probability)
        assert not changed[labels == LIVER].any()


def test_an_organ_of_a_few_voxels_or_one_slice() -> None:
    labels = torch.zeros(8, 8, 8, dtype=torch.uint8)
    labels[0, :, :] = GALLBLADDER  # smaller than the window of the edge
    labels[4, 4, 4] = STOMACH  # too small to hold anything
    for seed in range(20):
        filled = fill_organs(torch.zeros(8, 8, 8), labels, 1.0, Generator().manual_seed(seed))
        assert filled[4, 4, 4] == 0 and filled.isfinite().all()

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from flare_clef.training.augmentation import AugmentationSettings, augment
from flare_clef.training.doubt import UNDECIDED
from flare_clef.training.masses import lay_mass

LIVER, AORTA = 1, 5
SKIN = 6
"""Voxels of air about the body, at its sides, in front and behind."""
FAT = -0.6


def _body() -> tuple[Tensor, Tensor]:
    """A block of fat in air, with a liver, an aorta, gas in bowel and an undecided place."""
    image = torch.full((64, 72, 80), -1.0)
    image[:, SKIN:-SKIN, SKIN:-SKIN] = FAT
    labels = torch.zeros(image.shape, dtype=torch.uint8)
    labels[20:60, 20:40, 16:30] = LIVER + 16 * 3
    labels[:, 44:50, 38:44] = AORTA
    labels[10:14, 20:24, 60:64] = UNDECIDED
    image[5:13, 24:34, 44:54] = -1  # gas
    image[(labels > 0) & (labels < UNDECIDED)] = 0.2
    return image, labels


def _laid(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    image, labels = _body()
    return image, labels, lay_mass(image.clone(), labels, Generator().manual_seed(seed))


def test_organs_spine_chest_and_skin_stay() -> None:
    changed = torch.zeros(64, 72, 80, dtype=torch.bool)
    for seed in range(40):
        image, labels, laid = _laid(seed)
        different = laid != image
        assert different.any()
        assert not different[labels > 0].any()
        changed |= different
    z, y, x = (torch.nonzero(changed)[:, axis] for axis in range(3))
    # 60 % of the liver's 40 slices from 20 on; 90 % of the aorta's rows 44 to 49, nine of each ten.
    assert (z.min(), z.max()) == (0, 43)
    assert y.max() == 49
    # The wall: cells of 4 voxels, the first with tissue 4 to 7, and half of the way to the next.
    assert 8 <= y.min() <= 12
    assert 8 <= x.min() <= 12 and 80 - 13 <= x.max() <= 80 - 9
    # Beyond the liver's level there is a mass in no case, beside it there is.
    assert changed[20:44, 20:40, 31:40].any()


def test_bowel_gas_gives_way() -> None:
    filled = 0
    for seed in range(40):
        _, _, laid = _laid(seed)
        filled += bool((laid[5:13, 24:34, 44:54] > -0.8).all())
    assert filled > 5


def test_values_are_those_of_fluid_and_tissue() -> None:
    means = []
    for seed in range(60):
        image, _, laid = _laid(seed)
        inner = laid[(laid - image).abs() > 0.3]
        if len(inner) > 500:
            means.append(float(inner.mean()))
    # 0 and 120 HU are -.2 and .28 on the scale of (-200, 300) HU; lumps move a mean by few HU.
    assert len(means) > 30
    assert -0.35 < min(means) < -0.1 < 0.15 < max(means) < 0.4


def test_by_the_seed_alone_and_not_without_an_aorta() -> None:
    assert torch.equal(_laid(3)[2], _laid(3)[2])
    assert not torch.equal(_laid(3)[2], _laid(4)[2])
    image, labels = _body()
    labels[labels == AORTA] = 0
    assert torch.equal(lay_mass(image.clone(), labels, Generator().manual_seed(3)), image)


def test_a_scan_without_a_liver_has_masses_up_to_its_end() -> None:
    highest = 0
    for seed in range(20):
        image, labels = _body()
        labels[labels == LIVER + 48] = 0
        laid = lay_mass(image.clone(), labels, Generator().manual_seed(seed))
        highest = max(highest, int(torch.nonzero(laid != image)[:, 0].max()))
    assert highest == 63


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_step_lays_masses_where_its_settings_say_so(probability: float) -> None:
    image, labels = _body()
    still = dict.fromkeys(
        ("scale", "axis_scale", "rotation_degrees", "shift", "view_probability", "elastic", "gain"),
        0.0,
    ) | dict.fromkeys(
        ("offset_hu", "gamma", "noise_hu", "blur_probability", "clip_probability"), 0.0
    )
    settings = AugmentationSettings(**still, mass_probability=probability)
    seen, kept = augment(image, labels, (64, 72, 80), settings, Generator().manual_seed(1))
    assert torch.equal(kept, labels)
    assert torch.allclose(seen, image, atol=0.01) == (probability == 0)

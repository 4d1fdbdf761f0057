from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from flare_clef.metrics import dice
from flare_clef.training.augmentation import AugmentationSettings, augment
from flare_clef.training.doubt import UNDECIDED
from flare_clef.training.sizes import LENGTHS, change_size, change_sizes

LIVER, SPLEEN, AORTA, GALLBLADDER = 1, 3, 5, 9


def _ellipsoid(radii: tuple[float, float, float], size: int = 73) -> Tensor:
    """Mask of an ellipsoid about (36, 36, 36), its longest axis turned out of the grid's."""
    z, y, x = torch.meshgrid(*[torch.arange(size) - (size - 1) / 2] * 3, indexing="ij")
    y, x = (y + x) / 2**0.5, (y - x) / 2**0.5
    return (z / radii[0]) ** 2 + (y / radii[1]) ** 2 + (x / radii[2]) ** 2 <= 1


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.25, 1.5])
def test_an_ellipsoid_becomes_that_of_the_other_size(factor: float) -> None:
    radii = (12.0, 8.0, 15.0)
    labels = _ellipsoid(radii).to(torch.uint8)
    image = labels.float()
    change_size(image, labels, labels.bool(), factor)
    wanted = _ellipsoid((radii[0] * factor, radii[1] * factor, radii[2] * factor))
    assert dice(labels.numpy(), wanted.numpy().astype("uint8"), 1) > 0.96
    assert float(labels.sum()) == pytest.approx(float(wanted.sum()), rel=0.06)
    # The image goes with it: half way between inside and outside lies the labels' edge.
    assert ((image > 0.5) == labels.bool()).float().mean() > 0.995


def test_values_come_from_where_the_map_says() -> None:
    """A ball of radius 10 made half as large: along a ray, radius 5 shows what was at 10, 2.5
    what was at 5, and 12.5, half way from 5 to the reach of 20, what was half way from 10 to it."""
    ball = _ellipsoid((10.0, 10.0, 10.0))
    ramp = torch.arange(73).float()[:, None, None].expand(73, 73, 73).clone()
    before = ramp.clone()
    change_size(ramp, ball.to(torch.uint8), ball, 0.5)
    for seen, was in ((2.5, 5), (5, 10), (12.5, 15), (20, 20), (25, 25)):
        low = int(36 + seen)
        between = ramp[low, 36, 36].lerp(ramp[low + 1, 36, 36], seen % 1)
        assert float(between) - 36 == pytest.approx(was, abs=0.3)
    far = _ellipsoid((21.0, 21.0, 21.0))
    assert torch.equal(ramp[~far], before[~far])


def test_smaller_and_larger_again_is_what_it_was() -> None:
    labels = _ellipsoid((12.0, 8.0, 15.0)).to(torch.uint8)
    before = labels.clone()
    for factor in (0.7, 1 / 0.7):
        change_size(labels.float(), labels, labels.bool(), factor)
    assert dice(labels.numpy(), before.numpy(), 1) > 0.96


def _scene() -> tuple[Tensor, Tensor]:
    """Gallbladder in the middle, in part with doubt, liver above it, an aorta below."""
    labels = torch.zeros(73, 73, 73, dtype=torch.uint8)
    labels[58:70, 8:64, 8:64] = LIVER
    labels[2:40, 60:66, 34:40] = AORTA
    labels[_ellipsoid((9.0, 9.0, 9.0))] = GALLBLADDER
    labels[30:34][labels[30:34] == GALLBLADDER] = GALLBLADDER + 16 * 4
    labels[0, 0, :4] = UNDECIDED
    return torch.randn(labels.shape, generator=Generator().manual_seed(3)), labels


def test_only_organs_that_vary_change_and_only_near_them() -> None:
    image, labels = _scene()
    sizes = set()
    for seed in range(20):
        made, moved = change_sizes(
            image.clone(), labels.clone(), 1.0, Generator().manual_seed(seed)
        )
        for organ in (LIVER, AORTA):
            assert torch.equal(moved == organ, labels == organ)
        assert torch.equal(moved == UNDECIDED, labels == UNDECIDED)
        count = int(((moved & 15) == GALLBLADDER).sum())
        assert (moved == GALLBLADDER + 64).any()  # its doubt moves with it
        sizes.add(count)
        low, high = LENGTHS[GALLBLADDER]
        whole = int(((labels & 15) == GALLBLADDER).sum())
        assert 0.8 * low**3 < count / whole < 1.2 * high**3
        assert made.isfinite().all()
        far = ~_ellipsoid((20.0, 20.0, 20.0))
        assert torch.equal(made[far], image[far])
    assert len(sizes) > 10


def test_how_often_and_by_the_seed_alone() -> None:
    image, labels = _scene()

    def made(seed: int, probability: float) -> Tensor:
        generator = Generator().manual_seed(seed)
        return change_sizes(image.clone(), labels.clone(), probability, generator)[1]

    changed = [not torch.equal(made(seed, 0.3), labels) for seed in range(100)]
    assert 15 <= sum(changed) <= 45
    assert torch.equal(made(7, 0.5), made(7, 0.5))
    assert torch.equal(made(7, 0.0), labels)


def test_at_the_volumes_edge_and_too_small() -> None:
    labels = torch.zeros(40, 40, 40, dtype=torch.uint8)
    labels[0:8, 0:8, 30:40] = SPLEEN
    labels[20, 20, 20] = GALLBLADDER
    image = torch.zeros(labels.shape)
    for seed in range(10):
        made, moved = change_sizes(
            image.clone(), labels.clone(), 1.0, Generator().manual_seed(seed)
        )
        assert moved[20, 20, 20] == GALLBLADDER and made.isfinite().all()
        assert 0.2 < int((moved == SPLEEN).sum()) / int((labels == SPLEEN).sum()) < 3


def test_a_step_changes_sizes_where_its_settings_say_so() -> None:
    _, labels = _scene()
    image = ((labels & 15) == GALLBLADDER).float()
    still = dict.fromkeys(
        ("scale", "axis_scale", "rotation_degrees", "shift", "view_probability", "elastic", "gain"),
        0,
    ) | dict.fromkeys(("offset_hu", "gamma", "noise_hu", "blur_probability", "clip_probability"), 0)
    for probability in (0.0, 1.0):
        settings = AugmentationSettings(**still, size_probability=probability)
        _, moved = augment(
            image.clone(), labels.clone(), (73, 73, 73), settings, Generator().manual_seed(1)
        )
        assert torch.equal(moved, labels) != bool(probability)

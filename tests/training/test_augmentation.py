"""Each part of the augmentation does what it claims, by its seed, on image and labels alike."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional

from flare_clef.training import augmentation
from flare_clef.training.augmentation import (
    AugmentationSettings,
    add_noise,
    augment,
    bend_values,
    blur,
    change_intensities,
    change_organs,
    clip,
    deform,
    draw_affine,
    draw_block,
    scale_values,
    thick_slices,
    unclip,
)
from flare_clef.training.doubt import UNDECIDED
from flare_clef.training.resampling import resample

STILL = AugmentationSettings(
    scale=0, axis_scale=0, rotation_degrees=0, shift=0, view_probability=0, elastic=0, gain=0,
    offset_hu=0, gamma=0, noise_hu=0, blur_probability=0, clip_probability=0,
)  # fmt: skip
SIZE = (24, 24, 24)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def hu(value: float) -> float:
    """A value in HU on the scale of prepared volumes: -200 to -1, 300 to 1."""
    return (value - 50) / 250


def settings(**changes: float) -> AugmentationSettings:
    return AugmentationSettings(**{**vars(STILL), **changes})


def two_boxes() -> tuple[Tensor, Tensor]:
    """A bright box on the patient's right (low x) as 2, a dimmer one on the left as 13."""
    image, labels = torch.full(SIZE, -0.5), torch.zeros(SIZE, dtype=torch.uint8)
    image[8:16, 8:16, 4:9], labels[8:16, 8:16, 4:9] = 0.8, 2
    image[8:16, 8:16, 15:20], labels[8:16, 8:16, 15:20] = 0.4, 13
    return image, labels


def test_nothing_drawn_changes_nothing():
    image, labels = two_boxes()
    out, marks = augment(image, labels, SIZE, STILL, seeded(0))
    assert torch.allclose(out, image, atol=1e-4) and torch.equal(marks, labels)


@pytest.mark.parametrize(
    "part",
    [
        {"scale": 0.2}, {"axis_scale": 0.2}, {"rotation_degrees": 12.0}, {"shift": 0.1},
        {"view_probability": 1.0, "view_cut": 0.25, "view_air": 0.2}, {"elastic": 0.02},
    ],
)  # fmt: skip
def test_each_deformation_moves_image_and_labels_alike_and_keeps_the_sides(part: dict):
    image, labels = two_boxes()
    seen = 0
    for seed in range(4):
        moved, marks = deform(image, labels, (32, 32, 32), settings(**part), seeded(seed))
        again = deform(image, labels, (32, 32, 32), settings(**part), seeded(seed))
        assert torch.equal(moved, again[0]) and torch.equal(marks, again[1])
        x = torch.arange(32.0)
        for value, low, high in ((2, 0.6, 1), (13, 0.1, 0.55)):
            inside = moved[marks == value]
            if len(inside) > 50:
                # Interpolation mixes box and background at the border only.
                assert low - 0.05 < inside.median() < high
        right, left = ((marks == value).sum((0, 1)).float() for value in (2, 13))
        if right.sum() > 50 and left.sum() > 50:
            assert (x * right).sum() / right.sum() < (x * left).sum() / left.sum()
            seen += 1
        assert set(marks.unique().tolist()) <= {0, 2, 13}
    assert seen >= 3
    still = deform(image, labels, (32, 32, 32), STILL, seeded(0))[0]
    assert not torch.allclose(moved, still, atol=1e-3)


def test_undecided_voxels_stay_undecided():
    image, labels = two_boxes()
    labels[labels == 13] = 255
    _, marks = augment(image, labels, SIZE, AugmentationSettings(), seeded(3))
    assert (marks == 255).any() and set(marks.unique().tolist()) <= {0, 2, 255}


@pytest.mark.parametrize("drawn", [settings(), AugmentationSettings(), None])
def test_a_block_is_a_cut_of_the_whole(drawn: AugmentationSettings | None):
    image, labels = two_boxes()
    image += 0.1 * torch.rand(SIZE, generator=seeded(9))
    size = (32, 32, 32)
    places = set()
    for seed in range(20):
        whole, whole_labels = deform(image, labels, size, drawn, seeded(seed))
        part, part_labels = deform(image, labels, size, drawn, seeded(seed), block=16)
        generator = seeded(seed)
        affine = torch.eye(3, 4)
        if drawn is not None:
            affine = draw_affine(drawn, generator)
            if drawn.elastic:
                torch.randn(1, 3, 5, 5, 5, generator=generator)
        window = draw_block(labels, affine, size, 16, generator)
        assert part.shape == (16, 16, 16)
        assert torch.allclose(part, whole[window], atol=1e-4)
        # A rounding's width from a border the nearest voxel may be the other one.
        assert (part_labels != whole_labels[window]).float().mean() < 1e-3
        places.add(tuple(span.start for span in window))
    assert len(places) > 10


def test_blocks_find_small_organs_as_often_as_large_ones():
    labels = torch.zeros(SIZE, dtype=torch.uint8)
    labels[2:20, 2:20, 2:12] = 1
    labels[20, 20, 21] = 8 + 16 * 5  # with doubt
    labels[0, 0, :] = 255
    affine = draw_affine(settings(scale=0.1, rotation_degrees=8), seeded(1))
    seen = 0
    generator = seeded(2)
    for _ in range(400):
        window = draw_block(labels, affine, (48, 48, 48), 16, generator)
        assert all(span.start >= 0 and span.stop <= 48 for span in window)
        _, found = resample(labels.float(), affine, (48, 48, 48), window, labels=labels)
        assert found is not None
        seen += bool((found == 88).any())
    # Drawn about it in a quarter of the blocks; by chance alone it would be in one of 20.
    assert 0.2 < seen / 400 < 0.45


def test_sizes_and_shifts_stay_in_their_ranges():
    wide = settings(scale=0.2, shift=0.1)
    generator = seeded(0)
    drawn = torch.stack([draw_affine(wide, generator) for _ in range(300)])
    size = drawn[:, 0, 0]
    assert 1 / 1.2 - 1e-6 <= size.min() < 0.88 and 1.14 < size.max() <= 1.2 + 1e-6
    assert torch.allclose(drawn[:, 1, 1], size) and torch.allclose(drawn[:, 2, 2], size)
    # A shift of 0.1 of the volume is 0.2 where the volume runs from -1 to 1.
    assert 0.18 < drawn[:, :, 3].abs().max() <= 0.2 + 1e-6


def test_rotations_stay_in_their_range_and_are_rotations():
    generator = seeded(0)
    for _ in range(100):
        turn = draw_affine(settings(rotation_degrees=10), generator)[:, :3]
        assert torch.allclose(turn @ turn.T, torch.eye(3), atol=1e-5)
        assert torch.linalg.det(turn) == pytest.approx(1, abs=1e-5)
        # Three turns of at most 10, 6 and 6 degrees.
        angle = math.degrees(math.acos(min(1.0, (float(turn.trace()) - 1) / 2)))
        assert angle <= 22


def test_a_cut_view_shows_less_and_a_widened_one_air():
    body = torch.zeros(SIZE)
    marks = torch.ones(SIZE, dtype=torch.uint8)
    cut = settings(view_probability=1, view_cut=0.4, view_air=0)
    wide = settings(view_probability=1, view_cut=0, view_air=0.25)
    shares = []
    for seed in range(10):
        rows = draw_affine(cut, seeded(seed))
        ends = rows[:, 3].abs() + rows[:, :3].diagonal()
        assert (ends <= 1 + 1e-6).all() and (rows[:, :3].diagonal() >= 0.6 - 1e-6).all()
        image, labels = deform(body, marks, SIZE, wide, seeded(seed))
        air = image == -1
        assert (labels[air] == 0).all() and (labels == 0).sum() <= (image < -0.49).sum()
        shares.append(float(air.float().mean()))
    # At most a quarter more along each axis: the body is then 1 / 1.25 of it.
    assert 0.1 < max(shares) < 1 - 0.8**3


@pytest.mark.parametrize("change", [clip, unclip, blur, thick_slices])
def test_each_change_is_decided_by_its_seed(change: Callable[[Tensor, Generator], Tensor]):
    image = torch.rand(SIZE, generator=seeded(9)) * 2 - 1
    one, two, other = (change(image.clone(), seeded(seed)) for seed in (1, 1, 3))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert not torch.equal(one, image)


def test_clip_cuts_both_ends_and_leaves_the_middle():
    image = torch.linspace(-1, 1, 24**3).view(SIZE)
    for seed in range(20):
        out = clip(image.clone(), seeded(seed))
        assert hu(-200) - 1e-6 <= out.min() <= hu(-90) + 1e-6
        assert hu(220) - 1e-6 <= out.max() <= 1
        middle = (image > hu(-90)) & (image < hu(220))
        assert torch.equal(out[middle], image[middle])


def test_unclip_spreads_what_was_clipped_and_nothing_else():
    image = torch.full(SIZE, hu(-125))
    image[8:16] = hu(40)
    image[16:] = hu(275)
    out = unclip(image.clone(), seeded(0))
    assert torch.equal(out[8:16], image[8:16]) and (out[16:] == 1).all()
    drop_hu = (hu(-125) - out[:8]) * 250
    assert drop_hu.min() >= -1e-3 and drop_hu.mean() == pytest.approx(15, abs=1)
    # An exponential's standard deviation is its mean.
    assert drop_hu.std() == pytest.approx(15, abs=1)


def test_blur_stays_in_its_slice_and_keeps_the_mean():
    image = torch.zeros(SIZE)
    image[10, 12, 12] = 9
    out = blur(image, seeded(0))
    assert out[:10].abs().max() == 0 == out[11:].abs().max()
    assert out.sum() == pytest.approx(9, abs=1e-4)
    share = float(out[10, 11, 11])
    assert 0.3 <= share <= 1 and float(out[10, 12, 12]) == pytest.approx(9 - 8 * share, abs=1e-5)


def test_blur_and_thick_slices_are_torchs_pooling():
    image = torch.rand(19, 14, 17, generator=seeded(2)) * 2 - 1
    pooled = functional.avg_pool3d(
        image[None, None], (1, 3, 3), 1, (0, 1, 1), count_include_pad=False
    )[0, 0]
    # The first number drawn is how much of the mean is mixed in, or how thick slices are.
    share = 0.3 + 0.7 * float(torch.rand((), generator=seeded(5)))
    before = image.clone()
    assert torch.allclose(blur(image, seeded(5)), image.lerp(pooled, share), atol=1e-6)
    slices = round(19 / (2 + 2 * float(torch.rand((), generator=seeded(6)))))
    thick = functional.adaptive_avg_pool3d(image[None, None], (slices, 14, 17))
    wanted = functional.interpolate(thick, size=(19, 14, 17), mode="trilinear")[0, 0]
    assert torch.allclose(thick_slices(image, seeded(6)), wanted, atol=1e-5)
    assert torch.equal(image, before)


def test_thick_slices_average_along_z_only():
    columns = torch.rand(1, 24, 24, generator=seeded(1)).expand(SIZE)
    assert torch.allclose(thick_slices(columns, seeded(0)), columns, atol=1e-6)
    stripes = torch.tensor([1.0, -1.0]).repeat(12)[:, None, None].expand(SIZE)
    ramp = torch.linspace(-1, 1, 24)[:, None, None].expand(SIZE)
    for seed in range(10):
        # Alternating slices vanish in their mean (a window of three keeps a third of them).
        assert thick_slices(stripes, seeded(seed)).abs().max() <= 0.34
        # A ramp stays where it is but for the ends, half a thick slice of which is flat.
        out = thick_slices(ramp, seeded(seed))
        assert (out - ramp)[3:-3].abs().max() < 0.06


@pytest.mark.parametrize("sigma", [5.0, 25.0])
def test_noise_has_no_mean_and_at_most_its_sigma(sigma: float):
    deviations = []
    for seed in range(8):
        noise = add_noise(torch.zeros(32, 32, 32), sigma, seeded(seed)) * 250
        assert abs(noise.mean()) < sigma / 15
        deviations.append(float(noise.std()) / sigma)
    # Half fine noise and whole coarse noise: sqrt(1 / 4 + 1) of sigma.
    assert {round(d, 1) for d in deviations} == {1.0, 1.1}


def test_gain_and_offset_by_hand():
    image = torch.tensor([-0.4, 0.0, 0.4]).view(3, 1, 1)
    gains, offsets = [], []
    for seed in range(200):
        low, middle, high = scale_values(
            image.clone(), settings(gain=0.1, offset_hu=20), seeded(seed)
        ).flatten().tolist()  # fmt: skip
        gains.append((high - low) / 0.8)
        offsets.append(middle * 250)
    assert 1 / 1.1 - 1e-5 <= min(gains) < 0.92 and 1.09 < max(gains) <= 1.1 + 1e-5
    assert -20.01 <= min(offsets) < -18 and 18 < max(offsets) <= 20.01
    ends = scale_values(torch.tensor([[[-1.0, 1.0]]]), settings(gain=0.5, offset_hu=50), seeded(0))
    assert ends.min() >= -1 and ends.max() <= 1


def test_gamma_keeps_the_ends_and_the_order():
    ramp = torch.linspace(-1, 1, 50).view(1, 1, 50)
    middles = []
    for seed in range(50):
        out = bend_values(ramp.clone(), settings(gamma=0.2), seeded(seed)).flatten()
        assert out[0] == -1 and out[-1] == pytest.approx(1) and (out.diff() > 0).all()
        middles.append(float(bend_values(torch.zeros(1), settings(gamma=0.2), seeded(seed))))
    # Half of the window to the power of 1.2 and of 1 / 1.2.
    assert 2 * 0.5**1.2 - 1 - 1e-5 <= min(middles) < 0 < max(middles) <= 2 * 0.5 ** (1 / 1.2) - 1


def test_intensities_never_touch_air_and_never_leave_the_window():
    image = torch.rand(SIZE, generator=seeded(0)) * 1.9 - 0.9
    image[:8] = -1
    for seed in range(30):
        out = change_intensities(image.clone(), AugmentationSettings(), seeded(seed))
        assert (out[:8] == -1).all() and out.min() >= -1 and out.max() <= 1


def test_no_part_of_the_module_flips():
    """A mirrored body is no body: neither the affine map nor any function turns x around."""
    names = [name for name in dir(augmentation) if "flip" in name.lower() or "mirror" in name]
    assert names == []
    generator = seeded(0)
    for _ in range(300):
        affine = draw_affine(AugmentationSettings(), generator)[:, :3]
        assert affine[0, 0] > 0.3 and torch.linalg.det(affine) > 0


def _with_organs(seed: int, **ranges: float) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, image at 50 HU (0) and the image after :func:`change_organs`."""
    labels = torch.zeros(20, 24, 28, dtype=torch.uint8)
    labels[3:9, 3:9, 3:9] = 1  # liver
    labels[3:9, 3:9, 14:20] = 9 + 16 * 5  # gallbladder, in doubt
    labels[12:18, 3:9, 3:9] = UNDECIDED
    image = torch.zeros(labels.shape)
    image[5, 5, 5] = image[5, 5, 16] = -0.8  # -150 HU
    settings = AugmentationSettings(organ_probability=1.0, **ranges)
    generator = Generator().manual_seed(seed)
    return labels, image, change_organs(image.clone(), labels, settings, generator)


def test_organs_change_each_by_itself_and_nothing_else():
    found: list[tuple[float, float]] = []
    for seed in range(200):
        labels, image, changed = _with_organs(seed)
        assert torch.equal(changed[labels == UNDECIDED], image[labels == UNDECIDED])
        assert changed[5, 5, 5] == changed[5, 5, 16] == image[5, 5, 5]
        # One voxel around an organ is its edge, beyond it nothing moves.
        near = functional.max_pool3d(((labels & 15) > 0).float()[None], 3, 1, 1)[0] > 0
        assert torch.equal(changed[~near], image[~near])
        liver, gallbladder = changed[6, 6, 6], changed[6, 6, 17]
        # At a face the organ's share is 3/4 inside and 1/4 outside: (1 + 2 + 1) / 4 by hand.
        torch.testing.assert_close(changed[3, 6, 6], 0.75 * liver)
        torch.testing.assert_close(changed[2, 6, 6], 0.25 * liver)
        found.append((float(liver) * 250, float(gallbladder) * 250))
    liver_hu, gallbladder_hu = torch.tensor(found).unbind(1)
    assert liver_hu.mean().abs() < 10 and 33 < liver_hu.std() < 47
    # Half a normal distribution: its mean is sigma times the root of 2 / pi.
    assert gallbladder_hu.min() >= 0 and 54 < gallbladder_hu.mean() < 74
    assert abs(torch.corrcoef(torch.stack([liver_hu, gallbladder_hu]))[0, 1]) < 0.2


def test_organs_stay_without_a_change():
    labels, image, changed = _with_organs(0, enhancement_hu=0.0, filling_hu=0.0)
    assert torch.equal(changed, image)
    settings = AugmentationSettings(organ_probability=0.3)
    kept = [
        float(change_organs(image.clone(), labels, settings, Generator().manual_seed(s))[6, 6, 6])
        == 0
        for s in range(200)
    ]
    assert 0.6 < sum(kept) / 200 < 0.8

"""What a body and a scanner may vary: shape, field of view, intensities.

Works on prepared volumes: image (z, y, x) in (-1, 1), labels (z, y, x) uint8. Every function
takes a ``torch.Generator``, so a step's augmentation is decided by its seed alone. There is
no left-right flip: kidneys and adrenal glands have sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from flare_clef.preparation import WINDOW_HU

_HU = 2 / (WINDOW_HU[1] - WINDOW_HU[0])
"""One HU on the scale of prepared volumes."""
_AIR = -0.999
"""Below this a prepared voxel is air or lung, clipped: no intensity change reaches it."""


@dataclass(frozen=True)
class AugmentationSettings:
    """Ranges of what :func:`augment` draws; 0 or an empty range turns a part off."""

    scale: float = 0.12
    """Largest relative change of size, the same along the three axes."""
    axis_scale: float = 0.08
    """Further change of each axis by itself."""
    rotation_degrees: float = 8.0
    shift: float = 0.05
    """Largest shift along each axis, as a share of the volume."""
    view_probability: float = 0.35
    """How often, per axis, the field of view is cut or widened."""
    view_cut: float = 0.4
    """Largest share of an axis that is cut off."""
    view_air: float = 0.25
    """Largest share of an axis that is added as air."""
    elastic: float = 0.02
    """Standard deviation of the displacement, as a share of the volume."""
    gain: float = 0.12
    offset_hu: float = 20.0
    gamma: float = 0.2
    noise_hu: float = 25.0
    blur_probability: float = 0.2
    clip_probability: float = 0.35
    """How often values are clipped as some archives do, or such a clip is undone."""


def _uniform(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _chance(generator: Generator, probability: float) -> bool:
    return float(torch.rand((), generator=generator)) < probability


def draw_affine(settings: AugmentationSettings, generator: Generator) -> Tensor:
    """(3, 4) matrix from output to input coordinates, both in (-1, 1), rows and columns x, y, z.

    Sizes are drawn on a logarithmic scale; a factor above 1 shows less of the body.
    """
    common = math.exp(_uniform(generator, -1, 1) * math.log1p(settings.scale))
    rows = torch.zeros(3, 4)
    for axis in range(3):
        own = math.exp(_uniform(generator, -1, 1) * math.log1p(settings.axis_scale))
        size = 1 / (common * own)
        shift = _uniform(generator, -1, 1) * 2 * settings.shift
        if _chance(generator, settings.view_probability):
            share = _uniform(generator, -settings.view_air, settings.view_cut)
            size *= 1 - share
            # The cut lies anywhere between the two ends.
            shift += _uniform(generator, -1, 1) * abs(share)
        rows[axis, axis] = size
        rows[axis, 3] = shift
    turn = torch.eye(3)
    for a, b, share in ((0, 1, 1.0), (0, 2, 0.6), (1, 2, 0.6)):
        angle = math.radians(_uniform(generator, -1, 1) * settings.rotation_degrees * share)
        plane = torch.eye(3)
        plane[a, a] = plane[b, b] = math.cos(angle)
        plane[a, b], plane[b, a] = -math.sin(angle), math.sin(angle)
        turn = turn @ plane
    rows[:, :3] = turn @ rows[:, :3]
    return rows


def _sampling_grid(
    affine: Tensor, elastic: float, size: tuple[int, int, int], generator: Generator
) -> Tensor:
    grid = functional.affine_grid(affine[None], [1, 1, *size], align_corners=False)
    if elastic > 0:
        coarse = torch.randn(1, 3, 5, 5, 5, generator=generator) * (2 * elastic)
        field = functional.interpolate(coarse, size=size, mode="trilinear", align_corners=True)
        grid += field.permute(0, 2, 3, 4, 1)
    return grid


def _in_slabs(volume: Tensor, grid: Tensor, mode: str) -> Tensor:
    # grid_sample works on one thread per batch element; slabs of z serve as a batch.
    slabs = next(n for n in (8, 4, 2, 1) if grid.shape[1] % n == 0)
    _, depth, height, width, _ = grid.shape
    parts = grid.view(slabs, depth // slabs, height, width, 3)
    out = functional.grid_sample(
        volume[None, None].expand(slabs, -1, -1, -1, -1),
        parts,
        mode=mode,
        padding_mode="zeros",
        align_corners=False,
    )
    return out.view(depth, height, width)


def resample(image: Tensor, affine: Tensor) -> Tensor:
    """``image`` (z, y, x) at the places that ``affine`` (see :func:`draw_affine`) says.

    Beyond the volume there is air (-1).
    """
    grid = functional.affine_grid(affine[None], [1, 1, *image.shape], align_corners=False)
    return _in_slabs(image + 1, grid, "bilinear").sub_(1)


def deform(
    image: Tensor,
    labels: Tensor,
    size: tuple[int, int, int],
    settings: AugmentationSettings,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Affine, field of view and elastic change of image and labels alike, on a new grid.

    Beyond the volume there is air (-1) and background.
    """
    affine = draw_affine(settings, generator)
    grid = _sampling_grid(affine, settings.elastic, size, generator)
    image = _in_slabs(image.float() + 1, grid, "bilinear").sub_(1)
    labels = _in_slabs(labels.float(), grid, "nearest").to(torch.uint8)
    return image, labels


def change_intensities(
    image: Tensor, settings: AugmentationSettings, generator: Generator
) -> Tensor:
    """Gain, offset, gamma, noise, blur and clipping, in place where that is possible.

    Air and lung, clipped to -1 in every scan, stay at -1.
    """
    air = image <= _AIR
    if _chance(generator, settings.clip_probability):
        image = _rewrite_clipped(image, generator)
    if _chance(generator, settings.clip_probability):
        low = _uniform(generator, -200, -90)
        high = _uniform(generator, 220, 300)
        image = image.clamp_((low - WINDOW_HU[0]) * _HU - 1, (high - WINDOW_HU[0]) * _HU - 1)
    if _chance(generator, settings.blur_probability):
        kernel = (1, 3, 3) if _chance(generator, 0.5) else (5, 1, 1)
        padding = tuple(k // 2 for k in kernel)
        blurred = functional.avg_pool3d(
            image[None, None], kernel, 1, padding, count_include_pad=False
        )[0, 0]
        image = torch.lerp(image, blurred, _uniform(generator, 0.3, 1))
    if settings.noise_hu and _chance(generator, 0.6):
        image += _noise(image.shape, _uniform(generator, 0, settings.noise_hu) * _HU, generator)
    gain = math.exp(_uniform(generator, -1, 1) * math.log1p(settings.gain))
    offset = _uniform(generator, -1, 1) * settings.offset_hu * _HU
    image = image.mul_(gain).add_(offset).clamp_(-1, 1)
    if settings.gamma and _chance(generator, 0.3):
        gamma = math.exp(_uniform(generator, -1, 1) * math.log1p(settings.gamma))
        image = image.add_(1).div_(2).pow_(gamma).mul_(2).sub_(1)
    return image.masked_fill_(air, -1)


def _noise(shape: torch.Size, sigma: float, generator: Generator) -> Tensor:
    # Noise of a scanner is correlated over a few voxels: half of it is drawn on a half grid.
    fine = torch.empty(shape).normal_(0, sigma, generator=generator)
    if _chance(generator, 0.5):
        half = [max(1, n // 2) for n in shape]
        coarse = torch.empty(half).normal_(0, sigma, generator=generator)
        fine = fine.mul_(0.5).add_(
            functional.interpolate(coarse[None, None], size=list(shape), mode="nearest")[0, 0]
        )
    return fine


def _rewrite_clipped(image: Tensor, generator: Generator) -> Tensor:
    """Gives values that only an archive's clipping to [-125, 275] HU made a natural spread."""
    floor = (image > (-135 - WINDOW_HU[0]) * _HU - 1) & (image < (-119 - WINDOW_HU[0]) * _HU - 1)
    spread = torch.empty_like(image).exponential_(1 / (15 * _HU), generator=generator)
    image = torch.where(floor, image - spread, image)
    ceiling = image > (270 - WINDOW_HU[0]) * _HU - 1
    return image.masked_fill_(ceiling, 1)


def augment(
    image: Tensor,
    labels: Tensor,
    size: tuple[int, int, int],
    settings: AugmentationSettings | None,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """A step's image and labels on a grid of ``size``; None for ``settings`` only resizes."""
    if settings is None:
        if tuple(image.shape) == size:
            return image.float(), labels
        grid = _sampling_grid(torch.eye(3, 4), 0.0, size, generator)
        return (
            _in_slabs(image.float() + 1, grid, "bilinear").sub_(1),
            _in_slabs(labels.float(), grid, "nearest").to(torch.uint8),
        )
    image, labels = deform(image, labels, size, settings, generator)
    return change_intensities(image, settings, generator), labels

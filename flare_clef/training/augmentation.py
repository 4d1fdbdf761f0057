"""What a body and a scanner may vary: shape, field of view, intensities.

Works on prepared volumes: image (z, y, x) in (-1, 1), labels (z, y, x) uint8, their doubt
included. Every function takes a ``torch.Generator``, so a step's augmentation is decided by
its seed alone. There is no left-right flip: kidneys and adrenal glands have sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.nn import functional

from flare_clef.organs import ORGAN_BY_NAME, ORGANS
from flare_clef.preparation import ONE_HU, scaled
from flare_clef.training.contents import fill_organs
from flare_clef.training.doubt import CLASSES
from flare_clef.training.masses import lay_mass
from flare_clef.training.resampling import AIR, WHOLE, resample
from flare_clef.training.short_pieces import draw_piece

_TISSUE_HU = -50
"""Above it there is tissue or fluid, below it fat or gas."""
_HOLLOW = {ORGAN_BY_NAME[n].index for n in ("gallbladder", "esophagus", "stomach", "duodenum")}


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
    piece_probability: float = 0.0
    """How often a short piece of the scan is seen in place of the whole, its view not cut
    otherwise."""
    elastic: float = 0.02
    """Standard deviation of the displacement, as a share of the volume."""
    gain: float = 0.12
    offset_hu: float = 20.0
    gamma: float = 0.2
    noise_hu: float = 25.0
    blur_probability: float = 0.2
    """How often slices are blurred or, as often, made thick."""
    clip_probability: float = 0.35
    """How often values are clipped as some archives do, or such a clip is undone."""
    organ_probability: float = 0.0
    """How often each organ gets an enhancement or a filling of its own."""
    enhancement_hu: float = 40.0
    """Standard deviation of that change, as between phases of contrast."""
    filling_hu: float = 80.0
    """The same for organs with contents: gallbladder, esophagus, stomach, duodenum."""
    contents_probability: float = 0.0
    """How often gallbladder and stomach, each, get stones, a layer or other contents."""
    mass_probability: float = 0.0
    """How often a large mass lies where no organ is, see ``masses.py``."""


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


def draw_block(
    labels: Tensor,
    affine: Tensor,
    size: tuple[int, int, int],
    block: int,
    generator: Generator,
) -> tuple[slice, ...]:
    """Where a cube of ``block`` voxels lies in a grid of ``size`` that ``affine`` will make.

    Half the time about a voxel of an organ, each organ of ``labels`` as likely as any other,
    so that a small one is seen as often as the liver; else anywhere.
    """
    room = [n - block for n in size]
    starts = [int(_uniform(generator, 0, n + 1)) for n in room]
    bytes_of: dict[int, list[int]] = {}
    for value in torch.unique(labels).tolist():
        bytes_of.setdefault(int(CLASSES[value]), []).append(value)
    organs = [organ for organ in sorted(bytes_of) if organ]
    if organs and _chance(generator, 0.5):
        organ = organs[int(_uniform(generator, 0, len(organs)))]
        found = torch.nonzero(torch.isin(labels, torch.tensor(bytes_of[organ], dtype=torch.uint8)))
        voxel = found[int(_uniform(generator, 0, len(found)))].flip(0)  # x, y, z
        extent = torch.tensor(labels.shape).flip(0)
        place = (voxel + 0.5) * 2 / extent - 1
        seen = torch.linalg.solve(affine[:, :3], place - affine[:, 3]).flip(0)
        middles = [(float(q) + 1) / 2 * n for q, n in zip(seen, size, strict=True)]
        starts = [round(middle - block / 2) for middle in middles]
    starts = [min(max(0, start), free) for start, free in zip(starts, room, strict=True)]
    return tuple(slice(start, start + block) for start in starts)


def deform(
    image: Tensor,
    labels: Tensor,
    size: tuple[int, int, int],
    settings: AugmentationSettings | None,
    generator: Generator,
    block: int = 0,
    height_mm: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Affine, field of view and elastic change of image and labels alike, on a new grid.

    ``settings`` None only resizes. ``block`` gives a cube of so many voxels of that grid, see
    :func:`draw_block`. Beyond the volume there is air (-1) and background. Short pieces are
    made where ``height_mm``, from the first slice's edge to the last one's, is known.
    """
    affine, coarse, piece = torch.eye(3, 4), None, None
    if settings is not None:
        if height_mm and settings.piece_probability:
            if _chance(generator, settings.piece_probability):
                piece = draw_piece(image, height_mm, generator)
            if piece is not None:
                settings = replace(settings, view_probability=0.0)
        affine = draw_affine(settings, generator)
        if settings.elastic > 0:
            coarse = torch.randn(3, 5, 5, 5, generator=generator) * (2 * settings.elastic)
        if piece is not None:
            affine = piece.zoom(affine)
            if coarse is not None:
                coarse[2] *= piece.size  # bends as much as it does a whole body
    window = draw_block(labels, affine, size, block, generator) if block else WHOLE
    image, moved = resample(image, affine, size, window, coarse, labels)
    assert moved is not None
    if piece is not None:
        piece.cut(image, -1, size[0], window[0])
        piece.cut(moved, 0, size[0], window[0])
    return image, moved


def change_intensities(
    image: Tensor, settings: AugmentationSettings, generator: Generator
) -> Tensor:
    """Clipping, blur or thick slices, noise, gain, offset and gamma; ``image`` may be reused.

    Air and lung, clipped to -1 in every scan, stay at -1.
    """
    air = image <= AIR
    if _chance(generator, settings.clip_probability):
        image = unclip(image, generator)
    if _chance(generator, settings.clip_probability):
        image = clip(image, generator)
    if _chance(generator, settings.blur_probability):
        image = (blur if _chance(generator, 0.5) else thick_slices)(image, generator)
    if settings.noise_hu and _chance(generator, 0.6):
        image = add_noise(image, _uniform(generator, 0, settings.noise_hu), generator)
    image = scale_values(image, settings, generator)
    if settings.gamma and _chance(generator, 0.3):
        image = bend_values(image, settings, generator)
    return image.masked_fill_(air, -1)


def change_organs(
    image: Tensor, labels: Tensor, settings: AugmentationSettings, generator: Generator
) -> Tensor:
    """Each organ, now and then, brighter or darker by itself; in place.

    A scan shows one phase of contrast and one filling; in others bile is dense, kidneys are grey
    or veins dark. Fat and gas stay what they are, and a change fades over a voxel at the edge.
    """
    changes = torch.zeros(16)  # a class has four bits
    for organ in range(1, len(ORGANS) + 1):
        if not _chance(generator, settings.organ_probability):
            continue
        change_hu = float(torch.randn((), generator=generator))
        if organ in _HOLLOW:
            # Contents that are darker than fluid are gas, which has no voxels here.
            change_hu = abs(change_hu) * settings.filling_hu
        else:
            change_hu *= settings.enhancement_hu
        changes[organ] = change_hu * ONE_HU
    if not changes.any():
        return image
    change = changes[torch.from_numpy(CLASSES).long()][labels.int()]
    for axis in range(3):
        inner = change.narrow(axis, 1, change.shape[axis] - 2)
        before, after = (change.narrow(axis, i, change.shape[axis] - 2) for i in (0, 2))
        inner.copy_((inner * 2 + before + after) / 4)
    tissue = image > scaled(_TISSUE_HU)
    return image.add_(change.mul_(tissue)).clamp_(-1, 1)


def clip(image: Tensor, generator: Generator) -> Tensor:
    """Clips to a range such as archives do, from (-200, -90) to (220, 300) HU; in place."""
    low = _uniform(generator, -200, -90)
    high = _uniform(generator, 220, 300)
    return image.clamp_(scaled(low), scaled(high))


def unclip(image: Tensor, generator: Generator) -> Tensor:
    """Gives values that only an archive's clipping to [-125, 275] HU made a natural spread.

    Those at the floor go down by an exponential of mean 15 HU, as fat does; those at the
    ceiling, bone and contrast, go to the window's end. In place.
    """
    floor = (image > scaled(-135)) & (image < scaled(-119))
    places = floor.view(-1).nonzero()[:, 0]
    spread = torch.empty(len(places)).exponential_(1 / (15 * ONE_HU), generator=generator)
    image.view(-1).index_add_(0, places, spread, alpha=-1)
    return image.masked_fill_(image > scaled(270), 1)


def blur(image: Tensor, generator: Generator) -> Tensor:
    """A softer kernel of the scanner: each slice mixed with its mean over 3 x 3 voxels."""
    blurred = image
    for axis in (1, 2):  # sums of three, many times faster than torch's pooling
        count = image.shape[axis]
        own, blurred = blurred, blurred.clone()
        blurred.narrow(axis, 1, count - 1).add_(own.narrow(axis, 0, count - 1))
        blurred.narrow(axis, 0, count - 1).add_(own.narrow(axis, 1, count - 1))
    # At the border a sum is of two.
    seen_y, seen_x = (torch.full((n,), 3.0) for n in image.shape[1:])
    for seen in (seen_y, seen_x):
        seen[0] -= 1
        seen[-1] -= 1
    blurred.div_(seen_y[:, None] * seen_x)
    return torch.lerp(image, blurred, _uniform(generator, 0.3, 1))


def thick_slices(image: Tensor, generator: Generator) -> Tensor:
    """As if the scan had slices 2 to 4 voxels thick: means of them, interpolated back.

    Labels stay: what is where does not change, only how sharply it is seen.
    """
    count = image.shape[0]
    slices = max(1, round(count / _uniform(generator, 2, 4)))
    # Both are linear along z: what they make of single slices is all there is to know.
    means = functional.adaptive_avg_pool1d(torch.eye(count)[None], slices)[0].t()
    back = functional.interpolate(torch.eye(slices)[None], size=count, mode="linear")[0].t()
    return (back @ (means @ image.reshape(count, -1))).view(image.shape)


def add_noise(image: Tensor, sigma_hu: float, generator: Generator) -> Tensor:
    """Gaussian noise, half the time partly correlated over 2 voxels as a scanner's is; in place."""
    fine = torch.empty(image.shape).normal_(0, sigma_hu * ONE_HU, generator=generator)
    if _chance(generator, 0.5):
        half = [max(1, n // 2) for n in image.shape]
        coarse = torch.empty(half).normal_(0, sigma_hu * ONE_HU, generator=generator)
        fine = fine.mul_(0.5).add_(
            functional.interpolate(coarse[None, None], size=list(image.shape), mode="nearest")[0, 0]
        )
    return image.add_(fine)


def scale_values(image: Tensor, settings: AugmentationSettings, generator: Generator) -> Tensor:
    """Gain about the window's middle (50 HU) and offset, within the window; in place."""
    gain = math.exp(_uniform(generator, -1, 1) * math.log1p(settings.gain))
    offset = _uniform(generator, -1, 1) * settings.offset_hu * ONE_HU
    return image.mul_(gain).add_(offset).clamp_(-1, 1)


def bend_values(image: Tensor, settings: AugmentationSettings, generator: Generator) -> Tensor:
    """Gamma within the window, whose ends stay where they are; in place."""
    gamma = math.exp(_uniform(generator, -1, 1) * math.log1p(settings.gamma))
    return image.add_(1).div_(2).pow_(gamma).mul_(2).sub_(1)


def augment(
    image: Tensor,
    labels: Tensor,
    size: tuple[int, int, int],
    settings: AugmentationSettings | None,
    generator: Generator,
    block: int = 0,
    height_mm: float | None = None,
) -> tuple[Tensor, Tensor]:
    """A step's image and labels on a grid of ``size``, or a cube of ``block`` voxels of it.

    None for ``settings`` changes nothing but the size; ``height_mm`` as :func:`deform`.
    """
    if settings is None and not block and tuple(image.shape) == size:
        return image.float(), labels
    image, labels = deform(image, labels, size, settings, generator, block, height_mm)
    if settings is not None:
        if settings.organ_probability:
            image = change_organs(image, labels, settings, generator)
        if settings.contents_probability:
            image = fill_organs(image, labels, settings.contents_probability, generator)
        if settings.mass_probability and _chance(generator, settings.mass_probability):
            image = lay_mass(image, labels, generator)
        image = change_intensities(image, settings, generator)
    return image, labels

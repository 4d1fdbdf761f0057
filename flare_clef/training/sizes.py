"""Organs larger and smaller than those of the few labelled patients.

A gallbladder empties after a meal, a stomach fills, kidneys and pancreas shrink with age, spleens
swell. So now and then a step sees an organ at another size, its surroundings drawn in or pushed
aside. Volumes are prepared ones, (z, y, x).
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional

from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.training.doubt import CLASSES

_EMPTYING = (0.5, 1.5)
_SOLID = (0.75, 1.35)
LENGTHS = {
    ORGAN_BY_NAME[name].index: lengths
    for name, lengths in (
        ("gallbladder", _EMPTYING),
        ("stomach", _EMPTYING),
        ("right_kidney", _SOLID),
        ("left_kidney", _SOLID),
        ("spleen", _SOLID),
        ("pancreas", _SOLID),
        ("right_adrenal_gland", _SOLID),
        ("left_adrenal_gland", _SOLID),
    )
}
"""By which factor an organ's lengths may change; the volume changes by its cube."""
_SURFACE = math.sqrt(5)
"""How many standard deviations of its voxels from the middle a solid ellipsoid ends."""
_REACH = 2.0
"""Where a change of size ends, in radii of the ellipsoid."""
_LEAST_VOXELS = 30


def change_sizes(
    image: Tensor, labels: Tensor, probability: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Each organ of ``LENGTHS``, with ``probability``, gets another size; in place.

    ``image`` in (-1, 1), ``labels`` uint8 with their doubt, both (z, y, x). Returns both.
    """
    for organ, (low, high) in LENGTHS.items():
        if float(torch.rand((), generator=generator)) >= probability:
            continue
        share = float(torch.rand((), generator=generator))
        factor = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        mask = (torch.from_numpy(CLASSES) == organ)[labels.int()]
        change_size(image, labels, mask, factor)
    return image, labels


def change_size(image: Tensor, labels: Tensor, mask: Tensor, factor: float) -> None:
    """Lengths of what ``mask`` shows become ``factor`` times as large, about its middle; in place.

    Taken for a solid ellipsoid of radius 1 (its voxels' covariance tells the axes), the organ
    ends at radius ``factor`` after; from there to ``_REACH`` its surroundings are stretched
    or pressed evenly, and beyond nothing changes. What is too small to have a shape is left.
    """
    places = torch.nonzero(mask).double()
    if len(places) < _LEAST_VOXELS:
        return
    middle = places.mean(0)
    covariance = torch.cov(places.T, correction=0) + torch.eye(3, dtype=torch.float64) / 12
    deviations = covariance.diagonal().sqrt()
    extents = (_REACH * _SURFACE * deviations).tolist()
    box = tuple(
        slice(max(0, math.ceil(centre - extent)), min(count, math.floor(centre + extent) + 1))
        for centre, extent, count in zip(middle.tolist(), extents, labels.shape, strict=True)
    )
    axes = [
        torch.arange(part.start, part.stop) - centre
        for part, centre in zip(box, middle.tolist(), strict=True)
    ]
    away = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).float()
    # Whitened by the covariance's factor, lengths are in standard deviations.
    whitening = torch.linalg.inv(torch.linalg.cholesky(covariance)).float()
    radius = (away @ whitening.T).norm(dim=-1) / _SURFACE
    source = away * (_source_radius(radius, factor) / radius.clamp_min(1e-6))[..., None]
    extent = torch.tensor([part.stop - part.start for part in box])
    start = torch.tensor([part.start for part in box])
    grid = (source + middle.float() - start + 0.5) * 2 / extent - 1
    grid = grid.flip(-1)[None]  # grid_sample wants x first
    inside = radius < _REACH
    for volume, mode in ((image, "bilinear"), (labels, "nearest")):
        part = volume[box]
        moved = functional.grid_sample(
            part[None, None].float(), grid, mode=mode, padding_mode="border", align_corners=False
        )[0, 0]
        part[inside] = moved[inside].to(volume.dtype)


def _source_radius(radius: Tensor, factor: float) -> Tensor:
    """Where on its ray a voxel's value comes from: 1 at ``factor``, ``_REACH`` at itself."""
    outside = _REACH - (_REACH - radius) * ((_REACH - 1) / (_REACH - factor))
    return torch.where(radius <= factor, radius / factor, outside)

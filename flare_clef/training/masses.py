"""Masses that training scans lack: large tumours and cysts between the organs.

A few dozen patients teach a network that what is large, even and as bright as tissue is liver; of
an ovarian mass it then calls litres so. Now and then a step lays a mass where no organ is: labels
stay what they are. Volumes are prepared ones, (z, y, x), y growing towards the back, z upwards.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional

from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.preparation import ONE_HU, scaled
from flare_clef.training.doubt import CLASSES, UNDECIDED
from flare_clef.training.resampling import AIR

_RADII = (15.0, 75.0)
"""Voxels, each axis by itself: some 30 to 140 mm at 192^3, the grid this is made for; a coarser
one sees larger masses."""
_VALUES_HU = (0.0, 120.0)
"""From a cyst to a tumour that takes up contrast as the liver does."""
_LUMPS_HU = 30.0
"""Largest standard deviation of what differs within a mass."""
_NOISE_HU = 15.0
_AORTA, _LIVER = (ORGAN_BY_NAME[name].index for name in ("aorta", "liver"))
_BEHIND = 0.9
"""The share of the aorta's voxels in front of the level behind which nothing changes: the spine."""
_ABOVE = 0.6
"""The share of the liver's voxels below the level above which nothing changes: lungs and heart."""
_CELL = 4
"""Voxels; the body's wall is one or two such cells thick."""


def lay_mass(image: Tensor, labels: Tensor, generator: Generator) -> Tensor:
    """``image`` with one ellipsoid mass about a voxel of no organ, in front of the spine; in place.

    ``image`` float32 in (-1, 1), ``labels`` uint8 with their doubt, both (z, y, x), canonical.
    Organs and undecided voxels stay as they are, bowel and its contents give way. Where the spine
    is, the aorta tells: without one nothing changes.
    """
    places = _room(image, labels)
    where = torch.nonzero(places)
    if len(where) == 0:
        return image
    drawn = torch.rand(8, generator=generator).tolist()
    middle = where[int(drawn[0] * len(where))].tolist()
    low, high = _RADII
    distance = torch.zeros(())
    for axis, share in enumerate(drawn[1:4]):
        steps = (torch.arange(image.shape[axis]) - middle[axis]) / (low + (high - low) * share)
        distance = distance + steps.square().view([-1 if a == axis else 1 for a in range(3)])
    # The last tenth of the radius fades, as a voxel's share of two tissues does.
    share_of_mass = ((1 - distance.sqrt()) * 10).clamp_(0, 1) * places

    low, high = _VALUES_HU
    value = scaled(low + (high - low) * drawn[4])
    cells = [max(2, n // round(6 + 18 * drawn[5])) for n in image.shape]
    lumps = torch.randn(cells, generator=generator) * (drawn[6] * _LUMPS_HU * ONE_HU)
    mass = _spread(lumps, image.shape)
    mass += torch.randn(image.shape, generator=generator) * (drawn[7] * _NOISE_HU * ONE_HU)
    return image.lerp_(mass.add_(value).clamp_(AIR, 1), share_of_mass)


def _room(image: Tensor, labels: Tensor) -> Tensor:
    """(z, y, x) bool: where a mass may be."""
    classes = torch.from_numpy(CLASSES)[labels.int()]
    free = (classes == 0) & (labels != UNDECIDED)
    aorta = torch.nonzero(classes == _AORTA)[:, 1]
    if len(aorta) == 0:
        return torch.zeros_like(free)
    free[:, _level(aorta, _BEHIND) + 1 :] = False
    liver = torch.nonzero(classes == _LIVER)[:, 0]
    if len(liver):
        free[_level(liver, _ABOVE) + 1 :] = False
    return free & _within_the_wall(image)


def _level(places: Tensor, share: float) -> int:
    """The coordinate of voxels, one axis, (n,), below which ``share`` of them lie."""
    return int(places.sort().values[int(share * (len(places) - 1))])


def _within_the_wall(image: Tensor) -> Tensor:
    """(z, y, x) bool: between tissue in front and behind, left and right, gas in bowel included;
    not the skin and what lies next to it."""
    tissue = functional.max_pool3d(image[None], _CELL, ceil_mode=True)[0] > AIR
    inside = torch.ones_like(tissue)
    for axis in (1, 2):
        before = tissue.byte().cummax(axis).values
        after = tissue.flip(axis).byte().cummax(axis).values.flip(axis)
        inside &= (before & after).bool()
    outside = functional.max_pool3d((~inside).float()[None], 3, stride=1, padding=1)[0]
    return _spread(outside, image.shape) < 0.5


def _spread(cells: Tensor, size: torch.Size) -> Tensor:
    """Coarse ``cells`` (z, y, x), interpolated to ``size``."""
    return functional.interpolate(cells[None, None], size=list(size), mode="trilinear")[0, 0]

"""Contents of gallbladder and stomach that few training scans show: stones, layers, food.

What is in them says nothing of where they end, but a network that saw a dozen patients misses a
gallbladder full of stones. So now and then a step puts such contents in. Volumes are
prepared ones, (z, y, x), y growing towards the back.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional

from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.preparation import scaled
from flare_clef.training.doubt import CLASSES

FILLED = tuple(ORGAN_BY_NAME[name].index for name in ("gallbladder", "stomach"))
_LEAST_VOXELS = 30
_VALUES_HU = (30.0, 450.0)
"""From sludge to stones and to contrast; beyond the window it is all one."""
_TISSUE_HU = -50.0
"""Below it there is gas, which stays."""


def fill_organs(image: Tensor, labels: Tensor, probability: float, generator: Generator) -> Tensor:
    """Each of ``FILLED``, with ``probability``, gets contents of another value; in place.

    ``image`` float32 in (-1, 1), ``labels`` uint8 with their doubt, both (z, y, x).

    All of it or what lies lower in a patient on the back (a layer), evenly or in grains of a
    few voxels. The voxels at its edge change in part: contents end inside the wall.
    """
    classes = torch.from_numpy(CLASSES)[labels.int()]
    for organ in FILLED:
        if float(torch.rand((), generator=generator)) >= probability:
            continue
        mask = classes == organ
        places = torch.nonzero(mask)
        if len(places) < _LEAST_VOXELS:
            continue
        first, last = places.amin(0).tolist(), places.amax(0).tolist()
        box = tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))
        part = image[box]
        # Padded by hand: torch refuses what is smaller than its window before padding.
        around = functional.pad(mask[box].float(), (1,) * 6)
        share = functional.avg_pool3d(around[None], 3, 1)[0] * mask[box]
        share *= part > scaled(_TISSUE_HU)
        share *= _layer(part.shape, generator) * _grains(part.shape, generator)
        low, high = _VALUES_HU
        value = scaled(low + (high - low) * float(torch.rand((), generator=generator)))
        part.lerp_(torch.full_like(part, min(value, 1.0)), share)
    return image


def _layer(shape: torch.Size, generator: Generator) -> Tensor:
    """(1, y, 1): 1 behind a level, 0 in front of it; in two of five cases 1 everywhere."""
    level = float(torch.rand((), generator=generator)) * 1.5 - 0.6
    return ((torch.arange(shape[1]) + 0.5) / shape[1] >= level).float()[None, :, None]


def _grains(shape: torch.Size, generator: Generator) -> Tensor:
    """(z, y, x), 0 to 1: lumps of 2 to 6 voxels that fill a tenth of the room up to all of it."""
    wanted, size = torch.rand(2, generator=generator).tolist()
    if wanted > 0.7:
        return torch.ones(shape)
    cells = [max(2, round(n / (2 + 4 * size))) for n in shape]
    noise = torch.randn(cells, generator=generator)[None, None]
    noise = functional.interpolate(noise, size=list(shape), mode="trilinear")[0, 0]
    return (noise > torch.quantile(noise.flatten()[::7], 0.9 - wanted)).float()

"""Where an organ lies, learnt from its neighbours in label maps that have it.

A small 3D network sees what :func:`~flare_clef.training.atlas_votes.survey` knows of a body: the
shares of the other organs and the vote of affinely placed atlases. It gives the organ. No image
is needed. Arrays are (z, y, x) on the working grid of one body.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from flare_clef.organs import ORGANS
from flare_clef.precision import bf16_is_emulated
from flare_clef.training.atlas_votes import Surroundings

LEAST_ATLASES = 15
"""With fewer the network learns bodies by heart, and the vote of deformed atlases is better."""
STEPS = 600
_WIDTHS = (16, 32, 64, 96)
_COARSEST = 2 ** (len(_WIDTHS) - 1)
_LEARNING_RATE, _WEIGHT_DECAY, _WARMUP = 2e-3, 1e-2, 0.1
_CLIP_NORM = 5.0
_AVERAGED = 1 / 6
"""Share of the steps over which the weights are averaged: the average is what predicts."""
_CE_WEIGHT = 5.0
"""Cross entropy is a mean over all voxels, of which the organ has one in a hundred or so."""
_SHEAR, _SHIFT, _ELASTIC = 0.07, 0.1, 0.06
"""Standard deviations of the affine map and the displacement, half the box being 1."""


@dataclass(frozen=True)
class Example:
    """A body with the organ."""

    inputs: Tensor
    """Of :func:`network_inputs`."""
    organ: Tensor
    """float32 (z, y, x): share of the organ in each voxel, 0 to 1."""


def network_inputs(around: Surroundings) -> Tensor:
    """float32 (14, z, y, x): shares of the 13 organs, 0 where there are none, and the vote."""
    inputs = np.zeros((len(ORGANS) + 1, *around.grid.shape), np.float32)
    for organ, share in around.organs.items():
        inputs[organ - 1] = share
    inputs[-1] = around.affine_vote
    return torch.from_numpy(inputs)


def _double(channels_in: int, channels_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (channels_in, channels_out):
        layers += [
            nn.Conv3d(channels, channels_out, 3, padding=1, bias=False),
            nn.InstanceNorm3d(channels_out, affine=True),
            nn.LeakyReLU(0.01),
        ]
    return nn.Sequential(*layers)


class NeighbourhoodNetwork(nn.Module):
    """A U-Net of 1.2 M parameters that also knows where in the box a voxel lies."""

    def __init__(self) -> None:
        super().__init__()
        first = len(ORGANS) + 1 + 3
        self.down = nn.ModuleList(_double(a, b) for a, b in pairwise((first, *_WIDTHS)))
        self.up = nn.ModuleList(_double(a + b, a) for a, b in pairwise(_WIDTHS))
        self.head = nn.Conv3d(_WIDTHS[0], 1, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (z, y, x) of ``inputs`` (14, z, y, x)."""
        axes = [torch.linspace(-1, 1, n) for n in inputs.shape[1:]]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        features = torch.cat([inputs, places])[None]
        skips = []
        for level, block in enumerate(self.down):
            features = block(functional.max_pool3d(features, 2) if level else features)
            skips.append(features)
        for level in reversed(range(len(self.up))):
            wider = functional.interpolate(features, scale_factor=2.0, mode="trilinear")
            features = self.up[level](torch.cat([skips[level], wider], 1))
        return self.head(features)[0, 0]


def _padded(array: Tensor) -> Tensor:
    """``array`` with zeros behind it, so that each level halves it without rest."""
    behind = [(0, -n % _COARSEST) for n in reversed(array.shape[-3:])]
    return functional.pad(array, [n for pair in behind for n in pair])


def _bent(example: Example, generator: Generator) -> tuple[Tensor, Tensor]:
    """Inputs and organ of ``example``, moved and bent alike: another body."""
    size = list(example.organ.shape)
    affine = torch.eye(3, 4)
    affine[:, :3] += torch.randn(3, 3, generator=generator) * _SHEAR
    affine[:, 3] += torch.randn(3, generator=generator) * _SHIFT
    grid = functional.affine_grid(affine[None], [1, 1, *size], align_corners=False)
    coarse = torch.randn(1, 3, 4, 4, 4, generator=generator) * _ELASTIC
    field = functional.interpolate(coarse, size=size, mode="trilinear")
    both = torch.cat([example.inputs, example.organ[None]])[None]
    moved = functional.grid_sample(both, grid + field.permute(0, 2, 3, 4, 1), align_corners=False)
    return moved[0, :-1], moved[0, -1]


def _loss(logits: Tensor, organ: Tensor) -> Tensor:
    """Cross entropy and Dice of shares (0 to 1)."""
    chance = logits.sigmoid()
    overlap = (2 * (chance * organ).sum() + 1) / ((chance**2).sum() + (organ**2).sum() + 1)
    entropy = functional.binary_cross_entropy_with_logits(logits, organ)
    return _CE_WEIGHT * entropy + 1 - overlap


def learn(
    examples: Sequence[Example], shown: Sequence[frozenset[int]], seed: int, steps: int
) -> NeighbourhoodNetwork:
    """A network trained on ``examples``.

    In each step it sees only the organs of one of ``shown``: those that some body has where it
    will be asked, so that it does not rely on others.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = NeighbourhoodNetwork()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=steps, pct_start=_WARMUP
    )
    average = copy.deepcopy(network)
    with_bf16 = not bf16_is_emulated()
    for _ in range(steps):
        example = examples[int(torch.randint(len(examples), (), generator=generator))]
        inputs, organ = _bent(example, generator)
        seen = shown[int(torch.randint(len(shown), (), generator=generator))]
        inputs[[k for k in range(len(ORGANS)) if k + 1 not in seen]] = 0
        with torch.autocast("cpu", torch.bfloat16, enabled=with_bf16):
            logits = network(_padded(inputs))
        loss = _loss(logits.float(), _padded(organ))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), _CLIP_NORM)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for own, new in zip(average.parameters(), network.parameters(), strict=True):
                own.lerp_(new, 1 / (_AVERAGED * steps))
    return average.eval()


@dataclass(frozen=True)
class Learnt:
    """Networks, each with the names of the atlases that it learnt from."""

    networks: Sequence[tuple[frozenset[str], NeighbourhoodNetwork]]

    def chance(self, name: str, around: Surroundings) -> np.ndarray:
        """float32 (z, y, x), 0 to 1: the organ in the body ``name``, 0 where another lies.

        The mean of the networks that have not seen an atlas of that name.
        """
        inputs = network_inputs(around)
        asked = [network for names, network in self.networks if name not in names]
        with torch.inference_mode():
            chance = sum(network(_padded(inputs)).sigmoid() for network in asked) / len(asked)
        cut = tuple(slice(n) for n in inputs.shape[1:])
        return np.where(around.taken, np.float32(0), chance[cut].numpy())

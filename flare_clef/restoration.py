"""From 13 logit maps on the network's grid to labels on the scan's own (section 2.3).

The decision: logits are interpolated trilinearly to the centre of every voxel of the body box
(outer edges of both grids on each other, clamped at the borders, as
``torch.nn.functional.interpolate(mode="trilinear", align_corners=False)`` does); where all 13
are below 0, that is where every sigmoid is below 0.5, the voxel is background, else it is the
organ of the largest logit (the first of equals).

No full-size logit map is ever made. An interpolated value is a weighted mean of a cell's 8
corners, with the same weights for all 13 maps and the constant 0 of the background. If one
class is the largest at all 8 corners, its weighted mean is the largest too: the whole cell is
decided. Only the cells between organs are interpolated.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from flare_clef.organs import ORGANS
from flare_clef.preparation import Placement

_UNDECIDED = 255
_CHUNK_VOXELS = 1 << 21
_BATCH_VOXELS = 1 << 18
_WINNER_SLICES = 16


def restore(
    logits: Tensor,
    placement: Placement,
    organs: Collection[int] | None = None,
    winners: Tensor | None = None,
) -> np.ndarray:
    """Labels, uint8, of ``placement.shape`` (stored axes); 0 outside the body box.

    ``logits``: (13, z, y, x) on ``placement.grid``, any float type, any device; fastest with
    channels innermost in memory. ``organs`` keeps only these label values: the decision is
    made among all 13, and what falls to the others becomes 0. ``winners``: what
    :func:`winners_of` gives, where it is known.
    """
    nodes = logits.detach().to("cpu").permute(1, 2, 3, 0).contiguous()
    cells = _decided_cells(winners_of(nodes) if winners is None else winners)
    flat = nodes.view(-1, nodes.shape[-1])
    axes = [_Axis(n, g) for n, g in zip(placement.box_shape, placement.grid, strict=True)]
    keep = _kept(organs)

    labels = np.zeros(placement.shape, dtype=np.uint8)
    inside = placement.box_in_scan
    view = placement.canonical_view(labels)[tuple(slice(*bounds) for bounds in inside)]
    below = inside[0][0] - placement.box[0][0]
    axes[0] = axes[0].part(below, below + view.shape[0])
    plane = axes[1].size * axes[2].size
    step = max(1, _CHUNK_VOXELS // plane)
    for start in range(0, axes[0].size, step):
        along_z = axes[0].part(start, start + step)
        found = cells[along_z.low][:, axes[1].low][:, :, axes[2].low]
        _decide(found, flat, along_z, axes[1], axes[2])
        view[start : start + step] = keep[found.numpy()]
    return labels


def mean_confidence(logits: Tensor) -> dict[int, float]:
    """Per label value the mean sigmoid of its logit over the nodes that it wins, 0.5 to 1.

    ``logits``: (13, z, y, x). A figure of the network's grid, not of the scan's voxels: it
    costs a fraction of a second. Labels that win nowhere are absent.
    """
    sums, counts = torch.zeros(len(logits), dtype=torch.float64), torch.zeros(len(logits))
    for z in range(logits.shape[1]):
        top, channel = logits[:, z].detach().to("cpu", torch.float32).max(dim=0)
        won = top >= 0
        channel, sure = channel[won], torch.sigmoid(top[won]).double()
        sums += torch.bincount(channel, sure, minlength=len(logits))
        counts += torch.bincount(channel, minlength=len(logits))
    return {
        index + 1: float(total / count)
        for index, (total, count) in enumerate(zip(sums, counts, strict=True))
        if count
    }


class _Axis:
    """Along one axis: for each voxel its two neighbouring nodes and the upper one's weight."""

    def __init__(self, size: int, nodes: int) -> None:
        self.size, self.nodes = size, nodes
        position = (torch.arange(size, dtype=torch.float64) + 0.5) * nodes / size - 0.5
        position = position.clamp(0, nodes - 1)
        self.low = position.floor().long()
        self.high = (self.low + 1).clamp_max(nodes - 1)
        self.weight = (position - self.low).float()

    def part(self, start: int, stop: int) -> _Axis:
        """The same for voxels [start, stop)."""
        part = object.__new__(_Axis)
        part.low, part.high = self.low[start:stop], self.high[start:stop]
        part.weight, part.nodes = self.weight[start:stop], self.nodes
        part.size = len(part.low)
        return part


def _kept(organs: Collection[int] | None) -> np.ndarray:
    """(256,) uint8: what is written for each label."""
    keep = np.zeros(256, dtype=np.uint8)
    for organ in ORGANS:
        if organs is None or organ.index in organs:
            keep[organ.index] = organ.index
    return keep


def decide(values: Tensor) -> Tensor:
    """(n, 13) logits to (n,) labels, uint8: section 2.3 for a row of 13 numbers."""
    top, channel = values.max(dim=1)
    return torch.where(top >= 0, channel + 1, 0).to(torch.uint8)


def winners_of(nodes: Tensor) -> Tensor:
    """(z, y, x, 13) logits to the label at every node, (z, y, x), uint8, on the CPU."""
    # Few large operations: of many small ones each waits for every thread to be scheduled,
    # which on a busy machine took a hundred times as long as the work itself.
    parts = [decide(slices.reshape(-1, nodes.shape[-1])) for slices in nodes.split(_WINNER_SLICES)]
    return torch.cat(parts).view(nodes.shape[:3]).cpu()


def _decided_cells(winners: Tensor) -> Tensor:
    """For the cell above each node, its label where all 8 corners agree, else ``_UNDECIDED``."""
    low = high = winners
    for axis in range(3):
        size = winners.shape[axis]
        follow = torch.arange(1, size + 1).clamp_max(size - 1)
        low = torch.minimum(low, low.index_select(axis, follow))
        high = torch.maximum(high, high.index_select(axis, follow))
    return torch.where(low == high, low, torch.full_like(low, _UNDECIDED))


def _decide(found: Tensor, flat: Tensor, along_z: _Axis, along_y: _Axis, along_x: _Axis) -> None:
    """Fills the undecided voxels of ``found`` (z, y, x), in place, by interpolating all 13."""
    rows, columns = along_y.nodes, along_x.nodes
    undecided = torch.nonzero(found.view(-1) == _UNDECIDED).flatten()
    for start in range(0, len(undecided), _BATCH_VOXELS):
        index = undecided[start : start + _BATCH_VOXELS]
        x = index % along_x.size
        y = (index // along_x.size) % along_y.size
        z = index // (along_x.size * along_y.size)
        value = torch.zeros(len(index), flat.shape[1])
        for plane, of_z in (
            (along_z.low[z], 1 - along_z.weight[z]),
            (along_z.high[z], along_z.weight[z]),
        ):
            for row, of_y in (
                (along_y.low[y], 1 - along_y.weight[y]),
                (along_y.high[y], along_y.weight[y]),
            ):
                base, weight = (plane * rows + row) * columns, of_z * of_y
                value.addcmul_(
                    flat[base + along_x.low[x]].float(), (weight * (1 - along_x.weight[x]))[:, None]
                )
                value.addcmul_(
                    flat[base + along_x.high[x]].float(), (weight * along_x.weight[x])[:, None]
                )
        found.view(-1)[index] = decide(value)

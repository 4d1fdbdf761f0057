"""What lies apart from an organ's main part and is small goes to the next likely organ.

Every organ is one piece in nearly everybody, but what looks like it elsewhere (bowel like a kidney,
a vessel like another) is taken for it in pieces. The paper has no such step; what it gains and
costs stands in docs/experiments.md. It works on the network's grid, where a scan of any size costs
the same, and before labels are restored, so that a voxel which loses its organ falls to the one
with the next logit, or to the background, and borders stay as smooth as everywhere.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flare_clef.label_parts import connected_parts, masks_in_boxes
from flare_clef.organs import ORGANS
from flare_clef.restoration import decide, winners_of

_SHARES = {"right_kidney": 0.5, "left_kidney": 0.5, "spleen": 0.5, "stomach": 0.5, "liver": 0.05}
SMALLEST_SHARE = {organ.index: _SHARES.get(organ.name, 0.1) for organ in ORGANS}
"""Of the voxels of an organ's largest part: a smaller part is a stray one.

Half for organs that nothing cuts in two; two pieces of like size both stay, since which of them
is the organ cannot be told. A tenth for those that a vessel, a mass or the edge of a short scan
may cut (pancreas), or of which the scan shows two ends (aorta); of a liver a twentieth is much."""
REFUSED = -10.0
"""The logit of an organ where it was a stray part."""
_ROUNDS = 3
"""What one organ loses may make a stray part of the next; so often is looked again."""


def drop_stray_parts(logits: Tensor) -> Tensor:
    """Sets an organ's logit to ``REFUSED`` at the nodes of its stray parts, in place.

    ``logits``: (13, z, y, x), any float type, any device. Returns the label (z, y, x), uint8, on
    the CPU, that wins at every node afterwards. Nodes touch by a face, an edge or a corner.
    """
    with torch.inference_mode():  # what the network gives may be changed nowhere else
        return _drop(logits)


def _drop(logits: Tensor) -> Tensor:
    nodes = logits.permute(1, 2, 3, 0)
    winners = winners_of(nodes)
    labels = winners.numpy()
    to_look_at = {organ.index for organ in ORGANS}
    for _ in range(_ROUNDS):
        receivers: set[int] = set()
        for organ, box, mask in masks_in_boxes(labels, sorted(to_look_at)):
            if organ in receivers:  # it has grown since, perhaps out of its slices
                _, box, mask = next(masks_in_boxes(labels, [organ]))
            stray = _stray_nodes(mask, SMALLEST_SHARE[organ])
            if len(stray[0]) == 0:
                continue
            place = tuple(axis + side.start for axis, side in zip(stray, box, strict=True))
            z, y, x = (torch.from_numpy(axis).to(logits.device) for axis in place)
            logits[organ - 1, z, y, x] = REFUSED
            labels[place] = found = decide(nodes[z, y, x]).cpu().numpy()
            receivers |= set(found.tolist())
        to_look_at = receivers - {0}
        if not to_look_at:
            break
    return winners


def _stray_nodes(mask: np.ndarray, smallest_share: float) -> tuple[np.ndarray, ...]:
    """(z, y, x) of the nodes of all parts below that share of the largest."""
    parts, sizes = connected_parts(mask)
    stray = sizes < smallest_share * sizes.max()
    stray[0] = False
    return np.nonzero(stray[parts]) if stray.any() else (np.empty(0, np.int64),) * 3

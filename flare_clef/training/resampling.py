"""Volumes at other places: affine and elastic, image and labels in one pass.

Faster than torch's grid_sample in three dimensions, which computes voxel by voxel: in two
dimensions it uses the processor's vectors. So a volume is read as one tall picture
of its slices, twice, for the slice below and the one above a place. A few slices of the output
are made at a time, so that places stay in the cache. Volumes are (z, y, x), beyond them there
is air (-1) and background.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

WHOLE = (slice(None), slice(None), slice(None))
_AT_ONCE = 2**17
"""Voxels, so that all that is known of them fits the cache of a core."""
_RIM = (1,) * 6
AIR = -0.999
"""Below this a prepared voxel is air or lung, clipped."""


def _tent(count: int, nodes: int, span: slice) -> Tensor:
    """(voxels of ``span``, nodes) weights of linear interpolation, the ends on the outer nodes."""
    places = torch.linspace(0, nodes - 1, count)[span]
    return (1 - (places[:, None] - torch.arange(nodes)).abs()).clamp_(min=0)


def _places(
    affine: Tensor,
    elastic: Tensor | None,
    shape: torch.Size,
    size: tuple[int, int, int],
    window: tuple[slice, ...],
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Of a few slices of the output at a time: which, and x, y, z in voxels of the input.

    Along x a place is a sum of few terms: the nodes of the displacement, a constant and x. So
    all of it is one product of matrices.
    """
    z, y, x = (
        ((torch.arange(n) + 0.5) * (2 / n) - 1)[span] for n, span in zip(size, window, strict=True)
    )
    half = torch.tensor(shape).flip(0) / 2
    to_x, to_y, to_z = (affine[:, :3] * half[:, None]).unbind(1)
    shift = (affine[:, 3] + 1) * half - 0.5
    constant = (z[:, None] * to_z + shift)[:, :, None] + to_y[:, None] * y
    terms = [constant[..., None], to_x[:, None, None].expand(*constant.shape, 1)]
    along_x = [torch.ones(1, len(x)), x[None]]
    if elastic is not None:
        in_z, in_y, in_x = (
            _tent(n, k, span) for n, k, span in zip(size, elastic.shape[1:], window, strict=True)
        )
        coarse = elastic * half[:, None, None, None]
        terms.append(torch.einsum("zk,yl,cklx->zcyx", in_z, in_y, coarse))
        along_x.append(in_x.t())
    left, right = torch.cat(terms, -1), torch.cat(along_x)
    step = max(1, _AT_ONCE // (len(y) * len(x)))
    for start in range(0, len(z), step):
        span = slice(start, min(start + step, len(z)))
        rows = left[span].transpose(0, 1).reshape(3, -1, left.shape[-1])
        places = rows @ right
        yield span, places[0], places[1], places[2]


def resample(
    image: Tensor,
    affine: Tensor,
    size: tuple[int, int, int] | None = None,
    window: tuple[slice, ...] = WHOLE,
    elastic: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``image`` and ``labels`` (uint8) on a grid of ``size``, of which ``window`` is made.

    ``affine`` (3, 4) leads from places of the output to those of the input, both in (-1, 1), rows
    and columns x, y, z; ``elastic`` (3, z, y, x) is added to the latter, from a few nodes that
    span the output. Image linear, float32; labels nearest. ``size`` None is that of ``image``.
    """
    depth, height, width = image.shape
    size = size or (depth, height, width)
    # A rim of air: places beyond the volume are moved onto it.
    padded = functional.pad(image.to(torch.float32, copy=True).add_(1), _RIM)
    marks = None if labels is None else functional.pad(labels, _RIM).view(-1)
    high, wide = height + 2, width + 2
    shape = [len(range(n)[span]) for n, span in zip(size, window, strict=True)]
    out = torch.empty(shape)
    out_marks = None if labels is None else torch.empty(shape, dtype=torch.uint8)
    for span, x, y, z in _places(affine, elastic, image.shape, size, window):
        x.add_(1).clamp_(0, wide - 1)
        y.add_(1).clamp_(0, high - 1)
        z.add_(1).clamp_(0, depth + 1)
        if marks is not None and out_marks is not None:
            index = z.round().int().mul_(high).add_(y.round().int()).mul_(wide)
            index.add_(x.round().int())
            torch.index_select(marks, 0, index.view(-1), out=out_marks[span].view(-1))
        below = z.floor().clamp_(max=depth)
        share = z.sub_(below)
        first, last = int(below.min()), int(below.max()) + 1
        picture = padded[first : last + 1].view(1, 1, -1, wide)
        # (-1, 1) from the first voxel's outer edge to the last one's.
        row = 2 / picture.shape[2]
        grid = torch.empty(1, *x.shape, 2)
        torch.mul(x.add_(0.5), 2 / wide, out=grid[0, ..., 0]).sub_(1)
        y.add_(below.sub_(first), alpha=high).add_(0.5)
        torch.mul(y, row, out=grid[0, ..., 1]).sub_(1)
        lower = functional.grid_sample(picture, grid, align_corners=False)
        grid[..., 1] += high * row
        upper = functional.grid_sample(picture, grid, align_corners=False)
        torch.lerp(lower[0, 0], upper[0, 0], share, out=out[span].view(share.shape))
    return out.sub_(1), out_marks

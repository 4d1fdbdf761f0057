"""Short pieces of a body, cut from whole ones and laid into air, as ``predict`` does with them.

People scan an organ, not always a trunk. Few training sets have such scans, so a step may see a
piece of a whole one: at the scale and between the air that :func:`flare_clef.preparation.prepare`
would give it. Volumes are prepared ones, (z, y, x).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from flare_clef.preparation import MOST_STRETCH, SHORTEST_MM
from flare_clef.training.resampling import AIR

_SHORTEST_PIECE_MM = 40.0
_LONGEST_PIECE_MM = 200.0


@dataclass(frozen=True)
class Piece:
    """Which slices of a volume are seen, all places along z in (-1, 1)."""

    middle: float
    """Of the piece, in the volume."""
    size: float
    """Of the grid that shows the piece and its air, as a share of the volume's height."""
    share: float
    """Of that grid, what is body."""

    def zoom(self, affine: Tensor) -> Tensor:
        """``affine`` (3, 4; rows and columns x, y, z) behind the map from the piece's grid."""
        zoomed = affine.clone()
        zoomed[:, 2] *= self.size
        zoomed[:, 3] += affine[:, 2] * self.middle
        return zoomed

    def cut(self, volume: Tensor, value: float, count: int, window: slice) -> Tensor:
        """``volume`` with ``value`` above and below the piece; in place.

        ``volume`` holds the slices ``window`` of a grid of ``count``.
        """
        places = (((torch.arange(count) + 0.5) * 2 / count) - 1)[window]
        volume[places.abs() > self.share] = value
        return volume


def draw_piece(image: Tensor, height_mm: float, generator: Generator) -> Piece | None:
    """A piece of 40 to 200 mm, short ones more often, anywhere in the body of ``image``.

    ``image`` is (z, y, x) in (-1, 1) and ``height_mm`` high, its air included.

    None for a scan that is itself so short that air was laid above and below it.
    """
    shown = torch.nonzero((image > AIR).flatten(1).any(1)).flatten()
    if len(shown) == 0:
        return None
    slice_mm = height_mm / image.shape[0]
    first, last = int(shown[0]), int(shown[-1]) + 1
    body_mm = (last - first) * slice_mm
    if body_mm < SHORTEST_MM:
        return None
    length_draw, place_draw = torch.rand(2, generator=generator).tolist()
    length_mm = _SHORTEST_PIECE_MM * (_LONGEST_PIECE_MM / _SHORTEST_PIECE_MM) ** length_draw
    middle_mm = first * slice_mm + length_mm / 2 + (body_mm - length_mm) * place_draw
    grid_mm = min(SHORTEST_MM, MOST_STRETCH * length_mm)
    return Piece(2 * middle_mm / height_mm - 1, grid_mm / height_mm, length_mm / grid_mm)

"""The grid that a phantom is painted on: HU, labels, and soft edges as a scanner gives them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flare_clef.phantom_shapes import Field, Shape

EDGE_MM = 1.6
"""How far an edge is smeared, about a scanner's resolution in the slice."""

_CHUNK_VOXELS = 2_000_000
_BLOCK_MM = 6.0
# From a block's middle to its corner, and room for distances that are only about right.
_MARGIN_MM = 1.35 * _BLOCK_MM * 3**0.5 / 2
_OUTSIDE, _EDGE, _INSIDE = 0, 1, 2

Box = tuple[slice, slice, slice]
Axes = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Sway:
    """Slow waves that bend the whole body a little, so that no two seeds are alike.

    Each axis is shifted by two sines of the other two: (3, 2) amplitudes in mm, wavelengths
    in mm and phases.
    """

    amplitude_mm: np.ndarray
    wavelength_mm: np.ndarray
    phase: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator, amplitude_mm: float = 1.5) -> Sway:
        return cls(
            rng.normal(0, amplitude_mm, (3, 2)).clip(-2 * amplitude_mm, 2 * amplitude_mm),
            rng.uniform(90, 180, (3, 2)),
            rng.uniform(0, 2 * np.pi, (3, 2)),
        )

    @property
    def reach_mm(self) -> float:
        return float(np.abs(self.amplitude_mm).sum(1).max())

    def tables_mm(self, axes_mm: Axes) -> list[list[np.ndarray]]:
        """The two shifts of each axis, as float32 along the two others (in the order x, y, z)."""
        tables = []
        for axis in range(3):
            others = [axes_mm[i] for i in range(3) if i != axis]
            turns = [
                2 * np.pi * other / self.wavelength_mm[axis, k] + self.phase[axis, k]
                for k, other in enumerate(others)
            ]
            # Rounded, so that processors whose sines differ in the last bit agree.
            shifts = [
                np.round(self.amplitude_mm[axis, k] * np.sin(turn), 4)
                for k, turn in enumerate(turns)
            ]
            tables.append([shift.astype(np.float32) for shift in shifts])
        return tables


class Canvas:
    """``hu`` float32 and ``labels`` uint8, both (z, y, x), along axes in body mm."""

    def __init__(self, axes_mm: Axes, sway: Sway) -> None:
        """``axes_mm``: positions along x, y and z, each growing evenly."""
        self.axes_mm = axes_mm
        self._reach_mm = sway.reach_mm
        self._places_mm = [axis.astype(np.float32) for axis in axes_mm]
        self._shifts_mm = sway.tables_mm(axes_mm)
        shape = tuple(len(axis) for axis in reversed(axes_mm))
        self.hu = np.full(shape, -1000.0, np.float32)
        self.labels = np.zeros(shape, np.uint8)

    def paint(
        self,
        shape: Shape,
        hu: float | Field,
        label: int | None = None,
        edge_mm: float = EDGE_MM,
        only_label: int | None = None,
    ) -> None:
        """Paints ``shape`` over what is there. Without ``label`` the labels stay as they are.

        ``hu`` is a value or a field of values. ``only_label`` paints within that label alone.
        """
        reach = self._reach_mm + edge_mm
        spans = []
        for axis, low, high in zip(self.axes_mm, shape.low, shape.high, strict=True):
            first = int(np.searchsorted(axis, low - reach))
            last = int(np.searchsorted(axis, high + reach))
            if first >= last:
                return
            spans.append(slice(first, last))
        wide, deep = (span.stop - span.start for span in spans[:2])
        slices = max(1, _CHUNK_VOXELS // (wide * deep))
        for start in range(spans[2].start, spans[2].stop, slices):
            box = (slice(start, min(start + slices, spans[2].stop)), spans[1], spans[0])
            known = self._survey(shape, box, edge_mm)
            self._fill(known == _EDGE, box, shape, hu, label, edge_mm, only_label)
            whole = known == _INSIDE
            if callable(hu):
                self._fill(whole, box, shape, hu, label, edge_mm, only_label)
                continue
            if only_label is not None:
                whole &= self.labels[box] == only_label
            self.hu[box][whole] = hu
            if label is not None:
                self.labels[box][whole] = label

    def _places(self, k: np.ndarray, j: np.ndarray, i: np.ndarray) -> list[np.ndarray]:
        """x, y, z in body mm, swayed, of the voxels at ``k``, ``j``, ``i`` along z, y, x."""
        index = (i, j, k)
        places = []
        for axis in range(3):
            value: np.ndarray = self._places_mm[axis][index[axis]]
            others = [n for n in range(3) if n != axis]
            for shift, other in zip(self._shifts_mm[axis], others, strict=True):
                value = value + shift[index[other]]
            places.append(value)
        return places

    def _survey(self, shape: Shape, box: Box, edge_mm: float) -> np.ndarray:
        """(z, y, x): which voxels are surely inside or outside, by the middles of blocks.

        Most of a tube's box is empty and most of a trunk is full: neither needs a distance
        at every voxel.
        """
        middles, sizes = [], []
        for span, line in zip(box, reversed(self.axes_mm), strict=True):
            step = max(1, int(_BLOCK_MM / (line[1] - line[0]))) if len(line) > 1 else 1
            starts = np.arange(span.start, span.stop, step)
            middles.append(np.minimum(starts + step // 2, span.stop - 1))
            sizes.append(np.diff(np.append(starts, span.stop)))
        distance = shape.distance(*self._places(*np.ix_(*middles)))
        margin = _MARGIN_MM + edge_mm / 2
        known = np.full(distance.shape, _EDGE, np.int8)
        known[distance > margin] = _OUTSIDE
        known[distance < -margin] = _INSIDE
        for along, counts in enumerate(sizes):
            known = np.repeat(known, counts, along)
        return known

    def _fill(
        self,
        where: np.ndarray,
        box: Box,
        shape: Shape,
        hu: float | Field,
        label: int | None,
        edge_mm: float,
        only_label: int | None,
    ) -> None:
        """Blends the voxels of ``box`` that ``where`` picks, by their distances."""
        index = tuple(
            found + span.start for found, span in zip(np.nonzero(where), box, strict=True)
        )
        if len(index[0]) == 0:
            return
        place = self._places(*index)
        distance = shape.distance(*place)
        cover = np.clip(0.5 - distance / edge_mm, 0, 1)
        if only_label is not None:
            cover *= self.labels[index] == only_label
        before = self.hu[index]
        self.hu[index] = before + cover * ((hu(*place) if callable(hu) else hu) - before)
        if label is not None:
            covered = distance < 0
            self.labels[tuple(part[covered] for part in index)] = label


def coarse_noise(rng: np.random.Generator, axes_mm: Axes, grain_mm: float) -> np.ndarray:
    """(z, y, x) smooth noise, standard deviation about 1, with grains of ``grain_mm``."""
    weights = [_linear(axis, grain_mm) for axis in reversed(axes_mm)]
    values = rng.normal(0, 1.6, [w.shape[1] for w in weights]).astype(np.float32)
    for axis, weight in enumerate(weights):
        values = np.moveaxis(np.tensordot(weight, values, axes=(1, axis)), 0, axis)
    return values


def _linear(axis_mm: np.ndarray, grain_mm: float) -> np.ndarray:
    """(n, knots) weights of linear interpolation between knots ``grain_mm`` apart."""
    place = (axis_mm - axis_mm[0]) / grain_mm
    below = place.astype(int)
    weights = np.zeros((len(axis_mm), below[-1] + 2), np.float32)
    rows = np.arange(len(axis_mm))
    weights[rows, below] = 1 - (place - below)
    weights[rows, below + 1] = place - below
    return weights

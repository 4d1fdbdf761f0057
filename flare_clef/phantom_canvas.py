"""The grid that a phantom is painted on: HU, labels, and soft edges as a scanner gives them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flare_clef.phantom_shapes import Field, Shape

EDGE_MM = 1.6
"""How far an edge is smeared, about a scanner's resolution in the slice."""

_CHUNK_VOXELS = 2_000_000


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

    def __call__(self, *axes: np.ndarray) -> list[np.ndarray]:
        """x, y, z that broadcast together, shifted."""
        shifted = []
        for axis in range(3):
            others = [axes[i] for i in range(3) if i != axis]
            value = axes[axis]
            for k, other in enumerate(others):
                turn = 2 * np.pi * other / self.wavelength_mm[axis, k] + self.phase[axis, k]
                value = value + self.amplitude_mm[axis, k] * np.sin(turn)
            shifted.append(value.astype(np.float32))
        return shifted


class Canvas:
    """``hu`` float32 and ``labels`` uint8, both (z, y, x), along axes in body mm."""

    def __init__(self, axes_mm: tuple[np.ndarray, np.ndarray, np.ndarray], sway: Sway) -> None:
        """``axes_mm``: positions along x, y and z, each growing evenly."""
        self.axes_mm = axes_mm
        self.sway = sway
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
        reach = self.sway.reach_mm + edge_mm
        spans = []
        for axis, low, high in zip(self.axes_mm, shape.low, shape.high, strict=True):
            first = int(np.searchsorted(axis, low - reach))
            last = int(np.searchsorted(axis, high + reach))
            if first >= last:
                return
            spans.append(slice(first, last))
        x, y, z = (axis[span] for axis, span in zip(self.axes_mm, spans, strict=True))
        slices = max(1, _CHUNK_VOXELS // (len(x) * len(y)))
        for start in range(0, len(z), slices):
            part = z[start : start + slices]
            box = (slice(spans[2].start + start, spans[2].start + start + len(part)), spans[1])
            place = self.sway(x[None, None, :], y[None, :, None], part[:, None, None])
            self._blend(place, (*box, spans[0]), shape, hu, label, edge_mm, only_label)

    def _blend(
        self,
        place: list[np.ndarray],
        box: tuple[slice, slice, slice],
        shape: Shape,
        hu: float | Field,
        label: int | None,
        edge_mm: float,
        only_label: int | None,
    ) -> None:
        distance = shape.distance(*place)
        cover = np.clip(0.5 - distance / edge_mm, 0, 1)
        if only_label is not None:
            cover *= self.labels[box] == only_label
        there = self.hu[box]
        there += cover * ((hu(*place) if callable(hu) else hu) - there)
        if label is not None:
            self.labels[box][distance < 0] = label


def coarse_noise(
    rng: np.random.Generator, axes_mm: tuple[np.ndarray, np.ndarray, np.ndarray], grain_mm: float
) -> np.ndarray:
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

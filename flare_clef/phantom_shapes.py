"""Implicit shapes that the synthetic body is built of.

A shape answers, for every voxel of a window, how far it is from the shape's surface in mm,
negative inside (exact near the surface, an estimate far from it). All coordinates are those of
the body's own frame, see ``phantom_anatomy``: x to the left, y to the back, z to the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
"""One value per voxel of a window, (z, y, x)."""
Slices = tuple[slice, slice, slice]
Point = Sequence[float]
"""(x, y, z) in mm."""

FAR_MM = 1e3
"""Distance given to voxels that a shape does not look at."""


@dataclass(frozen=True)
class Window:
    """A box of voxels and where each lies in the body's frame.

    The frame is the grid stretched and gently warped, so ``axes`` says where a voxel lies up to
    ``slack_mm`` only: enough to find the box in which a shape has to be looked at.
    """

    x: Field
    y: Field
    z: Field
    axes: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
    """Unwarped coordinate of each plane: (z's, y's, x's), increasing."""
    slack_mm: float

    def box(self, low: Point, high: Point) -> Slices:
        """The voxels that may lie between the corners ``low`` and ``high``."""
        slices = []
        for axis, lowest, highest in zip(self.axes, low[::-1], high[::-1], strict=True):
            start, stop = np.searchsorted(axis, (lowest - self.slack_mm, highest + self.slack_mm))
            slices.append(slice(int(start), int(stop)))
        return slices[0], slices[1], slices[2]

    def crop(self, box: Slices) -> Window:
        """The same place, looked at in a smaller box."""
        axes = (self.axes[0][box[0]], self.axes[1][box[1]], self.axes[2][box[2]])
        return Window(self.x[box], self.y[box], self.z[box], axes, self.slack_mm)


@dataclass(frozen=True)
class Shape:
    """A solid: its distance function, and the corners of a box that holds it."""

    low: Point
    high: Point
    distance: Callable[[Window], Field]

    def grown(self, by_mm: float) -> Shape:
        """The same solid, thicker by ``by_mm`` on all sides (thinner if negative)."""
        margin = max(by_mm, 0.0)
        return Shape(
            [value - margin for value in self.low],
            [value + margin for value in self.high],
            lambda window: self.distance(window) - np.float32(by_mm),
        )

    def within(self, *others: Callable[[Window], Field], blend_mm: float = 0.0) -> Shape:
        """What this solid shares with all ``others``; edges rounded over ``blend_mm``."""

        def distance(window: Window) -> Field:
            result = self.distance(window)
            for other in others:
                result = _smooth_maximum(result, other(window), blend_mm)
            return result

        return Shape(self.low, self.high, distance)

    def rough(self, relief: Callable[[Window], Field]) -> Shape:
        """The same solid with a relief in mm added to its surface."""
        return Shape(
            self.low, self.high, lambda window: self.distance(window) + relief(window)
        ).grown(0.0)


def _smooth_maximum(a: Field, b: Field, blend_mm: float) -> Field:
    """max(a, b), rounded where the two are within ``blend_mm`` (quadratic, after I. Quilez)."""
    if blend_mm <= 0:
        return np.maximum(a, b)
    near = np.maximum(np.float32(blend_mm) - np.abs(a - b), np.float32(0))
    return np.maximum(a, b) + near * near * np.float32(0.25 / blend_mm)


def union(*shapes: Shape, blend_mm: float = 0.0) -> Shape:
    """All of ``shapes`` as one solid; grooves between them filled over ``blend_mm``."""

    def distance(window: Window) -> Field:
        result = shapes[0].distance(window)
        for shape in shapes[1:]:
            result = -_smooth_maximum(-result, -shape.distance(window), blend_mm)
        return result

    low = np.min([shape.low for shape in shapes], axis=0) - blend_mm
    high = np.max([shape.high for shape in shapes], axis=0) + blend_mm
    return Shape(low.tolist(), high.tolist(), distance)


def ellipsoid(centre: Point, radii: Point, axis: Point = (0, 0, 1)) -> Shape:
    """An ellipsoid whose third radius lies along ``axis``, the first as near to x as can be."""
    third = np.asarray(axis, float) / np.linalg.norm(axis)
    helper = np.array([1.0, 0.0, 0.0]) if abs(third[0]) < 0.9 else np.array([0.0, 1.0, 0.0])
    first = helper - third * (helper @ third)
    first /= np.linalg.norm(first)
    rotation = np.array([first, np.cross(third, first), third])
    reach = np.sqrt(((rotation * np.asarray(radii, float)[:, None]) ** 2).sum(0))

    def distance(window: Window) -> Field:
        x, y, z = (
            coordinate - np.float32(middle)
            for coordinate, middle in zip((window.x, window.y, window.z), centre, strict=True)
        )
        squares, gradient = np.float32(1e-6), np.float32(1e-9)
        for row, radius in zip(rotation, radii, strict=True):
            along = (x * np.float32(row[0]) + y * np.float32(row[1]) + z * np.float32(row[2])) * (
                np.float32(1 / radius)
            )
            squares = squares + along * along
            gradient = gradient + along * along * np.float32(1 / radius**2)
        # First-order distance to the level set |p / radii| = 1 (Taubin 1994).
        norm = np.sqrt(squares)
        return norm * (norm - np.float32(1)) / np.sqrt(gradient)

    centre_ = np.asarray(centre, float)
    return Shape((centre_ - reach).tolist(), (centre_ + reach).tolist(), distance)


def tube(
    points: Sequence[Point],
    radii: Sequence[float],
    *,
    stretch: Point = (1, 1, 1),
    steps: int = 3,
) -> Shape:
    """A tube along a smooth curve through ``points``, with a radius at each of them.

    The curve is a Catmull-Rom spline cut into ``steps`` straight pieces between two points.
    ``stretch`` widens the cross-section along x, y, z (1.3 along x: a vein flattened sideways).
    """
    knots = _spline(np.column_stack([np.asarray(points, float), radii]), steps)
    wide = np.asarray(stretch, float)
    reach = knots[:, 3:].clip(min=0.1) * np.maximum(wide, 1.0)

    def distance(window: Window) -> Field:
        result = np.full(window.x.shape, FAR_MM, np.float32)
        scale = (1 / wide).astype(np.float32)
        for start, stop, near, far in zip(
            knots[:-1], knots[1:], reach[:-1], reach[1:], strict=True
        ):
            # Neighbouring pieces overlap by a margin, within which distances are exact.
            low = np.minimum(start[:3] - near, stop[:3] - far) - 8
            high = np.maximum(start[:3] + near, stop[:3] + far) + 8
            box = window.box(low.tolist(), high.tolist())
            piece = result[box]
            if piece.size:
                np.minimum(piece, _capsule(window.crop(box), start, stop, scale), out=piece)
        return result

    low = (knots[:, :3] - reach).min(0)
    high = (knots[:, :3] + reach).max(0)
    return Shape(low.tolist(), high.tolist(), distance)


def _capsule(
    window: Window, start: NDArray[np.float64], stop: NDArray[np.float64], scale: Field
) -> Field:
    """Distance to the segment ``start``-``stop`` less the radius interpolated along it."""
    origin = (start[:3] * scale).astype(np.float32)
    direction = ((stop[:3] - start[:3]) * scale).astype(np.float32)
    x = window.x * scale[0] - origin[0]
    y = window.y * scale[1] - origin[1]
    z = window.z * scale[2] - origin[2]
    length2 = max(float(direction @ direction), 1e-6)
    along = (x * direction[0] + y * direction[1] + z * direction[2]) * np.float32(1 / length2)
    np.clip(along, 0, 1, out=along)
    x -= along * direction[0]
    y -= along * direction[1]
    z -= along * direction[2]
    radius = np.float32(start[3]) + along * np.float32(stop[3] - start[3])
    return np.sqrt(x * x + y * y + z * z) - radius


def _spline(points: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """Catmull-Rom spline through the rows of ``points``, ``steps`` pieces between two of them."""
    if len(points) < 3 or steps == 1:
        return points
    padded = np.vstack([2 * points[0] - points[1], points, 2 * points[-1] - points[-2]])
    t = np.arange(steps)[:, None] / steps
    pieces = []
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        curve = 2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2
        pieces.append((curve + (3 * b - a - 3 * c + d) * t**3) / 2)
    return np.vstack([*pieces, points[-1:]])


def plates(
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]],
    z_range: tuple[float, float],
    *,
    half_thickness_mm: float,
    shear: tuple[float, float] = (0.0, 0.0),
) -> Shape:
    """Upright sheets: straight lines of the axial plane drawn out along z.

    ``lines`` hold (x, y) ends at the middle of ``z_range``; with z they move by ``shear`` (mm of
    x and of y for each mm of z). The upper and lower rims are rounded off.
    """
    middle, half = (z_range[0] + z_range[1]) / 2, (z_range[1] - z_range[0]) / 2

    def distance(window: Window) -> Field:
        z = window.z - np.float32(middle)
        x0, y0 = window.x - z * np.float32(shear[0]), window.y - z * np.float32(shear[1])
        beyond = np.maximum(np.abs(z) - np.float32(half - half_thickness_mm), 0)
        nearest = np.full(z.shape, FAR_MM, np.float32)
        for (xa, ya), (xb, yb) in lines:
            dx, dy = np.float32(xb - xa), np.float32(yb - ya)
            x, y = x0 - np.float32(xa), y0 - np.float32(ya)
            along = np.clip((x * dx + y * dy) / (dx * dx + dy * dy), 0, 1)
            x, y = x - along * dx, y - along * dy
            np.minimum(nearest, x * x + y * y, out=nearest)
        return np.sqrt(nearest + beyond * beyond) - np.float32(half_thickness_mm)

    ends = np.array([end for line in lines for end in line])
    reach = np.abs(np.asarray(shear)) * half + half_thickness_mm
    low, high = ends.min(0) - reach, ends.max(0) + reach
    return Shape([*low, z_range[0]], [*high, z_range[1]], distance)


def smooth_field(
    rng: np.random.Generator, axes: Sequence[NDArray[np.float32]], step_mm: float
) -> Field:
    """Smooth random values, mean 0 and standard deviation about 1, (z, y, x).

    Random numbers on a lattice of ``step_mm`` that fills a fixed cube (`LATTICE_MM` around 0),
    joined by cubic B-splines: the same body gets the same field on whatever grid it is sampled.
    """
    count = int(np.ceil(2 * LATTICE_MM / step_mm)) + 4
    field = rng.standard_normal((count, count, count), dtype=np.float32)
    for number, axis in enumerate(axes):
        weights = _spline_weights(axis, step_mm, count)
        field = np.moveaxis(np.tensordot(weights, field, axes=(1, number)), 0, number)
    # Sum of squared B-spline weights, averaged over a cell, is 151/315 per axis.
    return np.ascontiguousarray(field) * np.float32((315 / 151) ** 1.5)


LATTICE_MM = 320.0
"""Half the side of the cube in which random fields vary; beyond it they stay as at its face."""


def _spline_weights(axis: NDArray[np.float32], step_mm: float, count: int) -> Field:
    position = np.clip(axis.astype(float), -LATTICE_MM, LATTICE_MM)
    position = (position + LATTICE_MM) / step_mm + 1
    first = np.minimum(np.floor(position).astype(int), count - 3)
    t = position - first
    taps = (
        (1 - t) ** 3 / 6,
        (3 * t**3 - 6 * t**2 + 4) / 6,
        (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
        t**3 / 6,
    )
    weights = np.zeros((len(axis), count), np.float32)
    for offset, tap in enumerate(taps):
        weights[np.arange(len(axis)), first - 1 + offset] = tap
    return weights

"""Smooth shapes as functions of space: negative inside, positive outside, about mm from the edge.

Positions are body coordinates in mm: x to the patient's left, y to the back, z to the head.
A shape is evaluated only inside its box, so that a small organ costs little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Point = tuple[float, float, float]
Field = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Takes x, y, z in mm, arrays that broadcast together, and gives the value at each place."""


@dataclass(frozen=True)
class Shape:
    """A distance in mm and the box outside which there is nothing of the shape."""

    low: Point
    high: Point
    distance: Field


def ellipsoid(centre: Point, radii: Point, tilt: np.ndarray | None = None) -> Shape:
    """``radii`` in mm along the columns of ``tilt`` (3, 3), a rotation; by default x, y, z."""
    axes = np.eye(3) if tilt is None else tilt
    reach = np.sqrt(((axes * np.asarray(radii)) ** 2).sum(1))
    scaled = (axes / np.asarray(radii)).T.astype(np.float32)

    def distance(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        dx, dy, dz = x - centre[0], y - centre[1], z - centre[2]
        square = twice = np.float32(0)
        for row, radius in zip(scaled, radii, strict=True):
            part = row[0] * dx + row[1] * dy + row[2] * dz
            square = square + part * part
            twice = twice + (part / radius) ** 2
        length = np.sqrt(square)
        # Exact on the surface, and with its true slope there.
        return length * (length - 1) / np.sqrt(np.maximum(twice, 1e-9))

    return Shape(as_point(centre - reach), as_point(centre + reach), distance)


def dome(centre: Point, radii: Point, low: float) -> Shape:
    """The upper half of an ellipsoid, carried on downwards as a cylinder to z = ``low``."""
    whole = ellipsoid(centre, radii)

    def distance(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return whole.distance(x, y, np.maximum(z, np.float32(centre[2])))

    return Shape((whole.low[0], whole.low[1], low), whole.high, distance)


def tube(
    points: Sequence[Point], radii: Sequence[float], squeeze: Point = (1.0, 1.0, 1.0)
) -> Shape:
    """A rounded tube along ``points`` with a radius in mm at each.

    ``squeeze`` stretches its section along x, y and z: (1.3, 0.8, 1) is broad and flat.
    """
    path = np.asarray(points, np.float32)
    width = np.asarray(radii, np.float32)
    stretch = np.asarray(squeeze, np.float32)

    def distance(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        x, y, z = x / stretch[0], y / stretch[1], z / stretch[2]
        line = path / stretch
        nearest: np.ndarray | None = None
        for (a, ra), (b, rb) in zip(
            zip(line, width, strict=True), zip(line[1:], width[1:], strict=False), strict=False
        ):
            way = b - a
            dx, dy, dz = x - a[0], y - a[1], z - a[2]
            share = (dx * way[0] + dy * way[1] + dz * way[2]) / max(float(np.dot(way, way)), 1e-6)
            share = np.clip(share, 0, 1)
            gap = (dx - share * way[0]) ** 2
            gap += (dy - share * way[1]) ** 2
            gap += (dz - share * way[2]) ** 2
            gap = np.sqrt(gap) - (ra + share * (rb - ra))
            nearest = gap if nearest is None else np.minimum(nearest, gap)
        assert nearest is not None
        return nearest

    reach = width[:, None] * np.maximum(stretch, 1)
    return Shape(as_point((path - reach).min(0)), as_point((path + reach).max(0)), distance)


def column(
    centre: tuple[float, float],
    radii: tuple[float, float],
    low: float,
    high: float,
    squareness: float = 0.0,
) -> Shape:
    """An upright cylinder; its section is an ellipse, squarer as ``squareness`` goes to 1."""
    (cx, cy), (rx, ry) = centre, radii

    def distance(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        u, v = (x - cx) / rx, (y - cy) / ry
        u, v = u * u, v * v
        level = np.sqrt(u + v)
        if squareness:
            # Square roots and products round alike on every processor, powers do not.
            level = (1 - squareness) * level + squareness * np.sqrt(np.sqrt(u * u + v * v))
        return (level - 1) * min(rx, ry) + 0 * z

    return Shape((cx - rx, cy - ry, low), (cx + rx, cy + ry, high), distance)


def half_space(point: Point, outward: Point) -> Field:
    """Distance beyond the plane through ``point``; ``outward`` points to the side cut away."""
    unit = np.asarray(outward, np.float32) / np.float32(np.linalg.norm(outward))

    def distance(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return (x - point[0]) * unit[0] + (y - point[1]) * unit[1] + (z - point[2]) * unit[2]

    return distance


def union(*shapes: Shape, blend_mm: float = 0.0) -> Shape:
    """All of the shapes; ``blend_mm`` rounds the grooves between them."""

    def distance(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        result = shapes[0].distance(x, y, z)
        for shape in shapes[1:]:
            result = _smaller(result, shape.distance(x, y, z), blend_mm)
        return result

    low = np.min([shape.low for shape in shapes], axis=0)
    high = np.max([shape.high for shape in shapes], axis=0)
    return Shape(as_point(low), as_point(high), distance)


def within(shape: Shape, *limits: Field, blend_mm: float = 0.0) -> Shape:
    """What of ``shape`` lies inside all ``limits`` too; ``blend_mm`` rounds the rims."""

    def distance(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        result = shape.distance(x, y, z)
        for limit in limits:
            result = -_smaller(-result, -limit(x, y, z), blend_mm)
        return result

    return Shape(shape.low, shape.high, distance)


def moved(shape: Shape, offset: Point, scale: float = 1.0) -> Shape:
    """``shape`` scaled about the middle of its box, then shifted by ``offset`` mm."""
    middle = (np.asarray(shape.low) + np.asarray(shape.high)) / 2
    half = (np.asarray(shape.high) - np.asarray(shape.low)) / 2 * scale
    target = middle + offset
    x0, y0, z0 = (middle - target / scale).astype(np.float32)
    inverse = np.float32(1 / scale)

    def distance(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        place = (x * inverse + x0, y * inverse + y0, z * inverse + z0)
        return shape.distance(*place) * np.float32(scale)

    return Shape(as_point(target - half), as_point(target + half), distance)


def outside(shape: Shape, margin_mm: float = 0.0) -> Field:
    """The limit that keeps :func:`within` at least ``margin_mm`` away from ``shape``."""

    def distance(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return margin_mm - shape.distance(x, y, z)

    return distance


def inside(shape: Shape, margin_mm: float = 0.0) -> Field:
    """The limit that keeps :func:`within` ``margin_mm`` inside ``shape``."""

    def distance(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return shape.distance(x, y, z) + margin_mm

    return distance


def tilted(*turns: tuple[str, float]) -> np.ndarray:
    """(3, 3) rotation, ``(axis, degrees)`` one after the other, right-handed."""
    result = np.eye(3)
    for axis, degrees in turns:
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
        turn = np.eye(3)
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
        result = turn @ result
    return result


def curve(
    points: Sequence[Point], radii: Sequence[float], steps: int = 4
) -> tuple[list[Point], list[float]]:
    """Points and radii of a smooth line through ``points`` (Catmull-Rom), for :func:`tube`."""
    knots = np.column_stack([np.asarray(points, float), radii])
    padded = np.vstack([2 * knots[0] - knots[1], knots, 2 * knots[-1] - knots[-2]])
    line = []
    for p, q, r, s in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        for t in np.arange(steps) / steps:
            bend = (2 * p - 5 * q + 4 * r - s) * t**2 + (3 * q - p - 3 * r + s) * t**3
            line.append((2 * q + (r - p) * t + bend) / 2)
    line.append(knots[-1])
    smooth = np.array(line)
    return [as_point(row[:3]) for row in smooth], np.maximum(smooth[:, 3], 0.5).tolist()


def _smaller(a: np.ndarray, b: np.ndarray, blend_mm: float) -> np.ndarray:
    if blend_mm == 0:
        return np.minimum(a, b)
    near = np.maximum(blend_mm - np.abs(a - b), 0) / blend_mm
    return np.minimum(a, b) - near * near * (blend_mm / 4)


def as_point(values: np.ndarray) -> Point:
    """Three numbers as plain floats."""
    x, y, z = (float(value) for value in values)
    return x, y, z

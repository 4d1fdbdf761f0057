"""The panels of a report: three planes through the organs, and two shaded views of them.

A panel is an RGB array (y, x, 3), uint8, of one size. Planes are shown as radiologists do: the
patient's right on the left of the picture, head up, front up. Pixels are square in mm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from flare_clef.images import Image
from flare_clef.organs import ORGANS
from flare_clef.preparation import body_box, canonical_axes, canonical_view

WINDOW_HU = (-160.0, 240.0)
PANEL = (460, 600)
"""Height and width of a panel in pixels."""
BACKGROUND = (0, 0, 0)

_FILL, _LINE_PIXELS = 0.22, 2
_MARGIN_MM = (25.0, 45.0, 45.0)
"""Shown around the organs along z, y, x, as far as there is a body."""
_SURFACE_MM = 1.5
"""Voxel of the grid on which surfaces are smoothed and looked at."""


@dataclass(frozen=True)
class Panel:
    """One picture and what must be written on it."""

    name: str
    rgb: np.ndarray
    left: str
    right: str
    top: str
    bottom: str
    mm_per_pixel: float


@dataclass(frozen=True)
class Scene:
    """Scan and labels in canonical axes (z up, y to the back, x to the patient's left)."""

    hu: np.ndarray
    labels: np.ndarray
    spacing_mm: tuple[float, float, float]
    """Canonical (z, y, x)."""


def scene(image: Image, labels: np.ndarray) -> Scene:
    """A view, no copy. Oblique scans are shown along their nearest axes."""
    axes, flips = canonical_axes(image.direction)
    stored = image.spacing_mm[::-1]
    z, y, x = (stored[a] for a in axes)
    return Scene(
        canonical_view(image.array, axes, flips), canonical_view(labels, axes, flips), (z, y, x)
    )


def panels(case: Scene) -> list[Panel]:
    """Axial, coronal, sagittal, front and back."""
    counts = _counts(case.labels)
    positions = [_best(count) for count in counts]
    box = _shown_box(case, counts)
    planes = [_plane(case, axis, positions[axis], box) for axis in range(3)]
    return [*planes, *_surfaces(case, counts)]


def plane_panel(case: Scene, axis: int, position: int | None) -> tuple[Panel, int]:
    """The plane across canonical ``axis`` at a slice (None: the one that shows most)."""
    counts = _counts(case.labels)
    taken = _best(counts[axis]) if position is None else position
    return _plane(case, axis, taken, _shown_box(case, counts)), taken


def _counts(labels: np.ndarray) -> list[np.ndarray]:
    """For each axis (slices, 13): voxels of each organ in each slice."""
    order = tuple(int(a) for a in np.argsort([-abs(s) for s in labels.strides]))
    stored = np.transpose(labels, order)
    tallies = [np.zeros((n, 14), np.int64) for n in stored.shape]
    for number, plane in enumerate(stored):
        rows, columns = np.nonzero(plane)
        values = plane[rows, columns]
        tallies[0][number] = np.bincount(values, minlength=14)[:14]
        for axis, where in ((1, rows), (2, columns)):
            size = stored.shape[axis]
            both = np.bincount(where * 14 + values, minlength=size * 14)
            tallies[axis] += both.reshape(size, 14)
    result: list[np.ndarray] = [np.empty(0)] * 3
    for axis, tally in zip(order, tallies, strict=True):
        result[axis] = tally[:, 1:]
    return result


def _best(count: np.ndarray) -> int:
    """The slice that shows most organs near their largest cut."""
    largest = count.max(axis=0)
    if not largest.any():
        return len(count) // 2
    return int(np.sqrt(count[:, largest > 0] / largest[largest > 0]).sum(axis=1).argmax())


def _shown_box(case: Scene, counts: list[np.ndarray]) -> list[tuple[int, int]]:
    """Around the organs with a margin, no further than the body; all of both where labels lie
    outside the body, so that it is seen that they do."""
    body = body_box(case.hu) or tuple((0, n) for n in case.hu.shape)
    shown = []
    for axis, (low, high) in enumerate(body):
        where = np.flatnonzero(counts[axis].any(axis=1))
        if len(where):
            first, end = int(where[0]), int(where[-1]) + 1
            if first < low or end > high:
                low, high = min(low, first), max(high, end)
            else:
                margin = round(_MARGIN_MM[axis] / case.spacing_mm[axis])
                low, high = max(low, first - margin), min(high, end + margin)
        shown.append((low, high))
    return shown


def _plane(case: Scene, axis: int, position: int, box: list[tuple[int, int]]) -> Panel:
    kept = [a for a in range(3) if a != axis]
    window = tuple(slice(*box[a]) for a in kept)
    hu = np.asarray(np.take(case.hu, position, axis)[window], np.float32)
    labels = np.take(case.labels, position, axis)[window]
    spacing = (case.spacing_mm[kept[0]], case.spacing_mm[kept[1]])
    if axis != 0:  # head up
        hu, labels = hu[::-1], labels[::-1]
    low, high = WINDOW_HU
    grey = np.clip((np.nan_to_num(hu, nan=low) - low) / (high - low), 0, 1)
    name, sides = (
        ("axial", ("R", "L", "A", "P")),
        ("coronal", ("R", "L", "H", "F")),
        ("sagittal", ("A", "P", "H", "F")),
    )[axis]
    rgb, mm = _coloured(grey, labels, spacing)
    return Panel(name, rgb, *sides, mm)


def _fitted(shape_mm: tuple[float, float]) -> tuple[int, int, float]:
    """Height and width in pixels, and mm per pixel, that fit the panel."""
    scale = min(PANEL[0] / shape_mm[0], PANEL[1] / shape_mm[1])
    height, width = (max(1, round(n * scale)) for n in shape_mm)
    return height, width, 1 / scale


def _resized(values: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32))[None, None]
    return functional.interpolate(
        tensor, size=size, mode="bilinear", align_corners=False, antialias=True
    )[0, 0]


def _coloured(
    grey: np.ndarray, labels: np.ndarray, spacing: tuple[float, float]
) -> tuple[np.ndarray, float]:
    """The plane in grey with organs tinted and outlined, on a panel."""
    height, width, mm = _fitted((grey.shape[0] * spacing[0], grey.shape[1] * spacing[1]))
    drawn = _resized(grey, (height, width)).clamp(0, 1)[..., None].repeat(1, 1, 3)
    # Contours are smoothed over one voxel: a thick slice would show as steps.
    blur = [max(1, round(n / m)) | 1 for n, m in zip((height, width), grey.shape, strict=True)]
    for organ in ORGANS:
        mask = labels == organ.index
        if not mask.any():
            continue
        inside = _resized(mask, (height, width))
        window = _window(inside > 0.01, max(blur) + 2 * _LINE_PIXELS)
        area = inside[window][None, None]
        # One axis after the other: a voxel of a tiny scan may be as large as the panel.
        for widths in ((blur[0], 1), (1, blur[1])):
            pad = [n // 2 for n in widths]
            area = functional.avg_pool2d(area, widths, 1, pad, count_include_pad=False)
        # Lines lie inside their organ, so that neighbours' lines run side by side.
        # As steep as a pixel: an edge that is smooth to the eye.
        area = ((area - 0.5) * max(blur) + 0.5).clamp(0, 1)
        reach = 2 * _LINE_PIXELS + 1
        core = 1 - functional.max_pool2d(1 - area, reach, 1, _LINE_PIXELS)
        line, area = (area - core)[0, 0, ..., None], area[0, 0, ..., None]
        colour = torch.tensor(organ.colour, dtype=torch.float32) / 255
        part = drawn[window]
        drawn[window] = part + (colour - part) * torch.maximum(line, _FILL * area)
    return _on_panel(drawn), mm


def _window(mask: torch.Tensor, margin: int) -> tuple[slice, slice]:
    """The part of a picture (y, x) that holds ``mask``, and ``margin`` pixels around."""
    slices = []
    for axis in range(2):
        hit = torch.nonzero(mask.any(dim=1 - axis)).flatten()
        slices.append(slice(max(0, int(hit[0]) - margin), int(hit[-1]) + 1 + margin))
    return slices[0], slices[1]


def _on_panel(drawn: torch.Tensor) -> np.ndarray:
    """(y, x, 3) in 0 to 1, centred on a panel."""
    panel = np.empty((*PANEL, 3), np.uint8)
    panel[:] = BACKGROUND
    top, left = ((PANEL[i] - drawn.shape[i]) // 2 for i in range(2))
    panel[top : top + drawn.shape[0], left : left + drawn.shape[1]] = (
        (drawn * 255).round().to(torch.uint8).numpy()
    )
    return panel


def _surfaces(case: Scene, counts: list[np.ndarray]) -> list[Panel]:
    """All organs seen from the front and from the back, lit from the viewer's upper left."""
    found = [np.flatnonzero(count.any(axis=1)) for count in counts]
    if not len(found[0]):
        empty = np.full((*PANEL, 3), BACKGROUND, np.uint8)
        return [
            Panel("front", empty, "R", "L", "H", "F", 1.0),
            Panel("back", empty, "L", "R", "H", "F", 1.0),
        ]
    box = tuple(slice(int(f[0]), int(f[-1]) + 1) for f in found)
    field, owner, step = _smooth(case.labels[box], case.spacing_mm)
    front = _lit(field, owner, step)
    back = _lit(field.flip(1, 2), owner.flip(1, 2), step)
    return [
        Panel("front", front[0], "R", "L", "H", "F", front[1]),
        Panel("back", back[0], "L", "R", "H", "F", back[1]),
    ]


def _smooth(
    labels: np.ndarray, spacing_mm: tuple[float, float, float]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Smoothed occupancy (z, y, x) of the strongest organ, which it is, and the voxel in mm.

    Each organ is smoothed by itself, so that a crease stays where two of them meet.
    """
    extent = [n * s for n, s in zip(labels.shape, spacing_mm, strict=True)]
    step = max(_SURFACE_MM, max(extent) / 240)
    pad = 6
    size = [max(1, round(e / step)) for e in extent]
    whole = [n + 2 * pad for n in size]
    field = torch.zeros(whole)
    owner = torch.zeros(whole, dtype=torch.uint8)
    index = [
        np.minimum(((np.arange(n) + 0.5) * step / s).astype(int), length - 1)
        for n, s, length in zip(size, spacing_mm, labels.shape, strict=True)
    ]
    padded = np.pad(labels[np.ix_(*index)], pad)
    counts, coarse = _counts(padded), torch.from_numpy(padded)
    # Through the slices' own thickness at least: thick slices would show as steps.
    widths = [max(3, round(2 * s / step) | 1) for s in spacing_mm]
    for organ in ORGANS:
        found = [np.flatnonzero(count[:, organ.index - 1]) for count in counts]
        if not len(found[0]):
            continue
        box = tuple(slice(max(0, int(f[0]) - pad), int(f[-1]) + 1 + pad) for f in found)
        part = (coarse[box] == organ.index).float()
        for _ in range(3):
            for axis in range(3):
                part = _averaged(part, axis, widths[axis])
        # Thin organs lose height by smoothing; scaled, they keep their volume by and large.
        part = part * min(1.8, max(1.0, 0.62 / max(float(part.max()), 1e-3)))
        ahead = part > field[box]
        field[box][ahead] = part[ahead]
        owner[box][ahead] = organ.index
    return field, owner, step


def _averaged(values: torch.Tensor, axis: int, width: int) -> torch.Tensor:
    """Mean of ``width`` (odd) neighbours along an axis; outside counts as 0."""
    total = values.clone()
    size = values.shape[axis]
    for shift in range(1, min(width // 2, size - 1) + 1):
        here, there = (
            [slice(shift, None) if a == axis else slice(None) for a in range(3)],
            [slice(None, size - shift) if a == axis else slice(None) for a in range(3)],
        )
        total[tuple(here)] += values[tuple(there)]
        total[tuple(there)] += values[tuple(here)]
    return total / width


def _lit(field: torch.Tensor, owner: torch.Tensor, step: float) -> tuple[np.ndarray, float]:
    """Orthographic view along y of the surface where ``field`` passes 0.5."""
    deep, size = field.shape[1], (field.shape[0], field.shape[2])
    solid = field > 0.5
    hit = solid.any(dim=1)
    first = solid.to(torch.uint8).argmax(dim=1)
    before = (first - 1).clamp_min(0)

    def at(values: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return values.gather(1, y[:, None]).squeeze(1)

    here, there = at(field, first), at(field, before)
    depth = first - (here - 0.5) / (here - there).clamp_min(1e-3)
    normal = torch.stack(
        [
            (at(field.roll(-1, a), first) - at(field.roll(1, a), first))
            + 0.5 * (at(field.roll(-1, a), before) - at(field.roll(1, a), before))
            for a in (2, 0)
        ]
        + [at(field, (first + 1).clamp_max(deep - 1)) - there]
    )
    normal = -normal / normal.norm(dim=0).clamp_min(1e-6)
    light = torch.tensor([-0.42, 0.50, -0.76])
    light = light / light.norm()
    lambert = (normal * light[:, None, None]).sum(0).clamp_min(0)
    half = light + torch.tensor([0.0, 0.0, -1.0])
    half = half / half.norm()
    gloss = (normal * half[:, None, None]).sum(0).clamp_min(0) ** 28
    # Hollows are darker: what lies behind its surroundings gets less light.
    open_depth = torch.where(hit, depth, torch.full_like(depth, float(deep)))
    near = -functional.max_pool2d(-open_depth[None, None], 9, 1, 4)
    around = functional.avg_pool2d(near, 9, 1, 4, count_include_pad=False)[0, 0]
    shade = (1 - 0.035 * (open_depth - around).clamp(0, 14)).clamp(0.45, 1)
    palette = torch.zeros(256, 3)
    for organ in ORGANS:
        palette[organ.index] = torch.tensor(organ.colour) / 255
    colour = palette[at(owner, first).long()]
    drawn = colour * ((0.30 + 0.78 * lambert) * shade)[..., None] + 0.22 * gloss[..., None]
    drawn = drawn.clamp(0, 1)
    height, width, mm = _fitted((size[0] * step * 1.06, size[1] * step * 1.06))
    cover = _resized(hit.numpy().astype(np.float32), (height, width))
    cover = ((cover - 0.5) * 3 + 0.5).clamp(0, 1)[..., None]
    # Colours are spread a little past the edge, so that it doesn't mix with black.
    weight = hit.float()
    spread = functional.avg_pool2d((drawn * weight[..., None]).permute(2, 0, 1)[None], 5, 1, 2)
    share = functional.avg_pool2d(weight[None, None], 5, 1, 2).clamp_min(1e-3)
    filled = torch.where(hit[..., None], drawn, (spread / share)[0].permute(1, 2, 0))
    channels = [_resized(filled[..., c].flip(0).numpy(), (height, width)) for c in range(3)]
    cover = cover.flip(0)
    base = torch.tensor(BACKGROUND, dtype=torch.float32) / 255
    return _on_panel(torch.stack(channels, -1).clamp(0, 1) * cover + base * (1 - cover)), mm

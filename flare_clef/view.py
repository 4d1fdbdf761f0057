"""One plane of a scan with its labels: as a picture on disk, or in a terminal's colours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from flare_clef.errors import UsageError
from flare_clef.evaluation_inputs import read_labels_of
from flare_clef.images import Image, read_image
from flare_clef.report_pictures import Panel, plane_panel, scene

PLANES = ("axial", "coronal", "sagittal")


@dataclass(frozen=True)
class View:
    """A panel, and which slice of how many along its axis it shows (from feet, front, right)."""

    panel: Panel
    slice: int
    slices: int


def read_pair(case: Path, labels: Path) -> tuple[Image, np.ndarray]:
    """A scan and its label map (z, y, x; uint8). Raises UserError where they don't fit."""
    scan = read_image(case)
    return scan, read_labels_of(scan, labels)


def view(image: Image, labels: np.ndarray, plane: str, position: int | None) -> View:
    """The plane at slice ``position`` of the scan in canonical axes.

    Slices count from 0 at the feet, the front or the patient's right; None takes the one that
    shows most. Raises UserError.
    """
    if plane not in PLANES:
        raise UsageError(f"--plane {plane}: unknown; known are {', '.join(PLANES)}")
    shown = scene(image, labels)
    axis = PLANES.index(plane)
    slices = shown.labels.shape[axis]
    if position is not None and not 0 <= position < slices:
        raise UsageError(f"--slice {position}: the scan has {plane} slices 0 to {slices - 1}")
    panel, taken = plane_panel(shown, axis, position)
    return View(panel, taken, slices)


def terminal_text(rgb: np.ndarray, columns: int) -> str:
    """A picture (y, x, 3) in 24-bit colours, two pixels a character, ``columns`` wide."""
    used = np.flatnonzero(rgb.any(axis=(0, 2)))
    rows = np.flatnonzero(rgb.any(axis=(1, 2)))
    if len(used):
        rgb = rgb[rows[0] : rows[-1] + 1, used[0] : used[-1] + 1]
    high = max(2, round(rgb.shape[0] * columns / rgb.shape[1] / 2) * 2)
    small = functional.interpolate(
        torch.from_numpy(rgb).permute(2, 0, 1)[None].float(),
        size=(high, columns),
        mode="bilinear",
        antialias=True,
    )[0]
    pixels = small.round().clamp(0, 255).permute(1, 2, 0).to(torch.uint8).tolist()
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        cells = [
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m▀"
            for a, b in zip(upper, lower, strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)

"""``validation/``: the best and the worst case of a validation, as contours on the scan.

Three slices in canonical axes (axial with the patient's right on the left; coronal and
sagittal with the head up), the ones with the most voxels that differ. The prediction is a
solid line, the reference a dashed one, in the organ's colour. matplotlib is imported when a
picture is drawn.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from flare_clef.errors import UserError
from flare_clef.images import Image, read_image
from flare_clef.organs import ORGAN_BY_NAME, Organ
from flare_clef.preparation import canonical_axes, canonical_view
from flare_clef.training.cases import Case
from flare_clef.training.doubt import UNDECIDED

_SHOWN_HU = (-160.0, 240.0)
_PAPER, _INK, _PALE = "#101010", "#eeeeee", "#9a9a9a"
_VIEWS = ("axial", "coronal", "sagittal")


@dataclass(frozen=True)
class _Judged:
    mean: float
    case: Case
    labels: np.ndarray
    reference: np.ndarray
    scores: dict[str, float]


class BestAndWorst:
    """Keeps the label maps of two cases of a validation, whatever their number, and draws them."""

    def __init__(self) -> None:
        self._best: _Judged | None = None
        self._worst: _Judged | None = None

    def see(
        self, case: Case, labels: np.ndarray, reference: np.ndarray, scores: dict[str, float]
    ) -> None:
        """A case that was judged: label maps on its own grid, DSC by organ."""
        if not scores:
            return
        judged = _Judged(fmean(scores.values()), case, labels, reference, scores)
        if self._best is None or judged.mean > self._best.mean:
            self._best = judged
        if self._worst is None or judged.mean < self._worst.mean:
            self._worst = judged

    def write(self, folder: Path, step: int) -> list[Path]:
        """Writes ``best.png`` and ``worst.png`` into ``folder``; nothing if no case was seen."""
        written = []
        for name, judged in (("best", self._best), ("worst", self._worst)):
            if judged is None:
                continue
            path = folder / f"{name}.png"
            write_overlays(
                path,
                judged.case,
                read_image(judged.case.image),
                judged.labels,
                judged.reference,
                scores=judged.scores,
                title=f"Step {step}, {name} case",
            )
            written.append(path)
        return written


def write_overlays(
    path: Path,
    case: Case,
    image: Image,
    labels: np.ndarray,
    reference: np.ndarray,
    *,
    scores: dict[str, float] | None = None,
    title: str = "",
) -> None:
    """Draws ``labels`` and ``reference``, both on the grid of ``image``, to ``path`` (PNG).

    Organs that ``case`` has no labels for are left out of both, and so are undecided voxels.
    Raises UserError if matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        hint = 'pip install "flare-clef[train]"'
        raise UserError(f"no picture: matplotlib is missing, {hint}") from None
    axes, flips = canonical_axes(image.direction)
    spacing_mm = [image.spacing_mm[::-1][axis] for axis in axes]
    grey = canonical_view(image.array, axes, flips)
    truth = canonical_view(_only(reference, case), axes, flips)
    guess = canonical_view(np.where(reference == UNDECIDED, 0, _only(labels, case)), axes, flips)

    at = _slices(truth, guess)
    sides_mm = np.array(grey.shape) * spacing_mm
    widths = [sides_mm[2], sides_mm[2], sides_mm[1]]
    tall = max(sides_mm[0], sides_mm[1])
    figure = Figure(
        figsize=(14, 12 * tall / sum(widths) + 0.7), layout="constrained", facecolor=_PAPER
    )
    grid = figure.add_gridspec(1, 4, width_ratios=[*widths, 0.22 * sum(widths)])
    for axis, view in enumerate(_VIEWS):
        panel = figure.add_subplot(grid[0, axis])
        plane, true_plane, guessed = (
            np.take(volume, at[axis], axis=axis) for volume in (grey, truth, guess)
        )
        rows, columns = (n for k, n in enumerate(sides_mm) if k != axis)
        # In a picture rows run downwards; z runs towards the head.
        extent = (0.0, columns, rows, 0.0) if axis == 0 else (0.0, columns, 0.0, rows)
        _draw_plane(panel, plane, true_plane, guessed, extent, case)
        panel.set_title(f"{view} {at[axis] + 1} of {grey.shape[axis]}", fontsize=9, color=_PALE)
    _list_organs(figure.add_subplot(grid[0, 3]), case, scores or {})
    heading = ": ".join(part for part in (title, case.name) if part)
    if scores:
        heading += f", mean DSC {fmean(scores.values()):.3f}"
    figure.suptitle(heading, fontsize=11, color=_INK, parse_math=False)
    _save(figure, path)


def _only(labels: np.ndarray, case: Case) -> np.ndarray:
    kept = np.zeros(256, np.uint8)
    for name in case.organs:
        kept[ORGAN_BY_NAME[name].index] = ORGAN_BY_NAME[name].index
    return kept[labels]


def _slices(truth: np.ndarray, guess: np.ndarray) -> list[int]:
    """Along each axis the index with the most voxels that differ, else with the most organ."""
    wanted = truth != guess
    if not wanted.any():
        wanted = truth > 0
    return [int(wanted.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3)]


def _draw_plane(
    panel: Any,
    grey: np.ndarray,
    truth: np.ndarray,
    guess: np.ndarray,
    extent: tuple[float, float, float, float],
    case: Case,
) -> None:
    darkest, brightest = _SHOWN_HU
    left, right, bottom, top = extent
    panel.imshow(
        grey,
        cmap="gray",
        vmin=darkest,
        vmax=brightest,
        extent=extent,
        origin="upper" if bottom > top else "lower",
        interpolation="bilinear",
    )
    rows, columns = grey.shape
    # Voxel centres, from the picture's first row on.
    y = (np.arange(rows) + 0.5) * max(bottom, top) / rows
    x = (np.arange(columns) + 0.5) * right / columns
    for name in case.organs:
        organ = ORGAN_BY_NAME[name]
        for plane, style, width in ((truth, "dashed", 1.0), (guess, "solid", 1.3)):
            mask = plane == organ.index
            if mask.any() and min(mask.shape) > 1:  # matplotlib draws none through a single row
                panel.contour(
                    x, y, mask, [0.5], colors=[_colour(organ)], linestyles=style, linewidths=width
                )
    panel.set_xlim(left, right)
    panel.set_ylim(bottom, top)
    panel.set_aspect("equal")
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)


def _list_organs(panel: Any, case: Case, scores: dict[str, float]) -> None:
    """The organs with their colours, the worst first, and what the two lines mean."""
    panel.axis("off")
    panel.set_xlim(0, 1)
    panel.set_ylim(16.5, -1)
    names = sorted(case.organs, key=lambda name: scores.get(name, 2.0))
    for row, name in enumerate(names):
        organ = ORGAN_BY_NAME[name]
        panel.plot(0.03, row, "s", color=_colour(organ), markersize=7, clip_on=False)
        panel.text(0.10, row, organ.title, fontsize=9, color=_INK, va="center")
        if name in scores:
            panel.text(
                1.0, row, f"{scores[name]:.2f}", fontsize=9, color=_INK, ha="right", va="center"
            )
    for row, (text, style) in enumerate((("prediction", "solid"), ("reference", "dashed"))):
        place = len(names) + 0.8 + row
        panel.plot([0.0, 0.07], [place, place], color=_PALE, linestyle=style, linewidth=1.3)
        panel.text(0.10, place, text, fontsize=9, color=_PALE, va="center")


def _colour(organ: Organ) -> list[float]:
    return [part / 255 for part in organ.colour]


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", dpi=110, facecolor=_PAPER)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)

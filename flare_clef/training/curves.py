"""``curves.png`` of a run: loss and DSC per organ over steps, from the run's own logs.

Reads ``metrics.jsonl`` (a record a step) and ``validation.jsonl`` (DSC of each case and organ
at some steps). matplotlib is imported when the picture is drawn.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flare_clef.errors import UserError
from flare_clef.organs import ORGANS

_INK, _PALE = "#333333", "#8a8a8a"
_POINTS = 400
"""Points of a line: a picture is 1,000 pixels wide, a run may have 100,000 steps."""
_TERMS = {
    "ce": ("cross entropy", "#3b76af"),
    "dice_loss": ("Dice loss", "#c77c2b"),
    "decoding": ("decoding", "#3b76af"),
    "discriminativeness": ("discriminativeness", "#c77c2b"),
    "equivariance": ("equivariance", "#4f9a5f"),
}
"""Parts of the losses, by their name in the log."""
_FIGURES = {
    "far_similarity": "Mean similarity of far voxels' features (1: collapsed)",
    "feature_rank": "Effective rank of the features (1: collapsed)",
}
"""What tells of a collapse in pre-training, by name in the log."""


@dataclass(frozen=True)
class Run:
    """What the logs of a run hold; a step that was run again after a break counts once."""

    steps: np.ndarray
    """(n,) steps done, from 1, ascending."""
    loss: np.ndarray
    """(n,); NaN where a step was skipped."""
    terms: dict[str, np.ndarray]
    """(n,) of each part of the loss and of each figure that tells of a collapse."""
    dice: np.ndarray
    """(n, 13) soft Dice of the training case; NaN where the organ is not labelled in it."""
    frozen_from: int | None
    """First step with frozen normalisation statistics."""
    validation: dict[int, dict[str, float]]
    """By step, by organ: mean DSC over the validation cases."""
    validation_loss: dict[int, float]
    """By step."""


def read_run(folder: Path) -> Run:
    """The logs under ``folder``. Raises UserError if there is no step in them."""
    records = {record["step"]: record for record in _lines(folder / "metrics.jsonl")}
    if not records:
        raise UserError(f"{folder / 'metrics.jsonl'}: no step in it, so there is no curve to draw")
    rows = [records[step] for step in sorted(records)]
    logged = {key for row in rows for key in row}
    dice = [row.get("dice") or [None] * len(ORGANS) for row in rows]
    frozen = [row["step"] + 1 for row in rows if row.get("frozen")]
    tables = {line["step"]: line["dice"] for line in _lines(folder / "validation.jsonl")}
    return Run(
        steps=np.array([row["step"] + 1 for row in rows]),
        loss=_column(rows, "loss"),
        terms={name: _column(rows, name) for name in (*_TERMS, *_FIGURES) if name in logged},
        dice=np.array(dice, dtype=float),
        frozen_from=frozen[0] if frozen else None,
        validation={step: _organ_means(tables[step]) for step in sorted(tables)},
        validation_loss={
            line["step"]: line["loss"] for line in _lines(folder / "validation_loss.jsonl")
        },
    )


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    """Records of a log; a last line that a killed run left half-written is passed over."""
    if not path.is_file():
        return
    with path.open() as log:
        for line in log:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    values = (row.get(name) for row in rows)
    numbers = np.array([value if _is_number(value) else math.nan for value in values], float)
    return np.where(np.isfinite(numbers), numbers, math.nan)


def _organ_means(table: dict[str, dict[str, float]]) -> dict[str, float]:
    means = {}
    for organ in ORGANS:
        values = [row[organ.name] for row in table.values() if organ.name in row]
        if values:
            means[organ.name] = sum(values) / len(values)
    return means


def smooth(
    steps: np.ndarray, values: np.ndarray, centre: Callable[[np.ndarray], Any] = np.mean
) -> tuple[np.ndarray, np.ndarray]:
    """A line of what a noisy figure comes to: ``centre`` over at most 40 equal parts.

    NaN are left out; each part's step is the mean of the steps that count in it.
    """
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if not len(steps):
        return steps.astype(float), values
    parts = min(40, max(1, len(steps) // 5))
    return (
        np.array([part.mean() for part in np.array_split(steps, parts)]),
        np.array([centre(part) for part in np.array_split(values, parts)]),
    )


def write_curves(folder: Path) -> Path:
    """Draws ``folder/curves.png`` from the logs beside it and returns its path.

    Raises UserError if there are no steps yet, matplotlib is missing or the file cannot be written.
    """
    run = read_run(folder)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        hint = 'pip install "flare-clef[train]"'
        raise UserError(f"no curves: matplotlib is missing, {hint}") from None
    drawn: list[Callable[[Any], None]] = [lambda panel: _draw_loss(panel, run)]
    if np.isfinite(run.dice).any() or run.validation:
        drawn.append(lambda panel: _draw_training_dice(panel, run))
        drawn.append(lambda panel: _draw_validation(panel, run))
    for name in _FIGURES:
        if name in run.terms:
            drawn.append(partial(_draw_figure, run=run, name=name))
    figure = Figure(figsize=(10, 1.2 + 2.8 * len(drawn)), layout="constrained")
    panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for panel, draw in zip(panels, drawn, strict=True):
        draw(panel)
        _finish(panel, run)
    panels[-1].set_xlabel("step", fontsize=9, color=_INK)
    path = folder / "curves.png"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=110)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _draw_loss(panel: Any, run: Run) -> None:
    every = max(1, len(run.steps) // _POINTS)
    panel.plot(run.steps[::every], run.loss[::every], ".", color=_PALE, alpha=0.35, markersize=3)
    panel.plot(*smooth(run.steps, run.loss, np.median), color=_INK, linewidth=1.8, label="loss")
    for name, (label, colour) in _TERMS.items():
        if name in run.terms:
            line = smooth(run.steps, run.terms[name], np.median)
            panel.plot(*line, color=colour, linewidth=1.1, label=label)
    if run.validation_loss:
        points = zip(*sorted(run.validation_loss.items()), strict=True)
        panel.plot(*points, "o-", color="#b03060", linewidth=1.3, markersize=4, label="validation")
    if run.frozen_from is not None:
        panel.plot([], [], color=_PALE, linewidth=0.9, linestyle=":", label="statistics frozen")
    skipped = int(np.isnan(run.loss).sum())
    note = f"; {skipped} without a finite loss" if skipped else ""
    panel.set_title(f"Training loss, {len(run.steps)} steps{note}", loc="left", fontsize=10)
    _legend(panel)


def _draw_training_dice(panel: Any, run: Run) -> None:
    for organ in ORGANS:
        steps, values = smooth(run.steps, run.dice[:, organ.index - 1])
        if len(steps):
            label = f"{organ.title}  {values[-1]:.2f}"
            panel.plot(steps, values, color=_colour(organ), linewidth=1.3, label=label)
    panel.set_title("Soft Dice of the training cases", loc="left", fontsize=10)
    panel.set_ylim(0, 1)
    _legend(panel)


def _draw_figure(panel: Any, run: Run, name: str) -> None:
    every = max(1, len(run.steps) // _POINTS)
    values = run.terms[name]
    panel.plot(run.steps[::every], values[::every], ".", color=_PALE, alpha=0.35, markersize=3)
    panel.plot(*smooth(run.steps, values, np.median), color=_INK, linewidth=1.8)
    panel.set_title(_FIGURES[name], loc="left", fontsize=10)


def _draw_validation(panel: Any, run: Run) -> None:
    panel.set_title("DSC of the validation cases", loc="left", fontsize=10)
    panel.set_ylim(0, 1)
    if not run.validation:
        panel.text(0.5, 0.5, "not judged yet", transform=panel.transAxes, ha="center", color=_PALE)
        return
    for organ in ORGANS:
        points = [(s, m[organ.name]) for s, m in run.validation.items() if organ.name in m]
        if points:
            label = f"{organ.title}  {points[-1][1]:.2f}"
            panel.plot(
                *zip(*points, strict=True),
                "o-",
                color=_colour(organ),
                linewidth=1.1,
                markersize=3.5,
                label=label,
            )
    means = [(step, sum(m.values()) / len(m)) for step, m in run.validation.items() if m]
    if means:
        panel.plot(
            *zip(*means, strict=True), color=_INK, linewidth=2.4, label=f"Mean  {means[-1][1]:.2f}"
        )
    _legend(panel)


def _legend(panel: Any) -> None:
    panel.legend(
        loc="upper left", bbox_to_anchor=(1.005, 1.03), fontsize=7.5, frameon=False,
        labelcolor=_INK,
    )  # fmt: skip


def _finish(panel: Any, run: Run) -> None:
    if run.frozen_from is not None:
        panel.axvline(run.frozen_from, color=_PALE, linewidth=0.9, linestyle=":")
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(colors=_INK, labelsize=8)
    last = max([int(run.steps[-1]), *run.validation, *run.validation_loss])
    panel.set_xlim(int(run.steps[0]) - 1, last)


def _colour(organ: Any) -> list[float]:
    return [part / 255 for part in organ.colour]

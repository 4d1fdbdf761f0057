"""Pictures of an evaluation: box plots per organ, and cases with their labels side by side.

matplotlib is imported when a picture is drawn. Pictures show canonical axes: axial slices with
the patient's right on the left, coronal ones with the head up.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flare_clef.errors import UserError
from flare_clef.evaluation import Evaluation
from flare_clef.evaluation_inputs import LabelMap, Pair, misplacement, read_label_map
from flare_clef.evaluation_summary import table
from flare_clef.images import Image, read_image
from flare_clef.metrics import OrganScore
from flare_clef.organs import ORGAN_BY_NAME, Organ
from flare_clef.paths import replacing
from flare_clef.preparation import canonical_axes, canonical_view

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _PALE = "#333333", "#8a8a8a"
_SHOWN_HU = (-160.0, 240.0)
_OPACITY = 0.6


def _new_figure(size_inches: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            'no picture: matplotlib is missing, pip install "flare-clef[measure]"'
        ) from None
    return Figure(figsize=size_inches, layout="constrained")


def draw_box_plots(evaluation: Evaluation, path: Path) -> None:
    """DSC and NSD of every organ as boxes (PNG): median, quartiles, whiskers of 1.5 times
    their distance, and every case as a dot."""
    organs = sorted({row.organ for row in evaluation.rows}, key=lambda organ: organ.index)
    places = np.arange(len(organs))
    figure = _new_figure((2.4 + 0.62 * len(organs), 7))
    panels = figure.subplots(2, 1, sharex=True)
    for panel, score in zip(panels, ("dsc", "nsd"), strict=True):
        columns = [column[~np.isnan(column)] for column in table(evaluation, score).values.T]
        boxes = panel.boxplot(
            columns,
            positions=places,
            widths=0.6,
            patch_artist=True,
            showfliers=False,
            medianprops={"color": _INK, "linewidth": 1.4},
        )
        for box, organ in zip(boxes["boxes"], organs, strict=True):
            box.set(facecolor=[*_colour(organ), 0.55], edgecolor=_INK, linewidth=0.8)
        for place, column in zip(places, columns, strict=True):
            # Spread by the golden ratio: equal scores stay apart, the picture never changes.
            spread = (np.arange(len(column)) * 0.618034 % 1 - 0.5) * 0.4
            panel.plot(place + spread, column, "o", color=_INK, markersize=2.2, alpha=0.6)
        panel.set_ylim(-0.02, 1.02)
        panel.set_ylabel(score.upper(), fontsize=10, color=_INK)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.tick_params(colors=_INK, labelsize=9, bottom=False)
    titles = [f"{o.title} ({len(c)})" for o, c in zip(organs, columns, strict=True)]
    panels[-1].set_xticks(places, titles, rotation=40, ha="right", rotation_mode="anchor")
    panels[-1].set_xlim(-0.6, len(organs) - 0.4)
    panels[0].set_title(
        f"{len(evaluation.cases)} case(s), {evaluation.rules} rules; a dot is a case",
        fontsize=9,
        color=_PALE,
        loc="left",
    )
    _save(figure, path)


def draw_case(
    pair: Pair, scores: Mapping[str, OrganScore], path: Path, scan: Path | None = None
) -> str:
    """Reference and prediction of a case beside each other (PNG), the organs scored only.

    The axial and the coronal slice shown are those with the most voxels that differ. ``scan``
    lies below the colours; one that does not fit is left out, and what is returned says why.
    Raises UserError where a file cannot be read or the shapes of the two label maps differ.
    """
    if pair.prediction is None:
        raise UserError(f"{pair.reference}: no picture, as there is no prediction")
    reference, prediction = read_label_map(pair.reference), read_label_map(pair.prediction)
    if reference.labels.shape != prediction.labels.shape:
        raise UserError(f"{pair.prediction}: no picture, as its shape is not the reference's")
    axes, flips = canonical_axes(reference.image.direction)
    spacing_mm = [reference.image.spacing_mm[::-1][axis] for axis in axes]
    truth, guess = (
        canonical_view(_only(volume, scores), axes, flips) for volume in (reference, prediction)
    )
    grey, misfit = None, ""
    if scan is not None:
        image = read_image(scan)
        misfit = _misfit(scan, image, reference)
        grey = None if misfit else canonical_view(image.array, axes, flips)

    differs = truth != guess
    axial = int(differs.sum(axis=(1, 2)).argmax())
    coronal = int(differs.sum(axis=(0, 2)).argmax())
    if grey is None:
        grey, darkest, brightest = np.zeros_like(truth), 0.0, 1.0
    else:
        darkest, brightest = _SHOWN_HU
    height_mm, depth_mm, width_mm = np.array(truth.shape) * spacing_mm
    figure = _new_figure((10, 1.0 + 3.8 * (height_mm + depth_mm) / width_mm))
    grid = figure.add_gridspec(2, 3, width_ratios=(1, 1, 0.42), height_ratios=(depth_mm, height_mm))
    for column, (title, labels) in enumerate((("reference", truth), ("prediction", guess))):
        for row, (view, below, above, aspect) in enumerate(
            (
                ("axial", grey[axial], labels[axial], spacing_mm[1] / spacing_mm[2]),
                # Rows run downwards in a picture, z towards the head.
                (
                    "coronal",
                    grey[::-1, coronal],
                    labels[::-1, coronal],
                    spacing_mm[0] / spacing_mm[2],
                ),
            )
        ):
            panel = figure.add_subplot(grid[row, column])
            panel.imshow(below, cmap="gray", vmin=darkest, vmax=brightest, aspect=aspect)
            panel.imshow(_coloured(above), aspect=aspect, interpolation="nearest")
            panel.set_title(f"{title}, {view}", fontsize=9, color=_INK)
            panel.set_xticks([])
            panel.set_yticks([])
    _list_scores(figure.add_subplot(grid[:, 2]), scores)
    mean = np.mean([score.dsc for score in scores.values()])
    figure.suptitle(f"{pair.case}: mean DSC {mean:.3f}", fontsize=11, color=_INK, parse_math=False)
    _save(figure, path)
    return misfit


def _only(volume: LabelMap, scores: Mapping[str, OrganScore]) -> np.ndarray:
    kept = np.zeros(256, dtype=np.uint8)
    for name in scores:
        kept[ORGAN_BY_NAME[name].index] = ORGAN_BY_NAME[name].index
    return kept[volume.labels]


def _misfit(path: Path, scan: Image, reference: LabelMap) -> str:
    """Why the scan at ``path`` cannot lie below the labels of ``reference``; empty if it can."""
    if scan.array.shape != reference.labels.shape:
        return f"{path}: its shape is not that of {reference.path}"
    apart = misplacement(scan, reference.image, reference.path)
    return f"{path}: {apart}" if apart else ""


def _coloured(labels: np.ndarray) -> np.ndarray:
    """(rows, columns, 4) float, 0 to 1; background is transparent."""
    palette = np.zeros((256, 4))
    for organ in ORGAN_BY_NAME.values():
        palette[organ.index] = [*_colour(organ), _OPACITY]
    return palette[labels]


def _colour(organ: Organ) -> list[float]:
    return [part / 255 for part in organ.colour]


def _list_scores(panel: Any, scores: Mapping[str, OrganScore]) -> None:
    panel.axis("off")
    panel.set_xlim(0, 1)
    panel.set_ylim(15, -1)
    panel.text(1.0, -0.2, "DSC", fontsize=8, color=_PALE, ha="right", va="center")
    for row, (name, score) in enumerate(sorted(scores.items(), key=lambda item: item[1].dsc)):
        organ = ORGAN_BY_NAME[name]
        panel.plot(0.03, row + 0.8, "s", color=_colour(organ), markersize=8, clip_on=False)
        panel.text(0.12, row + 0.8, organ.title, fontsize=8, color=_INK, va="center")
        panel.text(
            1.0, row + 0.8, f"{score.dsc:.2f}", fontsize=8, color=_INK, ha="right", va="center"
        )


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)

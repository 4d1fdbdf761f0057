"""The picture of a stress test: organs by perturbations, coloured by DSC."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.paths import replacing


def draw_heat_map(table: dict[str, dict[str, float | None]], title: str, path: Path) -> None:
    """``table``: DSC by perturbation and organ name; None stays white. Writes a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, organs = list(table), list(next(iter(table.values())))
    values = np.array([[np.nan if v is None else v for v in table[r].values()] for r in rows])
    figure = Figure(figsize=(3 + 0.62 * len(organs), 1.9 + 0.34 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(organs)), [ORGAN_BY_NAME[o].short for o in organs], rotation=40)
    axes.set_yticks(range(len(rows)), rows)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, size=8)
    axes.set_title(title, size=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")

"""From a run to the safetensors file that inference reads."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import torch

from flare_clef.network import SegmentationNetwork
from flare_clef.training.cases import Case
from flare_clef.training.recipe import Recipe
from flare_clef.training.validation import DiceTable, means
from flare_clef.version import __version__
from flare_clef.weights import save_weights


def export(
    path: Path,
    network: SegmentationNetwork,
    recipe: Recipe,
    cases: list[Case],
    table: DiceTable,
    *,
    steps: int,
    hours: float,
) -> None:
    """Writes ``network`` with the record of how it was made and what it reached."""
    record: dict[str, Any] = {
        "flare_clef": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "steps": steps,
        "hours": round(hours, 2),
        "recipe": json.loads(json.dumps(dataclasses.asdict(recipe))),
        "trained_on": {case.name: case.source for case in cases},
        "validation_dice": table,
        "validation_means": {name: round(v, 4) for name, v in means(table).items()},
        "notes": recipe.export.notes,
    }
    save_weights(
        path,
        network,
        grid=recipe.finetune.stages[-1].grid,
        record=record,
        licence=recipe.export.licence,
    )

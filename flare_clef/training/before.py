"""What the weights that fine-tuning starts from reach on the cases kept aside.

Without it nobody can tell whether the training was worth its time. They are judged as they
were exported, operating points included: what ``predict --weights`` does with them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from flare_clef.training.backbone import load_fitting
from flare_clef.training.cases import Case
from flare_clef.training.logs import forget_steps_from
from flare_clef.training.loop import Trainer
from flare_clef.training.processes import rank, wait
from flare_clef.training.run import Run
from flare_clef.training.validation import means, validate

_LOG = "validation.jsonl"


def judge_start(run: Run, trainer: Trainer, aside: Sequence[Case]) -> None:
    """Logs the DSC of ``finetune.start``, a weights file, as that of step 0; once a run."""
    if trainer.step == 0 and rank() == 0:
        path = run.base / run.recipe.finetune.start
        weights = load_fitting(path, run.recipe.network, "make [network] the same")
        table = validate(weights.network(), aside, weights.grid, run.precision_on_cpu)
        forget_steps_from(run.folder / _LOG, 0)
        trainer.log(_LOG, {"step": 0, "dice": table})
        rows = "  ".join(f"{organ} {value:.3f}" for organ, value in means(table).items())
        run.say(f"{path.name} as it is, at {weights.grid}^3: {rows}")
    wait()


def means_before(folder: Path) -> dict[str, float]:
    """Mean DSC per organ that :func:`judge_start` logged in a run; {} where it did not."""
    log = folder / _LOG
    if not log.is_file():
        return {}
    first = json.loads(log.read_text().partition("\n")[0] or "{}")
    return means(first["dice"]) if first.get("step") == 0 else {}

"""What fine-tuning starts from, and what that reaches on the cases kept aside.

Without it nobody can tell whether the training was worth its time. Weights are judged as they
were exported, operating points included: what ``predict --weights`` does with them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flare_clef.errors import UserError
from flare_clef.network import SegmentationNetwork, UNet
from flare_clef.training.backbone import BACKBONE, load_fitting, load_start
from flare_clef.training.cases import Case
from flare_clef.training.logs import forget_steps_from
from flare_clef.training.loop import Trainer
from flare_clef.training.processes import rank, wait
from flare_clef.training.provenance import START_TRAINED_ON, TRAINED_ON
from flare_clef.training.run import Run
from flare_clef.training.validation import DiceTable, means, validate
from flare_clef.weights import load_weights

_LOG = "validation.jsonl"


def find_start(run: Run) -> SegmentationNetwork | UNet | None:
    """What fine-tuning begins with: ``finetune.start``, else the run's own pre-training."""
    named = run.recipe.finetune.start
    if named:
        return load_start(run.base / named, run.recipe.network)
    if run.recipe.pretrain is None:
        return None
    path = run.folder / "pretraining" / BACKBONE
    if not path.is_file():
        raise UserError(
            f"{path}: not there; run train pretrain first, or leave it out with "
            "--set pretrain=false"
        )
    return load_start(path, run.recipe.network)


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


def learnt_before(
    run: Run, start: SegmentationNetwork | UNet | None, aside: Sequence[Case]
) -> dict[str, str]:
    """Source by name of the cases that the weights file ``finetune.start`` has learnt from.

    Warns where some of them are kept aside now. {} where the run starts otherwise.
    """
    if not run.recipe.finetune.start or not isinstance(start, SegmentationNetwork):
        return {}
    path = run.base / run.recipe.finetune.start
    return warn_of_learnt(run, path.name, load_weights(path).record, aside)


def warn_of_learnt(
    run: Run, name: str, record: dict[str, Any], aside: Sequence[Case]
) -> dict[str, str]:
    """The cases that weights with this record have learnt from; a line if ``aside`` has some."""
    learnt = {**record.get(START_TRAINED_ON, {}), **record.get(TRAINED_ON, {})}
    known = sorted(case.name for case in aside if case.name in learnt)
    if known and rank() == 0:
        more = ", ..." if len(known) > 5 else ""
        run.say(
            f"warning: {name} has learnt from {', '.join(known[:5])}{more}, kept aside: the DSC of "
            "these says little of other scans"
        )
    return learnt


def means_before(folder: Path, table: DiceTable) -> dict[str, float]:
    """Mean DSC per organ that :func:`judge_start` logged in a run, of the cases in ``table``.

    {} where it was not called, or judged other cases.
    """
    log = folder / _LOG
    if not log.is_file():
        return {}
    first = json.loads(log.read_text().partition("\n")[0] or "{}")
    same = first.get("step") == 0 and first["dice"].keys() == table.keys()
    return means(first["dice"]) if same else {}

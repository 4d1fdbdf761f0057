"""The stages of a training one after the other, on the folder of a run.

RUN/prepared/      prepared volumes        RUN/pretraining/   log, checkpoints, backbone
RUN/run.json       what it is made from    RUN/               log, checkpoints, weights
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flare_clef.errors import UserError
from flare_clef.network import SegmentationNetwork
from flare_clef.organs import ORGANS
from flare_clef.training import provenance
from flare_clef.training.backbone import BACKBONE, save_backbone
from flare_clef.training.calibration import calibrate_on
from flare_clef.training.cases import Case
from flare_clef.training.curves import write_curves
from flare_clef.training.export import export
from flare_clef.training.finetuning import Finetuning
from flare_clef.training.loop import Trainer
from flare_clef.training.operating_points import find_operating_points, move
from flare_clef.training.overlays import BestAndWorst
from flare_clef.training.pretraining import Pretraining
from flare_clef.training.processes import rank, wait
from flare_clef.training.progress import TrainingProgress
from flare_clef.training.recipe import Recipe
from flare_clef.training.run import Run, split
from flare_clef.training.start import (
    find_start,
    judge_start,
    learnt_before,
    means_before,
    warn_of_learnt,
)
from flare_clef.training.tensorboard import TensorBoardLog
from flare_clef.training.validation import DiceTable, means, validate
from flare_clef.training.weights_mean import load_others, take_mean
from flare_clef.weights import Weights, round_as_stored

WEIGHTS = "weights.safetensors"
CURVES_EVERY_SECONDS = 300
"""Pre-training has no validation at which to draw them."""


def all_stages(run: Run) -> Path:
    """Pre-trains, if the recipe says so, fine-tunes and exports; returns the weights' file."""
    if run.recipe.pretrain is not None:
        if start := run.recipe.finetune.start:
            raise UserError(
                f"finetune.start = {start!r}: it would stand in for the pre-training; leave it "
                "out, or the pre-training with --set pretrain=false"
            )
        _others(run)
        pretrain(run)
    return finetune(run)


def pretrain(run: Run) -> Path:
    """Pre-trains on all scans but those kept aside; returns the backbone's file."""
    plan = run.recipe.pretrain
    if plan is None:
        raise UserError("pretrain: the recipe has no [pretrain] table; add one")
    trained, _ = split(run, run.labelled(needed=False))
    cases = trained + run.unlabelled()
    if not cases:
        raise UserError("pretrain: no scans; name a folder with --data or data.unlabelled")
    prepared = run.prepare(cases)
    run.describe(cases, provenance.PRETRAINING_CASES)
    plan = plan.for_cases(len(prepared))
    run.say(f"pre-training: {len(prepared)} scan(s), {plan.steps} steps at {plan.grid}^3")
    trainer = Pretraining(
        plan,
        prepared,
        run.folder / "pretraining",
        architecture=run.recipe.network,
        precision=run.precision,
        device=run.device,
    )
    with _shown(run, trainer, plan.steps):
        backbone = trainer.run()
    path = run.folder / "pretraining" / BACKBONE
    if rank() == 0:
        save_backbone(path, backbone, run.recipe.network)
        run.say(f"wrote {path}")
    wait()
    return path


def finetune(run: Run) -> Path:
    """Fine-tunes, judges on the cases kept aside, exports; returns the weights' file."""
    recipe, plan = run.recipe, run.recipe.finetune
    start = find_start(run)
    _others(run)  # a file that doesn't fit is told before the training, not after it
    cases = run.labelled()
    trained, aside = split(run, cases)
    # Those kept aside are checked now as well, not when they are first needed.
    prepared = run.prepare([*trained, *aside])
    prepared, prepared_aside = prepared[: len(trained)], prepared[len(trained) :]
    if plan.patience_epochs and not aside:
        raise UserError(
            "finetune.patience_epochs: early stopping needs cases kept aside; set data.folds or "
            "data.validation"
        )
    plan = plan.for_cases(len(prepared))

    def judge(network: SegmentationNetwork, grid: int) -> DiceTable:
        shown = BestAndWorst()
        table = validate(network, aside, grid, run.precision_on_cpu, on_case=shown.see)
        run.draw(lambda: shown.write(run.folder / "validation", trainer.step))
        rows = "  ".join(f"{organ} {value:.3f}" for organ, value in means(table).items())
        run.say(f"validation at {grid}^3: {rows}")
        return table

    every = recipe.validate_every_steps
    trainer = Finetuning(
        plan,
        prepared,
        run.folder,
        architecture=recipe.network,
        start=start,
        precision=run.precision,
        kept_aside=prepared_aside,
        validate=judge if aside else None,
        validate_at=range(every, plan.steps, every),
        device=run.device,
    )
    if trainer.step:
        provenance.check_split(run.folder, aside)
    finished = trainer.ended or trainer.step >= plan.steps
    description = run.describe(
        [*trained, *aside],
        kept_aside=aside,
        begun=trainer.step > 0,
        finished=finished,
        start_trained_on=learnt_before(run, start, aside),
    )
    run.say(
        f"fine-tuning: {len(trained)} case(s), {len(aside)} kept aside, "
        + ("all steps done before" if finished else f"{plan.steps} steps at most")
    )
    if (last := plan.stages[-1]).block and last.freeze_after >= 1:
        run.say(
            "warning: the last stage is in blocks and never freezes (freeze_after): predict will "
            "see whole bodies with the normalisation statistics of blocks"
        )
    if aside and plan.start and isinstance(start, SegmentationNetwork):
        judge_start(run, trainer, aside)
    with _shown(run, trainer, plan.steps):
        network = trainer.run()
    if trainer.ended:
        best = "; the network of the lowest is exported" if trainer.best_is_there else ""
        run.say(
            f"stopped early after step {trainer.step}: no lower validation loss in "
            f"{plan.patience_epochs} epoch(s){best}"
        )
    path = run.folder / WEIGHTS
    if rank() == 0:
        _export(run, trainer, network, description, (trained, aside), path)
    wait()
    return path


def export_run(run: Run) -> Path:
    """Exports the network that the run's checkpoint holds, finished or not."""
    description = provenance.read_run(run.folder)
    run.recipe = as_trained(run)
    cases = run.labelled()
    trained, aside = split(run, cases)
    provenance.check_split(run.folder, aside)
    trainer = Finetuning(
        run.recipe.finetune,
        run.prepare([*trained, *aside])[: len(trained)],
        run.folder,
        architecture=run.recipe.network,
        precision=run.precision,
    )
    if trainer.step == 0:
        raise UserError(f"{run.folder}: no checkpoint of a fine-tuning; run train finetune first")
    path = run.folder / WEIGHTS
    # What is exported how may be decided after the training.
    taken = provenance.as_json(run.recipe)
    description["recipe"].update({key: taken[key] for key in ("network", "finetune", "export")})
    _export(run, trainer, trainer.result(), description, (trained, aside), path)
    return path


def _export(
    run: Run,
    trainer: Finetuning,
    network: SegmentationNetwork,
    description: dict[str, Any],
    cases: tuple[Sequence[Case], Sequence[Case]],
    path: Path,
) -> None:
    """Of the first process alone: nothing in here may wait for the others."""
    trained, aside = cases
    grid = run.recipe.finetune.stages[-1].grid
    if run.recipe.finetune.patience_epochs and not trainer.best_is_there:
        run.say("warning: no network of the lowest validation loss here; the last one is exported")
    others = _others(run)
    network = network.cpu()
    for weights in others:
        warn_of_learnt(run, weights.path.name, weights.record, aside)
    take_mean(network, others)
    points = dict(run.recipe.export.offsets)
    if points:
        move(network, np.array([points.get(organ.name, 0.0) for organ in ORGANS]))
    if run.recipe.export.operating_points:
        chosen, whose = (aside, "case(s) kept aside") if aside else (trained, "training case(s)")
        points = _move_to_operating_points(run, network, chosen, whose, grid)
    # What is judged is what the file will hold.
    round_as_stored(network)
    shown = BestAndWorst()
    precision = run.precision_on_cpu
    table = validate(network, aside, grid, precision, on_case=shown.see) if aside else {}
    before = means_before(run.folder, table)
    for organ, value in means(table).items():
        was = f"  (before {before[organ]:.3f})" if organ in before else ""
        run.say(f"  {organ:22s} {value:.3f}{was}")
    if table:
        trainer.log("validation.jsonl", {"step": trainer.step, "dice": table})
        run.draw(lambda: shown.write(run.folder / "validation", trainer.step))
        run.draw(lambda: write_curves(run.folder))
    calibration = None
    wanted = run.recipe.export.calibration_volumes
    if count := min(wanted, len(trained)):
        fewer = f" ({wanted} asked for)" if count < wanted else ""
        run.say(f"calibrating 8-bit inference on {count} training volume(s){fewer}")
        # Spread over the cases, whose names often follow their sources.
        chosen = [trained[round(i * (len(trained) - 1) / max(1, count - 1))] for i in range(count)]
        calibration = calibrate_on(network, run.prepare_here(chosen), grid)
    export(
        path,
        network,
        description,
        table,
        calibration=calibration,
        operating_points=points,
        kept_aside=aside,
        precision=precision,
        steps=trainer.step,
        hours=trainer.seconds / 3600,
        mean_with=[weights.record for weights in others],
        say=run.say,
    )
    run.say(f"wrote {path}")


def _move_to_operating_points(
    run: Run, network: SegmentationNetwork, cases: Sequence[Case], whose: str, grid: int
) -> dict[str, float]:
    """The offset of each organ's logit. Organs that ``cases`` have no labels of keep 0."""
    found = find_operating_points(network, run.prepare_here(cases), grid, run.precision_on_cpu)
    move(network, found.offsets)
    line = f"operating points by {len(cases)} {whose}: mean DSC on the network's grid"
    line += f" {found.before:.3f} without"
    if len(cases) > 1:
        line += f", {found.left_out:.3f} for a case that did not choose them"
    run.say(line)
    return {o.name: float(v) for o, v in zip(ORGANS, found.offsets, strict=True)}


def _others(run: Run) -> list[Weights]:
    """The weights of ``export.mean_with``; raises UserError where one does not fit the recipe."""
    files = [run.base / name for name in run.recipe.export.mean_with]
    return load_others(files, run.recipe.network)


def as_trained(run: Run) -> Recipe:
    """The recipe given, with the network and the training that the run had: those made it."""
    given, own = run.recipe, provenance.finetuned_with(run.folder)
    for key in ("network", "finetune"):
        if getattr(given, key) != getattr(own, key):
            run.say(f"warning: [{key}] differs from the recipe of this run, which is taken")
    data = replace(given.data, grid=own.data.grid)
    if not (data.validation or data.folds) and (own.data.validation or own.data.folds):
        # By name: folds would be drawn anew over the cases that are there today.
        aside = provenance.read_run(run.folder).get(provenance.KEPT_ASIDE, ())
        there = sorted(run.labelled_names().intersection(aside))
        if there:
            run.say(f"kept aside as in this run's training: {', '.join(there)}")
        data = replace(data, validation=tuple(there))
    return replace(given, network=own.network, finetune=own.finetune, data=data)


@contextmanager
def _shown(run: Run, trainer: Trainer, steps: int) -> Iterator[None]:
    """While training: a progress bar, event files and ``curves.png`` of the trainer's folder."""
    if rank():
        yield
        return
    progress = TrainingProgress(steps, quiet=run.quiet)
    events = TensorBoardLog(trainer.folder / "tensorboard", trainer.step)
    say, run.say = run.say, progress.line
    drawn_at = time.monotonic()

    def draw_curves() -> None:
        nonlocal drawn_at
        run.draw(lambda: write_curves(trainer.folder))
        drawn_at = time.monotonic()

    def on_step(record: dict[str, Any]) -> None:
        progress.step(record)
        events.step(record)
        if time.monotonic() - drawn_at > CURVES_EVERY_SECONDS:
            draw_curves()
        if record.get("skipped"):
            progress.line(
                f"step {record['step'] + 1}: skipped, the loss of {record['case']} is not finite"
            )

    def on_validation(step: int, table: DiceTable) -> None:
        events.validation(step, means(table))
        draw_curves()

    trainer.on_step, trainer.on_validation = on_step, on_validation
    try:
        yield
    finally:
        progress.close()
        events.close()
        run.say = say
        if (trainer.folder / "metrics.jsonl").exists():
            draw_curves()

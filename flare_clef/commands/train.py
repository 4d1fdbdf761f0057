"""``flare-clef train``: from scans to a weights file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from flare_clef.commands.train_bend import bend
from flare_clef.commands.train_prepare import prepare
from flare_clef.commands.train_propagate import propagate

if TYPE_CHECKING:
    from flare_clef.training.run import Run

CALIBRATION_VOLUMES = 6


class _RecipeFirst(TyperGroup):
    """``train RECIPE.toml`` is short for ``train run RECIPE.toml``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0].endswith(".toml"):
            args = ["run", *args]
        return super().resolve_command(ctx, args)


train = typer.Typer(
    name="train",
    cls=_RecipeFirst,
    help="Make the weights from your own scans: train RECIPE.toml --output RUN does it all, the "
    "commands below one stage each.",
    no_args_is_help=True,
)
train.command()(prepare)
train.command()(propagate)
train.command()(bend)

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE.toml", help="The recipe.", show_default=False)
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="RUN",
        show_default=False,
        help="The run's folder: logs, checkpoints, prepared volumes, weights.safetensors.",
    ),
]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        help="A folder with images/, labels/ and cases.json (or another known layout), in place "
        "of the recipe's (repeatable).",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key, as finetune.seed=1."),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; by default the usable cores.")
]
Precision = Annotated[
    str,
    typer.Option(
        metavar="auto|fp32|bf16",
        help="auto: on a GPU bf16, on a CPU the faster in a trial; a run goes on as it began.",
    ),
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto takes a GPU if any.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, only the results.")]


@train.command()
def run(
    recipe_path: RecipePath,
    output: Output,
    data: Data = None,
    set_: Overrides = None,
    threads: Threads = None,
    precision: Precision = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """All stages: prepare, pre-train (if the recipe has it), fine-tune, export.

    Run again with the same RUN folder to go on where it was broken off.
    """
    from flare_clef.training import pipeline

    _train(
        pipeline.all_stages, recipe_path, output, data, set_, threads, precision, device, quiet
    )  # fmt: skip


@train.command()
def pretrain(
    recipe_path: RecipePath,
    output: Output,
    data: Data = None,
    set_: Overrides = None,
    threads: Threads = None,
    precision: Precision = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train the backbone without labels, by the recipe's table pretrain."""
    from flare_clef.training import pipeline

    _train(
        pipeline.pretrain, recipe_path, output, data, set_, threads, precision, device, quiet
    )  # fmt: skip


@train.command()
def finetune(
    recipe_path: RecipePath,
    output: Output,
    data: Data = None,
    set_: Overrides = None,
    threads: Threads = None,
    precision: Precision = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train with labels (Dice + cross entropy), judge on the cases kept aside, export.

    Begins with finetune.start, else with what train pretrain left in RUN, if the recipe has one.
    Run again with the same RUN folder to go on from its last checkpoint.
    """
    from flare_clef.training import pipeline

    _train(
        pipeline.finetune, recipe_path, output, data, set_, threads, precision, device, quiet
    )  # fmt: skip


@train.command()
def export(
    recipe_path: RecipePath,
    output: Output,
    data: Data = None,
    set_: Overrides = None,
    threads: Threads = None,
    precision: Precision = "auto",
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help=f"Find ranges and offsets for 8 bits on {CALIBRATION_VOLUMES} training volumes.",
        ),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write RUN's weights file; where cases are kept aside, predict must agree with validation."""
    from flare_clef.training import pipeline

    if calibrate and not any("calibration_volumes" in text for text in set_ or ()):
        set_ = [*(set_ or ()), f"export.calibration_volumes={CALIBRATION_VOLUMES}"]

    _train(
        pipeline.export_run, recipe_path, output, data, set_, threads, precision, "cpu", quiet
    )  # fmt: skip


def _train(
    action: Callable[[Run], object],
    recipe_path: Path,
    output: Path,
    data: list[Path] | None,
    overrides: list[str] | None,
    threads: int | None,
    precision: str,
    device: str,
    quiet: bool,
) -> None:
    import torch

    from flare_clef.errors import UsageError
    from flare_clef.limits import keep_memory, usable_cores
    from flare_clef.precision import choose_device, choose_precision
    from flare_clef.training.pipeline import export_run
    from flare_clef.training.processes import (
        from_first,
        join_processes,
        leave_processes,
        rank,
    )
    from flare_clef.training.provenance import computing_of
    from flare_clef.training.recipe import load_recipe
    from flare_clef.training.run import Run
    from flare_clef.training.run_lock import only_training_in
    from flare_clef.training.stopping import Stopped

    recipe = load_recipe(recipe_path, overrides or ())
    # Who computes activations twice to save memory wants the heap's gaps back, too.
    if not any(p and p.activation_checkpointing for p in (recipe.finetune, recipe.pretrain)):
        keep_memory()
    cores = threads or usable_cores()
    torch.set_num_threads(cores)
    place = join_processes(choose_device(device)[0])
    if precision in ("fp16", "int8"):
        raise UsageError(f"--precision {precision}: training knows auto, fp32 and bf16")
    former = computing_of(output, place.type)
    if precision == "auto" and "precision" in former:
        chosen, why = former["precision"], "as this run began; --precision changes it"
    else:
        # On GPUs bf16: fp16 has too few exponents for gradients.
        wanted = "bf16" if precision == "auto" and place.type == "cuda" else precision
        # Timings differ from process to process: the first one's hold.
        chosen, why = from_first(choose_precision(wanted, place, cores))

    def say(text: str) -> None:
        if rank() == 0:
            typer.echo(text)

    if not quiet:
        say(f"{place}, {cores} thread(s), {chosen} ({why})")
    began = former.get("precision"), former.get("threads")
    if former and began != (chosen, cores):
        say(
            f"warning: this run began with {began[0]} on {began[1]} "
            "thread(s); what comes now differs from it by rounding"
        )
    # An export only reads what a training that goes on has kept.
    alone = rank() == 0 and action is not export_run
    try:
        with only_training_in(output) if alone else nullcontext():
            action(Run(recipe, recipe_path.parent, output, chosen, place, say, data or (), quiet))
    except Stopped as stopped:
        typer.echo(f"flare-clef: {stopped}; the checkpoint is kept, run again to go on", err=True)
        raise typer.Exit(stopped.exit_code) from None
    finally:
        leave_processes()

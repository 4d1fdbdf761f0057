"""``flare-clef train``: from labelled scans to a weights file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flare_clef.commands.train_prepare import prepare

if TYPE_CHECKING:
    from flare_clef.network import SegmentationNetwork
    from flare_clef.training.recipe import Recipe

train = typer.Typer(
    name="train", help="Make the weights from your own scans.", no_args_is_help=True
)


@train.callback()
def _train() -> None:
    pass


train.command()(prepare)


@train.command()
def finetune(
    recipe_path: Annotated[
        Path, typer.Argument(metavar="RECIPE.toml", help="The recipe.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="RUN",
            show_default=False,
            help="The run's folder: log, checkpoints, prepared volumes, weights.safetensors.",
        ),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder with images/, labels/ and cases.json, in place of the recipe's "
            "(repeatable).",
            show_default=False,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key, as finetune.seed=1."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; by default the usable cores.")
    ] = None,
    precision: Annotated[
        str, typer.Option(metavar="auto|fp32|bf16", help="auto times what is faster here.")
    ] = "auto",
) -> None:
    """Train with labels (Dice + cross entropy), judge on the cases kept aside, export.

    Run again with the same RUN folder to go on from its last checkpoint.
    """
    import time

    import torch

    from flare_clef.limits import keep_memory, usable_cores
    from flare_clef.precision import choose_precision
    from flare_clef.training.cases import find_cases, prepare_case
    from flare_clef.training.export import export
    from flare_clef.training.finetuning import Finetuning
    from flare_clef.training.recipe import load_recipe
    from flare_clef.training.validation import means, validate

    keep_memory()
    cores = threads or usable_cores()
    torch.set_num_threads(cores)
    recipe = load_recipe(recipe_path, set_ or ())
    chosen, why = choose_precision(precision, torch.device("cpu"), cores)
    typer.echo(f"{cores} thread(s), {chosen} ({why})")
    folders = data or [recipe_path.parent / folder for folder in recipe.data.folders]
    cases = [case for folder in folders for case in find_cases(folder)]
    kept_aside = [case for case in cases if case.name in recipe.data.validation]
    trained = [case for case in cases if case.name not in recipe.data.validation]
    typer.echo(f"{len(trained)} case(s) to train on, {len(kept_aside)} kept aside")
    prepared = [prepare_case(case, output / "prepared", recipe.data.grid) for case in trained]

    began = time.monotonic()
    plan = recipe.finetune

    def show(record: dict[str, Any]) -> None:
        if record["step"] % 20 == 0 or record["step"] == plan.steps - 1:
            left = (plan.steps - record["step"] - 1) * record["seconds"]
            typer.echo(
                f"step {record['step'] + 1}/{plan.steps}  loss {record['loss']:.3f}  "
                f"{record['seconds']:.1f} s a step, about {left / 60:.0f} min at this pace"
            )

    def judge(network: Any, grid: int) -> dict[str, dict[str, float]]:
        table = validate(network, kept_aside, grid, chosen)
        rows = "  ".join(f"{organ} {value:.3f}" for organ, value in means(table).items())
        typer.echo(f"validation at {grid}^3: {rows}")
        return table

    every = recipe.validate_every_steps
    run = Finetuning(
        plan,
        prepared,
        output,
        architecture=recipe.network,
        start=_start(recipe_path, recipe),
        precision=chosen,
        validate=judge if kept_aside else None,
        validate_at=range(every, plan.steps, every),
        on_step=show,
    )
    network = run.run()
    table = judge(network, plan.stages[-1].grid) if kept_aside else {}
    export(
        output / "weights.safetensors",
        network,
        recipe,
        trained,
        table,
        steps=plan.steps,
        hours=(time.monotonic() - began) / 3600,
    )
    typer.echo(f"wrote {output / 'weights.safetensors'}")


def _start(recipe_path: Path, recipe: Recipe) -> SegmentationNetwork | None:
    """The network that the recipe starts from, or None. Raises UserError if it cannot be."""
    from flare_clef.errors import UserError
    from flare_clef.weights import load_weights

    if not recipe.finetune.start:
        return None
    weights = load_weights(recipe_path.parent / recipe.finetune.start)
    if weights.architecture != recipe.network:
        raise UserError(
            f"{recipe_path}: finetune.start = {recipe.finetune.start!r}: its network is "
            f"{weights.architecture}, the recipe's {recipe.network}; make [network] the same"
        )
    return weights.network()

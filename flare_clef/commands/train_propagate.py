"""``flare-clef train propagate``: labels for an organ that some of your cases lack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flare_clef.commands.train_options import NewSet, Quiet, Workers, check_elsewhere
from flare_clef.errors import EXIT_FAILED, UsageError


def propagate(
    atlases: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Label maps that have the organ, numbered as predict's; no images.",
        ),
    ],
    cases: Annotated[
        Path,
        typer.Option(
            metavar="DIR", show_default=False, help="The cases that lack it: a training set."
        ),
    ],
    organ: Annotated[
        str, typer.Option(metavar="NAME", show_default=False, help="The organ, as duodenum.")
    ],
    output: NewSet,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Label an organ by label maps of other people: certain, ruled out or undecided voxels.

    From 15 label maps on, four small networks learn from them, some minutes each.
    Writes a training set: labels/, images/ (links), cases.json, and beside them
    probabilities/ (255 is 1) and summary.json. Run again after a break to go on.
    """
    from flare_clef.limits import usable_cores
    from flare_clef.organs import ORGAN_BY_NAME
    from flare_clef.training import propagation
    from flare_clef.training.datasets import read_dataset

    if organ not in ORGAN_BY_NAME:
        raise UsageError(f"--organ {organ}: not an organ; one of {', '.join(ORGAN_BY_NAME)}")
    dataset = read_dataset(cases)
    check_elsewhere(output, cases)
    counts: dict[str, int] = {}

    def done(what: str) -> None:
        counts[what] = counts.get(what, 0) + 1
        if not quiet and counts[what] % (1 if what == "network" else 25) == 0:
            typer.echo(f"{counts[what]} x {what}")

    result = propagation.propagate(
        atlases,
        list(dataset.cases),
        ORGAN_BY_NAME[organ],
        output,
        workers or usable_cores(),
        on_done=done,
    )
    problems = [*dataset.problems, *result.problems]
    for problem in problems:
        typer.echo(f"flare-clef: {problem}", err=True)
    made = [entry for entry in result.cases.values() if entry["labels"] == "propagated"]
    if not quiet and result.calibration is not None:
        held = result.calibration.expected_dsc
        typer.echo(
            f"{len(made)} case(s) labelled, {len(result.cases) - len(made)} kept their own labels; "
            f"{len(problems)} problem(s)\n"
            f"DSC of {organ} on {len(held)} atlases left out in turn: "
            f"{sum(held) / len(held):.3f} ({min(held):.3f} to {max(held):.3f})\n"
            f"wrote {output}"
        )
    if problems or not result.cases:
        raise typer.Exit(EXIT_FAILED)

"""``flare-clef train bend``: labelled scans in the shapes of other people's organs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flare_clef.commands.train_options import NewSet, Quiet, Workers, check_elsewhere
from flare_clef.errors import EXIT_FAILED


def bend(
    shapes: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Label maps, numbered 1 to 13 as predict's; no images.",
        ),
    ],
    cases: Annotated[
        Path,
        typer.Option(
            metavar="DIR", show_default=False, help="The labelled scans to bend: a training set."
        ),
    ],
    output: NewSet,
    count: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Bent scans to make; by default one for each label map.",
            show_default=False,
        ),
    ] = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Bend labelled scans until their organs have the shapes that label maps show.

    Scans and label maps take turns; a case is named CASE_as_LABELMAP. Writes
    a training set: images/, labels/, cases.json, and probabilities/ where the
    scans have them. Run again after a break to go on.
    """
    from flare_clef.limits import usable_cores
    from flare_clef.training.bent_sets import bend_all
    from flare_clef.training.datasets import read_dataset

    dataset = read_dataset(cases)
    check_elsewhere(output, cases)

    def done(name: str, before: float, after: float) -> None:
        if not quiet:
            typer.echo(f"{name}: DSC with those shapes {before:.2f}, bent {after:.2f}")

    result = bend_all(
        shapes,
        dataset.cases,
        output,
        count=count,
        workers=workers or usable_cores(),
        on_done=done,
    )
    problems = [*dataset.problems, *result.problems]
    for problem in problems:
        typer.echo(f"flare-clef: {problem}", err=True)
    if not quiet:
        typer.echo(f"{len(result.cases)} scan(s) bent, {len(problems)} problem(s); wrote {output}")
    if problems or not result.cases:
        raise typer.Exit(EXIT_FAILED)

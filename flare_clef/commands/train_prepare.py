"""``flare-clef train prepare``: checks every case of a training set and prepares it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flare_clef.errors import EXIT_FAILED

if TYPE_CHECKING:
    from flare_clef.training.cases import Case


def prepare(
    data: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA",
            show_default=False,
            help="Folders of cases: images/, labels/ and cases.json; nnU-Net's raw layout; the "
            "challenge's. Images without labels are for pre-training.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="RUN", show_default=False, help="The run's folder."),
    ],
    grid: Annotated[
        int, typer.Option(min=16, help="Voxels along each axis of the prepared volumes.")
    ] = 192,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Scans at once; by default as cores and memory allow.", show_default=False
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only what is wrong.")] = False,
) -> None:
    """Check every case, name all the bad ones, prepare the others (under RUN/prepared).

    Run again after a break: what is prepared already is kept. Exit code 1 if a case is bad.
    """
    import torch

    from flare_clef.limits import usable_cores
    from flare_clef.progress import Progress
    from flare_clef.training.datasets import read_datasets
    from flare_clef.training.preparing import prepare_all

    torch.set_num_threads(1 if workers is None or workers > 1 else usable_cores())
    dataset = read_datasets(data)
    progress = Progress(len(dataset.cases), quiet=quiet)

    def done(case: Case) -> None:
        progress.stage(case.name, "prepared")
        progress.case_done()

    result = prepare_all(dataset.cases, output / "prepared", grid, workers=workers, on_case=done)
    progress.close()
    for warning in result.warnings:
        progress.line(f"warning: {warning}")
    problems = [*dataset.problems, *result.problems]
    for problem in problems:
        progress.line(f"flare-clef: {problem}", error=True)
    labelled = sum(case.case.labels is not None for case in result.prepared)
    if not quiet:
        typer.echo(
            f"{len(result.prepared)} case(s) prepared at {grid}^3 in {output / 'prepared'}: "
            f"{labelled} with labels, {len(result.prepared) - labelled} without; "
            f"{len(problems)} problem(s)"
        )
    if problems or not result.prepared:
        raise typer.Exit(EXIT_FAILED)

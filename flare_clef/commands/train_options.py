"""Options of the commands that make a training set of another one: propagate and bend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flare_clef.errors import UserError

NewSet = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", show_default=False, help="The new training set."),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Processes; by default the usable cores.", show_default=False),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only what is wrong.")]


def check_elsewhere(output: Path, cases: Path) -> None:
    """Raises UserError where the new set would lie in the old one's folder."""
    if output.resolve() == cases.resolve():
        raise UserError(f"--output {output}: holds the cases themselves; name another folder")

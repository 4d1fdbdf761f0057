"""The command line: registers the commands, turns errors into one line and an exit code.

Each command lives in ``flare_clef/commands/`` and imports what is heavy (torch, SimpleITK)
only when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from flare_clef.commands.evaluate import evaluate
from flare_clef.commands.phantom import phantom
from flare_clef.commands.profile import profile
from flare_clef.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED, UserError
from flare_clef.version import __version__

app = typer.Typer(
    name="flare-clef",
    help="13 abdominal organs from a CT scan, as labels on the scan's own grid.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
MEASURE = "Measure"
app.command(rich_help_panel=MEASURE)(evaluate)
app.command(rich_help_panel=MEASURE)(phantom)
app.command(rich_help_panel=MEASURE, context_settings={"ignore_unknown_options": True})(profile)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flare-clef {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


class Terminated(BaseException):
    """SIGTERM, as an exception, so that temporary files are removed on the way out."""


def _on_sigterm(signum: int, frame: object) -> None:
    raise Terminated


def main() -> None:
    """Entry point of ``flare-clef`` and ``python -m flare_clef``."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        app()
    except UserError as error:
        print(f"flare-clef: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except Terminated:
        sys.exit(EXIT_TERMINATED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(EXIT_FAILED)

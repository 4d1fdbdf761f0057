"""The command line: registers the commands, turns errors into one line and an exit code.

Each command lives in ``flare_clef/commands/`` and imports what is heavy (torch, SimpleITK)
only when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from flare_clef.commands.evaluate import evaluate
from flare_clef.commands.info import info
from flare_clef.commands.phantom import phantom
from flare_clef.commands.predict import predict
from flare_clef.commands.profile import profile
from flare_clef.commands.stress import stress
from flare_clef.commands.train import train
from flare_clef.commands.view import view
from flare_clef.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EXIT_USAGE,
    UsageError,
    UserError,
)
from flare_clef.version import __version__

SEGMENT, MEASURE = "Segment", "Measure"

app = typer.Typer(
    name="flare-clef",
    help="13 abdominal organs from a CT scan, as labels on the scan's own grid.",
    epilog="Exit codes: 0 all done, 1 a case or the command failed, 2 wrong usage, "
    "130 Ctrl-C, 143 terminated. Not for diagnosis.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(rich_help_panel=SEGMENT)(predict)
app.command(rich_help_panel=SEGMENT)(info)
app.command(rich_help_panel=SEGMENT)(view)
app.command(rich_help_panel=MEASURE)(evaluate)
app.command(rich_help_panel=MEASURE)(phantom)
app.command(rich_help_panel=MEASURE)(stress)
app.command(rich_help_panel=MEASURE, context_settings={"ignore_unknown_options": True})(profile)
app.add_typer(train, rich_help_panel="Train")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flare-clef {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def _leave(code: int) -> NoReturn:
    """Ends the process now: threads that read, write or compute are not waited for."""
    if "flare_clef.writing" in sys.modules:
        sys.modules["flare_clef.writing"].remove_temporary_files()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or EXIT_FAILED
    os._exit(code)


def _on_signal(signum: int, frame: object) -> None:
    name = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[signal.Signals(signum)]
    print(f"\nflare-clef: {name}; finished cases are kept", file=sys.stderr)
    _leave(EXIT_INTERRUPTED if signum == signal.SIGINT else EXIT_TERMINATED)


def _open_closed_streams() -> None:
    """A file that is opened next must not get the number of a stream that the caller closed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            while (opened := os.open(os.devnull, os.O_RDWR)) < number:
                pass
            stream = os.fdopen(opened, "w" if number else "r", encoding="utf-8")
            setattr(sys, name, stream)


def _refuse_empty_arguments() -> None:
    """An empty path would mean the folder that one stands in."""
    own = sys.argv[1:]
    if "--" in own:
        own = own[: own.index("--")]
    for argument in own:
        if not argument or (argument.startswith("--") and argument.endswith("=")):
            name = f" ({argument})" if argument else ""
            hint = "; put -- before the command" if own[0] == "profile" else ""
            raise UsageError(f"an argument is empty{name}; is a variable not set?{hint}")


def main() -> None:
    """Entry point of ``flare-clef`` and ``python -m flare_clef``."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # A terminal that has no such sign shows another; it ends nothing.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Read when torch is loaded. A thread that waits by spinning takes the core from the one
    # waited for: with other work on the machine, small operations took ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGINT, _on_signal)
    signal.signal(signal.SIGTERM, _on_signal)
    try:
        _refuse_empty_arguments()
        app()
    except UserError as error:
        print(f"flare-clef: {error}", file=sys.stderr)
        _leave(EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED)
    except MemoryError:
        print("flare-clef: out of memory; free some, or bring less at a time", file=sys.stderr)
        _leave(EXIT_FAILED)
    except OSError as error:
        # What no module foresaw, such as a full disk behind stdout.
        where = f"{error.filename}: " if error.filename else ""
        print(f"flare-clef: {where}{error.strerror or error}", file=sys.stderr)
        _leave(EXIT_FAILED)
    except SystemExit as end:
        try:
            sys.stdout.flush()
        except OSError as error:
            print(f"flare-clef: stdout: {error.strerror or error}", file=sys.stderr)
            _leave(EXIT_FAILED)
        # Python takes most of a second to take torch apart; training has more to put away.
        if "torch" in sys.modules and "flare_clef.training" not in sys.modules:
            _leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise

"""``flare-clef profile``: run a command and measure what it takes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flare_clef.errors import EXIT_FAILED, UserError, one_line
from flare_clef.paths import check_writable

if TYPE_CHECKING:
    from flare_clef.resources import ResourceProfiler

_FORWARDED = ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_FROM_TERMINAL = ("SIGINT", "SIGQUIT")


def profile(
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND", help="What to run and its arguments, after --."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder for profile.csv, .json and .png."
        ),
    ] = Path("profile"),
    interval_s: Annotated[
        float, typer.Option("--interval-s", min=0.01, max=60.0, help="Seconds between samples.")
    ] = 0.1,
) -> None:
    """Run COMMAND and measure its time, RAM, CPU and GPU every 0.1 s.

    Counted are the command and all its descendants. Areas under the curves are
    sums of samples times 0.1 s, as in the FLARE22 challenge. The command keeps
    its input, output, signals and exit code.

    A container is no descendant of "docker run": profile inside it.

    Example: flare-clef profile -- flare-clef predict scan.nii.gz labels.nii.gz
    """
    from flare_clef.resources import ResourceProfiler

    check_writable(output)
    profiler = ResourceProfiler(interval_s)
    if hasattr(signal, "SIGCHLD"):
        # Where the caller ignores it, the kernel throws exit codes away.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        raise UserError(
            f"{command[0]}: cannot be run ({error.strerror}); give a program that exists, "
            "and its arguments after --"
        ) from None
    with _forwarding_signals(child):
        profiler.start(child.pid)
        if hasattr(os, "waitid"):
            # It stays a zombie until the last sample, which so has all its CPU time.
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        else:
            child.wait()
        profiler.stop()
        code = child.wait()
    if code < 0:
        code = 128 - code  # ended by a signal: the number a shell gives it
    print(_table(command, code, profiler.result()), file=sys.stderr)
    try:
        _write(profiler, command, code, output)
    except UserError as error:
        print(f"flare-clef: {error}", file=sys.stderr)
        code = code or EXIT_FAILED
    raise typer.Exit(code)


@contextlib.contextmanager
def _forwarding_signals(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Signals to this process go on to ``child``, whose end then ends this one.

    Ctrl-C at a terminal already reaches the whole foreground group, so that one is only kept
    from ending the profiler first.
    """

    def forward(number: int, frame: object) -> None:
        if signal.Signals(number).name in _FROM_TERMINAL and _is_in_foreground():
            return
        child.send_signal(number)

    numbers = [getattr(signal, name) for name in _FORWARDED if hasattr(signal, name)]
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_in_foreground() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _write(profiler: ResourceProfiler, command: list[str], code: int, folder: Path) -> None:
    from flare_clef.resource_plots import draw_profile

    profiler.write_csv(folder / "profile.csv")
    profiler.write_json(folder / "profile.json", command=command, exit_code=code)
    written = "profile.csv, profile.json"
    if importlib.util.find_spec("matplotlib") is None:
        written += '; no picture: matplotlib is missing, pip install "flare-clef[measure]"'
    else:
        picture = folder / "profile.png"
        try:
            draw_profile(profiler.result(), picture, title=shlex.join(command))
        except UserError:
            raise
        except Exception as error:  # of matplotlib: the command's exit code matters more
            raise UserError(
                f"{picture}: cannot be drawn ({one_line(error)}); the figures are in profile.json"
            ) from None
        written += ", profile.png"
    print(f"  {folder}: {written}", file=sys.stderr)


def _table(command: list[str], code: int, result: dict[str, Any]) -> str:
    shown = shlex.join(command)
    lines = [
        f"flare-clef profile: {shown if len(shown) <= 80 else shown[:79] + '…'}",
        f"  exit code {code}, {result['wall_s']:.2f} s, {result['cpu_s']:.2f} s of CPU time, "
        f"{result['samples']} samples every {result['interval_s']:g} s",
        f"  {'':<24}{'maximum':>14}{'area':>18}",
    ]
    share = f"% of {result['cores']} cores"
    for column, label, unit in (
        ("ram_mb", f"RAM ({result['memory_kind']})", "MB"),
        ("cpu_percent", "CPU, command", "%"),
        ("machine_cpu_percent", "CPU, whole machine", "%"),
        ("gpu_memory_mb", "GPU memory, whole card", "MB"),
        ("gpu_percent", "GPU utilisation", "%"),
    ):
        maximum, area = result["maxima"][column], result["areas"][f"{column}_s"]
        shown_maximum = "–" if maximum is None else f"{maximum:,.0f} {unit}"
        shown_area = "–" if area is None else f"{area:,.0f} {unit}·s"
        remark = f"  {share}" if column.endswith("cpu_percent") else ""
        lines.append(f"  {label:<24}{shown_maximum:>14}{shown_area:>18}{remark}")
    lines.append(f"  challenge: {result['tolerance']['verdict']}")
    lines += [f"  note: {note}" for note in result["notes"]]
    return "\n".join(lines)

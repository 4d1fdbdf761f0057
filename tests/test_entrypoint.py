"""``docker/entrypoint.sh`` outside of the image: which program gets its arguments."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import typer

from flare_clef.cli import app

ENTRYPOINT = Path(__file__).parents[1] / "docker" / "entrypoint.sh"
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """A PATH on which ``flare-clef``, every command of it and ``ls`` are programs."""
    for name in ("flare-clef", "ls", *COMMANDS):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        program.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.parametrize("command", COMMANDS)
def test_our_commands_come_before_programs_of_their_names(command: str, programs: dict[str, str]):
    assert said(programs, command, "a b") == f"flare-clef {command} a b"


def test_options_are_ours_programs_are_run_and_the_rest_is_ours(programs: dict[str, str]):
    assert said(programs, "--version") == "flare-clef --version"
    assert said(programs, "ls", "x") == "ls x"
    assert said(programs, "no-such-program") == "flare-clef no-such-program"


def said(environment: dict[str, str], *arguments: str) -> str:
    return subprocess.run(
        ["sh", str(ENTRYPOINT), *arguments], env=environment, capture_output=True, text=True
    ).stdout.strip()

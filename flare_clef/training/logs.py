"""The logs of a run: a JSON object a line, added to as the run goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flare_clef.errors import UserError


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Adds a line. Raises UserError where the disk is full."""
    try:
        with path.open("a") as log:
            log.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); the last checkpoint is kept: make "
            "room and run the same command again"
        ) from None


def forget_steps_from(path: Path, step: int) -> None:
    """Drops the records of steps that the checkpoint does not know: they are done again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except ValueError:  # the line at which the run was killed
            continue
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text("".join(f"{line}\n" for line in kept))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); make room and run the same command "
            "again"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)

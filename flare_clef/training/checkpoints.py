"""Checkpoints of a run: written atomically, the last two kept, read without unpickling code."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

LAST = "checkpoint.pt"
BEFORE = "checkpoint.before.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` as the last checkpoint of ``folder``; the one before stays beside it."""
    temporary = folder / f".{LAST}.{os.getpid()}"
    try:
        torch.save(state, temporary)
        last = folder / LAST
        if last.exists():
            os.replace(last, folder / BEFORE)
        os.replace(temporary, last)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint of ``folder`` that can be read, or None."""
    for name in (LAST, BEFORE):
        path = folder / name
        if not path.exists():
            continue
        try:
            return torch.load(path, weights_only=True, map_location="cpu")  # type: ignore[no-any-return]
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            print(f"{path}: cannot be read ({str(error).splitlines()[0]})", file=sys.stderr)
    return None

"""Checkpoints of a run: written atomically, the last two kept, read without unpickling code.

They are zip archives, whose own checksums (CRC-32) tell a damaged one.
"""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from flare_clef.errors import UserError, one_line

LAST = "checkpoint.pt"
BEFORE = "checkpoint.before.pt"
BEST = "best.pt"
DAMAGED = "checkpoint.damaged.pt"
_UNREADABLE = (
    *(RuntimeError, EOFError, OSError, ValueError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)


def save_checkpoint(folder: Path, state: dict[str, Any], name: str = LAST) -> None:
    """Writes ``state`` as ``name`` in ``folder``; the last one's predecessor stays beside it.

    Raises UserError where the disk is full or the folder gone; what was there is kept.
    """
    temporary = folder / f".{name}.{os.getpid()}"
    target = folder / name
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if name == LAST and target.exists():
            os.replace(target, folder / BEFORE)
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        # torch wraps some of the system's errors in a RuntimeError of several lines.
        cause = error if isinstance(error, OSError) else error.__context__
        reason = (cause.strerror if isinstance(cause, OSError) else None) or "disk full?"
        raise UserError(
            f"{target}: the checkpoint cannot be written ({reason}); the last good one is kept: "
            "make room and run the same command again"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint of ``folder`` that can be read, or None if there is none.

    A damaged last one makes room, lest the next takes the place of the good one before it.
    Raises UserError where there are some and none can be read: a run is not begun anew over
    what is left of an older one.
    """
    damaged = []
    for name in (LAST, BEFORE):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = _read(path)
        except _UNREADABLE as error:
            print(f"{path}: cannot be read ({one_line(error)})", file=sys.stderr)
            damaged.append(path)
            continue
        if damaged:
            os.replace(folder / LAST, folder / DAMAGED)
        return state
    if damaged:
        raise UserError(f"{damaged[-1]}: no checkpoint of this run can be read; remove {folder}")
    return None


def load_best(folder: Path) -> dict[str, Any]:
    """The best network of a run with early stopping. Raises UserError where it cannot be read."""
    try:
        return _read(folder / BEST)
    except _UNREADABLE as error:
        raise UserError(
            f"{folder / BEST}: cannot be read ({one_line(error)}); remove it, and `train export` "
            "takes the last network"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    # torch does not compare the checksums: a flipped bit would be a wrong number.
    with zipfile.ZipFile(path) as archive:
        spoilt = archive.testzip()
    if spoilt is not None:
        raise ValueError(f"the checksum of {spoilt} is wrong")
    return torch.load(path, weights_only=True, map_location="cpu")  # type: ignore[no-any-return]

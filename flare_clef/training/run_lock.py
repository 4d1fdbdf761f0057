"""One training at a time in a run's folder: two would write each other's logs and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flare_clef.errors import UserError
from flare_clef.locks import take_lock

FILE_NAME = ".lock"


@contextmanager
def only_training_in(run: Path) -> Iterator[None]:
    """Holds ``run`` while the block runs.

    Raises UserError where another process holds it or it cannot be written to.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / FILE_NAME).open("a")
    except OSError as error:
        raise UserError(f"{run}: cannot be written to ({error.strerror})") from None
    with file:
        if not take_lock(file.fileno(), wait=False):
            raise UserError(
                f"{run}: another training works in this folder; wait for it, stop it, or name "
                "another folder with --output"
            )
        yield

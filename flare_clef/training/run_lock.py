"""One training at a time in a run's folder: two would write each other's logs and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flare_clef.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: trust the user
    fcntl = None  # type: ignore[assignment]

FILE_NAME = ".lock"


@contextmanager
def only_training_in(run: Path) -> Iterator[None]:
    """Holds ``run`` while the block runs; the system lets go if the process is killed.

    Raises UserError where another process holds it.
    """
    if fcntl is None:
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / FILE_NAME).open("a")
    except OSError as error:
        raise UserError(f"{run}: cannot be written to ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run}: another training works in this folder; wait for it, stop it, or name "
                "another folder with --output"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield

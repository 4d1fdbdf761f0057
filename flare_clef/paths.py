"""What must be known of a path before a library gets it, and files written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from flare_clef.errors import UserError


def check_name(path: Path) -> None:
    """Raises UserError for a name that is not UTF-8: on it ITK ends the whole process."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{printable(path)}: a name that is not UTF-8; rename it") from None


def check_writable(folder: Path, *, make: bool = True) -> None:
    """Makes ``folder`` if it is not there. Raises UserError where no file can be put into it.

    For the time before hours of work whose result goes there. Without ``make`` it is only seen
    whether it could be made.
    """
    check_name(folder)
    reason = "Permission denied"
    try:
        if folder.is_symlink() and not folder.exists():
            raise UserError(f"{folder}: a link to nothing; choose another folder")
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            reason = "Not a directory"
        elif os.access(there, os.W_OK | os.X_OK):
            return
    except OSError as error:
        reason = error.strerror or str(error)
    raise UserError(f"{folder}: cannot be written ({reason}); choose another folder")


def behind_link(path: Path) -> Path:
    """Where a link leads, else ``path``: renaming a new file to it would replace the link."""
    return path.resolve() if path.is_symlink() else path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` once all is written.

    Raises ``UserError`` where it cannot be written; nothing is left behind then.
    """
    path = behind_link(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise UserError(f"{path}: cannot be written ({reason}); choose another place") from None
        raise


def printable(path: Path | str) -> str:
    """``path`` with what is not UTF-8 as escapes such as ``\\xe9``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def checksum(path: Path) -> str:
    """SHA-256 of the file, hexadecimal."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )

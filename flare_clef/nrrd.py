"""NRRD headers: the geometry lines of a scan's, repeated as they are.

NRRD holds the product of direction and spacing; ITK takes it apart on reading and multiplies
again on writing, which changes the last bit. A label map therefore gets its scan's own lines.
Fields: https://teem.sourceforge.net/nrrd/format.html, section 5 ("space ...").
"""

from __future__ import annotations

import re
from pathlib import Path

_GEOMETRY = (b"space", b"space dimension", b"space directions", b"space origin", b"space units")
_LONGEST_HEADER_BYTES = 2**20


def geometry_lines(path: Path) -> tuple[bytes, ...]:
    """The lines that place a 3-D NRRD file (or its ``.nhdr``) in space; empty without any."""
    header, _ = _split(path)
    lines = tuple(line for line in header.splitlines() if _field(line) in _GEOMETRY)
    directions = b" ".join(line for line in lines if _field(line) == b"space directions")
    # Only what ITK reads as three axes; a fourth one has "none" in its place.
    usable = len(re.findall(rb"\([^()]*\)", directions)) == 3 and b"none" not in directions
    return lines if usable else ()


def new_header(path: Path, shape: tuple[int, ...], geometry: tuple[bytes, ...]) -> bytes:
    """The header of the NRRD file ``path`` for a volume of ``shape`` (z, y, x), empty line too.

    With the lines ``geometry``, if any, in the place of its own.
    """
    replaced = (b"sizes", *(_GEOMETRY if geometry else ()))
    kept = [line for line in _split(path)[0].splitlines() if _field(line) not in replaced]
    # The format's mark stays the first line; a field that places an axis needs their number.
    at = next(n for n, line in enumerate(kept) if _field(line) == b"dimension") + 1
    kept.insert(at, b"sizes: " + b" ".join(b"%d" % n for n in reversed(shape)))
    return b"\n".join([*kept, *geometry]) + b"\n\n"


def _split(path: Path) -> tuple[bytes, int]:
    """The header up to its empty line, and where the voxels begin."""
    with path.open("rb") as file:
        start = file.read(_LONGEST_HEADER_BYTES)
    end = re.search(rb"\r?\n\r?\n", start)
    return (start, len(start)) if end is None else (start[: end.start()], end.end())


def _field(line: bytes) -> bytes:
    """The field's name; a key of the user's has ``:=`` and is none."""
    name, separator, rest = line.partition(b":")
    return name.strip().lower() if separator and not rest.startswith(b"=") else b""

"""MetaImage headers (``.mha``, ``.mhd``): what is broken in one, said before ITK is asked.

ITK names no reason for a header that it cannot use, and writes several lines of its own.
Keys: https://itk.org/Wiki/ITK/MetaIO/Documentation, "MetaImage Tags".
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from flare_clef.errors import UserError

_LONGEST_HEADER_BYTES = 2**20
_NEEDED = ("NDims", "DimSize", "ElementType", "ElementDataFile")
# A number's bytes; the widths of long types differ between machines, ITK knows which to take.
_BYTES = {
    "MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4,
    "MET_FLOAT": 4, "MET_DOUBLE": 8,
    "MET_LONG": 0, "MET_ULONG": 0, "MET_LONG_LONG": 0, "MET_ULONG_LONG": 0,
}  # fmt: skip


def check_header(path: Path) -> None:
    """Raises UserError for a header that lacks a needed line, or voxels that are not there."""
    with path.open("rb") as file:
        start = file.read(_LONGEST_HEADER_BYTES)
    found, voxels_at = _lines(start)
    if not any(key in found for key in _NEEDED):
        raise UserError(
            f"{path}: does not begin with a MetaImage header; name the file by its format, "
            "or export it again"
        )
    for key in _NEEDED:
        if key not in found:
            raise UserError(f"{path}: its header has no line {key}; export it again")
    sides = _whole_numbers(found["DimSize"])
    dimensions = _whole_numbers(found["NDims"])
    if len(dimensions) != 1 or len(sides) != dimensions[0] or min(sides) < 1:
        raise UserError(
            f"{path}: its header says NDims = {found['NDims']}, DimSize = {found['DimSize']}; "
            "export it again"
        )
    if found["ElementType"].removesuffix("_ARRAY") not in _BYTES:
        raise UserError(f"{path}: ElementType = {found['ElementType']}, unknown; export it again")
    place = found["ElementDataFile"]
    if place.upper() == "LOCAL":
        _check_length(path, found, sides, path.stat().st_size - voxels_at)
    # Of several files ITK finds the names: a list, or a pattern and numbers.
    elif not place.upper().startswith("LIST") and "%" not in place:
        voxels = path.parent / place
        if not voxels.is_file():
            raise UserError(f"{path}: its voxels' file {place} is not beside it; copy it there")
        _check_length(voxels, found, sides, voxels.stat().st_size)


def _check_length(file: Path, found: dict[str, str], sides: list[int], there: int) -> None:
    """Of voxels stored as they are; packed ones tell when they are unpacked."""
    plain = found.get("CompressedData", "False").upper() in ("FALSE", "0", "NO")
    binary = found.get("BinaryData", "False").upper() in ("TRUE", "1", "YES")
    if not (plain and binary):
        return
    channels = _whole_numbers(found.get("ElementNumberOfChannels", "1"))
    size = _BYTES[found["ElementType"].removesuffix("_ARRAY")]
    expected = math.prod(sides) * math.prod(channels) * size
    if there < expected:
        raise UserError(
            f"{file}: cut off, {there} of {expected} bytes of voxels; copy or export it again"
        )


def _lines(start: bytes) -> tuple[dict[str, str], int]:
    """The header's keys and values, and where it ends: behind the line ElementDataFile."""
    found: dict[str, str] = {}
    at = 0
    for line in start.splitlines(keepends=True):
        at += len(line)
        key, *value = re.split("[=:]", line.decode("latin-1"), maxsplit=1)
        if value:
            found[key.strip()] = value[0].strip()
        if key.strip() == "ElementDataFile":
            break
    return found, at


def _whole_numbers(text: str) -> list[int]:
    """Those in ``text``; [0] where it holds anything else."""
    parts = text.split()
    return [int(part) for part in parts] if parts and all(map(str.isdecimal, parts)) else [0]

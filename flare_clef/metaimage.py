"""MetaImage headers (``.mha``, ``.mhd``): what is broken in one, said before ITK is asked.

ITK names no reason for a header that it cannot use, and writes several lines of its own.
Keys: https://itk.org/Wiki/ITK/MetaIO/Documentation, "MetaImage Tags".
"""

from __future__ import annotations

import math
import os
import re
import zlib
from pathlib import Path

from flare_clef.errors import UserError

_LONGEST_HEADER_BYTES = _PIECE_BYTES = 2**20
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
        # Of voxels behind their header ITK needs to be told how many bytes are packed.
        if _is_packed(found) and not _packed_bytes(found):
            raise UserError(f"{path}: its header has no line CompressedDataSize; export it again")
        _check_voxels(path, voxels_at, found, sides)
        return
    files = _files_named(path, place, start[voxels_at:], sides[-1])
    for voxels in files:
        if not voxels.is_file():
            raise UserError(
                f"{path}: its voxels' file {voxels.name} is not beside it; copy it there"
            )
    # How many slices each of several files holds is left to ITK.
    if len(files) == 1:
        # -1, which ITK takes for "the file's last bytes", is 0 here: more bytes do no harm.
        _check_voxels(files[0], _whole_numbers(found.get("HeaderSize", "0"))[0], found, sides)


def _files_named(path: Path, place: str, rest: bytes, slices: int) -> list[Path]:
    """The one file of voxels, or the first ``slices`` of a list, or of a pattern and numbers.

    ITK opens no more of them. Raises UserError.
    """
    if place.upper().startswith("LIST"):
        names = [os.fsdecode(line.strip()) for line in rest.splitlines()]
    elif pattern := re.fullmatch(r"(.*%0?\d*d.*?)((?:\s+\d+){2,3})", place):
        first, last, *step = map(int, pattern[2].split())
        # Without a step ITK divides by this one, and ends the whole process where it is 0.
        every = step[0] if step else (last - first) // slices
        try:
            names = [pattern[1] % number for number in range(first, last + 1, every)]
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}: ElementDataFile = {place}, which names no series of files ({error}); "
                "export it again"
            ) from None
    else:
        names = [place]
    return [path.parent / name for name in names if name][:slices]


def _check_voxels(file: Path, start: int, found: dict[str, str], sides: list[int]) -> None:
    """Raises UserError for damage that ITK reads without a word; voxels begin at byte ``start``."""
    if not _is_true(found, "BinaryData"):
        return
    channels = _whole_numbers(found.get("ElementNumberOfChannels", "1"))
    size = _BYTES[found["ElementType"].removesuffix("_ARRAY")]
    expected = math.prod(sides) * math.prod(channels) * size
    there = file.stat().st_size - start
    if not _is_packed(found):
        if there < expected:
            raise UserError(
                f"{file}: cut off, {there} of {expected} bytes of voxels; copy or export it again"
            )
        return
    packed = _packed_bytes(found)
    if there < packed:
        raise UserError(
            f"{file}: cut off, {there} of {packed} bytes of packed voxels; copy or export it again"
        )
    try:
        unpacked = _unpacked_bytes(file, start)
    except zlib.error as error:
        raise UserError(f"{file}: damaged ({error}); copy or export it again") from None
    if unpacked != expected and size:
        raise UserError(
            f"{file}: unpacks to {unpacked} of {expected} bytes of voxels; copy or export it again"
        )


def _unpacked_bytes(file: Path, start: int) -> int:
    """How many bytes the packed ones of ``file`` hold; checksums are compared."""
    inflater = zlib.decompressobj(wbits=47)  # zlib's or gzip's form, as ITK takes both
    count = 0
    with file.open("rb") as opened:
        opened.seek(start)
        while not inflater.eof:
            data = inflater.unconsumed_tail or opened.read(_PIECE_BYTES)
            if not data:
                raise zlib.error("it ends in the middle")
            count += len(inflater.decompress(data, _PIECE_BYTES))
    return count


def _is_packed(found: dict[str, str]) -> bool:
    return _is_true(found, "BinaryData") and _is_true(found, "CompressedData")


def _packed_bytes(found: dict[str, str]) -> int:
    """As the header tells; 0 where it doesn't."""
    return _whole_numbers(found.get("CompressedDataSize", ""))[0]


def _is_true(found: dict[str, str], key: str) -> bool:
    return found.get(key, "False").upper() in ("TRUE", "1", "YES")


def _lines(start: bytes) -> tuple[dict[str, str], int]:
    """The header's keys and values, and where it ends: behind the line ElementDataFile."""
    found: dict[str, str] = {}
    at = 0
    for line in start.splitlines(keepends=True):
        at += len(line)
        key, *value = re.split("[=:]", os.fsdecode(line), maxsplit=1)
        if value:
            found[key.strip()] = value[0].strip()
        if key.strip() == "ElementDataFile":
            break
    return found, at


def _whole_numbers(text: str) -> list[int]:
    """Those in ``text``; [0] where it holds anything else."""
    parts = text.split()
    return [int(part) for part in parts] if parts and all(map(str.isdecimal, parts)) else [0]

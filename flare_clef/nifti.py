"""The NIfTI-1 header: what SimpleITK neither checks, nor tells, nor repeats.

SimpleITK reads the voxels. This module reads the 348 header bytes beside it, so that a cut or
odd file gets a message with figures, sheared scans (which ITK refuses) can be read, and a
label map repeats its scan's geometry bit for bit.
Fields and offsets: the NIfTI-1.1 standard header, nifti1.h.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from flare_clef.errors import UserError
from flare_clef.formats import nifti_extension

HEADER_BYTES = 348
_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4",
    1024: "i8", 1280: "u8",
}  # fmt: skip
_PIECE = 2**20
_SAME_SIZE = 1e-3
"""By this share voxel sizes differ by rounding alone."""
_NOT_SCALAR = {1: "one bit a voxel", 32: "complex", 128: "RGB", 1792: "complex", 2304: "RGBA"}


@dataclass(frozen=True)
class NiftiHeader:
    """Raw bytes and the fields that are looked at."""

    raw: bytes
    order: str
    """``<`` or ``>``, as struct has it."""

    def _get(self, form: str, offset: int) -> tuple:  # type: ignore[type-arg]
        return struct.unpack_from(self.order + form, self.raw, offset)

    @property
    def dim(self) -> tuple[int, ...]:
        return self._get("8h", 40)

    @property
    def datatype(self) -> int:
        return int(self._get("h", 70)[0])

    @property
    def pixdim(self) -> tuple[float, ...]:
        return self._get("8f", 76)

    @property
    def voxel_offset(self) -> int:
        offset = self._get("f", 108)[0]
        return int(offset) if np.isfinite(offset) else 0

    @property
    def scaling(self) -> tuple[float, float]:
        """Slope and intercept; slope 0 or not finite means none."""
        slope, intercept = self._get("2f", 112)
        if slope == 0 or not np.isfinite(slope):
            return 1.0, 0.0
        return slope, intercept if np.isfinite(intercept) else 0.0

    @property
    def codes(self) -> tuple[int, int]:
        """qform and sform code; 0 means not given."""
        return self._get("2h", 252)

    @property
    def sform(self) -> np.ndarray:
        """(4, 4) from voxel indices to RAS mm."""
        return np.vstack([np.reshape(self._get("12f", 280), (3, 4)), [0, 0, 0, 1]]).astype(float)

    @property
    def qform(self) -> np.ndarray:
        """(4, 4) from voxel indices to RAS mm, by the quaternion of the standard."""
        b, c, d, *offset = self._get("6f", 256)
        a = np.sqrt(max(0.0, 1 - b * b - c * c - d * d))
        turn = np.array(
            [
                [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
            ]
        )
        sizes = np.array(self.pixdim[1:4]) * [1, 1, -1 if self.pixdim[0] < 0 else 1]
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = turn * sizes, offset
        return affine


def is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _open(path: Path):  # type: ignore[no-untyped-def]
    return gzip.open(path, "rb") if is_gzip(path) else path.open("rb")


def read_header(path: Path) -> NiftiHeader:
    """The header of a NIfTI-1 file, gzipped or not. Raises UserError."""
    try:
        with _open(path) as file:
            raw = file.read(HEADER_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip ({error}); copy the file again") from None
    if len(raw) < HEADER_BYTES:
        raise UserError(
            f"{path}: {len(raw)} bytes, a NIfTI header has {HEADER_BYTES}; not a NIfTI file, or cut"
        )
    for order in "<>":
        size = struct.unpack_from(order + "i", raw)[0]
        if size == HEADER_BYTES:
            return NiftiHeader(raw, order)
        if size == 540:
            raise UserError(f"{path}: NIfTI-2, which is not read; save it as NIfTI-1 or NRRD")
    raise UserError(f"{path}: does not begin with a NIfTI header; is it another kind of file?")


def check_header(path: Path, header: NiftiHeader) -> None:
    """Raises UserError for what is not a single scan of scalar voxels with a usable size."""
    count, *sizes = header.dim
    sizes = sizes[: max(count, 0)]
    shape = " x ".join(map(str, sizes))
    if not 1 <= count <= 7 or any(n < 1 for n in sizes):
        raise UserError(f"{path}: impossible dimensions in the header ({count}: {shape})")
    if header.datatype in _NOT_SCALAR:
        raise UserError(
            f"{path}: voxels are {_NOT_SCALAR[header.datatype]}; a CT has one number a voxel"
        )
    if header.datatype not in _DTYPES:
        raise UserError(f"{path}: unknown voxel type {header.datatype} in the header")
    if count < 3:
        raise UserError(f"{path}: {count}-D ({shape}); a volume with three axes is needed")
    if count > 4 and sizes[4] > 1:
        raise UserError(f"{path}: {sizes[4]} numbers a voxel ({shape}); a CT has one")
    if int(np.prod(sizes[3:])) > 1:
        raise UserError(f"{path}: {count}-D ({shape}); split it into single volumes first")
    spacing = header.pixdim[1:4]
    if not all(np.isfinite(s) and s > 0 for s in spacing):
        seen = ", ".join(f"{s:g}" for s in spacing)
        raise UserError(f"{path}: voxel spacing {seen} mm; all three must be above 0")
    if header.codes[1] > 0 and not np.isfinite(header.sform).all():
        raise UserError(f"{path}: the sform in its header is not finite; export it again")


def check_length(path: Path, header: NiftiHeader) -> None:
    """Raises UserError with both figures if an uncompressed file holds too few voxels."""
    if is_gzip(path):
        return
    expected = header.voxel_offset + _data_bytes(header)
    found = path.stat().st_size
    if found < expected:
        raise UserError(f"{path}: cut: {found} bytes where its header promises {expected}")


def _data_bytes(header: NiftiHeader) -> int:
    count, *sizes = header.dim
    return int(np.prod(sizes[:count])) * np.dtype(_DTYPES[header.datatype]).itemsize


def _inflated(path: Path, start: int, size: int) -> bytearray:
    """Up to ``size`` bytes from ``start`` of what a gzip file holds; fewer where it ends before.

    In pieces of a megabyte, during which other threads run: the gzip module's own of 8 KiB
    take five times as long beside the import of torch. Checksums are compared as far as the
    file goes. Raises EOFError where it is cut, zlib.error where it is damaged.
    """
    content = bytearray()
    skip = start
    inflater = zlib.decompressobj(wbits=31)
    with path.open("rb") as file:
        while True:
            if inflater.eof:
                # A file may hold several members, and zeros as padding behind any of them.
                data = inflater.unused_data.lstrip(b"\0") or file.read(_PIECE).lstrip(b"\0")
                if len(content) == size or not data:
                    return content
                inflater = zlib.decompressobj(wbits=31)
            else:
                data = inflater.unconsumed_tail or file.read(_PIECE)
                if not data and len(content) == size:
                    return content
                if not data:
                    raise EOFError("it ends in the middle")
            piece = inflater.decompress(data, _PIECE)
            content += piece[skip : skip + size - len(content)]
            skip = max(0, skip - len(piece))


def read_voxels(path: Path, header: NiftiHeader) -> np.ndarray:
    """Voxel values (z, y, x) in HU, slope and intercept applied. Raises UserError."""
    expected = _data_bytes(header)
    raw: bytes | bytearray
    start = max(header.voxel_offset, HEADER_BYTES)
    try:
        if is_gzip(path):
            raw = _inflated(path, start, expected)
        else:
            with path.open("rb") as file:
                file.seek(start)
                raw = file.read(expected)
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip ({error}); copy the file again") from None
    if len(raw) < expected:
        raise UserError(
            f"{path}: cut: {len(raw)} bytes of voxels where its header promises {expected}"
        )
    array = np.frombuffer(raw, header.order + _DTYPES[header.datatype])
    array = array.reshape(header.dim[3:0:-1])
    slope, intercept = header.scaling
    if (slope, intercept) != (1.0, 0.0):
        with np.errstate(over="ignore", invalid="ignore"):  # told as infinite or NaN values
            return array.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def has_other_sizes(header: NiftiHeader) -> bool:
    """Whether the sform alone places the scan, with voxels of another size than ``pixdim`` has."""
    if header.codes[0] > 0 or header.codes[1] <= 0:
        return False
    sizes = np.linalg.norm(header.sform[:3, :3], axis=0)
    apart = np.abs(sizes - header.pixdim[1:4]).max()
    return bool(sizes.min() > 0 and apart > _SAME_SIZE * sizes.min())


def disagreement(header: NiftiHeader, taken: np.ndarray) -> str:
    """A warning if the header places the scan in two ways, and which of them is taken; else ''.

    ``taken``: (3, 3) from voxel steps to LPS mm, as the scan is read.
    """
    if has_other_sizes(header):
        by_pixdim, by_sform = (
            " x ".join(f"{side:.3g}" for side in sides)
            for sides in (header.pixdim[1:4], np.linalg.norm(header.sform[:3, :3], axis=0))
        )
        return f"voxels of {by_pixdim} mm by pixdim, of {by_sform} by the sform, which is taken"
    if not all(code > 0 for code in header.codes):
        return ""
    corners = np.array(
        [[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float
    ) * [*header.dim[1:4], 1]
    apart = np.linalg.norm((header.qform @ corners.T - header.sform @ corners.T)[:3], axis=0).max()
    if apart < 0.5 * min(header.pixdim[1:4]):
        return ""
    steps = np.diag([-1.0, -1.0, 1.0]) @ taken
    off = [np.abs(form[:3, :3] - steps).max() for form in (header.qform, header.sform)]
    name = "qform" if off[0] <= off[1] else "sform"
    return (
        f"qform and sform of the header differ by up to {apart:.1f} mm; the {name} is taken: "
        "check the sides"
    )


def sform_geometry(
    header: NiftiHeader,
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Spacing, origin and direction (LPS, as SimpleITK has them) of the sform, sheared or not."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ header.sform
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    direction = affine[:3, :3] / np.where(spacing > 0, spacing, 1)
    return tuple(spacing), tuple(affine[:3, 3]), tuple(direction.ravel())


def with_sform(
    raw: bytes, spacing_mm: Sequence[float], origin_mm: Sequence[float], axes: np.ndarray
) -> bytes:
    """A header that places voxels by its sform alone: origin and the columns of ``axes`` in LPS."""
    order = "<" if struct.unpack_from("<i", raw)[0] == HEADER_BYTES else ">"
    affine = np.diag([-1.0, -1.0, 1.0]) @ np.column_stack([axes * spacing_mm, origin_mm])
    changed = bytearray(raw)
    struct.pack_into(order + "3f", changed, 80, *np.linalg.norm(affine[:, :3], axis=0))
    struct.pack_into(order + "2h", changed, 252, 0, 1)
    struct.pack_into(order + "12f", changed, 280, *affine.ravel())
    return bytes(changed)


def new_header(
    shape: tuple[int, ...], dtype: np.dtype, like: bytes, *, named: bool
) -> tuple[bytes, np.dtype]:
    """What precedes voxels of ``shape`` (z, y, x) that lie as ``like`` says, and their type.

    The type is ``dtype`` in the byte order of ``like``. Where ``named``, the organs' names and
    colours follow the 348 bytes as an extension.
    """
    order: Literal["<", ">"] = "<" if struct.unpack_from("<i", like)[0] == HEADER_BYTES else ">"
    code = next(code for code, name in _DTYPES.items() if np.dtype(name) == dtype)
    raw = bytearray(like[:HEADER_BYTES])
    depth, height, width = shape
    struct.pack_into(order + "8h", raw, 40, 3, width, height, depth, 1, 1, 1, 1)
    struct.pack_into(order + "hh", raw, 70, code, 8 * dtype.itemsize)
    extension = nifti_extension(order) if named else b"\0" * 4
    struct.pack_into(order + "fff", raw, 108, float(HEADER_BYTES + len(extension)), 1.0, 0.0)
    struct.pack_into(order + "ff", raw, 124, 0.0, 0.0)
    raw[344:348] = b"n+1\0"
    return bytes(raw) + extension, dtype.newbyteorder(order)

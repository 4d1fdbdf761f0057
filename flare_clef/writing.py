"""Writes label maps and files beside them: whole or not at all.

Arrays are (z, y, x).
"""

from __future__ import annotations

import contextlib
import gzip
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import SimpleITK as sitk

from flare_clef import nifti, nrrd
from flare_clef.errors import UserError
from flare_clef.formats import slicer_keys
from flare_clef.images import Image, itk_reason
from flare_clef.itk_turn import ITK_TURN
from flare_clef.paths import behind_link, check_name
from flare_clef.scan_files import strip_suffix


def labels_to_sitk(labels: np.ndarray, like: Image) -> sitk.Image:
    """``labels`` (z, y, x) as a SimpleITK image with the geometry of ``like``."""
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(like.spacing_mm)
    image.SetOrigin(like.origin_mm)
    image.SetDirection(like.direction)
    return image


_UPRIGHT = 1e-4
"""So far from a right angle, and from length 1, axes are as good as upright."""
_temporary: set[Path] = set()


def remove_temporary_files() -> None:
    """Removes what a write that is under way has made so far, on the way out of the process."""
    for path in list(_temporary):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _written_beside(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place when all went well.

    Raises UserError where it cannot be written; nothing is left behind then.
    """
    check_name(path)
    path = behind_link(path)
    # ITK knows suffixes in small letters only.
    suffix = strip_suffix(path.name)[1].lower()
    temporary = path.with_name(f".flare-clef.{os.getpid()}.{secrets.token_hex(4)}.tmp{suffix}")
    _temporary.add(temporary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be written ({itk_reason(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        _temporary.discard(temporary)


def write_labels(labels: np.ndarray, like: Image, path: Path, *, named: bool = True) -> None:
    """Writes uint8 ``labels`` (z, y, x) with the geometry of ``like``, atomically.

    The suffix decides the format; NIfTI and NRRD carry the organs' names and colours, unless
    ``named`` is False (masks whose 1 is not the liver). From NIfTI to NIfTI, and from NRRD to
    NRRD, the header's geometry is repeated bit for bit. Raises UserError where the file cannot
    be written; nothing is left behind then.
    """
    suffix = strip_suffix(path.name)[1].lower()
    if suffix not in (".nii.gz", ".nii", ".mha", ".nrrd"):
        raise UserError(f"{path}: labels are written as .nii.gz, .nii, .mha or .nrrd")
    with _written_beside(path) as temporary:
        if suffix.startswith(".nii"):
            _write_nifti(labels, like, temporary, named=named)
        elif suffix == ".nrrd":
            _write_nrrd(labels, like, temporary, named=named)
        else:
            sitk.WriteImage(labels_to_sitk(labels, like), str(temporary), True, 1)


def _write_by_itk(voxel: sitk.Image, temporary: Path) -> None:
    """A file of one voxel, for its header."""
    sitk.WriteImage(voxel, str(temporary), True, 1)
    if not temporary.stat().st_size:
        # ITK does not say why.
        raise OSError("no byte could be written; is the disk full?")


def _voxel(like: Image) -> sitk.Image:
    return labels_to_sitk(np.zeros((1, 1, 1), np.uint8), like)


def _itk_header(like: Image, temporary: Path) -> bytes:
    """The header that ITK gives to a scan that came from another format.

    ITK makes axes upright that are not; the matrix of these alone holds them.
    """
    # The next scan is being read meanwhile.
    with ITK_TURN:
        _write_by_itk(_voxel(like), temporary)
    raw = nifti.read_header(temporary).raw
    axes = np.reshape(like.direction, (3, 3))
    if np.abs(axes.T @ axes - np.eye(3)).max() < _UPRIGHT:
        return raw
    return nifti.with_sform(raw, like.spacing_mm, like.origin_mm, axes)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically. Raises UserError where it cannot be written."""
    with _written_beside(path) as temporary:
        temporary.write_bytes(content)


def write_scan(scan: Image, path: Path) -> None:
    """Writes ``scan`` (z, y, x) in its own type and geometry as .nii or .nii.gz, atomically.

    Raises UserError where it cannot be written; nothing is left behind then.
    """
    with _written_beside(path) as temporary:
        _write_nifti(scan.array, scan, temporary, named=False)


def _write_nifti(array: np.ndarray, like: Image, path: Path, *, named: bool) -> None:
    """Not by ITK, which does not notice that a disk is full."""
    geometry = like.nifti_header or _itk_header(like, path)
    header, dtype = nifti.new_header(array.shape, array.dtype, geometry, named=named)
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(path.open("wb"))
        if path.name.lower().endswith(".gz"):
            file = stack.enter_context(_packed(file))
        file.write(header)
        # Slice by slice: a scan of 1.5 G voxels must not be held a second time to be written.
        for plane in array:
            file.write(np.ascontiguousarray(plane, dtype))


def _write_nrrd(labels: np.ndarray, like: Image, path: Path, *, named: bool) -> None:
    """The header alone by ITK, for the reason that :func:`_write_nifti` has."""
    voxel = _voxel(like)
    if named:
        for key, value in slicer_keys(labels.shape[::-1]).items():
            voxel.SetMetaData(key, value)
    _write_by_itk(voxel, path)
    header = nrrd.new_header(path, labels.shape, like.nrrd_geometry)
    with path.open("wb") as file:
        file.write(header)
        with _packed(file) as packed:
            for plane in labels:
                packed.write(np.ascontiguousarray(plane).data)


def _packed(file: IO[bytes]) -> gzip.GzipFile:
    return gzip.GzipFile("", "wb", 1, file, mtime=0)

"""A folder that holds one DICOM series, read as one volume in HU."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from flare_clef.errors import UserError
from flare_clef.paths import check_name

_POSITION, _ORIENTATION = "0020|0032", "0020|0037"
_FRAME_OF_REFERENCE = "0020|0052"
_DESCRIPTION, _THICKNESS = "0008|103e", "0018|0050"
_UNEVEN_SHARE = 0.02
_SAME_PIXEL_MM = 1e-3
_SIDEWAYS_MM = 0.5
_UPRIGHT_DEGREES = 0.1
"""Rounded positions tilt a series by less; over 400 mm it makes 0.7 mm."""
_META_BYTES = 4096
"""So much of a file holds what it says of its class."""
_CLASS = b"\2\0\2\0UI"
_CT_UID = rb"1\.2\.840\.10008\.5\.1\.4\.1\.1\.2(\.\d)?[^.\d]"
"""SOP class of a CT (PS3.4, B.5): plain, enhanced, converted."""
_CT_IMAGE = re.compile(_CLASS + rb".." + _CT_UID, re.DOTALL)
"""The same as Media Storage SOP Class UID (0002,0002)."""
_CT_WITHOUT_PREAMBLE = re.compile(rb"\A\x08\0.*?" + _CT_UID, re.DOTALL)
"""A file that begins with its data set, group 0008."""
_NO_SCAN = re.compile(
    _CLASS + rb"..1\.2\.840\.10008\.(1\.3\.10|5\.1\.4\.1\.1\.(11|66|88|104|481)\b)", re.DOTALL
)
"""Of what lies beside scans (PS3.4, B.5): the table of contents of a disc, presentation states,
segmentations and raw data, structured reports, documents, objects of radiotherapy."""


def is_dicom_folder(path: Path) -> bool:
    """Whether any file directly in ``path`` is a DICOM file.

    That is ``DICM`` after 128 bytes, or a CT stored without this preamble, as old archives do.
    What is no scan (segmentations, reports, structure sets, DICOMDIR) does not count.
    """
    entries = sorted(e for e in path.iterdir() if not e.name.startswith(".") and e.is_file())
    starts = (_dicom_start(entry) for entry in entries)
    return any(start and not _NO_SCAN.search(start) for start in starts)


def _dicom_start(path: Path) -> bytes:
    """The first bytes of a DICOM file; none of another file, or of one that cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(_META_BYTES)
    except OSError:
        return b""
    return start if start[128:132] == b"DICM" or _CT_WITHOUT_PREAMBLE.match(start) else b""


def series_files(folder: Path) -> tuple[str, ...]:
    """Files of the one series of ``folder``, sorted by position. Raises UserError, one line."""
    entries = sorted(
        e
        for e in folder.iterdir()
        if not e.name.startswith(".") and (e.is_file() or e.is_symlink())
    )
    for entry in entries:
        try:
            check_name(entry)
        except UserError:
            # Of what is no slice GDCM takes no notice.
            if _dicom_start(entry):
                raise
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if not series:
        raise UserError(f"{folder}: no DICOM series with pixel data in this folder")
    names = {s: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), s) for s in series}
    if len(series) > 1:
        listed = "; ".join(
            f"'{_text(files[0], _DESCRIPTION) or 'no description'}' {len(files)} slice(s) …{s[-8:]}"
            for s, files in names.items()
        )
        raise UserError(f"{folder}: {len(series)} DICOM series ({listed}); keep one a folder")
    files = names[series[0]]
    _check_left_out(entries, files)
    return files


def _check_left_out(entries: list[Path], files: tuple[str, ...]) -> None:
    """GDCM passes over what it cannot read: a scan must not lose its first or last slice so."""
    listed = {Path(file).name for file in files}
    patterns = {_pattern(name) for name in listed}
    for entry in entries:
        if entry.name in listed:
            continue
        try:
            with entry.open("rb") as opened:
                start = opened.read(_META_BYTES)
        except OSError as error:
            if _pattern(entry.name) not in patterns:
                continue
            reason = error.strerror or str(error)
            raise UserError(f"{entry}: a slice that cannot be read ({reason})") from None
        # Called as a slice it must at least say that it is something else.
        cut = _pattern(entry.name) in patterns and _CLASS not in start[128:]
        if cut or (start[128:132] == b"DICM" and _CT_IMAGE.search(start)):
            size = entry.stat().st_size
            raise UserError(
                f"{entry}: a slice that cannot be read ({size} bytes, cut?); copy the series again"
            )


def _pattern(name: str) -> str:
    """What the names of a series have in common."""
    return re.sub(r"\d+", "0", name)


def read_series(folder: Path) -> tuple[sitk.Image, tuple[str, ...], float]:
    """The one series of ``folder`` as a volume, its files, and the tilt of its gantry in degrees.

    A tilted series is a sheared volume: its third axis runs along the slices' positions, not at
    right angles to them. Raises UserError, one line.
    """
    files = series_files(folder)
    steps = _checked_steps(folder, files)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    try:
        volume = reader.Execute()
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        raise UserError(f"{folder}: the series cannot be read ({last})") from None
    if not len(steps) or volume.GetDimension() != 3:
        return volume, files, 0.0
    direction = np.reshape(volume.GetDirection(), (3, 3))
    step = steps.mean(axis=0)
    along = step / np.linalg.norm(step)
    degrees = float(np.degrees(np.arccos(min(1.0, float(along @ direction[:, 2])))))
    if degrees < _UPRIGHT_DEGREES:
        return volume, files, 0.0
    # ITK has the true distance between the slices, along its own upright axis.
    direction[:, 2] = along
    volume.SetDirection(direction.ravel().tolist())
    return volume, files, degrees


def series_place(folder: Path) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Size in voxels and origin in mm, both (x, y, z), of the one series. Raises UserError."""
    files = series_files(folder)
    first = _information(files[0])
    width, height, frames = first.GetSize()[:3]
    return (width, height, frames * len(files)), first.GetOrigin()[:3]


def frame_of_reference(path: Path) -> str:
    """UID of the space that a series (a folder) or a DICOM file lies in; empty where unknown."""
    try:
        return _text(series_files(path)[0] if path.is_dir() else str(path), _FRAME_OF_REFERENCE)
    except UserError:
        return ""


def thickness_mm(file: str) -> float:
    """Of a single slice, which has no neighbour: as it says itself, else 0."""
    told = _numbers(_information(file), _THICKNESS)
    return told[0] if told and np.isfinite(told[0]) else 0.0


def _information(file: str) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        raise UserError(f"{file}: not a readable DICOM image (no pixel data?)") from None
    return reader


def _text(file: str, tag: str) -> str:
    reader = _information(file)
    return reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else ""


def _numbers(reader: sitk.ImageFileReader, tag: str) -> tuple[float, ...]:
    if not reader.HasMetaDataKey(tag):
        return ()
    try:
        return tuple(float(part) for part in reader.GetMetaData(tag).split("\\"))
    except ValueError:  # empty, or no numbers
        return ()


def _checked_steps(folder: Path, files: tuple[str, ...]) -> np.ndarray:
    """(slices - 1, 3) from each slice to the next in mm, LPS. Raises UserError, one line.

    Slices must have equal sizes, one orientation, and one step between all neighbours.
    """
    readers = [_information(file) for file in files]
    sizes = {reader.GetSize()[:2] for reader in readers}
    if len(sizes) > 1:
        raise UserError(f"{folder}: slices of different sizes {sorted(sizes)}; not one volume")
    pixels = np.array([reader.GetSpacing()[:2] for reader in readers])
    if np.ptp(pixels, axis=0).max() > _SAME_PIXEL_MM:
        raise UserError(
            f"{folder}: pixels of {pixels.min():.3f} to {pixels.max():.3f} mm; not one volume"
        )
    if len(files) == 1:
        return np.empty((0, 3))
    orientations = [_numbers(reader, _ORIENTATION) for reader in readers]
    positions = [_numbers(reader, _POSITION) for reader in readers]
    if any(len(o) != 6 for o in orientations) or any(len(p) != 3 for p in positions):
        raise UserError(f"{folder}: slices without position or orientation; not a CT volume")
    if np.abs(np.array(orientations) - orientations[0]).max() > 1e-3:
        raise UserError(f"{folder}: slices of different orientation; is a localizer among them?")
    normal = np.cross(orientations[0][:3], orientations[0][3:])
    along = np.sort(np.array(positions) @ normal)
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    if usual <= 1e-4:
        raise UserError(f"{folder}: several slices at one position ({along[0]:.1f} mm)")
    worst = int(np.abs(gaps - usual).argmax())
    if abs(gaps[worst] - usual) > max(_UNEVEN_SHARE * usual, 0.02):
        what = "slices are missing" if gaps[worst] > 1.5 * usual else "uneven spacing"
        raise UserError(
            f"{folder}: {what}: {gaps[worst]:.2f} mm between the slices at {along[worst]:.1f} and "
            f"{along[worst + 1]:.1f} mm, {usual:.2f} mm elsewhere"
        )
    points = np.array(positions)[np.argsort(np.array(positions) @ normal)]
    steps = np.diff(points, axis=0)
    sideways = np.linalg.norm(steps - np.median(steps, axis=0), axis=1)
    if sideways.max() > max(_SIDEWAYS_MM, _UNEVEN_SHARE * usual):
        worst = int(sideways.argmax())
        raise UserError(
            f"{folder}: the slices at {along[worst]:.1f} and {along[worst + 1]:.1f} mm are shifted "
            f"sideways by {sideways[worst]:.1f} mm; not one volume"
        )
    return steps

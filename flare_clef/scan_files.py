"""Which files and folders are scans, and what the labels of each are called."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flare_clef.dicom import is_dicom_folder
from flare_clef.errors import UserError

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr")
_CHANNEL = "_0000"


def strip_suffix(name: str) -> tuple[str, str]:
    """``scan.nii.gz`` to (``scan``, ``.nii.gz``); the suffix is '' if it is not an image's."""
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)], name[-len(suffix) :]
    return name, ""


def output_name(path: Path, suffix: str | None = None) -> str:
    """Name of the label map: the harness's ``X_0000`` loses ``_0000``, others keep theirs.

    The formats of two files, a header and its voxels, become those that hold both in one.
    """
    # A series that the user stands in is called '.'.
    name = path.name if path.name not in ("", "..") else path.resolve().name
    stem, own = strip_suffix(name)
    own = {".mhd": ".mha", ".nhdr": ".nrrd"}.get(own.lower(), own)
    return (stem.removesuffix(_CHANNEL) or stem) + (suffix or own or ".nii.gz")


def files_of(path: Path) -> list[Path]:
    """``path`` and, of a header (``.mhd``, ``.nhdr``), the files of voxels that it names.

    What cannot be read or is not there is left to who reads the scan.
    """
    if strip_suffix(path.name)[1].lower() not in (".mhd", ".nhdr"):
        return [path]
    try:
        header = os.fsdecode(path.read_bytes()).replace("\r\n", "\n")
    except OSError:
        return [path]
    named = re.search(r"^\s*(?:ElementDataFile\s*=|data ?file\s*:)(.*)", header, re.I | re.M | re.S)
    # One name, or LIST with a name a line to the end.
    lines = named[1].split("\n") if named else []
    voxels = [path.parent / line.strip() for line in lines if line.strip()]
    return [path, *(file for file in voxels if file.is_file())]


def find_inputs(path: Path, *, segmentations: bool = False) -> list[Path]:
    """The scans that ``path`` stands for, by name: itself, or those in the folder.

    Those of 3D Slicer (``.seg.nrrd``) are no scans; ``segmentations``: listed, too.

    A folder of one DICOM series is one scan, and so is a sub-folder of one; scans of other kinds
    beside the slices, or in sub-folders of theirs, come after it. Raises UserError.
    """
    try:
        if path.is_file():
            return [path]
        if not path.exists():
            kind = "a link to nothing" if path.is_symlink() else "no such file or folder"
            raise UserError(f"{path}: {kind}; check the path")
        if not path.is_dir():
            raise UserError(f"{path}: neither a file nor a folder")
        entries = sorted(path.iterdir())
        # Thousands of scans need not be opened to see that they are no slices.
        others = any(not strip_suffix(e.name)[1] for e in entries)
        found = [path] if others and is_dicom_folder(path) else []
        found += [e for e in entries if _is_listed(e, segmentations)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if found:
        return found
    deeper = [entry for entry in entries if _holds_scans(entry, segmentations)]
    if deeper:
        raise UserError(
            f"{path}: no scan among its {len(entries)} entries, but in {len(deeper)} sub-folder(s) "
            f"of it; give such a folder, the first is {deeper[0]}"
        )
    raise UserError(
        f"{path}: no scan among its {len(entries)} entries; expected {' '.join(SUFFIXES)} "
        "or a DICOM series"
    )


def passed_over(path: Path, output: Path) -> list[Path]:
    """Sub-folders of ``path`` that hold scans which :func:`find_inputs` leaves out, by name.

    Not ``output`` or a folder that it lies in: earlier results are no scans.
    """
    if not path.is_dir():
        return []
    results = output.resolve()
    try:
        folders = [entry for entry in sorted(path.iterdir()) if entry.is_dir()]
    except OSError:
        return []
    return [
        folder
        for folder in folders
        if not results.is_relative_to(folder.resolve())
        and not folder.name.startswith(".")
        and not _is_listed(folder, segmentations=False)
        and _holds_scans(folder, segmentations=False)
    ]


def _holds_scans(folder: Path, segmentations: bool) -> bool:
    """Whether ``folder`` is one with scans directly in it; not if it cannot be read."""
    try:
        return folder.is_dir() and any(_is_listed(e, segmentations) for e in folder.iterdir())
    except OSError:
        return False


def _is_listed(entry: Path, segmentations: bool) -> bool:
    # Of Slicer, or of ours, a .seg.nrrd lies beside its scan.
    named = segmentations or not entry.name.lower().endswith(".seg.nrrd")
    return named and not entry.name.startswith(".") and _is_scan(entry)


def _is_scan(entry: Path) -> bool:
    if entry.is_symlink() and not entry.exists():
        # Listed, so that the case fails by name rather than being left out silently.
        return bool(strip_suffix(entry.name)[1])
    if entry.is_dir():
        try:
            return is_dicom_folder(entry)
        except OSError:
            # Listed, too; every disk has this one, and only its administrator may read it.
            return entry.name != "lost+found"
    return bool(strip_suffix(entry.name)[1])

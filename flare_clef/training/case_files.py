"""The files of a training set that is written: scans linked, files of earlier cases removed."""

from __future__ import annotations

import os
from pathlib import Path

from flare_clef.errors import UserError
from flare_clef.images import read_image
from flare_clef.scan_files import strip_suffix
from flare_clef.writing import write_scan

_HEADERS = (".mhd", ".nhdr")
"""Formats of two files, a header and its voxels."""


def link_volume(source: Path, folder: Path, stem: str) -> None:
    """A link ``stem`` in ``folder``, with the suffix of ``source``, to that volume.

    Of a header with a file of voxels beside it ``stem.nii.gz`` is written: it names that file
    relative to where it is found, which would be the link's folder. Raises UserError.
    """
    suffix = strip_suffix(source.name)[1]
    if suffix.lower() in _HEADERS:
        path = folder / f"{stem}.nii.gz"
        write_scan(read_image(source), path)
    else:
        path = folder / f"{stem}{suffix}"
        _link(source.resolve(), path)
    for other in folder.iterdir():  # of an earlier run, when the case had another format
        if strip_suffix(other.name)[0] == stem and other != path:
            other.unlink(missing_ok=True)


def _link(source: Path, link: Path) -> None:
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f".{link.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(source)
        os.replace(temporary, link)
    except OSError as error:
        raise UserError(f"{link}: cannot be made ({error.strerror or error})") from None


def remove_others(output: Path, names: set[str]) -> None:
    """Removes the files of cases of an earlier run that are none of ``names``."""
    for kind in ("images", "labels", "probabilities"):
        for path in (output / kind).glob("*"):
            stem = strip_suffix(path.name)[0]
            if (stem.removesuffix("_0000") if kind == "images" else stem) not in names:
                path.unlink(missing_ok=True)

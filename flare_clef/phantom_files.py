"""Phantoms as files: a data folder that ``predict``, ``evaluate`` and ``train`` can use."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flare_clef.errors import UserError
from flare_clef.images import image_from_array
from flare_clef.locks import take_lock
from flare_clef.organs import ORGANS
from flare_clef.orientation import reorient
from flare_clef.phantom import Phantom, PhantomOptions
from flare_clef.writing import write_bytes, write_labels, write_scan


def write_phantom(
    phantom: Phantom, options: PhantomOptions, folder: Path, name: str, orientation: str
) -> None:
    """Writes ``images/NAME_0000.nii.gz`` and ``labels/NAME.nii.gz``, lists ``cases.json``.

    Raises UserError where something cannot be written; the case is listed last.
    """
    scan, labels = (
        reorient(image_from_array(array, phantom.spacing_mm, phantom.origin_mm), orientation)
        for array in (phantom.hu, phantom.labels)
    )
    write_scan(scan, folder / "images" / f"{name}_0000.nii.gz")
    write_labels(labels.array, labels, folder / "labels" / f"{name}.nii.gz")
    with _alone_in(folder):
        _list_case(folder / "cases.json", name, options)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process lists a case in ``folder``: one would undo the other's.

    The folder itself is locked: the list is replaced, not written to, and nothing stays behind.
    """
    if os.name == "nt":  # which opens no folder, and has no such lock
        yield
        return
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error})") from None
    try:
        take_lock(opened, wait=True)
        yield
    finally:
        os.close(opened)


def _list_case(path: Path, name: str, options: PhantomOptions) -> None:
    entries: dict[str, Any] = {}
    if path.is_file():
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        except ValueError as error:
            raise UserError(
                f"{path}: is no JSON ({error}); correct it or choose another OUT"
            ) from None
        if not isinstance(entries, dict):
            raise UserError(f"{path}: is no JSON object; correct it or choose another OUT")
    entries[name] = {
        "organs": [organ.name for organ in ORGANS],
        "source": f"synthetic, seed {options.seed}, {options.phase}",
    }
    write_bytes(path, (json.dumps(entries, indent=1) + "\n").encode())

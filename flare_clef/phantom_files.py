"""Phantoms as files: a data folder that ``predict``, ``evaluate`` and ``train`` can use."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from flare_clef.errors import UserError
from flare_clef.images import image_from_array
from flare_clef.organs import ORGANS
from flare_clef.orientation import reorient
from flare_clef.phantom import Phantom, PhantomOptions


def write_phantom(
    phantom: Phantom, options: PhantomOptions, folder: Path, name: str, orientation: str
) -> None:
    """Writes ``images/NAME_0000.nii.gz`` and ``labels/NAME.nii.gz``, lists ``cases.json``.

    Raises UserError where something cannot be written; the case is listed last.
    """
    targets = (
        (phantom.hu, folder / "images" / f"{name}_0000.nii.gz"),
        (phantom.labels, folder / "labels" / f"{name}.nii.gz"),
    )
    try:
        for array, path in targets:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(array, phantom, orientation, path)
        _list_case(folder / "cases.json", name, options)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]
        raise UserError(f"{folder}: cannot be written ({reason}); choose another OUT") from None


def _write(array: np.ndarray, phantom: Phantom, orientation: str, path: Path) -> None:
    image = reorient(image_from_array(array, phantom.spacing_mm, phantom.origin_mm), orientation)
    out = sitk.GetImageFromArray(image.array)
    out.SetSpacing(image.spacing_mm)
    out.SetOrigin(image.origin_mm)
    out.SetDirection(image.direction)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        sitk.WriteImage(out, str(temporary), True, 1)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _list_case(path: Path, name: str, options: PhantomOptions) -> None:
    entries: dict[str, Any] = {}
    if path.is_file():
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
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
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        temporary.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

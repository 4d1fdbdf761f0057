"""Synthetic scans with labels as training data: what ``data.phantoms`` of a recipe asks for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import SimpleITK as sitk

from flare_clef.organs import ORGANS
from flare_clef.phantom import PhantomOptions, make_phantom


def make_phantoms(
    folder: Path, count: int, on_case: Callable[[str], None] = lambda name: None
) -> Path:
    """Phantoms of the seeds 1 to ``count`` with all 13 organs, as a folder of cases.

    Seed 0, the default of ``flare-clef phantom``, stays one that no training has seen. Files
    that are there are kept.
    """
    entries = {}
    for seed in range(1, count + 1):
        name = f"phantom_{seed:03d}"
        entries[name] = {"organs": [organ.name for organ in ORGANS], "source": "synthetic"}
        image, labels = folder / "images" / f"{name}_0000.nii.gz", folder / "labels"
        if image.is_file() and (labels / f"{name}.nii.gz").is_file():
            continue
        phantom = make_phantom(PhantomOptions(seed=seed, pixel_mm=2.0, slice_thickness_mm=4.0))
        for path, array in ((labels / f"{name}.nii.gz", phantom.labels), (image, phantom.hu)):
            written = sitk.GetImageFromArray(array)
            written.SetSpacing(phantom.spacing_mm)
            written.SetOrigin(phantom.origin_mm)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{os.getpid()}.{path.name}")
            sitk.WriteImage(written, str(temporary), True)
            os.replace(temporary, path)
        on_case(name)
    (folder / "cases.json").write_text(json.dumps(entries, indent=1))
    return folder

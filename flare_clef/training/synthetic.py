"""Synthetic scans with labels as training data: what ``data.phantoms`` of a recipe asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from flare_clef.images import image_from_array
from flare_clef.organs import ORGANS
from flare_clef.phantom import PhantomOptions, make_phantom
from flare_clef.training.case_files import remove_others
from flare_clef.writing import write_bytes, write_labels, write_scan


def make_phantoms(
    folder: Path, count: int, on_case: Callable[[str], None] = lambda name: None
) -> Path:
    """Phantoms of the seeds 1 to ``count`` with all 13 organs, as a folder of cases.

    Seed 0, the default of ``flare-clef phantom``, stays one that no training has seen. Files
    that are there are kept, but for those of further seeds, which an earlier, larger ``count``
    left: who reads the folder would take them for cases.
    """
    entries = {}
    for seed in range(1, count + 1):
        name = f"phantom_{seed:03d}"
        entries[name] = {"organs": [organ.name for organ in ORGANS], "source": "synthetic"}
        image, labels = folder / "images" / f"{name}_0000.nii.gz", folder / "labels"
        if image.is_file() and (labels / f"{name}.nii.gz").is_file():
            continue
        phantom = make_phantom(PhantomOptions(seed=seed, pixel_mm=2.0, slice_thickness_mm=4.0))
        scan = image_from_array(phantom.hu, phantom.spacing_mm, phantom.origin_mm)
        write_labels(phantom.labels, scan, labels / f"{name}.nii.gz")
        write_scan(scan, image)
        on_case(name)
    remove_others(folder, set(entries))
    write_bytes(folder / "cases.json", json.dumps(entries, indent=1).encode())
    return folder

"""Small scans with boxes as organs, for the tests of cases, layouts, store and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from conftest import body_hu, write_scan

from flare_clef.organs import ORGAN_BY_NAME

SHAPE = (12, 24, 28)
# Stored as LPS: x grows towards the patient's left.
RIGHT, MIDDLE, LEFT = slice(5, 9), slice(12, 16), slice(19, 23)


def label_map(**places: slice) -> np.ndarray:
    """uint8 (z, y, x): each organ named is a box at its place along x, a row of y each."""
    labels = np.zeros(SHAPE, np.uint8)
    for row, (name, place) in enumerate(places.items()):
        labels[2:10, 6 + 3 * row : 9 + 3 * row, place] = ORGAN_BY_NAME[name].index
    return labels


def liver() -> np.ndarray:
    return label_map(liver=RIGHT)


def write_pair(
    folder: Path, name: str, labels: np.ndarray | None, organs: tuple[str, ...] = ("liver",)
) -> None:
    """Adds a case in our layout; without labels a scan for pre-training."""
    write_scan(folder / "images" / f"{name}_0000.nii.gz", body_hu(SHAPE))
    listed = folder / "cases.json"
    entries = json.loads(listed.read_text()) if listed.exists() else {}
    if labels is not None:
        write_scan(folder / "labels" / f"{name}.nii.gz", labels)
        entries[name] = {"organs": list(organs), "source": "a test"}
    listed.write_text(json.dumps(entries))

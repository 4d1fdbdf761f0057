"""Bodies of a few ellipsoid organs, bent differently in each: the true organ is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk

SPACING_MM = (4.0, 4.0, 4.0)
SHAPE = (44, 52, 56)
# Centre (z, y, x) and half axes, both in voxels, by organ. The duodenum (12) is a bow of
# three ellipsoids around the pancreas (4).
_ORGANS = {
    1: [((28, 22, 14), (10, 11, 10))],
    2: [((16, 36, 16), (8, 5, 5))],
    13: [((17, 36, 42), (8, 5, 5))],
    5: [((22, 36, 31), (18, 3, 3))],
    6: [((22, 35, 25), (18, 3, 3))],
    11: [((28, 18, 40), (9, 8, 8))],
    9: [((22, 16, 20), (4, 4, 4))],
    4: [((22, 25, 32), (4, 4, 9))],
    12: [((22, 23, 21), (5, 4, 3)), ((16, 27, 22), (5, 4, 3)), ((14, 29, 30), (3, 4, 7))],
}


def body_labels(seed: int) -> np.ndarray:
    """uint8 (z, y, x): a body scaled, shifted and bent by ``seed``."""
    generator = np.random.default_rng(seed)
    scale = generator.uniform(0.9, 1.1, 3)
    shift = generator.uniform(-2, 2, 3)
    phase = generator.uniform(0, 2 * np.pi, (3, 3))
    middle = np.array(SHAPE).reshape(3, 1, 1, 1) / 2
    place = np.indices(SHAPE).astype(float)
    waves = np.array([sum(np.sin(place[b] / 9 + phase[a, b]) for b in range(3)) for a in range(3)])
    bent = (place - middle) / scale.reshape(3, 1, 1, 1) + middle
    bent = bent + shift.reshape(3, 1, 1, 1) + 1.2 * waves
    labels = np.zeros(SHAPE, np.uint8)
    for organ, lumps in _ORGANS.items():
        for centre, half in lumps:
            inside = sum(((bent[a] - centre[a]) / half[a]) ** 2 for a in range(3))
            labels[(inside < 1) & (labels == 0)] = organ
    return labels


def write_volume(path: Path, array: np.ndarray, flipped: bool = False) -> Path:
    """Writes ``array``; ``flipped`` stores the x axis the other way round, same place."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING_MM)
    image.SetOrigin((-100.0, -80.0, 30.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.Flip(image, (True, False, False)) if flipped else image, str(path), True)
    return path


def write_training_set(
    folder: Path, names: dict[str, np.ndarray], organs: dict[str, list[str]]
) -> None:
    """images/, labels/ and cases.json; every scan is 40 HU of tissue."""
    for name, labels in names.items():
        scan = np.full(labels.shape, 40, np.int16)
        write_volume(folder / "images" / f"{name}_0000.nii.gz", scan)
        write_volume(folder / "labels" / f"{name}.nii.gz", labels)
    entries = {name: {"organs": organs[name]} for name in names}
    (folder / "cases.json").write_text(json.dumps(entries))

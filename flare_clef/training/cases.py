"""The cases of a data folder, and their prepared volumes on disk.

A folder holds ``images/NAME_0000.nii.gz``, ``labels/NAME.nii.gz`` and a ``cases.json`` that
says for each case which organs are labelled; an organ that is not stays out of its loss.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flare_clef.errors import UserError
from flare_clef.images import Image, read_image
from flare_clef.organs import ORGAN_BY_NAME, ORGANS
from flare_clef.preparation import Placement, place, prepare

STORE_FORMAT = 1


@dataclass(frozen=True)
class Case:
    """One scan with labels for some organs."""

    name: str
    image: Path
    labels: Path
    organs: tuple[str, ...]
    source: str = ""

    @property
    def labelled(self) -> torch.Tensor:
        """(13,) bool: organs that this case has labels for."""
        return torch.tensor([organ.name in self.organs for organ in ORGANS])


@dataclass(frozen=True)
class PreparedCase:
    """A case as the network sees it: memory-mapped, (z, y, x) canonical."""

    case: Case
    image: np.ndarray
    """float16 in (-1, 1)."""
    labels: np.ndarray
    """uint8, 0 to 13."""
    spacing_mm: tuple[float, float, float]
    """Of the prepared grid, (z, y, x)."""


def find_cases(folder: Path) -> list[Case]:
    """The labelled cases of ``folder``, sorted by name. Raises UserError, one line."""
    listed = folder / "cases.json"
    if not listed.is_file():
        listed = folder.parent / "cases.json"
    if not listed.is_file():
        raise UserError(f"{folder}: no cases.json here or above it; it names each case's organs")
    entries = json.loads(listed.read_text())
    entries = entries.get(folder.name, entries)
    cases = []
    for path in sorted((folder / "images").glob("*.nii.gz")):
        name = path.name.removesuffix(".nii.gz").removesuffix("_0000")
        labels = folder / "labels" / f"{name}.nii.gz"
        if name not in entries or not labels.is_file():
            continue
        entry = entries[name]
        unknown = [organ for organ in entry["organs"] if organ not in ORGAN_BY_NAME]
        if unknown:
            raise UserError(f"{listed}: case {name} names unknown organs {unknown}")
        cases.append(Case(name, path, labels, tuple(entry["organs"]), entry.get("source", "")))
    if not cases:
        raise UserError(f"{folder}: no images/NAME_0000.nii.gz with labels/NAME.nii.gz")
    return cases


def place_labels(labels: np.ndarray, placement: Placement) -> np.ndarray:
    """``labels`` (stored axes) on the prepared grid, nearest neighbour, canonical (z, y, x)."""
    view = placement.canonical_view(labels)
    picks = []
    for (start, stop), cells in zip(placement.box, placement.grid, strict=True):
        centres = start + (np.arange(cells) + 0.5) * (stop - start) / cells
        picks.append(np.minimum(centres.astype(np.int64), stop - 1))
    return np.ascontiguousarray(view[np.ix_(*picks)])


def check_pair(case: Case, image: Image, labels: Image) -> None:
    """Image and labels must lie on the same grid and hold only 0 to 13."""
    if image.array.shape != labels.array.shape:
        raise UserError(
            f"{case.labels}: {labels.array.shape} voxels (z, y, x), its image {image.array.shape}"
        )
    if not np.allclose(image.spacing_mm, labels.spacing_mm, rtol=1e-3):
        raise UserError(
            f"{case.labels}: spacing {labels.spacing_mm} mm, its image {image.spacing_mm} mm"
        )
    if not np.allclose(image.direction, labels.direction, atol=1e-3):
        raise UserError(f"{case.labels}: its axes point elsewhere than those of its image")
    highest = int(labels.array.max())
    if highest > len(ORGANS):
        raise UserError(f"{case.labels}: holds the label {highest}; only 0 to 13 have a meaning")


def _key(case: Case, grid: int) -> str:
    digest = hashlib.sha256(f"{STORE_FORMAT} {grid}".encode())
    for path in (case.image, case.labels):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def prepare_case(case: Case, store: Path, grid: int) -> PreparedCase:
    """The prepared volumes of ``case``, made once and kept under ``store`` by content."""
    folder = store / f"{case.name}-{_key(case, grid)}"
    if not folder.is_dir():
        image, labels = read_image(case.image), read_image(case.labels)
        check_pair(case, image, labels)
        prepared = prepare(image.array, image.direction, grid)
        if prepared is None:
            raise UserError(f"{case.image}: no voxel above -500 HU, so there is no body in it")
        volume, placement = prepared
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        temporary.mkdir(parents=True)
        np.save(temporary / "image.npy", volume.to(torch.float16).numpy())
        np.save(temporary / "labels.npy", place_labels(labels.array.astype(np.uint8), placement))
        record = {"spacing_mm": placement.grid_spacing_mm(image.spacing_mm)}
        (temporary / "record.json").write_text(json.dumps(record))
        os.replace(temporary, folder)
    record = json.loads((folder / "record.json").read_text())
    return PreparedCase(
        case,
        np.load(folder / "image.npy", mmap_mode="r"),
        np.load(folder / "labels.npy", mmap_mode="r"),
        tuple(record["spacing_mm"]),
    )


def placement_of(image: Image, grid: int) -> Placement:
    """Placement of ``image`` without preparing it, for label maps alone."""
    from flare_clef.preparation import body_box, canonical_axes, canonical_view

    axes, flips = canonical_axes(image.direction)
    box = body_box(canonical_view(image.array, axes, flips))
    if box is None:
        raise UserError(f"{image.source}: no voxel above -500 HU, so there is no body in it")
    return place(image.array.shape, image.direction, box, grid)  # type: ignore[arg-type]

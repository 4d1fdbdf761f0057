"""A case of a training set: its files, what is labelled in it, and its prepared volumes.

Cases come from :mod:`flare_clef.training.datasets`, are judged by
:mod:`flare_clef.training.checking` and prepared by :mod:`flare_clef.training.preparing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flare_clef.errors import UserError
from flare_clef.images import Image, read_image
from flare_clef.organs import ORGANS
from flare_clef.preparation import Placement
from flare_clef.training.doubt import UNDECIDED

IMAGE_FILE, LABELS_FILE = "image.npy", "labels.npy"
"""The arrays of a prepared case, in its folder."""


@dataclass(frozen=True)
class Case:
    """One scan, with labels for some organs or for none."""

    name: str
    image: Path
    labels: Path | None
    """None: a scan for pre-training."""
    organs: tuple[str, ...]
    source: str = ""
    renumbering: tuple[tuple[int, int], ...] = ()
    """(value in the label file, ours) of every value it may hold; empty: it holds ours."""
    propagated: str = ""
    """The organ whose labels :mod:`flare_clef.training.propagation` made."""
    propagated_before: tuple[str, ...] = ()
    """Further ones that it made earlier, of which no probabilities are kept."""
    chances: Path | None = None
    """Its probability map, uint8 with 255 being 1, on the grid of ``labels``."""
    bent_from: str = ""
    """The case that :mod:`flare_clef.training.bending` made this one of."""
    shapes_of: str = ""
    """The label map in whose shapes it was bent."""

    @property
    def origins(self) -> set[str]:
        """Names of the cases whose scan or shapes it shows."""
        return {self.name, self.bent_from, self.shapes_of} - {""}

    @property
    def made(self) -> tuple[str, ...]:
        """Organs whose labels are no person's: :attr:`propagated` first."""
        return tuple(name for name in (self.propagated, *self.propagated_before) if name)

    @property
    def judged(self) -> tuple[str, ...]:
        """Organs that predictions are compared on: those that nobody propagated."""
        return tuple(name for name in self.organs if name not in self.made)

    @property
    def labelled(self) -> torch.Tensor:
        """(13,) bool: organs that this case has labels for."""
        return torch.tensor([organ.name in self.organs for organ in ORGANS])


@dataclass(frozen=True)
class PreparedCase:
    """A case as the network sees it, canonical (z, y, x), in a folder of its own.

    The volumes are mapped into memory each time they are asked for and let go with the array:
    a mapping holds a file descriptor and the pages that were read, and a training set may
    have thousands of cases.
    """

    case: Case
    folder: Path
    spacing_mm: tuple[float, float, float]
    """Of the prepared grid, (z, y, x)."""

    @property
    def image(self) -> np.ndarray:
        """float16 in (-1, 1), read only."""
        return np.load(self.folder / IMAGE_FILE, mmap_mode="r")

    @property
    def labels(self) -> np.ndarray:
        """uint8, as :mod:`flare_clef.training.doubt` packs it, read only; all ``UNDECIDED``
        without a label map."""
        if self.case.labels is None:
            return np.broadcast_to(np.uint8(UNDECIDED), self.image.shape)
        return np.load(self.folder / LABELS_FILE, mmap_mode="r")


def find_cases(folder: Path) -> list[Case]:
    """The labelled cases of ``folder``, sorted by name. Raises UserError at the first fault."""
    from flare_clef.training.datasets import read_dataset

    dataset = read_dataset(folder)
    if dataset.problems:
        raise UserError(dataset.problems[0])
    cases = [case for case in dataset.cases if case.labels is not None]
    if not cases:
        raise UserError(f"{folder}: no images/NAME_0000.nii.gz with labels/NAME.nii.gz")
    return cases


def prepare_case(case: Case, store: Path, grid: int) -> PreparedCase:
    """The prepared volumes of one case, as :func:`flare_clef.training.preparing.prepare_all`."""
    from flare_clef.training.preparing import Store

    store_of = Store(store, grid)
    try:
        return store_of.prepare(case).prepared
    finally:
        store_of.save_checksums()


def read_labels(case: Case) -> Image:
    """The label map of ``case`` in our numbers: uint8, 0 to 13 or ``UNDECIDED``.

    Raises UserError, one line, where it cannot be read or holds other values.
    """
    if case.labels is None:
        raise UserError(f"{case.image}: this case has no label map")
    image = read_image(case.labels)
    stored = image.array
    with np.errstate(invalid="ignore"):
        array = stored if stored.dtype == np.uint8 else stored.astype(np.uint8)
    if array is not stored and not np.array_equal(array, stored):
        odd = stored[array != stored].flat[0]
        raise UserError(f"{case.labels}: holds the value {odd}; {_allowed(case)}")
    present = np.flatnonzero(histogram(array))
    known = dict(case.renumbering) or {v: v for v in (*range(len(ORGANS) + 1), UNDECIDED)}
    for value in present:
        if int(value) not in known:
            raise UserError(f"{case.labels}: holds the label {value}; {_allowed(case)}")
    table = np.zeros(256, np.uint8)
    for theirs, ours in known.items():
        table[theirs] = ours
    if any(table[value] != value for value in present):
        array = table[array]
    return Image(array, image.spacing_mm, image.origin_mm, image.direction, image.source)


def _allowed(case: Case) -> str:
    if case.renumbering:
        named = ", ".join(str(theirs) for theirs, _ in case.renumbering)
        return f"dataset.json gives a meaning to {named} only"
    return f"only 0 to {len(ORGANS)} and {UNDECIDED} (undecided) have a meaning"


def histogram(labels: np.ndarray) -> np.ndarray:
    """(256,) voxels of each value of a uint8 array, slice by slice: bincount takes 8 bytes each."""
    counts = np.zeros(256, np.int64)
    for plane in labels:
        counts += np.bincount(plane.ravel(), minlength=256)
    return counts


def place_labels(labels: np.ndarray, placement: Placement) -> np.ndarray:
    """``labels`` (stored axes) on the prepared grid, nearest neighbour, canonical (z, y, x).

    Air that the placement adds below and above is background.
    """
    view = placement.canonical_view(labels)
    picks, in_air = [], []
    for (start, stop), cells, size in zip(placement.box, placement.grid, view.shape, strict=True):
        centres = start + (np.arange(cells) + 0.5) * (stop - start) / cells
        nearest = np.minimum(np.floor(centres).astype(np.int64), stop - 1)
        in_air.append((nearest < 0) | (nearest >= size))
        picks.append(nearest.clip(0, size - 1))
    placed = np.ascontiguousarray(view[np.ix_(*picks)])
    placed[in_air[0]] = 0
    return placed


def check_pair(case: Case, image: Image, labels: Image) -> None:
    """Image and labels must lie on the same grid: shape, spacing, axes and origin.

    Raises UserError, one line. Origins may differ by a tenth of the smallest voxel side, which
    is what headers in single precision leave.
    """
    if image.array.shape != labels.array.shape:
        raise UserError(
            f"{case.labels}: {labels.array.shape} voxels (z, y, x), its image {image.array.shape}"
        )
    if not np.allclose(image.spacing_mm, labels.spacing_mm, rtol=1e-3):
        raise UserError(
            f"{case.labels}: spacing {_shown(labels.spacing_mm)} mm, "
            f"its image {_shown(image.spacing_mm)} mm"
        )
    if not np.allclose(image.direction, labels.direction, atol=1e-3):
        raise UserError(f"{case.labels}: its axes point elsewhere than those of its image")
    apart = np.linalg.norm(np.subtract(image.origin_mm, labels.origin_mm))
    if apart > 0.1 * min(image.spacing_mm):
        raise UserError(
            f"{case.labels}: origin {_shown(labels.origin_mm)} mm, its image "
            f"{_shown(image.origin_mm)} mm; copy the image's geometry if they belong together"
        )


def _shown(numbers: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(number, 3) for number in numbers)

"""What an evaluation reads: pairs of label files, and which organs each case has labels for."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flare_clef.errors import UserError
from flare_clef.images import read_image
from flare_clef.organs import ORGAN_BY_NAME, ORGANS
from flare_clef.scan_files import find_inputs, output_name, strip_suffix

if TYPE_CHECKING:
    from flare_clef.images import Image

CASES_FILE = "cases.json"

_WAY_OUT = "correct it, or name the right file (evaluate --cases FILE)"
_CHUNK_SLICES = 16
_SHOWN_VALUES = 5


@dataclass(frozen=True)
class Pair:
    """A reference and the prediction that goes with it."""

    case: str
    reference: Path
    prediction: Path | None


@dataclass(frozen=True)
class LabelMap:
    """A label file: where it is, its labels, and its header."""

    path: Path
    labels: np.ndarray
    """uint8, (z, y, x) as stored, 0 to 13; any other value of the file is 0 here."""
    image: Image
    unknown: str
    """The values outside 0 to 13 in words, empty where there are none."""


def match_files(predictions: Path, references: Path) -> tuple[list[Pair], dict[str, Path]]:
    """References with their predictions, sorted by case; and predictions without a reference.

    Folders match by name without suffix and ``_0000``; a file and a file are a pair.
    """
    if references.is_file() and predictions.is_file():
        return [Pair(case_name(references), references, predictions)], {}
    referenced, predicted = (
        files_by_case(place, label_maps=True) for place in (references, predictions)
    )
    pairs = [Pair(case, path, predicted.pop(case, None)) for case, path in referenced.items()]
    return pairs, predicted


def case_name(path: Path) -> str:
    """File name without its suffix, without 3D Slicer's ``.seg`` and without ``_0000``."""
    return strip_suffix(output_name(path))[0].removesuffix(".seg")


def files_by_case(place: Path, *, label_maps: bool = False) -> dict[str, Path]:
    """The volumes of a folder by :func:`case_name`, sorted; UserError where two share a name.

    ``label_maps``: a ``.seg.nrrd`` is one of them.
    """
    paths: dict[str, Path] = {}
    for path in find_inputs(place, segmentations=label_maps):
        other = paths.setdefault(case_name(path), path)
        if other is not path:
            raise UserError(
                f"{path}: {other.name} is the same case, {case_name(path)}; keep one of the two"
            )
    return dict(sorted(paths.items()))


def read_label_map(path: Path) -> LabelMap:
    """Reads a label file. Raises UserError where its values are no whole numbers."""
    image = read_image(path)
    labels = np.empty(image.array.shape, dtype=np.uint8)
    counts: dict[int, int] = {}
    for start in range(0, len(labels), _CHUNK_SLICES):
        chunk = image.array[start : start + _CHUNK_SLICES]
        known = (chunk >= 0) & (chunk <= len(ORGANS))
        if not np.issubdtype(chunk.dtype, np.integer):
            broken = ~(np.isfinite(chunk) & (chunk == np.rint(chunk)))
            if broken.any():
                raise UserError(
                    f"{path}: holds the value {chunk[broken][0]:g}, so it is no label map; "
                    "expected whole numbers from 0 to 13"
                )
        labels[start : start + _CHUNK_SLICES] = np.where(known, chunk, 0)
        values, numbers = np.unique(chunk[~known], return_counts=True)
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
            counts[int(value)] = counts.get(int(value), 0) + number
    return LabelMap(path, labels, image, _in_words(counts))


def _in_words(counts: dict[int, int]) -> str:
    if not counts:
        return ""
    shown = ", ".join(str(value) for value in sorted(counts)[:_SHOWN_VALUES])
    more = ", …" if len(counts) > _SHOWN_VALUES else ""
    return f"{sum(counts.values()):,} voxel(s) outside 0 to 13 ({shown}{more})"


def read_labels_of(scan: Image, path: Path) -> np.ndarray:
    """The label map of ``scan``, uint8 (z, y, x). Raises UserError where it is another's."""
    found = read_label_map(path)
    name = scan.source or "the scan"
    if found.labels.shape != scan.array.shape:
        raise UserError(
            f"{path}: {found.labels.shape} voxels (z, y, x), {name} has {scan.array.shape}; labels "
            "of another scan?"
        )
    if apart := misplacement(found.image, scan, name):
        raise UserError(f"{path}: {apart}; labels of another scan?")
    if found.unknown:
        raise UserError(f"{path}: {found.unknown}; is it a label map of these organs?")
    return found.labels


def misplacement(image: Image, scan: Image, name: Path | str) -> str:
    """In words, where a voxel of ``image`` lies half a voxel or more off the one of ``scan``.

    Empty where none does. Both have the same shape; ``name`` is the scan's.
    """
    apart_mm = misplacement_mm(image, scan)
    if apart_mm <= 0.5 * min(scan.spacing_mm):
        return ""
    return f"its voxels lie up to {apart_mm:.3g} mm from those of {name}"


def misplacement_mm(image: Image, other: Image) -> float:
    """How far apart a voxel of one grid and its partner of the other lie, at most.

    Both have the same shape. The largest distance is that of a corner, as both grids are
    affine.
    """
    last = np.array(image.array.shape[::-1]) - 1
    corners = np.array(list(product((0, 1), repeat=3))) * last
    gaps = _positions_mm(image, corners) - _positions_mm(other, corners)
    return float(np.linalg.norm(gaps, axis=1).max())


def shear_degrees(image: Image) -> float:
    """How far, in degrees, the angle of two of the three axes is from a right one, at most."""
    axes = np.asarray(image.direction, dtype=np.float64).reshape(3, 3)
    axes = axes / np.linalg.norm(axes, axis=0)
    return float(np.degrees(np.arcsin(min(1.0, np.abs(axes.T @ axes - np.eye(3)).max()))))


def _positions_mm(image: Image, indices: np.ndarray) -> np.ndarray:
    """Positions (n, 3) of voxel ``indices`` (n, 3), x first, as ITK defines them."""
    direction = np.asarray(image.direction, dtype=np.float64).reshape(3, 3)
    steps = direction * np.asarray(image.spacing_mm, dtype=np.float64)
    return np.asarray(image.origin_mm) + indices @ steps.T


def find_cases_file(references: Path) -> Path | None:
    """The nearest ``cases.json``: beside the references, or in one of two folders above."""
    folder = (references if references.is_dir() else references.parent).resolve()
    for place in (folder, *folder.parents[:2]):
        if (place / CASES_FILE).is_file():
            return place / CASES_FILE
    return None


def read_labelled_organs(
    path: Path, references: Path, cases: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """Which organs are labelled, by case, as the ``cases.json`` at ``path`` says of ``cases``.

    It maps a case to ``{"organs": [names]}`` or to the list itself, at the top or one folder
    deeper (``{folder: {case: …}}``); entries without organs are passed over. A case that
    stands in several folders is read from the one that ``references`` lies in.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); {_WAY_OUT}") from None
    if not isinstance(entries, dict):
        raise UserError(f'{path}: is no JSON object {{"CASE": {{"organs": […]}}, …}}; {_WAY_OUT}')
    found: dict[str, dict[str, list[Any]]] = {}
    for key, entry in entries.items():
        organs = _organ_list(entry)
        if organs is not None:
            found.setdefault(key, {})[""] = organs
        elif isinstance(entry, dict):
            for case, inner in entry.items():
                organs = _organ_list(inner)
                if organs is not None:
                    found.setdefault(case, {})[key] = organs
    folders = references.resolve().parts
    return {case: _choose(path, case, found[case], folders) for case in cases if case in found}


def _organ_list(entry: Any) -> list[Any] | None:
    organs = entry.get("organs") if isinstance(entry, dict) else entry
    return organs if isinstance(organs, list) else None


def _choose(
    path: Path, case: str, places: dict[str, list[Any]], folders: tuple[str, ...]
) -> tuple[str, ...]:
    here = [organs for folder, organs in places.items() if folder in folders]
    choices = here or list(places.values())
    for name in (name for organs in choices for name in organs):
        if not isinstance(name, str) or name not in ORGAN_BY_NAME:
            raise UserError(
                f"{path}: case {case} names the organ {name!r}; "
                f"known are {', '.join(ORGAN_BY_NAME)}; {_WAY_OUT}"
            )
    if any(set(organs) != set(choices[0]) for organs in choices):
        raise UserError(
            f"{path}: case {case} has different organs under {', '.join(places)}; "
            "put the references into a folder of one of these names"
        )
    return tuple(choices[0])

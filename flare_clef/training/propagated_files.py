"""What propagation leaves on disk: a training set with the new organ, and a summary."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from flare_clef.errors import UserError
from flare_clef.images import read_image
from flare_clef.metrics import voxel_ml
from flare_clef.organs import Organ
from flare_clef.paths import check_writable
from flare_clef.training.case_files import link_volume
from flare_clef.training.cases import Case, read_labels
from flare_clef.training.doubt import UNDECIDED
from flare_clef.training.fusion import CERTAIN, POSSIBLE, Calibration, possible_values
from flare_clef.training.registration import Grid
from flare_clef.writing import labels_to_sitk, write_bytes, write_labels


@dataclass(frozen=True)
class Vote:
    """The fused vote for one target, on its working grid."""

    grid: Grid
    fused: np.ndarray
    """(z, y, x), 0 to 1; 0 where another organ lies."""
    agreement: float
    """DSC of the neighbouring organs after the deformable step, mean of the atlases used."""


@dataclass
class Propagated:
    """What became of a run."""

    calibration: Calibration | None = None
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: ``labels`` (own or propagated), volumes in ml, the agreement."""
    problems: list[str] = field(default_factory=list)


def write_case(
    case: Case, organ: Organ, vote: Vote | None, calibration: Calibration, output: Path
) -> dict[str, Any]:
    """Writes a case's files under ``output`` and returns its entry of the summary.

    ``labels/NAME.nii.gz``: its own labels, ``organ`` where certain, ``UNDECIDED`` where neither
    certain nor ruled out. ``probabilities/NAME.nii.gz``: uint8, 255 being 1.
    ``images/NAME_0000.nii.gz``: a link to the scan. Without ``vote`` the case has its own
    labels of the organ, which stay. Raises UserError.
    """
    own, scan = read_labels(case), read_image(case.image)
    if own.array.shape != scan.array.shape:
        raise UserError(
            f"{case.labels}: {own.array.shape} voxels (z, y, x), its image {scan.array.shape}"
        )
    labels = np.array(own.array)
    entry: dict[str, Any] = {"labels": "own"}
    chances = output / "probabilities" / f"{case.name}.nii.gz"
    # One of another organ, or of before there were labels, would be taken for this one's.
    chances.unlink(missing_ok=True)
    if vote is not None:
        chance = probability_on(vote, calibration, scan.array, labels, labels_to_sitk(labels, own))
        certain = chance >= round(255 * CERTAIN)
        undecided = (chance >= round(255 * POSSIBLE)) & ~certain
        labels[certain], labels[undecided] = organ.index, UNDECIDED
        write_labels(chance, own, chances)
        one_ml = voxel_ml(own.spacing_mm, own.direction)
        entry = {
            "labels": "propagated",
            "certain_ml": round(float(certain.sum()) * one_ml, 1),
            "undecided_ml": round(float(undecided.sum()) * one_ml, 1),
            "expected_ml": round(float(chance.sum(dtype=np.float64)) / 255 * one_ml, 1),
            "neighbours_dsc": round(vote.agreement, 3),
        }
    write_labels(labels, own, output / "labels" / f"{case.name}.nii.gz")
    link_volume(case.image, output / "images", f"{case.name}_0000")
    return entry


def probability_on(
    vote: Vote,
    calibration: Calibration,
    hu: np.ndarray | None,
    labels: np.ndarray,
    like: sitk.Image,
) -> np.ndarray:
    """The organ's probability, uint8 with 255 being 1, on the grid of ``labels`` and ``like``.

    0 where ``labels`` hold another organ and where the scan's values ``hu`` rule it out.
    """
    array = vote_on(calibration.probability(vote.fused), vote.grid, like)
    open_ = (labels == 0) | (labels == UNDECIDED)
    if hu is not None:
        open_ &= possible_values(hu)
    array[~open_] = 0
    return array


def vote_on(vote: np.ndarray, grid: Grid, like: sitk.Image) -> np.ndarray:
    """``vote`` (z, y, x on ``grid``, 0 to 1) on the grid of ``like``: uint8, 255 being 1."""
    image = grid.image((255 * vote).astype(np.float32))
    moved = sitk.Resample(image, like, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkUInt8)
    return sitk.GetArrayFromImage(moved)


def check_output(output: Path) -> None:
    """Raises UserError where ``output`` holds a training set that is not of propagation."""
    ours = (output / "store").is_dir() or (output / "summary.json").is_file()
    if not ours and any((output / kind).exists() for kind in ("images", "labels")):
        raise UserError(
            f"{output}: holds images/ or labels/ of others, which would be replaced; name another "
            "folder with --output"
        )
    check_writable(output)


def write_records(result: Propagated, cases: dict[str, Case], organ: Organ, output: Path) -> None:
    """``cases.json`` (the folder is a training set) and ``summary.json``."""
    entries: dict[str, dict[str, Any]] = {}
    for name, entry in result.cases.items():
        case = cases[name]
        entries[name] = {"organs": list(case.organs), "source": case.source}
        if case.bent_from:  # else copies of cases kept aside would be trained on
            entries[name] |= {"bent_from": case.bent_from, "shapes_of": case.shapes_of}
        new = [organ.name] if entry["labels"] == "propagated" else []
        entries[name]["organs"] += new
        if new or case.made:
            entries[name]["propagated"] = [*new, *case.made]
    summary = {
        "organ": organ.name,
        "certain_from": CERTAIN,
        "possible_from": POSSIBLE,
        "calibration": asdict(result.calibration) if result.calibration else None,
        "cases": result.cases,
        "problems": result.problems,
    }
    write_bytes(output / "cases.json", json.dumps(entries, indent=1).encode())
    write_bytes(output / "summary.json", json.dumps(summary, indent=1).encode())

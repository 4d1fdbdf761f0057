"""Labels for an organ that some label sets have and others lack.

Every atlas (a label map that has the organ) is laid over every case by the organs that both
have; the atlases' organs are votes. Atlases that are left out in turn tell what a vote is
worth, so that each voxel of a case is the organ, certainly not the organ, or undecided.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from flare_clef.errors import UserError
from flare_clef.images import read_image, strip_suffix
from flare_clef.organs import Organ
from flare_clef.training.atlas_store import (
    load_maps,
    load_survey,
    load_vote,
    store_maps,
    store_survey,
    store_vote,
)
from flare_clef.training.atlas_votes import DEFORMED_ATLASES, Surroundings, Votes, collect
from flare_clef.training.cases import Case, read_labels
from flare_clef.training.doubt import UNDECIDED
from flare_clef.training.fusion import CERTAIN, POSSIBLE, Calibration, calibrate, possible_values
from flare_clef.training.registration import Grid, nearness_weights
from flare_clef.writing import labels_to_sitk, write_bytes, write_labels

SPACING_MM = 4.0
CALIBRATION_ATLASES = 8
_LEAST_ATLASES = 3


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


def find_atlases(folder: Path) -> list[Path]:
    """The label maps of ``folder``, or of its ``labels/``, by name. Raises UserError."""
    place = folder / "labels" if (folder / "labels").is_dir() else folder
    if not place.is_dir():
        raise UserError(f"{folder}: no such folder; check the path")
    found = [p for p in sorted(place.iterdir()) if strip_suffix(p.name)[1] and p.name[0] != "."]
    if not found:
        raise UserError(f"{place}: no label map in it; expected NAME.nii.gz")
    return found


class Workshop:
    """A pool of processes and the store they share; usable as a context.

    ``on_done`` is told after each finished piece of work what it was.
    """

    def __init__(
        self, store: Path, workers: int, on_done: Callable[[str], None] | None = None
    ) -> None:
        self.store = store
        self._tell = on_done or (lambda what: None)
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _gather(
        self, work: dict[Future[Path], Any], what: str
    ) -> tuple[dict[Any, Path], dict[Any, str]]:
        """Results and error lines, by the work's own key."""
        done, failed = {}, {}
        for future in as_completed(work):
            key = work[future]
            try:
                done[key] = future.result()
            except UserError as error:
                failed[key] = str(error)
            except RuntimeError as error:
                failed[key] = f"registration failed ({str(error).splitlines()[-1].strip()})"
            self._tell(what)
        return done, failed

    def maps(self, files: dict[str, Path]) -> tuple[dict[str, Path], dict[str, str]]:
        """Organ maps of label files, by name, and what is wrong with the others."""
        work = {
            self._pool.submit(store_maps, path, self.store, SPACING_MM): name
            for name, path in files.items()
        }
        return self._gather(work, "organ maps")

    def votes(
        self,
        targets: dict[str, Path],
        atlases: dict[str, Path],
        organ: int,
        weights: dict[int, float],
    ) -> tuple[dict[str, tuple[Surroundings, Votes]], dict[str, str]]:
        """By target, the votes of atlases of another name; and failures, a line each."""
        used = {t: [a for n, a in sorted(atlases.items()) if n != t] for t in targets}
        work = {
            self._pool.submit(store_survey, path, used[name], organ, weights, self.store): name
            for name, path in targets.items()
        }
        surveys, failed = self._gather(work, "survey")
        pairs = {
            self._pool.submit(
                store_vote, targets[name], around, used[name][number], organ, weights, self.store
            ): (name, number)
            for name, around in surveys.items()
            for number in load_survey(around).ranking[:DEFORMED_ATLASES]
        }
        fitted, unfit = self._gather(pairs, "pair")
        votes = {}
        for name, path in surveys.items():
            own = [vote for (target, _), vote in sorted(fitted.items()) if target == name]
            if own:
                votes[name] = load_survey(path), collect([load_vote(vote) for vote in own])
            else:
                failed[name] = next(text for (target, _), text in unfit.items() if target == name)
        return votes, failed


def organ_weights(atlases: dict[str, Path], organ: int) -> dict[int, float]:
    """:func:`nearness_weights` of stored atlases."""
    return nearness_weights([load_maps(path) for path in atlases.values()], organ)


def propagate(
    atlases: Path,
    cases: list[Case],
    organ: Organ,
    output: Path,
    workers: int,
    on_done: Callable[[str], None] | None = None,
) -> Propagated:
    """Labels ``organ`` in all ``cases`` that lack it; see :func:`write_case` for the files.

    A bad atlas or case is a line of ``problems``; the rest is done. Raises UserError where
    nothing can be done at all.
    """
    result = Propagated()
    files = {strip_suffix(path.name)[0]: path for path in find_atlases(atlases)}
    lacking = [case for case in cases if case.labels is not None and organ.name not in case.organs]
    with Workshop(output / "store", workers, on_done) as shop:
        kept, failed = shop.maps(files)
        result.problems += [f"{text}; atlas left out" for text in failed.values()]
        for name in [n for n, path in kept.items() if organ.index not in load_maps(path).shares]:
            result.problems.append(f"{files[name]}: holds no {organ.name}; atlas left out")
            del kept[name]
        if len(kept) < _LEAST_ATLASES:
            raise UserError(
                f"{atlases}: {len(kept)} usable label map(s) with {organ.name}; at least "
                f"{_LEAST_ATLASES} are needed"
                + (f" ({result.problems[0]})" if result.problems else "")
            )
        targets = {case.name: _in_our_numbers(case, output / "store") for case in lacking}
        found, failed = shop.maps(targets)
        result.problems += [f"{text}; case left out" for text in failed.values()]
        names = sorted(kept)
        held = names[:: max(1, len(names) // CALIBRATION_ATLASES)][:CALIBRATION_ATLASES]
        weights = organ_weights(kept, organ.index)
        tried, _ = shop.votes({name: kept[name] for name in held}, kept, organ.index, weights)
        result.calibration = calibration = calibrate(
            [votes.fused(around.taken) for around, votes in tried.values()],
            [_true_organ(kept[n], organ.index, around.grid) for n, (around, _) in tried.items()],
        )
        found_votes, failed = shop.votes(found, kept, organ.index, weights)
        votes = {
            name: Vote(around.grid, votes.fused(around.taken), float(np.mean(votes.agreement)))
            for name, (around, votes) in found_votes.items()
        }
    by_name = {case.name: case for case in cases}
    result.problems += [f"{by_name[n].labels}: {text}; left out" for n, text in failed.items()]
    for case in cases:
        if case.labels is None or (case in lacking and case.name not in votes):
            continue
        try:
            result.cases[case.name] = write_case(
                case, organ, votes.get(case.name), calibration, output
            )
        except UserError as error:
            result.problems.append(f"{error}; case left out")
    _write_records(result, by_name, organ, output)
    return result


def _in_our_numbers(case: Case, store: Path) -> Path:
    """The case's label file, or a translated copy where its set numbers organs otherwise."""
    assert case.labels is not None
    if not case.renumbering:
        return case.labels
    image = read_labels(case)
    write_labels(image.array, image, store / f"{case.name}.nii.gz")
    return store / f"{case.name}.nii.gz"


def _true_organ(maps: Path, organ: int, grid: Grid) -> np.ndarray:
    """bool (z, y, x): the organ of a stored label map on ``grid``."""
    kept = load_maps(maps)
    image = kept.grid.image(kept.shares[organ])
    reference = grid.image(np.zeros(grid.shape, np.uint8))
    return sitk.GetArrayFromImage(sitk.Resample(image, reference, sitk.Transform())) > 127


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
    if vote is not None:
        chance = probability_on(vote, calibration, scan.array, labels, labels_to_sitk(labels, own))
        certain = chance >= round(255 * CERTAIN)
        undecided = (chance >= round(255 * POSSIBLE)) & ~certain
        labels[certain], labels[undecided] = organ.index, UNDECIDED
        write_labels(chance, own, output / "probabilities" / f"{case.name}.nii.gz")
        voxel_ml = float(np.prod(own.spacing_mm)) / 1000
        entry = {
            "labels": "propagated",
            "certain_ml": round(float(certain.sum()) * voxel_ml, 1),
            "undecided_ml": round(float(undecided.sum()) * voxel_ml, 1),
            "expected_ml": round(float(chance.sum(dtype=np.float64)) / 255 * voxel_ml, 1),
            "neighbours_dsc": round(vote.agreement, 3),
        }
    write_labels(labels, own, output / "labels" / f"{case.name}.nii.gz")
    suffix = strip_suffix(case.image.name)[1]
    _link(case.image.resolve(), output / "images" / f"{case.name}_0000{suffix}")
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


def _link(source: Path, link: Path) -> None:
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f".{link.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(source)
        os.replace(temporary, link)
    except OSError as error:
        raise UserError(f"{link}: cannot be made ({error.strerror or error})") from None


def _write_records(result: Propagated, cases: dict[str, Case], organ: Organ, output: Path) -> None:
    """``cases.json`` (the folder is a training set) and ``summary.json``."""
    entries: dict[str, dict[str, Any]] = {}
    for name, entry in result.cases.items():
        case = cases[name]
        entries[name] = {"organs": list(case.organs), "source": case.source}
        if entry["labels"] == "propagated":
            entries[name] |= {"organs": [*case.organs, organ.name], "propagated": [organ.name]}
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

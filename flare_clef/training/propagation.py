"""Labels for an organ that some label sets have and others lack.

Every atlas (a label map that has the organ) is laid over every case by the organs that both
have; the atlases' organs are votes. Atlases that are left out in turn tell what a vote is
worth, so that each voxel of a case is the organ, certainly not the organ, or undecided.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from flare_clef.errors import UserError
from flare_clef.images import strip_suffix
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
from flare_clef.training.fusion import calibrate
from flare_clef.training.propagated_files import (
    Propagated,
    Vote,
    write_case,
    write_records,
)
from flare_clef.training.registration import Grid, nearness_weights
from flare_clef.writing import write_labels

SPACING_MM = 4.0
CALIBRATION_ATLASES = 8
_LEAST_ATLASES = 3


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
    write_records(result, by_name, organ, output)
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

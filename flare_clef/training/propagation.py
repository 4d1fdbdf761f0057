"""Labels for an organ that some label sets have and others lack.

Every atlas (a label map that has the organ) is laid over every case by the organs that both
have; the atlases' organs are votes. Atlases that are left out in turn tell what a vote is
worth, so that each voxel of a case is the organ, certainly not the organ, or undecided.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from flare_clef.errors import UserError
from flare_clef.organs import Organ
from flare_clef.scan_files import strip_suffix
from flare_clef.training.atlas_store import load_maps
from flare_clef.training.atlas_votes import Surroundings, Votes
from flare_clef.training.case_files import remove_others
from flare_clef.training.cases import Case, read_labels
from flare_clef.training.fusion import calibrate
from flare_clef.training.neighbourhood import Learnt
from flare_clef.training.propagated_files import (
    Propagated,
    Vote,
    check_output,
    write_case,
    write_records,
)
from flare_clef.training.registration import LEAST_COMMON_ORGANS, Grid, nearness_weights
from flare_clef.training.workshop import Workshop
from flare_clef.writing import write_labels

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
    names = [strip_suffix(path.name)[0] for path in found]
    for path, name in zip(found, names, strict=True):
        if names.count(name) > 1:
            raise UserError(f"{path}: {place} has {names.count(name)} label maps {name}; keep one")
    return found


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
    without: Collection[Path] = (),
) -> Propagated:
    """Labels ``organ`` in all ``cases`` that lack it; see :func:`write_case` for the files.

    Of the folder ``atlases`` the files ``without`` have no vote.
    A bad atlas or case is a line of ``problems``; the rest is done. Raises UserError where
    nothing can be done at all.
    """
    check_output(output)
    result = Propagated()
    used = [path for path in find_atlases(atlases) if path not in without]
    files = {strip_suffix(path.name)[0]: path for path in used}
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
        targets = {}
        for case in lacking:
            try:
                targets[case.name] = _in_our_numbers(case, output / "store")
            except UserError as error:
                result.problems.append(f"{error}; case left out")
        found, failed = shop.maps(targets)
        result.problems += [f"{text}; case left out" for text in failed.values()]
        names = sorted(kept)
        held = names[:: max(1, len(names) // CALIBRATION_ATLASES)][:CALIBRATION_ATLASES]
        weights = organ_weights(kept, organ.index)
        tried = shop.votes({name: kept[name] for name in held}, kept, organ.index, weights)
        result.problems += [
            f"{files[n]}: {text}; tells nothing" for n, text in tried.failed.items()
        ]
        if not tried.votes:
            raise UserError(
                f"{atlases}: no label map can be laid over another ({result.problems[-1]})"
            )
        learnt = shop.learnt(found, kept, organ.index, weights)
        result.calibration = calibration = calibrate(
            [fused(name, *polled, learnt) for name, polled in tried.votes.items()],
            [
                _true_organ(kept[name], organ.index, around.grid)
                for name, (around, _) in tried.votes.items()
            ],
        )
        polled = shop.votes(found, kept, organ.index, weights)
        result.problems += polled.unfit
        if polled.votes:
            result.problems += [
                f"{files[name]}: shares fewer than {LEAST_COMMON_ORGANS} organs with every case; "
                "atlas left out"
                for name in sorted(kept.keys() - polled.placed)
            ]
        votes = {
            name: Vote(
                around.grid,
                fused(name, around, votes, learnt),
                float(np.mean(votes.agreement)),
            )
            for name, (around, votes) in polled.votes.items()
        }
    by_name = {case.name: case for case in cases}
    result.problems += [
        f"{by_name[name].labels}: {text}; left out" for name, text in polled.failed.items()
    ]
    for case in cases:
        if case.labels is None or (case in lacking and case.name not in votes):
            continue
        try:
            result.cases[case.name] = write_case(
                case, organ, votes.get(case.name), calibration, output
            )
        except UserError as error:
            result.problems.append(f"{error}; case left out")
    remove_others(output, set(result.cases))
    write_records(result, by_name, organ, output)
    return result


def fused(name: str, around: Surroundings, votes: Votes, learnt: Learnt | None) -> np.ndarray:
    """float32 (z, y, x), 0 to 1: the deformed atlases' vote and what was learnt, their mean.

    They err differently: the mean is better than either (docs/propagation.md).
    """
    vote = votes.fused(around.taken)
    return vote if learnt is None else (vote + learnt.chance(name, around)) / 2


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

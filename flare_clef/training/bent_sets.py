"""A training set of bent scans: which scan takes whose shapes, and what is written.

``images/``, ``labels/``, ``cases.json`` and, for cases of ``train propagate``,
``probabilities/``: what ``train`` reads. :mod:`flare_clef.training.bending` does the bending.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from flare_clef.errors import UserError
from flare_clef.images import itk_reason, read_image
from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.paths import check_writable, checksum
from flare_clef.scan_files import files_of, strip_suffix
from flare_clef.training.bending import SPACING_MM, bend_towards, bent
from flare_clef.training.cases import Case, check_pair, read_labels
from flare_clef.training.datasets import read_json
from flare_clef.training.propagation import find_atlases
from flare_clef.training.registration import load_organ_maps, organ_maps_of
from flare_clef.training.workshop import WORKER_LOST, end_with_parent
from flare_clef.writing import write_bytes, write_labels, write_scan


@dataclass
class BentSet:
    """What became of a run."""

    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Entries of ``cases.json`` by name."""
    overlaps: dict[str, tuple[float, float]] = field(default_factory=dict)
    """DSC of the organs and those of the label map, before and after, by name; of this run."""
    problems: list[str] = field(default_factory=list)


def pairs_of(maps: Sequence[Path], cases: Sequence[Case], count: int) -> list[tuple[Path, Case]]:
    """``count`` pairs: maps and cases in turn, no pair twice before all were there once."""
    # Pairs repeat after their least common multiple: from then on cases are one further.
    period = math.lcm(len(maps), len(cases))
    return [
        (maps[k % len(maps)], cases[(k + k // period) % len(cases)])
        for k in range(min(count, len(maps) * len(cases)))
    ]


def name_of(case: Case, label_map: Path) -> str:
    """``CASE_as_MAP``."""
    return f"{case.name}_as_{strip_suffix(label_map.name)[0]}"


def bend_one(label_map: Path, case: Case, output: Path) -> tuple[float, float]:
    """Writes ``case`` in the shapes of ``label_map`` under ``output``; DSC before and after.

    Raises UserError, one line.
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    scan, labels = read_image(case.image), read_labels(case)
    check_pair(case, scan, labels)
    other = load_organ_maps(label_map, SPACING_MM)
    # What was propagated is undecided in part: it has no shape of its own.
    array = labels.array.copy()
    for organ in case.made:
        array[array == ORGAN_BY_NAME[organ].index] = 0
    try:
        own = organ_maps_of(array, labels, SPACING_MM)
    except UserError as error:
        raise UserError(f"{case.labels}: {error}") from None
    try:
        bend = bend_towards(own, other)
    except UserError as error:
        raise UserError(f"{label_map} over {case.name}: {error}") from None
    name = name_of(case, label_map)
    if case.chances is not None:
        chance = read_image(case.chances)
        write_labels(
            bent(chance, bend, labels=False),
            chance,
            output / "probabilities" / f"{name}.nii.gz",
            named=False,
        )
    moved = replace(scan, array=bent(scan, bend, labels=False))
    write_scan(moved, output / "images" / f"{name}_0000.nii.gz")
    write_labels(bent(labels, bend, labels=True), labels, output / "labels" / f"{name}.nii.gz")
    return bend.dsc_before, bend.dsc_after


def _entry(label_map: Path, case: Case, checksum_of: Callable[[Path], str]) -> dict[str, Any]:
    """A bent scan in ``cases.json``; by ``made_of`` a later run sees whether it made the same."""
    shapes = strip_suffix(label_map.name)[0]
    volumes = [path for path in (label_map, case.image, case.labels, case.chances) if path]
    files = [file for path in volumes for file in files_of(path)]
    made_of = json.dumps([*map(checksum_of, files), case.renumbering])
    entry: dict[str, Any] = {
        "organs": list(case.organs),
        "source": f"{case.source or case.name}; bent to the shapes of {shapes}",
        "bent_from": case.bent_from or case.name,
        "shapes_of": shapes,
        "made_of": hashlib.sha256(made_of.encode()).hexdigest()[:16],
    }
    if case.made:
        entry["propagated"] = list(case.made)
    return entry


def _checksum(path: Path) -> str:
    try:
        return checksum(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _finished(
    output: Path, pairs: dict[str, tuple[Path, Case]], checksum_of: Callable[[Path], str]
) -> dict[str, dict[str, Any]]:
    """Entries of what an earlier run finished. Raises UserError where ``output`` holds others'."""
    listed = output / "cases.json"
    entries = read_json(listed) if listed.is_file() else {}
    there = {
        kind: {
            strip_suffix(path.name)[0].removesuffix("_0000" if kind == "images" else "")
            for path in (output / kind).glob("[!.]*")
            if strip_suffix(path.name)[1]
        }
        for kind in ("images", "labels", "probabilities")
    }
    for name in sorted({*entries, *there["images"], *there["labels"], *there["probabilities"]}):
        known = (entries.get(name) or {}).get("made_of") if name in entries else None
        if name not in pairs or (
            name in entries and known != _entry(*pairs[name], checksum_of)["made_of"]
        ):
            raise UserError(
                f"{output}: holds images/ or labels/ already, {name} among them, which is not of "
                "these scans and label maps; remove it or name another folder with --output"
            )
    return {
        name: entry
        for name, entry in entries.items()
        if name in there["images"] & there["labels"]
        and (name in there["probabilities"] or not pairs[name][1].chances)
    }


def bend_all(
    maps: Path,
    cases: Sequence[Case],
    output: Path,
    *,
    count: int | None = None,
    workers: int = 1,
    on_done: Callable[[str, float, float], None] = lambda name, before, after: None,
) -> BentSet:
    """Writes ``count`` bent scans (as many as label maps by default) to ``output``.

    What an earlier run finished there of the same files is kept. A bad map or case is a line of
    ``problems``; the rest is done. Raises UserError where nothing can be done at all.
    ``on_done`` is told the name and both DSC.
    """
    files = find_atlases(maps)
    # Of a body bent twice it would not be known whose shapes it shows.
    twice = [case.name for case in cases if case.bent_from]
    labelled = [case for case in cases if case.labels is not None and not case.bent_from]
    if not labelled:
        raise UserError("no cases with labels; name a training set with --cases")
    pairs = {
        name_of(c, m): (m, c)
        for m, c in pairs_of(files, labelled, count or len(files))
        if strip_suffix(m.name)[0] != c.name  # its own shapes: nothing would be bent
    }
    if not pairs:
        raise UserError(f"{maps}: only the label map of the case itself; name those of others")
    checksum_of = functools.cache(_checksum)
    result = BentSet(_finished(output, pairs, checksum_of))
    if twice:
        result.problems.append(f"{len(twice)} case(s) are bent already, {twice[0]} first; left out")
    check_writable(output)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, end_with_parent)
    try:
        todo = [name for name in pairs if name not in result.cases]
        work = {pool.submit(bend_one, *pairs[name], output): name for name in todo}
        for future in as_completed(work):
            name = work[future]
            label_map, case = pairs[name]
            try:
                result.overlaps[name] = future.result()
                result.cases[name] = _entry(label_map, case, checksum_of)
            except UserError as error:
                line = f"{error}; left out"
                if line not in result.problems:  # a bad file is met in every pair
                    result.problems.append(line)
            except BrokenExecutor:
                raise UserError(f"bend: {WORKER_LOST}") from None
            except Exception as error:  # of ITK, or for want of memory: others may fit
                reason = itk_reason(error)
                result.problems.append(f"{label_map} over {case.name}: {reason}; left out")
            else:
                # After each, so that a run that is broken off knows what it has.
                result.cases = {n: result.cases[n] for n in pairs if n in result.cases}
                write_bytes(output / "cases.json", json.dumps(result.cases, indent=1).encode())
                on_done(name, *result.overlaps[name])
    finally:
        pool.shutdown(cancel_futures=True)
    return result

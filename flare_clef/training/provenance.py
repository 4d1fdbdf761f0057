"""``run.json``: what a run was made from, written when it begins.

The resolved recipe, versions, the state of the source, how it is computed, and for each case
its files and their checksums; what a run was made from before that changed stays.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flare_clef.errors import UserError
from flare_clef.scan_files import files_of
from flare_clef.training.cases import Case
from flare_clef.training.preparing import Store
from flare_clef.training.processes import world_size
from flare_clef.training.recipe import Recipe, build
from flare_clef.version import __version__

FILE_NAME = "run.json"
CASES, PRETRAINING_CASES, KEPT_ASIDE = "cases", "pretraining_cases", "kept_aside"
TRAINED_ON, START_TRAINED_ON = "trained_on", "start_trained_on"
_FINETUNED_WITH = "finetuned_with"
"""The recipe, which a later pre-training in the folder does not touch."""


def describe(
    recipe: Recipe,
    cases: Mapping[str, Sequence[Case]],
    store: Store,
    precision: str,
    device: str,
    *,
    kept_aside: Sequence[Case] = (),
) -> dict[str, Any]:
    """All of a run's origin as JSON values. ``cases``: by ``CASES`` or ``PRETRAINING_CASES``.

    ``kept_aside``: which of ``CASES`` are not trained on.

    Raises UserError where a file of theirs cannot be read.
    """
    aside = {case.name for case in kept_aside}
    learnt = [c for c in cases.get(CASES, ()) if recipe.finetune.repeats_of(c.name) > 0]
    return {
        "recipe": as_json(recipe),
        "versions": {
            "flare_clef": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "machine": {"system": platform.system(), "processor": platform.machine()},
        "computing": {
            "device": device, "precision": precision, "threads": torch.get_num_threads(),
            "processes": world_size(),
        },
        "source": source_state(Path(__file__).parent),
        **{what: _as_listed(some, store) for what, some in cases.items()},
        **({
            _FINETUNED_WITH: as_json(recipe),
            KEPT_ASIDE: sorted(aside),
            TRAINED_ON: {case.name: case.source for case in learnt if case.name not in aside},
        } if CASES in cases else {}),
    }  # fmt: skip


def trained_on(description: dict[str, Any]) -> dict[str, str]:
    """Source by name of all cases that a fine-tuning with this description has trained on."""
    if TRAINED_ON in description:
        return description[TRAINED_ON]  # type: ignore[no-any-return]
    aside = description.get(KEPT_ASIDE, ())
    listed = description.get(CASES, {})
    return {name: case["source"] for name, case in listed.items() if name not in aside}


def _as_listed(cases: Sequence[Case], store: Store) -> dict[str, Any]:
    return {
        case.name: {
            "organs": list(case.organs),
            "source": case.source,
            "sha256": {
                path.name: store.checksum(path)
                for volume in (case.image, case.labels, case.chances)
                if volume is not None
                for path in files_of(volume)
            },
        }
        for case in cases
    }


def as_json(recipe: Recipe) -> Any:
    """A recipe as the record has it."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def source_state(folder: Path) -> dict[str, Any]:
    """The commit that ``folder`` is at and whether files differ from it; {} outside of git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def write_run(run: Path, description: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Writes ``run.json``; returns what it holds now, and a line for each change of the origin.

    What another stage noted stays. Where the recipe or the data are not those of before, the
    record of before is kept in ``earlier``: the weights come from both.
    """
    changes: list[str] = []
    path = run / FILE_NAME
    if path.is_file():
        former = read_run(run)
        # Built anew: keys that are younger than the run have the value they had then.
        keys = _differences(as_json(recipe_of(run)), description["recipe"])
        changes = [f"{key} differs from the recipe this run began with" for key in keys]
        changes += data_changes(former, description)
        earlier = former.pop("earlier", [])
        description = {**former, **description, "earlier": earlier + [former] * bool(changes)}
    run.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(description, indent=1))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)
    return description, changes


def data_changes(former: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """A line for each way in which two descriptions differ in their cases."""
    return [
        line
        for what in (CASES, PRETRAINING_CASES)
        if what in former and what in present
        for line in _case_changes(former[what], present[what])
    ]


def changes_of_training(former: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """A line for each difference that would have led to other parameters."""
    recipes = [as_json(_finetuned_with(one)) for one in (former, present)]
    keys = [
        key
        for key in _differences(*recipes)
        if not key.startswith(("export", "data.folders", "data.unlabelled", "validate_every"))
    ]
    lines = [f"{key} differs from the recipe this run began with" for key in keys]
    return data_changes(former, present) + lines


def _finetuned_with(description: dict[str, Any]) -> Recipe:
    value = description.get(_FINETUNED_WITH, description["recipe"])
    # Built anew: keys that are younger than the run have the value they had then.
    recipe: Recipe = build(Recipe, value, FILE_NAME)
    return recipe


def finetuned_with(run: Path) -> Recipe:
    """The resolved recipe of the last fine-tuning in the folder of a run."""
    return _finetuned_with(read_run(run))


def same_scans(
    trained: Sequence[Case], aside: Sequence[Case], store: Store
) -> list[tuple[str, str]]:
    """Names of a case kept aside and one trained on whose scans are the same files' contents."""

    def contents(case: Case) -> tuple[str, ...]:
        return tuple(store.checksum(path) for path in files_of(case.image))

    known = {contents(case): case.name for case in trained}
    return [(c.name, known[contents(c)]) for c in aside if contents(c) in known]


def check_split(run: Path, aside: Sequence[Case]) -> None:
    """Raises UserError where the run in this folder trained on cases that are kept aside now."""
    if not (run / FILE_NAME).is_file():
        return
    seen = sorted({case.name for case in aside} & trained_on(read_run(run)).keys())
    if seen:
        raise UserError(
            f"{run}: trained on {', '.join(seen[:5])}, which would be kept aside now; take the "
            "data.validation or data.folds that the run had, or another folder with --output"
        )


def _case_changes(former: dict[str, Any], present: dict[str, Any]) -> list[str]:
    kinds = {
        "added": present.keys() - former.keys(),
        "gone": former.keys() - present.keys(),
        # Records of before this was noted have no checksums of the cases kept aside.
        "changed": {
            name
            for name in former.keys() & present.keys()
            if former[name]["sha256"] and former[name]["sha256"] != present[name]["sha256"]
        },
    }
    return [
        f"{len(names)} case(s) {kind} since this run began: {', '.join(sorted(names)[:5])}"
        + (", ..." if len(names) > 5 else "")
        for kind, names in kinds.items()
        if names
    ]


def computing_of(run: Path, device: str) -> dict[str, Any]:
    """How a run was computed: ``precision``, ``threads``; {} if on another kind of device."""
    noted = read_run(run).get("computing", {}) if (run / FILE_NAME).is_file() else {}
    return noted if noted.get("device") == device else {}


def _differences(former: Any, present: Any, where: str = "") -> list[str]:
    if isinstance(former, dict) and isinstance(present, dict):
        return [
            line
            for key in sorted(former.keys() | present.keys())
            for line in _differences(
                former.get(key), present.get(key), f"{where}.{key}" if where else key
            )
        ]
    return [] if former == present else [where]


def read_run(run: Path) -> dict[str, Any]:
    """What :func:`write_run` wrote. Raises UserError, one line."""
    path = run / FILE_NAME
    try:
        value = json.loads(path.read_text())
        build(Recipe, value["recipe"], str(path))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name the folder of a run"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the record of a run ({error})") from None
    return value  # type: ignore[no-any-return]


def recipe_of(run: Path) -> Recipe:
    """The resolved recipe of a run."""
    recipe: Recipe = build(Recipe, read_run(run)["recipe"], str(run / FILE_NAME))
    return recipe

"""``run.json``: what a run was made from, written when it begins.

The resolved recipe, versions, the state of the source, and for each case its files and their
checksums.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flare_clef.errors import UserError
from flare_clef.training.cases import Case
from flare_clef.training.recipe import Recipe, build
from flare_clef.version import __version__

FILE_NAME = "run.json"


def describe(recipe: Recipe, cases: Sequence[Case], store: Path) -> dict[str, Any]:
    """All of a run's origin as JSON values; checksums as ``store`` (RUN/prepared) knows them."""
    known = json.loads((store / "checksums.json").read_text())
    return {
        "recipe": _as_json(recipe),
        "versions": {
            "flare_clef": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "machine": {"system": platform.system(), "processor": platform.machine()},
        "source": source_state(Path(__file__).parent),
        "cases": {
            case.name: {
                "organs": list(case.organs),
                "source": case.source,
                "sha256": {
                    path.name: known[str(path.resolve())][-1]
                    for path in (case.image, case.labels, case.chances)
                    if path is not None and str(path.resolve()) in known
                },
            }
            for case in cases
        },
    }


def _as_json(recipe: Recipe) -> Any:
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


def write_run(run: Path, description: dict[str, Any]) -> list[str]:
    """Writes ``run.json``; returns the keys of the recipe that differ from the run's former one."""
    changed: list[str] = []
    path = run / FILE_NAME
    if path.is_file():
        # Built anew: keys that are younger than the run have the value they had then.
        changed = _differences(_as_json(recipe_of(run)), description["recipe"])
    run.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(description, indent=1))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)
    return changed


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

"""Recipes: one TOML file that holds everything that decides a training's result.

Tables become the dataclasses below, key by key; an unknown key, a wrong type or an impossible
value is one line that names the key, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flare_clef.errors import UserError
from flare_clef.network import Architecture
from flare_clef.training.finetuning import FinetuningPlan

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]


@dataclass(frozen=True)
class DataSettings:
    """Which scans the training sees."""

    folders: tuple[str, ...] = ()
    """Folders with ``images/``, ``labels/`` and ``cases.json``, relative to the recipe."""
    validation: tuple[str, ...] = ()
    """Names of cases kept aside: never trained on, judged on their own grids."""
    grid: int = 192
    """Voxels along each axis of the prepared volumes kept on disk."""


@dataclass(frozen=True)
class ExportSettings:
    """What travels in the weights file beside the weights."""

    licence: str = "Not stated."
    notes: str = ""


@dataclass(frozen=True)
class Recipe:
    """A whole recipe."""

    data: DataSettings = field(default_factory=DataSettings)
    network: Architecture = field(default_factory=Architecture)
    finetune: FinetuningPlan = field(default_factory=lambda: FinetuningPlan(stages=()))
    export: ExportSettings = field(default_factory=ExportSettings)
    validate_every_steps: int = 300


def load_recipe(path: Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe; ``overrides`` are ``key.of.table=TOML value``."""
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error})") from None
    for text in overrides:
        _override(table, text)
    recipe = build(Recipe, table, str(path))
    if not recipe.finetune.stages:
        raise UserError(f"{path}: finetune.stages: no stage; at least one is needed")
    divisor = recipe.network.divisor
    for number, stage in enumerate(recipe.finetune.stages):
        where = f"{path}: finetune.stages[{number}]"
        if stage.grid < divisor or stage.grid % divisor:
            raise UserError(f"{where}.grid = {stage.grid}: must be a multiple of {divisor}")
        if stage.steps < 1:
            raise UserError(f"{where}.steps = {stage.steps}: must be 1 or more")
        if not 0 <= stage.freeze_after <= 1:
            raise UserError(f"{where}.freeze_after = {stage.freeze_after}: must be 0 to 1")
    if recipe.finetune.loss not in ("softmax", "sigmoid"):
        raise UserError(
            f"{path}: finetune.loss = {recipe.finetune.loss!r}: must be 'softmax' or 'sigmoid'"
        )
    return recipe


def _override(table: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"--set {text}: expected key=value, such as finetune.seed=3")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {text}: {parent} is not a table")
    table[last] = parsed


def build(kind: Any, value: Any, where: str) -> Any:
    """``value`` as read from TOML turned into ``kind``, a type annotation. Raises UserError."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where} = {value!r}: must be a table")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise UserError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(hints)}")
        try:
            return kind(**{k: build(hints[k], v, f"{where}: {k}") for k, v in value.items()})
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {error}") from None
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is False and type(None) in arguments:
            return None
        return build(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list) or (
            arguments[-1] is not ... and len(value) != len(arguments)
        ):
            raise UserError(f"{where} = {value!r}: must be a list")
        if arguments[-1] is ...:
            return tuple(build(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        return tuple(build(a, v, where) for a, v in zip(arguments, value, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} = {value!r}: must be a table")
        return {k: build(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where} = {value!r}: must be {_WORDS[kind]}")
    return value


_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}

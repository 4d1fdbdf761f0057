"""Recipes: one TOML file that holds everything that decides a training's result.

Tables become the dataclasses below, key by key; an unknown key, a wrong type or an impossible
value is one line that names the key, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import random
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flare_clef.errors import UsageError, UserError
from flare_clef.network import Architecture
from flare_clef.training.finetuning_plan import FinetuningPlan
from flare_clef.training.pretraining import PretrainingPlan
from flare_clef.training.propagation_stage import PropagationSettings
from flare_clef.training.recipe_rules import problem_of

try:
    import tomllib  # type: ignore[import-not-found]
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]


@dataclass(frozen=True)
class DataSettings:
    """Which scans the training sees."""

    folders: tuple[str, ...] = ()
    """Folders of labelled cases, relative to the recipe."""
    unlabelled: tuple[str, ...] = ()
    """Folders of further scans for pre-training, which sees the labelled ones too."""
    phantoms: int = 0
    """So many synthetic scans with labels are made under the run's folder and used as well."""
    validation: tuple[str, ...] = ()
    """Names of cases kept aside: never trained on, judged on their own grids."""
    folds: int = 0
    """Divides the cases into so many parts at random (the paper: 5); 0: see ``validation``."""
    fold: int = 0
    """The part that is kept aside, from 0."""
    grid: int = 192
    """Voxels along each axis of the prepared volumes kept on disk."""

    def kept_aside(self, names: typing.Iterable[str]) -> set[str]:
        """Which of the labelled cases are kept aside. Raises UserError for names not there."""
        known = sorted(names)
        if self.folds > len(known) > 0:
            raise UserError(
                f"data.folds = {self.folds}: more than the {len(known)} labelled case(s)"
            )
        if self.folds:
            random.Random(f"folds {self.folds}").shuffle(known)
            return set(known[self.fold :: self.folds])
        missing = sorted(set(self.validation) - set(known))
        if missing:
            raise UserError(
                f"data.validation: no case {missing[0]} with labels in the data; "
                f"there are {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"
            )
        return set(self.validation)


@dataclass(frozen=True)
class ExportSettings:
    """What travels in the weights file beside the weights."""

    licence: str = "Not stated."
    notes: str = ""
    calibration_volumes: int = 0
    """Training volumes that tell ranges and offsets for 8-bit inference; 0: none."""
    operating_points: bool = False
    """Move each organ's logit to where Dice is best on the cases kept aside; where none are, on
    the training cases."""
    offsets: dict[str, float] = field(default_factory=dict)
    """Offsets of organs' logits that another run chose: for a last run with no case kept aside."""
    mean_with: tuple[str, ...] = ()
    """Weights files, relative to the recipe; what is exported is the mean of them and the run's,
    see :mod:`flare_clef.training.weights_mean`."""


@dataclass(frozen=True)
class Recipe:
    """A whole recipe."""

    data: DataSettings = field(default_factory=DataSettings)
    network: Architecture = field(default_factory=Architecture)
    propagate: PropagationSettings | None = None
    """None: organs without labels stay out of the loss."""
    pretrain: PretrainingPlan | None = None
    """None: fine-tuning begins with random weights, or with ``finetune.start``."""
    finetune: FinetuningPlan = field(default_factory=lambda: FinetuningPlan(stages=()))
    export: ExportSettings = field(default_factory=ExportSettings)
    validate_every_steps: int = 300


def load_recipe(path: Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe; ``overrides`` are ``key.of.table=TOML value``."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error})") from None
    for text in overrides:
        _override(table, text)
    recipe = build(Recipe, table, str(path))
    problem = problem_of(recipe)
    if problem:
        raise UserError(f"{path}: {problem}")
    return recipe


def _override(table: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    if not separator:
        raise UsageError(f"--set {text}: expected key=value, such as finetune.seed=3")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {text}: {parent} is not a table")
    table[last] = parsed


def build(kind: Any, value: Any, where: str) -> Any:
    """``value`` as read from TOML turned into ``kind``, a type annotation. Raises UserError."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where} = {value!r}: must be a table")
        make: Any = kind
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise UserError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(hints)}")
        try:
            return make(**{k: build(hints[k], v, f"{where}: {k}") for k, v in value.items()})
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {error}") from None
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        # TOML has no null: false turns an optional table off. JSON (run.json) has one.
        if (value is False or value is None) and type(None) in arguments:
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

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

from flare_clef.errors import UserError
from flare_clef.network import Architecture
from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.training.finetuning_plan import FinetuningPlan
from flare_clef.training.pretraining import PretrainingPlan
from flare_clef.training.propagation_stage import PropagationSettings

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
    """Training volumes that tell the ranges of activations for 8-bit inference; 0: none."""
    operating_points: bool = False
    """Move each organ's logit to where Dice is best on the cases kept aside; where none are, on
    the training cases."""
    offsets: dict[str, float] = field(default_factory=dict)
    """Offsets of organs' logits that another run chose: for a last run with no case kept aside."""


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
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error})") from None
    for text in overrides:
        _override(table, text)
    recipe = build(Recipe, table, str(path))
    problem = _problem(recipe)
    if problem:
        raise UserError(f"{path}: {problem}")
    return recipe


def _problem(recipe: Recipe) -> str | None:
    """The first impossible value: key, value and what is allowed."""
    plan, data, pretrain = recipe.finetune, recipe.data, recipe.pretrain
    divisor = recipe.network.divisor
    if not plan.stages:
        return "finetune.stages: no stage; at least one is needed"
    if (propagate := recipe.propagate) is not None:
        if propagate.organ not in ORGAN_BY_NAME:
            return f"propagate.organ = {propagate.organ!r}: one of {', '.join(ORGAN_BY_NAME)}"
        if not propagate.atlases:
            return "propagate.atlases: name a folder of label maps that have the organ"
    for name in recipe.export.offsets:
        if name not in ORGAN_BY_NAME:
            return f"export.offsets: {name!r} is no organ; they are {', '.join(ORGAN_BY_NAME)}"
    if recipe.export.offsets and recipe.export.operating_points:
        return "export.offsets: with operating_points = true offsets are found; leave one out"
    if plan.loss not in ("softmax", "sigmoid"):
        return f"finetune.loss = {plan.loss!r}: must be 'softmax' or 'sigmoid'"
    grids = {f"finetune.stages[{i}].grid": stage.grid for i, stage in enumerate(plan.stages)}
    rules: list[tuple[str, float, bool, str]] = []
    for number, stage in enumerate(plan.stages):
        where = f"finetune.stages[{number}]"
        if bool(stage.steps) == bool(stage.epochs):
            return f"{where}: steps = {stage.steps}, epochs = {stage.epochs}: 1 or more of one"
        rules += [
            (f"{where}.steps", stage.steps, stage.steps >= 0, "1 or more"),
            (f"{where}.epochs", stage.epochs, stage.epochs >= 0, "1 or more"),
            (f"{where}.block", stage.block,
             stage.block == 0 or (2 * divisor <= stage.block <= stage.grid
                                  and stage.block % divisor == 0),
             f"0, or a multiple of {divisor} from {2 * divisor} to its grid"),
            (f"{where}.freeze_after", stage.freeze_after, 0 <= stage.freeze_after <= 1, "0 to 1"),
            (f"{where}.learning_rate", min(stage.learning_rate), min(stage.learning_rate) > 0,
             "above 0"),
        ]  # fmt: skip
    rules += [
        ("finetune.batch", plan.batch, plan.batch >= 1, "1 or more"),
        ("finetune.patience_epochs", plan.patience_epochs, plan.patience_epochs >= 0,
         "0 or more"),
        ("finetune.weight_average", plan.weight_average, 0 <= plan.weight_average < 1,
         "0 or more and below 1"),
        ("finetune.start_share", plan.start_share, 0 <= plan.start_share < 1,
         "0 or more and below 1"),
        ("finetune.gradient_clip", plan.gradient_clip, plan.gradient_clip >= 0, "0 or more"),
        ("finetune.warmup_steps", plan.warmup_steps, plan.warmup_steps >= 0, "0 or more"),
        ("finetune.repeats", min(plan.repeats.values(), default=0),
         min(plan.repeats.values(), default=0) >= 0, "0 or more each"),
        ("data.grid", data.grid, data.grid >= divisor, f"{divisor} or more"),
        ("data.phantoms", data.phantoms, data.phantoms >= 0, "0 or more"),
        ("data.folds", data.folds, data.folds == 0 or data.folds >= 2, "0 or 2 and more"),
        ("data.fold", data.fold, 0 <= data.fold < max(data.folds, 1), "below data.folds"),
        ("export.calibration_volumes", recipe.export.calibration_volumes,
         recipe.export.calibration_volumes >= 0, "0 or more"),
        ("validate_every_steps", recipe.validate_every_steps, recipe.validate_every_steps >= 1,
         "1 or more"),
    ]  # fmt: skip
    if pretrain is not None:
        grids["pretrain.grid"] = pretrain.grid
        rules += [
            (f"pretrain.{key}", getattr(pretrain, key), getattr(pretrain, key) >= least,
             f"{least} or more")
            for key, least in (
                ("steps", 0), ("batch", 1), ("features", 2), ("anchors", 1), ("leaves", 1),
                ("points", 1), ("far_mm", 0), ("decoding_weight", 0),
                ("discriminativeness_weight", 0), ("equivariance_weight", 0),
                ("gradient_clip", 0), ("epochs", 0 if pretrain.steps else 1),
            )
        ]  # fmt: skip
        rules += [
            ("pretrain.rate", pretrain.rate, pretrain.rate > 0, "above 0"),
            ("pretrain.margin", pretrain.margin, -1 <= pretrain.margin <= 1, "-1 to 1"),
            ("pretrain.weight_average", pretrain.weight_average,
             0 <= pretrain.weight_average < 1, "0 or more and below 1"),
        ]  # fmt: skip
    for key, grid in grids.items():
        # Normalisation needs more than one voxel at the bottom.
        allowed = grid >= 2 * divisor and grid % divisor == 0
        rules.append((key, grid, allowed, f"a multiple of {divisor}, at least {2 * divisor}"))
    for key, value, fine, allowed_words in rules:
        if not fine:
            return f"{key} = {value}: must be {allowed_words}"
    return None


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

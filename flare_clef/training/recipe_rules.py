"""What a recipe's values may be; :mod:`flare_clef.training.recipe` checks keys and types."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flare_clef.organs import ORGAN_BY_NAME, ORGANS

if TYPE_CHECKING:
    from flare_clef.training.augmentation import AugmentationSettings
    from flare_clef.training.recipe import Recipe

_LARGEST_SEED = 10**9
"""Times a million and three it still is a seed that torch takes."""

_LARGEST_OFFSET = 20.0
"""Of a logit: more than weights in half precision can tell from certainty."""

Rule = tuple[str, Any, bool, str]
"""Key, value, whether it is fine, what is allowed."""


def problem_of(recipe: Recipe) -> str | None:
    """The first impossible value: key, value and what is allowed."""
    plan, data, pretrain = recipe.finetune, recipe.data, recipe.pretrain
    network = recipe.network
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
    if plan.optimizer not in ("adam", "muon"):
        return f"finetune.optimizer = {plan.optimizer!r}: must be 'adam' or 'muon'"
    if not (plan.ce_share or plan.dice_share):
        return "finetune: ce_share = 0.0 and dice_share = 0.0: one must be above 0"
    if plan.stages[0].freeze_after == 0 and not plan.start:
        return (
            "finetune.stages[0].freeze_after = 0.0: keeps the statistics of the weights in "
            "finetune.start, and none are named; name some, or freeze later"
        )
    if data.folds and data.validation:
        return f"data.validation: with folds = {data.folds} a fold is kept aside; leave one out"
    if plan.patience_epochs and len({stage.grid for stage in plan.stages}) > 1:
        return (
            f"finetune.patience_epochs = {plan.patience_epochs}: would end the run at a grid that "
            "is not the last; give all stages one grid, or set it to 0"
        )
    grids = {f"finetune.stages[{i}].grid": stage.grid for i, stage in enumerate(plan.stages)}
    rules: list[Rule] = []
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
            (f"{where}.learning_rate", max(stage.learning_rate),
             math.isfinite(max(stage.learning_rate)), "a finite number"),
        ]  # fmt: skip
        if stage.augmentation is not None:
            rules += _augmentation_rules(f"{where}.augmentation", stage.augmentation)
    layers = (*network.widths, *network.encoder_convs, *network.decoder_convs)
    rules += [
        ("network.widths, encoder_convs, decoder_convs", min(layers), min(layers) >= 1,
         "1 or more each"),
        ("network.head_channels", network.head_channels, network.head_channels >= 1, "1 or more"),
        ("network.classes", network.classes, network.classes == len(ORGANS), f"{len(ORGANS)}"),
        ("finetune.seed", plan.seed, 0 <= plan.seed <= _LARGEST_SEED, f"0 to {_LARGEST_SEED}"),
        ("finetune.ce_share", plan.ce_share, plan.ce_share >= 0, "0 or more"),
        ("finetune.dice_share", plan.dice_share, plan.dice_share >= 0, "0 or more"),
        ("finetune.ce_balance", plan.ce_balance, 0 <= plan.ce_balance <= 1, "0 to 1"),
        ("finetune.batch", plan.batch, plan.batch >= 1, "1 or more"),
        ("finetune.patience_epochs", plan.patience_epochs, plan.patience_epochs >= 0,
         "0 or more"),
        ("finetune.weight_average", plan.weight_average, 0 <= plan.weight_average < 1,
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
        ("export.offsets", list(recipe.export.offsets.values()),
         all(abs(value) <= _LARGEST_OFFSET for value in recipe.export.offsets.values()),
         f"-{_LARGEST_OFFSET:g} to {_LARGEST_OFFSET:g} each"),
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
            ("pretrain.seed", pretrain.seed, 0 <= pretrain.seed <= _LARGEST_SEED,
             f"0 to {_LARGEST_SEED}"),
            ("pretrain.rate", pretrain.rate, pretrain.rate > 0, "above 0"),
            ("pretrain.margin", pretrain.margin, -1 <= pretrain.margin <= 1, "-1 to 1"),
            ("pretrain.weight_average", pretrain.weight_average,
             0 <= pretrain.weight_average < 1, "0 or more and below 1"),
        ]  # fmt: skip
    for key, grid in grids.items():
        if grid > data.grid:
            return f"{key} = {grid}: volumes are kept at data.grid = {data.grid}; raise that first"
        # Normalisation needs more than one voxel at the bottom.
        allowed = grid >= 2 * divisor and grid % divisor == 0
        rules.append((key, grid, allowed, f"a multiple of {divisor}, at least {2 * divisor}"))
    for key, value, fine, allowed_words in rules:
        if not fine:
            return f"{key} = {value}: must be {allowed_words}"
    return None


def _augmentation_rules(where: str, settings: AugmentationSettings) -> list[Rule]:
    rules: list[Rule] = []
    for key, value in asdict(settings).items():
        if key.endswith("_probability"):
            rules.append((f"{where}.{key}", value, 0 <= value <= 1, "0 to 1"))
        elif key == "view_cut":
            rules.append((f"{where}.{key}", value, 0 <= value < 1, "0 or more and below 1"))
        else:
            rules.append((f"{where}.{key}", value, value >= 0, "0 or more"))
    return rules

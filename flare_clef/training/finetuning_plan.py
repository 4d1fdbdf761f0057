"""What fine-tuning does when: stages, learning rate, freezing; all that a recipe says of it.

A stage has its grid, whole or in blocks, its steps, its learning rate from first to last
step, its augmentation, and says whether normalisation statistics live or are frozen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from flare_clef.training.augmentation import AugmentationSettings


@dataclass(frozen=True)
class Stage:
    """A part of the training on one grid."""

    grid: int
    """Voxels along each axis of the volumes that steps see."""
    steps: int = 0
    learning_rate: tuple[float, float] = (1e-3, 1e-3)
    """At the first and at the last step, along half a cosine."""
    freeze_after: float = 1.0
    """Share of the stage after which normalisation statistics are re-estimated and frozen.

    0 in the first stage of a run that starts from weights keeps theirs."""
    augmentation: AugmentationSettings | None = field(default_factory=AugmentationSettings)
    epochs: int = 0
    """In place of ``steps``: so many times every case."""
    block: int = 0
    """Voxels along each axis of the part that a step sees, drawn anew each time; 0: the whole."""


@dataclass(frozen=True)
class FinetuningPlan:
    """All that decides the result of a run, beside the data."""

    stages: tuple[Stage, ...]
    seed: int = 0
    warmup_steps: int = 50
    optimizer: str = "adam"
    """``adam``, the paper's, or ``muon``, see :mod:`flare_clef.training.muon`."""
    loss: str = "softmax"
    """``softmax``: organs compete, see :func:`softmax_dice_loss`; ``sigmoid``: the paper's."""
    ce_share: float = 1.0
    dice_share: float = 1.0
    ce_balance: float = 0.5
    """``softmax`` alone: a class of n voxels weighs n ** -ce_balance a voxel in the cross entropy
    (:func:`flare_clef.training.losses.balanced_weights`); 0: every voxel weighs the same."""
    repeats: dict[str, float] = field(default_factory=dict)
    """How often a case is drawn, relative to 1 for those not named. A name or a pattern, as
    ``*_as_*``; a case's own name goes before patterns, the first of these before the others."""
    start: str = ""
    """A weights file to start from, relative to the recipe; empty: random weights."""
    batch: int = 1
    """Cases of a step, one volume at a time; shared among the processes of ``torchrun``."""
    patience_epochs: int = 0
    """Ends after so many epochs without a lower validation loss (the paper: 3); 0: never."""
    weight_average: float = 0.0
    """Decay of a moving average of the weights, which is then judged and exported; 0: none."""
    gradient_clip: float = 12.0
    """Largest norm of the gradient; 0: none."""
    activation_checkpointing: bool = False
    """Less memory, a third more time, the same result."""

    def repeats_of(self, case: str) -> float:
        """How often ``case`` is drawn, see ``repeats``."""
        if case in self.repeats:
            return self.repeats[case]
        return next((n for name, n in self.repeats.items() if fnmatchcase(case, name)), 1.0)

    def for_cases(self, count: int) -> FinetuningPlan:
        """The plan with ``epochs`` of ``count`` cases turned into steps."""
        stages = (
            replace(s, steps=s.steps or s.epochs * self.epoch_steps(count), epochs=0)
            for s in self.stages
        )
        return replace(self, stages=tuple(stages))

    def epoch_steps(self, cases: int) -> int:
        """Steps until every case was seen once."""
        return math.ceil(cases / self.batch)

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[Stage, int]:
        """The stage that ``step`` (from 0) belongs to, and the step's number within it."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise ValueError("step beyond the plan")

    def learning_rate(self, step: int) -> float:
        stage, within = self.stage_at(step)
        first, last = stage.learning_rate
        cosine = (1 + math.cos(math.pi * within / max(1, stage.steps - 1))) / 2
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return warm * (last + (first - last) * cosine)

    def frozen_at(self, step: int) -> bool:
        stage, within = self.stage_at(step)
        return within >= stage.freeze_after * stage.steps

"""Fine-tuning with labels (paper, sections 2.2 and 3.2), as a list of stages.

A stage has its grid, its steps, its learning rate from first to last step, its augmentation,
and says whether normalisation statistics live or are frozen. Everything that a step draws
follows from the run's seed and the step's number, so a resumed run repeats itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from flare_clef.network import Architecture, SegmentationNetwork, UNet, norms
from flare_clef.training.augmentation import AugmentationSettings, augment
from flare_clef.training.cases import PreparedCase
from flare_clef.training.checkpoints import BEST, save_checkpoint
from flare_clef.training.forward import forward_precision
from flare_clef.training.loop import Trainer
from flare_clef.training.losses import sigmoid_dice_loss, softmax_dice_loss
from flare_clef.training.processes import from_first
from flare_clef.training.validation import DiceTable, means

_VOLUMES_FOR_STATISTICS = 24
"""So many volumes give the statistics that are frozen."""


@dataclass(frozen=True)
class Stage:
    """A part of the training on one grid."""

    grid: int
    """Voxels along each axis of the volumes that steps see."""
    steps: int = 0
    learning_rate: tuple[float, float] = (1e-3, 1e-3)
    """At the first and at the last step, along half a cosine."""
    freeze_after: float = 1.0
    """Share of the stage after which normalisation statistics are re-estimated and frozen."""
    augmentation: AugmentationSettings | None = field(default_factory=AugmentationSettings)
    epochs: int = 0
    """In place of ``steps``: so many times every case."""


@dataclass(frozen=True)
class FinetuningPlan:
    """All that decides the result of a run, beside the data."""

    stages: tuple[Stage, ...]
    seed: int = 0
    warmup_steps: int = 50
    loss: str = "softmax"
    """``softmax``: organs compete, see :func:`softmax_dice_loss`; ``sigmoid``: the paper's."""
    ce_share: float = 1.0
    dice_share: float = 1.0
    repeats: dict[str, float] = field(default_factory=dict)
    """How often a case is drawn, relative to 1 for those not named."""
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


def draw_order(plan: FinetuningPlan, cases: Sequence[PreparedCase]) -> list[int]:
    """Cases in the order in which steps see them: each in turn, every round in a new order."""
    generator = torch.Generator().manual_seed(plan.seed)
    weights = torch.tensor([plan.repeats.get(c.case.name, 1.0) for c in cases])
    order: list[int] = []
    due = torch.zeros(len(cases))
    wanted = plan.steps * plan.batch
    while len(order) < wanted:
        due += weights
        chosen = torch.nonzero(due >= 1 - 1e-6).flatten()
        due[chosen] -= 1
        order += chosen[torch.randperm(len(chosen), generator=generator)].tolist()
    return order[:wanted]


@dataclass
class LabelledBatch:
    """One case as a step sees it: image (1, 1, z, y, x), labels (z, y, x), organs (13,)."""

    case: str
    image: Tensor
    labels: Tensor
    labelled: Tensor

    def to(self, device: torch.device) -> LabelledBatch:
        return replace(
            self,
            image=self.image.to(device),
            labels=self.labels.to(device),
            labelled=self.labelled.to(device),
        )


def make_batch(
    plan: FinetuningPlan, cases: Sequence[PreparedCase], order: list[int], index: int
) -> LabelledBatch:
    """Number ``index`` of the run's cases; a function of the plan's seed and the number alone."""
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + index + 1)
    stage, _ = plan.stage_at(index // plan.batch)
    return _batch_of(cases[order[index]], stage.grid, stage.augmentation, generator)


def _batch_of(
    case: PreparedCase,
    grid: int,
    settings: AugmentationSettings | None,
    generator: torch.Generator,
) -> LabelledBatch:
    image, labels = augment(
        torch.from_numpy(case.image.copy()),
        torch.from_numpy(case.labels.copy()),
        (grid,) * 3,
        settings,
        generator,
    )
    return LabelledBatch(case.case.name, image[None, None], labels, case.case.labelled)


def freeze_statistics(
    network: nn.Module, volumes: Iterable[Tensor], precision: str, device: str = "cpu"
) -> None:
    """Sets the running statistics to their mean over ``volumes`` and keeps them.

    Until here every step was normalised by its own volume. From here on training sees what
    evaluation sees, and the norms are fixed affine maps that fold into the convolutions.
    """
    layers = norms(network)
    network.train()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    with torch.no_grad(), forward_precision(precision, device):
        for volume in volumes:
            network(volume.to(device))
    for layer in layers:
        layer.momentum = 0.1
        layer.eval()


class FinetuningObjective(nn.Module):
    """From a batch to Dice + cross entropy and its terms for the log."""

    def __init__(self, plan: FinetuningPlan, network: SegmentationNetwork, precision: str) -> None:
        super().__init__()
        self.network, self.plan, self.precision = network, plan, precision

    def forward(self, batch: LabelledBatch) -> tuple[Tensor, dict[str, Any]]:
        with forward_precision(self.precision, batch.image.device.type):
            logits = self.network(batch.image)
        loss_function = softmax_dice_loss if self.plan.loss == "softmax" else sigmoid_dice_loss
        loss, terms = loss_function(
            logits, batch.labels, batch.labelled, self.plan.ce_share, self.plan.dice_share
        )
        dice = [None if math.isnan(d) else round(d, 4) for d in terms.dice_per_organ.tolist()]
        return loss, {"ce": terms.cross_entropy, "dice_loss": terms.dice_loss, "dice": dice}


class Finetuning(Trainer):
    """Fine-tuning in ``folder``.

    ``validate`` judges the network by the product's path after each step of ``validate_at``;
    ``kept_aside`` are the prepared cases whose loss decides the early stopping. The best
    network (by the validation loss where it is computed, else by mean DSC) is ``best.pt``.
    """

    def __init__(
        self,
        plan: FinetuningPlan,
        cases: Sequence[PreparedCase],
        folder: Path,
        *,
        architecture: Architecture | None = None,
        start: SegmentationNetwork | UNet | None = None,
        precision: str = "fp32",
        kept_aside: Sequence[PreparedCase] = (),
        validate: Callable[[SegmentationNetwork, int], DiceTable] | None = None,
        validate_at: Iterable[int] = (),
        device: torch.device | None = None,
        on_step: Callable[[dict[str, Any]], None] = lambda record: None,
        checkpoint_seconds: float = 120,
    ) -> None:
        self.plan = plan = plan.for_cases(len(cases))
        self.cases, self.kept_aside, self.precision = cases, kept_aside, precision
        self.validate, self.validate_at = validate, set(validate_at)
        torch.manual_seed(plan.seed)
        self.network = SegmentationNetwork(architecture)
        if isinstance(start, UNet):
            # The paper's transfer: the backbone's weights pass over, the head is new.
            self.network.backbone.load_state_dict(start.state_dict())
        elif start is not None:
            self.network.load_state_dict(start.state_dict(), strict=False)
        super().__init__(
            plan,
            FinetuningObjective(plan, self.network, precision),
            folder,
            device=device,
            on_step=on_step,
            checkpoint_seconds=checkpoint_seconds,
        )
        self.frozen = False
        self.best: float | None = None
        """Lowest validation loss, or 1 - highest mean DSC, so far."""
        self.epochs_without_gain = 0
        self.order = draw_order(plan, cases)
        self.load()

    def make_batch(self, index: int) -> LabelledBatch:
        return make_batch(self.plan, self.cases, self.order, index)

    def parameters_for_checkpoint(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def state(self) -> dict[str, Any]:
        return {
            "frozen": self.frozen,
            "best": self.best,
            "epochs_without_gain": self.epochs_without_gain,
        }

    def figures(self) -> dict[str, Any]:
        return {"frozen": self.frozen}

    def restore(self, saved: dict[str, Any]) -> None:
        self.frozen = saved["frozen"]
        self.best = saved.get("best")
        self.epochs_without_gain = saved.get("epochs_without_gain", 0)

    def before_step(self, step: int) -> None:
        should_freeze = self.plan.frozen_at(step)
        if should_freeze and not self.frozen:
            self._freeze(step)
        self.network.train()
        for layer in norms(self.network):
            layer.train(not should_freeze)
        self.frozen = should_freeze

    def _freeze(self, step: int) -> None:
        count = min(2 * len(self.cases), _VOLUMES_FOR_STATISTICS)
        first = step * self.plan.batch
        indices = range(first, min(first + count, len(self.order)))

        def estimate() -> None:
            volumes = (self.make_batch(index).image for index in indices)
            freeze_statistics(self.network, volumes, self.precision, self.device.type)

        estimate()
        if self.plan.weight_average:
            with self.average.in_place():
                estimate()

    def after_step(self, step: int) -> bool:
        done = step + 1
        judge = self.validate is not None and done in self.validate_at
        epoch = self.plan.epoch_steps(len(self.cases))
        compare = bool(self.plan.patience_epochs and self.kept_aside) and done % epoch == 0
        if judge or compare:
            grid = self.plan.stage_at(step)[0].grid
            with self.average.in_place():
                self.network.eval()
                if judge and self.first:
                    self._judge(grid, done, by_loss=bool(self.plan.patience_epochs))
                if compare:
                    self._compare_loss(grid, done)
        return bool(self.plan.patience_epochs) and (
            self.epochs_without_gain >= self.plan.patience_epochs
        )

    def _judge(self, grid: int, done: int, *, by_loss: bool) -> None:
        assert self.validate is not None
        table = self.validate(self.network, grid)
        self.log("validation.jsonl", {"step": done, "dice": table})
        self.on_validation(done, table)
        if table and not by_loss:
            self._keep_best(1 - means(table)["mean"], done)

    def _compare_loss(self, grid: int, done: int) -> None:
        """Early stopping (section 3.2): counts epochs in which the loss did not decrease."""
        loss = from_first(self.validation_loss(grid) if self.first else None)
        self.log("validation_loss.jsonl", {"step": done, "loss": round(loss, 6)})
        self.epochs_without_gain = (
            0 if self._keep_best(loss, done) else self.epochs_without_gain + 1
        )

    def validation_loss(self, grid: int) -> float:
        """Mean loss over the prepared cases kept aside, in evaluation mode, not augmented."""
        generator = torch.Generator()
        losses = []
        with torch.no_grad():
            for case in self.kept_aside:
                batch = _batch_of(case, grid, None, generator).to(self.device)
                losses.append(float(self.objective(batch)[0]))
        return fmean(losses)

    def _keep_best(self, value: float, done: int) -> bool:
        if not (self.best is None or value < self.best):
            return False
        self.best = value
        if self.first:
            state = {"step": done, "value": value, "network": self.network.state_dict()}
            save_checkpoint(self.folder, state, BEST)
        return True

    def run(self) -> SegmentationNetwork:
        """Trains to the end of the plan and returns the network in evaluation mode.

        That is the last one, or its moving average; after early stopping the best one.
        """
        self.train()
        return self.result()

    def result(self) -> SegmentationNetwork:
        """The network to export, as :meth:`run` says, in evaluation mode."""
        if self.plan.patience_epochs and self.best is not None:
            best = torch.load(self.folder / BEST, weights_only=True, map_location="cpu")
            self.network.load_state_dict(best["network"])
        else:
            self.average.copy_to_network()
        return self.network.eval()

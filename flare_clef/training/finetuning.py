"""Fine-tuning with labels (paper, sections 2.2 and 3.2), as a list of stages.

A stage has its grid, its steps, its learning rate from first to last step, its augmentation,
and says whether normalisation statistics live or are frozen. Everything that a step draws
follows from the run's seed and the step's number, so a resumed run repeats itself.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flare_clef.network import Architecture, SegmentationNetwork, norms
from flare_clef.training.augmentation import AugmentationSettings, augment
from flare_clef.training.cases import PreparedCase
from flare_clef.training.checkpoints import load_checkpoint, save_checkpoint
from flare_clef.training.losses import sigmoid_dice_loss, softmax_dice_loss
from flare_clef.training.validation import DiceTable


@dataclass(frozen=True)
class Stage:
    """A part of the training on one grid."""

    grid: int
    """Voxels along each axis of the volumes that steps see."""
    steps: int
    learning_rate: tuple[float, float]
    """At the first and at the last step, along half a cosine."""
    freeze_after: float = 1.0
    """Share of the stage after which normalisation statistics are re-estimated and frozen."""
    augmentation: AugmentationSettings | None = field(default_factory=AugmentationSettings)


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
    """Case of each step: every case in turn, each round in a new order."""
    generator = torch.Generator().manual_seed(plan.seed)
    weights = torch.tensor([plan.repeats.get(c.case.name, 1.0) for c in cases])
    order: list[int] = []
    due = torch.zeros(len(cases))
    while len(order) < plan.steps:
        due += weights
        chosen = torch.nonzero(due >= 1 - 1e-6).flatten()
        due[chosen] -= 1
        order += chosen[torch.randperm(len(chosen), generator=generator)].tolist()
    return order[: plan.steps]


@dataclass
class Batch:
    """One step's input, (1, 1, z, y, x), and labels, (z, y, x)."""

    case: str
    image: Tensor
    labels: Tensor
    labelled: Tensor


def make_batch(
    plan: FinetuningPlan, cases: Sequence[PreparedCase], order: list[int], step: int
) -> Batch:
    """What ``step`` sees; a function of the plan's seed and the step alone."""
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step + 1)
    chosen = cases[order[step]]
    stage, _ = plan.stage_at(step)
    image, labels = augment(
        torch.from_numpy(chosen.image.copy()),
        torch.from_numpy(chosen.labels.copy()),
        (stage.grid,) * 3,
        stage.augmentation,
        generator,
    )
    return Batch(chosen.case.name, image[None, None], labels, chosen.case.labelled)


def batches(
    plan: FinetuningPlan, cases: Sequence[PreparedCase], order: list[int], start: int
) -> Iterator[tuple[int, Batch]]:
    """Batches from step ``start`` on, the next one made while this one is used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(make_batch, plan, cases, order, start) if start < plan.steps else None
        for step in range(start, plan.steps):
            batch = ahead.result()  # type: ignore[union-attr]
            if step + 1 < plan.steps:
                ahead = pool.submit(make_batch, plan, cases, order, step + 1)
            yield step, batch


def forward_precision(precision: str) -> AbstractContextManager[Any]:
    """Context in which the network computes in ``fp32`` or ``bf16``; parameters stay fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def freeze_statistics(network: nn.Module, volumes: Iterable[Tensor], precision: str) -> None:
    """Sets the running statistics to their mean over ``volumes`` and keeps them.

    Until here every step was normalised by its own volume. From here on training sees what
    evaluation sees, and the norms are fixed affine maps that fold into the convolutions.
    """
    layers = norms(network)
    network.train()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    with torch.no_grad(), forward_precision(precision):
        for volume in volumes:
            network(volume)
    for layer in layers:
        layer.eval()


class Finetuning:
    """A run in ``folder``: steps, log, checkpoints, resuming."""

    def __init__(
        self,
        plan: FinetuningPlan,
        cases: Sequence[PreparedCase],
        folder: Path,
        *,
        architecture: Architecture | None = None,
        start: SegmentationNetwork | None = None,
        precision: str = "fp32",
        validate: Callable[[SegmentationNetwork, int], DiceTable] | None = None,
        validate_at: Iterable[int] = (),
        on_step: Callable[[dict[str, Any]], None] = lambda record: None,
        checkpoint_seconds: float = 120,
    ) -> None:
        self.plan, self.cases, self.folder = plan, cases, folder
        self.precision, self.on_step = precision, on_step
        self.validate, self.validate_at = validate, set(validate_at)
        self.checkpoint_seconds = checkpoint_seconds
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(plan.seed)
        self.network = SegmentationNetwork(architecture)
        if start is not None:
            self.network.load_state_dict(start.state_dict(), strict=False)
        self.network.to(memory_format=torch.channels_last_3d)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3, fused=True)
        self.step = 0
        self.frozen = False
        self.order = draw_order(plan, cases)
        saved = load_checkpoint(folder)
        if saved is not None:
            self._restore(saved)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.frozen = saved["step"], saved["frozen"]

    def save(self) -> None:
        """Writes the checkpoint of the present step, atomically."""
        save_checkpoint(
            self.folder,
            {
                "step": self.step,
                "frozen": self.frozen,
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )

    def _set_mode(self, step: int) -> None:
        should_freeze = self.plan.frozen_at(step)
        if should_freeze and not self.frozen:
            fresh = range(step, min(step + 2 * len(self.cases), self.plan.steps))
            freeze_statistics(
                self.network,
                (make_batch(self.plan, self.cases, self.order, s).image for s in fresh[:24]),
                self.precision,
            )
        self.network.train()
        for layer in norms(self.network):
            layer.momentum = 0.1
            layer.train(not should_freeze)
        self.frozen = should_freeze

    def run(self) -> SegmentationNetwork:
        """Trains to the end of the plan and returns the network in evaluation mode."""
        saved_at = time.monotonic()
        for step, batch in batches(self.plan, self.cases, self.order, self.step):
            began = time.monotonic()
            self._set_mode(step)
            record = self._train_step(step, batch)
            self.step = step + 1
            record["seconds"] = round(time.monotonic() - began, 3)
            self._log("metrics.jsonl", record)
            self.on_step(record)
            if self.validate is not None and self.step in self.validate_at:
                self.network.eval()
                table = self.validate(self.network, self.plan.stage_at(step)[0].grid)
                self._log("validation.jsonl", {"step": self.step, "dice": table})
            if time.monotonic() - saved_at > self.checkpoint_seconds:
                self.save()
                saved_at = time.monotonic()
        self.save()
        return self.network.eval()

    def _train_step(self, step: int, batch: Batch) -> dict[str, Any]:
        rate = self.plan.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with forward_precision(self.precision):
            logits = self.network(batch.image)
        loss_function = softmax_dice_loss if self.plan.loss == "softmax" else sigmoid_dice_loss
        loss, terms = loss_function(
            logits, batch.labels, batch.labelled, self.plan.ce_share, self.plan.dice_share
        )
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 12.0)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        dice = [None if math.isnan(d) else round(d, 4) for d in terms.dice_per_organ.tolist()]
        return {
            "step": step,
            "case": batch.case,
            "loss": round(loss.item(), 4),
            "lr": rate,
            "ce": round(terms.cross_entropy, 4),
            "dice_loss": round(terms.dice_loss, 4),
            "gradient_norm": round(float(norm), 3),
            "dice": dice,
            "frozen": self.frozen,
        }

    def _log(self, name: str, record: dict[str, Any]) -> None:
        with (self.folder / name).open("a") as log:
            log.write(json.dumps(record) + "\n")

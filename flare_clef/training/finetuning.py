"""Fine-tuning with labels (paper, sections 2.2 and 3.2), as a list of stages.

Stages and rates: :mod:`flare_clef.training.finetuning_plan`; what a step sees:
:mod:`flare_clef.training.batches`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from flare_clef.network import Architecture, SegmentationNetwork, UNet, norms
from flare_clef.training.batches import LabelledBatch, batch_of, draw_order, make_batch
from flare_clef.training.cases import PreparedCase
from flare_clef.training.checkpoints import BEST, load_best, save_checkpoint
from flare_clef.training.finetuning_plan import FinetuningPlan, Stage
from flare_clef.training.forward import forward_precision
from flare_clef.training.loop import Trainer
from flare_clef.training.losses import sigmoid_dice_loss, softmax_dice_loss
from flare_clef.training.muon import Muon
from flare_clef.training.processes import from_first
from flare_clef.training.validation import DiceTable

_VOLUMES_FOR_STATISTICS = 24
"""So many volumes give the statistics that are frozen."""


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
    for volume in volumes:  # made one by one, and never under autocast: it would round places
        # One bad case must not spoil all that follows; its own steps will name it.
        if torch.isfinite(volume).all():
            with torch.no_grad(), forward_precision(precision, device):
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
        shares = self.plan.ce_share, self.plan.dice_share
        if self.plan.loss == "softmax":
            loss, terms = softmax_dice_loss(
                logits, batch.labels, batch.labelled, *shares, self.plan.ce_balance
            )
        else:
            loss, terms = sigmoid_dice_loss(logits, batch.labels, batch.labelled, *shares)
        dice = [None if math.isnan(d) else round(d, 4) for d in terms.dice_per_organ.tolist()]
        return loss, {"ce": terms.cross_entropy, "dice_loss": terms.dice_loss, "dice": dice}


class Finetuning(Trainer):
    """Fine-tuning in ``folder``.

    ``validate`` judges the network by the product's path after each step of ``validate_at``;
    ``kept_aside`` are the prepared cases whose loss decides the early stopping; where there is
    one, the network with the lowest is ``best.pt``.
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
        objective = FinetuningObjective(plan, self.network, precision)
        muon = None
        if plan.optimizer == "muon":
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            muon = Muon(objective.parameters(), dtype=dtype)
        super().__init__(
            plan,
            objective,
            folder,
            optimizer=muon,
            device=device,
            on_step=on_step,
            checkpoint_seconds=checkpoint_seconds,
        )
        self.has_statistics = isinstance(start, SegmentationNetwork)
        """Of whole bodies, and the weights fit them: frozen from the first step on, they stay."""
        self.frozen = False
        self.best_loss: float | None = None
        """Lowest validation loss so far."""
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
            "best_loss": self.best_loss,
            "epochs_without_gain": self.epochs_without_gain,
        }

    def figures(self) -> dict[str, Any]:
        return {"frozen": self.frozen}

    def restore(self, saved: dict[str, Any]) -> None:
        self.frozen = saved["frozen"]
        self.best_loss = saved.get("best_loss")
        self.epochs_without_gain = saved.get("epochs_without_gain", 0)

    def before_step(self, step: int) -> None:
        should_freeze = self.plan.frozen_at(step)
        if should_freeze and not self.frozen and not (step == 0 and self.has_statistics):
            self._freeze(step)
        self.network.train()
        for layer in norms(self.network):
            layer.train(not should_freeze)
        self.frozen = should_freeze

    def _freeze(self, step: int) -> None:
        # Of this stage alone: the next one may see another grid, or blocks.
        stage, within = self.plan.stage_at(step)
        begin = (step - within) * self.plan.batch
        end = begin + stage.steps * self.plan.batch
        count = min(2 * len(self.cases), _VOLUMES_FOR_STATISTICS)
        first = max(begin, min(step * self.plan.batch, end - count))
        indices = range(first, min(first + count, end))

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
                    self._judge(grid, done)
                if compare:
                    self._compare_loss(grid, done)
        return bool(self.plan.patience_epochs) and (
            self.epochs_without_gain >= self.plan.patience_epochs
        )

    def _judge(self, grid: int, done: int) -> None:
        assert self.validate is not None
        table = self.validate(self.network, grid)
        self.log("validation.jsonl", {"step": done, "dice": table})
        self.on_validation(done, table)

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
        whole = Stage(grid, augmentation=None)
        losses = []
        with torch.no_grad():
            for case in self.kept_aside:
                batch = batch_of(case, whole, generator).to(self.device)
                losses.append(float(self.objective(batch)[0]))
        return fmean(losses)

    def _keep_best(self, loss: float, done: int) -> bool:
        if not (math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)):
            return False
        self.best_loss = loss
        if self.first:
            state = {"step": done, "loss": loss, "network": self.network.state_dict()}
            save_checkpoint(self.folder, state, BEST)
        return True

    def run(self) -> SegmentationNetwork:
        """Trains to the end of the plan and returns the network in evaluation mode.

        That is the last one, or its moving average; after early stopping the best one.
        """
        self.train()
        return self.result()

    @property
    def best_is_there(self) -> bool:
        return bool(self.plan.patience_epochs) and (self.folder / BEST).exists()

    def result(self) -> SegmentationNetwork:
        """The network to export, as :meth:`run` says, in evaluation mode.

        Where the best one was removed by hand, the last one is left.
        """
        if self.best_loss is not None and self.best_is_there:
            self.network.load_state_dict(load_best(self.folder)["network"])
        else:
            self.average.copy_to_network()
        return self.network.eval()

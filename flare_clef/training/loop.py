"""The loop that pre-training and fine-tuning share: steps, log, checkpoints, resuming.

A step sees ``batch`` cases, one volume at a time, and averages their gradients: each body is
normalised by itself, so the result does not depend on how many processes share the cases.
Everything that a step draws follows from the run's seed and the step's number, and all else
that decides the next step is in the checkpoint: a run that was killed and goes on ends with
the same parameters, to the bit, as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flare_clef.errors import UserError
from flare_clef.training.checkpoints import load_checkpoint, save_checkpoint
from flare_clef.training.forward import RunningStatistics, checkpoint_activations
from flare_clef.training.logs import append_record, forget_steps_from
from flare_clef.training.processes import from_first, gathered, rank, summed, wait, world_size
from flare_clef.training.stopping import KINDS, SignalNote, Stopped
from flare_clef.training.weight_average import WeightAverage

SKIPPED_IN_A_ROW = 10
"""So many steps without a finite loss end a run."""


class Plan(Protocol):
    """What the loop needs to know of a recipe's table."""

    @property
    def seed(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def weight_average(self) -> float: ...
    @property
    def gradient_clip(self) -> float: ...
    @property
    def activation_checkpointing(self) -> bool: ...
    def learning_rate(self, step: int) -> float: ...


class Batch(Protocol):
    """One case as a step sees it."""

    @property
    def case(self) -> str: ...
    def to(self, device: torch.device) -> Batch: ...


class Trainer:
    """A run in ``folder``. Subclasses say what a step sees and what its loss is.

    ``objective`` maps a batch to (loss, terms for the log) and holds the networks; ``optimizer`` is
    Adam unless another one of its parameters is given.
    """

    def __init__(
        self,
        plan: Plan,
        objective: nn.Module,
        folder: Path,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        device: torch.device | None = None,
        on_step: Callable[[dict[str, Any]], None] = lambda record: None,
        checkpoint_seconds: float = 120,
    ) -> None:
        self._plan, self.folder, self.on_step = plan, folder, on_step
        self.on_validation: Callable[[int, dict[str, dict[str, float]]], None] = (
            lambda step, table: None
        )
        self.device = device or torch.device("cpu")
        self.checkpoint_seconds = checkpoint_seconds
        self.first = rank() == 0
        if plan.batch % world_size():
            raise UserError(
                f"batch = {plan.batch} cannot be shared among {world_size()} processes: it must "
                "be a multiple of their number"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.objective = objective.to(self.device)
        self.objective.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if plan.activation_checkpointing:
            checkpoint_activations(objective)
        self.statistics = RunningStatistics(objective)
        self.optimizer = optimizer or torch.optim.Adam(objective.parameters(), fused=True)
        self.average = WeightAverage(objective, plan.weight_average)
        self.model: nn.Module = objective
        if world_size() > 1:
            self.model = DistributedDataParallel(objective, broadcast_buffers=False)
        self.step = 0
        self.skipped = self.skipped_in_row = 0
        self.seconds = 0.0
        self.ended = False
        """Early stopping has ended the run; a longer plan does not go on with it."""
        self._spoilt: dict[str, None] = {}
        """Cases without a finite loss since the last good step, in their order."""
        self._signal = SignalNote()
        self._agreed_signal = 0

    # What subclasses define.

    def make_batch(self, index: int) -> Batch:
        """Case number ``index`` of the run; step s sees cases s * batch to (s + 1) * batch - 1."""
        raise NotImplementedError

    def before_step(self, step: int) -> None:
        """Sets modes before ``step``."""

    def after_step(self, step: int) -> bool:
        """Judges after ``step``; True ends the run."""
        return False

    def parameters_for_checkpoint(self) -> dict[str, nn.Module]:
        """Modules by their key in the checkpoint."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What else decides the steps to come."""
        return {}

    def figures(self) -> dict[str, Any]:
        """What else goes to the log of each step."""
        return {}

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes :meth:`state` back; keys may be missing in older checkpoints."""

    # The loop.

    def load(self) -> None:
        """Goes on from the folder's last checkpoint, if there is one."""
        saved = load_checkpoint(self.folder)
        if saved is None:
            return
        for key, module in self.parameters_for_checkpoint().items():
            try:
                module.load_state_dict(saved[key])
            except (RuntimeError, KeyError):
                raise UserError(
                    f"{self.folder}: its checkpoint is of another network or stage; "
                    "name another folder with --output"
                ) from None
        kind = saved.get("optimizer_kind", "Adam")
        if kind != type(self.optimizer).__name__:
            raise UserError(
                f"{self.folder}: its checkpoint is of a run with {kind.lower()} as its optimizer; "
                "name another folder with --output"
            )
        self.optimizer.load_state_dict(saved["optimizer"])
        self.average.restore(saved.get("average"))
        self.step = saved["step"]
        self.skipped = saved.get("skipped", 0)
        self.skipped_in_row = saved.get("skipped_in_row", 0)
        self.seconds = saved.get("seconds", 0.0)
        self.ended = saved.get("ended", False)
        self.restore(saved)

    def save(self) -> None:
        """Writes the checkpoint of the present step, atomically."""
        if not self.first:
            return
        modules = self.parameters_for_checkpoint().items()
        save_checkpoint(
            self.folder,
            {
                "step": self.step,
                "optimizer": self.optimizer.state_dict(),
                "optimizer_kind": type(self.optimizer).__name__,
                "average": self.average.state(),
                "skipped": self.skipped,
                "skipped_in_row": self.skipped_in_row,
                "seconds": self.seconds,
                "ended": self.ended,
                **{key: module.state_dict() for key, module in modules},
                **self.state(),
            },
        )

    def train(self) -> None:
        """Steps to the end of the plan. Raises Stopped after a signal, UserError if it cannot."""
        if self.first:
            forget_steps_from(self.folder / "metrics.jsonl", self.step)
            for name in ("validation.jsonl", "validation_loss.jsonl"):
                forget_steps_from(self.folder / name, self.step + 1)
        saved_at = time.monotonic()
        with self._signal:
            for step, batches in self._batches():
                began = time.monotonic()
                self.before_step(step)
                record = self._train_step(step, batches)
                self.step = step + 1
                seconds = time.monotonic() - began
                self.seconds += seconds
                record["seconds"] = round(seconds, 3)
                self.log("metrics.jsonl", record)
                if self.first:
                    self.on_step(record)
                self.ended = self.after_step(step)
                stopped_by = self._signal.number if world_size() == 1 else self._agreed_signal
                if stopped_by:
                    self.save()
                    wait()
                    raise Stopped(stopped_by)
                if self.ended:
                    break
                if from_first(time.monotonic() - saved_at > self.checkpoint_seconds):
                    self.save()
                    saved_at = time.monotonic()
        self.save()
        wait()

    def _batches(self) -> Iterator[tuple[int, list[Batch]]]:
        """This process's cases of each step to come, the next ones made meanwhile."""
        if self.ended or self.step >= self._plan.steps:
            return
        share = range(rank(), self._plan.batch, world_size())

        def make(step: int) -> list[Batch]:
            return [self.make_batch(step * self._plan.batch + place) for place in share]

        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = pool.submit(make, self.step)
            for step in range(self.step, self._plan.steps):
                batches = ahead.result()
                if step + 1 < self._plan.steps:
                    ahead = pool.submit(make, step + 1)
                yield step, batches

    def _train_step(self, step: int, batches: list[Batch]) -> dict[str, Any]:
        rate = self._plan.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        before = self.statistics.read()
        after = torch.zeros_like(before)
        losses, terms = [], []
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with self._no_exchange() if not last else nullcontext():
                self.statistics.write(before)
                loss, of_batch = self.model(batch.to(self.device))
                after += self.statistics.read()
                (loss / len(batches)).backward()
            losses.append(float(loss.detach()))
            terms.append(of_batch)
        # All processes must take the same way: they exchange what decides it.
        heard = [float(self._signal.number == kind) for kind in KINDS]
        shared = torch.tensor([sum(losses), *heard], dtype=torch.float64)
        shared = summed(shared.to(self.device))
        mean_loss = float(shared[0]) / self._plan.batch
        self._agreed_signal = next((k for k, n in zip(KINDS, shared[1:], strict=True) if n), 0)
        clip = self._plan.gradient_clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.objective.parameters(), clip))
        usable = math.isfinite(norm) and math.isfinite(mean_loss)
        names = [batch.case for batch in batches]
        if usable:
            self._spoilt.clear()
            self.optimizer.step()
            self.statistics.write(summed(after) / self._plan.batch)
            self.average.update(step)
            self.skipped_in_row = 0
        else:
            self.statistics.write(before)
            bad = [
                name for name, loss in zip(names, losses, strict=True) if not math.isfinite(loss)
            ]
            # Of a gradient that is not finite any case of the step may be the cause.
            names = [name for part in gathered(bad) for name in part] or names
            self._spoilt.update(dict.fromkeys(names))
            self.skipped += 1
            self.skipped_in_row += 1
        self.optimizer.zero_grad()
        record = {
            "step": step,
            "case": " ".join(names),
            "loss": round(mean_loss, 4) if math.isfinite(mean_loss) else None,
            "lr": rate,
            **_mean_terms(terms),
            "gradient_norm": round(norm, 3) if math.isfinite(norm) else None,
            **self.figures(),
        }
        if not usable:
            record["skipped"] = True
            self._stop_if_hopeless(step, record)
        return record

    def _stop_if_hopeless(self, step: int, record: dict[str, Any]) -> None:
        if self.skipped_in_row < SKIPPED_IN_A_ROW:
            return
        self.step = step + 1
        self.log("metrics.jsonl", record)
        self.save()
        wait()
        raise UserError(
            f"{', '.join(self._spoilt)}: the loss was not a finite number in {SKIPPED_IN_A_ROW} "
            f"steps in a row; the checkpoint of step {self.step} is kept in {self.folder}: look "
            "at the values of these cases, or begin anew with a lower learning rate in another "
            "folder (--output)"
        )

    def _no_exchange(self) -> AbstractContextManager[Any]:
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def log(self, name: str, record: dict[str, Any]) -> None:
        """Adds a line to a log of the run. Raises UserError where the disk is full."""
        if not self.first:
            return
        append_record(self.folder / name, record)


def _mean_terms(terms: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean of each figure over the step's cases; those that are not numbers: the last one's."""
    merged = dict(terms[-1])
    for key, value in merged.items():
        if isinstance(value, float):
            merged[key] = round(sum(t[key] for t in terms) / len(terms), 4)
            if not math.isfinite(merged[key]):
                merged[key] = None
    return merged

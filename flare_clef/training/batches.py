"""What a step of fine-tuning sees: which case, augmented how, whole or a block of it.

A function of the plan's seed and the step's number alone, so that a resumed run repeats itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flare_clef.errors import UserError
from flare_clef.training.augmentation import augment
from flare_clef.training.cases import PreparedCase
from flare_clef.training.finetuning_plan import FinetuningPlan, Stage


def draw_order(plan: FinetuningPlan, cases: Sequence[PreparedCase]) -> list[int]:
    """Cases in the order in which steps see them: each in turn, every round in a new order.

    Repeats are relative to the largest. Cases with fewer begin somewhere in their turn: all of a
    kind would else come in the same rounds, hundreds of steps apart.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    weights = torch.tensor([plan.repeats_of(c.case.name) for c in cases], dtype=torch.float64)
    if not weights.any():
        raise UserError("finetune.repeats: 0 for every case; name at least one with more")
    if not weights.isfinite().all():
        raise UserError("finetune.repeats: not a finite number; name how often a case is drawn")
    # A round has no case twice: its copies would follow each other.
    weights = weights / weights.max()
    order: list[int] = []
    due = torch.rand(len(cases), generator=generator).double()
    wanted = plan.steps * plan.batch
    while len(order) < wanted:
        due += weights
        chosen = torch.nonzero(due >= 1 - 1e-6).flatten()
        due[chosen] -= 1
        order += chosen[torch.randperm(len(chosen), generator=generator)].tolist()
    return order[:wanted]


@dataclass
class LabelledBatch:
    """One case as a step sees it: image (1, 1, z, y, x), labels (z, y, x), organs (13,).

    Labels hold their doubt, see :mod:`flare_clef.training.doubt`."""

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
    return batch_of(cases[order[index]], stage, generator)


def batch_of(case: PreparedCase, stage: Stage, generator: torch.Generator) -> LabelledBatch:
    """``case`` on the stage's grid, augmented and cut to a block as the stage says."""
    image, labels = augment(
        torch.from_numpy(case.image.copy()),
        torch.from_numpy(case.labels.copy()),
        (stage.grid,) * 3,
        stage.augmentation,
        generator,
        block=stage.block,
        height_mm=case.spacing_mm[0] * case.image.shape[0],
    )
    return LabelledBatch(case.case.name, image[None, None], labels, case.case.labelled)

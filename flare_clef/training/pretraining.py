"""Pre-training without labels (paper, sections 2.2 and 3.2; table 2).

The backbone and a head give every voxel a unit vector of D features. Three losses: a decoder
finds the voxel's intensity in them, far voxels differ, and features move with the image. What
fine-tuning takes over is the backbone alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flare_clef.network import Architecture, Head, UNet
from flare_clef.training import pretraining_losses as losses
from flare_clef.training.augmentation import augment
from flare_clef.training.cases import PreparedCase
from flare_clef.training.forward import forward_precision
from flare_clef.training.loop import Trainer
from flare_clef.training.resampling import resample


@dataclass(frozen=True)
class PretrainingPlan:
    """All that decides the result of pre-training, beside the data.

    Of the paper: ``grid``, ``epochs``, ``rate``, ``batch``, ``margin``, ``far_mm`` and
    the ranges of the transform. The rest is not in it; the reasons for our choice stand here.
    """

    epochs: int = 50
    steps: int = 0
    """In place of ``epochs``."""
    grid: int = 192
    seed: int = 0
    rate: float = 4e-4
    """Adam's, from the first step to the last."""
    batch: int = 1
    features: int = 16
    """D. Vectors in D dimensions of which no two are nearer than the margin's 26 degrees: at
    least (1 / sin 26 degrees) ** (D - 1), 270,000 at D = 16; a body of 30 litres has 57,000
    places 10 mm apart. At D = 8 there are 340. More only cost memory: 28 MB a feature."""
    anchors: int = 128
    """Few, for each is compared with every leaf; their number only lowers the noise."""
    leaves: int = 8192
    """Many, so that a leaf falls into nearly every 15 mm cell of a body, and every anchor
    meets what looks like it, the other kidney or the next vertebra, in every step."""
    points: int = 65536
    """Voxels over which equation 2 is averaged: a hundredth of the grid, drawn anew in each
    step. The features of the transformed image are then needed nowhere else."""
    margin: float = -0.9
    far_mm: float = 10.0
    decoding_weight: float = 1.0
    """A decoder that knows only the mean is off by 0.2 to 0.3 on our scans (their variance)."""
    discriminativeness_weight: float = 10.0
    """Equal features cost 1 + M = 0.1 at most and gain 1 in equation 2 to features that are
    not equivariant at all: with 10 a collapse costs what it can gain."""
    equivariance_weight: float = 1.0
    """Easily learned, says the paper: it needs no more."""
    weight_average: float = 0.0
    gradient_clip: float = 0.0
    activation_checkpointing: bool = False

    def for_cases(self, count: int) -> PretrainingPlan:
        """The plan with ``epochs`` of ``count`` cases turned into steps."""
        return replace(self, steps=self.steps or self.epochs * math.ceil(count / self.batch))

    def learning_rate(self, step: int) -> float:
        return self.rate


@dataclass
class PairBatch:
    """A prepared image X and T(X), both (1, 1, z, y, x), and the voxels that are compared."""

    case: str
    image: Tensor
    transformed: Tensor
    points: Tensor
    """(N,) rows of T(X)'s feature map."""
    sources: Tensor
    """(N, 3) where those voxels lie in X, (z, y, x)."""
    anchors: Tensor
    """(A, 3) voxels of X's body, (z, y, x)."""
    leaves: Tensor
    spacing_mm: tuple[float, float, float]

    def to(self, device: torch.device) -> PairBatch:
        return replace(
            self,
            image=self.image.to(device),
            transformed=self.transformed.to(device),
            points=self.points.to(device),
            sources=self.sources.to(device),
            anchors=self.anchors.to(device),
            leaves=self.leaves.to(device),
        )


def make_pair(
    plan: PretrainingPlan, cases: Sequence[PreparedCase], order: list[int], index: int
) -> PairBatch:
    """Number ``index`` of the run's cases; a function of the plan's seed and the number alone."""
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + index + 1)
    case = cases[order[index]]
    stored = torch.from_numpy(case.image.copy())
    size = (plan.grid,) * 3
    image, _ = augment(stored, torch.zeros(stored.shape, dtype=torch.uint8), size, None, generator)
    spacing = tuple(mm * n / plan.grid for mm, n in zip(case.spacing_mm, stored.shape, strict=True))
    affine = losses.draw_transform(generator)
    transformed, _ = resample(image, affine)
    voxels = torch.randint(plan.grid, (plan.points, 3), generator=generator)
    sources = losses.source_positions(voxels, affine, size)
    inside = losses.defined(sources, size)
    return PairBatch(
        case.case.name,
        image[None, None],
        transformed[None, None],
        losses.flat_index(voxels[inside], size),
        sources[inside],
        losses.draw_voxels(image, plan.anchors, generator),
        losses.draw_voxels(image, plan.leaves, generator),
        spacing,  # type: ignore[arg-type]
    )


class PretrainingObjective(nn.Module):
    """Backbone, feature head and decoder; from a batch to the loss and its terms for the log."""

    def __init__(self, plan: PretrainingPlan, architecture: Architecture, precision: str) -> None:
        super().__init__()
        width = architecture.widths[0]
        self.plan, self.precision = plan, precision
        self.backbone = UNet(architecture)
        self.head = Head(width, architecture.head_channels, plan.features)
        self.decoder = Head(plan.features, architecture.head_channels, 1)

    def forward(self, batch: PairBatch) -> tuple[Tensor, dict[str, Any]]:
        plan = self.plan
        _, _, depth, height, width = batch.image.shape
        size = (depth, height, width)
        with forward_precision(self.precision, batch.image.device.type):
            features = functional.normalize(self.head(self.backbone(batch.image)), dim=1)
            decoded = self.decoder(features)
            # The head looks at single voxels: it need not see those that are not compared.
            others = self.backbone(batch.transformed)
            rows = others[0].permute(1, 2, 3, 0).reshape(-1, others.shape[1])[batch.points]
            compared = self.head(rows.t()[None, :, :, None, None])
        unit = features[0].permute(1, 2, 3, 0).reshape(-1, plan.features).float()
        leaves = unit[losses.flat_index(batch.leaves, size)]
        found = losses.discriminativeness_loss(
            unit[losses.flat_index(batch.anchors, size)],
            leaves,
            batch.anchors,
            batch.leaves,
            batch.spacing_mm,
            margin=plan.margin,
            far_mm=plan.far_mm,
        )
        decoding = losses.decoding_loss(decoded, batch.image)
        equivariance = losses.equivariance_loss(
            losses.interpolate_rows(unit, batch.sources, size), losses.unit_rows(compared)
        )
        loss = (
            plan.decoding_weight * decoding
            + plan.discriminativeness_weight * found.loss
            + plan.equivariance_weight * equivariance
        )
        return loss, {
            "decoding": float(decoding.detach()),
            "discriminativeness": float(found.loss.detach()),
            "equivariance": float(equivariance.detach()),
            "far_similarity": found.similarity,
            "feature_rank": losses.effective_rank(leaves),
        }


def draw_order(plan: PretrainingPlan, cases: int) -> list[int]:
    """Cases in the order in which steps see them: each in turn, every round in a new order."""
    generator = torch.Generator().manual_seed(plan.seed)
    order: list[int] = []
    while len(order) < plan.steps * plan.batch:
        order += torch.randperm(cases, generator=generator).tolist()
    return order


class Pretraining(Trainer):
    """Pre-training in ``folder`` on cases with or without labels (labels are not looked at)."""

    def __init__(
        self,
        plan: PretrainingPlan,
        cases: Sequence[PreparedCase],
        folder: Path,
        *,
        architecture: Architecture | None = None,
        precision: str = "fp32",
        device: torch.device | None = None,
        on_step: Callable[[dict[str, Any]], None] = lambda record: None,
        checkpoint_seconds: float = 120,
    ) -> None:
        self.plan = plan = plan.for_cases(len(cases))
        self.cases, self.order = cases, draw_order(plan, len(cases))
        torch.manual_seed(plan.seed)
        super().__init__(
            plan,
            PretrainingObjective(plan, architecture or Architecture(), precision),
            folder,
            device=device,
            on_step=on_step,
            checkpoint_seconds=checkpoint_seconds,
        )
        self.load()

    def make_batch(self, index: int) -> PairBatch:
        return make_pair(self.plan, self.cases, self.order, index)

    def parameters_for_checkpoint(self) -> dict[str, nn.Module]:
        return {"pretraining": self.objective}

    def before_step(self, step: int) -> None:
        self.objective.train()

    def run(self) -> UNet:
        """Trains to the end of the plan and returns the backbone."""
        self.train()
        self.average.copy_to_network()
        assert isinstance(self.objective, PretrainingObjective)
        return self.objective.backbone.eval()

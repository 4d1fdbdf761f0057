"""Pre-training: what a step sees, what it learns, and that a collapse is seen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import PRETRAIN, SMALL, one_thread, small_cases, small_trainer

from flare_clef.errors import UserError
from flare_clef.network import SegmentationNetwork
from flare_clef.training.backbone import load_start, save_backbone
from flare_clef.training.finetuning import Finetuning
from flare_clef.training.finetuning_plan import FinetuningPlan, Stage
from flare_clef.training.pretraining import (
    Pretraining,
    PretrainingObjective,
    PretrainingPlan,
    make_pair,
)
from flare_clef.training.pretraining_losses import interpolate_rows

__all__ = ["one_thread"]


def test_pairs_belong_together(tmp_path: Path):
    """At every compared voxel T(X) is X at its source position; the body's voxels are tissue."""
    cases = small_cases(tmp_path)
    for index in range(3):
        pair = make_pair(PRETRAIN, cases, [0, 1, 2], index)
        of_image = interpolate_rows(pair.image.view(-1, 1), pair.sources, (16, 16, 16))[:, 0]
        # As deep inside as the last half voxel; further out resampling mixes in air.
        assert torch.allclose(pair.transformed.flatten()[pair.points], of_image, atol=1e-4)
        assert len(pair.points) > 60
        for voxels, count in ((pair.anchors, 8), (pair.leaves, 64)):
            assert len(voxels) == count
            assert (pair.image[0, 0][tuple(voxels.t())] > -1).all()


def test_voxel_size_follows_the_grid(tmp_path: Path):
    plan = dataclasses.replace(PRETRAIN, grid=8)
    pair = make_pair(plan, small_cases(tmp_path, 1), [0], 0)
    assert pair.spacing_mm == (16.0, 12.0, 10.0)  # half the voxels, twice the size
    assert pair.image.shape == (1, 1, 8, 8, 8)


def test_paper_values():
    plan = PretrainingPlan().for_cases(2050)
    assert (plan.grid, plan.steps, plan.learning_rate(0), plan.batch) == (192, 102_500, 4e-4, 1)
    assert (plan.margin, plan.far_mm) == (-0.9, 10.0)


def test_losses_fall_and_figures_are_logged(tmp_path: Path):
    plan = dataclasses.replace(PRETRAIN, steps=60, rate=1e-2, weight_average=0.0)
    Pretraining(plan, small_cases(tmp_path), tmp_path / "run", architecture=SMALL).run()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(lines[k]) for k in (0, -1))
    assert last["loss"] < first["loss"] - 0.2
    assert last["decoding"] < 0.7 * first["decoding"]
    for record in (first, last):
        assert 1 <= record["feature_rank"] <= 4
        assert -1 <= record["far_similarity"] <= 1
        total = record["decoding"] + 10 * record["discriminativeness"] + record["equivariance"]
        assert record["loss"] == pytest.approx(total, abs=2e-3)


def test_a_collapsed_network_is_seen(tmp_path: Path):
    """With all features equal: rank 1, similarity 1, equation 1 at its highest, 2 at -1."""
    torch.manual_seed(0)
    objective = PretrainingObjective(PRETRAIN, SMALL, "fp32")
    with torch.no_grad():
        objective.head[2].weight.zero_()
    pair = make_pair(PRETRAIN, small_cases(tmp_path), [0], 0)
    _, figures = objective(pair)
    assert figures["feature_rank"] == pytest.approx(1, abs=1e-4)
    assert figures["far_similarity"] == pytest.approx(1, abs=1e-4)
    assert figures["discriminativeness"] == pytest.approx(0.1, abs=1e-4)
    assert figures["equivariance"] == pytest.approx(-1, abs=1e-4)


def test_the_backbone_passes_over_and_the_head_is_new(tmp_path: Path):
    trainer = small_trainer("pretrain", tmp_path / "pre")
    assert isinstance(trainer, Pretraining)
    backbone = trainer.run()
    save_backbone(tmp_path / "b.safetensors", backbone, SMALL)
    start = load_start(tmp_path / "b.safetensors", SMALL)
    plan = FinetuningPlan(stages=(Stage(16, 2),), seed=5)
    tuned = Finetuning(plan, small_cases(tmp_path), tmp_path / "f", architecture=SMALL, start=start)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, tuned.network.backbone.state_dict()[name]), name
    torch.manual_seed(5)
    fresh = SegmentationNetwork(SMALL)
    for name, tensor in fresh.head.state_dict().items():
        assert torch.equal(tensor, tuned.network.head.state_dict()[name]), name
    other = dataclasses.replace(SMALL, widths=(4, 16))
    with pytest.raises(UserError, match="make \\[network\\] the same"):
        load_start(tmp_path / "b.safetensors", other)
    with pytest.raises(UserError, match="cannot be read"):
        load_start(tmp_path / "none.safetensors", SMALL)


def test_a_network_that_burst_ends_with_the_line_for_it(tmp_path: Path):
    trainer = small_trainer("pretrain", tmp_path / "run", steps=20, rate=1e30)
    with pytest.raises(UserError, match="the loss was not a finite number in 10 steps in a row"):
        trainer.train()


def test_a_volume_without_tissue_costs_no_step(tmp_path: Path):
    """No voxel lies above -200 HU: none is far from another, and there is no rank."""
    cases = small_cases(tmp_path / "cases", 1)
    np.save(cases[0].folder / "image.npy", np.full((16, 16, 16), -1, np.float16))
    plan = dataclasses.replace(PRETRAIN, steps=1)
    Pretraining(plan, cases, tmp_path / "run", architecture=SMALL).run()
    (record,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert record["loss"] is not None and record["discriminativeness"] == 0
    assert record["feature_rank"] is None

"""What the curves are drawn from, and that the picture is drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from flare_clef.errors import UserError
from flare_clef.organs import ORGANS
from flare_clef.training.curves import read_run, smooth, write_curves

PNG = b"\x89PNG\r\n\x1a\n"


def log(folder: Path, name: str, records: list[dict]) -> None:
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def step(number: int, loss: float | None = 0.5, **more) -> dict:
    dice = [0.1 * number, *[None] * 12]
    return {"step": number, "case": "a", "loss": loss, "ce": 0.2, "dice": dice, **more}


def test_the_logs_are_read(tmp_path: Path):
    # Steps 1 and 2 twice: the run was killed after its checkpoint at step 1 and went on.
    log(
        tmp_path,
        "metrics.jsonl",
        [step(0), step(1, 9.0), step(2, 9.0), step(1, 0.4), step(2, None, frozen=True)],
    )
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    log(
        tmp_path,
        "validation.jsonl",
        [{"step": 2, "dice": {"x": {"liver": 0.5, "aorta": 0.2}, "y": {"liver": 0.7}}}],
    )
    run = read_run(tmp_path)
    assert run.steps.tolist() == [1, 2, 3]
    assert run.loss[:2].tolist() == [0.5, 0.4] and math.isnan(run.loss[2])
    assert run.terms.keys() == {"ce"} and run.frozen_from == 3
    assert run.dice.shape == (3, 13) and run.dice[:, 0].tolist() == [0.0, 0.1, 0.2]
    assert np.isnan(run.dice[:, 1:]).all()
    assert run.validation == {2: {"liver": pytest.approx(0.6), "aorta": 0.2}}


def test_smoothing_by_hand():
    steps = np.arange(1, 13)
    values = np.array([1.0, 1, 1, 1, 6, math.nan, 4, 4, 4, 4, 4, 10])
    # Eleven known values: two parts of six and five steps.
    at, line = smooth(steps, values)
    assert at.tolist() == [(1 + 2 + 3 + 4 + 5 + 7) / 6, 10.0]
    assert line.tolist() == [14 / 6, 26 / 5]
    assert smooth(steps, values, np.median)[1].tolist() == [1.0, 4.0]
    assert len(smooth(np.arange(100_000), np.ones(100_000))[0]) == 40
    assert smooth(steps, np.full(12, math.nan))[0].size == 0


def test_the_picture_is_drawn_at_every_time_of_a_run(tmp_path: Path):
    with pytest.raises(UserError, match="no step in it"):
        write_curves(tmp_path)
    log(tmp_path, "metrics.jsonl", [step(0)])
    first = write_curves(tmp_path).read_bytes()
    assert first.startswith(PNG)
    log(tmp_path, "metrics.jsonl", [step(k, 1 / (k + 1), frozen=k > 5) for k in range(9)])
    scores = {organ.name: 0.5 for organ in ORGANS}
    log(tmp_path, "validation.jsonl", [{"step": k, "dice": {"x": scores}} for k in (4, 8)])
    second = write_curves(tmp_path).read_bytes()
    assert second.startswith(PNG) and second != first
    assert {p.name for p in tmp_path.iterdir()} == {
        "metrics.jsonl",
        "validation.jsonl",
        "curves.png",
    }


def test_pretraining_logs_have_no_organs(tmp_path: Path):
    record = {"loss": 1.0, "decoding": 0.4, "far_similarity": 0.9, "feature_rank": 4.0}
    log(tmp_path, "metrics.jsonl", [{"step": k, "lr": 4e-4, **record} for k in range(5)])
    assert read_run(tmp_path).terms.keys() == {"decoding", "far_similarity", "feature_rank"}
    assert write_curves(tmp_path).read_bytes().startswith(PNG)


def test_validation_losses_are_drawn(tmp_path: Path):
    log(tmp_path, "metrics.jsonl", [step(k) for k in range(5)])
    before = write_curves(tmp_path).read_bytes()
    log(tmp_path, "validation_loss.jsonl", [{"step": k, "loss": 1 / k} for k in (2, 5)])
    assert read_run(tmp_path).validation_loss == {2: 0.5, 5: 0.2}
    assert write_curves(tmp_path).read_bytes() != before


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path):
    log(tmp_path, "metrics.jsonl", [step(0)])
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(UserError, match=r"curves.png: cannot be written \(Is a directory\)"):
        write_curves(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "curves.png"}

"""Event files hold the log's figures; without the package nothing happens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flare_clef.training.tensorboard import TensorBoardLog

RECORD = {
    "step": 4, "case": "a", "loss": 0.5, "frozen": False, "ce": float("nan"),
    "dice": [0.75, None, *[None] * 11],
}  # fmt: skip


def test_figures_are_written(tmp_path: Path):
    pytest.importorskip("torch.utils.tensorboard", reason="the tensorboard package is absent")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLog(tmp_path)
    log.step(RECORD)
    log.validation(5, {"liver": 0.25, "mean": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert found == {
        "train/loss": [(5, 0.5)],
        "train_dice/liver": [(5, 0.75)],
        "validation/liver": [(5, 0.25)],
        "validation/mean": [(5, 0.5)],
    }


def test_without_the_package_nothing_happens(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = TensorBoardLog(tmp_path / "events")
    log.step(RECORD)
    log.validation(5, {"mean": 0.5})
    log.close()
    assert not (tmp_path / "events").exists()

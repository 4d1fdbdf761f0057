"""Tiny runs on made-up prepared volumes, for tests and for the processes that tests start.

python small_runs.py FOLDER KIND PRECISION [kill STEP | term STEP | int STEP]
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flare_clef.network import Architecture
from flare_clef.training.cases import Case, PreparedCase
from flare_clef.training.finetuning import Finetuning
from flare_clef.training.finetuning_plan import FinetuningPlan, Stage
from flare_clef.training.loop import Trainer
from flare_clef.training.pretraining import Pretraining, PretrainingPlan
from flare_clef.training.processes import join_processes, leave_processes, rank
from flare_clef.training.stopping import Stopped

SMALL = Architecture(widths=(4, 8), encoder_convs=(1, 1), decoder_convs=(1,), head_channels=4)
SMALL_TOML = """[network]
widths = [4, 8]
encoder_convs = [1, 1]
decoder_convs = [1]
head_channels = 4
"""

FINETUNE = FinetuningPlan(
    stages=(
        Stage(16, 6, (1e-2, 1e-3), freeze_after=0.5),
        Stage(16, 4, (1e-3, 1e-3), augmentation=None),
    ),
    warmup_steps=2,
    weight_average=0.9,
    patience_epochs=50,
)
PRETRAIN = PretrainingPlan(
    steps=8, grid=16, features=4, anchors=8, leaves=64, points=256, weight_average=0.9
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More threads would wait for each other longer than these networks compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_cases(folder: Path, count: int = 3, spoilt: bool = False) -> list[PreparedCase]:
    """Prepared cases of 16^3 with a bright liver; ``spoilt``: the values are not finite."""
    cases = []
    for seed in range(count):
        entry = folder / f"case{seed}"
        entry.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(seed)
        labels = np.zeros((16, 16, 16), np.uint8)
        labels[4:9, 5:11, 3 + seed : 9 + seed] = 1
        image = random.normal(-0.2, 0.2, labels.shape) + 0.6 * labels
        image[:2] = -1
        if spoilt:
            image[8, 8, 8] = np.nan
        np.save(entry / "image.npy", image.clip(-1, 1).astype(np.float16))
        np.save(entry / "labels.npy", labels)
        case = Case(f"case{seed}", entry / "image", entry / "labels", ("liver",))
        cases.append(PreparedCase(case, entry, (8.0, 6.0, 5.0)))
    return cases


def small_trainer(kind: str, run: Path, precision: str = "fp32", **changes: Any) -> Trainer:
    """A run of a few steps: ``finetune`` or ``pretrain``; ``changes`` of its plan."""
    cases = small_cases(run.parent / "cases", 4 if changes.get("batch", 1) > 1 else 3)
    if kind == "pretrain":
        return Pretraining(
            dataclasses.replace(PRETRAIN, **changes), cases, run, architecture=SMALL,
            precision=precision, checkpoint_seconds=0,
        )  # fmt: skip
    return Finetuning(
        dataclasses.replace(FINETUNE, **changes), cases, run, architecture=SMALL,
        kept_aside=cases[:1], precision=precision, checkpoint_seconds=0,
    )  # fmt: skip


def main() -> None:
    folder, kind, precision, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    join_processes(torch.device("cpu"))
    changes: dict[str, Any] = json.loads(os.environ.get("CHANGES", "{}"))
    trainer = small_trainer(kind, Path(folder), precision, **changes)
    trainer.checkpoint_seconds = 0 if rest[:1] != ["kill"] else 1e9

    def on_step(record: dict[str, Any]) -> None:
        if rest and record["step"] == int(rest[1]) - 2:
            trainer.checkpoint_seconds = 0
        if rest and record["step"] == int(rest[1]):
            kinds = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
            os.kill(os.getpid(), kinds[rest[0]])

    trainer.on_step = on_step
    try:
        trainer.train()
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
    if rank() == 0:
        torch.save(trainer.objective.state_dict(), Path(folder) / "end.pt")
    leave_processes()


if __name__ == "__main__":
    main()

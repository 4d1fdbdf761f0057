"""Runs that are killed, stopped, spoilt, or run out of disk."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_runs import SMALL, one_thread, small_cases, small_trainer

from flare_clef.errors import UserError
from flare_clef.training.checkpoints import BEFORE, BEST, LAST, load_checkpoint, save_checkpoint
from flare_clef.training.finetuning import Finetuning
from flare_clef.training.finetuning_plan import FinetuningPlan, Stage
from flare_clef.training.weight_average import WeightAverage

__all__ = ["one_thread"]
SCRIPT = Path(__file__).with_name("small_runs.py")


def start(folder: Path, kind: str, precision: str, *rest: str) -> int:
    command = [sys.executable, str(SCRIPT), str(folder), kind, precision, *rest]
    return subprocess.run(command, timeout=300).returncode


def assert_equal_ends(one: Path, other: Path) -> None:
    """The last checkpoints agree to the bit, in all that decides further steps."""
    left, right = load_checkpoint(one), load_checkpoint(other)
    assert left is not None and right is not None
    del left["seconds"], right["seconds"]
    _assert_same(left, right, "")


def _assert_same(left, right, where):
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            _assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list):
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            _assert_same(a, b, f"{where}[{number}]")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


@pytest.mark.parametrize(
    ("kind", "precision", "step", "changes"),
    [
        ("finetune", "fp32", "4", {}),
        ("finetune", "bf16", "7", {}),
        ("finetune", "bf16", "5", {"optimizer": "muon"}),
        ("pretrain", "fp32", "3", {}),
    ],
)
def test_killed_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch, kind, precision, step, changes
):
    """SIGKILL in the midst of a run: optimizer, moving average, early stopping, all agree."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    small_trainer(kind, whole, precision, **changes).train()
    monkeypatch.setenv("CHANGES", json.dumps(changes))
    assert start(broken, kind, precision, "kill", step) == -signal.SIGKILL
    saved = load_checkpoint(broken)
    assert saved is not None and 0 < saved["step"] <= int(step)
    resumed = small_trainer(kind, broken, precision, **changes)
    assert resumed.step == saved["step"]
    resumed.train()
    assert_equal_ends(whole, broken)
    for folder in (whole, broken):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))


@pytest.mark.parametrize(("name", "code"), [("term", 143), ("int", 130)])
def test_signals_save_and_exit(tmp_path: Path, name: str, code: int):
    assert start(tmp_path / "run", "finetune", "fp32", name, "2") == code
    saved = load_checkpoint(tmp_path / "run")
    assert saved is not None and saved["step"] == 3


def _finetuning(folder: Path, **changes) -> Finetuning:
    trainer = small_trainer("finetune", folder, **changes)
    assert isinstance(trainer, Finetuning)
    return trainer


def test_only_a_training_forgets_steps(tmp_path: Path):
    """An export reads the checkpoint of a run that may be going on."""
    run = tmp_path / "run"
    small_trainer("finetune", run).train()
    log = run / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + json.dumps({"step": 10}) + "\n")
    assert small_trainer("finetune", run).step == 10 and len(log.read_text().splitlines()) == 11
    (run / LAST).unlink()
    (run / BEFORE).unlink()
    small_trainer("finetune", run).train()  # from the beginning: nothing stands twice
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(10))


def test_a_best_network_that_is_damaged_is_one_line_and_gone_it_is_the_last(tmp_path: Path):
    trainer = _finetuning(tmp_path / "run")
    trainer.train()
    (tmp_path / "run" / BEST).write_bytes(b"x")
    with pytest.raises(UserError, match=r"best\.pt: cannot be read .*; remove it, and"):
        trainer.result()
    (tmp_path / "run" / BEST).unlink()
    expected = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    with trainer.average.in_place():
        averaged = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    result = trainer.result().state_dict()
    assert all(torch.equal(result[key], averaged[key]) for key in expected)


def test_statistics_are_of_the_stage_that_freezes(tmp_path: Path, monkeypatch):
    """Three cases ask for six volumes: steps 8 and 19 have two and one left in their stages."""
    stages = (Stage(16, 10, freeze_after=0.8), Stage(16, 10, freeze_after=0.9))
    trainer = _finetuning(tmp_path / "run", stages=stages, weight_average=0.0)
    make_batch, made, used = trainer.make_batch, [], []
    monkeypatch.setattr(trainer, "make_batch", lambda i: made.append(i) or make_batch(i))

    def freeze(network, volumes, *how):
        made.clear()
        assert len(list(volumes)) == 6
        used.append(list(made))

    monkeypatch.setattr("flare_clef.training.finetuning.freeze_statistics", freeze)
    for step in (8, 19):
        trainer.frozen = False
        trainer.before_step(step)
    assert used == [[4, 5, 6, 7, 8, 9], [14, 15, 16, 17, 18, 19]]


def test_early_stopping_by_hand(tmp_path: Path, monkeypatch):
    """Losses 3, 2, 2, 4, 1 with a patience of two epochs: it ends after the fourth."""
    losses = iter([3.0, 2.0, 2.0, 4.0, 1.0])
    plan = {"patience_epochs": 2, "weight_average": 0.0}
    trainer = _finetuning(tmp_path / "run", stages=(Stage(16, epochs=20),), **plan)
    monkeypatch.setattr(trainer, "validation_loss", lambda grid: next(losses))
    seen = []
    trainer.on_step = lambda record: seen.append(
        {k: v.clone() for k, v in trainer.network.state_dict().items()}
    )
    network = trainer.run()
    assert trainer.step == 4 * 3  # three cases an epoch
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, seen[5][name])  # after the second epoch
    best = torch.load(tmp_path / "run" / BEST, weights_only=True)
    assert (best["step"], best["loss"]) == (6, 2.0)
    # Started once more, it knows that it has ended.
    again = _finetuning(tmp_path / "run", stages=(Stage(16, epochs=20),), **plan)
    again.run()
    assert again.step == 12


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path: Path, monkeypatch):
    losses = iter([float("nan"), 3.0, 2.0])
    plan = {"patience_epochs": 2, "weight_average": 0.0}
    trainer = _finetuning(tmp_path / "run", stages=(Stage(16, epochs=3),), **plan)
    monkeypatch.setattr(trainer, "validation_loss", lambda grid: next(losses))
    trainer.run()
    assert trainer.best_loss == 2.0


def test_a_finished_run_goes_on_with_a_longer_plan(tmp_path: Path):
    whole = _finetuning(tmp_path / "whole", stages=(Stage(16, 6, (1e-3, 1e-3)),))
    whole.run()
    _finetuning(tmp_path / "run", stages=(Stage(16, 3, (1e-3, 1e-3)),)).run()
    longer = _finetuning(tmp_path / "run", stages=(Stage(16, 6, (1e-3, 1e-3)),))
    assert longer.step == 3
    longer.run()
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, longer.network.state_dict()[name]), name


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path):
    small_trainer("finetune", tmp_path / "run").train()
    with pytest.raises(UserError, match="a run with adam as its optimizer"):
        small_trainer("finetune", tmp_path / "run", optimizer="muon")


def test_spoilt_case_is_skipped_and_ten_in_a_row_end_the_run(tmp_path: Path):
    plan = FinetuningPlan(stages=(Stage(16, 30, augmentation=None),))
    good, bad = small_cases(tmp_path / "good"), small_cases(tmp_path / "bad", spoilt=True)
    mixed = Finetuning(plan, [good[0], bad[1], good[2]], tmp_path / "mixed", architecture=SMALL)
    mixed.train()
    assert mixed.skipped == 10 and mixed.skipped_in_row < 10
    assert all(torch.isfinite(t).all() for t in mixed.network.state_dict().values())
    hopeless = Finetuning(plan, bad, tmp_path / "hopeless", architecture=SMALL)
    before = {k: v.clone() for k, v in hopeless.network.state_dict().items()}
    with pytest.raises(UserError, match="the loss was not a finite number in 10 steps") as ended:
        hopeless.train()
    assert all(case.case.name in str(ended.value) for case in bad)
    saved = load_checkpoint(tmp_path / "hopeless")
    assert saved is not None and saved["step"] == 10 and saved["skipped"] == 10
    for name, tensor in saved["network"].items():
        if "num_batches" not in name:
            assert torch.equal(tensor, before[name]), name


@contextmanager
def _files_no_larger_than(limit: int) -> Iterator[None]:
    """As on a full disk, a write beyond ``limit`` bytes fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path):
    save_checkpoint(tmp_path, {"step": 1, "x": torch.zeros(100_000)})
    with (
        _files_no_larger_than(50_000),
        pytest.raises(UserError, match=r"checkpoint.pt: the checkpoint cannot be written \(File"),
    ):
        save_checkpoint(tmp_path, {"step": 2, "x": torch.zeros(100_000)})
    assert load_checkpoint(tmp_path)["step"] == 1
    assert os.listdir(tmp_path) == [LAST]


def test_nothing_left_that_can_be_read_is_an_error(tmp_path: Path, capsys):
    for name in (LAST, BEFORE):
        (tmp_path / name).write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="no checkpoint of this run can be read"):
        load_checkpoint(tmp_path)


def test_checkpoints_of_before_still_load(tmp_path: Path):
    """Those of the first trainer hold step, frozen, network and optimizer only."""
    trainer = _finetuning(tmp_path / "run")
    save_checkpoint(
        tmp_path / "run",
        {
            "step": 4, "frozen": True, "network": trainer.network.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
        },
    )  # fmt: skip
    resumed = _finetuning(tmp_path / "run")
    assert (resumed.step, resumed.frozen, resumed.skipped) == (4, True, 0)
    resumed.run()


def test_weight_average_by_hand(tmp_path: Path):
    layer = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.0)
        average = WeightAverage(layer, 0.5)
        layer.weight.fill_(8.0)
        average.update(step=0)  # decay min(0.5, 1 / 10): 0.9 of the new
        assert average.state()["weight"].item() == pytest.approx(7.2)
        layer.weight.fill_(0.0)
        average.update(step=100)  # decay 0.5
        assert average.state()["weight"].item() == pytest.approx(3.6)
    with average.in_place():
        assert layer.weight.item() == pytest.approx(3.6)
    assert layer.weight.item() == 0


def test_activation_checkpointing_changes_nothing(tmp_path: Path):
    small_trainer("finetune", tmp_path / "plain").train()
    small_trainer("finetune", tmp_path / "again", activation_checkpointing=True).train()
    left, right = load_checkpoint(tmp_path / "plain"), load_checkpoint(tmp_path / "again")
    for name, tensor in left["network"].items():
        if "num_batches" not in name:
            assert torch.equal(tensor, right["network"][name]), name


def test_two_processes_equal_one_for_the_same_batch(tmp_path: Path):
    """torchrun with two gloo processes against one, two cases a step."""
    changes = {"batch": 2, "weight_average": 0.9, "patience_epochs": 0}
    small_trainer("finetune", tmp_path / "one", **changes).train()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
        str(SCRIPT), str(tmp_path / "two"), "finetune", "fp32",
    ]  # fmt: skip
    environment = {**os.environ, "CHANGES": json.dumps(changes), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, timeout=300, check=True)
    left, right = load_checkpoint(tmp_path / "one"), load_checkpoint(tmp_path / "two")
    assert left["step"] == right["step"] == 10
    for name, tensor in left["network"].items():
        if "num_batches" not in name:
            torch.testing.assert_close(tensor, right["network"][name], rtol=1e-3, atol=2e-4)


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("flare_clef.training.loop.world_size", lambda: 2)
    with pytest.raises(UserError, match="batch = 3 cannot be shared among 2 processes"):
        small_trainer("finetune", tmp_path / "run", batch=3)

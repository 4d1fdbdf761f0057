"""``flare-clef train``: all stages by the command line, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import body_hu, write_scan
from safetensors import SafetensorError
from small_runs import SMALL_TOML
from test_trainer import make_folder
from typer.testing import CliRunner

from flare_clef.cli import app
from flare_clef.errors import UserError
from flare_clef.training.recipe import load_recipe
from flare_clef.training.run import Run
from flare_clef.training.run_lock import only_training_in
from flare_clef.weights import load_weights

ROOT = Path(__file__).parents[2]
RECIPE = f"""
validate_every_steps = 4
[data]
folders = ["data"]
folds = 3
grid = 32
{SMALL_TOML}[pretrain]
steps = 3
grid = 16
features = 4
anchors = 8
leaves = 64
points = 256
[finetune]
patience_epochs = 5
[[finetune.stages]]
grid = 32
epochs = 4
learning_rate = [1e-2, 1e-3]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    make_folder(folder / "data", 3)
    write_scan(folder / "data" / "images" / "scan_0000.nii.gz", body_hu((20, 24, 28)))
    (folder / "r.toml").write_text(RECIPE)
    return folder


def call(folder: Path, *arguments: str):
    options = ["--precision", "fp32", "--threads", "1"]
    return CliRunner().invoke(app, ["train", *arguments, *options])


def test_a_recipe_alone_runs_all_stages(folder: Path):
    run = folder / "run"
    done = call(folder, str(folder / "r.toml"), "--output", str(run), "--set", "finetune.seed=3")
    assert done.exit_code == 0, done.output
    assert (run / "pretraining" / "backbone.safetensors").is_file()
    record = load_weights(run / "weights.safetensors").record
    assert len(record["trained_on"]) == 2 and len(record["validation_dice"]) == 1
    # Pre-training saw the scan without labels, too, and never the case kept aside.
    assert record["pretrained_on"].keys() == {*record["trained_on"], "scan"}
    assert "earlier_recipes" not in record
    assert record["recipe"]["finetune"]["seed"] == 3
    assert str(folder) not in json.dumps(record) and record["recipe"]["data"]["folders"] == ["data"]
    for name in ("curves.png", "best.pt", "validation/best.png", "metrics.jsonl"):
        assert (run / name).is_file(), name
    described = json.loads((run / "run.json").read_text())
    assert described["recipe"]["finetune"]["seed"] == 3
    checksums = [case["sha256"] for case in described["cases"].values()]
    assert [len(files) for files in checksums] == [2, 2, 2]
    assert {len(s) for files in checksums for s in files.values()} == {64}
    assert (described["computing"]["precision"], described["computing"]["threads"]) == ("fp32", 1)
    assert described["versions"].keys() == {"flare_clef", "python", "torch", "numpy"}

    # A key that is younger than the run is no difference.
    del described["recipe"]["export"]["mean_with"]
    (run / "run.json").write_text(json.dumps(described))

    # Once more: nothing is trained again, the weights are the same.
    before = (run / "metrics.jsonl").read_text()
    seed, notes = ("--set", "finetune.seed=3"), ("--set", 'export.notes="late"')
    recipe = (str(folder / "r.toml"), "--output", str(run))
    again = call(folder, "run", *recipe, *seed, *notes)
    assert again.exit_code == 0, again.output
    assert "export.notes differs from the recipe this run began with" in again.output
    assert again.output.count("differs from the recipe") == 1
    assert "all steps done before" in again.output
    assert (run / "metrics.jsonl").read_text() == before
    # What the weights were made by stays.
    now = json.loads((run / "run.json").read_text())
    assert now["recipe"]["export"]["notes"] == "late"
    assert [one["recipe"]["export"]["notes"] for one in now["earlier"]] == [""]
    repeated = load_weights(run / "weights.safetensors").record
    assert [one["export"]["notes"] for one in repeated["earlier_recipes"]] == [""]
    # With another seed these would be other weights.
    refused = call(folder, "run", *recipe)
    assert "has done all its steps, and finetune.seed differs" in str(refused.exception)
    assert load_weights(run / "weights.safetensors").record == repeated

    (run / "weights.safetensors").unlink()
    exported = call(folder, "export", str(folder / "r.toml"), "--output", str(run))
    assert exported.exit_code == 0, exported.output
    # Seed and all else that made the network are the run's, whatever is given now.
    assert "[finetune] differs from the recipe of this run, which is taken" in exported.output
    assert load_weights(run / "weights.safetensors").record["recipe"]["finetune"]["seed"] == 3
    written = load_weights(run / "weights.safetensors")
    assert written.record["steps"] == record["steps"] and written.calibration is None
    arguments = ("export", str(folder / "r.toml"), "--output", str(run), "--calibrate")
    exported = call(folder, *arguments)
    assert exported.exit_code == 0, exported.output
    assert "calibrating 8-bit inference on 2 training volume(s)" in exported.output
    calibrated = load_weights(run / "weights.safetensors")
    assert calibrated.calibration is not None and calibrated.record["operating_points"] == {}

    points = ("--set", "export.operating_points=true")
    exported = call(folder, "export", str(folder / "r.toml"), "--output", str(run), *points)
    assert exported.exit_code == 0, exported.output
    assert "operating points by 1 case(s) kept aside: mean DSC" in exported.output
    moved = load_weights(run / "weights.safetensors")
    offsets = moved.record["operating_points"]
    assert len(offsets) == 13 and any(offsets.values())
    difference = moved.tensors["head.2.bias"] - calibrated.tensors["head.2.bias"]
    assert difference.tolist() == pytest.approx(list(offsets.values()), abs=5e-3)

    # Those that another run chose, for a run with no case kept aside.
    named = ("--set", "export.offsets={liver=-0.5, duodenum=0.25}")
    exported = call(folder, "export", str(folder / "r.toml"), "--output", str(run), *named)
    assert exported.exit_code == 0, exported.output
    moved = load_weights(run / "weights.safetensors")
    assert moved.record["operating_points"] == {"liver": -0.5, "duodenum": 0.25}
    difference = moved.tensors["head.2.bias"] - calibrated.tensors["head.2.bias"]
    assert difference.tolist() == pytest.approx([-0.5, *[0] * 10, 0.25, 0], abs=5e-3)


def test_two_processes_train_and_the_first_exports(folder: Path):
    """What the first does alone, points and ranges among it, must not wait for the second."""
    run = folder / "two"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
        "-m", "flare_clef", "train", "finetune", str(folder / "r.toml"), "--output", str(run),
        "--set", "finetune.batch=2", "--set", "pretrain=false",
        "--set", "export.calibration_volumes=1", "--set", "export.operating_points=true",
        "--precision", "fp32", "--threads", "1",
    ]  # fmt: skip
    done = subprocess.run(command, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = load_weights(run / "weights.safetensors")
    assert written.calibration is not None and len(written.record["operating_points"]) == 13


def test_weights_that_predict_otherwise_are_not_exported(folder: Path, monkeypatch):
    def flattering(network, cases, grid, precision, on_case=None):
        return {case.name: {"liver": 0.987} for case in cases}

    monkeypatch.setattr("flare_clef.training.pipeline.validate", flattering)
    run = folder / "flattered"
    done = call(
        folder, "finetune", str(folder / "r.toml"), "--output", str(run),
        "--set", "pretrain=false", "--set", "finetune.patience_epochs=0",
    )  # fmt: skip
    assert done.exit_code != 0
    assert "weights that predict otherwise are not exported" in str(done.exception)
    assert not list(run.glob("*weights*"))


def test_the_mean_with_other_weights_is_exported(folder: Path):
    recipe, run = str(folder / "r.toml"), folder / "shared"
    plain = ("--set", "pretrain=false", "--set", "finetune.patience_epochs=0")
    done = call(folder, "finetune", recipe, "--output", str(folder / "first"), *plain)
    assert done.exit_code == 0, done.output
    start = folder / "first" / "weights.safetensors"
    options = (*plain, "--set", f'finetune.start="{start}"', "--set", "finetune.seed=7")
    done = call(folder, "finetune", recipe, "--output", str(run), *options)
    assert done.exit_code == 0, done.output
    trained = load_weights(run / "weights.safetensors")
    half = ("--set", f'export.mean_with=["{start}"]')
    done = call(folder, "export", recipe, "--output", str(run), *options, *half)
    assert done.exit_code == 0, done.output
    mixed = load_weights(run / "weights.safetensors")
    before = load_weights(start)
    assert mixed.record["recipe"]["export"]["mean_with"] == ["weights.safetensors"]
    assert [one["recipe"] for one in mixed.record["mean_with"]] == [before.record["recipe"]]
    for name, tensor in mixed.tensors.items():
        one, two = before.tensors[name].double(), trained.tensors[name].double()
        # Each of the two, and their mean, is rounded to half precision by itself.
        allowed = 2**-10 * torch.maximum(one.abs(), two.abs()) + 1e-7
        assert ((tensor.double() - (one + two) / 2).abs() <= allowed).all(), name

    absent = ("--set", 'export.mean_with=["absent.safetensors"]')
    refused = call(folder, "finetune", recipe, "--output", str(folder / "no"), *plain, *absent)
    assert "absent.safetensors: no such weights file" in str(refused.exception)
    assert not (folder / "no" / "metrics.jsonl").exists()


def _with(folder: Path, data: Path, *changes: str) -> tuple[str, ...]:
    """Options for a short fine-tuning of ``data``, its case c2 kept aside."""
    plain = ("pretrain=false", "finetune.patience_epochs=0", "data.folds=0")
    sets = (*plain, 'data.validation=["c2"]', *changes)
    return (
        str(folder / "r.toml"), "--data", str(data), *(a for one in sets for a in ("--set", one)),
    )  # fmt: skip


@pytest.mark.parametrize("fault", ["numbers", "grid", "body"])
def test_cases_kept_aside_are_checked_before_the_training(folder: Path, tmp_path: Path, fault: str):
    data = make_folder(tmp_path / "data", 3)
    labels = data / "labels" / "c2.nii.gz"
    image = data / "images" / "c2_0000.nii.gz"
    shape = body_hu().shape
    if fault == "numbers":
        write_scan(labels, np.full(shape, 77, np.uint8), spacing=(1.5, 1.5, 12.0))
    elif fault == "grid":
        write_scan(labels, np.ones((3, *shape[1:]), np.uint8), spacing=(1.5, 1.5, 12.0))
    else:
        write_scan(image, np.full(shape, -1000, np.int16), spacing=(1.5, 1.5, 12.0))
    run = tmp_path / "run"
    done = call(folder, "finetune", *_with(folder, data), "--output", str(run))
    assert "problem(s) in the data" in str(done.exception) and "c2" in done.output
    assert not (run / "metrics.jsonl").exists()


def test_an_export_keeps_to_what_the_run_trained_on(folder: Path, tmp_path: Path):
    data = make_folder(tmp_path / "data", 4)
    run = str(tmp_path / "run")
    options = _with(folder, data)
    done = call(folder, "finetune", *options, "--output", run)
    assert done.exit_code == 0, done.output
    other = ("--set", 'data.validation=["c1"]')
    refused = call(folder, "export", *options, *other, "--output", run)
    assert "trained on c1, which would be kept aside now" in str(refused.exception)
    # Where none is named, those kept aside don't become training cases.
    none = ("--set", "data.validation=[]", "--set", "export.operating_points=true")
    done = call(folder, "export", *options, *none, "--output", run)
    assert done.exit_code == 0, done.output
    assert "kept aside as in this run's training: c2" in done.output
    assert "operating points by 1 case(s) kept aside" in done.output
    # Data that came later were not trained on.
    fewer = json.loads((data / "cases.json").read_text())
    extra = make_folder(tmp_path / "more", 5)
    (extra / "images" / "c2_0000.nii.gz").touch()
    done = call(folder, "export", *_with(folder, extra), "--output", run)
    assert done.exit_code == 0, done.output
    record = load_weights(tmp_path / "run" / "weights.safetensors").record
    assert record["trained_on"].keys() == fewer.keys() - {"c2"}
    assert record["validation_dice"].keys() == {"c2"}


def test_an_export_with_fewer_cases_draws_no_folds_anew(folder: Path, tmp_path: Path):
    run, few = tmp_path / "run", make_folder(tmp_path / "few", 3)
    folds = "data.validation=[]", "data.folds=3"
    options = _with(folder, make_folder(tmp_path / "data", 6), *folds)
    assert call(folder, "finetune", *options, "--output", str(run)).exit_code == 0
    aside = set(json.loads((run / "run.json").read_text())["kept_aside"])
    done = call(folder, "export", *_with(folder, few, "data.validation=[]"), "--output", str(run))
    assert done.exit_code == 0, done.output
    record = load_weights(run / "weights.safetensors").record
    assert record["validation_dice"].keys() == aside & {"c0", "c1", "c2"}


def test_the_start_is_judged_and_a_finished_run_takes_no_other_cases(folder: Path, tmp_path: Path):
    data = make_folder(tmp_path / "data", 3)
    points = "export.offsets={liver=0.5}"
    options = (*_with(folder, data, points), "--output", str(tmp_path / "first"))
    assert call(folder, "finetune", *options).exit_code == 0
    start = tmp_path / "first" / "weights.safetensors"
    run = tmp_path / "run"
    plan = f'finetune.start="{start}"', "finetune.stages=[{grid=32, steps=8}]"
    begun = _with(folder, data, *plan)
    done = call(folder, "finetune", *begun, "--output", str(run))
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert records[0]["step"] == 0 and records[-1]["step"] == 8
    # As exported, its operating point included: what its own export had found.
    was = load_weights(start).record["validation_dice"]["c2"]["liver"]
    assert records[0]["dice"]["c2"]["liver"] == pytest.approx(was, abs=0.02)
    assert f"(before {records[0]['dice']['c2']['liver']:.3f})" in done.output

    again = call(folder, "finetune", *begun, "--output", str(run))
    assert again.exit_code == 0 and "all steps done before" in again.output
    more = make_folder(tmp_path / "more", 5)
    begun = _with(folder, more, *plan)
    before = (run / "run.json").read_bytes(), (run / "weights.safetensors").read_bytes()
    refused = call(folder, "finetune", *begun, "--output", str(run))
    assert "has done all its steps, and 2 case(s) added since" in str(refused.exception)
    other = call(
        folder, "finetune", *begun, "--set", 'data.validation=["c1"]', "--output", str(run)
    )
    assert "trained on c1, which would be kept aside now" in str(other.exception)
    assert before == ((run / "run.json").read_bytes(), (run / "weights.safetensors").read_bytes())


def test_what_a_run_has_learnt_from_is_not_forgotten(folder: Path, tmp_path: Path):
    data = make_folder(tmp_path / "data", 4)
    run = ("--output", str(tmp_path / "run"))
    stages = "finetune.stages=[{{grid=32, steps={}, block=16}}]"
    done = call(folder, "finetune", *_with(folder, data, stages.format(2)), *run)
    assert done.exit_code == 0, done.output
    assert "the last stage is in blocks and never freezes" in done.output
    # c1 is taken out, the run goes on; then it comes back, kept aside.
    entries = json.loads((data / "cases.json").read_text())
    for part, name in (("images", "c1_0000.nii.gz"), ("labels", "c1.nii.gz")):
        (data / part / name).rename(tmp_path / f"{part}_{name}")
    done = call(folder, "finetune", *_with(folder, data, stages.format(3)), *run)
    assert done.exit_code == 0, done.output
    record = load_weights(tmp_path / "run" / "weights.safetensors").record
    assert record["trained_on"].keys() == {"c0", "c1", "c3"} == entries.keys() - {"c2"}
    for part, name in (("images", "c1_0000.nii.gz"), ("labels", "c1.nii.gz")):
        (tmp_path / f"{part}_{name}").rename(data / part / name)
    aside = ("--set", 'data.validation=["c1", "c2"]')
    refused = call(folder, "finetune", *_with(folder, data, stages.format(4)), *aside, *run)
    assert "trained on c1, which would be kept aside now" in str(refused.exception)

    # Another run that starts from its weights: allowed, but said and noted.
    start = f'finetune.start="{tmp_path / "run" / "weights.safetensors"}"'
    other = ("--output", str(tmp_path / "other"))
    done = call(folder, "finetune", *_with(folder, data, stages.format(1), start), *aside, *other)
    assert done.exit_code == 0, done.output
    assert "weights.safetensors has learnt from c1, kept aside" in done.output
    record = load_weights(tmp_path / "other" / "weights.safetensors").record
    assert record["trained_on"].keys() == {"c0", "c3"}
    assert record["start_trained_on"].keys() == {"c0", "c1", "c3"}


def test_one_scan_under_two_names_is_noticed(folder: Path, tmp_path: Path):
    data = make_folder(tmp_path / "data", 3)
    (data / "images" / "c2_0000.nii.gz").write_bytes((data / "images/c0_0000.nii.gz").read_bytes())
    stages = "finetune.stages=[{grid=32, steps=1}]"
    done = call(folder, "finetune", *_with(folder, data, stages), "--output", str(tmp_path / "run"))
    assert "warning: c2, kept aside, is the same scan as c0, trained on" in done.output


def test_pretraining_never_sees_what_is_kept_aside(folder: Path, tmp_path: Path):
    run = tmp_path / "run"
    options = ("--set", 'data.unlabelled=["data/images"]', "--output", str(run))
    done = call(folder, "pretrain", str(folder / "r.toml"), *options)
    assert done.exit_code == 0, done.output
    seen = json.loads((run / "run.json").read_text())["pretraining_cases"]
    assert len(seen) == 3 and "scan" in seen  # two of three labelled cases

    # Nor copies of it, by another name or in another folder, nor what was bent from it.
    copies = tmp_path / "copies" / "images"
    copies.mkdir(parents=True)
    (aside,) = {"c0", "c1", "c2"} - seen.keys()
    scan = (folder / "data" / "images" / f"{aside}_0000.nii.gz").read_bytes()
    (copies / "another_0000.nii.gz").write_bytes(scan)
    options = ("--set", f'data.unlabelled=["{copies.parent}"]', "--output", str(tmp_path / "third"))
    done = call(folder, "pretrain", str(folder / "r.toml"), *options)
    assert done.exit_code == 0, done.output
    assert "1 scan(s) of data.unlabelled are left out: among" in done.output
    record = json.loads((tmp_path / "third" / "run.json").read_text())
    assert record["pretraining_cases"].keys() == seen.keys()

    alone = tmp_path / "alone"
    write_scan(alone / "images" / "scan_0000.nii.gz", body_hu((20, 24, 28)))
    options = ("--data", str(alone), "--output", str(tmp_path / "second"))
    done = call(folder, "pretrain", str(folder / "r.toml"), *options)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "second" / "pretraining" / "backbone.safetensors").is_file()


def test_a_start_beside_a_pretraining_is_refused_before_it(folder: Path, tmp_path: Path):
    options = ("--set", 'finetune.start="some.safetensors"', "--output", str(tmp_path / "run"))
    done = call(folder, "run", str(folder / "r.toml"), *options)
    assert "would stand in for the pre-training" in str(done.exception)
    assert not (tmp_path / "run" / "pretraining").exists()


def test_two_trainings_in_one_folder_are_refused(folder: Path, tmp_path: Path):
    with only_training_in(tmp_path / "run"):
        done = call(folder, "finetune", str(folder / "r.toml"), "--output", str(tmp_path / "run"))
    assert "another training works in this folder" in str(done.exception)
    with only_training_in(tmp_path / "run"):
        pass  # let go


def test_weights_that_cannot_be_written_are_one_line(folder: Path, tmp_path: Path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("flare_clef.training.export.save_weights", full)
    options = (*_with(folder, folder / "data", "data.validation=[]"), "--output", str(tmp_path))
    done = call(folder, "finetune", *options)
    assert isinstance(done.exception, UserError)
    assert "weights.safetensors: cannot be written (Error while" in str(done.exception)


def test_beside_a_gpu_networks_are_judged_in_fp32(tmp_path: Path):
    recipe = load_recipe(ROOT / "recipes" / "smoke.toml")
    for device, precision in (("cpu", "bf16"), ("cuda", "fp32")):
        run = Run(recipe, tmp_path, tmp_path, "bf16", torch.device(device), print)
        assert run.precision_on_cpu == precision


def test_what_is_missing_is_named(folder: Path):
    recipe = str(folder / "r.toml")
    done = call(folder, "finetune", recipe, "--output", str(folder / "new"))
    assert "run train pretrain first" in str(done.exception)
    done = call(
        folder, "pretrain", recipe, "--output", str(folder / "new"), "--set", "pretrain=false"
    )
    assert "no [pretrain] table" in str(done.exception)
    done = call(
        folder, "finetune", recipe, "--output", str(folder / "new"),
        "--set", "pretrain=false", "--set", "data.folds=0", "--set", 'data.validation=["c9"]',
    )  # fmt: skip
    assert "no case c9 with labels" in str(done.exception)
    names = ", ".join(
        f'"{path.name.split(".")[0]}"' for path in (folder / "data" / "labels").iterdir()
    )
    done = call(
        folder, "finetune", recipe, "--output", str(folder / "new"),
        "--set", "pretrain=false", "--set", "data.folds=0", "--set", f"data.validation=[{names}]",
    )  # fmt: skip
    assert "labelled case(s) aside; leave some to train on" in str(done.exception)
    done = call(
        folder, "finetune", recipe, "--output", str(folder / "new"),
        "--set", "pretrain=false", "--set", "data.folds=9", "--set", "data.fold=8",
    )  # fmt: skip
    assert "data.folds = 9: more than the 3 labelled case(s)" in str(done.exception)
    done = call(
        folder, "finetune", recipe, "--output", str(folder / "new"), "--set", "data.grid=16"
    )
    assert "volumes are kept at data.grid = 16; raise that first" in str(done.exception)


def test_the_papers_recipe_says_what_the_paper_says():
    recipe = load_recipe(ROOT / "recipes" / "paper.toml")
    plan, pretrain = recipe.finetune, recipe.pretrain
    assert pretrain is not None
    assert (pretrain.grid, pretrain.epochs, pretrain.rate, pretrain.batch) == (192, 50, 4e-4, 1)
    (stage,) = plan.stages
    assert (stage.grid, stage.epochs, stage.learning_rate) == (192, 50, (1e-3, 1e-3))
    assert stage.augmentation is None and stage.freeze_after == 1
    assert (plan.loss, plan.batch, plan.patience_epochs) == ("sigmoid", 1, 3)
    assert {plan.for_cases(40).learning_rate(step) for step in (0, 999, 1999)} == {1e-3}
    assert recipe.data.folds == 5
    names = [f"FLARE22_Tr_{k:04d}" for k in range(1, 51)]
    folds = [
        load_recipe(ROOT / "recipes" / "paper.toml", [f"data.fold={k}"]).data.kept_aside(names)
        for k in range(5)
    ]
    assert [len(fold) for fold in folds] == [10] * 5 and set().union(*folds) == set(names)

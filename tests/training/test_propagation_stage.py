"""``[propagate]`` of a recipe: who gets labels, and what training makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bodies import body_labels, write_training_set, write_volume
from small_runs import SMALL_TOML
from typer.testing import CliRunner

from flare_clef.cli import app
from flare_clef.organs import ORGAN_BY_INDEX
from flare_clef.training.datasets import read_dataset

ORGANS = [ORGAN_BY_INDEX[k].name for k in (1, 2, 4, 5, 6, 9, 11, 13)]
RECIPE = f"""
[data]
folders = ["cases"]
validation = ["aside"]
grid = 32
{SMALL_TOML}[propagate]
atlases = "atlases"
organ = "duodenum"
[[finetune.stages]]
grid = 32
steps = 4
learning_rate = [1e-2, 1e-3]
"""


def train(folder: Path, *options: str):
    command = ["train", "finetune", str(folder / "r.toml"), "--output", str(folder / "run")]
    return CliRunner().invoke(app, [*command, "--precision", "fp32", "--threads", "1", *options])


def test_cases_to_train_on_get_the_organ_and_those_aside_do_not(tmp_path: Path):
    for seed in range(1, 5):
        write_volume(tmp_path / "atlases" / f"atlas_{seed}.nii.gz", body_labels(seed))
    bodies = {"lacking": body_labels(0), "having": body_labels(8), "aside": body_labels(9)}
    for name in ("lacking", "aside"):
        bodies[name][bodies[name] == 12] = 0
    organs = {name: ORGANS for name in bodies} | {"having": [*ORGANS, "duodenum"]}
    write_training_set(tmp_path / "cases", bodies, organs)
    (tmp_path / "r.toml").write_text(RECIPE)

    done = train(tmp_path)
    assert done.exit_code == 0, done.output
    assert "propagating the duodenum to 1 case(s)" in done.output
    assert [
        case.name for case in read_dataset(tmp_path / "run" / "propagated" / "duodenum").cases
    ] == ["lacking"]
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    dice = [json.loads(line)["dice"] for line in metrics]
    # Both cases to train on have a duodenum now, so each of the steps has its Dice.
    assert len(dice) == 4 and all(row[11] is not None for row in dice)
    validation = (tmp_path / "run" / "validation.jsonl").read_text()
    assert "liver" in validation and "duodenum" not in validation
    before = (
        tmp_path / "run" / "propagated" / "duodenum" / "labels" / "lacking.nii.gz"
    ).read_bytes()
    assert train(tmp_path).exit_code == 0
    after = (
        tmp_path / "run" / "propagated" / "duodenum" / "labels" / "lacking.nii.gz"
    ).read_bytes()
    assert before == after


def test_maps_of_cases_kept_aside_are_no_atlases(tmp_path: Path):
    """Without the organ each would be named once it is read; of these the copy alone is."""
    for seed in range(1, 4):
        write_volume(tmp_path / "atlases" / f"atlas_{seed}.nii.gz", body_labels(seed))
    bodies = {"lacking": body_labels(0), "aside": body_labels(9)}
    for labels in bodies.values():
        labels[labels == 12] = 0
    write_training_set(tmp_path / "cases", bodies, dict.fromkeys(bodies, ORGANS))
    write_volume(tmp_path / "atlases" / "aside.nii.gz", bodies["aside"])
    write_volume(tmp_path / "atlases" / "copy.nii.gz", bodies["aside"])
    own = tmp_path / "cases" / "labels" / "aside.nii.gz"
    (tmp_path / "atlases" / "linked.nii.gz").symlink_to(own)
    (tmp_path / "r.toml").write_text(RECIPE)

    done = train(tmp_path)
    assert done.exit_code == 0, done.output
    assert "2 label map(s) of cases kept aside are no atlases" in done.output
    told = json.loads((tmp_path / "run" / "propagated" / "duodenum" / "summary.json").read_text())
    copy = tmp_path / "atlases" / "copy.nii.gz"
    assert told["problems"] == [f"{copy}: holds no duodenum; atlas left out"]


def test_cases_that_cannot_be_placed_stay_as_they_are(tmp_path: Path):
    """Only the liver is labelled: no atlas can be laid over that."""
    for seed in range(1, 4):
        write_volume(tmp_path / "atlases" / f"atlas_{seed}.nii.gz", body_labels(seed))
    bodies = {name: np.uint8(body_labels(seed) == 1) for seed, name in enumerate(("a", "aside"))}
    write_training_set(tmp_path / "cases", bodies, dict.fromkeys(bodies, ["liver"]))
    (tmp_path / "r.toml").write_text(RECIPE)
    done = train(tmp_path)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "warning: propagate: no case could be given a duodenum; all stay as they" in done.output
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["case"] for line in metrics] == ["a"] * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [('propagate.organ="colon"', "propagate.organ = 'colon': one of liver"),
     ('propagate.atlases=""', "propagate.atlases: name a folder")],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path: Path, change: str, words: str):
    (tmp_path / "r.toml").write_text(RECIPE)
    refused = train(tmp_path, "--set", change)
    assert refused.exit_code != 0 and words in str(refused.exception)

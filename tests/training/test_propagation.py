from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from bodies import body_labels, write_training_set, write_volume
from typer.testing import CliRunner

from flare_clef.cli import app
from flare_clef.organs import ORGAN_BY_INDEX
from flare_clef.training.cases import find_cases, prepare_case
from flare_clef.training.doubt import CLASSES, UNDECIDED, WEIGHTS

ORGANS = [ORGAN_BY_INDEX[k].name for k in (1, 2, 4, 5, 6, 9, 11, 13)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Four atlases and two useless ones; a case without the organ, one with it, an empty one."""
    folder = tmp_path_factory.mktemp("propagation")
    for seed in range(1, 5):
        write_volume(folder / "atlases" / f"atlas_{seed}.nii.gz", body_labels(seed), seed % 2 == 0)
    write_volume(folder / "atlases" / "odd.nii.gz", np.full((9, 9, 9), 77, np.uint8))
    without = np.where(body_labels(9) == 12, 0, body_labels(9))
    write_volume(folder / "atlases" / "without.nii.gz", without)
    truth = body_labels(0)
    write_training_set(
        folder / "cases",
        {
            "lacking": np.where(truth == 12, 0, truth).astype(np.uint8),
            "having": body_labels(8),
            "empty": np.zeros_like(truth),
        },
        {"lacking": ORGANS, "having": [*ORGANS, "duodenum"], "empty": ORGANS},
    )
    command = [
        *("train", "propagate", "--organ", "duodenum", "--workers", "2"),
        *("--atlases", str(folder / "atlases"), "--cases", str(folder / "cases")),
        *("--output", str(folder / "out")),
    ]
    return folder, command, CliRunner().invoke(app, command), truth


def _read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_the_missing_organ_is_found(run) -> None:  # type: ignore[no-untyped-def]
    folder, _, _, truth = run
    chance = _read(folder / "out" / "probabilities" / "lacking.nii.gz")
    guess, true = chance >= 128, truth == 12
    assert 2 * (guess & true).sum() / (guess.sum() + true.sum()) >= 0.8
    labels = _read(folder / "out" / "labels" / "lacking.nii.gz")
    assert (true[labels == 12]).mean() > 0.8
    assert (true & ((labels == 12) | (labels == UNDECIDED))).sum() > 0.9 * true.sum()
    others = (truth > 0) & ~true
    np.testing.assert_array_equal(labels[others], truth[others])


def test_own_labels_stay(run) -> None:  # type: ignore[no-untyped-def]
    folder, *_ = run
    np.testing.assert_array_equal(
        _read(folder / "out" / "labels" / "having.nii.gz"), body_labels(8)
    )
    assert not (folder / "out" / "probabilities" / "having.nii.gz").exists()


def test_what_is_bad_is_named_and_the_rest_is_done(run) -> None:  # type: ignore[no-untyped-def]
    folder, _, result, _ = run
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert any("odd.nii.gz: holds values from 77 to 77" in line for line in lines)
    assert any("without.nii.gz: holds no duodenum; atlas left out" in line for line in lines)
    assert any("empty.nii.gz: no voxel is labelled" in line for line in lines)


def test_the_output_is_a_training_set(run) -> None:  # type: ignore[no-untyped-def]
    folder, *_ = run
    cases = {case.name: case for case in find_cases(folder / "out")}
    assert set(cases) == {"lacking", "having"}
    assert cases["lacking"].organs == (*ORGANS, "duodenum")
    assert cases["lacking"].propagated == "duodenum" and cases["having"].chances is None
    prepared = prepare_case(cases["lacking"], folder / "prepared", 48).labels
    organ = CLASSES[prepared] == 12
    # Certain from 0.55 on: no weight below 2 * 0.55 - 1, less half a step of the packing.
    assert organ.any() and WEIGHTS[prepared][organ].min() >= 0.1 - 1 / 30
    assert len(np.unique(WEIGHTS[prepared][organ])) > 1
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["cases"]["lacking"]["labels"] == "propagated"
    assert summary["cases"]["having"] == {"labels": "own"}
    assert len(summary["calibration"]["expected_dsc"]) == 4


def test_a_second_run_computes_nothing_again(run) -> None:  # type: ignore[no-untyped-def]
    folder, command, *_ = run
    store = folder / "out" / "store"
    before = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    next(store.glob("vote-*")).unlink()
    (folder / "out" / "labels" / "lacking.nii.gz").unlink()
    CliRunner().invoke(app, command)
    after = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    assert set(after) == set(before)
    assert sum(after[name] != before[name] for name in before) == 1
    assert (folder / "out" / "labels" / "lacking.nii.gz").is_file()


@pytest.mark.parametrize(
    ("option", "value", "seen"),
    [
        ("--organ", "appendix", "not an organ"),
        ("--atlases", "nowhere", "no such folder"),
        ("--output", "CASES", "holds the cases themselves"),
    ],
)
def test_wrong_options_get_one_line(run, option: str, value: str, seen: str) -> None:  # type: ignore[no-untyped-def]
    folder, command, *_ = run
    value = str(folder / "cases") if value == "CASES" else value
    result = CliRunner().invoke(app, [*command, option, value])
    assert seen in str(result.exception) and "\n" not in str(result.exception)

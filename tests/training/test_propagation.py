from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from bodies import body_labels, write_training_set, write_volume
from typer.testing import CliRunner

from flare_clef.cli import app
from flare_clef.errors import UserError
from flare_clef.organs import ORGAN_BY_INDEX
from flare_clef.training import neighbourhood, workshop
from flare_clef.training.atlas_votes import Surroundings
from flare_clef.training.cases import find_cases, prepare_case
from flare_clef.training.doubt import CLASSES, UNDECIDED, WEIGHTS
from flare_clef.training.propagation import find_atlases

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


def test_with_enough_atlases_networks_learn_from_them(
    run,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same four atlases, as if they were enough, and shorter learning, all in one process."""
    folder, _, _, truth = run
    in_thread = lambda workers, context, begin: ThreadPoolExecutor(1)  # noqa: E731
    monkeypatch.setattr(workshop, "ProcessPoolExecutor", in_thread)
    monkeypatch.setattr(workshop, "LEAST_ATLASES", 4)
    monkeypatch.setattr(workshop, "PARTS", 2)
    monkeypatch.setattr(neighbourhood, "STEPS", 60)
    threads = torch.get_num_threads()
    asked = []
    chance_of = neighbourhood.Learnt.chance

    def chance(learnt: neighbourhood.Learnt, name: str, around: Surroundings) -> np.ndarray:
        asked.append((name, [name in names for names, _ in learnt.networks]))
        return chance_of(learnt, name, around)

    monkeypatch.setattr(neighbourhood.Learnt, "chance", chance)
    for part in ("atlases", "cases"):
        (tmp_path / part).symlink_to(folder / part)
    _propagate(tmp_path)
    torch.set_num_threads(threads)
    # Each atlas that judges is seen by one of the two networks, the case by none.
    assert sorted(asked) == [
        *((f"atlas_{number}", [number % 2 == 0, number % 2 == 1]) for number in range(1, 5)),
        ("lacking", [False, False]),
    ]
    assert len(list((tmp_path / "out" / "store").glob("network-*"))) == 2
    guess = _read(tmp_path / "out" / "probabilities" / "lacking.nii.gz") >= 128
    true = truth == 12
    assert 2 * (guess & true).sum() / (guess.sum() + true.sum()) >= 0.8


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
    assert any("odd.nii.gz: holds the value 77;" in line for line in lines)
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


def _propagate(folder: Path, *options: str):  # type: ignore[no-untyped-def]
    command = ["train", "propagate", "--organ", "duodenum", "--workers", "1", "--quiet"]
    places = ["--atlases", str(folder / "atlases"), "--cases", str(folder / "cases")]
    return CliRunner().invoke(app, [*command, *places, "-o", str(folder / "out"), *options])


def test_atlases_that_fit_nothing_and_numbers_without_a_meaning(tmp_path: Path) -> None:
    for seed in range(1, 5):
        array = body_labels(seed).astype(np.float32)  # whole numbers, as some tools write them
        write_volume(tmp_path / "atlases" / f"atlas_{seed}.nii.gz", array)
    few = np.where(np.isin(body_labels(5), (1, 12)), body_labels(5), 0)
    write_volume(tmp_path / "atlases" / "few.nii.gz", few)
    truth = np.where(body_labels(0) == 12, 0, body_labels(0)).astype(np.uint8)
    names = {str(k): ORGAN_BY_INDEX[k].name for k in (1, 2, 4, 5, 6, 9, 11, 13)}
    raw = tmp_path / "cases"
    for name, labels in (("good", truth), ("bad", np.where(truth == 4, 77, truth))):
        write_volume(raw / "imagesTr" / f"{name}_0000.nii.gz", np.full_like(truth, 40, np.int16))
        write_volume(raw / "labelsTr" / f"{name}.nii.gz", labels)
    described = {"labels": {"background": 0, **{name: int(k) for k, name in names.items()}}}
    (raw / "dataset.json").write_text(json.dumps(described | {"channel_names": {"0": "CT"}}))

    result = _propagate(tmp_path)
    lines = result.stderr.splitlines()
    assert result.exit_code == 1 and len(lines) == 3, lines
    assert any("bad.nii.gz: holds the label 77" in line for line in lines)
    assert sum("few.nii.gz" in line for line in lines) == 2
    assert any("shares fewer than 4 organs with every case; atlas left out" in x for x in lines)
    assert [case.name for case in find_cases(tmp_path / "out")] == ["good"]

    # A case that is gone takes its files with it: what is left is a training set.
    for path in raw.glob("*/good*"):
        path.rename(path.with_name(path.name.replace("good", "other")))
    assert _propagate(tmp_path).exit_code == 1
    assert [case.name for case in find_cases(tmp_path / "out")] == ["other"]


def test_a_folder_of_others_is_not_written_to(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder, command, *_ = run
    write_training_set(tmp_path / "own", {"a": body_labels(1)}, {"a": ORGANS})
    before = sorted(path.name for path in tmp_path.rglob("*"))
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "own")])
    assert "own: holds images/ or labels/ of others" in str(result.exception)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_atlases_that_have_too_little_in_common(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder, *_ = run
    for seed in range(1, 5):
        labels = body_labels(seed)
        few = np.where(np.isin(labels, (1, 2, 12)), labels, 0)
        write_volume(tmp_path / "atlases" / f"{seed}.nii.gz", few)
    (tmp_path / "cases").symlink_to(folder / "cases")
    result = _propagate(tmp_path)
    assert isinstance(result.exception, UserError), result.exception
    assert "no label map can be laid over another" in str(result.exception)


def test_two_maps_of_one_name_are_refused(tmp_path: Path):
    for suffix in (".nii.gz", ".mha"):
        (tmp_path / f"a{suffix}").touch()
    with pytest.raises(UserError, match=r"a\.mha: .* has 2 label maps a; keep one"):
        find_atlases(tmp_path)

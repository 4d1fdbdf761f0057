"""The store: right content, resumed, keyed by content, many cases at the cost of few."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import body_hu, write_scan
from small_cases import LEFT, MIDDLE, RIGHT, SHAPE, label_map, liver, write_pair

from flare_clef.errors import UserError
from flare_clef.images import read_image
from flare_clef.preparation import prepare
from flare_clef.training import preparing
from flare_clef.training.cases import Case, find_cases, place_labels, prepare_case
from flare_clef.training.datasets import read_dataset
from flare_clef.training.doubt import CLASSES, UNDECIDED
from flare_clef.training.preparing import prepare_all


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    labels = liver()
    labels[5, 10, 14] = UNDECIDED
    write_pair(tmp_path / "data", "a", labels)
    write_pair(tmp_path / "data", "b", None)
    return tmp_path / "data"


def run(folder: Path, store: Path, grid: int = 16, **options) -> preparing.Preparation:
    return prepare_all(read_dataset(folder).cases, store, grid, **options)


def test_an_entry_is_what_prepare_gives(folder: Path, tmp_path: Path):
    labelled, unlabelled = run(folder, tmp_path / "store", grid=24).prepared
    scan = read_image(folder / "images" / "a_0000.nii.gz")
    volume, placement = prepare(scan.array, scan.direction, 24, spacing_mm=scan.spacing_mm)
    assert np.array_equal(labelled.image, volume.numpy().astype(np.float16))
    truth = read_image(folder / "labels" / "a.nii.gz").array
    assert np.array_equal(labelled.labels, place_labels(truth, placement))
    assert (labelled.labels == UNDECIDED).sum() > 0
    assert labelled.spacing_mm == placement.grid_spacing_mm(scan.spacing_mm)
    assert isinstance(labelled.image, np.memmap) and isinstance(labelled.labels, np.memmap)
    assert unlabelled.labels.shape == (24, 24, 24) and (unlabelled.labels == UNDECIDED).all()
    assert not unlabelled.case.labelled.any()


def test_a_propagated_organs_certainty_is_in_the_entry(folder: Path, tmp_path: Path):
    labels = read_image(folder / "labels" / "a.nii.gz").array
    chance = np.where(labels == 1, 204, 0).astype(np.uint8)
    (case,) = (case for case in read_dataset(folder).cases if case.labels is not None)
    write_scan(folder / "probabilities" / "a.nii.gz", chance)
    entries = json.loads((folder / "cases.json").read_text())
    plain = run(folder, tmp_path / "store").prepared[0]
    entries["a"]["propagated"] = ["liver"]
    (folder / "cases.json").write_text(json.dumps(entries))
    doubted = run(folder, tmp_path / "store").prepared[0]
    assert doubted.folder != plain.folder
    assert np.array_equal(CLASSES[doubted.labels], CLASSES[plain.labels])
    assert set(np.unique(plain.labels)) <= {0, 1, UNDECIDED}
    # 204 / 255 is a probability of 0.8: certainty 0.6, doubt 6 of 15.
    assert set(np.unique(doubted.labels)) <= {0, 1 + 16 * 6, UNDECIDED}
    assert (doubted.labels == 1 + 16 * 6).any()

    write_scan(folder / "probabilities" / "a.nii.gz", chance[1:])
    (problem,) = run(folder, tmp_path / "store").problems
    assert "probabilities/a.nii.gz" in problem and "run train propagate again" in problem
    assert case.chances is None


def test_nnunets_numbers_become_ours(tmp_path: Path):
    theirs = np.where(liver() == 1, 4, 0).astype(np.uint8)
    theirs[2:10, 12:15, MIDDLE], theirs[:2] = 2, 9
    write_scan(tmp_path / "imagesTr" / "n_0000.nii.gz", body_hu(SHAPE))
    write_scan(tmp_path / "labelsTr" / "n.nii.gz", theirs)
    (tmp_path / "dataset.json").write_text(
        '{"labels": {"background": 0, "liver": 4, "Aorta": 2, "ignore": 9}, "channel_names": '
        '{"0": "CT"}}'
    )
    (case,) = run(tmp_path, tmp_path / "store", grid=24).prepared
    assert np.unique(case.labels).tolist() == [0, 1, 5, UNDECIDED]
    assert case.case.labelled.nonzero().flatten().tolist() == [0, 4]


def test_all_bad_cases_are_named_and_the_good_ones_prepared(folder: Path, tmp_path: Path):
    write_pair(folder, "far", np.full((4, 4, 4), 1, np.uint8))
    write_pair(folder, "swapped", label_map(right_kidney=LEFT, left_kidney=RIGHT, aorta=LEFT),
               ("right_kidney", "left_kidney"))  # fmt: skip
    write_scan(folder / "images" / "air_0000.nii.gz", np.full(SHAPE, -1000, np.int16))
    write_pair(folder, "odd", np.where(liver() == 1, 77, 0).astype(np.uint8))
    (folder / "images" / "torn_0000.nii.gz").write_bytes(b"\x1f\x8b torn")
    result = run(folder, tmp_path / "store")
    assert [p.case.name for p in result.prepared] == ["a", "b"]
    text = "\n".join(result.problems)
    assert len(result.problems) == 6 == text.count("\n") + 1, text
    for words in ("far.nii.gz: (4, 4, 4) voxels", "odd.nii.gz: holds the label 77", "torn_0000",
                  "air_0000.nii.gz: no voxel above -500", "swapped.nii.gz: its right_kidney",
                  "swapped.nii.gz: voxels of organs that the case doesn't claim"):  # fmt: skip
        assert words in text
    left = {path.name.split("-")[0] for path in (tmp_path / "store").iterdir()}
    assert left == {"a", "b", "checksums.json"}


def test_what_is_there_is_not_made_again(folder: Path, tmp_path: Path, monkeypatch):
    made: list[str] = []
    make = preparing._make
    monkeypatch.setattr(
        preparing, "_make", lambda case, *rest: (made.append(case.name), make(case, *rest))
    )
    first = run(folder, tmp_path / "store")
    assert sorted(made) == ["a", "b"]
    second = run(folder, tmp_path / "store")
    assert sorted(made) == ["a", "b"] and second.prepared == first.prepared
    # Another content, another entry; the same content under another time, the same.
    write_scan(folder / "labels" / "a.nii.gz", label_map(liver=slice(4, 10)))
    os.utime(folder / "images" / "b_0000.nii.gz", (1, 1))
    third = run(folder, tmp_path / "store")
    assert sorted(made) == ["a", "a", "b"]
    assert third.prepared[0].folder != first.prepared[0].folder
    assert third.prepared[1] == first.prepared[1]
    run(folder, tmp_path / "store", grid=20)
    assert sorted(made) == ["a", "a", "a", "b", "b"]


def test_warnings_are_told_again(folder: Path, tmp_path: Path):
    write_pair(folder, "c", liver(), ("liver", "gallbladder"))
    one, two = (run(folder, tmp_path / "store").warnings for _ in range(2))
    assert one == two and "c.nii.gz: no voxel of gallbladder" in one[-1]


def test_damaged_and_half_made_entries_are_made_anew(folder: Path, tmp_path: Path):
    store = tmp_path / "store"
    (entry, _) = run(folder, store).prepared
    whole = entry.image.copy()
    path = entry.folder / "image.npy"
    path.write_bytes(path.read_bytes()[:-100])
    assert np.array_equal(run(folder, store).prepared[0].image, whole)
    # What a killed process leaves: a hidden folder with its number in the name.
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mark = preparing._mark().split(".")
    mark[-3] = str(ended.pid)
    half, own = store / f".a-0.{'.'.join(mark)}", store / f".a-0.{preparing._mark()}"
    half.mkdir()
    own.mkdir()
    run(folder, store)
    assert not half.exists() and own.exists()


def test_a_killed_preparation_goes_on(folder: Path, tmp_path: Path, monkeypatch):
    class Killed(BaseException):
        pass

    def break_off(case, *rest):
        if case.name == "b":
            raise Killed
        make(case, *rest)

    make = preparing._make
    monkeypatch.setattr(preparing, "_make", break_off)
    with pytest.raises(Killed):
        run(folder, tmp_path / "store", workers=1)
    monkeypatch.setattr(preparing, "_make", make)
    kept = next((tmp_path / "store").glob("a-*")) / "image.npy"
    before = kept.stat().st_mtime_ns
    assert len(run(folder, tmp_path / "store").prepared) == 2
    assert kept.stat().st_mtime_ns == before


def test_a_full_disk_is_one_line_and_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preparing.np, "save", full)
    with pytest.raises(UserError, match="cannot be written .No space left"):
        prepare_case(find_cases(folder)[0], tmp_path / "store", 16)
    assert {p.name for p in (tmp_path / "store").iterdir()} == {"checksums.json"}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_many_cases_hold_no_memory_and_no_files(folder: Path, tmp_path: Path):
    """200 prepared cases in hand, each read in turn: one volume is mapped at a time."""
    store = tmp_path / "store"
    (case,) = find_cases(folder)
    cases = [Case(f"c{k}", case.image, case.labels, case.organs) for k in range(200)]
    prepared = prepare_all(cases, store, 16).prepared
    assert len(prepared) == 200

    def mapped() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count(str(store))

    files = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files + 20, hard))
    try:
        total = sum(float(p.image[8, 8, 8]) + int(p.labels[8, 8, 8]) for p in prepared)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.isfinite(total) and mapped() == 0
    held = prepared[0].image
    assert mapped() == 1 and held.shape == (16, 16, 16)


def test_two_threads_at_once_do_not_damage_the_heap(folder: Path, tmp_path: Path):
    """ITK's reader of headers did: on an idle machine five of six such processes crashed."""
    code = (
        "from pathlib import Path\n"
        "from flare_clef.training.cases import Case, find_cases\n"
        "from flare_clef.training.preparing import prepare_all\n"
        f"(case,) = find_cases(Path({str(folder)!r}))\n"
        "for number in range(4):\n"
        "    cases = [Case(f'c{k}', case.image, case.labels, case.organs) for k in range(200)]\n"
        f"    store = Path({str(tmp_path)!r}) / f's{{number}}'\n"
        "    assert len(prepare_all(cases, store, 16, workers=2).prepared) == 200\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_train_prepare_by_the_command(folder: Path, tmp_path: Path):
    from typer.testing import CliRunner

    from flare_clef.cli import app

    def command(*words: object):
        return CliRunner().invoke(app, ["train", "prepare", *map(str, words)])

    run_folder = tmp_path / "run"
    done = command(folder, "--output", run_folder, "--grid", 16)
    assert done.exit_code == 0, done.output
    assert "2 case(s) prepared at 16^3" in done.output and "1 with labels, 1 without" in done.output
    assert len(list((run_folder / "prepared").glob("[ab]-*/record.json"))) == 2
    write_pair(folder, "bad", np.zeros(SHAPE, np.uint8))
    write_pair(folder, "worse", np.zeros((2, 2, 2), np.uint8))
    write_scan(folder / "labels" / "lonely.nii.gz", liver())
    done = command(folder, "--output", run_folder, "--grid", 16)
    assert done.exit_code == 1
    for words in ("bad.nii.gz: no voxel of any organ", "worse.nii.gz: (2, 2, 2) voxels",
                  "lonely.nii.gz: a label map without an image", "3 problem(s)"):  # fmt: skip
        assert words in done.output


def test_a_training_names_every_fault_of_its_data(folder: Path, tmp_path: Path):
    import torch

    from flare_clef.training.recipe import Recipe
    from flare_clef.training.run import Run

    said: list[str] = []

    def run_of() -> Run:
        place = torch.device("cpu")
        return Run(Recipe(), tmp_path, tmp_path / "run", "fp32", place, said.append, [folder])

    assert [case.name for case in run_of().labelled()] == ["a"] and said == []
    for name in ("lonely", "alone"):
        write_scan(folder / "labels" / f"{name}.nii.gz", liver())
    with pytest.raises(UserError, match=r"2 problem\(s\) in the data, named above"):
        run_of().labelled()
    assert ["alone.nii.gz" in said[0], "lonely.nii.gz" in said[1], len(said)] == [True, True, 2]


DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.realdata
@pytest.mark.skipif(not (DATA / "slabs").is_dir(), reason=f"no CT scans at {DATA}")
def test_real_slabs_pass_every_check(tmp_path: Path):
    result = prepare_all(read_dataset(DATA / "slabs").cases, tmp_path, 64)
    assert len(result.prepared) == 2 and result.problems == []
    # 55 mm at the height of the kidneys: no esophagus in them.
    assert all("esophagus" in warning for warning in result.warnings)
    for case in result.prepared:
        assert {2, 13} <= set(np.unique(case.labels).tolist())


def test_changed_voxels_beside_a_header_are_noticed(tmp_path: Path):
    labels = write_scan(tmp_path / "labels.mhd", liver())
    image = write_scan(tmp_path / "scan.mhd", body_hu(SHAPE))
    case = Case("a", image, labels, ("liver",))
    first = prepare_case(case, tmp_path / "store", 16)
    assert prepare_case(case, tmp_path / "store", 16).folder == first.folder
    write_scan(labels, label_map(liver=MIDDLE))  # the same header, other voxels
    second = prepare_case(case, tmp_path / "store", 16)
    assert second.folder != first.folder
    assert not np.array_equal(second.labels, first.labels)

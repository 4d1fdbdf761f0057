"""The command line as a user or a harness runs it: real processes, real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import TINY_GRID, body_hu, lively_network, write_scan

from flare_clef.weights import save_weights

ROOT = Path(__file__).parents[1]


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "flare_clef", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, **options)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    write_scan(tmp_path / "in" / "a_0000.nii.gz")
    write_scan(tmp_path / "in" / "b with space.mha", body_hu(seed=1))
    return tmp_path / "in"


def test_batch_with_bad_files_among_good_ones(scans: Path, tmp_path: Path, tiny_weights: Path):
    (scans / "bad.nii.gz").write_bytes(b"text")
    (scans / "empty.nii.gz").write_bytes(b"")
    done = run("predict", scans, tmp_path / "out", "--weights", tiny_weights, "--json")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "4 case(s): 2 done, 2 failed" in done.stderr
    rows = {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert {case: row["status"] for case, row in rows.items()} == {
        "a": "done", "b with space": "done", "bad": "failed", "empty": "failed",
    }  # fmt: skip
    assert "empty (0 bytes)" in rows["empty"]["error"]
    assert set(rows["a"]["seconds"]) == {"read", "prepare", "network", "restore", "write"}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.nii.gz", "b with space.mha"]
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "a.nii.gz")))
    voxel_ml = 1.5 * 1.5 * 3.0 / 1000
    assert rows["a"]["volume_ml"]["liver"] == pytest.approx(
        (labels == 1).sum() * voxel_ml, abs=1e-3
    )


def test_scans_in_a_sub_folder_are_named(scans: Path, tmp_path: Path, tiny_weights: Path):
    write_scan(scans / "second visit" / "c_0000.nii.gz")
    done = run("predict", scans, tmp_path / "out", "--weights", tiny_weights)
    assert done.returncode == 0 and "2 case(s): 2 done" in done.stderr
    assert "note: 1 sub-folder(s)" in done.stderr and "second visit" in done.stderr


def test_skip_existing_and_quiet(scans: Path, tmp_path: Path, tiny_weights: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.nii.gz").write_text("kept")
    options = ("--weights", tiny_weights, "--skip-existing", "--quiet")
    done = run("predict", scans, tmp_path / "out", *options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out" / "a.nii.gz").read_text() == "kept"
    assert (tmp_path / "out" / "b with space.mha").exists()


def test_shards_cover_everything_once(scans: Path, tmp_path: Path, tiny_weights: Path):
    for part in range(2):
        done = run(
            "predict", scans, tmp_path / f"out{part}", "--weights", tiny_weights,
            "--shard", f"{part}/2",
        )  # fmt: skip
        assert done.returncode == 0
    names = [[p.name for p in (tmp_path / f"out{k}").iterdir()] for k in range(2)]
    one = scans / "a_0000.nii.gz"
    nothing = run(
        "predict", one, tmp_path / "l.nii.gz", "--weights", tiny_weights, "--shard", "1/2"
    )
    assert (nothing.returncode, (tmp_path / "l.nii.gz").exists()) == (0, False)
    assert names == [["a.nii.gz"], ["b with space.mha"]]


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (("predict", "none", "out"), "no such file or folder", 1),
        (("predict", "in", "out", "--memory-limit", "lots"), "expected a size such as 2G", 2),
        (("predict", "in", "out", "--organs", "heart"), "organs: heart; known are", 2),
        (("predict", "in", "out", "--device", "cuda:99"), "--device cuda:99", 1),
        (("predict", "in", "out", "--device", "gpu"), "expected auto, cpu, cuda or cuda:N", 2),
        (("predict", "in", "out", "--shard", "9/4"), "expected K/N", 2),
        (("predict", "", "out"), "an argument is empty", 2),
        (("predict", "in", "out", "--organs="), "an argument is empty (--organs=)", 2),
        (("profile", "printf", ""), "put -- before the command", 2),
        (("predict", "in/a_0000.nii.gz", "l.nii", "--format", "nrrd"), "rename the output", 2),
        (("predict", "in", "link"), "link: a link to nothing", 1),
        (("predict", "in", "out", "--profile", "in"), "--profile takes the name of a file", 1),
        (("predict", "in", "in/b with space.mha/out"), "cannot be written (Not a directory)", 1),
        (("predict", "in", "out", "--weights", "none.safetensors"), "no such weights file", 1),
        (("predict", "in", "in"), "the labels would lie among the scans", 1),
        (("predict", "in"), "Missing argument", 2),
        (("segment",), "No such command", 2),
    ],
)
def test_mistakes_get_one_line(scans: Path, arguments, words, code):
    (scans.parent / "link").symlink_to("nowhere")
    done = run(*arguments, cwd=scans.parent)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(p.name for p in scans.parent.iterdir()) == ["in", "link"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_signals_end_it_at_once_and_leave_nothing_half(
    tmp_path: Path, tiny_weights: Path, number: int, code: int
):
    for i in range(300):
        write_scan(tmp_path / "in" / f"{i:03}.nii.gz")
    command = [sys.executable, "-m", "flare_clef", "predict", str(tmp_path / "in")]
    command += [str(tmp_path / "out"), "--weights", str(tiny_weights)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as process:
        while not list((tmp_path / "out").glob("0*.nii.gz")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=10)
    assert process.returncode == code
    assert "finished cases are kept" in stderr
    files = list((tmp_path / "out").iterdir())
    assert 0 < len(files) < 300
    for path in files:
        assert sitk.ReadImage(str(path)).GetSize() == (44, 40, 20)


def test_readers_of_its_output_may_go_away(scans: Path, tmp_path: Path, tiny_weights: Path):
    """As in ``… --json | head -1``, and where stdout is a full disk."""
    command = [sys.executable, "-m", "flare_clef", "predict", str(scans), str(tmp_path / "out")]
    command += ["--weights", str(tiny_weights), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # type: ignore[union-attr]
        assert process.wait(60) == 1
        assert b"Traceback" not in process.stderr.read()  # type: ignore[union-attr]
    for arguments in (
        command[3:],
        ["info", str(tiny_weights)],
        ["info", str(scans / "a_0000.nii.gz")],
    ):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*command[:3], *arguments],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
            )
        assert done.returncode == 1
        assert "No space left on device" in done.stderr and "Traceback" not in done.stderr


def test_a_terminal_without_a_sign_for_it_shows_another(tmp_path: Path):
    """Of a German Windows or an old server: it has no dash, which once ended an evaluation."""
    labels = np.zeros((8, 9, 10), np.uint8)
    labels[2:6, 2:6, 2:6] = 1
    for folder in ("ours", "theirs"):
        write_scan(tmp_path / folder / "a.nii.gz", labels)
    latin = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = run("evaluate", tmp_path / "ours", tmp_path / "theirs", env=latin)
    assert done.returncode == 0, done.stderr
    assert "Liver" in done.stdout


def test_too_little_memory_is_one_line():
    script = """
import flare_clef.cli as cli
def app(): raise MemoryError
cli.app = app
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "flare-clef: out of memory; free some, or bring less at a time\n"


def test_an_unknown_organ_is_refused_when_all_is_done_already(scans: Path, tmp_path: Path):
    for name in ("a.nii.gz", "b with space.mha"):
        write_scan(tmp_path / "out" / name)
    done = run("predict", scans, tmp_path / "out", "--skip-existing", "--organs", "livr")
    assert done.returncode == 2 and "organs: livr; known are" in done.stderr


def test_closed_streams_do_not_matter(scans: Path, tmp_path: Path, tiny_weights: Path):
    for number, closed in enumerate(("2>&-", ">&- 2>&-", "<&- >&-")):
        out = tmp_path / f"out{number}"
        line = f'exec "$0" -m flare_clef predict "$1" "$2" --weights "$3" --json {closed}'
        done = subprocess.run(
            ["sh", "-c", line, sys.executable, scans, out, tiny_weights],
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0
        assert sorted(p.name for p in out.iterdir()) == ["a.nii.gz", "b with space.mha"]


def test_labels_of_another_scan_fail_where_they_would_be_skipped(
    scans: Path, tmp_path: Path, tiny_weights: Path
):
    options = (scans, tmp_path / "out", "--weights", tiny_weights, "--skip-existing")
    assert run("predict", *options).returncode == 0
    scan = next(scans.glob("a*"))
    sitk.WriteImage(sitk.ReadImage(str(scan))[:, :, 1:], str(scan))
    done = run("predict", *options)
    assert done.returncode == 1
    assert "failed: " in done.stderr and "a.nii.gz: exists, but is of another scan" in done.stderr
    assert "1 failed" in done.stderr and "1 skipped" in done.stderr
    # Nor where there is something to make anew.
    before = (tmp_path / "out" / "a.nii.gz").read_bytes()
    done = run("predict", *options, "--measurements")
    assert done.returncode == 1 and "a.nii.gz: exists, but is of another scan" in done.stderr
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == before
    assert "note: 1 label map(s) are made anew" in done.stderr


def test_what_is_asked_for_later_is_made_with_skip_existing(
    scans: Path, tmp_path: Path, tiny_weights: Path
):
    options = (scans, tmp_path / "out", "--weights", tiny_weights, "--skip-existing", "--json")
    statuses = []
    for more in ((), (), ("--measurements",), ("--measurements", "--split"), ("--label-tables",)):
        done = run("predict", *options, *more)
        assert done.returncode == 0
        statuses.append({json.loads(line)["status"] for line in done.stdout.splitlines()})
    assert statuses == [{"done"}, {"skipped"}, {"done"}, {"done"}, {"skipped"}]
    assert (tmp_path / "out" / "labels.ctbl").exists()
    assert len(list((tmp_path / "out" / "a").iterdir())) == 13


def test_a_profile_is_written_only_when_there_is_one(
    scans: Path, tmp_path: Path, tiny_weights: Path
):
    target = tmp_path / "new" / "p.json"
    options = ("--weights", tiny_weights, "--profile", target)
    assert run("predict", scans, tmp_path / "out", *options).returncode == 0
    before = target.read_bytes()
    assert json.loads(before)["wall_s"] > 0
    failed = run("predict", scans, tmp_path / "out", *options, "--organs", "heart")
    assert failed.returncode == 2
    assert [p.name for p in target.parent.iterdir()] == ["p.json"]
    assert target.read_bytes() == before


def test_results_that_cannot_be_written_to_are_skipped(
    scans: Path, tmp_path: Path, tiny_weights: Path
):
    out = tmp_path / "out"
    options = ("--weights", tiny_weights, "--measurements", "--split")
    assert run("predict", scans, out, *options).returncode == 0
    times = {p: p.stat().st_mtime_ns for p in (out, *out.rglob("*"))}
    for place in times:
        place.chmod(0o555 if place.is_dir() else 0o444)
    done = run("predict", scans, out, *options, "--skip-existing")
    for place in times:
        place.chmod(0o755)
    assert done.returncode == 0 and "2 skipped" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in (out, *out.rglob("*"))} == times


def test_two_processes_on_one_output_folder(scans: Path, tmp_path: Path, tiny_weights: Path):
    command = [sys.executable, "-m", "flare_clef", "predict", str(scans), str(tmp_path / "out")]
    command += ["--weights", str(tiny_weights), "--quiet"]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.nii.gz", "b with space.mha"]


def test_info_of_weights_and_scan(scans: Path, tiny_weights: Path):
    facts = json.loads(run("info", tiny_weights, "--json").stdout)
    assert facts["weights"]["record"] == {"made": "by a test"}
    assert facts["organs"][0] == "1 liver" and len(facts["organs"]) == 13
    assert facts["device"].startswith("c") and "(" in facts["precision"]
    facts = json.loads(run("info", scans / "a_0000.nii.gz", "--json").stdout)
    assert facts["size_voxels_x_y_z"] == [44, 40, 20]
    assert facts["spacing_mm"] == [1.5, 1.5, 3.0]
    assert facts["orientation"] == "LPS"
    assert facts["lowest_value"] == -1000
    assert run("info", scans / "none.nii.gz").returncode == 1


def test_info_shows_a_long_record_in_short_and_whole_as_json(tmp_path: Path):
    record = {
        "steps": 1060,
        "recipe": {"finetune": {"seed": 17}},
        "trained_on": {f"case_{k}": "a hospital" for k in range(91)},
        "validation_means": {"labelled_organs": 0.777},
    }
    weights = tmp_path / "long.safetensors"
    save_weights(weights, lively_network(), grid=TINY_GRID, record=record)
    shown = run("info", weights).stdout
    assert "91 cases" in shown and "1060" in shown and "0.777" in shown
    assert "hospital" not in shown and "seed" not in shown and "--json" in shown
    assert json.loads(run("info", weights, "--json").stdout)["weights"]["record"] == record


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['flare-clef', '--help']\n"
        "from flare_clef.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'SimpleITK', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout


def test_inference_imports_neither_scipy_nor_matplotlib():
    code = (
        "import sys, flare_clef.segmenter, flare_clef.batch\n"
        "heavy = {'scipy', 'matplotlib', 'pandas', 'psutil'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_predict_sh_with_and_without_the_package_on_the_path(
    scans: Path, tmp_path: Path, tiny_weights: Path
):
    folder = Path(sys.executable).parent
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (bare / "python3").chmod(0o755)
    for number, path in enumerate((f"{folder}:/usr/bin:/bin", f"{bare}:/usr/bin:/bin")):
        out = tmp_path / f"out{number}"
        done = subprocess.run(
            ["sh", str(ROOT / "predict.sh"), str(scans), str(out), "--weights", str(tiny_weights)],
            capture_output=True, encoding="utf-8", env={**os.environ, "PATH": path}, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(list(out.iterdir())) == 2
        again = subprocess.run(
            ["sh", str(ROOT / "predict.sh"), str(scans), "--skip-existing", "--frobnicate"],
            capture_output=True, encoding="utf-8", env={**os.environ, "PATH": path}, cwd=tmp_path,
        )  # fmt: skip
        assert again.returncode == 2 and "--frobnicate" in again.stderr
    first, second = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"out{k}" / "a.nii.gz")))
        for k in range(2)
    )
    assert np.array_equal(first, second)

"""The image, built and run on a real engine. Most runs mount small weights over the shipped
ones, so that the command stays word for word what a user types.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import body_hu, write_scan

sys.path.insert(0, str(Path(__file__).parent))
from engine import DOCKER, IMAGE, ROOT, ask, build, docker, run

from flare_clef.version import __version__

pytestmark = pytest.mark.skipif(
    not DOCKER, reason="no Docker engine: set DOCKER=docker, or see tests/container/check.sh"
)

MEBIBYTE = 2**20
HARNESS = ("/bin/bash", "-c", "sh predict.sh")


@pytest.fixture(scope="session")
def revision() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    return done.stdout.strip() or "unknown"


@pytest.fixture(scope="session", autouse=True)
def image(revision: str) -> None:
    if DOCKER:
        build(revision)


@pytest.fixture(scope="session")
def small(tiny_weights: Path) -> tuple[str, str]:
    """Options that put small weights in the place of the shipped ones."""
    tiny_weights.chmod(0o644)
    shipped = json.loads(run(IMAGE, "info", "--json").stdout)["weights"]["file"]
    return "-v", f"{tiny_weights}:{shipped}:ro"


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Two scans and a bad file between them."""
    write_scan(tmp_path / "inputs" / "a_0000.nii.gz")
    (tmp_path / "inputs" / "bad_0000.nii.gz").write_bytes(b"not an image")
    write_scan(tmp_path / "inputs" / "c.mha", body_hu(seed=1))
    return tmp_path / "inputs"


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A folder that any user may write to."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@pytest.fixture
def volume() -> Iterator[str]:
    name = f"clef-test-{os.getpid()}"
    ask("volume", "create", name)
    yield name
    docker("volume", "rm", "-f", name)


def mounts(scans: Path, outputs: Path) -> tuple[str, ...]:
    return "-v", f"{scans}:/workspace/inputs:ro", "-v", f"{outputs}:/workspace/outputs"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what the image is ------------------------------------------------------------------------


def test_size_labels_and_user(revision: str):
    facts = json.loads(ask("image", "inspect", IMAGE))[0]
    print(f"image: {facts['Size'] / 1e6:.0f} MB unpacked")
    assert facts["Size"] <= 1.5e9
    labels = facts["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.revision"] == revision
    assert labels["org.opencontainers.image.licenses"].startswith("Apache-2.0")
    assert facts["Config"]["User"] == "1000:1000"
    assert facts["Config"]["WorkingDir"] == "/workspace"


def test_layers_hold_the_weights_once_and_nothing_that_does_not_belong(tmp_path: Path):
    own = len(json.loads(ask("image", "inspect", IMAGE))[0]["RootFS"]["Layers"])
    base = os.environ.get("BASE_IMAGE")
    if base:
        own -= len(json.loads(ask("image", "inspect", base))[0]["RootFS"]["Layers"])
    saved = tmp_path / "clef.tar"
    ask("save", "-o", saved, IMAGE)
    files: list[tuple[str, int]] = []
    with tarfile.open(saved) as archive:
        layers = json.load(archive.extractfile("manifest.json"))[0]["Layers"]  # type: ignore[arg-type]
        for name in layers[-own:]:
            with tarfile.open(fileobj=archive.extractfile(name)) as layer:
                files += [(m.name, m.size) for m in layer if m.isfile() or m.issym()]
    saved.unlink()
    sizes: dict[str, int] = {}
    for name, size in files:
        folder = re.sub(r"^(.*/site-packages/[^/]+|[^/]+/[^/]+).*", r"\1", name)
        sizes[folder] = sizes.get(folder, 0) + size
    print(f"{len(files)} files, {sum(sizes.values()) / 1e6:.1f} MB; folders above 1 MB:")
    for folder, size in sorted(sizes.items(), key=lambda each: -each[1]):
        if size > 1e6:
            print(f"{size / 1e6:8.1f} MB {folder}")
    weights = [name for name, _ in files if name.endswith(".safetensors")]
    assert len(weights) == 1 and weights[0].endswith("/_weights/flare_clef.safetensors")
    wrong = re.compile(
        r"\.(nii|nii\.gz|mha|nrrd|dcm|whl|a|hpp|pyi|tmp)$"  # data, sources, leftovers
        r"|(^|/)(\.git|\.cache|\.env|id_rsa|credentials|\.netrc|pip\.conf)(/|$)"
        r"|(^|/)(gcc|g\+\+|cc|ld|make|cmake|git|pip\d*|nvcc|ninja)$"
        r"|site-packages/(pip|pytest|hypothesis|flare_clef/tests)/"
        r"|site-packages/(numpy|scipy|sympy|networkx)/(.*/)?tests/"
        r"|^(tmp|var/tmp|root|home|build|var/cache)/."
    )
    assert [name for name, _ in files if wrong.search(name)] == []
    # Everything of ours lies in two folders; the standard library's bytecode is Python's own.
    elsewhere = {
        name for name, _ in files
        if not name.startswith(("opt/flare-clef/", "workspace/")) and not name.endswith(".pyc")
    }  # fmt: skip
    assert elsewhere == set()
    assert [name for name, _ in files if name.startswith("workspace/")] == ["workspace/predict.sh"]
    sources = {n for n, _ in files if "/flare_clef/" in n and n.endswith(".py")}
    compiled = {n for n, _ in files if "/flare_clef/" in n and n.endswith(".pyc")}
    assert len(sources) == len(compiled) > 20


def test_command_line(scans: Path, outputs: Path, small: tuple[str, str]):
    assert run(IMAGE, "--version").stdout == f"flare-clef {__version__}\n"
    shown = run(IMAGE, "--help")
    assert shown.returncode == 0 and "predict" in shown.stdout
    # No command of ours is hidden by a program of that name in the image.
    commands = re.findall(r"^│ ([a-z]+) ", shown.stdout, re.MULTILINE)
    assert {"predict", "info", "evaluate"} <= set(commands)
    found = run(IMAGE, "/bin/sh", "-c", f"for c in {' '.join(commands)}; do command -v $c; done")
    assert found.stdout == ""

    assert run(IMAGE, "segment").returncode == 2
    missing = run(IMAGE, "predict", "/none", "/workspace/outputs")
    assert missing.returncode == 1
    assert missing.stderr.strip().splitlines() == [
        "flare-clef: /none: no such file or folder; check the path"
    ]
    (scans / "bad_0000.nii.gz").unlink()
    assert run(*mounts(scans, outputs), *small, IMAGE).returncode == 0
    same = run(
        "-v", f"{outputs}:/labels:ro", IMAGE, "evaluate", "/labels/a.nii.gz", "/labels/a.nii.gz"
    )
    assert same.returncode == 0, same.stderr
    assert "1.000" in same.stdout
    coarse = ("--pixel-mm", "4", "--slice-thickness-mm", "6")
    made = run("-v", f"{outputs}:/demo", IMAGE, "phantom", "/demo", *coarse)
    assert made.returncode == 0, made.stderr
    assert {"cases.json", "images", "labels"} <= set(names(outputs))


# --- the challenge's way and the user's --------------------------------------------------------


def test_the_users_command(volume: str, tmp_path: Path, small: tuple[str, str]):
    """`docker run --gpus all -v inputs:/workspace/inputs clef:latest`, on a named volume."""
    scan = write_scan(tmp_path / "a_0000.nii.gz").read_bytes()
    mount = ("-v", f"{volume}:/workspace/inputs")
    filled = run("-i", *mount, IMAGE, "sh", "-c", "cat >inputs/a_0000.nii.gz", stdin=scan)
    assert filled.returncode == 0, filled.stderr

    if not Path("/dev/nvidia0").exists():
        refused = run("--gpus", "all", *mount, *small, IMAGE)
        assert refused.returncode == 125 and "device driver" in refused.stderr
        gpus: tuple[str, ...] = ()
    else:
        gpus = ("--gpus", "all")
    done = run(*gpus, *mount, *small, IMAGE)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "not mounted" in line]
    assert len(told) == 1 and "/workspace/inputs/outputs" in told[0]
    if not gpus:
        assert "cpu (no GPU found)" in done.stderr
    listed = run(*mount, IMAGE, "ls", "-n", "inputs/outputs").stdout.split()
    assert "a.nii.gz" in listed and "1000" in listed

    # Once more: the folder of labels is not taken for a scan.
    assert "[1/1]" in run(*mount, *small, IMAGE).stderr


def test_the_harness_one_case_at_a_time_and_all_together(
    tmp_path: Path, outputs: Path, small: tuple[str, str]
):
    inputs, together = tmp_path / "inputs", tmp_path / "together"
    inputs.mkdir()
    together.mkdir()
    together.chmod(0o777)
    for seed, case in enumerate(("x1", "x2")):
        path = write_scan(inputs / f"{case}_0000.nii.gz", body_hu(seed=seed))
        given = ("--name", f"clef-{os.getpid()}", "-v", f"{inputs}/:/workspace/inputs/")
        done = run(*given, "-v", f"{outputs}/:/workspace/outputs/", *small, IMAGE, *HARNESS)
        assert done.returncode == 0, done.stderr
        path.rename(tmp_path / path.name)
    for path in tmp_path.glob("x*.nii.gz"):
        path.rename(inputs / path.name)
    done = run(*given, "-v", f"{together}/:/workspace/outputs/", *small, IMAGE, *HARNESS)
    assert done.returncode == 0, done.stderr
    assert names(outputs) == names(together) == ["x1.nii.gz", "x2.nii.gz"]
    for name in names(outputs):
        alone, among = (sitk.ReadImage(str(d / name)) for d in (outputs, together))
        assert alone.GetSize() == among.GetSize() == (44, 40, 20)
        assert alone.GetSpacing() == (1.5, 1.5, 3.0)


def test_labels_are_those_of_the_command_line_outside(tmp_path: Path, outputs: Path):
    """The shipped weights, 192^3, voxel for voxel, on a phantom: noise need get no label."""
    made = ["phantom", tmp_path, "--pixel-mm", "3", "--slice-thickness-mm", "5"]
    subprocess.run([sys.executable, "-m", "flare_clef", *map(str, made)], check=True)
    inputs = tmp_path / "images"
    (inputs / "phantom_0_0000.nii.gz").rename(inputs / "a_0000.nii.gz")
    options = ("--precision", "fp32", "--threads", "1")
    inside = run(*mounts(inputs, outputs), IMAGE, "predict", "inputs", "outputs", *options)
    assert inside.returncode == 0, inside.stderr
    command = [sys.executable, "-m", "flare_clef", "predict", inputs, tmp_path / "own", *options]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    ours, theirs = (
        sitk.ReadImage(str(folder / "a.nii.gz")) for folder in (tmp_path / "own", outputs)
    )
    voxels = sitk.GetArrayFromImage(ours)
    assert len(np.unique(voxels)) > 10
    assert np.array_equal(voxels, sitk.GetArrayFromImage(theirs))
    assert (outputs / "a.nii.gz").read_bytes() == (tmp_path / "own" / "a.nii.gz").read_bytes()


# --- limits ------------------------------------------------------------------------------------

LOCKED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")


@pytest.mark.parametrize(
    "limit",
    [
        ("--read-only",),
        ("--cap-drop", "ALL"),
        ("--security-opt", "no-new-privileges"),
        ("--shm-size", "64m"),
        ("--memory", "4g"),
        ("--cpus", "1"),
        ("--user", "4711:4712"),
        ("--user", "0:0"),
        ("-e", "HOME="),
    ],
    ids=" ".join,
)
def test_each_limit(limit: tuple[str, ...], scans: Path, outputs: Path, small: tuple[str, str]):
    (scans / "bad_0000.nii.gz").unlink()
    done = run(*limit, *mounts(scans, outputs), *small, IMAGE, *HARNESS)
    assert done.returncode == 0, done.stderr
    assert names(outputs) == ["a.nii.gz", "c.mha"]
    if limit[0] == "--cpus":
        assert "1 thread(s)" in done.stderr
    owner = (outputs / "a.nii.gz").stat()
    expected = limit[1] if limit[0] == "--user" else "1000:1000"
    assert f"{owner.st_uid}:{owner.st_gid}" == expected


def test_all_limits_another_user_and_a_bad_file_with_the_shipped_weights(
    scans: Path, outputs: Path
):
    limits = ("--memory", "4g", "--cpus", "1", "--shm-size", "64m", "--user", "4711:4712")
    done = run(*LOCKED, *limits, *mounts(scans, outputs), IMAGE, *HARNESS)
    assert done.returncode == 1
    assert "3 case(s): 2 done, 1 failed" in done.stderr
    failed = [line for line in done.stderr.splitlines() if "failed: " in line]
    assert len(failed) == 1 and "bad_0000.nii.gz" in failed[0]
    assert "Traceback" not in done.stderr and "1 thread(s)" in done.stderr
    assert names(outputs) == ["a.nii.gz", "c.mha"]
    assert {path.stat().st_uid for path in outputs.iterdir()} == {4711}


def test_memory_given_is_respected(tmp_path: Path, outputs: Path):
    """2 GB are enough, for three scans too, though the heap keeps what the first one took; with
    1200 MB the network says what it lacks instead of being killed."""
    for name in "abc":
        write_scan(tmp_path / "inputs" / f"{name}.nii.gz", body_hu((40, 96, 100)))
    for size, code in (("1200m", 1), ("2g", 0)):
        limits = ("--memory", size, "--memory-swap", size)
        done = run(*limits, *mounts(tmp_path / "inputs", outputs), IMAGE)
        assert done.returncode == code, done.stderr
        assert ("the network needs at least" in done.stderr) == (code == 1)
    assert names(outputs) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]


def test_too_little_memory_gets_a_line(scans: Path, outputs: Path):
    limits = ("--memory", "150m", "--memory-swap", "150m")
    done = run(*limits, *mounts(scans, outputs), IMAGE, *HARNESS)
    assert done.returncode != 0
    assert "memory" in done.stderr and "150 MiB" in done.stderr
    assert "Traceback" not in done.stderr


# --- where labels go ---------------------------------------------------------------------------


def test_no_outputs_mount_writes_beside_the_scans(scans: Path, small: tuple[str, str]):
    (scans / "bad_0000.nii.gz").unlink()
    scans.chmod(0o777)
    done = run("-v", f"{scans}:/workspace/inputs", *small, IMAGE)
    assert done.returncode == 0, done.stderr
    assert "labels go beside the scans" in done.stderr
    assert names(scans / "outputs") == ["a.nii.gz", "c.mha"]


def test_an_image_for_a_harness_whose_results_are_roots(
    scans: Path, tmp_path: Path, small: tuple[str, str], revision: str
):
    build(revision, "clef:root", "RUN_AS=0:0")
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o755)
    (scans / "bad_0000.nii.gz").unlink()
    done = run(*mounts(scans, locked), *small, "clef:root", *HARNESS)
    assert done.returncode == 0, done.stderr
    assert names(locked) == ["a.nii.gz", "c.mha"]
    ask("rmi", "clef:root")


def test_nowhere_to_write_is_said_before_computing(scans: Path, outputs: Path, tmp_path: Path):
    """One line, exit 1, nothing read or computed; the line names the reason and the remedy."""
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o755)  # root's: what docker makes of a folder that is not there
    scans.chmod(0o755)
    inputs = ("-v", f"{scans}:/workspace/inputs")
    read_only = ("-v", f"{scans}:/workspace/inputs:ro")
    denied = "(Permission denied: owner 0:0, mode 755)"
    for given, said in (
        (
            read_only,
            "/workspace/outputs is not mounted and user 1000:1000 cannot write to"
            " /workspace/inputs (Read-only file system): nowhere to put the labels;"
            " add -v FOLDER:/workspace/outputs",
        ),
        (
            inputs,
            "/workspace/outputs is not mounted and user 1000:1000 cannot write to"
            f" /workspace/inputs {denied}: nowhere to put the labels;"
            " add -v FOLDER:/workspace/outputs, or --user 0:0",
        ),
        (
            (*read_only, "-v", f"{locked}:/workspace/outputs"),
            f"/workspace/outputs: user 1000:1000 cannot write there {denied};"
            " add --user 0:0, or chown 1000:1000 FOLDER, or mount another folder there",
        ),
        (
            (*read_only, "-v", f"{outputs}:/workspace/outputs:ro"),
            "/workspace/outputs: user 1000:1000 cannot write there (Read-only file system);"
            " mount another folder there",
        ),
        (
            ("--read-only",),
            "nothing is mounted; add -v FOLDER:/workspace/inputs -v FOLDER:/workspace/outputs",
        ),
    ):
        done = run(*given, IMAGE)
        assert done.returncode == 1
        assert done.stderr == f"flare-clef: {said}\n"
        assert done.stdout == ""
    assert names(locked) == names(outputs) == []
    assert names(scans) == ["a_0000.nii.gz", "bad_0000.nii.gz", "c.mha"]


@pytest.mark.parametrize("remedy", ["--user", "chown"])
def test_the_remedies_for_a_folder_of_another_user(
    remedy: str, scans: Path, tmp_path: Path, small: tuple[str, str]
):
    """What the refusal names, done, lets the same command through."""
    (scans / "bad_0000.nii.gz").unlink()
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o755)
    refused = run(*mounts(scans, locked), *small, IMAGE).stderr
    user = re.search(r"add --user (\S+), or chown (\S+) FOLDER", refused)
    assert user, refused
    if remedy == "chown":
        os.chown(locked, *map(int, user[2].split(":")))
        done = run(*mounts(scans, locked), *small, IMAGE)
    else:
        done = run("--user", user[1], *mounts(scans, locked), *small, IMAGE)
    assert done.returncode == 0, done.stderr
    assert names(locked) == ["a.nii.gz", "c.mha"]


# --- on a cluster ------------------------------------------------------------------------------


def test_the_pods_of_the_kubernetes_job(tmp_path: Path, outputs: Path, small: tuple[str, str]):
    """The manifest's own command, user, security context, limits and mounts, by `docker run`."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    spec = yaml.safe_load((ROOT / "deploy" / "kubernetes-job.yaml").read_text())["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    for number in range(3):
        write_scan(tmp_path / "inputs" / f"{number}.nii.gz", body_hu(seed=number))
    folders = {"inputs": tmp_path / "inputs", "outputs": outputs}
    assert container["image"] == IMAGE
    limits = container["resources"]["limits"]
    # The engine refuses more processors than it has.
    cpus = min(float(limits["cpu"]), float(ask("info", "--format", "{{.NCPU}}")))
    options = [
        *("--user", f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['fsGroup']}"),
        *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
        *("--cpus", str(cpus), "--memory", limits["memory"].replace("Gi", "g")),
    ]
    for mount in container["volumeMounts"]:
        if "subPath" in mount:
            mode = "ro" if mount.get("readOnly") else "rw"
            options += ["-v", f"{folders[mount['subPath']]}:{mount['mountPath']}:{mode}"]
        else:
            options += ["--tmpfs", mount["mountPath"]]
    done_by = {}
    for index in range(spec["completions"]):
        before = set(names(outputs))
        pod_index = ("-e", f"JOB_COMPLETION_INDEX={index}")
        done = run(*options, *pod_index, *small, IMAGE, *container["args"])
        assert done.returncode == 0, done.stderr
        done_by[index] = sorted(set(names(outputs)) - before)
    assert [done_by[k] for k in range(3)] == [["0.nii.gz"], ["1.nii.gz"], ["2.nii.gz"]]
    assert not any(done_by[k] for k in range(3, spec["completions"]))


# --- stopping ----------------------------------------------------------------------------------


def test_docker_stop_within_two_seconds_keeps_what_is_done(tmp_path: Path, outputs: Path):
    """In the middle of the second case, with the shipped weights."""
    for number in range(4):
        write_scan(tmp_path / "inputs" / f"{number}.nii.gz", body_hu((40, 96, 100), seed=number))
    name = f"clef-stop-{os.getpid()}"
    ask(
        "run", "-d", "--network", "none", "--name", name,
        *mounts(tmp_path / "inputs", outputs), IMAGE, *HARNESS,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while "0.nii.gz" not in names(outputs):
            assert time.monotonic() < deadline, docker("logs", name).stderr
            time.sleep(0.1)
        time.sleep(1)
        began = time.monotonic()
        ask("stop", "-t", "10", name)
        seconds = time.monotonic() - began
        code = int(ask("inspect", "--format", "{{.State.ExitCode}}", name))
        log = docker("logs", name).stderr
    finally:
        docker("rm", "-f", name)
    print(f"docker stop: {seconds:.2f} s")
    assert code == 143
    assert seconds <= 2
    assert "terminated; finished cases are kept" in log
    written = names(outputs)
    assert 0 < len(written) < 4 and all(n.endswith(".nii.gz") and n[0] != "." for n in written)
    assert sitk.ReadImage(str(outputs / "0.nii.gz")).GetSize() == (100, 96, 40)

"""Resource profiles: against processes with a known course, and sums worked out by hand.

Tolerances are wide because the machine may be busy; CPU time is counted, not wall time.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
import typer

from flare_clef import gpu_meter, process_tree
from flare_clef.commands import profile as profile_command
from flare_clef.errors import UserError
from flare_clef.paths import replacing
from flare_clef.process_tree import LinuxTree, PsutilTree
from flare_clef.resource_plots import draw_profile
from flare_clef.resource_summary import COLUMNS, MEASURED, Stage, summarise
from flare_clef.resources import NoProfiler, ResourceProfiler

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
NAN = float("nan")


def profile_of(code: str, *arguments: str) -> dict[str, Any]:
    """The profile of a Python program, as the command takes it."""
    profiler = ResourceProfiler()
    child = subprocess.Popen([sys.executable, "-S", "-c", code, *arguments])
    profiler.start(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    profiler.stop()
    assert child.wait() == 0
    result = profiler.result()
    assert not [note for note in result["notes"] if "sampling ended" in note]
    return result


BURN = "import time\nwhile time.process_time() < {seconds}: pass\n"


@linux
def test_300_mb_for_two_seconds() -> None:
    code = "import time; x = b'x' * (300 << 20); time.sleep(2); del x; time.sleep(0.3)"
    result = profile_of(code)
    assert result["maxima"]["ram_mb"] == pytest.approx(310, abs=15)
    held_s = 0.1 * sum(mb > 290 for mb in result["curves"]["ram_mb"])
    assert 1.7 <= held_s <= 2.3
    assert 300 * 1.8 <= result["areas"]["ram_mb_s"] <= 300 * 2.2 + 310 * (result["wall_s"] - 2)
    assert result["curves"]["ram_mb"][-1] < 50  # given back before the end
    assert result["cpu_s"] < 1.5


@linux
def test_one_core_for_two_seconds() -> None:
    result = profile_of(BURN.format(seconds=2))
    cores = os.cpu_count() or 1
    assert result["cpu_s"] == pytest.approx(2, abs=0.1)
    assert result["areas"]["cpu_percent_s"] == pytest.approx(100 * 2 / cores, rel=0.1)
    assert result["maxima"]["cpu_percent"] <= 100
    # What the tree used, the machine used.
    machine = result["areas"]["machine_cpu_percent_s"]
    assert machine >= 0.9 * result["areas"]["cpu_percent_s"]
    assert result["profiler_percent_of_a_core"] < 4


GRANDCHILD = """
import subprocess, sys
inner = "import time; x = b'x' * (150 << 20)\\nwhile time.process_time() < 0.8: pass"
middle = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', sys.argv[1]])"
subprocess.run([sys.executable, "-S", "-c", middle, inner])
"""


@linux
def test_child_of_a_child() -> None:
    result = profile_of(GRANDCHILD)
    assert max(result["curves"]["processes"]) == 3
    assert 150 <= result["maxima"]["ram_mb"] <= 220
    assert 0.8 <= result["cpu_s"] <= 1.5


FORKS = """
import os, time
x = b"x" * (200 << 20)
time.sleep(0.3)
children = [os.fork() for _ in range(2)]
time.sleep(0.8)
if all(children):
    [os.waitpid(child, 0) for child in children]
    time.sleep(0.3)
"""


@linux
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="no PSS here")
def test_shared_memory_counts_once() -> None:
    result = profile_of(FORKS)
    assert result["memory_kind"] == "PSS"
    assert max(result["curves"]["processes"]) == 4  # the first child forks as well
    assert 200 <= result["maxima"]["ram_mb"] <= 260  # the sum of the RSS is above 800
    assert result["curves"]["ram_mb"][-2] >= 190  # and the parent's own again at the end


@linux
def test_many_processes_that_vanish() -> None:
    code = (
        "import subprocess\n"
        "for _ in range(60): subprocess.Popen(['sleep', '0.03']).wait() if _ % 4 else "
        "subprocess.Popen(['sh', '-c', 'sleep 0.3 & :'])\n"
    )
    result = profile_of(code)
    assert max(result["curves"]["processes"]) >= 2
    assert result["cpu_s"] > 0


def test_a_command_that_ends_at_once() -> None:
    result = profile_of("")
    assert 0 < result["wall_s"] < 5
    assert result["samples"] >= 1
    assert sum(result["areas"][f"{name}_s"] or 0 for name in MEASURED) >= 0


@linux
def test_psutil_tells_the_same() -> None:
    pytest.importorskip("psutil")
    code = (
        "import time\nx = b'x' * (100 << 20)\nwhile time.process_time() < 0.3: pass\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            direct, other = LinuxTree(child.pid), PsutilTree(child.pid)
            ours, theirs = direct.read(), other.read()
            direct.close()
            other.close()
        finally:
            child.kill()
    assert ours.processes == theirs.processes == 1
    assert ours.cpu_s == pytest.approx(theirs.cpu_s, abs=0.02)
    assert 100 << 20 <= ours.ram_bytes <= theirs.ram_bytes  # PSS against RSS
    assert ours.machine_busy_s == pytest.approx(theirs.machine_busy_s, rel=0.01)
    assert ours.machine_total_s == pytest.approx(theirs.machine_total_s, rel=0.01)


def test_psutil_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_tree.sys, "platform", "darwin")
    monkeypatch.setattr(process_tree.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"psutil is missing.*flare-clef\[measure\]"):
        ResourceProfiler()


def test_cpu_total_never_falls() -> None:
    total = process_tree._CpuTotal()
    # A child's second is missing once, then in its parent's: nothing is counted twice.
    assert [total.add(s) for s in (1.0, 2.0, 1.1, 2.3)] == pytest.approx([1.0, 2.0, 2.0, 2.3])
    # A child of 1 s that nobody waits for: what is used from then on counts.
    assert [total.add(s) for s in (1.4, 1.5, 1.8)] == pytest.approx([2.3, 2.3, 2.6])


def columns_of(**given: list[float]) -> dict[str, list[float]]:
    count = len(given["time_s"])
    return {name: given.get(name, [NAN] * count) for name in COLUMNS}


def test_summary_by_hand() -> None:
    columns = columns_of(
        time_s=[0.1, 0.2, 0.3, 0.5],
        ram_mb=[100, 300, 200, 50],
        cpu_percent=[0, 50, 100, 10],
        gpu_memory_mb=[NAN, 1000, 2047, NAN],
    )
    stages = [
        Stage("a", "read", 0.0, 0.2),
        Stage("a", "network", 0.15, 0.25),
        Stage("b", "read", 0.31, 0.35),  # between two samples
        Stage("b", "write", 0.4, None),  # still running
    ]
    summary = summarise(columns, stages, 0.5)
    assert summary["maxima"]["ram_mb"] == 300
    assert summary["areas"]["ram_mb_s"] == pytest.approx(
        10 + 30 + 20 + 10
    )  # the last twice as long
    assert summary["areas"]["cpu_percent_s"] == pytest.approx(0 + 5 + 10 + 2)
    assert summary["areas"]["gpu_memory_mb_s"] == pytest.approx(304.7)
    assert summary["maxima"]["gpu_percent"] is summary["areas"]["gpu_percent_s"] is None
    assert summary["tolerance"]["within"] is True

    read, network, short, write = summary["stages"]
    assert (read["samples"], read["maxima"]["ram_mb"]) == (2, 300)
    assert read["areas"]["ram_mb_s"] == pytest.approx(10 + 30)
    assert (network["samples"], network["maxima"]["ram_mb"]) == (1, 300)
    assert network["areas"]["ram_mb_s"] == pytest.approx(300 * 0.05 + 200 * 0.05)
    assert (short["samples"], short["maxima"]["ram_mb"]) == (0, None)
    assert short["areas"]["ram_mb_s"] == pytest.approx(50 * 0.04)
    assert (write["seconds"], write["maxima"]["ram_mb"]) == (0.1, 50)

    a, b = summary["cases"]
    assert (a["case"], a["start_s"], a["end_s"]) == ("a", 0.0, 0.25)
    assert a["areas"]["ram_mb_s"] == pytest.approx(40 + 25)
    assert a["maxima"]["gpu_memory_mb"] == 1000
    assert (b["seconds"], b["maxima"]["ram_mb"]) == (0.19, 50)


@pytest.mark.parametrize(
    ("gpu_mb", "within", "words"),
    [(NAN, None, "no GPU memory"), (2047.0, True, "equal"), (2548.0, False, "500 MB above")],
)
def test_tolerance_of_the_challenge(gpu_mb: float, within: bool | None, words: str) -> None:
    tolerance = summarise(columns_of(time_s=[0.1], gpu_memory_mb=[gpu_mb]), [], 0.1)["tolerance"]
    assert tolerance["within"] is within
    assert words in tolerance["verdict"]


def test_stages_in_this_process(tmp_path: Path) -> None:
    def read_next() -> None:
        with profiler.stage("case_2", "read"):
            time.sleep(0.25)

    with ResourceProfiler(interval_s=0.05) as profiler:
        with profiler.stage("case_1", "network"):
            thread = threading.Thread(target=read_next)
            thread.start()
            until = time.process_time() + 0.3
            while time.process_time() < until:
                pass
            thread.join()
        with pytest.raises(KeyError), profiler.stage("case_1", "write"):
            raise KeyError
        with profiler.stage("case_3", "read"):
            profiler.write_json(tmp_path / "running.json")  # in the middle
    profiler.stop()  # a second time does nothing
    profiler.write_json(tmp_path / "profile.json", version="1")
    running = json.loads((tmp_path / "running.json").read_text())
    assert running["stages"][-1]["case"] == "case_3"

    result = json.loads((tmp_path / "profile.json").read_text())
    assert result["version"] == "1"
    stages = {(row["case"], row["stage"]): row for row in result["stages"]}
    network = stages["case_1", "network"]
    assert network["samples"] >= 3
    cores = os.cpu_count() or 1
    assert network["areas"]["cpu_percent_s"] == pytest.approx(100 * 0.3 / cores, rel=0.35)
    assert 0.25 <= stages["case_2", "read"]["seconds"] <= network["seconds"]
    assert stages["case_1", "write"]["end_s"] <= stages["case_3", "read"]["start_s"]
    assert [row["case"] for row in result["cases"]] == ["case_1", "case_2", "case_3"]
    assert result["cpu_s"] >= 0.28
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.json", "running.json"]


def test_no_profiler() -> None:
    profiler = NoProfiler()
    with profiler.stage("case_1", "read"), profiler.stage("case_2", "read"):
        pass
    with pytest.raises(KeyError), profiler.stage("case_1", "write"):
        raise KeyError


def test_sampling_that_fails_becomes_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    profiler = ResourceProfiler(interval_s=0.02)

    def fail() -> None:
        raise RuntimeError("no such luck")

    with profiler:
        time.sleep(0.1)
        monkeypatch.setattr(profiler._tree, "read", fail)
        time.sleep(0.1)
    result = profiler.result()
    assert result["samples"] >= 1
    assert any("sampling ended" in note and "no such luck" in note for note in result["notes"])


def test_late_samples_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    profiler = ResourceProfiler(interval_s=0.02)
    with profiler:
        read = profiler._tree.read

        def slow() -> Any:
            time.sleep(0.1)
            return read()

        monkeypatch.setattr(profiler._tree, "read", slow)
        time.sleep(0.4)
    result = profiler.result()
    assert result["samples_missed"] >= 5
    assert any("could not be taken in time" in note for note in result["notes"])


class FakeNvml(types.ModuleType):
    """An NVML with one card; ``failing`` names the functions that raise."""

    def __init__(self, *failing: str) -> None:
        super().__init__("pynvml")
        self.failing = set(failing)
        self.opened: object = None

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def call(*arguments: object) -> Any:
            if name in self.failing:
                raise RuntimeError(f"{name} lost")
            if name.startswith("nvmlDeviceGetHandle"):
                self.opened = arguments[0]
            return {
                "nvmlDeviceGetCount": 2,
                "nvmlDeviceGetHandleByIndex": "card",
                "nvmlDeviceGetHandleByUUID": "card",
                "nvmlDeviceGetName": b"Fake 100",
                "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(
                    total=8000 << 20, free=5000 << 20, used=1
                ),
                "nvmlDeviceGetUtilizationRates": types.SimpleNamespace(gpu=42),
            }.get(name)

        return call


@pytest.fixture
def no_cuda_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpu_figures(monkeypatch: pytest.MonkeyPatch, no_cuda_setting: None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    with ResourceProfiler(interval_s=0.02) as profiler:
        time.sleep(0.2)
    result = profiler.result()
    # A busy machine misses samples and says so; nothing else may be noted.
    notes = [note for note in result["notes"] if "could not be taken in time" not in note]
    assert (result["gpu"], notes) == ("Fake 100", [])
    assert result["maxima"]["gpu_memory_mb"] == 3000  # total - free, not "used"
    assert result["maxima"]["gpu_percent"] == 42
    last_s = result["curves"]["time_s"][-1]
    assert result["areas"]["gpu_memory_mb_s"] == pytest.approx(3000 * last_s, abs=5)
    assert result["tolerance"]["within"] is False


def test_gpu_that_fails_in_the_middle(
    monkeypatch: pytest.MonkeyPatch, no_cuda_setting: None
) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = gpu_meter.GpuMeter()
    assert meter.read(0.1) == (3000, 42)
    nvml.failing.add("nvmlDeviceGetUtilizationRates")
    assert meter.read(0.2) == (3000, None)
    nvml.failing.add("nvmlDeviceGetMemoryInfo")
    assert meter.read(0.3) == (None, None)
    nvml.failing.clear()
    assert meter.read(0.4) == (None, None)
    nvml.failing.add("nvmlShutdown")
    meter.close()
    assert [note.split(" (")[0] for note in meter.notes] == [
        "NVML gave no GPU utilisation at 0.2 s",
        "NVML failed at 0.3 s",
        "NVML failed while closing",
    ]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (None, "pynvml is missing"),
        (FakeNvml("nvmlInit"), "no NVIDIA GPU or driver"),
        (FakeNvml("nvmlDeviceGetHandleByIndex"), "cannot open GPU 0"),
    ],
)
def test_no_gpu(
    monkeypatch: pytest.MonkeyPatch, no_cuda_setting: None, module: Any, words: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    meter = gpu_meter.GpuMeter()
    assert meter.read(0.1) == (None, None)
    meter.close()
    assert len(meter.notes) == 1
    assert words in meter.notes[0]


@pytest.mark.parametrize(
    ("visible", "index", "opened"),
    [
        (None, 1, 1),
        ("1", 0, 1),
        ("1,0", 1, 0),
        ("GPU-12ab", 0, "GPU-12ab"),
        ("", 0, None),
        ("-1", 0, None),
        ("0", 1, None),
        ("7,0", 0, None),
    ],
)
def test_card_that_cuda_sees(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, opened: object
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = gpu_meter.GpuMeter(index)
    assert nvml.opened == opened
    assert bool(meter.notes) is (opened is None)


def test_file_that_cannot_be_written(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    target.write_text("old")
    with (
        pytest.raises(UserError, match=r"out\.json: cannot be written \(No space left"),
        replacing(target) as temporary,
    ):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert target.read_text() == "old"


def drawable(gpu: bool) -> dict[str, Any]:
    count = 20
    columns = columns_of(
        time_s=[0.1 * (k + 1) for k in range(count)],
        ram_mb=[100.0 * k for k in range(count)],
        cpu_percent=[50.0] * count,
        machine_cpu_percent=[60.0] * count,
        gpu_memory_mb=[1000.0] * (count - 5) + [NAN] * 5 if gpu else [NAN] * count,
    )
    stages = [Stage(f"$case_{k}$", "network", 0.2 * k, 0.2 * k + 0.1) for k in range(9)]
    curves = {
        name: [None if value != value else value for value in values]
        for name, values in columns.items()
    }
    head = {"wall_s": 2.0, "cores": 2, "memory_kind": "PSS", "curves": curves}
    return {**head, **summarise(columns, stages if gpu else [], 2.0)}


@pytest.mark.parametrize(("gpu", "panels"), [(False, 2), (True, 4)])
def test_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, panels: int) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    seen = []
    subplots = figure.subplots
    monkeypatch.setattr(
        figure,
        "subplots",
        lambda self, rows, *args, **more: seen.append(rows) or subplots(self, rows, *args, **more),
    )
    draw_profile(drawable(gpu), tmp_path / "profile.png", title="predict $x_1" + " long" * 50)
    assert seen == [panels]
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"flare-clef\[measure\]"):
        draw_profile(drawable(False), tmp_path / "profile.png")
    assert not list(tmp_path.iterdir())


def run_profile(
    folder: Path, *command: str, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "flare_clef", "profile", "--output", str(folder), "--"]
    return subprocess.run(
        [*arguments, *command], input=text, capture_output=True, text=True, encoding="utf-8"
    )


def test_command_passes_everything_through(tmp_path: Path) -> None:
    code = (
        "import sys, time; print(sys.stdin.read().upper(), end=''); "
        "print('warning', file=sys.stderr); print(sys.argv[1:]); time.sleep(0.3); sys.exit(7)"
    )
    done = run_profile(
        tmp_path / "a b" / "out", sys.executable, "-c", code, "--output", "x", text="hello\n"
    )
    assert done.returncode == 7
    assert done.stdout == "HELLO\n['--output', 'x']\n"
    assert done.stderr.startswith("warning\n")
    assert "exit code 7" in done.stderr
    assert "MB·s" in done.stderr
    folder = tmp_path / "a b" / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        "profile.csv",
        "profile.json",
        "profile.png",
    ]
    result = json.loads((folder / "profile.json").read_text())
    assert (result["exit_code"], result["command"][-2:]) == (7, ["--output", "x"])
    with open(folder / "profile.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert len(rows) == result["samples"] >= 2
    for name in COLUMNS:
        values = [float(row[name]) if row[name] else None for row in rows]
        assert values == result["curves"][name]


@pytest.mark.parametrize(
    ("handler", "code"),
    [("signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))", 9), ("", 143)],
    ids=["handled", "killed"],
)
def test_sigterm_reaches_the_command(tmp_path: Path, handler: str, code: int) -> None:
    program = f"import signal, sys, time; {handler}\nprint('up', flush=True); time.sleep(60)"
    arguments = ["profile", "--output", str(tmp_path), "--", sys.executable, "-c", program]
    with subprocess.Popen(
        [sys.executable, "-m", "flare_clef", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"up\n"
        time.sleep(0.2)
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=30)
    assert running.returncode == code
    assert json.loads((tmp_path / "profile.json").read_text())["exit_code"] == code


def test_command_that_does_not_exist(tmp_path: Path) -> None:
    done = run_profile(tmp_path / "out", "no-such-program-anywhere")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no-such-program-anywhere: cannot be run (No such file" in done.stderr


def test_output_is_checked_before_the_command_runs(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    done = run_profile(tmp_path / "taken", "touch", str(tmp_path / "ran"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "taken: cannot be written" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_without_matplotlib_the_figures_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ResourceProfiler() as profiler:
        pass
    monkeypatch.setattr(profile_command.importlib.util, "find_spec", lambda name: None)
    profile_command._write(profiler, ["true"], 0, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.csv", "profile.json"]
    assert 'no picture: matplotlib is missing, pip install "flare-clef[measure]"' in (
        capsys.readouterr().err
    )


def test_an_argument_that_is_not_utf8_gets_a_picture(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    done = run_profile(tmp_path, sys.executable, "-c", "import sys; sys.exit(7)", name)
    assert done.returncode == 7
    assert "Traceback" not in done.stderr
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_fails_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("no such glyph\nmore")

    monkeypatch.setattr("flare_clef.resource_plots.draw_profile", fails)
    for code, expected in ((7, 7), (0, 1)):
        program = f"import sys; sys.exit({code})"
        with pytest.raises(typer.Exit) as end:
            profile_command.profile([sys.executable, "-c", program], tmp_path, 0.1)
        assert end.value.exit_code == expected
        assert "profile.png: cannot be drawn (no such glyph); the" in capfd.readouterr().err
        assert json.loads((tmp_path / "profile.json").read_text())["exit_code"] == code


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="Windows has no SIGCHLD")
def test_exit_code_where_the_caller_ignores_its_children(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flare_clef", "profile", "--output", str(tmp_path), "--"]
    done = subprocess.run(
        [*command, "sh", "-c", "exit 7"],
        capture_output=True,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    )
    assert (done.returncode, json.loads((tmp_path / "profile.json").read_text())["exit_code"]) == (
        7,
        7,
    )


def test_predict_writes_a_profile_by_case_and_stage(tmp_path: Path, tiny_weights: Path) -> None:
    from conftest import write_scan

    write_scan(tmp_path / "scan_0000.nii.gz")
    target, out = tmp_path / "labels.nii.gz", tmp_path / "profile.json"
    arguments = ["predict", str(tmp_path / "scan_0000.nii.gz"), str(target), "--quiet"]
    arguments += ["--weights", str(tiny_weights), "--profile", str(out)]
    ran = subprocess.run(
        [sys.executable, "-m", "flare_clef", *arguments], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(out.read_text())
    names = [stage["stage"] for stage in result["stages"]]
    assert names == ["prepare", "network", "restore", "write"]
    ends = [stage["end_s"] for stage in result["stages"]]
    assert ends[0] == pytest.approx(result["stages"][1]["start_s"], abs=0.01)
    assert ends == sorted(ends)
    assert result["maxima"]["ram_mb"] > 50
    arguments[-1] = str(tmp_path / "scan_0000.nii.gz" / "profile.json")
    ran = subprocess.run(
        [sys.executable, "-m", "flare_clef", *arguments], capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert "cannot be written" in ran.stderr and len(ran.stderr.splitlines()) == 1

"""A profile of time, RAM, CPU and GPU of a process tree, sampled every 0.1 s.

What is measured and how areas are taken follows the FLARE22 harness: a sample each 0.1 s, the
card's whole memory (total - free), CPU in percent of all cores of the machine, areas as sums of
samples times 0.1 s. The harness measures the machine; this also tells what the tree of
processes itself takes. MB is 1024² bytes throughout, as in the challenge's 2048 MB.

A program started by a service (``docker run``) is no descendant: profile inside the container.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flare_clef.gpu_meter import GpuMeter
from flare_clef.paths import replacing
from flare_clef.process_tree import open_tree, require_means
from flare_clef.resource_summary import COLUMNS, Stage, summarise

_BYTES_PER_MB = 1024**2


class NoProfiler:
    """Stands for a profiler where none is wanted: its stages cost nothing."""

    _nothing = contextlib.nullcontext()

    def stage(self, case: str, name: str) -> contextlib.AbstractContextManager[None]:
        return self._nothing


class ResourceProfiler:
    """Samples a process tree in a thread, from ``start`` to ``stop``.

    In the process itself, as a context manager::

        with ResourceProfiler() as profiler:
            with profiler.stage("case_1", "read"):
                ...
        profiler.write_json(path)

    For a command: ``profiler = ResourceProfiler()``, start the command,
    ``profiler.start(pid)``, and ``profiler.stop()`` before its exit status is fetched.
    Stages may overlap and come from several threads. Nothing that fails while measuring
    raises: it becomes a note in the result. One object makes one profile. Making it raises
    ``UserError`` where processes cannot be measured.
    """

    def __init__(self, interval_s: float = 0.1, gpu_index: int = 0) -> None:
        require_means()
        self.interval_s = interval_s
        self._gpu = GpuMeter(gpu_index)
        self._lock = threading.Lock()
        self._columns = {name: array("d") for name in COLUMNS}
        self._stages: list[Stage] = []
        self._notes: list[str] = []
        self._missed = 0
        self._cost_s = 0.0
        self._cores = os.cpu_count() or 1
        self._cpu_carried_s = 0.0
        self._end_s: float | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, pid: int | None = None) -> None:
        """Start the clock on process ``pid`` (this one by default) and all its descendants."""
        self._tree = open_tree(os.getpid() if pid is None else pid)
        self._started = time.monotonic()
        self._first = self._last = self._tree.read()
        self._last_s = 0.0
        self._thread = threading.Thread(target=self._run, name="resource-profiler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and stop. May be called again."""
        if self._thread is None or self._end_s is not None:
            return
        self._stopping.set()
        self._thread.join()
        self._end_s = self._now_s()
        self._tree.close()
        self._gpu.close()

    def __enter__(self) -> ResourceProfiler:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @contextlib.contextmanager
    def stage(self, case: str, name: str) -> Iterator[None]:
        """Mark what runs inside as the stage ``name`` of ``case``."""
        stage = Stage(case, name, self._now_s(), None)
        with self._lock:
            self._stages.append(stage)
        try:
            yield
        finally:
            stage.end_s = self._now_s()

    def result(self) -> dict[str, Any]:
        """Figures, stages, notes and curves so far, ready for JSON; see ``summarise``."""
        with self._lock:
            columns = {name: list(values) for name, values in self._columns.items()}
            stages = list(self._stages)
        wall_s = self._now_s() if self._end_s is None else self._end_s
        notes = [*self._gpu.notes, *self._notes]
        if self._missed > 0.02 * (self._missed + len(columns["time_s"])):
            notes.append(
                f"{self._missed} samples could not be taken in time, the next one stands for "
                "them: a maximum may have been missed"
            )
        if wall_s < 2 * self.interval_s:
            notes.append(f"shorter than two samples ({wall_s:.2f} s): the figures say little")
        return {
            "interval_s": self.interval_s,
            "wall_s": round(wall_s, 3),
            "cpu_s": round(self._last.cpu_s - self._first.cpu_s, 2),
            "cores": self._cores,
            "memory_kind": self._tree.memory_kind,
            "gpu": self._gpu.name,
            "samples": len(columns["time_s"]),
            "samples_missed": self._missed,
            "profiler_percent_of_a_core": round(100 * self._cost_s / max(wall_s, 1e-9), 2),
            **summarise(columns, stages, wall_s),
            "notes": notes,
            "curves": {
                name: [_json_number(name, value) for value in values]
                for name, values in columns.items()
            },
        }

    def write_json(self, path: Path, **more: Any) -> None:
        """``result()`` with the fields ``more`` in front, in one step."""
        text = json.dumps({**more, **self.result()}, indent=1, ensure_ascii=False)
        with replacing(Path(path)) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")

    def write_csv(self, path: Path) -> None:
        """One row per sample; what was not measured is an empty field."""
        curves = self.result()["curves"]
        with replacing(Path(path)) as temporary, open(temporary, "w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(COLUMNS)
            table.writerows(zip(*(curves[name] for name in COLUMNS), strict=True))

    def _now_s(self) -> float:
        return time.monotonic() - self._started

    def _run(self) -> None:
        """The sampling thread: sample k is due at k intervals, so that nothing drifts."""
        due = 1
        try:
            while not self._stopping.wait(max(due * self.interval_s - self._now_s(), 0)):
                self._sample()
                following = max(math.floor(self._now_s() / self.interval_s) + 1, due + 1)
                self._missed += following - due - 1
                due = following
            self._sample(is_final=True)
        except Exception as error:
            # The measured program goes on whatever happens here.
            self._notes.append(
                f"sampling ended at {self._now_s():.1f} s: {type(error).__name__}: {error}"
            )

    def _sample(self, is_final: bool = False) -> None:
        reading = self._tree.read()
        now_s = self._now_s()
        elapsed_s = now_s - self._last_s
        last, self._last, self._last_s = self._last, reading, now_s
        if is_final and elapsed_s < self.interval_s / 2 and self._columns["time_s"]:
            return  # areas count whole intervals; and CPU time comes in ticks of 10 ms
        # What exceeds all cores in one sample is a tick of its neighbours: carried over, the
        # area stays right.
        limit_s = self._cores * elapsed_s
        used_s = reading.cpu_s - last.cpu_s + self._cpu_carried_s
        counted_s = min(used_s, limit_s)
        self._cpu_carried_s = used_s - counted_s
        machine_s = reading.machine_total_s - last.machine_total_s
        busy_s = reading.machine_busy_s - last.machine_busy_s
        gpu_memory_mb, gpu_percent = self._gpu.read(now_s)
        row = {
            "time_s": now_s,
            "processes": reading.processes,
            "ram_mb": reading.ram_bytes / _BYTES_PER_MB,
            "cpu_percent": 100 * counted_s / limit_s if limit_s > 0 else 0.0,
            "machine_cpu_percent": 100 * busy_s / machine_s if machine_s > 0 else None,
            "gpu_memory_mb": gpu_memory_mb,
            "gpu_percent": gpu_percent,
        }
        with self._lock:
            for name, value in row.items():
                self._columns[name].append(math.nan if value is None else value)
        self._cost_s = time.thread_time()


class ConsecutiveStages:
    """Marks stages of which each ends where the next begins, from one thread."""

    def __init__(self, profiler: ResourceProfiler) -> None:
        self.profiler = profiler
        self._open = contextlib.ExitStack()

    def begin(self, case: str, name: str) -> None:
        self.end()
        self._open.enter_context(self.profiler.stage(case, name))

    def end(self) -> None:
        self._open.close()


def _json_number(column: str, value: float) -> float | int | None:
    if math.isnan(value):
        return None
    return int(value) if column == "processes" else round(value, 3)

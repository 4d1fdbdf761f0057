"""RAM and CPU time of a process with all its descendants, read cheaply enough for 10 Hz.

Linux is read from ``/proc`` directly: a walk over all processes, as psutil does it, or a PSS
reading per sample would cost several percent of a core. Elsewhere psutil does it.

Source of the formats: proc(5).
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from typing import NamedTuple, Protocol

from flare_clef.errors import UserError

_PSS_SHARE = 0.003
"""Share of a core that may be spent on PSS readings (3 ms per GiB of 4 KiB pages each)."""
_PSS_ALLOWANCE_S = 0.005
_PSS_URGENT_S = 0.1
"""What may be spent in advance where a fork has changed who shares what."""
_URGENT = -1.0
_RESCAN_S = 1.0
"""The longest time between two looks for new processes, should the count of forks be hidden."""
_FORKED_NOT_EXECUTED = 0x40
"""PF_FORKNOEXEC of the kernel's include/linux/sched.h."""


class TreeReading(NamedTuple):
    """The state of the tree at one moment."""

    processes: int
    """Living ones, without those that ended and were not waited for."""
    ram_bytes: int
    """RSS less what the last PSS reading showed to be shared; plain RSS where unreadable."""
    cpu_s: float
    """CPU time of the tree so far, never decreasing."""
    machine_busy_s: float
    machine_total_s: float
    """CPU time of all cores since boot: not idle nor waiting for a disk, and all of it."""


class ProcessTree(Protocol):
    """What the profiler asks of a tree."""

    memory_kind: str
    """``PSS`` or ``RSS``."""

    def read(self) -> TreeReading: ...

    def close(self) -> None: ...


def require_means() -> None:
    """Raise ``UserError`` where processes cannot be measured, before anything is started."""
    if sys.platform == "linux":
        if not os.access("/proc/self/stat", os.R_OK):
            raise UserError("/proc: cannot be read, so nothing can be measured; mount it")
        return
    if importlib.util.find_spec("psutil") is None:
        raise UserError(
            "psutil is missing, which measures processes on this system: "
            'pip install "flare-clef[measure]"'
        )


def open_tree(root_pid: int) -> ProcessTree:
    """The tree below ``root_pid`` (included), by the best means of this system."""
    if sys.platform == "linux":
        return LinuxTree(root_pid)
    return PsutilTree(root_pid)


class _CpuTotal:
    """Makes a never decreasing total from sums over processes that come and go."""

    def __init__(self) -> None:
        self._total_s = 0.0
        self._highest_s = 0.0
        self._was_low = False

    def add(self, sum_s: float) -> float:
        """The total after a reading whose sum over the processes is ``sum_s``.

        A child that ends is missing from one reading and then appears in its parent's
        ``cutime``: no time is lost, the sum merely dips. Only if it stays low was the child
        never waited for, and counting goes on from there.
        """
        if sum_s >= self._highest_s:
            self._total_s += sum_s - self._highest_s
            self._highest_s = sum_s
            self._was_low = False
        elif self._was_low:
            self._highest_s = sum_s
            self._was_low = False
        else:
            self._was_low = True
        return self._total_s


class _Process:
    """One process of the tree. Its open file stays tied to it even if the PID is used again."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.stat_file = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
        self.sightings = 0
        self.rss_bytes = 0
        self.shared_bytes = 0
        self.pss_read_s = 0.0
        self.counts = False
        self.shares_with = 0

    def close(self) -> None:
        os.close(self.stat_file)


class LinuxTree:
    """The tree as ``/proc`` shows it. A process that orphans itself stays in the tree.

    RAM: RSS of each process at each reading, less its shared part (RSS - PSS). That part is
    measured anew as often as ``_PSS_SHARE`` allows, because the kernel walks all pages of a
    process to tell its PSS. CPU: user and system time of each process and of the children it
    has waited for, so that those too short for the sampling are counted.
    """

    def __init__(self, root_pid: int) -> None:
        self.memory_kind = "PSS" if os.access(f"/proc/{root_pid}/smaps_rollup", os.R_OK) else "RSS"
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK")
        self._machine_file = os.open("/proc/stat", os.O_RDONLY)
        self._root_pid = root_pid
        self._cpu = _CpuTotal()
        self._forks = -1
        self._scanned_s = 0.0
        self._seen: set[str] = set()
        self._members: dict[int, _Process] = {}
        self._pss_spent_s = 0.0
        self._started_s = time.monotonic()
        self._add(root_pid)

    def read(self) -> TreeReading:
        now_s = time.monotonic()
        busy_s, total_s, forks = self._read_machine()
        if forks is None or forks != self._forks or now_s - self._scanned_s > _RESCAN_S:
            self._scan()
            self._forks, self._scanned_s = forks if forks is not None else -1, now_s
        living = []
        cpu_ticks = 0
        # Parents come before their children, see _CpuTotal.
        for process in list(self._members.values()):
            try:
                fields = _stat_fields(os.pread(process.stat_file, 1024, 0))
                pages = int(fields[21])  # resident
            except (OSError, IndexError, ValueError):  # gone
                self._unshare(process)
                self._forget(process)
                continue
            cpu_ticks += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
            if fields[0] in (b"Z", b"X"):
                self._unshare(process)
                continue
            process.sightings += 1
            process.rss_bytes = pages * self._page_bytes
            if int(fields[6]) & _FORKED_NOT_EXECUTED and not process.counts:
                # A child that will execute a program borrows its parent's memory for a moment
                # (vfork). One that is seen twice has come to stay, and shares what it inherits.
                if process.sightings == 1 and process.pid != self._root_pid:
                    continue
                if process.sightings == 2:
                    process.pss_read_s = _URGENT
                    process.shares_with = int(fields[1])
                    self._measure_next(process.shares_with)
            else:
                process.counts = True
            living.append(process)
        if self.memory_kind == "PSS":
            self._measure_shared(living, now_s)
            counted = [process for process in living if process.counts]
        else:
            counted = living
        ram_bytes = sum(max(process.rss_bytes - process.shared_bytes, 0) for process in counted)
        cpu_s = self._cpu.add(cpu_ticks * self._tick_s)
        return TreeReading(len(living), ram_bytes, cpu_s, busy_s, total_s)

    def close(self) -> None:
        for process in list(self._members.values()):
            self._forget(process)
        os.close(self._machine_file)

    def _read_machine(self) -> tuple[float, float, int | None]:
        """Busy and total seconds of all cores since boot, and the forks since boot."""
        text = os.pread(self._machine_file, 1 << 18, 0)
        # user nice system idle iowait irq softirq steal; guest time is part of user.
        ticks = [int(field) for field in text.split(b"\n", 1)[0].split()[1:9]]
        total = sum(ticks)
        idle = sum(ticks[3:5])
        at = text.find(b"\nprocesses ")
        forks = int(text[at + 11 : text.index(b"\n", at + 11)]) if at >= 0 else None
        return (total - idle) * self._tick_s, total * self._tick_s, forks

    def _scan(self) -> None:
        """Take in new processes whose parent is in the tree."""
        pids = {name for name in os.listdir("/proc") if name.isdigit()}
        parents = {}
        for name in pids - self._seen:
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parents[int(name)] = int(_stat_fields(file.read())[1])
            except (OSError, IndexError, ValueError):
                continue
        self._seen = pids
        found = True
        while found:
            found = False
            for pid, parent in list(parents.items()):
                if parent in self._members and pid not in self._members:
                    del parents[pid]
                    found |= self._add(pid)

    def _add(self, pid: int) -> bool:
        try:
            self._members[pid] = _Process(pid)
        except OSError:  # gone, or too many open files
            return False
        return True

    def _forget(self, process: _Process) -> None:
        process.close()
        del self._members[process.pid]
        self._seen.discard(str(process.pid))

    def _unshare(self, process: _Process) -> None:
        """What a forked process shared is its parent's alone when it has ended."""
        self._measure_next(process.shares_with)
        process.shares_with = 0

    def _measure_next(self, pid: int) -> None:
        if pid in self._members:
            self._members[pid].pss_read_s = _URGENT

    def _measure_shared(self, living: list[_Process], now_s: float) -> None:
        """PSS of the urgent ones, then of those measured longest ago, within the budget."""
        budget_s = _PSS_ALLOWANCE_S + _PSS_SHARE * (now_s - self._started_s)
        for process in sorted(living, key=lambda process: process.pss_read_s):
            advance_s = _PSS_URGENT_S if process.pss_read_s == _URGENT else 0.0
            if self._pss_spent_s > budget_s + advance_s:
                return
            before_s = time.thread_time()
            try:
                with open(f"/proc/{process.pid}/smaps_rollup", "rb") as file:
                    text = file.read()
                shared_kb = _kilobytes(text, b"\nRss:") - _kilobytes(text, b"\nPss:")
                process.shared_bytes = shared_kb * 1024
            except (OSError, ValueError):  # gone, or another user's: RSS stands
                pass
            process.pss_read_s = now_s
            process.counts = True
            self._pss_spent_s += time.thread_time() - before_s


def _stat_fields(text: bytes) -> list[bytes]:
    """``/proc/PID/stat`` from the third field (state) on; the second may hold anything."""
    return text[text.rindex(b")") + 2 :].split(None, 22)


def _kilobytes(text: bytes, name: bytes) -> int:
    at = text.index(name) + len(name)
    return int(text[at : text.index(b"kB", at)])


class PsutilTree:
    """The tree through psutil, where there is no ``/proc``. RAM is RSS.

    A child counts from when a reading first sees it, and what it used stays counted.
    """

    memory_kind = "RSS"

    def __init__(self, root_pid: int) -> None:
        import psutil

        self._psutil = psutil
        self._root_pid = root_pid
        self._cpu_s: dict[tuple[int, float], float] = {}

    def read(self) -> TreeReading:
        psutil = self._psutil
        processes = ram_bytes = 0
        try:
            root = psutil.Process(self._root_pid)
            members = [root, *root.children(recursive=True)]
        except psutil.Error:
            members = []
        for process in members:
            try:
                times = process.cpu_times()
                self._cpu_s[process.pid, process.create_time()] = times.user + times.system
                ram_bytes += process.memory_info().rss
                processes += 1
            except psutil.Error:  # gone
                continue
        machine = psutil.cpu_times()
        total_s = sum(machine) - getattr(machine, "guest", 0) - getattr(machine, "guest_nice", 0)
        busy_s = total_s - machine.idle - getattr(machine, "iowait", 0)
        return TreeReading(processes, ram_bytes, sum(self._cpu_s.values()), busy_s, total_s)

    def close(self) -> None:
        pass

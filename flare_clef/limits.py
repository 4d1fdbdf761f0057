"""What this process may use of the machine: cores, memory; and an allocator that keeps memory.

Ground floor: standard library only. A container or batch system limits a process through
control groups; the plain counts of the host (``os.cpu_count``, ``MemTotal``) ignore them. All
readers take ``root``, the folder that stands for ``/``, so that tests can lay out a machine.

Sources: cgroups(7), proc(5), mallopt(3), and the kernel's Documentation/admin-guide/cgroup-v1
and cgroup-v2.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
_UNKNOWN_MEMORY_BYTES = 2 * 1024**3
"""Taken where the system tells nothing (Windows): what a machine that runs this has free."""

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def usable_cores(root: Path = _ROOT) -> int:
    """Cores that this process may keep busy: affinity and CPU quota, at least 1.

    A quota of 1.5 cores counts as 2: a second thread gets work done, a third only waits.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    for folder, version in _control_groups(root, "cpu"):
        quota = _quota_v2(folder) if version == 2 else _quota_v1(folder)
        if quota is not None:
            quota_us, period_us = quota
            cores = min(cores, -(-quota_us // period_us))
    return max(cores, 1)


def available_memory_bytes(root: Path = _ROOT) -> int:
    """Memory in bytes that this process can still take without swapping or being killed.

    The least of the kernel's ``MemAvailable`` and, for every control group from the process's
    own up to the top, its limit less what its members use. Page cache that the kernel drops
    first (``inactive_file``) does not count as used. Outside Linux: the system's free pages,
    else half the physical memory, else 2 GiB.
    """
    free = _host_available(root)
    if free is None:
        free = _sysconf_available()
    for folder, version in _control_groups(root, "memory"):
        room = _room_v2(folder) if version == 2 else _room_v1(folder)
        if room is not None:
            free = min(free, room)
    return max(free, 0)


def keep_memory() -> bool:
    """Make the C library keep freed memory for this process; True where that took effect.

    By default glibc maps every large block anew and gives it back when freed, so each tensor
    faults in page by page. After this call large blocks come from the heap, and the heap never
    shrinks: the process keeps its peak until it ends, and some more, because aligned blocks leave
    gaps (a loop of convolutions of unequal size came to rest at 1.5 times its peak without this
    call, 720 MB in place of 474, with no time in the kernel where half of it had been). Call it
    before the first large block and before other threads start; it holds for the whole process.

    ``mallopt`` takes an int, and glibc before 2.35 refuses an M_MMAP_THRESHOLD above 32 MiB,
    so the effect of ``MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184``
    is reached by M_MMAP_MAX = 0 (no mapped blocks) and M_TRIM_THRESHOLD = -1 (no trimming).
    M_ARENA_MAX = 1 goes further than those variables: the arena of a second thread is made of
    64 MiB heaps and would map every larger block all the same.

    Does nothing where the C library is not glibc (musl, macOS, Windows).
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 (looked up only to see whether it is glibc)
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: Windows takes no None
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])


class _MallInfo2(ctypes.Structure):
    """mallinfo(3)'s answer."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost",
    )]  # fmt: skip


def kept_memory_bytes() -> int:
    """Memory in bytes that the heap holds and nothing uses: what :func:`keep_memory` kept.

    The system counts it as this process's, so :func:`available_memory_bytes` leaves it out. 0
    where the C library does not tell (glibc before 2.33, musl, macOS, Windows).
    """
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return 0
    mallinfo2.restype = _MallInfo2
    return int(mallinfo2().fordblks)


def _control_groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """The folders (and cgroup version) that limit this process, its own first, then upwards.

    ``/proc/self/cgroup`` names the group, ``/proc/self/mountinfo`` says which part of the
    hierarchy is mounted where: in a container that is often the group itself.
    """
    groups = _own_groups(root)
    for line in _lines(root / "proc/self/mountinfo"):
        fields = line.split()
        try:
            dash = fields.index("-", 6)
            mount_root, mount_point = _unescape(fields[3]), _unescape(fields[4])
            kind, options = fields[dash + 1], fields[dash + 3].split(",")
        except (ValueError, IndexError):
            continue
        if kind == "cgroup2" and "" in groups:
            version, group = 2, groups[""]
        elif kind == "cgroup" and controller in options and controller in groups:
            version, group = 1, groups[controller]
        else:
            continue
        top = root / mount_point.lstrip("/")
        folder = top / _below(group, mount_root)
        # A group outside the mounted part (moved since, or hidden by a namespace): what is
        # mounted is all that can be known.
        while folder != top and not folder.is_dir():
            folder = folder.parent
        while True:
            yield folder, version
            if folder == top:
                break
            folder = folder.parent


def _own_groups(root: Path) -> dict[str, str]:
    """Controller to path of this process's group; version 2 under the empty name."""
    groups = {}
    for line in _lines(root / "proc/self/cgroup"):
        parts = line.split(":", 2)
        if len(parts) == 3:
            for controller in parts[1].split(","):
                groups[controller] = parts[2]
    return groups


def _below(group: str, mount_root: str) -> PurePosixPath:
    """The group's path relative to what is mounted; "." where it lies elsewhere."""
    path = PurePosixPath(group)
    if ".." in path.parts or not path.is_relative_to(mount_root):
        return PurePosixPath(".")
    return path.relative_to(mount_root)


def _quota_v2(folder: Path) -> tuple[int, int] | None:
    fields = _text(folder / "cpu.max").split()
    if len(fields) != 2 or not (fields[0].isdigit() and fields[1].isdigit()):
        return None  # "max 100000": no quota
    quota_us, period_us = int(fields[0]), int(fields[1])
    return (quota_us, period_us) if period_us > 0 else None


def _quota_v1(folder: Path) -> tuple[int, int] | None:
    quota_us = _number(folder / "cpu.cfs_quota_us")  # -1 (no quota) is not a number here
    period_us = _number(folder / "cpu.cfs_period_us")
    return (quota_us, period_us) if quota_us and period_us else None


def _room_v2(folder: Path) -> int | None:
    # Above memory.high a process is not killed but slowed down to a crawl: a limit as well.
    limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
    known = [limit for limit in limits if limit is not None]
    used = _number(folder / "memory.current")
    if not known or used is None:
        return None
    return min(known) - max(used - _table(folder / "memory.stat").get("inactive_file", 0), 0)


def _room_v1(folder: Path) -> int | None:
    limit = _number(folder / "memory.limit_in_bytes")  # nearly 2^63 where there is none
    used = _number(folder / "memory.usage_in_bytes")
    if limit is None or used is None:
        return None
    stat = _table(folder / "memory.stat")
    cache = stat.get("total_inactive_file", stat.get("inactive_file", 0))
    return limit - max(used - cache, 0)


def _host_available(root: Path) -> int | None:
    kilobytes = _table(root / "proc/meminfo").get("MemAvailable:")
    return None if kilobytes is None else kilobytes * 1024


def _sysconf_available() -> int:
    for name, share in (("SC_AVPHYS_PAGES", 1.0), ("SC_PHYS_PAGES", 0.5)):
        try:
            pages = os.sysconf(name)
            if pages > 0:
                return int(pages * os.sysconf("SC_PAGE_SIZE") * share)
        except (AttributeError, ValueError, OSError):
            continue
    return _UNKNOWN_MEMORY_BYTES


def _text(path: Path) -> str:
    """The file's text; empty where it cannot be read: then it limits nothing."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines()


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _table(path: Path) -> dict[str, int]:
    """``name number [unit]`` lines as a dict."""
    rows = (line.split() for line in _lines(path))
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}


def _unescape(field: str) -> str:
    r"""mountinfo writes a blank as ``\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)

"""Limits: machines laid out as folders, figures worked out by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flare_clef import limits

MIB = 1024**2
GIB = 1024**3
NO_LIMIT_V1 = 9223372036854771712
V2_MOUNT = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "3{n} 31 0:3{n} {root} /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{options}\n"


def write(root: Path, files: dict[str, str | int]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n" if isinstance(content, int) else content)
    return root


def meminfo(available_bytes: int) -> str:
    return f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {available_bytes // 1024} kB\n"


@pytest.fixture
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


def v2_machine(root: Path, group: str, mount_root: str = "/") -> Path:
    mount = V2_MOUNT.format(root=mount_root)
    return write(
        root,
        {
            "proc/self/cgroup": f"0::{group}\n",
            "proc/self/mountinfo": f"22 1 8:1 / / rw - ext4 /dev/sda rw\n{mount}",
            "proc/meminfo": meminfo(64 * GIB),
        },
    )


def v1_machine(root: Path, group: str, mount_root: str = "/") -> Path:
    mounts = V1_MOUNT.format(n=1, root=mount_root, name="memory", options="memory")
    mounts += V1_MOUNT.format(n=2, root=mount_root, name="cpu,cpuacct", options="cpu,cpuacct")
    return write(
        root,
        {
            "proc/self/cgroup": (
                f"5:memory:{group}\n4:cpu,cpuacct:{group}\n1:name=systemd:/\n0::/\n"
            ),
            "proc/self/mountinfo": mounts,
            "proc/meminfo": meminfo(64 * GIB),
        },
    )


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 16), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1)],
)
def test_cpu_quota_v2(tmp_path: Path, sixteen_cores: None, quota: str, cores: int) -> None:
    v2_machine(tmp_path, "/")
    write(tmp_path, {"sys/fs/cgroup/cpu.max": quota + "\n"})
    assert limits.usable_cores(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 16), ("350000", 4), ("1000", 1)])
def test_cpu_quota_v1(tmp_path: Path, sixteen_cores: None, quota: str, cores: int) -> None:
    v1_machine(tmp_path, "/docker/abc", mount_root="/docker/abc")
    folder = "sys/fs/cgroup/cpu,cpuacct"
    write(
        tmp_path,
        {f"{folder}/cpu.cfs_quota_us": quota + "\n", f"{folder}/cpu.cfs_period_us": "100000\n"},
    )
    assert limits.usable_cores(tmp_path) == cores


def test_cpu_quota_of_a_parent_counts(tmp_path: Path, sixteen_cores: None) -> None:
    v2_machine(tmp_path, "/slurm/job_7/step_0")
    write(
        tmp_path,
        {
            "sys/fs/cgroup/slurm/job_7/step_0/cpu.max": "max 100000\n",
            "sys/fs/cgroup/slurm/job_7/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/slurm/cpu.max": "1200000 100000\n",
        },
    )
    assert limits.usable_cores(tmp_path) == 3


def test_affinity_below_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    v2_machine(tmp_path, "/")
    write(tmp_path, {"sys/fs/cgroup/cpu.max": "800000 100000\n"})
    assert limits.usable_cores(tmp_path) == 2


def test_without_affinity_or_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert limits.usable_cores(tmp_path) == 10


def test_memory_of_a_host_without_limits(tmp_path: Path) -> None:
    v2_machine(tmp_path, "/user.slice")
    write(
        tmp_path,
        {
            "sys/fs/cgroup/user.slice/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/memory.current": 5 * GIB,
        },
    )
    assert limits.available_memory_bytes(tmp_path) == 64 * GIB


def test_memory_v2_counts_reclaimable_cache_as_free(tmp_path: Path) -> None:
    v2_machine(tmp_path, "/")  # a container with its own namespace: the group is the mount
    write(
        tmp_path,
        {
            "sys/fs/cgroup/memory.max": 4 * GIB,
            "sys/fs/cgroup/memory.current": 3 * GIB,
            "sys/fs/cgroup/memory.stat": f"anon 1\nfile 9\ninactive_file {GIB}\n",
        },
    )
    assert limits.available_memory_bytes(tmp_path) == 4 * GIB - (3 * GIB - GIB)


def test_memory_v2_high_mark_and_parent(tmp_path: Path) -> None:
    v2_machine(tmp_path, "/pod/box")
    write(
        tmp_path,
        {
            "sys/fs/cgroup/pod/box/memory.max": 8 * GIB,
            "sys/fs/cgroup/pod/box/memory.high": 6 * GIB,
            "sys/fs/cgroup/pod/box/memory.current": GIB,
        },
    )
    assert limits.available_memory_bytes(tmp_path) == 5 * GIB
    write(
        tmp_path,
        {
            "sys/fs/cgroup/pod/memory.max": 10 * GIB,
            "sys/fs/cgroup/pod/memory.current": 9 * GIB,  # neighbours in the same pod
        },
    )
    assert limits.available_memory_bytes(tmp_path) == GIB


@pytest.mark.parametrize(
    ("mount_root", "folder"),
    [("/docker/abc", "memory"), ("/", "memory/docker/abc")],
    ids=["in the container", "on the host"],
)
def test_memory_v1(tmp_path: Path, mount_root: str, folder: str) -> None:
    v1_machine(tmp_path, "/docker/abc", mount_root)
    write(
        tmp_path,
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT_V1,
            f"sys/fs/cgroup/{folder}/memory.limit_in_bytes": 2 * GIB,
            f"sys/fs/cgroup/{folder}/memory.usage_in_bytes": 700 * MIB,
            f"sys/fs/cgroup/{folder}/memory.stat": (
                f"inactive_file 0\ntotal_inactive_file {200 * MIB}\n"
            ),
        },
    )
    assert limits.available_memory_bytes(tmp_path) == 2 * GIB - 500 * MIB


def test_group_that_is_not_mounted_falls_back_to_the_mount(tmp_path: Path) -> None:
    v2_machine(tmp_path, "/../elsewhere")
    files: dict[str, str | int] = {
        "sys/fs/cgroup/memory.max": GIB,
        "sys/fs/cgroup/memory.current": 0,
    }
    write(tmp_path, files)
    assert limits.available_memory_bytes(tmp_path) == GIB
    write(tmp_path, {"proc/self/cgroup": "0::/gone/since\n"})
    assert limits.available_memory_bytes(tmp_path) == GIB


def test_use_above_the_limit_leaves_nothing(tmp_path: Path) -> None:
    v2_machine(tmp_path, "/")
    write(
        tmp_path,
        {"sys/fs/cgroup/memory.max": GIB, "sys/fs/cgroup/memory.current": GIB + 1},
    )
    assert limits.available_memory_bytes(tmp_path) == 0


def test_mount_point_with_a_blank(tmp_path: Path) -> None:
    v2_machine(tmp_path, "/")
    line = "30 23 0:26 / /odd\\040place rw - cgroup2 cgroup2 rw\n"
    write(
        tmp_path,
        {
            "proc/self/mountinfo": line,
            "odd place/memory.max": GIB,
            "odd place/memory.current": 0,
        },
    )
    assert limits.available_memory_bytes(tmp_path) == GIB


def test_not_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}

    def sysconf(name: str) -> int:
        if name not in pages:
            raise ValueError("unrecognized configuration name")
        return pages[name]

    monkeypatch.setattr(os, "sysconf", sysconf, raising=False)
    assert limits.available_memory_bytes(tmp_path) == 500 * 4096
    pages["SC_AVPHYS_PAGES"] = 300
    assert limits.available_memory_bytes(tmp_path) == 300 * 4096
    monkeypatch.delattr(os, "sysconf")
    assert limits.available_memory_bytes(tmp_path) == 2 * GIB


def test_this_machine() -> None:
    assert 1 <= limits.usable_cores() <= (os.cpu_count() or 1)
    if Path("/proc/meminfo").exists():
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert 0 < limits.available_memory_bytes() <= total


LIBC = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
"""
FAULTS = f"""{LIBC}
import resource, sys, threading
from flare_clef.limits import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory()
SIZE = 100 << 20
def work():
    for turn in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(SIZE)
        libc.memset(block, 1, SIZE)
        libc.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if sys.argv[2] == "thread":
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
else:
    work()
"""


def is_glibc() -> bool:
    try:
        return "glibc" in os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError, TypeError):
        return False


@pytest.mark.skipif(not is_glibc(), reason="the C library is not glibc")
@pytest.mark.parametrize("where", ["main", "thread"])
def test_keep_memory_spares_the_faults_of_a_second_block(where: str) -> None:
    def second_block(mode: str) -> int:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, mode, where],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        return int(done.stdout)

    assert second_block("keep") < 20
    # Only so does the figure above mean anything; huge pages would lower it to 50 faults.
    assert second_block("plain") >= 50


KEPT = f"""{LIBC}
from flare_clef.limits import keep_memory, kept_memory_bytes
assert keep_memory()
SIZE = 3 << 30  # more than 32 bits hold
before = kept_memory_bytes()
block = libc.malloc(SIZE)
held = kept_memory_bytes()
libc.free(block)
print(before, held, kept_memory_bytes() - SIZE)
"""


@pytest.mark.skipif(not hasattr(limits.ctypes.CDLL(None), "mallinfo2"), reason="no mallinfo2")
def test_memory_that_the_heap_kept_is_free_for_the_next_scan() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    before, held, after = map(int, done.stdout.split())
    assert before < 2**27 and held < 2**27
    assert 0 <= after < 2**27


def test_keep_memory_elsewhere_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Musl:
        pass

    monkeypatch.setattr(limits.ctypes, "CDLL", lambda name: Musl())
    assert limits.keep_memory() is False
    assert limits.kept_memory_bytes() == 0

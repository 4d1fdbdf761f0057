"""What the profiler itself costs, in percent of one core.

    python benchmarks/profile_cost.py [--seconds 10] [--memory-gb 2]

Profiles four programs that sleep: one small process, one that holds much memory (the kernel walks
its pages for every PSS reading), a family of 16, and one that starts programs all the time. For
comparison it times what the plain way would cost per sample: psutil's walk over the tree with a
PSS reading of every process. CPU time of the sampling thread is counted, so that other load on
the machine disturbs little.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time

from flare_clef.resources import ResourceProfiler

GOAL_PERCENT = 1.0
WARM_UP_S = 1.0

MEMORY = """
import mmap, sys, time
size = int(float(sys.argv[1]) * 2**30)
block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
if hasattr(mmap, "MADV_NOHUGEPAGE"):
    block.madvise(mmap.MADV_NOHUGEPAGE)  # as the heap of a program usually is
for page in range(0, size, mmap.PAGESIZE):
    block[page] = 1
"""
FAMILY = """
import subprocess, sys
code = "import time; time.sleep(1000)"
children = [subprocess.Popen([sys.executable, "-S", "-c", code]) for _ in range(15)]
"""
STARTING = """
import subprocess, time
while True:
    subprocess.run(["true"])
    time.sleep(0.02)
"""
READY = "\nprint('ready', flush=True)\n"
SLEEP = "import time; time.sleep(1000)"


def cost(name: str, code: str, arguments: list[str], seconds: float) -> float:
    """Percent of a core that the sampling of this program takes; prints a line."""
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", code, *arguments],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(WARM_UP_S)
        profiler = ResourceProfiler()
        profiler.start(child.pid)
        time.sleep(seconds)
        profiler.stop()
        plain_percent = 100 * plain_sample_s(child.pid) / profiler.interval_s
    finally:
        os.killpg(child.pid, 9)
        child.wait()
    result = profiler.result()
    percent = result["profiler_percent_of_a_core"]
    print(
        f"{name:<34}{max(result['curves']['processes']):>6}{result['maxima']['ram_mb']:>10,.0f} MB"
        f"{percent:>10.2f} %{plain_percent:>16.1f} %"
    )
    return percent


def plain_sample_s(pid: int, times: int = 5) -> float:
    """CPU seconds of one sample with psutil: the tree, CPU times and PSS of each process."""
    import psutil

    before_s = time.thread_time()
    for _ in range(times):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                process.cpu_times()
                process.memory_full_info()
            except psutil.Error:
                continue
    return (time.thread_time() - before_s) / times


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=10, help="per program (default 10)")
    parser.add_argument("--memory-gb", type=float, default=2, help="of the big one (default 2)")
    options = parser.parse_args()
    processes = sum(name.isdigit() for name in os.listdir("/proc"))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {processes} processes, a sample per 0.1 s"
    )
    print(f"{'profiled':<34}{'procs':>6}{'RAM':>13}{'ours':>12}{'psutil and PSS':>18}")
    programs = (
        ("a small process", READY + SLEEP, []),
        (
            f"{options.memory_gb:g} GB in 4 KiB pages",
            MEMORY + READY + SLEEP,
            [str(options.memory_gb)],
        ),
        ("a family of 16", FAMILY + READY + SLEEP, []),
        ("30 programs started per second", READY + STARTING, []),
    )
    worst = max(cost(*program, options.seconds) for program in programs)
    print(f"worst: {worst:.2f} % of a core (goal {GOAL_PERCENT:g} %)")
    return 0 if worst <= GOAL_PERCENT else 1


if __name__ == "__main__":
    sys.exit(main())

"""Cost of one case against the number of slices, and against the memory limit.

    python benchmarks/size.py [--scan SCAN] [--slices 64 160 400 1000] [--limits 1G 700M]

Each row is a whole ``flare-clef predict`` as a process of its own: wall time from the shell to
the file, peak resident memory, and the stages it reports.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

from measuring import predict, scan_of


def row(name: str, scan: Path, folder: Path, *options: str) -> str:
    cost = predict(scan, folder / "labels.nii.gz", *options)
    if cost.code:
        return f"| {name} | refused: {cost.log.strip().splitlines()[-1].split('failed: ')[-1]} |"
    stages = dict(re.findall(r"(read|prepare|network|restore|write) (\d+\.\d)", cost.log))
    cells = " | ".join(stages[s] for s in ("read", "prepare", "network", "restore", "write"))
    return f"| {name} | {cost.seconds:.1f} | {cost.peak_mib:.0f} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scan", type=Path, help="a real scan, its slices repeated as needed")
    parser.add_argument("--slices", type=int, nargs="*", default=[64, 160, 400, 1000])
    parser.add_argument("--limits", nargs="*", default=["2G", "1600M", "1400M", "1300M", "1G"])
    parser.add_argument("--limit-slices", type=int, default=160)
    arguments = parser.parse_args()
    header = "s wall | MiB peak | read s | prepare s | network s | restore s | write s |"
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        print(f"| 512 x 512 x | {header}\n|{' --- |' * 8}")
        for slices in arguments.slices:
            scan = scan_of(slices, folder / "scan.nii.gz", arguments.scan)
            print(row(str(slices), scan, folder), flush=True)
        print(f"\n| --memory-limit | {header}\n|{' --- |' * 8}")
        scan = scan_of(arguments.limit_slices, folder / "scan.nii.gz", arguments.scan)
        for limit in ("none", *arguments.limits):
            options = () if limit == "none" else ("--memory-limit", limit)
            print(row(limit, scan, folder, *options), flush=True)


if __name__ == "__main__":
    main()

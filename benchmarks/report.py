"""What a report costs: seconds and bytes of measurements, page and picture of one case.

    python benchmarks/report.py SCAN LABELS [RUNS]

Wall time counts what other work on the machine takes; processor time doesn't.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from flare_clef.measurements import measure
from flare_clef.report import write_report
from flare_clef.report_pictures import panels, scene
from flare_clef.view import read_pair


def main(scan: Path, label_map: Path, runs: int = 3) -> None:
    image, labels = read_pair(scan, label_map)
    print(f"{' x '.join(map(str, labels.shape[::-1]))} voxels, processor time / wall time in s")
    for _ in range(runs):
        marks = [_now()]
        case = measure(scan.name, labels, image)
        marks.append(_now())
        panels(scene(image, labels))
        marks.append(_now())
        with tempfile.TemporaryDirectory() as folder:
            files = write_report(Path(folder) / "case", labels, image, case, scan)
            marks.append(_now())
            sizes = ", ".join(f"{f.name} {f.stat().st_size / 1e6:.2f} MB" for f in files)
        parts = [
            f"{name} {after[0] - before[0]:.2f}/{after[1] - before[1]:.2f}"
            for name, before, after in zip(
                ("measurements", "pictures alone", "report with pictures"),
                marks[:-1],
                marks[1:],
                strict=True,
            )
        ]
        print(f"{', '.join(parts)}; {sizes}", flush=True)


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 3)

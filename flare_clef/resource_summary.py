"""What the samples of a resource profile come to: maxima, areas, stages, the tolerance.

Pure functions on columns of numbers; standard library only.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLUMNS = (
    "time_s",
    "processes",
    "ram_mb",
    "cpu_percent",
    "machine_cpu_percent",
    "gpu_memory_mb",
    "gpu_percent",
)
"""Of each sample. Both CPU columns are percent of all cores of the machine; the first counts
the process tree, the second everything that runs, as the challenge does."""

MEASURED = COLUMNS[2:]
"""The columns that have a maximum and an area."""

GPU_TOLERANCE_MB = 2048
"""FLARE22: GPU memory below this counts as equal."""


@dataclass
class Stage:
    """A stretch of the profile, in seconds since its start; ``end_s`` is None while it runs."""

    case: str
    name: str
    start_s: float
    end_s: float | None


def summarise(
    columns: Mapping[str, Sequence[float]], stages: Sequence[Stage], wall_s: float
) -> dict[str, Any]:
    """Figures of a profile.

    ``columns`` has the ``COLUMNS``, nan where nothing was measured. Returned:

    - ``maxima``: per measured column, None where nothing was measured.
    - ``areas``: the sum of each sample times the time since the one before (MB·s, %·s). With
      every sample in time that is the challenge's sum times 0.1 s; a late one loses nothing.
    - ``tolerance``: what the challenge's 2048 MB of GPU memory says.
    - ``stages``: each with seconds, maxima (of the samples within it; None in a stage without
      any) and areas.
    - ``cases``: per case the seconds from its first stage to the end of its last, maxima over
      its stages and sums of their areas. Overlapping stages each count in full.
    """
    maxima = {name: _maximum(columns[name]) for name in MEASURED}
    rows = [_stage_row(columns, stage, wall_s) for stage in stages]
    return {
        "maxima": maxima,
        "areas": _areas(columns, 0.0, math.inf),
        "tolerance": _tolerance(maxima["gpu_memory_mb"]),
        "stages": rows,
        "cases": _case_rows(rows),
    }


def _areas(
    columns: Mapping[str, Sequence[float]], start_s: float, end_s: float
) -> dict[str, float | None]:
    """Areas between two moments; a sample stands for the time since the one before it."""
    times = columns["time_s"]
    parts: dict[str, list[float]] = {name: [] for name in MEASURED}
    for k in range(bisect_left(times, start_s), min(bisect_right(times, end_s) + 1, len(times))):
        since_s = times[k - 1] if k > 0 else 0.0
        overlap_s = min(times[k], end_s) - max(since_s, start_s)
        for name in MEASURED:
            if not math.isnan(columns[name][k]):
                parts[name].append(columns[name][k] * overlap_s)
    return {
        _area_name(name): round(math.fsum(values), 2) if values else None
        for name, values in parts.items()
    }


def _stage_row(
    columns: Mapping[str, Sequence[float]], stage: Stage, wall_s: float
) -> dict[str, Any]:
    end_s = wall_s if stage.end_s is None else stage.end_s
    times = columns["time_s"]
    first, past = bisect_left(times, stage.start_s), bisect_right(times, end_s)
    return {
        "case": stage.case,
        "stage": stage.name,
        "start_s": round(stage.start_s, 3),
        "end_s": round(end_s, 3),
        "seconds": round(end_s - stage.start_s, 3),
        "samples": past - first,
        "maxima": {name: _maximum(columns[name][first:past]) for name in MEASURED},
        "areas": _areas(columns, stage.start_s, end_s),
    }


def _case_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    by_case: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    cases = []
    for case, members in by_case.items():
        start_s = min(row["start_s"] for row in members)
        end_s = max(row["end_s"] for row in members)
        cases.append(
            {
                "case": case,
                "start_s": start_s,
                "end_s": end_s,
                "seconds": round(end_s - start_s, 3),
                "maxima": {
                    name: max(_known(row["maxima"][name] for row in members), default=None)
                    for name in MEASURED
                },
                "areas": {
                    area: round(math.fsum(known), 2) if known else None
                    for area in map(_area_name, MEASURED)
                    for known in [_known(row["areas"][area] for row in members)]
                },
            }
        )
    return cases


def _tolerance(gpu_maximum_mb: float | None) -> dict[str, Any]:
    within: bool | None
    if gpu_maximum_mb is None:
        within, verdict = None, "no GPU memory was measured: nothing to compare"
    elif gpu_maximum_mb < GPU_TOLERANCE_MB:
        within = True
        verdict = f"{gpu_maximum_mb:,.0f} MB at most: below {GPU_TOLERANCE_MB} MB counts as equal"
    else:
        within = False
        verdict = (
            f"{gpu_maximum_mb:,.0f} MB at most: "
            f"{gpu_maximum_mb - GPU_TOLERANCE_MB:,.0f} MB above the tolerance, its area counts"
        )
    return {"gpu_memory_mb": GPU_TOLERANCE_MB, "within": within, "verdict": verdict}


def _area_name(column: str) -> str:
    return f"{column}_s"


def _maximum(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return round(max(known), 2) if known else None


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]

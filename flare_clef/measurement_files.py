"""``measurements.csv`` and ``measurements.json``: what was measured of each case of a batch."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flare_clef.errors import UserError
from flare_clef.measurements import CaseMeasurement, OrganMeasurement
from flare_clef.paths import checksum
from flare_clef.version import __version__
from flare_clef.writing import write_bytes

LABELS_CHECKSUM = "labels_sha256"
"""Which label map the figures are of."""
_COLUMNS = (
    "case", "organ", "label", "volume_ml", "hu_mean", "hu_sd", "hu_p05", "hu_p25", "hu_median",
    "hu_p75", "hu_p95", "box_width_mm", "box_depth_mm", "box_height_mm", "parts",
    "largest_part_percent", "touches_edge", "confidence", "warnings", "case_warnings",
)  # fmt: skip
_NAME = re.compile(r"measurements(\.\d+-of-\d+)?\.json")


def _row(case: Mapping[str, Any], organ: Mapping[str, Any]) -> dict[str, Any]:
    row = {**organ, "case": case["case"], "case_warnings": "; ".join(case["warnings"])}
    width, depth, height = row.pop("box_mm") or (None, None, None)
    row.update(box_width_mm=width, box_depth_mm=depth, box_height_mm=height)
    row["touches_edge"] = " ".join(row["touches_edge"])
    row["warnings"] = "; ".join(row["warnings"])
    return row


def _plain(organ: OrganMeasurement) -> dict[str, Any]:
    """As JSON gives it back: lists, no tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(organ).items()}


def _table(cases: Iterable[Mapping[str, Any]]) -> str:
    """The text of the ``.csv``."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for one in cases:
        writer.writerows(_row(one, organ) for organ in one["organs"])
    return text.getvalue()


def _earlier(path: Path) -> list[dict[str, Any]]:
    """The cases of ``path`` whose labels are there, and have not been written anew since."""
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
        _table(cases)  # fails for what is not of this module
        return [c for c in cases if isinstance(c["case"], str) and not _is_stale(c, path.parent)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not readable as earlier measurements; move it away") from None


def _is_stale(case: Mapping[str, Any], folder: Path) -> bool:
    # By the name: the folder may have been moved, or be mounted elsewhere.
    if "labels" not in case:
        return False
    labels, known = folder / Path(case["labels"]).name, case.get(LABELS_CHECKSUM)
    return not labels.is_file() or (known is not None and checksum(labels) != known)


class MeasurementFiles:
    """The two files of a batch, whole after every case.

    ``part`` is a shard, ``K/N``, with files of its own. With ``keep``, what earlier runs measured
    stays, and what shards measured is known, but for cases whose labels are gone or others by now.
    Raises UserError for a file of other content.
    """

    def __init__(self, folder: Path, *, part: str = "", keep: bool = False) -> None:
        stem = f"measurements{'.' + part.replace('/', '-of-') if part else ''}"
        self.csv, self.json = folder / f"{stem}.csv", folder / f"{stem}.json"
        self._part = part
        self._cases: dict[str, dict[str, Any]] = {}
        self._others: dict[str, dict[str, Any]] = {}
        if keep:
            self._cases = {case["case"]: case for case in _earlier(self.json)}
            others = sorted(
                path
                for path in folder.glob("measurements*.json")
                if _NAME.fullmatch(path.name) and path != self.json
            )
            self._others = {c["case"]: c for path in others for c in _earlier(path)}

    def knows(self, case: str, labels: Path) -> bool:
        """Whether a case of this name was measured by a label map of this one."""
        found = self._cases.get(case) or self._others.get(case)
        return found is not None and Path(found.get("labels", labels)).name == labels.name

    def gather(self) -> None:
        """Takes over what shards measured, unless this is one; what is not kept leaves the files.

        Before the first case, so that a run whose cases all fail leaves no figures of another.
        """
        if not self._part:
            self._cases = {**self._others, **self._cases}
        if self._cases or self.json.exists():
            self._write()

    def add(
        self, case: CaseMeasurement, facts: Mapping[str, Any], of_scan: Iterable[str] = ()
    ) -> None:
        """Adds a case with ``facts`` about it (input, labels, spacing) and writes both files.

        ``of_scan``: warnings of who read the scan, which go before those of the labels.
        """
        self._cases[case.case] = {"case": case.case, **facts,
                                  "warnings": [*of_scan, *case.warnings],
                                  "organs": [_plain(organ) for organ in case.organs]}  # fmt: skip
        self._write()

    def _write(self) -> None:
        whole = {"flare_clef": __version__, "cases": list(self._cases.values())}
        _renew(self.json, json.dumps(whole, indent=1).encode())
        _renew(self.csv, _table(self._cases.values()).encode())


def _renew(path: Path, content: bytes) -> None:
    """Writes ``path`` unless it holds that already: a folder may be read-only by now."""
    if not path.is_file() or path.read_bytes() != content:
        write_bytes(path, content)

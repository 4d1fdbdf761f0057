"""What is written for a case: its labels, and what was asked for beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flare_clef.formats import itksnap_labels, slicer_colours
from flare_clef.images import Image
from flare_clef.measurement_files import LABELS_CHECKSUM, MeasurementFiles
from flare_clef.measurements import CaseMeasurement, measure
from flare_clef.organs import ORGANS
from flare_clef.paths import behind_link, checksum
from flare_clef.scan_files import strip_suffix
from flare_clef.writing import write_bytes, write_labels

if TYPE_CHECKING:
    from flare_clef.jobs import Job
    from flare_clef.segmenter import Segmentation


@dataclass
class Extras:
    """The outputs of a batch; :meth:`write` is called once a case, from one thread."""

    organs: Collection[int] | None = None
    """Label values that were asked for; None means all."""
    measurements: MeasurementFiles | None = None
    report: bool = False
    split: bool = False
    largest: bool = False
    probabilities: bool = False

    @property
    def needs_confidence(self) -> bool:
        """Whether anything here tells how sure the network is."""
        return self.report or self.measurements is not None

    def write(self, job: Job, found: Segmentation, image: Image) -> tuple[str, ...]:
        """Writes everything of one case; returns warnings for it. Raises UserError.

        The labels come after what lies beside them, and older ones go first: where they are,
        all files of the case are of one run, whenever that was broken off.
        """
        if self.largest:
            from flare_clef.largest_part import keep_largest

            keep_largest(found.labels)
        stem = job.target.with_name(job.case)
        # Masks that lie beside no labels may be somebody's own.
        done_before = behind_link(job.target).exists()
        if self.split or self.probabilities or self.report:
            with contextlib.suppress(OSError):  # what is in the way is told when they are written
                behind_link(job.target).unlink(missing_ok=True)
        if self.split:
            self._write_split(stem, found.labels, image, job.target, drop_others=done_before)
        warnings: tuple[str, ...] = ()
        if self.probabilities:
            warnings = _write_probabilities(stem, found, image)
        if not self.needs_confidence:
            self._write_labels(job, found.labels, image)
            return warnings
        case = measure(
            job.case, found.labels, image, organs=self.organs, confidence=found.confidence
        )
        if self.report:
            self._write_report(stem, found.labels, image, case, job.source)
        self._write_labels(job, found.labels, image)
        if self.measurements is not None:
            self.measurements.add(case, _facts(job, image), found.warnings)
        return (*warnings, *case.all_warnings())

    def _write_labels(self, job: Job, labels: np.ndarray, image: Image) -> None:
        if job.target.suffix == ".dcm":
            from flare_clef.dicom_seg import segmentation_file

            write_bytes(job.target, segmentation_file(labels, job.source, self.organs))
        else:
            write_labels(labels, image, job.target)

    def _write_split(
        self, stem: Path, labels: np.ndarray, image: Image, target: Path, *, drop_others: bool
    ) -> None:
        """One mask a file, 0 and 1, in a folder called as the case; absent organs are empty.

        ``drop_others``: masks of organs that were not asked for are an earlier run's, and go.
        """
        suffix = strip_suffix(target.name)[1] or ".nii.gz"
        for organ in ORGANS:
            path = stem / f"{organ.name}{suffix}"
            if self.organs is None or organ.index in self.organs:
                mask = (labels == organ.index).view(np.uint8)
                write_labels(mask, image, path, named=False)
            elif drop_others:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def _write_report(
        self, stem: Path, labels: np.ndarray, image: Image, case: CaseMeasurement, source: Path
    ) -> None:
        from flare_clef.report import write_report

        write_report(stem, labels, image, case, source)


def _write_probabilities(stem: Path, found: Segmentation, image: Image) -> tuple[str, ...]:
    """The file of scores; a warning where there are none, and none of an earlier run then."""
    path = stem.with_name(f"{stem.name}.probabilities.npz")
    if found.logits is None or found.placement is None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return ("no probabilities: nothing of the scan went through the network",)
    from flare_clef.probabilities import probabilities_file

    write_bytes(path, probabilities_file(found.logits, found.placement, image))
    return ()


def _facts(job: Job, image: Image) -> dict[str, object]:
    return {
        "input": str(job.source),
        "labels": str(job.target),
        LABELS_CHECKSUM: checksum(job.target),
        "spacing_mm": list(image.spacing_mm),
    }


def write_label_tables(folder: Path) -> None:
    """``labels.itksnap.txt`` and ``labels.ctbl`` for ITK-SNAP and 3D Slicer."""
    write_bytes(folder / "labels.itksnap.txt", itksnap_labels().encode())
    write_bytes(folder / "labels.ctbl", slicer_colours().encode())

"""What is written for a case: its labels, and what was asked for beside them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flare_clef.images import Image, write_labels
from flare_clef.measurements import MeasurementFiles, measure

if TYPE_CHECKING:
    from flare_clef.batch import Job
    from flare_clef.segmenter import Segmentation


@dataclass
class Extras:
    """The outputs of a batch; :meth:`write` is called once a case, from one thread."""

    organs: Collection[int] | None = None
    """Label values that were asked for; None means all."""
    measurements: MeasurementFiles | None = None
    probabilities: bool = False

    @property
    def needs_confidence(self) -> bool:
        """Whether anything here tells how sure the network is."""
        return self.measurements is not None

    def write(self, job: Job, found: Segmentation, image: Image) -> tuple[str, ...]:
        """Writes everything of one case; returns warnings for it. Raises UserError."""
        write_labels(found.labels, image, job.target)
        if self.measurements is None:
            return ()
        case = measure(
            job.case, found.labels, image, organs=self.organs, confidence=found.confidence
        )
        facts = {
            "input": str(job.source),
            "labels": str(job.target),
            "spacing_mm": list(image.spacing_mm),
        }
        self.measurements.add(case, facts)
        return tuple(case.all_warnings())

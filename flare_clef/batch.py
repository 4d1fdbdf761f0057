"""Many scans: one is read and one written while another is computed.

A case that cannot be read or written is an entry in the result, never the end of the batch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from flare_clef.errors import UserError, one_line
from flare_clef.images import read_image
from flare_clef.jobs import Job
from flare_clef.organs import ORGAN_BY_NAME

if TYPE_CHECKING:
    from flare_clef.extras import Extras
    from flare_clef.images import Image
    from flare_clef.segmenter import Segmentation, Segmenter


@dataclass
class CaseResult:
    """What became of one job."""

    job: Job
    status: str = "failed"
    """``done``, ``skipped`` or ``failed``."""
    error: str = ""
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of ``read``, ``prepare``, ``network``, ``restore``, ``write``."""
    volume_ml: dict[str, float] = field(default_factory=dict)


@dataclass
class _Read:
    job: Job
    image: Image | None
    error: str
    seconds: float


class Reader:
    """Reads the next scan while the present one is computed."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = list(jobs)
        self._ready: queue.Queue[_Read] = queue.Queue(maxsize=1)
        # One scan waits at most: the slot is asked for before reading, not after.
        self._slots = threading.Semaphore(1)
        threading.Thread(target=self._run, name="reader", daemon=True).start()

    def _run(self) -> None:
        for job in self._jobs:
            self._slots.acquire()
            began = time.perf_counter()
            image, error = None, ""
            try:
                image = read_image(job.source)
            except UserError as problem:
                error = str(problem)
            except MemoryError:
                error = f"{job.source}: too large for the memory that is free"
            except Exception as problem:  # a file must never end the batch
                error = f"{job.source}: cannot be read ({one_line(problem)})"
            self._ready.put(_Read(job, image, error, time.perf_counter() - began))

    def __iter__(self) -> Iterator[_Read]:
        for _ in self._jobs:
            item = self._ready.get()
            self._slots.release()
            yield item


class _Writer:
    """Writes labels while the next scan is computed; results come back when they are on disk."""

    def __init__(self, on_result: Callable[[CaseResult], None]) -> None:
        self._queue: queue.Queue[Callable[[], CaseResult] | None] = queue.Queue(maxsize=1)
        self._on_result = on_result
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], CaseResult]) -> None:
        """Raises what ``on_result`` raised for an earlier case."""
        self._check()
        self._queue.put(work)

    def finish(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            result = work()
            work = None  # it holds scan and labels, which must not wait for the next case
            # Whoever waits to submit must get through, so the loop goes on whatever happens.
            if self._failure is None:
                try:
                    self._on_result(result)
                except Exception as failure:
                    self._failure = failure


def run(
    jobs: Sequence[Job],
    reader: Reader,
    segmenter: Segmenter,
    *,
    organs: Sequence[str] | None,
    on_stage: Callable[[Job, str], None],
    on_result: Callable[[CaseResult], None],
    measure_volumes: bool = False,
    extras: Extras | None = None,
) -> None:
    """Segments what ``reader`` reads; ``on_result`` hears of every job, from one thread.

    ``extras`` is what is written beside the labels.
    """
    writer = _Writer(on_result)
    for number, item in enumerate(reader, start=1):
        result = CaseResult(item.job, seconds={"read": round(item.seconds, 3)})
        if item.image is None:
            result.error = item.error
            writer.submit(partial(_as_it_is, result))
            continue
        try:
            found = segmenter.segment(
                item.image,
                organs=organs,
                on_stage=partial(on_stage, item.job),
                with_confidence=extras is not None and extras.needs_confidence,
                with_logits=extras is not None and extras.probabilities,
                # The next scan, of which nothing is known yet, as large as this one.
                beside_bytes=item.image.array.nbytes if number < len(jobs) else 0,
            )
        except UserError as problem:
            result.error = str(problem)
        except MemoryError:
            result.error = f"{item.job.source}: not enough memory; set --memory-limit"
        except Exception as problem:  # of torch, or one that nobody foresaw
            advice = "; use --device cpu" if segmenter.device.type != "cpu" else ""
            reason = one_line(problem)
            result.error = f"{item.job.source}: cannot be segmented ({reason}){advice}"
        if result.error:
            writer.submit(partial(_as_it_is, result))
            continue
        on_stage(item.job, "write")
        measured = (organs or tuple(ORGAN_BY_NAME)) if measure_volumes else ()
        writer.submit(partial(_write, result, found, item.image, measured, extras))
        del found, item
    writer.finish()


def _as_it_is(result: CaseResult) -> CaseResult:
    return result


def _write(
    result: CaseResult,
    found: Segmentation,
    image: Image,
    measured: Sequence[str],
    extras: Extras | None,
) -> CaseResult:
    """Writes one case; ``measured`` are the organs whose volumes the result tells."""
    from flare_clef.metrics import volumes_ml
    from flare_clef.writing import write_labels

    began = time.perf_counter()
    result.warnings = found.warnings
    result.seconds.update(found.seconds)
    try:
        if extras is None:
            write_labels(found.labels, image, result.job.target)
        else:
            result.warnings += extras.write(result.job, found, image)
        if measured:
            volumes = volumes_ml(found.labels, image.spacing_mm, image.direction)
            result.volume_ml = {name: round(volumes[name], 3) for name in measured}
        result.status = "done"
    except UserError as problem:
        result.error = str(problem)
    except Exception as problem:  # the writer must outlive any one case
        result.error = f"{result.job.target}: cannot be written ({one_line(problem)})"
    result.seconds["write"] = round(time.perf_counter() - began, 3)
    return result

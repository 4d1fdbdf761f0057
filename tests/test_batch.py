"""That nothing ends a batch but its own end; bad cases among good ones: test_cli.py."""

from __future__ import annotations

import time
import weakref
from functools import partial
from pathlib import Path

import pytest
from conftest import body_hu, write_scan

from flare_clef import batch
from flare_clef.batch import CaseResult, _Writer
from flare_clef.jobs import Job
from flare_clef.segmenter import Segmenter


def test_a_case_that_is_written_is_let_go():
    """Scan and labels must not wait in memory for the next case."""

    class Scan:
        pass

    job, scan = Job(Path("a"), Path("b")), Scan()
    there = weakref.ref(scan)
    writer = _Writer(lambda result: None)
    writer.submit(partial(lambda held: CaseResult(job), scan))
    del scan
    for _ in range(500):
        if there() is None:
            break
        time.sleep(0.01)
    assert there() is None
    writer.finish()


def test_what_hears_of_results_may_fail_and_nobody_waits_for_ever():
    def broken(result: CaseResult) -> None:
        raise BrokenPipeError

    job = Job(Path("a"), Path("b"))
    writer = _Writer(broken)
    with pytest.raises(BrokenPipeError):
        for _ in range(10):
            writer.submit(lambda: CaseResult(job))
            time.sleep(0.01)
    with pytest.raises(BrokenPipeError):
        writer.finish()


def test_what_nobody_foresaw_fails_one_case_alone(tmp_path, tiny_weights, monkeypatch):
    jobs = []
    for name in "abc":
        scan = write_scan(tmp_path / f"{name}.nii.gz", body_hu())
        jobs.append(Job(scan, tmp_path / "out" / scan.name))
    segmenter = Segmenter(tiny_weights, precision="fp32")
    segment = segmenter.segment

    def broken(image, **options):
        if image.source == jobs[1].source:
            raise ValueError("a stride of -1")
        return segment(image, **options)

    monkeypatch.setattr(segmenter, "segment", broken)
    results: list[CaseResult] = []
    batch.run(
        jobs,
        batch.Reader(jobs),
        segmenter,
        organs=["liver"],
        on_stage=lambda job, stage: None,
        on_result=results.append,
        measure_volumes=True,
    )
    assert [result.status for result in results] == ["done", "failed", "done"]
    assert results[1].error == f"{jobs[1].source}: cannot be segmented (a stride of -1)"
    # Organs that nobody asked for are not told as 0 ml.
    assert results[0].volume_ml.keys() == {"liver"}

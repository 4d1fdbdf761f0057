"""That nothing ends a batch but its own end; bad cases among good ones: test_cli.py."""

from __future__ import annotations

import time
import weakref
from functools import partial
from pathlib import Path

import pytest

from flare_clef.batch import CaseResult, _Writer
from flare_clef.jobs import Job


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

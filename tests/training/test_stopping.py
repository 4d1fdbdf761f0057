"""Signals that end a training after its step."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from flare_clef.training.stopping import SignalNote, Stopped


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_first_is_noted_second_acts_as_before(signum: int, code: int) -> None:
    heard: list[int] = []
    before = signal.signal(signum, lambda number, frame: heard.append(number))
    try:
        with SignalNote() as note:
            assert note.number == 0
            os.kill(os.getpid(), signum)
            assert (note.number, heard) == (signum, [])
            os.kill(os.getpid(), signum)
            assert heard == [signum]
        os.kill(os.getpid(), signum)
        assert heard == [signum, signum]
    finally:
        signal.signal(signum, before)
    assert Stopped(note.number).exit_code == code


def test_another_thread_leaves_the_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    during: list[object] = []

    def enter() -> None:
        with SignalNote() as note:
            during.extend([note.number, signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert during == [0, before]
    assert signal.getsignal(signal.SIGTERM) is before

"""Ctrl-C and SIGTERM end a run after its step, when the checkpoint is written."""

from __future__ import annotations

import signal
import threading
from typing import Any

KINDS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A signal ended the run after its step; the checkpoint is written."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class SignalNote:
    """Notes the signals that come while it is entered; a second one of a kind acts at once.

    Only the main thread may handle signals: in another one nothing is noted.
    """

    number = 0
    """Of the signal that came last; 0 before the first."""

    def __enter__(self) -> SignalNote:
        self._former: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for kind in KINDS:
                self._former[kind] = signal.signal(kind, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for kind, handler in self._former.items():
            signal.signal(kind, handler)

    def _note(self, signum: int, frame: object) -> None:
        self.number = signum
        signal.signal(signum, self._former[signal.Signals(signum)])

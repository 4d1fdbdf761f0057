"""What a person sees while a network is trained: loss, step time, time left.

A bar on a terminal; elsewhere (a log file, a batch system) a line now and then.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from statistics import fmean
from typing import Any

_RECENT = 20
"""Steps whose mean time and loss are shown: stages on larger grids change the pace."""
_LINE_EVERY_SECONDS = 60.0


class TrainingProgress:
    """Shows the steps of a run on stderr. ``step`` is called with each record of the log."""

    def __init__(
        self, steps: int, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps, self._quiet, self._clock = steps, quiet, clock
        self._live = sys.stderr.isatty() and not quiet
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._losses: deque[float] = deque(maxlen=_RECENT)
        self._last: float | None = None
        self._line_due = -math.inf

    def step(self, record: dict[str, Any]) -> None:
        """``record`` holds ``step`` (from 0), ``loss`` (None or not finite if it was skipped)."""
        now = self._clock()
        # From the end of one step to the next: validation and checkpoints count as well.
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now
        loss = record.get("loss")
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)
        done = record["step"] + 1
        if self._live:
            self._draw(done)
        elif not self._quiet and (now >= self._line_due or done == self._steps):
            print(self._text(done), file=sys.stderr, flush=True)
            self._line_due = now + _LINE_EVERY_SECONDS

    def line(self, text: str) -> None:
        """A line that stays above the bar."""
        if self._quiet:
            return
        self._clear()
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._clear()

    def _text(self, done: int) -> str:
        parts = [f"step {done}/{self._steps}"]
        if self._losses:
            parts.append(f"loss {fmean(self._losses):.3f}")
        if self._seconds:
            pace = fmean(self._seconds)
            parts.append(f"{pace:.2f} s a step")
            parts.append(f"{duration((self._steps - done) * pace)} left")
        return "  ".join(parts)

    def _draw(self, done: int) -> None:
        filled = round(20 * done / max(1, self._steps))
        text = f"{'━' * filled}{'─' * (20 - filled)} {self._text(done)}"
        width = shutil.get_terminal_size().columns
        sys.stderr.write("\r\033[K" + text[: max(10, width - 1)])
        sys.stderr.flush()

    def _clear(self) -> None:
        if self._live:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"

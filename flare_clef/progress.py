"""What a person sees while cases are computed: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import threading
import time


class Progress:
    """Cases done, the stage of the present one and seconds a case, on stderr."""

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self.total, self.done, self.quiet = total, 0, quiet
        self._live = sys.stderr.isatty() and not quiet
        self._began = time.monotonic()
        self._doing = ""
        self._lock = threading.Lock()

    def stage(self, case: str, stage: str) -> None:
        """``case`` has come to ``stage``."""
        with self._lock:
            self._doing = f"{case}: {stage}"
            self._draw()

    def line(self, text: str, *, error: bool = False) -> None:
        """A line that stays; errors are printed even when quiet."""
        if self.quiet and not error:
            return
        with self._lock:
            self._clear()
            print(text, file=sys.stderr, flush=True)
            self._draw()

    def case_done(self) -> None:
        with self._lock:
            self.done += 1
            self._draw()

    def close(self) -> None:
        with self._lock:
            self._clear()
            self._live = False

    def _clear(self) -> None:
        if self._live:
            sys.stderr.write("\r\033[K")

    def _draw(self) -> None:
        if not self._live:
            return
        width = shutil.get_terminal_size().columns
        filled = round(20 * self.done / max(1, self.total))
        pace = ""
        if self.done:
            pace = f"  {(time.monotonic() - self._began) / self.done:.1f} s a case"
        text = f"{'━' * filled}{'─' * (20 - filled)} {self.done}/{self.total}{pace}  {self._doing}"
        sys.stderr.write("\r\033[K" + text[: max(10, width - 1)])
        sys.stderr.flush()

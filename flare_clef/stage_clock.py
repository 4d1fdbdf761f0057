"""How long each stage of a case takes."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """Seconds of each stage, from its beginning to that of the next."""

    def __init__(self, on_stage: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._on_stage = on_stage
        self._running: tuple[str, float] | None = None

    def begin(self, stage: str) -> None:
        self.end()
        self._running = (stage, time.perf_counter())
        if self._on_stage is not None:
            self._on_stage(stage)

    def end(self) -> None:
        if self._running is not None:
            stage, began = self._running
            seconds = self.seconds.get(stage, 0.0) + time.perf_counter() - began
            self.seconds[stage] = round(seconds, 3)
            self._running = None

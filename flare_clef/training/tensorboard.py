"""TensorBoard event files of a run: an extra, written where the ``tensorboard`` package is.

``metrics.jsonl`` is the record that everything else is made from; this is another view of it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from flare_clef.organs import ORGANS


class TensorBoardLog:
    """Event files under ``folder``; without the package every call does nothing."""

    def __init__(self, folder: Path, resumed_at: int = 0) -> None:
        """``resumed_at``: the step a resumed run goes on from; TensorBoard forgets later ones."""
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        purge = resumed_at + 1 if resumed_at else None
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def step(self, record: dict[str, Any]) -> None:
        """A record of ``metrics.jsonl``: its numbers under ``train/``, soft Dice by organ."""
        if self._writer is None:
            return
        step = record["step"] + 1
        for name, value in record.items():
            if _is_figure(value) and name != "step":
                self._writer.add_scalar(f"train/{name}", value, step)
        for organ, value in zip(ORGANS, record.get("dice") or (), strict=False):
            if _is_figure(value):
                self._writer.add_scalar(f"train_dice/{organ.name}", value, step)

    def validation(self, step: int, means: dict[str, float]) -> None:
        """Mean DSC per organ (and ``mean``) after ``step`` steps, under ``validation/``."""
        if self._writer is None:
            return
        for name, value in means.items():
            if _is_figure(value):
                self._writer.add_scalar(f"validation/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

"""Loss, pace and time left of a training, on a terminal and in a log."""

from __future__ import annotations

import sys

import pytest

from flare_clef.training.progress import TrainingProgress, duration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(progress: TrainingProgress, clock: Clock, seconds: list[float], losses: list) -> None:
    for step, (took, loss) in enumerate(zip(seconds, losses, strict=True)):
        clock.now += took
        progress.step({"step": step, "loss": loss})


def test_a_log_gets_a_line_a_minute_and_the_last_step(capsys):
    clock = Clock()
    run(TrainingProgress(5, clock=clock), clock, [1, 20, 50, 10, 10], [0.4, 0.2, None, 0.3, 0.1])
    lines = capsys.readouterr().err.splitlines()
    # Steps 1, 3 (70 s later) and 5. Means: 35 s of two gaps, 22.5 s of four.
    assert lines == [
        "step 1/5  loss 0.400",
        "step 3/5  loss 0.300  35.00 s a step  1 min left",
        "step 5/5  loss 0.250  22.50 s a step  0 s left",
    ]


def test_the_pace_is_that_of_the_last_twenty_steps(capsys):
    clock = Clock()
    run(TrainingProgress(100, clock=clock), clock, [1.0] * 30 + [61.0] * 20, [1.0] * 50)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "step 50/100  loss 1.000  61.00 s a step  51 min left"


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    clock = Clock()
    progress = TrainingProgress(4, clock=clock)
    run(progress, clock, [2, 2], [0.5, 0.5])
    shown = capsys.readouterr().err
    assert shown.count("\r\033[K") == 2 and "\n" not in shown
    assert "━" * 10 + "─" * 10 + " step 2/4  loss 0.500  2.00 s a step  4 s left" in shown


def test_quiet_says_nothing(capsys):
    clock = Clock()
    progress = TrainingProgress(2, quiet=True, clock=clock)
    run(progress, clock, [1, 1], [1.0, 1.0])
    progress.line("validation")
    progress.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (61, "1 min"), (3599, "1 h 00 min"), (11_100, "3 h 05 min")],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text

"""In which order steps see the cases."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from flare_clef.errors import UserError
from flare_clef.training.batches import draw_order
from flare_clef.training.finetuning_plan import FinetuningPlan, Stage

CASES = [SimpleNamespace(case=SimpleNamespace(name=name)) for name in ("a", "b", "c")]


def order(steps: int = 100, **repeats: float) -> list[int]:
    plan = FinetuningPlan(stages=(Stage(32, steps, (1, 1)),), repeats=repeats)
    return draw_order(plan, CASES)  # type: ignore[arg-type]


def test_three_is_three_times_as_often_as_one():
    drawn = order(a=3, b=0.5)
    # 3 to 0.5 to 1 of 100, but for what the rounds at both ends leave.
    assert [drawn.count(k) for k in range(3)] == pytest.approx([66.7, 11.1, 22.2], abs=1.5)
    thirds = [drawn[start : start + 33].count(0) for start in (0, 33, 66)]
    assert max(thirds) - min(thirds) <= 2
    assert drawn != order(a=1, b=0.5)


def test_only_the_ratio_counts():
    assert order(a=2) == order(b=0.5, c=0.5)
    assert order(a=4, b=4, c=4) == order()


def test_an_endless_number_is_refused():
    with pytest.raises(UserError, match=r"finetune.repeats: not a finite number"):
        order(a=math.inf)


def test_a_share_too_small_for_single_precision_ends():
    assert sorted(order(steps=3, a=1e-8, b=1e-8, c=1e-8)) == [0, 1, 2]

"""The recipe's table ``[propagate]``: training cases get an organ that they have no labels for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flare_clef.errors import UserError
from flare_clef.limits import usable_cores
from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.training.cases import Case
from flare_clef.training.datasets import read_dataset, read_json


@dataclass(frozen=True)
class PropagationSettings:
    """Which organ, and from where."""

    atlases: str = ""
    """Folder of label maps that have the organ, relative to the recipe."""
    organ: str = ""


def propagate_onto(
    cases: Sequence[Case],
    settings: PropagationSettings,
    base: Path,
    output: Path,
    say: Callable[[str], None],
) -> None:
    """Writes ``cases`` with labels of the organ to ``output``, as ``train propagate`` does.

    Bad atlases and cases are told to ``say``; raises UserError where no atlas is of use.
    """
    from flare_clef.training.propagation import propagate

    lacking = [case for case in cases if settings.organ not in case.organs]
    if not lacking:
        return
    say(f"propagating the {settings.organ} to {len(lacking)} case(s)")
    organ = ORGAN_BY_NAME[settings.organ]
    result = propagate(base / settings.atlases, lacking, organ, output, usable_cores())
    for problem in result.problems:
        say(f"warning: {problem}")
    if not result.cases:
        say(f"warning: propagate: no case could be given a {settings.organ}; all stay as they are")
    if result.calibration is not None:
        held = result.calibration.expected_dsc
        say(f"DSC on {len(held)} atlases left out in turn: {sum(held) / len(held):.3f}")


def with_propagated(
    cases: Sequence[Case], settings: PropagationSettings, output: Path
) -> list[Case]:
    """``cases``, those that lack the organ as :func:`propagate_onto` wrote them to ``output``.

    Those that it could not place are as they were. Raises UserError where ``output`` is not a
    whole training set.
    """
    if all(settings.organ in case.organs for case in cases):
        return list(cases)
    listed = output / "cases.json"
    if listed.is_file() and not read_json(listed):  # not one of them could be placed
        return list(cases)
    dataset = read_dataset(output)
    if dataset.problems:
        raise UserError(dataset.problems[0])
    made = {case.name: case for case in dataset.cases}
    return [case if settings.organ in case.organs else made.get(case.name, case) for case in cases]

"""The recipe's table ``[propagate]``: training cases get an organ that they have no labels for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flare_clef.errors import UserError
from flare_clef.limits import usable_cores
from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.scan_files import strip_suffix
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
    aside: Sequence[Case],
    settings: PropagationSettings,
    base: Path,
    output: Path,
    say: Callable[[str], None],
) -> None:
    """Writes ``cases`` with labels of the organ to ``output``, as ``train propagate`` does.

    Label maps of the cases ``aside``, by name or the same file, are no atlases: what judges
    the training must not teach it. Bad atlases and cases are told to ``say``; raises UserError
    where no atlas is of use.
    """
    from flare_clef.training.propagation import propagate

    lacking = [case for case in cases if settings.organ not in case.organs]
    if not lacking:
        return
    say(f"propagating the {settings.organ} to {len(lacking)} case(s)")
    organ = ORGAN_BY_NAME[settings.organ]
    atlases, judging = base / settings.atlases, _own_maps(aside, base / settings.atlases)
    if judging:
        say(f"{len(judging)} label map(s) of cases kept aside are no atlases")
    result = propagate(atlases, lacking, organ, output, usable_cores(), without=judging)
    for problem in result.problems:
        say(f"warning: {problem}")
    if not result.cases:
        say(f"warning: propagate: no case could be given a {settings.organ}; all stay as they are")
    if result.calibration is not None:
        held = result.calibration.expected_dsc
        say(f"DSC on {len(held)} atlases left out in turn: {sum(held) / len(held):.3f}")


def _own_maps(cases: Sequence[Case], atlases: Path) -> list[Path]:
    """The label maps among ``atlases`` that are of ``cases``."""
    from flare_clef.training.propagation import find_atlases

    names = {case.name for case in cases}
    files = {case.labels.resolve() for case in cases if case.labels is not None}
    found = find_atlases(atlases)
    return [p for p in found if strip_suffix(p.name)[0] in names or p.resolve() in files]


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

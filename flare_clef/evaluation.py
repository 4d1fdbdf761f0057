"""Scoring a folder of label maps against another, case by case.

What is not as it should be becomes a :class:`Problem`, named and counted, and never ends the
rest. A prediction that is missing, unreadable or of another shape scores 0 for every organ of
its case, as a failed case does in the challenge; a reference that cannot be read takes its case
out, since there is nothing to score against.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flare_clef.errors import UsageError, UserError
from flare_clef.evaluation_inputs import (
    LabelMap,
    Pair,
    find_cases_file,
    match_files,
    misplacement_mm,
    read_label_map,
    read_labelled_organs,
    shear_degrees,
)
from flare_clef.metrics import OrganScore, Rules, score_organs, volumes_ml
from flare_clef.organs import ORGAN_BY_NAME, Organ
from flare_clef.paths import replacing

GEOMETRY_TOLERANCE_MM = 0.1
"""How far a voxel may lie from its partner: a NIfTI quaternion in float32 places the far corner
of 512 x 512 x 400 voxels up to 0.07 mm from where the matrix of the same grid has it."""

_SHEAR_TOLD_DEGREES = 0.5

CSV_COLUMNS = ("case", "label", "organ", "dsc", "nsd", "hd95_mm", "volume_ml", "reference_ml")


@dataclass(frozen=True)
class Problem:
    """Something that was not as it should be."""

    case: str
    kind: str
    """``missing prediction``, ``unusable prediction``, ``other shape``, ``other geometry``,
    ``unknown labels``, ``unusable reference``, ``sheared axes`` or ``no reference``."""
    text: str
    """One line: the file, what was seen, how it was counted."""

    @property
    def is_failure(self) -> bool:
        """A prediction without a reference takes nothing away from what was to be scored, and
        shear (of a tilted gantry) nothing from DSC and volumes."""
        return self.kind not in ("no reference", "sheared axes")


@dataclass(frozen=True)
class Row:
    """One organ of one case."""

    case: str
    organ: Organ
    score: OrganScore


@dataclass
class Evaluation:
    """One folder of predictions, scored."""

    rules: Rules
    pairs: list[Pair]
    cases_file: Path | None
    """The ``cases.json`` that says which organs are labelled; None: all, everywhere."""
    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    """Cases that ``cases_file`` does not name; they are scored on all organs."""
    without_organs: list[str] = field(default_factory=list)
    """Cases that have labels for none of the organs asked for."""

    @property
    def cases(self) -> list[str]:
        """The cases that were scored."""
        return list(dict.fromkeys(row.case for row in self.rows))

    @property
    def problem_counts(self) -> dict[str, int]:
        return dict(Counter(problem.kind for problem in self.problems))


def evaluate_files(
    predictions: Path,
    references: Path,
    *,
    organs: Sequence[str] | None = None,
    rules: Rules = "2022",
    cases_file: Path | None = None,
    workers: int = 1,
    on_case: Callable[[Pair, int, int], None] | None = None,
) -> Evaluation:
    """Scores every reference; ``predictions`` and ``references`` are two folders or two files.

    ``organs`` are names, None for all 13. ``cases_file``: see
    :func:`~flare_clef.evaluation_inputs.read_labelled_organs`; None takes one that lies with
    the references or up to two folders above. ``on_case`` hears of each case before it is
    scored: the pair, its number from 0, how many there are.
    Raises UserError where nothing at all can be scored.
    """
    asked = tuple(organs) if organs is not None else tuple(ORGAN_BY_NAME)
    for name in asked:
        if name not in ORGAN_BY_NAME:
            raise UsageError(f"organ {name!r} is unknown; known are {', '.join(ORGAN_BY_NAME)}")
    pairs, left_over = match_files(predictions, references)
    listing = cases_file if cases_file is not None else find_cases_file(references)
    names = [pair.case for pair in pairs]
    labelled = read_labelled_organs(listing, references, names) if listing is not None else {}
    result = Evaluation(rules, pairs, listing)
    result.problems += [
        Problem(case, "no reference", f"{path}: no reference of this name; not scored")
        for case, path in left_over.items()
    ]
    for number, pair in enumerate(pairs):
        if on_case is not None:
            on_case(pair, number, len(pairs))
        if listing is not None and pair.case not in labelled:
            result.unlisted.append(pair.case)
        wanted = [name for name in asked if name in labelled.get(pair.case, asked)]
        if wanted:
            scores, problems = score_pair(pair, wanted, rules, workers)
            result.rows += [Row(pair.case, ORGAN_BY_NAME[name], s) for name, s in scores.items()]
            result.problems += problems
        else:
            result.without_organs.append(pair.case)
    if not result.rows:
        why = [p.text for p in result.problems if p.is_failure] or [
            f"{listing} has none of the organs asked for"
        ]
        raise UserError(f"{references}: none of {len(pairs)} case(s) can be scored; {why[0]}")
    return result


def score_pair(
    pair: Pair, organs: Sequence[str], rules: Rules = "2022", workers: int = 1
) -> tuple[dict[str, OrganScore], list[Problem]]:
    """Scores of the named organs, none where the reference is unusable; and what was wrong."""
    problems: list[Problem] = []

    def note(kind: str, text: str) -> None:
        problems.append(Problem(pair.case, kind, text))

    try:
        reference = read_label_map(pair.reference)
    except (UserError, MemoryError) as error:
        note("unusable reference", f"{_said(pair.reference, error)}; case left out")
        return {}, problems
    if reference.unknown:
        note("unknown labels", f"{pair.reference}: {reference.unknown}, counted as background")
    prediction = _read_prediction(pair, reference, note)
    spacing_mm, direction = reference.image.spacing_mm, reference.image.direction
    if prediction is None:
        reference_ml = volumes_ml(reference.labels, spacing_mm, direction)
        return {name: OrganScore(0.0, 0.0, None, None, reference_ml[name]) for name in organs}, (
            problems
        )
    degrees = shear_degrees(reference.image)
    if degrees >= _SHEAR_TOLD_DEGREES:
        note(
            "sheared axes",
            f"{pair.reference}: axes {degrees:.1f} degrees off upright (a tilted gantry?); NSD and "
            "HD95 are measured as if they were upright",
        )
    maps = prediction.labels, reference.labels
    return score_organs(*maps, spacing_mm, organs, rules, workers, direction), problems


def _said(path: Path, error: UserError | MemoryError) -> str:
    return str(error) if isinstance(error, UserError) else f"{path}: too large for the memory"


def _read_prediction(
    pair: Pair, reference: LabelMap, note: Callable[[str, str], None]
) -> LabelMap | None:
    """The prediction, None where the case counts as 0."""
    if pair.prediction is None:
        note("missing prediction", f"{pair.reference}: no prediction of this name; counted as 0")
        return None
    try:
        prediction = read_label_map(pair.prediction)
    except (UserError, MemoryError) as error:
        note("unusable prediction", f"{_said(pair.prediction, error)}; counted as 0")
        return None
    shape, expected = prediction.labels.shape[::-1], reference.labels.shape[::-1]
    if shape != expected:
        note(
            "other shape",
            f"{pair.prediction}: {' x '.join(map(str, shape))} voxels, its reference has "
            f"{' x '.join(map(str, expected))}; counted as 0",
        )
        return None
    apart_mm = misplacement_mm(prediction.image, reference.image)
    if not apart_mm <= GEOMETRY_TOLERANCE_MM:
        note(
            "other geometry",
            f"{pair.prediction}: header places voxels up to {apart_mm:.3g} mm from the "
            "reference's; scored voxel by voxel all the same, as the challenge does",
        )
    if prediction.unknown:
        note("unknown labels", f"{pair.prediction}: {prediction.unknown}, counted as background")
    return prediction


def write_csv(evaluation: Evaluation, path: Path) -> None:
    """One line per case and organ; a figure that does not exist is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in evaluation.rows:
        score = row.score
        figures = (score.dsc, score.nsd, score.hd95_mm, score.volume_ml, score.reference_ml)
        shown = ["" if figure is None else f"{figure:.6f}" for figure in figures]
        writer.writerow([row.case, row.organ.index, row.organ.name, *shown])
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Writes ``path`` whole or not at all. Raises UserError where it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

"""Statistics of an evaluation: means with intervals, worst cases, one result against another.

*All organs* is the mean of the organs' means, so that every organ weighs the same however many
cases are labelled for it; its spread, median and worst cases are those of the cases' means over
their own organs. With complete labels that is the challenge's mean.

Intervals are 95 % percentile bootstrap intervals over cases (Efron and Tibshirani, 1993): whole
cases are drawn with replacement, since the organs of one patient are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flare_clef.errors import UserError
from flare_clef.evaluation import Evaluation
from flare_clef.organs import ORGANS
from flare_clef.version import __version__

FIGURES = ("dsc", "nsd", "hd95_mm", "difference_ml")
SCORES = ("dsc", "nsd")
RESAMPLES = 2000
SEED = 0
WORST_CASES = 5
_LOWEST_ORGANS = 3
_INTERVAL_PERCENT = (2.5, 97.5)


@dataclass(frozen=True)
class Table:
    """One figure of every case and organ."""

    cases: tuple[str, ...]
    organs: tuple[str, ...]
    values: np.ndarray
    """(cases, organs) float64, nan where there is none."""


def table(evaluation: Evaluation, figure: str) -> Table:
    """``figure`` is one of :data:`FIGURES`; organs in label order."""
    cases = tuple(evaluation.cases)
    present = {row.organ.name for row in evaluation.rows}
    organs = tuple(organ.name for organ in ORGANS if organ.name in present)
    values = np.full((len(cases), len(organs)), np.nan)
    case_at = {case: i for i, case in enumerate(cases)}
    organ_at = {name: i for i, name in enumerate(organs)}
    for row in evaluation.rows:
        value = getattr(row.score, figure)
        if value is not None:
            values[case_at[row.case], organ_at[row.organ.name]] = value
    return Table(cases, organs, values)


def summarise(evaluation: Evaluation) -> dict[str, Any]:
    """Everything of ``summary.json`` but the comparison; a figure that does not exist is None."""
    tables = {figure: table(evaluation, figure) for figure in FIGURES}
    organs = tables["dsc"].organs
    intervals = {figure: intervals_of_means(tables[figure].values) for figure in FIGURES}
    per_organ: dict[str, Any] = {}
    for i, name in enumerate(organs):
        per_organ[name] = {"cases": int(_number(tables["dsc"].values[:, i]))}
        for figure in FIGURES:
            column = tables[figure].values[:, i]
            per_organ[name][figure] = _statistics(column, intervals[figure][i])
    overall: dict[str, Any] = {"cases": len(evaluation.cases)}
    for figure in SCORES:
        values = tables[figure].values
        overall[figure] = _statistics(_row_means(values), intervals[figure][-1])
        overall[figure]["mean"] = _plain(_mean_of_organs(values))
    return {
        "flare_clef": __version__,
        "rules": evaluation.rules,
        "cases_json": None if evaluation.cases_file is None else str(evaluation.cases_file),
        "interval": f"95 % bootstrap over cases, {RESAMPLES} resamples, seed {SEED}",
        "organs": per_organ,
        "all_organs": overall,
        "worst_cases": worst_cases(evaluation),
        "problem_counts": evaluation.problem_counts,
        "problems": [{"case": p.case, "kind": p.kind, "text": p.text} for p in evaluation.problems],
        "cases_not_in_cases_json": evaluation.unlisted,
        "cases_without_the_organs": evaluation.without_organs,
    }


def worst_cases(evaluation: Evaluation, number: int = WORST_CASES) -> list[dict[str, Any]]:
    """The cases with the lowest mean DSC over their organs, and where it was lowest."""
    dsc, nsd = table(evaluation, "dsc"), table(evaluation, "nsd")
    means, nsd_means = _row_means(dsc.values), _row_means(nsd.values)
    worst = []
    for i in np.argsort(means, kind="stable")[:number]:
        scored = _number(dsc.values[i])  # nan sorts last
        lowest = np.argsort(dsc.values[i], kind="stable")[: min(_LOWEST_ORGANS, scored)]
        worst.append(
            {
                "case": dsc.cases[i],
                "dsc": _plain(means[i]),
                "nsd": _plain(nsd_means[i]),
                "lowest": {dsc.organs[k]: _plain(dsc.values[i, k]) for k in lowest},
            }
        )
    return worst


def compare(evaluation: Evaluation, other: Evaluation) -> dict[str, Any]:
    """``evaluation`` less ``other`` on the cases and organs that both have.

    Per organ and over all: mean paired difference with its interval, and the two-sided p-value
    of Wilcoxon's signed-rank test over cases (for all organs: over the cases' means). P-values
    are not corrected for their number. Raises UserError where no case is common to both.
    """
    from scipy.stats import wilcoxon

    def p_value(differences: np.ndarray) -> float | None:
        known = np.round(differences[~np.isnan(differences)], 12)
        if len(known) == 0:
            return None
        return 1.0 if not known.any() else float(wilcoxon(known).pvalue)

    result: dict[str, Any] = {}
    for figure in SCORES:
        organs, differences = _paired(table(evaluation, figure), table(other, figure))
        intervals = intervals_of_means(differences)
        result["cases"] = len(differences)
        rows = [
            (name, np.nanmean(column), column, interval)
            for name, column, interval in zip(organs, differences.T, intervals, strict=False)
        ]
        overall = _row_means(differences)
        rows.append(("all_organs", _mean_of_organs(differences), overall, intervals[-1]))
        for name, mean, paired, interval in rows:
            result.setdefault(name, {"cases": int(_number(paired))})[figure] = {
                "difference": _plain(mean),
                "interval": interval,
                "wilcoxon_p": p_value(paired),
            }
    return result


def _paired(ours: Table, theirs: Table) -> tuple[list[str], np.ndarray]:
    cases = [case for case in ours.cases if case in theirs.cases]
    organs = [name for name in ours.organs if name in theirs.organs]
    if not cases or not organs:
        raise UserError("--compare: the two have no case and organ in common")

    def common(t: Table) -> np.ndarray:
        rows, columns = [t.cases.index(c) for c in cases], [t.organs.index(o) for o in organs]
        return t.values[np.ix_(rows, columns)]

    differences = common(ours) - common(theirs)
    shared = ~np.isnan(differences).all(axis=0)
    return [o for o, there in zip(organs, shared, strict=True) if there], differences[:, shared]


def intervals_of_means(values: np.ndarray) -> list[list[float] | None]:
    """95 % intervals of each column's mean, and last of the mean of these means.

    ``values`` is (cases, organs) with nan for what does not exist. None for a column with
    fewer than two values: one case tells nothing of the next.
    """
    drawn = np.random.default_rng(SEED).multinomial(
        len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES
    )
    known = ~np.isnan(values)
    counts = drawn @ known
    sums = drawn @ np.where(known, values, 0.0)
    # A column that a resample drew no value of is left out of that resample.
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    columns = [*means.T, _row_means(means)]
    numbers = [*known.sum(axis=0), known.any(axis=1).sum()]
    return [
        [float(v) for v in np.nanpercentile(column, _INTERVAL_PERCENT)] if number >= 2 else None
        for column, number in zip(columns, numbers, strict=True)
    ]


def _statistics(values: np.ndarray, interval: Sequence[float] | None) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    return {
        "mean": _plain(known.mean()) if len(known) else None,
        "interval": interval,
        "sd": _plain(known.std(ddof=1)) if len(known) > 1 else None,
        "median": _plain(np.median(known)) if len(known) else None,
        "cases": len(known),
    }


def _row_means(values: np.ndarray) -> np.ndarray:
    """Mean of each row over what it has; nan where it has nothing."""
    known = ~np.isnan(values)
    counts = known.sum(axis=1)
    sums = np.where(known, values, 0.0).sum(axis=1)
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _mean_of_organs(values: np.ndarray) -> float:
    """Mean of the columns' means, each over what it has."""
    return float(np.nanmean(_row_means(values.T)))


def _number(values: np.ndarray) -> int:
    return int(np.count_nonzero(~np.isnan(values)))


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)

"""``flare-clef evaluate``: label maps against reference labels, by the challenge's rules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flare_clef.errors import EXIT_FAILED, UsageError, UserError
from flare_clef.paths import check_writable

if TYPE_CHECKING:
    from flare_clef.evaluation import Evaluation
    from flare_clef.evaluation_inputs import Pair


def evaluate(
    predictions: Annotated[
        Path, typer.Argument(help="Label maps to score: a folder or a file.", show_default=False)
    ],
    references: Annotated[
        Path,
        typer.Argument(help="The true labels, under the same names.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for cases.csv and summary.json.",
            show_default=False,
        ),
    ] = None,
    organs: Annotated[
        str | None,
        typer.Option(metavar="A,B,…", help="Only these organs, such as liver,spleen."),
    ] = None,
    rules: Annotated[
        str,
        typer.Option(
            metavar="2022|later|plain",
            help="2022: the contest's. later: NSD is 0 where DSC is below 0.2. plain: aorta, "
            "inferior vena cava and esophagus on all slices, not the reference's alone.",
        ),
    ] = "2022",
    cases: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A cases.json that says which organs each case has labels for. Default: one "
            "beside REFERENCES or up to two folders above, else all organs.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="OTHER",
            help="Other predictions for the same references: prints PREDICTIONS less OTHER.",
            show_default=False,
        ),
    ] = None,
    plots: Annotated[
        bool,
        typer.Option("--plots", help="Box plots and pictures of the worst cases, into --output."),
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The scans, to lie under the pictures.", show_default=False
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print results and errors only.")
    ] = False,
) -> None:
    """Score label maps against references: DSC, NSD, Hausdorff distance, volumes.

    Absent from both maps scores 1, absent from one 0. A prediction that is
    missing, unreadable or of another shape counts as 0 for its case; it is
    named, and the exit code is 1.

    Example: flare-clef evaluate results labels --output scores --plots
    """
    _check_options(rules, output, pictures=plots or images is not None)
    from flare_clef.evaluation import write_csv
    from flare_clef.evaluation_inputs import files_by_case, match_files
    from flare_clef.evaluation_summary import compare as compare_with
    from flare_clef.evaluation_summary import summarise

    # What is not there is told before hours of scoring.
    scans = {} if images is None else files_by_case(images)
    if compare is not None:
        match_files(compare, references)
    asked = None if organs is None else [name.strip() for name in organs.split(",")]

    def score(folder: Path) -> Evaluation:
        return _score(folder, references, asked, rules, cases, quiet=quiet)

    result = score(predictions)
    summary = summarise(result)
    if output is not None:
        # Before anything is printed: that may fail, too.
        write_csv(result, output / "cases.csv")
        _write_summary(summary, output)
    _print_table(summary)
    _print_worst(summary)
    failed = _print_problems(result)
    if compare is not None:
        other = score(compare)
        summary["comparison"] = {"other": str(compare), **compare_with(result, other)}
        if output is not None:
            _write_summary(summary, output)
        _print_comparison(summary["comparison"])
        failed |= _print_problems(other, f"in {compare}: ")
    if output is not None and (plots or images is not None):
        failed |= _draw(result, summary, output, images, scans)
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _write_summary(summary: dict[str, Any], folder: Path) -> None:
    import json

    from flare_clef.evaluation import write_text

    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")


def _check_options(rules: str, output: Path | None, *, pictures: bool) -> None:
    from flare_clef.metrics import RULES

    if rules not in RULES:
        raise UsageError(f"--rules {rules}: expected one of {', '.join(RULES)}")
    if pictures and output is None:
        raise UsageError("--plots: pictures need a folder; name one with --output")
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise UserError('evaluate needs scipy: pip install "flare-clef[measure]"') from None
    if output is not None:
        check_writable(output)


def _score(
    predictions: Path,
    references: Path,
    organs: list[str] | None,
    rules: str,
    cases_file: Path | None,
    *,
    quiet: bool,
) -> Evaluation:
    from flare_clef.evaluation import evaluate_files
    from flare_clef.limits import usable_cores
    from flare_clef.progress import Progress

    progress = Progress(0, quiet=quiet)

    def show(pair: Pair, number: int, total: int) -> None:
        progress.done, progress.total = number, total
        progress.stage(pair.case, "score")

    try:
        return evaluate_files(
            predictions,
            references,
            organs=organs,
            rules=rules,  # type: ignore[arg-type]
            cases_file=cases_file,
            workers=usable_cores(),
            on_case=show,
        )
    finally:
        progress.close()


def _print_table(summary: dict[str, Any]) -> None:
    listed = summary["cases_json"]
    overall = summary["all_organs"]
    typer.echo(
        f"{overall['cases']} case(s), {summary['rules']} rules, "
        + (f"organs labelled as in {listed}" if listed else "all organs taken as labelled")
    )
    for key, text in (
        ("cases_not_in_cases_json", "not in that file, taken as labelled in full"),
        ("cases_without_the_organs", "labelled for none of the organs asked for, not scored"),
    ):
        if summary[key]:
            typer.echo(f"{len(summary[key])} case(s) {text}: {_names(summary[key])}")
    typer.echo(f"\n{'':<25}{'DSC':<36}{'NSD':<36}{'HD95':>7}{'volume':>9}")
    columns = f"{'mean':>5}{'sd':>6}{'median':>7}  {'95 % interval':<16}"
    typer.echo(f"{'':<21}{'n':>3} {columns}{columns}{'mm':>7}{'diff. ml':>9}")
    for name, figures in [*summary["organs"].items(), ("all_organs", overall)]:
        line = f"{_title(name):<21}{figures['cases']:>3} "
        for score in ("dsc", "nsd"):
            f = figures[score]
            line += f"{_fixed(f['mean'], 3):>5}{_fixed(f['sd'], 3):>6}{_fixed(f['median'], 3):>7}  "
            line += f"{_interval(f['interval'], 3):<16}"
        if "hd95_mm" in figures:
            line += f"{_fixed(figures['hd95_mm']['median'], 1):>7}"
            difference = figures["difference_ml"]["mean"]
            line += f"{_fixed(difference, 1, sign=True):>9}"
        typer.echo(line.rstrip())
    typer.echo(
        "Interval of the mean: 95 % bootstrap over cases. HD95: median; volume: mean difference."
    )


def _print_worst(summary: dict[str, Any]) -> None:
    typer.echo("\nWorst cases by mean DSC:")
    width = max(len(case["case"]) for case in summary["worst_cases"])
    for case in summary["worst_cases"]:
        lowest = ", ".join(f"{_title(name)} {dsc:.2f}" for name, dsc in case["lowest"].items())
        typer.echo(f"  {case['case']:<{width}}  {case['dsc']:.3f}  lowest: {lowest}")


def _print_comparison(comparison: dict[str, Any]) -> None:
    typer.echo(f"\nDifference to {comparison['other']}, {comparison['cases']} case(s) in both:")
    typer.echo(f"{'':<25}{'DSC':<38}NSD")
    columns = f"{'mean':>6}  {'95 % interval':<18}{'p':>6}      "
    typer.echo(f"{'':<21}{'n':>3} {columns}{columns}".rstrip())
    for name, figures in comparison.items():
        if name in ("other", "cases"):
            continue
        line = f"{_title(name):<21}{figures['cases']:>3} "
        for score in ("dsc", "nsd"):
            f = figures[score]
            line += f"{_fixed(f['difference'], 3, sign=True):>6}  "
            line += f"{_interval(f['interval'], 3, sign=True):<18}"
            line += f"{_fixed(f['wilcoxon_p'], 4):>6}      "
        typer.echo(line.rstrip())
    typer.echo("p: Wilcoxon signed-rank test over cases, not corrected for the number of tests.")


def _print_problems(evaluation: Evaluation, where: str = "") -> bool:
    """Names each problem on stderr, counts them; whether one of them is a failure."""
    for problem in evaluation.problems:
        typer.echo(f"flare-clef: {where}{problem.text}", err=True)
    if evaluation.problems:
        counts = ", ".join(f"{n} {kind}" for kind, n in evaluation.problem_counts.items())
        typer.echo(f"flare-clef: {where}{len(evaluation.problems)} problem(s): {counts}", err=True)
    return any(problem.is_failure for problem in evaluation.problems)


def _draw(
    evaluation: Evaluation,
    summary: dict[str, Any],
    folder: Path,
    images: Path | None,
    scans: dict[str, Path],
) -> bool:
    """Writes the pictures; whether one of them failed, which a line on stderr then says."""
    from flare_clef.evaluation_plots import draw_box_plots, draw_case

    failed = False
    for earlier in folder.glob("worst_[1-9]*_*.png"):  # of other cases, perhaps
        earlier.unlink(missing_ok=True)
    draw_box_plots(evaluation, folder / "boxes.png")
    pairs = {pair.case: pair for pair in evaluation.pairs}
    for rank, worst in enumerate(summary["worst_cases"], start=1):
        case = worst["case"]
        scores = {row.organ.name: row.score for row in evaluation.rows if row.case == case}
        if images is not None and case not in scans:
            typer.echo(f"flare-clef: {images}: no scan of {case}; drawn without it", err=True)
        try:
            picture = folder / f"worst_{rank}_{case}.png"
            misfit = draw_case(pairs[case], scores, picture, scans.get(case))
            if misfit:
                typer.echo(f"flare-clef: {misfit}; drawn without it", err=True)
        except UserError as error:
            typer.echo(f"flare-clef: {error}", err=True)
            failed = True
    return failed


def _names(cases: list[str], shown: int = 5) -> str:
    return ", ".join(cases[:shown]) + (", …" if len(cases) > shown else "")


def _title(name: str) -> str:
    from flare_clef.organs import ORGAN_BY_NAME

    return ORGAN_BY_NAME[name].title if name in ORGAN_BY_NAME else "All organs"


def _fixed(value: float | None, places: int, *, sign: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if sign else ''}.{places}f}"


def _interval(bounds: list[float] | None, places: int, *, sign: bool = False) -> str:
    if bounds is None:
        return "–"
    return " to ".join(_fixed(bound, places, sign=sign) for bound in bounds)

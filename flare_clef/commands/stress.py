"""``flare-clef stress``: one scan in many guises, and how well each is segmented."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flare_clef.commands.options import DeviceOption, PrecisionOption, WeightsOption
from flare_clef.errors import EXIT_FAILED, UserError
from flare_clef.paths import check_writable

if TYPE_CHECKING:
    from flare_clef.images import Image

Table = dict[str, dict[str, float | None]]


def stress(
    scan: Annotated[Path, typer.Argument(help="A scan in HU.", show_default=False)],
    labels: Annotated[
        Path | None,
        typer.Argument(
            help="Its true labels. Without them the result on the scan as it is stands for them; "
            "organs that they do not hold are left out.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for stress.csv, stress.json and stress.png.",
            show_default=False,
        ),
    ] = None,
    all_orientations: Annotated[
        bool, typer.Option("--all", help="All 48 orientations in place of three.")
    ] = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    weights: WeightsOption = None,
) -> None:
    """Segment SCAN as a user might have it: cropped, coarser, turned, shifted, noisy.

    Each row is one change; figures are DSC against LABELS on what is left of
    the body. An organ found where it was cut off counts as 0; a line says
    how many ml of it were found.

    Example: flare-clef stress scan.nii.gz labels.nii.gz --output sheet
    """
    from flare_clef.evaluation_inputs import read_labels_of
    from flare_clef.images import read_image
    from flare_clef.organs import ORGANS
    from flare_clef.orientation import ORIENTATIONS
    from flare_clef.stress import agreement, found_though_cut_off, mean_dsc, perturbations

    _require_measure()
    image = read_image(scan)
    truth = read_labels_of(image, labels) if labels is not None else None
    if output is not None:
        check_writable(output)

    from flare_clef.segmenter import Segmenter

    segmenter = Segmenter(weights, device=device, precision=precision)
    plain = segmenter.segment(image).labels
    reference = plain if truth is None else truth
    organs = [organ.name for organ in ORGANS if (reference == organ.index).any()]
    if not organs:
        raise UserError(f"{labels or scan}: no organ to compare with; give labels that hold some")
    table: Table = {}
    false_ml: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    if truth is not None:
        table["as it is"] = agreement(plain, truth, organs)
        _print_row("as it is", mean_dsc(table["as it is"]), table["as it is"])
    guises = perturbations(image, ORIENTATIONS) if all_orientations else perturbations(image)
    for guise in guises:
        try:
            changed = guise.change(image)
            found = segmenter.segment(changed).labels
        except UserError as error:
            failures[guise.name] = str(error)
            typer.echo(f"flare-clef: {guise.name}: {error}", err=True)
            continue
        compared = guise.on_labels(_as_labels(image, reference)).array
        table[guise.name] = agreement(found, compared, organs)
        _print_row(guise.name, mean_dsc(table[guise.name]), table[guise.name])
        false_ml[guise.name] = found_though_cut_off(
            found, compared, organs, changed.spacing_mm, changed.direction
        )
        if false_ml[guise.name]:
            parts = ", ".join(f"{name} {ml:.1f} ml" for name, ml in false_ml[guise.name].items())
            typer.echo(f"{'':<22} cut off, found all the same: {parts}")
    against = "labels" if truth is not None else "the result on the scan as it is"
    typer.echo(f"DSC against {against}.")
    if output is not None and table:
        _write(table, false_ml, failures, str(scan), against, output)
    if failures:
        raise typer.Exit(EXIT_FAILED)


def _require_measure() -> None:
    try:
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise UserError(f'stress needs {error.name}: pip install "flare-clef[measure]"') from None


def _as_labels(image: Image, labels: object) -> Image:
    from dataclasses import replace

    return replace(image, array=labels, nifti_header=None, nrrd_geometry=())  # type: ignore[arg-type]


def _print_row(name: str, mean: float | None, scores: dict[str, float | None]) -> None:
    from flare_clef.organs import ORGAN_BY_NAME

    shown = "  ".join(
        f"{ORGAN_BY_NAME[organ].short} {'–' if score is None else f'{score:.2f}'}"
        for organ, score in scores.items()
    )
    typer.echo(f"{name:<22} mean {'–' if mean is None else f'{mean:.3f}'}  {shown}")


def _write(
    table: Table,
    false_ml: dict[str, dict[str, float]],
    failures: dict[str, str],
    scan: str,
    against: str,
    folder: Path,
) -> None:
    from flare_clef.evaluation import write_text
    from flare_clef.stress import mean_dsc
    from flare_clef.stress_plots import draw_heat_map

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["perturbation", "organ", "dsc"])
    for name, scores in table.items():
        for organ, score in scores.items():
            writer.writerow([name, organ, "" if score is None else f"{score:.6f}"])
    write_text(folder / "stress.csv", text.getvalue())
    result = {
        "scan": scan,
        "against": against,
        "mean": {name: mean_dsc(scores) for name, scores in table.items()},
        "dsc": table,
        "found_though_cut_off_ml": {name: found for name, found in false_ml.items() if found},
        "failures": failures,
    }
    write_text(folder / "stress.json", json.dumps(result, indent=1) + "\n")
    draw_heat_map(table, f"DSC against {against}", folder / "stress.png")

"""``flare-clef phantom``: a synthetic CT of an abdomen with its labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flare_clef.errors import UsageError


def phantom(
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="Folder for images/NAME_0000.nii.gz, labels/NAME.nii.gz and cases.json.",
            show_default=False,
        ),
    ],
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another patient.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many, of seeds SEED, SEED + 1, …")] = 1,
    name: Annotated[str, typer.Option(help="Names are NAME_SEED.")] = "phantom",
    phase: Annotated[
        str, typer.Option(metavar="native|arterial|portal", help="Contrast phase.")
    ] = "portal",
    pixel_mm: Annotated[float, typer.Option(min=0.4, max=10, help="Pixel size.")] = 1.5,
    slice_thickness_mm: Annotated[
        float, typer.Option(min=0.4, max=20, help="Distance from slice to slice.")
    ] = 3.0,
    field_of_view_mm: Annotated[
        float, typer.Option(min=50, max=600, help="Width and depth of the scan.")
    ] = 400.0,
    scan_length_mm: Annotated[
        float, typer.Option(min=20, max=400, help="Height of the scan, from the heart down.")
    ] = 300.0,
    orientation: Annotated[
        str,
        typer.Option(help="Where the stored x, y, z axes point: LPS, RAS or any other of the 48."),
    ] = "LPS",
) -> None:
    """Make a synthetic abdomen with 13 labelled organs, for trying things out.

    No patient stands behind it. The same options give the same volume.

    Example: flare-clef phantom demo && flare-clef predict demo/images demo/results
    """
    from flare_clef.orientation import check_orientation
    from flare_clef.phantom import PhantomOptions, make_phantom
    from flare_clef.phantom_files import write_phantom
    from flare_clef.phantom_organs import PHASES

    if phase not in PHASES:
        raise UsageError(f"--phase {phase}: expected one of {', '.join(PHASES)}")
    if not name or "/" in name or name.startswith("."):
        raise UsageError(f"--name {name!r}: expected a name without folders")
    code = check_orientation(orientation)
    for number in range(seed, seed + count):
        options = PhantomOptions(
            seed=number,
            phase=phase,  # type: ignore[arg-type]
            pixel_mm=pixel_mm,
            slice_thickness_mm=slice_thickness_mm,
            field_of_view_mm=field_of_view_mm,
            scan_length_mm=scan_length_mm,
        )
        case = f"{name}_{number}"
        write_phantom(make_phantom(options), options, output, case, code)
        typer.echo(output / "images" / f"{case}_0000.nii.gz")

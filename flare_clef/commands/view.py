"""``flare-clef view``: a plane of a scan with its labels, on disk or in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def view(
    case: Annotated[Path, typer.Argument(help="The scan.", show_default=False)],
    labels: Annotated[Path, typer.Argument(help="Its label map.", show_default=False)],
    plane: Annotated[
        str, typer.Option(metavar="axial|coronal|sagittal", help="Which way to cut.")
    ] = "axial",
    slice: Annotated[
        int | None,
        typer.Option(
            help="Slice number from 0 at the feet, the front or the patient's right; by default "
            "the one that shows most."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A .png of 600 x 460 pixels (needs the extra 'report'); by default the terminal.",
        ),
    ] = None,
) -> None:
    """Show a slice of a scan with its organs."""
    import shutil
    from importlib.util import find_spec

    from flare_clef.errors import UsageError, UserError

    if output is not None and output.suffix.lower() != ".png":
        raise UsageError(f"{output}: pictures are written as .png")
    if output is not None and find_spec("PIL") is None:
        raise UserError('--output: Pillow is missing; pip install "flare-clef[report]"')

    from flare_clef.organs import ORGANS
    from flare_clef.view import read_pair, terminal_text
    from flare_clef.view import view as shown

    image, found = read_pair(case, labels)
    result = shown(image, found, plane, slice)
    where = f"{plane} slice {result.slice} of 0 to {result.slices - 1}"
    if output is not None:
        from flare_clef.report import annotated_png
        from flare_clef.writing import write_bytes

        write_bytes(output, annotated_png(result.panel))
        typer.echo(f"{output}  {where}")
        return
    columns = min(120, max(20, shutil.get_terminal_size().columns - 1))
    typer.echo(terminal_text(result.panel.rgb, columns), color=True)
    present = [o for o in ORGANS if (found == o.index).any()]
    names = []
    for organ in present:
        red, green, blue = organ.colour
        names.append(f"\x1b[38;2;{red};{green};{blue}m■\x1b[0m {organ.title}")
    typer.echo("  ".join(names), color=True)
    typer.echo(f"{where}; {result.panel.left} is on the left")

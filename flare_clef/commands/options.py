"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MACHINE = "Machine and weights"

DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda[:N]", rich_help_panel=MACHINE, help="Where the network runs."
    ),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        metavar="auto|fp32|bf16|fp16|int8",
        rich_help_panel=MACHINE,
        help="Number format of the network; auto: fp16 on a GPU, what a trial finds fastest "
        "on a CPU.",
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=MACHINE,
        help="A .safetensors file; by default the shipped weights.",
        show_default=False,
    ),
]

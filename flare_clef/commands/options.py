"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DeviceOption = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where the network runs.")
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        metavar="auto|fp32|bf16|fp16",
        help="Number format of the network; auto times what this machine does fastest.",
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(help="A .safetensors file in place of the shipped weights.", show_default=False),
]

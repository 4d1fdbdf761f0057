"""``flare-clef info``: what this installation would do, or what a scan is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flare_clef.commands.options import DeviceOption, PrecisionOption


def info(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[WEIGHTS|SCAN]",
            help="A weights file (default: the shipped one), or a scan to look at.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False,
) -> None:
    """Versions, device, precision and weights; or a scan's geometry and what is wrong with it."""
    is_weights = path is None or path.suffix == ".safetensors"
    facts = _installation(path, device, precision) if is_weights else _scan(path)  # type: ignore[arg-type]
    if json:
        import json as encoder

        typer.echo(encoder.dumps(facts))
        return
    if is_weights and isinstance(facts["weights"]["record"], dict):
        facts["weights"]["record"] = _in_short(facts["weights"]["record"])
    for key, value in facts.items():
        _show(key, value, 0)


def _in_short(record: dict[str, Any]) -> dict[str, Any]:
    """What a reader asks first of a weights file's record: the whole is some hundred lines."""
    short = {key: value for key, value in record.items() if not isinstance(value, (dict, list))}
    cases = record.get("trained_on")
    if cases:
        short["trained_on"] = f"{len(cases)} cases"
    dice = record.get("validation_means")
    if dice:
        short["validation_means"] = dice
    if len(short) < len(record):
        short["all_of_it"] = "--json (recipe, cases and their sources, other runs in the mean)"
    return short


def _show(key: str, value: Any, depth: int) -> None:
    label = f"{'  ' * depth}{key.replace('_', ' ')}"
    if isinstance(value, dict):
        typer.echo(label)
        for inner, content in value.items():
            _show(inner, content, depth + 1)
        return
    if isinstance(value, (list, tuple)):
        value = ", ".join(str(v) for v in value)
    typer.echo(f"{label:<24} {value}")


def _installation(path: Path | None, device: str, precision: str) -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    import torch

    from flare_clef.limits import available_memory_bytes, usable_cores
    from flare_clef.network import parameter_count
    from flare_clef.organs import ORGANS
    from flare_clef.paths import checksum
    from flare_clef.precision import choose_device, choose_precision
    from flare_clef.version import __version__
    from flare_clef.weights import load_weights

    weights = load_weights(path)
    cores = usable_cores()
    torch.set_num_threads(cores)
    chosen, why_device = choose_device(device)
    calibrated = weights.calibration is not None
    number_format, why_format = choose_precision(precision, chosen, cores, calibrated=calibrated)
    parameters = parameter_count(weights.network())
    return {
        "flare-clef": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "SimpleITK": version("SimpleITK"),
        "device": f"{chosen} ({why_device})",
        "precision": f"{number_format} ({why_format})",
        "cores": cores,
        "free_memory": f"{available_memory_bytes() / 2**30:.1f} GiB",
        "organs": [f"{organ.index} {organ.name}" for organ in ORGANS],
        "weights": {
            "file": str(weights.path),
            "int8": "calibrated" if calibrated else "not calibrated: auto leaves it out",
            "sha256": checksum(weights.path),
            "parameters": f"{parameters:,} ({parameters / 1e6:.1f} M)",
            "grid": f"{weights.grid} x {weights.grid} x {weights.grid}",
            "licence": weights.licence or "not stated",
            "record": weights.record or "none",
        },
    }


def _scan(path: Path) -> dict[str, Any]:
    from flare_clef.images import describe, read_image

    return {"scan": str(path), **describe(read_image(path))}

"""Weights files: safetensors with all that inference needs to know, checked on load.

The file's metadata are strings: ``format`` and ``format_version``, ``architecture``,
``organs``, ``window_hu`` and ``grid`` (all JSON), ``record`` (JSON: how the weights were
made, and what they reached) and ``licence``. Convolutions are in half precision, normalisation
in single, as are the tensors ``int8.…`` of weights that were calibrated for 8-bit inference.
Never a pickle: loading runs no code.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flare_clef import calibration as of_int8
from flare_clef.calibration import Calibration
from flare_clef.errors import UserError
from flare_clef.network import Architecture, SegmentationNetwork
from flare_clef.organs import ORGANS
from flare_clef.paths import check_name
from flare_clef.preparation import GRID, WINDOW_HU

FORMAT = "flare-clef"
FORMAT_VERSION = 1
FILE_NAME = "flare_clef.safetensors"
_BOOKKEEPING = "num_batches_tracked"


@dataclass(frozen=True)
class Weights:
    """A weights file in memory."""

    path: Path
    architecture: Architecture
    grid: int
    """Voxels along each axis of the network's input."""
    licence: str
    record: dict[str, Any] = field(repr=False)
    """How the weights were made: recipe, data, steps, hours, validation table."""
    tensors: dict[str, torch.Tensor] = field(repr=False)

    calibration: Calibration | None = field(default=None, repr=False)
    """For 8-bit inference; None: not calibrated."""

    def network(self) -> SegmentationNetwork:
        """The network with these weights, float32, in evaluation mode."""
        with torch.device("meta"):
            network = SegmentationNetwork(self.architecture)
        network.load_state_dict(
            {name: tensor.float() for name, tensor in self.tensors.items()},
            assign=True,
            strict=False,
        )
        return network.eval().requires_grad_(False)


def default_weights() -> Path:
    """Where the shipped weights lie: beside the package in a checkout, else inside it."""
    package = Path(__file__).resolve().parent
    places = [package.parent / "weights" / FILE_NAME, package / "_weights" / FILE_NAME]
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"{FILE_NAME}: the weights are neither at {places[0]} nor at {places[1]}; "
        "name a file with --weights"
    )


def _kind_of(name: str) -> torch.dtype:
    """In which format a tensor of the network is stored."""
    # Running variances span more than half precision holds; they are tiny anyhow.
    return torch.float32 if ".norm." in name else torch.float16


def round_as_stored(network: SegmentationNetwork) -> None:
    """Gives the parameters, in place, the values that :func:`save_weights` would store."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if not name.endswith(_BOOKKEEPING):
                tensor.copy_(tensor.to(_kind_of(name)))


def save_weights(
    path: Path,
    network: SegmentationNetwork,
    *,
    grid: int = GRID,
    record: dict[str, Any] | None = None,
    licence: str = "",
    calibration: Calibration | None = None,
) -> None:
    """Writes ``network`` to ``path``, atomically."""
    tensors = {}
    for name, tensor in network.state_dict().items():
        if name.endswith(_BOOKKEEPING):
            continue
        tensors[name] = tensor.detach().to("cpu", _kind_of(name)).contiguous()
    if calibration is not None:
        tensors.update(calibration.tensors())
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "architecture": json.dumps(asdict(network.architecture)),
        "organs": json.dumps([organ.name for organ in ORGANS]),
        "window_hu": json.dumps(WINDOW_HU),
        "grid": str(grid),
        "record": json.dumps(record or {}),
        "licence": licence,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata)
        # save_file leaves a file that only its owner can read, whatever the umask.
        umask = os.umask(0o077)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(path: Path | None = None) -> Weights:
    """Reads and checks a weights file (None: the shipped one). Raises UserError, one line."""
    path = path or default_weights()
    check_name(path)
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name the .safetensors file itself")
        if not path.is_file():
            raise UserError(f"{path}: no such weights file")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(
                    f"{path}: a safetensors file of something else (format "
                    f"{metadata.get('format', 'not stated')}); expected one made by flare-clef"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({path.stat().st_size} bytes; {error}); "
            "was it cut, or is it a git-lfs pointer or another format?"
        ) from None
    return _checked(path, metadata, tensors)


def _checked(path: Path, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> Weights:
    version = metadata.get("format_version", "not stated")
    if version != str(FORMAT_VERSION):
        raise UserError(
            f"{path}: format version {version}; this flare-clef reads version {FORMAT_VERSION}"
        )
    try:
        architecture = _architecture(json.loads(metadata["architecture"]))
        organs = json.loads(metadata["organs"])
        window_hu = tuple(json.loads(metadata["window_hu"]))
        grid = int(metadata["grid"])
        record = json.loads(metadata["record"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: its metadata cannot be used ({error!r})") from None
    if organs != [organ.name for organ in ORGANS] or architecture.classes != len(ORGANS):
        raise UserError(f"{path}: made for other organs ({', '.join(map(str, organs))})")
    if window_hu != WINDOW_HU:
        raise UserError(
            f"{path}: made for the window {window_hu} HU; this version uses {WINDOW_HU}"
        )
    if grid < 1 or grid % architecture.divisor:
        raise UserError(f"{path}: grid {grid} is not a multiple of {architecture.divisor}")
    with torch.device("meta"):
        expected = {
            name: tensor.shape
            for name, tensor in SegmentationNetwork(architecture).state_dict().items()
            if not name.endswith(_BOOKKEEPING)
        }
    if any(name.startswith(of_int8.PREFIX) for name in tensors):
        expected.update(of_int8.tensor_shapes(architecture))
    for words, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("holds surplus", tensors.keys() - expected.keys()),
    ):
        if names:
            raise UserError(
                f"{path}: {words} {len(names)} tensor(s) of the architecture it states, "
                f"such as {min(names)}"
            )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{path}: tensor {name} is {tuple(tensors[name].shape)}, expected {tuple(shape)}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise UserError(f"{path}: tensor {name} holds values that are not finite")
        if name.endswith(".ranges") and not (tensors[name] > 0).all():
            raise UserError(f"{path}: tensor {name} holds ranges that are not positive")
    found = {name: tensors.pop(name) for name in list(tensors) if name.startswith(of_int8.PREFIX)}
    calibration = Calibration.of_tensors(found) if found else None
    licence = metadata.get("licence", "")
    return Weights(path, architecture, grid, licence, record, tensors, calibration)


def _architecture(stated: dict[str, Any]) -> Architecture:
    known = {f.name for f in fields(Architecture)}
    if set(stated) != known:
        raise ValueError(f"architecture has the keys {sorted(stated)}, expected {sorted(known)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stated.items()}
    return Architecture(**values)

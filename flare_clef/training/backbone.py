"""A pre-trained backbone on its way to fine-tuning: a safetensors file of its own."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flare_clef.errors import UserError
from flare_clef.network import Architecture, SegmentationNetwork, UNet
from flare_clef.training.operating_points import without_points
from flare_clef.weights import Weights, load_weights

BACKBONE = "backbone.safetensors"
_FORMAT = "flare-clef-backbone"


def save_backbone(path: Path, backbone: UNet, architecture: Architecture) -> None:
    """Writes the backbone in single precision, atomically."""
    metadata = {"format": _FORMAT, "architecture": json.dumps(asdict(architecture))}
    tensors = {k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_fitting(path: Path, architecture: Architecture, remedy: str) -> Weights:
    """A weights file whose network is ``architecture``.

    Raises UserError, one line, where it cannot be read or has another network; it ends with
    ``remedy``.
    """
    weights = load_weights(path)
    if weights.architecture != architecture:
        raise UserError(
            f"{path}: its network is {weights.architecture}, the recipe's {architecture}; {remedy}"
        )
    return weights


def load_start(path: Path, architecture: Architecture) -> SegmentationNetwork | UNet:
    """The backbone (or the whole network, from a weights file) that fine-tuning begins with.

    Operating points that a weights file was exported with are taken back: its export gives the
    run's result its own.
    Raises UserError where it cannot be read or is of another architecture.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); name a .safetensors file") from None
    if metadata.get("format") != _FORMAT:
        return without_points(load_fitting(path, architecture, "make [network] the same"))
    if json.loads(metadata["architecture"]) != json.loads(json.dumps(asdict(architecture))):
        raise UserError(
            f"{path}: its architecture is {metadata['architecture']}; make [network] the same"
        )
    backbone = UNet(architecture)
    try:
        backbone.load_state_dict(tensors)
    except RuntimeError:
        raise UserError(f"{path}: its tensors are not those of its architecture") from None
    return backbone

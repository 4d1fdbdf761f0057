"""What 8-bit inference knows beside the weights: ranges and offsets, and their place in the file.

Found in training (:mod:`flare_clef.training.calibration`), used by :mod:`flare_clef.quantised`.
Layers are named ``encoder.LEVEL.CONV``, ``decoder.LEVEL.CONV`` and ``head``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flare_clef.network import Architecture

HEAD = "head"
PREFIX = "int8."
"""Of the tensors in a weights file."""


@dataclass(frozen=True)
class Calibration:
    """Both by layer, float32, one number per channel."""

    ranges: dict[str, Tensor]
    """The activation that the highest of the whole numbers stands for; of all layers whose
    results are rounded."""
    offsets: dict[str, Tensor]
    """What is added to the layer's bias, for rounding shifts results in the mean; of all."""

    def tensors(self) -> dict[str, Tensor]:
        """By their names in a weights file."""
        parts = {"ranges": self.ranges, "offsets": self.offsets}
        return {
            f"{PREFIX}{layer}.{kind}": value
            for kind, values in parts.items()
            for layer, value in values.items()
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Calibration:
        """From tensors by their names in a weights file."""
        parts: dict[str, dict[str, Tensor]] = {"ranges": {}, "offsets": {}}
        for name, value in tensors.items():
            layer, _, kind = name.removeprefix(PREFIX).rpartition(".")
            parts[kind][layer] = value
        return cls(parts["ranges"], parts["offsets"])


def last_layer(architecture: Architecture) -> str:
    """The one before the head; its results stay float32."""
    return f"decoder.0.{architecture.decoder_convs[0] - 1}"


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int]]:
    """Of all tensors that a calibrated weights file has more."""
    layers = {
        f"{side}.{level}.{conv}": (architecture.widths[level],)
        for side, convs in (
            ("encoder", architecture.encoder_convs),
            ("decoder", architecture.decoder_convs),
        )
        for level, count in enumerate(convs)
        for conv in range(count)
    }
    offsets = {**layers, HEAD: (architecture.classes,)}
    del layers[last_layer(architecture)]
    return {
        f"{PREFIX}{layer}.{kind}": shape
        for kind, shapes in (("ranges", layers), ("offsets", offsets))
        for layer, shape in shapes.items()
    }

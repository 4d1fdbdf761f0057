"""Small networks and synthetic scans that several test modules share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from flare_clef.network import Architecture, SegmentationNetwork
from flare_clef.preparation import prepare
from flare_clef.weights import save_weights

TINY = Architecture(
    widths=(4, 8, 16), encoder_convs=(1, 2, 2), decoder_convs=(1, 2), head_channels=4
)
TINY_GRID = 32
TINY_INT8 = Architecture(
    widths=(16, 32, 48), encoder_convs=(1, 2, 2), decoder_convs=(1, 2), head_channels=16
)
"""The least that 8-bit convolutions take."""


def lively_network(architecture: Architecture = TINY, seed: int = 2) -> SegmentationNetwork:
    """A network with random weights and statistics whose label maps hold many organs."""
    torch.manual_seed(seed)
    network = SegmentationNetwork(architecture).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
            torch.nn.init.normal_(module.running_mean, 0, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    with torch.no_grad():
        network.head[2].weight.mul_(6)
        # Centred on a body, so that no one organ takes all of it.
        volume, _ = prepare(body_hu(), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), TINY_GRID)  # type: ignore[misc]
        network.head[2].bias.sub_(network(volume[None, None]).mean((0, 2, 3, 4)))
    return network


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of a tiny random network on a 32^3 grid."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, lively_network(), grid=TINY_GRID, record={"made": "by a test"})
    return path


def body_hu(shape: tuple[int, int, int] = (20, 40, 44), seed: int = 0) -> np.ndarray:
    """int16 HU (z, y, x): an ellipse of tissue with noise and a brighter lump, in air."""
    z, y, x = (np.linspace(-1, 1, n) for n in shape)
    radius = (y[None, :, None] / 0.7) ** 2 + (x[None, None, :] / 0.9) ** 2 + 0 * z[:, None, None]
    hu = np.where(radius < 1, 40.0, -1000.0)
    lump = (
        (z[:, None, None] - 0.2) ** 2
        + (y[None, :, None] + 0.1) ** 2
        + (x[None, None, :] - 0.3) ** 2
    )
    hu[lump < 0.09] = 180
    noise = np.random.default_rng(seed).normal(0, 12, shape)
    return np.where(radius < 1, hu + noise, hu).astype(np.int16)


def body_volume() -> torch.Tensor:
    """:func:`body_hu` prepared for the network: (z, y, x) of ``TINY_GRID``, in (-1, 1)."""
    prepared = prepare(body_hu(), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), TINY_GRID)
    assert prepared is not None
    return prepared[0]


def write_scan(path: Path, hu: np.ndarray | None = None, **geometry: tuple[float, ...]) -> Path:
    """Writes a scan (default: :func:`body_hu`) with SimpleITK and returns its path."""
    image = sitk.GetImageFromArray(body_hu() if hu is None else hu)
    image.SetSpacing(geometry.get("spacing", (1.5, 1.5, 3.0)))
    image.SetOrigin(geometry.get("origin", (-10.0, 5.0, 100.0)))
    if "direction" in geometry:
        image.SetDirection(geometry["direction"])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=True)
    return path


def write_dicom(
    folder: Path,
    positions,
    *,
    uid: str = "1.2.3",
    size: int = 16,
    tilt: float = 0.0,
    shift_mm: dict | None = None,
    pixel_mm: dict | None = None,
):
    """A series of slices whose voxels are their position in mm, ``positions`` along z.

    ``shift_mm`` along x and ``pixel_mm``, by position, are of single slices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, z in enumerate(positions):
        image = sitk.GetImageFromArray(np.full((1, size, size), int(z), np.int16))
        image.SetSpacing([(pixel_mm or {}).get(z, 1)] * 2 + [1])
        for tag, value in {
            "0008|0060": "CT", "0020|000e": uid, "0020|000d": "1.2", "0008|103e": f"series {uid}",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0008|0018": f"{uid}.{number + 1}",
            "0020|0013": str(99 - number), 
            "0020|0032": f"{(shift_mm or {}).get(z, 0)}\\{z * tilt}\\{z}",
            "0020|0037": "1\\0\\0\\0\\1\\0", "0028|1053": "1", "0028|1052": "-1024",
            "0020|0052": f"{uid}.0", "0018|0050": "3",
        }.items():  # fmt: skip
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{uid}-{number}.dcm"))
        writer.Execute(image)

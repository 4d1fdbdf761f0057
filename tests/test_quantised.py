"""The 8-bit forward pass: exact in slabs, near float32, inside its memory plan."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import TINY_GRID, TINY_INT8, body_volume, lively_network, write_scan
from test_inference import PEAK
from torch.nn import functional
from typer.testing import CliRunner

from flare_clef.calibration import tensor_shapes
from flare_clef.cli import app
from flare_clef.errors import UserError
from flare_clef.images import read_image
from flare_clef.inference import FoldedNetwork
from flare_clef.integer_convolution import FULL, REDUCED, highest_activation
from flare_clef.quantised import (
    QuantisedNetwork,
    balanced,
    calibration_from_norms,
    joined,
    named_blocks,
)
from flare_clef.segmenter import Segmenter
from flare_clef.training.calibration import calibrate
from flare_clef.weights import load_weights, save_weights

HIGHEST = highest_activation() or REDUCED
pytestmark = pytest.mark.skipif(
    highest_activation() is None, reason="this torch has no 8-bit convolution"
)


@pytest.fixture(scope="module")
def calibrated():
    network = lively_network(TINY_INT8)
    return network, calibrate(network, [lambda: body_volume()[None, None]])


@pytest.mark.parametrize(("first", "slices"), [(0, 4), (1, 2), (1, 3), (0, 3), (1, 1)])
@pytest.mark.parametrize("beyond", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_joined_is_nearest_upsampling_and_concatenation(
    first: int, slices: int, beyond: tuple[int, int]
):
    # All values of a byte: none may change where 16 of them are copied as if they were a number.
    coarse = torch.randint(0, 256, (1, 32, 2, 30, 40), dtype=torch.uint8)
    skip = torch.randint(0, 256, (1, 48, slices, 60, 80), dtype=torch.uint8)
    coarse, skip = (t.contiguous(memory_format=torch.channels_last_3d) for t in (coarse, skip))
    doubled = functional.interpolate(coarse.float(), scale_factor=2, mode="nearest").byte()
    found = joined(skip, coarse, first, beyond)
    wanted = torch.cat([skip, doubled[:, :, first : first + slices]], dim=1)
    assert torch.equal(found, functional.pad(wanted, (0, 0, 0, 0, *beyond)))
    assert found.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("slices", [2, 6, 16])
def test_slabs_equal_the_whole_bit_for_bit(calibrated, monkeypatch, slices: int):
    quantised = QuantisedNetwork(*calibrated, HIGHEST)
    volume = torch.rand(48, 32, 40) * 2 - 1
    monkeypatch.setattr(QuantisedNetwork, "slab_slices", (48,))
    whole = quantised(volume)
    monkeypatch.setattr(QuantisedNetwork, "slab_slices", (slices,))
    assert torch.equal(quantised(volume), whole)


@pytest.mark.parametrize("highest", sorted({REDUCED, HIGHEST}))
def test_logits_are_near_those_of_float32(calibrated, highest: int):
    network, calibration = calibrated
    volume = body_volume()
    exact = FoldedNetwork(network, torch.device("cpu"), "fp32")(volume)
    found = QuantisedNetwork(network, calibration, highest)(volume)
    assert found.shape == exact.shape and found.dtype == torch.float32
    error = (found - exact).abs().mean() / exact.std()
    assert error < (0.06 if highest < FULL else 0.03)
    agreeing = (found > 0) == (exact > 0)
    assert agreeing.float().mean() > 0.9


def test_calibration_from_norms_by_hand():
    network = lively_network(TINY_INT8)
    block = named_blocks(network)["encoder.1.0"]
    with torch.no_grad():
        block.norm.bias.copy_(torch.linspace(-1, 1, 32))
        block.norm.weight.fill_(0.5)
        block.norm.weight[0] = -2
    found = calibration_from_norms(network)
    # The first channel reaches -1 + 10 * 2, the last 1 + 10 * 0.5.
    assert float(found.ranges["encoder.1.0"][0]) == pytest.approx(19)
    assert float(found.ranges["encoder.1.0"][-1]) == pytest.approx(19 * (6 / 19) ** 0.75)
    assert not any(offsets.any() for offsets in found.offsets.values())
    assert {name: value.shape for name, value in found.tensors().items()} == tensor_shapes(
        TINY_INT8
    )


def test_balanced_lies_between_one_range_and_each_its_own():
    largest = torch.tensor([16.0, 1.0, 0.0])
    fine = balanced("encoder.1.0", largest)
    # (1/16) ** 0.75 = 1/8; what is never active gets a range that is small, but one.
    assert fine[:2].tolist() == pytest.approx([16.0, 2.0])
    assert 0 < float(fine[2]) < 0.2
    assert (balanced("encoder.1.0", torch.zeros(3)) > 0).all()
    assert balanced("decoder.4.2", largest).tolist() == [16.0] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("slices", [8, 2])
def test_the_peak_stays_under_the_plan(slices: int):
    made = (
        "from flare_clef.quantised import QuantisedNetwork, calibration_from_norms\n"
        f"plain = SegmentationNetwork().eval()\n"
        f"network = QuantisedNetwork(plain, calibration_from_norms(plain), {HIGHEST})\n"
    )
    line = next(line for line in PEAK.splitlines() if line.startswith("network ="))
    measured, planned = subprocess.run(
        [sys.executable, "-c", PEAK.replace(line, made), str(slices)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert 0.3 * int(planned) < int(measured) <= int(planned)


def test_a_network_of_other_widths_is_one_line(tiny_weights):
    with pytest.raises(UserError, match="multiples of 16 are needed; use auto"):
        Segmenter(tiny_weights, precision="int8")


def test_weights_carry_the_calibration_and_predict_uses_them(calibrated, tmp_path):
    network, calibration = calibrated
    with_ranges, without = tmp_path / "with.safetensors", tmp_path / "without.safetensors"
    save_weights(with_ranges, network, grid=TINY_GRID, calibration=calibration)
    save_weights(without, network, grid=TINY_GRID)
    loaded = load_weights(with_ranges).calibration
    assert loaded is not None
    assert all(torch.equal(v, calibration.tensors()[n]) for n, v in loaded.tensors().items())
    assert "calibrated" not in Segmenter(with_ranges, precision="int8").precision_reason
    assert "not calibrated" in Segmenter(without, precision="int8").precision_reason

    scan = write_scan(tmp_path / "scan.nii.gz")
    arguments = ["predict", str(scan), str(tmp_path / "labels.nii.gz")]
    options = ["--weights", str(with_ranges), "--precision", "int8"]
    ran = CliRunner().invoke(app, [*arguments, *options])
    assert ran.exit_code == 0, ran.output
    exact = Segmenter(with_ranges, precision="fp32").segment(read_image(scan)).labels
    found = read_image(tmp_path / "labels.nii.gz").array
    assert (found == exact).mean() > 0.9 and exact.any()

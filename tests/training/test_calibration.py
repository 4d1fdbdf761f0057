"""Calibration for 8 bits: ranges of least error, offsets that take back what rounding shifts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import TINY_INT8, body_volume, lively_network

from flare_clef.calibration import HEAD, Calibration, tensor_shapes
from flare_clef.inference import FoldedNetwork
from flare_clef.integer_convolution import FULL, highest_activation
from flare_clef.quantised import QuantisedNetwork, named_blocks
from flare_clef.training import calibration as module
from flare_clef.training.calibration import BINS, best_ranges, calibrate

full_bits = pytest.mark.skipif(
    highest_activation() != FULL, reason="this processor or torch has no 8-bit activations"
)


@pytest.fixture(scope="module")
def volume() -> torch.Tensor:
    return body_volume()


@pytest.fixture(scope="module")
def network():
    return lively_network(TINY_INT8)


@pytest.fixture(scope="module")
def calibration(network, volume) -> Calibration:
    return calibrate(network, [lambda: volume[None, None]])


def test_best_ranges_clip_what_is_rare_and_nothing_else():
    even = torch.ones(BINS)
    # All values below an eighth of the largest, but one in a million.
    rare = torch.zeros(BINS)
    rare[: BINS // 8] = 1e6
    rare[-1] = 1
    found = best_ranges(torch.stack([even, rare, torch.zeros(BINS)]), torch.tensor([8.0, 8.0, 0.0]))
    assert float(found[0]) == pytest.approx(8.0)
    assert 1.0 <= float(found[1]) < 2.0
    assert float(found[2]) == 0


def test_calibration_fits_the_network_and_sees_what_its_blocks_give(network, calibration, volume):
    tensors = calibration.tensors()
    assert {name: value.shape for name, value in tensors.items()} == tensor_shapes(TINY_INT8)
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        block.register_forward_hook(
            lambda m, i, out, name=name: seen.update({name: out.amax((0, 2, 3, 4))})
        )
        for name, block in named_blocks(network).items()
    ]
    with torch.no_grad():
        network(volume[None, None])
    for hook in hooks:
        hook.remove()
    # What the last convolution gives is never rounded.
    assert seen.keys() - calibration.ranges.keys() == {"decoder.0.0"}
    for name, ranges in calibration.ranges.items():
        most = seen[name]
        assert (ranges > 0).all() and float(ranges.max()) <= float(most.max()) * 1.001
        # No channel is cut to less than a twentieth of what it reaches.
        assert (ranges > 0.05 * most).all()


@full_bits
def test_what_is_simulated_is_what_the_integers_give(network, calibration, volume):
    """Offsets are found on floating-point numbers that are rounded; 8-bit inference has none."""
    none = {name: torch.zeros_like(value) for name, value in calibration.offsets.items()}
    integers = QuantisedNetwork(network, replace(calibration, offsets=none), FULL)(volume)
    with torch.no_grad():
        rounded = module._rounded(network, calibration.ranges)
        with module._activations_rounded(rounded, calibration.ranges):
            simulated = rounded(volume[None, None])[0]
    exact = FoldedNetwork(network, torch.device("cpu"), "fp32")(volume)
    rounding = (integers - exact).abs().mean()
    # A value within a float's rounding of a half may go either way, and others follow it.
    assert (integers - simulated).abs().mean() < 0.1 * rounding


@full_bits
def test_offsets_take_back_what_rounding_shifts(network, calibration, volume):
    """Ranges much too wide shift results; offsets must bring each logit's mean back."""
    wide = {name: value * 6 for name, value in calibration.ranges.items()}
    with torch.no_grad():
        offsets = module._offsets(network, wide, [lambda: volume[None, None]])
    exact = FoldedNetwork(network, torch.device("cpu"), "fp32")(volume)
    near = exact.abs() < 3

    def shift(of: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = QuantisedNetwork(network, Calibration(wide, of), FULL)(volume)
        return (((logits - exact) * near).sum((1, 2, 3)) / near.sum((1, 2, 3)).clamp_min(1)).abs()

    without = shift({name: torch.zeros_like(value) for name, value in offsets.items()})
    assert offsets[HEAD].shape == (13,)
    assert shift(offsets).mean() < 0.3 * without.mean()


def test_the_network_itself_stays_as_it_was(network, volume):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    calibrate(network, [lambda: volume[None, None]])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

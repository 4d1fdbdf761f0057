from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flare_clef.errors import UserError
from flare_clef.network import Architecture, SegmentationNetwork
from flare_clef.training.backbone import load_start
from flare_clef.training.weights_mean import load_others, take_mean
from flare_clef.weights import save_weights

SMALL = Architecture(widths=(2, 4), encoder_convs=(1, 1), decoder_convs=(1,), head_channels=2)


def filled(value: float) -> SegmentationNetwork:
    network = SegmentationNetwork(SMALL)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(value)
    return network.eval()


def test_three_count_alike_and_points_are_taken_back(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", filled(2.0))
    moved = filled(6.0)
    with torch.no_grad():
        moved.head[-1].bias[10] += 0.5  # stomach, organ 11
    record = {"operating_points": {"stomach": 0.5}}
    save_weights(tmp_path / "b.safetensors", moved, record=record)
    others = load_others([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], SMALL)
    network = filled(1.0)
    take_mean(filled(0.0), others)  # which leaves the others as they were
    take_mean(network, others)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, torch.tensor(3.0)), name  # (1 + 2 + 6) / 3


def test_a_start_is_the_network_as_it_was_trained(tmp_path: Path) -> None:
    """Else the next export would move it a second time."""
    moved = filled(6.0)
    with torch.no_grad():
        moved.head[-1].bias[10] += 0.5
    record = {"operating_points": {"stomach": 0.5}}
    save_weights(tmp_path / "b.safetensors", moved, record=record)
    start = load_start(tmp_path / "b.safetensors", SMALL)
    assert isinstance(start, SegmentationNetwork)
    assert all((t == 6.0).all() for t in start.parameters())


def test_none_changes_nothing() -> None:
    network = filled(1.5)
    take_mean(network, load_others([], SMALL))
    assert all((t == 1.5).all() for t in network.parameters())


def test_another_network_is_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", filled(1.0))
    with pytest.raises(UserError, match=r"a\.safetensors: its network is .* export\.mean_with"):
        load_others([tmp_path / "a.safetensors"], Architecture())

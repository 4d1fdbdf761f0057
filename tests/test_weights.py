"""Weights files: what goes in comes out, and what is wrong gets one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import TINY, lively_network
from safetensors import safe_open
from safetensors.torch import save_file

from flare_clef.calibration import tensor_shapes
from flare_clef.errors import UserError
from flare_clef.paths import checksum
from flare_clef.weights import load_weights, round_as_stored, save_weights


def _rewrite(source: Path, target: Path, metadata=None, tensors=None) -> Path:
    with safe_open(source, framework="pt") as file:
        old_metadata = dict(file.metadata())
        old = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata:
        old_metadata.update(metadata)
    if tensors:
        old = tensors(old)
    save_file(old, target, {k: v for k, v in old_metadata.items() if v is not None})
    return target


def _refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_weights(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


def test_round_trip_is_exact_in_half_precision(tmp_path: Path):
    network = lively_network()
    path = tmp_path / "w.safetensors"
    save_weights(path, network, grid=32, record={"hours": 2.5}, licence="research")
    loaded = load_weights(path)
    assert (loaded.grid, loaded.licence, loaded.record) == (32, "research", {"hours": 2.5})
    assert loaded.architecture == TINY
    again = loaded.network().state_dict()
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        expected = tensor if ".norm." in name else tensor.half().float()
        assert torch.equal(again[name], expected), name
    assert not loaded.network().training


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_rounding_as_stored_leaves_nothing_to_round(tmp_path: Path):
    network = lively_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    round_as_stored(network)
    after = network.state_dict()
    assert not torch.equal(after["head.2.weight"], before["head.2.weight"])
    norm = "backbone.encoder.0.0.norm.running_var"
    assert torch.equal(after[norm], before[norm])
    save_weights(tmp_path / "w.safetensors", network)
    stored = load_weights(tmp_path / "w.safetensors").network().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in stored.items())


def test_others_may_read_the_file_as_the_umask_says(tmp_path: Path):
    before = os.umask(0o022)
    try:
        save_weights(tmp_path / "w.safetensors", lively_network(), grid=32)
    finally:
        os.umask(before)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o644


def _calibrated(tiny_weights: Path, tmp_path: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """The weights with a calibration of ones, of which ``change`` takes away or replaces some."""
    parts = {name: torch.ones(shape) for name, shape in tensor_shapes(TINY).items()} | change

    def with_parts(tensors: dict) -> dict:
        return tensors | {name: value for name, value in parts.items() if value is not None}

    return _rewrite(tiny_weights, tmp_path / "w.safetensors", tensors=with_parts)


def test_a_calibration_comes_back(tmp_path: Path, tiny_weights: Path):
    offsets = torch.tensor([0.5, -2.0]).repeat(TINY.widths[1] // 2)
    path = _calibrated(tiny_weights, tmp_path, {"int8.decoder.1.0.offsets": offsets})
    weights = load_weights(path)
    assert weights.calibration is not None
    assert torch.equal(weights.calibration.offsets["decoder.1.0"], offsets)
    assert weights.calibration.ranges["encoder.0.0"].tolist() == [1.0] * TINY.widths[0]
    assert weights.calibration.offsets["head"].shape == (13,)
    assert not any(name.startswith("int8.") for name in weights.tensors)
    assert load_weights(tiny_weights).calibration is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"int8.encoder.0.0.ranges": None}, "lacks 1 tensor(s)"),
        ({"int8.encoder.9.0.ranges": torch.ones(4)}, "holds surplus 1 tensor(s)"),
        ({"int8.head.offsets": torch.ones(12)}, "is (12,), expected (13,)"),
        ({"int8.encoder.0.0.ranges": torch.zeros(TINY.widths[0])}, "not positive"),
        ({"int8.head.offsets": torch.full((13,), torch.nan)}, "not finite"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(tmp_path, tiny_weights, change, words: str):
    assert words in _refused(_calibrated(tiny_weights, tmp_path, change))


def test_a_loaded_network_computes_what_the_saved_one_did(tmp_path: Path):
    network = lively_network()
    save_weights(tmp_path / "w.safetensors", network, grid=32)
    volume = torch.rand(1, 1, 32, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = network(volume)
        found = load_weights(tmp_path / "w.safetensors").network()(volume)
    assert (found - expected).abs().max() < 5e-3 * expected.abs().max()


def test_default_size_is_66_mb(tmp_path: Path):
    from flare_clef.network import SegmentationNetwork

    path = tmp_path / "w.safetensors"
    save_weights(path, SegmentationNetwork())
    assert 65.9e6 < path.stat().st_size < 66.5e6


def test_cut_file(tiny_weights: Path, tmp_path: Path):
    content = tiny_weights.read_bytes()
    for keep in (0, 5, 100, len(content) - 1):
        path = tmp_path / f"cut{keep}.safetensors"
        path.write_bytes(content[:keep])
        assert "not a whole safetensors file" in _refused(path)


def test_pickle_is_never_read(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    torch.save({"a": torch.zeros(3)}, path)
    assert "not a whole safetensors file" in _refused(path)


def test_foreign_file(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    assert "not stated" in _refused(path)


def test_missing_and_folder(tmp_path: Path):
    assert "no such weights file" in _refused(tmp_path / "none.safetensors")
    assert "is a folder" in _refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": "2"}, "format version 2"),
        ({"grid": "30"}, "grid 30 is not a multiple of 4"),
        ({"grid": "big"}, "metadata cannot be used"),
        ({"organs": json.dumps(["liver"])}, "made for other organs (liver)"),
        ({"window_hu": json.dumps([-100, 300])}, "made for the window (-100, 300) HU"),
        ({"architecture": json.dumps({"widths": [4]})}, "metadata cannot be used"),
        ({"record": None}, "metadata cannot be used"),
    ],
)
def test_unusable_metadata(tiny_weights: Path, tmp_path: Path, change, words):
    path = _rewrite(tiny_weights, tmp_path / "w.safetensors", metadata=change)
    assert words in _refused(path)


def _drop(tensors):
    tensors.pop("head.0.weight")
    return tensors


def _add(tensors):
    return {**tensors, "extra": torch.zeros(1)}


def _reshape(tensors):
    return {**tensors, "head.0.weight": torch.zeros(5, 4, 1, 1, 1)}


def _poison(tensors):
    return {**tensors, "head.0.bias": torch.full_like(tensors["head.0.bias"], float("nan"))}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop, "lacks 1 tensor(s) of the architecture it states, such as head.0.weight"),
        (_add, "holds surplus 1 tensor(s) of the architecture it states, such as extra"),
        (_reshape, "tensor head.0.weight is (5, 4, 1, 1, 1), expected (4, 4, 1, 1, 1)"),
        (_poison, "tensor head.0.bias holds values that are not finite"),
    ],
)
def test_wrong_tensors(tiny_weights: Path, tmp_path: Path, change, words):
    path = _rewrite(tiny_weights, tmp_path / "w.safetensors", tensors=change)
    assert words in _refused(path)


def test_checksum_of_a_known_text(tmp_path: Path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")  # FIPS 180-2, example B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert checksum(path) == expected


def test_writing_leaves_nothing_behind_when_it_fails(tmp_path: Path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flare_clef.weights.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        save_weights(tmp_path / "w.safetensors", lively_network())
    assert list(tmp_path.iterdir()) == []


def test_the_model_card_names_the_file_beside_it():
    folder = Path(__file__).resolve().parent.parent / "weights"
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"SHA-256 `{checksum(folder / 'flare_clef.safetensors')}`" in card

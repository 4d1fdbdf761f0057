"""What benchmarks of training make of data before they measure anything."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from small_cases import LEFT, label_map, liver, write_pair

from flare_clef.images import Image, read_image
from flare_clef.training.cases import Case, read_labels
from flare_clef.training.datasets import read_dataset
from flare_clef.training.doubt import UNDECIDED

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """The module of a benchmark, by its name."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_what_people_left_undecided_stays_undecided(benchmark, monkeypatch, tmp_path: Path):
    """The liver by hand, in part undecided; the network calls all of the body a spleen."""
    module = benchmark("self_training")
    truth = liver()
    truth[5][truth[5] == 1] = UNDECIDED
    write_pair(tmp_path, "a", truth)
    (case,) = read_dataset(tmp_path).cases
    logits = torch.full((13, 8, 8, 8), -9.0)
    logits[2] = 9.0
    monkeypatch.setattr(module, "look_twice", lambda network, volume: logits.clone())
    labels, organs = module.label(None, case, read_image(case.image), 8)
    assert organs == ["liver", "spleen"]
    assert (labels[truth == UNDECIDED] == UNDECIDED).all()
    np.testing.assert_array_equal(labels == 1, truth == 1)


def test_scans_labelled_by_the_network_become_a_training_set(
    benchmark, monkeypatch, capsys, tmp_path: Path
):
    module = benchmark("self_training")
    for name in "abc":
        write_pair(tmp_path / "scans", name, None)
    images = tmp_path / "scans" / "images"
    for name, suffix in (("a", ".mha"), ("b", ".mhd")):
        old = images / f"{name}_0000.nii.gz"
        sitk.WriteImage(sitk.ReadImage(str(old)), str(images / f"{name}_0000{suffix}"))
        old.unlink()

    def label(network: object, case: Case, image: Image, grid: int) -> tuple[np.ndarray, list[str]]:
        if case.name == "c":
            return np.full_like(liver(), UNDECIDED), []
        return liver(), ["liver"]

    monkeypatch.setattr(module, "label", label)
    loaded = SimpleNamespace(network=lambda: None, grid=8)
    monkeypatch.setattr(module, "load_weights", lambda path: loaded)
    monkeypatch.setattr(module, "FoldedNetwork", lambda *_: None)
    for _ in range(2):
        module.label_all(Path("w.safetensors"), [tmp_path / "scans"], tmp_path / "new")
    assert "c: no organ is sure; left out" in capsys.readouterr().out
    found = read_dataset(tmp_path / "new")
    assert not found.problems
    assert [case.image.name for case in found.cases] == ["a_0000.mha", "b_0000.nii.gz"]
    for case in found.cases:
        assert read_image(case.image).array.shape == read_labels(case).array.shape


def test_the_made_up_case_has_all_organs(benchmark, tmp_path: Path):
    assert benchmark("training").made_up_case(tmp_path, 16).case.labelled.all()


def test_a_subset_holds_our_numbers(benchmark, tmp_path: Path):
    """nnU-Net's raw layout with numbers of its own, and a header with its voxels beside it."""
    module = benchmark("pretraining")
    labels = label_map(left_kidney=LEFT)
    write_pair(tmp_path, "a", np.where(labels > 0, 1, 0).astype(np.uint8))
    for ours, theirs in (("images", "imagesTr"), ("labels", "labelsTr")):
        (tmp_path / ours).rename(tmp_path / theirs)
    image = tmp_path / "imagesTr" / "a_0000.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(image)), str(image.with_name("a_0000.mhd")))
    image.unlink()
    listed = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "left_kidney": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(listed))
    (case,) = read_dataset(module.subset(tmp_path, 4, tmp_path / "links")).cases
    assert case.organs == ("left_kidney",)
    np.testing.assert_array_equal(read_labels(case).array, labels)
    assert read_image(case.image).array.shape == labels.shape


def test_skipped_steps_have_no_loss(benchmark, tmp_path: Path):
    logged = [{"loss": None if step == 3 else float(step)} for step in range(21)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    found = benchmark("pretraining").losses_over_time(tmp_path / "m.jsonl")
    # Twenty are left, two a tenth: the second tenth is of steps 2 and 4.
    assert found == [0.5, 3.0, 5.5, 7.5, 9.5, 11.5, 13.5, 15.5, 17.5, 19.5]

"""What a network is worth: by the product's path, undecided voxels and unlabelled organs aside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_GRID, body_hu, lively_network, write_scan

from flare_clef.images import read_image
from flare_clef.inference import FoldedNetwork
from flare_clef.organs import ORGANS
from flare_clef.preparation import prepare
from flare_clef.restoration import restore
from flare_clef.stray_parts import drop_stray_parts
from flare_clef.training.cases import Case
from flare_clef.training.doubt import UNDECIDED
from flare_clef.training.validation import means, validate


def test_undecided_voxels_are_not_judged(tmp_path: Path):
    network = lively_network()
    path = write_scan(tmp_path / "a_0000.nii.gz", body_hu())
    scan = read_image(path)
    volume, placement = prepare(scan.array, scan.direction, TINY_GRID, spacing_mm=scan.spacing_mm)
    logits = FoldedNetwork(network, torch.device("cpu"), "fp32")(volume)
    predicted = restore(logits, placement, winners=drop_stray_parts(logits))
    counts = np.bincount(predicted.ravel(), minlength=14)
    one, two = (int(i) + 1 for i in np.argsort(counts[1:])[-2:])
    names = {organ.index: organ.name for organ in ORGANS}

    def judge(reference: np.ndarray, *organs: int) -> dict[str, float]:
        labels = write_scan(tmp_path / "a.nii.gz", reference)
        case = Case("a", path, labels, tuple(names[i] for i in organs))
        seen = []
        table = validate(
            network, [case], TINY_GRID, "fp32",
            on_case=lambda case, found, truth, scores: seen.append((case.name, truth, scores)),
        )  # fmt: skip
        assert np.array_equal(seen[0][1], reference) and seen[0][2] == table["a"]
        return table["a"]

    assert judge(predicted, one, two) == {names[one]: 1.0, names[two]: 1.0}
    # The half of the volume that nobody decided: still all right, though organs are cut there.
    half = predicted.copy()
    half[: len(half) // 2] = UNDECIDED
    assert (half == one).any()
    assert judge(half, one)[names[one]] == 1.0
    # The same voxels called background count against the network.
    half[half == UNDECIDED] = 0
    kept, all_of_it = int((half == one).sum()), int((predicted == one).sum())
    expected = 2 * kept / (kept + all_of_it)
    assert expected < 1 and judge(half, one)[names[one]] == pytest.approx(expected, abs=1e-4)


def test_means_by_hand():
    table = {"a": {"liver": 0.5, "aorta": 1.0}, "b": {"liver": 0.7}}
    found = means(table)
    assert found == {"liver": pytest.approx(0.6), "aorta": 1.0, "mean": pytest.approx(0.8)}
    assert means({}) == {}


def test_organs_that_were_propagated_are_not_judged(tmp_path: Path):
    path = write_scan(tmp_path / "a_0000.nii.gz", body_hu())
    labels = write_scan(tmp_path / "a.nii.gz", np.full(body_hu().shape, 12, np.uint8))
    case = Case("a", path, labels, ("liver", "duodenum"), propagated="duodenum")
    assert case.judged == ("liver",)
    assert validate(lively_network(), [case], TINY_GRID, "fp32")["a"].keys() == {"liver"}

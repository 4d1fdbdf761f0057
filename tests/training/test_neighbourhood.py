"""Small networks that learn where an organ lies from its neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from bodies import body_labels, write_volume

from flare_clef.training.atlas_store import load_network, store_maps, store_network, store_survey
from flare_clef.training.atlas_votes import Surroundings, survey
from flare_clef.training.fusion import dsc
from flare_clef.training.neighbourhood import (
    Example,
    Learnt,
    NeighbourhoodNetwork,
    learn,
    network_inputs,
)
from flare_clef.training.registration import load_organ_maps, nearness_weights, warp

DUODENUM = 12


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Surroundings, np.ndarray]]:
    """Six bodies: what is known of each without the organ, and the organ's share."""
    folder = tmp_path_factory.mktemp("bodies")
    files = [write_volume(folder / f"{seed}.nii.gz", body_labels(seed)) for seed in range(6)]
    maps = [load_organ_maps(file, 4.0) for file in files]
    weights = nearness_weights(maps, DUODENUM)
    known = [survey(one, [m for m in maps if m is not one], DUODENUM, weights) for one in maps]
    return [
        (around, warp(one, DUODENUM, around.grid, sitk.Transform()))
        for around, one in zip(known, maps, strict=True)
    ]


def example(body: tuple[Surroundings, np.ndarray]) -> Example:
    return Example(network_inputs(body[0]), torch.from_numpy(body[1]))


def test_inputs_are_the_organs_in_their_places_and_the_vote(bodies) -> None:  # type: ignore[no-untyped-def]
    around, _ = bodies[0]
    inputs = network_inputs(around).numpy()
    assert inputs.shape == (14, *around.grid.shape)
    for organ in range(1, 14):
        wanted = around.organs.get(organ, np.zeros(around.grid.shape))
        np.testing.assert_array_equal(inputs[organ - 1], wanted)
    assert not inputs[DUODENUM - 1].any()
    np.testing.assert_array_equal(inputs[13], around.affine_vote)


def test_an_organ_is_found_in_bodies_that_were_not_learnt_from(bodies) -> None:  # type: ignore[no-untyped-def]
    shown = [frozenset(bodies[0][0].organs)]
    network = learn([example(body) for body in bodies[:4]], shown, seed=0, steps=80)
    learnt = Learnt([(frozenset(), network)])
    for around, true in bodies[4:]:
        chance = learnt.chance("new", around)
        assert dsc(chance > 0.5, true > 0.5) >= 0.7
        assert not chance[around.taken].any() and chance.dtype == np.float32
    # Without its neighbours it knows less: it is they that tell.
    around, true = bodies[5]
    alone = Surroundings(around.grid, {}, 0 * around.affine_vote, around.near, around.ranking)
    assert dsc(learnt.chance("new", alone) > 0.5, true > 0.5) < 0.6


def test_a_network_is_not_asked_about_what_it_has_seen(bodies) -> None:  # type: ignore[no-untyped-def]
    class Says(NeighbourhoodNetwork):
        def __init__(self, chance: float) -> None:
            super().__init__()
            self.logit = float(np.log(chance / (1 - chance)))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.full(inputs.shape[1:], self.logit)

    around, _ = bodies[0]
    learnt = Learnt([(frozenset({"a"}), Says(0.2)), (frozenset({"b"}), Says(0.6))])
    free = ~around.taken
    assert learnt.chance("a", around)[free] == pytest.approx(0.6)
    assert learnt.chance("b", around)[free] == pytest.approx(0.2)
    assert learnt.chance("new", around)[free] == pytest.approx(0.4)


def test_organs_that_are_not_shown_do_not_count(bodies) -> None:  # type: ignore[no-untyped-def]
    pancreas = 4
    network = learn([example(bodies[0])], [frozenset({1, 2, pancreas})], seed=0, steps=3)
    hidden = learn(
        [Example(example(bodies[0]).inputs.clone(), example(bodies[0]).organ)],
        [frozenset({1, 2, pancreas})], seed=0, steps=3,
    )  # fmt: skip
    stripped = example(bodies[0])
    stripped.inputs[[k for k in range(13) if k + 1 not in (1, 2, pancreas)]] = 0
    without = learn([stripped], [frozenset({1, 2, pancreas})], seed=0, steps=3)
    for one, two, three in zip(
        network.parameters(), hidden.parameters(), without.parameters(), strict=True
    ):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_a_kept_network_says_the_same_and_is_not_learnt_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flare_clef.training.neighbourhood.STEPS", 2)
    threads = torch.get_num_threads()
    files = [write_volume(tmp_path / f"{seed}.nii.gz", body_labels(seed)) for seed in range(3)]
    store = tmp_path / "store"
    maps = [store_maps(file, store, 4.0) for file in files]
    weights = {k: 1.0 for k in range(1, 14)}
    around = [
        store_survey(one, [m for m in maps if m != one], DUODENUM, weights, store) for one in maps
    ]
    pairs = list(zip(maps, around, strict=True))
    shown = [(1, 2, 4, 5, 6)]
    path = store_network(pairs, DUODENUM, shown, 0, store)
    made = path.stat().st_mtime_ns
    assert store_network(pairs, DUODENUM, shown, 0, store) == path
    assert path.stat().st_mtime_ns == made
    others = {
        store_network(pairs[:2], DUODENUM, shown, 0, store),
        store_network(pairs, DUODENUM, shown, 1, store),
        store_network(pairs, DUODENUM, [(1, 2)], 0, store),
    }
    assert len(others | {path}) == 4
    torch.set_num_threads(threads)
    network = load_network(path)
    inputs = torch.rand(14, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(network(inputs), load_network(path)(inputs))
    assert network.head.weight.abs().sum() > 0

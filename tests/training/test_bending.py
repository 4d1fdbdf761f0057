from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import SimpleITK as sitk
from bodies import body_labels, write_training_set, write_volume
from typer.testing import CliRunner

from flare_clef.cli import app
from flare_clef.errors import UserError
from flare_clef.images import image_from_array, read_image
from flare_clef.organs import ORGAN_BY_INDEX
from flare_clef.training import bent_sets
from flare_clef.training.bending import SPACING_MM, _unfolded, bend_towards, bent
from flare_clef.training.bent_sets import bend_all, pairs_of
from flare_clef.training.cases import Case, prepare_case
from flare_clef.training.datasets import read_dataset
from flare_clef.training.doubt import UNDECIDED
from flare_clef.training.recipe import DataSettings, load_recipe
from flare_clef.training.registration import Grid, OrganMaps, organ_maps_of
from flare_clef.training.run import Run, split

ORGANS = [ORGAN_BY_INDEX[k].name for k in (1, 2, 4, 5, 6, 9, 11, 12, 13)]


def _image(array: np.ndarray):  # type: ignore[no-untyped-def]
    return image_from_array(array, (4.0, 4.0, 4.0), (-100.0, -80.0, 30.0), np.eye(3).ravel())


def _maps(labels: np.ndarray) -> OrganMaps:
    return organ_maps_of(labels, _image(labels), SPACING_MM)


def test_organs_take_the_other_bodys_shapes_and_nothing_folds() -> None:
    bend = bend_towards(_maps(body_labels(0)), _maps(body_labels(3)))
    assert bend.dsc_after > max(0.85, bend.dsc_before + 0.05)
    field = bend.transform.GetDisplacementField()
    squeezed = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(field))
    assert 0.05 <= squeezed.min() < 1 < squeezed.max()
    edge = sitk.GetArrayFromImage(field)
    assert not edge[0].any() and not edge[:, -1].any() and not edge[:, :, 0].any()


def test_a_field_that_would_fold_is_weakened_as_a_whole() -> None:
    """In the middle x moves by a wave of 12 voxels' length whose slope is -2 at its steepest."""
    grid = Grid((0.0, 0.0, 0.0), (40, 40, 40), 4.0)
    field = np.zeros((40, 40, 40, 3))
    wave = 2 * 12 / (2 * np.pi) * np.sin(2 * np.pi * np.arange(40) / 12)
    field[..., 0] = 4.0 * wave
    image = _unfolded(field.copy(), grid).GetDisplacementField()
    squeezed = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(image))
    assert 0.05 <= squeezed.min() < 0.3
    inner = sitk.GetArrayFromImage(image)[8:-8, 8:-8, 8:-8]
    ratio = inner[..., 0][:, :, 1] / field[8:-8, 8:-8, 8:-8, 0][:, :, 1]
    assert ratio.min() > 0.3 and ratio.max() - ratio.min() < 1e-9 and ratio.max() < 0.6
    assert not inner[..., 1:].any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_field_that_is_no_number_is_refused(value: float) -> None:
    field = np.zeros((20, 20, 20, 3))
    field[10, 10, 10] = value
    with pytest.raises(UserError, match="the bend found is not finite"):
        _unfolded(field, Grid((0.0, 0.0, 0.0), (20, 20, 20), 4.0))


def test_a_slice_has_no_shapes() -> None:
    """Slice 22 of 44 shows seven organs, three slices of 4 mm a bit of each."""
    labels, other = body_labels(0), body_labels(3)
    for few in (slice(22, 23), slice(21, 24)):
        slab = other[few]
        image = image_from_array(slab, (4.0, 4.0, 4.0), (-100.0, -80.0, 30.0 + 4 * few.start))
        with pytest.raises(UserError, match=r"only \d organ\(s\) of which both show 16 mm"):
            bend_towards(_maps(labels), organ_maps_of(slab, image, SPACING_MM))
    thick = other[16:30]
    image = image_from_array(thick, (4.0, 4.0, 4.0), (-100.0, -80.0, 30.0 + 4 * 16))
    bend = bend_towards(_maps(labels), organ_maps_of(thick, image, SPACING_MM))
    assert bend.dsc_after > bend.dsc_before > 0.3


def test_towards_itself_nothing_moves() -> None:
    bend = bend_towards(_maps(body_labels(0)), _maps(body_labels(0)))
    assert np.abs(sitk.GetArrayFromImage(bend.transform.GetDisplacementField())).max() < 0.5
    assert bend.dsc_before == pytest.approx(1, abs=0.02)
    labels = body_labels(0)
    assert (bent(_image(labels), bend, labels=True) == labels).mean() > 0.999


def test_every_voxel_comes_from_where_the_transform_says() -> None:
    """By hand, voxel by voxel; image and labels from the same place."""
    labels = body_labels(0)
    scan = np.random.default_rng(0).integers(-200, 300, labels.shape).astype(np.int16)
    bend = bend_towards(_maps(labels), _maps(body_labels(3)))
    moved_labels = bent(_image(labels), bend, labels=True)
    moved_scan = bent(_image(scan), bend, labels=False)
    assert moved_labels.dtype == np.uint8 and moved_scan.dtype == np.int16
    origin = np.array([-100.0, -80.0, 30.0])
    changed = 0
    for z, y, x in np.random.default_rng(1).integers(4, 40, (200, 3)):
        here = origin + 4 * np.array([x, y, z])
        place = (np.array(bend.transform.TransformPoint(here.tolist())) - origin)[::-1] / 4
        low = np.floor(place).astype(int)
        nearest = np.floor(place + 0.5).astype(int)
        if np.abs(place + 0.5 - np.round(place + 0.5)).min() > 1e-3:
            assert moved_labels[z, y, x] == labels[tuple(nearest)]
        share = place - low
        value = sum(
            np.prod([share[a] if corner[a] else 1 - share[a] for a in range(3)])
            * scan[tuple(low + corner)]
            for corner in np.ndindex(2, 2, 2)
        )
        assert abs(moved_scan[z, y, x] - value) <= 1
        changed += bool(np.abs(place - [z, y, x]).max() > 0.5)
    assert changed > 20


def test_beyond_the_scan_its_nearest_voxel_is_taken() -> None:
    labels = body_labels(0)
    bend = bend_towards(_maps(labels), _maps(body_labels(3)))
    constant = np.full(labels.shape, 40, np.int16)
    np.testing.assert_array_equal(bent(_image(constant), bend, labels=False), constant)


def test_heights_that_one_volume_lacks_have_no_say() -> None:
    """Half of the other body is missing: what is bent there is not squeezed out of the way."""
    labels, half = body_labels(0), body_labels(0)[:24]
    bend = bend_towards(_maps(labels), _maps(half))
    moved = bent(_image(labels), bend, labels=True)
    for organ in (1, 11):  # both reach far beyond the cut
        assert (moved == organ).sum() == pytest.approx((labels == organ).sum(), rel=0.1)


def test_too_few_common_organs() -> None:
    few = np.where(body_labels(1) == 1, 1, 0).astype(np.uint8)
    with pytest.raises(UserError, match=r"only 1 organ\(s\) in common"):
        bend_towards(_maps(body_labels(0)), _maps(few))


def test_pairs_take_turns_and_none_comes_twice() -> None:
    maps = [Path("a.nii.gz"), Path("b.nii.gz")]
    cases = [Case(name, Path(name), Path(name), ()) for name in "xyz"]
    found = [(path.name[0], case.name) for path, case in pairs_of(maps, cases, 5)]
    assert found == [("a", "x"), ("b", "y"), ("a", "z"), ("b", "x"), ("a", "y")]
    for among in (cases, cases[:2], cases[:1]):
        every = pairs_of(maps, among, 99)
        assert len(every) == len(set(every)) == 2 * len(among)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Two maps and a bad one over two cases, one of which has a propagated duodenum."""
    folder = tmp_path_factory.mktemp("bending")
    for seed in (3, 4):
        write_volume(folder / "maps" / f"m{seed}.nii.gz", body_labels(seed), seed == 4)
    write_volume(folder / "maps" / "odd.nii.gz", np.full((9, 9, 9), 77, np.uint8))
    doubtful = body_labels(0)
    doubtful[(doubtful == 12) & (np.arange(doubtful.shape[0])[:, None, None] < 15)] = UNDECIDED
    write_training_set(
        folder / "cases", {"p": doubtful, "q": body_labels(8)}, {"p": ORGANS, "q": ORGANS}
    )
    chance = np.where(body_labels(0) == 12, 200, 0).astype(np.uint8)
    write_volume(folder / "cases" / "probabilities" / "p.nii.gz", chance)
    entries = json.loads((folder / "cases" / "cases.json").read_text())
    entries["p"] |= {"propagated": ["duodenum"], "source": "made up"}
    (folder / "cases" / "cases.json").write_text(json.dumps(entries))
    command = [
        *("train", "bend", "--shapes", str(folder / "maps"), "--workers", "2"),
        *("--cases", str(folder / "cases"), "--output", str(folder / "out"), "--count", "4"),
    ]
    return folder, command, CliRunner().invoke(app, command)


def test_the_rest_is_done_beside_a_bad_label_map(run) -> None:  # type: ignore[no-untyped-def]
    folder, _, result = run
    assert result.exit_code == 1
    assert "odd.nii.gz: holds the value 77" in result.output
    assert "3 scan(s) bent, 1 problem(s)" in result.output
    names = sorted(case.name for case in read_dataset(folder / "out").cases)
    assert names == ["p_as_m3", "q_as_m3", "q_as_m4"]


def test_what_is_written_is_a_training_set(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder, _, _ = run
    cases = {case.name: case for case in read_dataset(folder / "out").cases}
    doubtful = cases["p_as_m3"]
    assert doubtful.propagated == "duodenum" and doubtful.chances is not None
    assert doubtful.source == "made up; bent to the shapes of m3"
    assert cases["q_as_m4"].source == "q; bent to the shapes of m4"
    assert {name: case.bent_from for name, case in cases.items()} == {
        "p_as_m3": "p", "q_as_m3": "q", "q_as_m4": "q",
    }  # fmt: skip
    assert not cases["q_as_m4"].propagated
    assert {case.shapes_of for case in cases.values()} == {"m3", "m4"}
    for case in cases.values():
        prepare_case(case, tmp_path / "store", 32)
    assert doubtful.labels is not None
    labels, chance = read_image(doubtful.labels).array, read_image(doubtful.chances).array
    duodenum = (labels == 12) | (labels == UNDECIDED)
    assert UNDECIDED in labels and (chance[duodenum] > 60).mean() > 0.95
    assert (chance[(labels != 12) & (labels != UNDECIDED)] < 140).mean() > 0.99


@pytest.mark.parametrize("aside", ['data.validation=["q"]', "data.folds=2"])
def test_no_bent_copy_of_a_case_kept_aside_is_trained_on(run, aside: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder, _, _ = run
    stage = "grid = 64\nsteps = 1\nlearning_rate = [1e-3, 1e-4]\n"
    (tmp_path / "r.toml").write_text(f"[[finetune.stages]]\n{stage}")
    recipe = load_recipe(tmp_path / "r.toml", [aside])
    said: list[str] = []
    cases = [
        case
        for part in ("cases", "out")
        for case in read_dataset(folder / part).cases
        if case.labels is not None
    ]
    trained, kept = split(cast(Run, SimpleNamespace(recipe=recipe, say=said.append)), cases)
    (other,) = {"p", "q"} - {case.name for case in kept}
    assert {case.bent_from or case.name for case in trained} == {other}
    assert len(trained) == (2 if other == "p" else 3)
    left_out = 5 - 1 - len(trained)
    assert said == [
        f"{left_out} bent scan(s) of cases kept aside, or in their shapes, are left out"
    ]


def test_a_scan_in_the_shapes_of_a_case_kept_aside_is_left_out() -> None:
    shaped = Case("p_as_v", Path(), Path(), ("liver",), bent_from="p", shapes_of="v")
    cases = [Case(name, Path(), Path(), ("liver",)) for name in "pqv"] + [shaped]
    data = DataSettings(validation=("v",))
    recipe = SimpleNamespace(data=data, finetune=SimpleNamespace(repeats={}))
    run = cast(Run, SimpleNamespace(recipe=recipe, say=lambda line: None))
    assert [case.name for case in split(run, cases)[0]] == ["p", "q"]
    assert shaped.origins == {"p_as_v", "p", "v"}


def _written(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")
    }


def test_a_second_run_bends_nothing_again(run) -> None:  # type: ignore[no-untyped-def]
    folder, command, _ = run
    before, listed = _written(folder / "out"), (folder / "out" / "cases.json").read_bytes()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1 and "3 scan(s) bent, 1 problem(s)" in again.output
    assert "DSC" not in again.output
    assert _written(folder / "out") == before
    assert (folder / "out" / "cases.json").read_bytes() == listed


def test_a_folder_of_other_pairs_is_refused(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder, command, _ = run
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)

    def refused(name: str, *options: str) -> None:
        before = _written(out)
        result = CliRunner().invoke(app, [*command, "--output", str(out), *options])
        assert result.exit_code == 1
        assert f"holds images/ or labels/ already, {name} among them" in str(result.exception)
        assert _written(out) == before

    refused("q_as_m3", "--count", "2")
    # Another scan of the same name.
    shutil.copytree(folder / "cases", tmp_path / "cases")
    write_volume(tmp_path / "cases" / "labels" / "p.nii.gz", body_labels(5))
    refused("p_as_m3", "--cases", str(tmp_path / "cases"))
    # As an earlier version left it: of which files is not known.
    entries = json.loads((out / "cases.json").read_text())
    del entries["q_as_m4"]["made_of"]
    (out / "cases.json").write_text(json.dumps(entries))
    refused("q_as_m4")
    write_volume(out / "images" / "own_0000.nii.gz", np.zeros((3, 3, 3), np.int16))
    refused("own")


BendOne = Callable[[Path, Case, Path], tuple[float, float]]


@pytest.fixture
def bending_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[BendOne], None]:
    """Puts something in the place of the work; in threads, as other processes would not see it."""

    def put(bend_one: BendOne) -> None:
        monkeypatch.setattr(bent_sets, "bend_one", bend_one)
        monkeypatch.setattr(
            bent_sets, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers)
        )

    return put


def test_what_was_broken_off_goes_on(
    run, tmp_path: Path, bending_is: Callable[[BendOne], None]
) -> None:
    folder, _, _ = run
    cases, out, bent_now = read_dataset(folder / "cases").cases, tmp_path / "out", []

    def bend_one(label_map: Path, case: Case, output: Path) -> tuple[float, float]:
        if label_map.name == "odd.nii.gz":
            raise UserError(f"{label_map}: odd")
        name = bent_sets.name_of(case, label_map)
        bent_now.append(name)
        for part in (f"images/{name}_0000", f"labels/{name}", f"probabilities/{name}"):
            if case.chances or not part.startswith("prob"):
                shutil.copy(label_map, write_volume(output / f"{part}.nii.gz", np.zeros((2, 2, 2))))
        return 0.5, 0.6

    def stop(name: str, before: float, after: float) -> None:
        raise KeyboardInterrupt

    bending_is(bend_one)
    with pytest.raises(KeyboardInterrupt):
        bend_all(folder / "maps", cases, out, count=4, on_done=stop)
    (first,) = json.loads((out / "cases.json").read_text())
    assert first == "p_as_m3"
    # A pair whose files are there, but not in the list, was broken off: it is done again.
    bent_now.clear()
    result = bend_all(folder / "maps", cases, out, count=4)
    assert bent_now == ["q_as_m4", "q_as_m3"] and set(result.overlaps) == set(bent_now)
    assert list(result.cases) == ["p_as_m3", "q_as_m4", "q_as_m3"]
    assert json.loads((out / "cases.json").read_text()) == result.cases
    (out / "labels" / "q_as_m4.nii.gz").unlink()
    bent_now.clear()
    bend_all(folder / "maps", cases, out, count=4)
    assert bent_now == ["q_as_m4"]


def test_whatever_goes_wrong_with_a_pair_is_its_line(
    run, tmp_path: Path, bending_is: Callable[[BendOne], None]
) -> None:
    folder, _, _ = run
    said = (
        "Exception thrown in SimpleITK DemonsExecute: demons.cxx:5:\nITK ERROR: Demons(0x1): no way"
    )
    wrong = {"p_as_m3": MemoryError(), "q_as_m4": RuntimeError(said)}

    def bend_one(label_map: Path, case: Case, output: Path) -> tuple[float, float]:
        if error := wrong.get(bent_sets.name_of(case, label_map)):
            raise error
        return 0.5, 0.6

    bending_is(bend_one)
    cases = read_dataset(folder / "cases").cases
    result = bend_all(folder / "maps", cases, tmp_path / "out", count=4)
    assert list(result.cases) == ["p_as_odd", "q_as_m3"]
    maps = folder / "maps"
    assert sorted(result.problems) == [
        f"{maps}/m3.nii.gz over p: MemoryError; left out",
        f"{maps}/m4.nii.gz over q: no way; left out",
    ]


def test_labels_numbered_otherwise_and_a_bad_case_named_once(tmp_path: Path) -> None:
    """nnU-Net's layout with our numbers the other way round, beside a case without a label."""
    ours = body_labels(0)
    theirs = np.where(ours > 0, 14 - ours, 0).astype(np.uint8)
    for name, labels in (("a", theirs), ("void", np.zeros_like(theirs))):
        scan = np.full(ours.shape, 40, np.int16)
        write_volume(tmp_path / "set" / "imagesTr" / f"{name}_0000.nii.gz", scan)
        write_volume(tmp_path / "set" / "labelsTr" / f"{name}.nii.gz", labels)
    numbers = {ORGAN_BY_INDEX[k].name: 14 - k for k in range(1, 14)}
    listed = {"channel_names": {"0": "CT"}, "labels": {"background": 0, **numbers}}
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(listed))
    for seed in (3, 4):
        write_volume(tmp_path / "maps" / f"m{seed}.nii.gz", body_labels(seed))
    result = bend_all(
        tmp_path / "maps", read_dataset(tmp_path / "set").cases, tmp_path / "out", count=4
    )
    assert list(result.cases) == ["a_as_m3", "a_as_m4"]
    assert len(result.problems) == 1 and "void.nii.gz: no voxel is labelled" in result.problems[0]
    moved = read_image(tmp_path / "out" / "labels" / "a_as_m3.nii.gz").array
    bend = bend_towards(_maps(ours), _maps(body_labels(3)))
    np.testing.assert_array_equal(moved, bent(_image(ours), bend, labels=True))


def test_no_labelled_case(tmp_path: Path) -> None:
    write_volume(tmp_path / "maps" / "m.nii.gz", body_labels(1))
    write_volume(tmp_path / "scans" / "a_0000.nii.gz", np.full((9, 9, 9), 40, np.int16))
    command = ["train", "bend", "--shapes", str(tmp_path / "maps"), "--cases"]
    result = CliRunner().invoke(
        app, [*command, str(tmp_path / "scans"), "-o", str(tmp_path / "out")]
    )
    assert result.exit_code == 1 and "no cases with labels" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_no_case_is_bent_to_its_own_shapes(tmp_path: Path) -> None:
    write_training_set(tmp_path / "cases", {"p": body_labels(0)}, {"p": ORGANS})
    command = [
        *("train", "bend", "--shapes", str(tmp_path / "cases" / "labels")),
        *("--cases", str(tmp_path / "cases"), "--output", str(tmp_path / "out")),
    ]
    refused = CliRunner().invoke(app, command)
    assert "only the label map of the case itself" in str(refused.exception)
    assert not (tmp_path / "out" / "images").exists()

"""Folder layouts: what is found in them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_cases import liver, write_pair

from flare_clef.errors import UserError
from flare_clef.organs import ORGANS
from flare_clef.training.cases import find_cases
from flare_clef.training.datasets import read_dataset, read_datasets

ALL = tuple(organ.name for organ in ORGANS)


def touch(folder: Path, *names: str) -> None:
    """Empty files: a layout is read without opening a scan."""
    for name in names:
        path = folder / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_our_layout_with_and_without_labels(tmp_path: Path):
    write_pair(tmp_path, "a", liver(), ("liver", "spleen"))
    write_pair(tmp_path, "b", None)
    one, two = read_dataset(tmp_path).cases
    assert (one.name, one.organs, one.source) == ("a", ("liver", "spleen"), "a test")
    assert one.labels == tmp_path / "labels" / "a.nii.gz"
    assert (two.name, two.labels, two.organs) == ("b", None, ())
    assert [case.name for case in find_cases(tmp_path)] == ["a"]


def test_a_label_map_that_went_missing_is_named(tmp_path: Path):
    touch(tmp_path, "images/a_0000", "labels/a", "images/b_0000")
    entry = {"organs": ["liver"]}
    (tmp_path / "cases.json").write_text(json.dumps({"a": entry, "b": entry}))
    found = read_dataset(tmp_path)
    assert [(case.name, case.organs) for case in found.cases] == [("a", ("liver",)), ("b", ())]
    assert "case b names organs, but" in found.problems[0] and len(found.problems) == 1


def test_names_without_a_channel_and_other_formats(tmp_path: Path):
    touch(tmp_path, "images/a", "labels/a")
    (tmp_path / "images" / "b_0000.mha").touch()
    (tmp_path / "labels" / "b.nrrd").touch()
    (tmp_path / "images" / "notes.txt").touch()
    entry = {"organs": ["liver"]}
    (tmp_path / "cases.json").write_text(json.dumps({"a": entry, "b": entry}))
    found = read_dataset(tmp_path)
    assert [case.name for case in found.cases] == ["a", "b"] and not found.problems
    assert [case.labels.name for case in found.cases] == ["a.nii.gz", "b.nrrd"]


@pytest.mark.parametrize(
    ("one", "other", "refused"),
    [("images/a", "images/a_0000", True), ("images/a_0000.mha", "images/a_0000", True),
     ("labels/a.nrrd", "labels/a", True), ("images/a_0000", "images/ab", False)],
)  # fmt: skip
def test_two_files_of_one_case_are_named(tmp_path: Path, one: str, other: str, refused: bool):
    touch(tmp_path, "images/a_0000", "labels/a", other)
    first = tmp_path / (one if "." in one else f"{one}.nii.gz")
    first.touch()
    (tmp_path / "cases.json").write_text('{"a": {"organs": ["liver"]}}')
    if refused:
        with pytest.raises(UserError, match=r"beside it is of the same case; remove one") as caught:
            read_dataset(tmp_path)
        assert first.name in str(caught.value) and f"{Path(other).name}.nii.gz" in str(caught.value)
    else:
        assert [case.name for case in read_dataset(tmp_path).cases] == ["a", "ab"]


@pytest.mark.parametrize("propagated", [3, None, "liver"])
def test_what_is_propagated_must_be_a_list(tmp_path: Path, propagated: object):
    touch(tmp_path, "images/a_0000", "labels/a", "images/b_0000", "labels/b")
    entry = {"organs": ["liver"], "bent_from": None}
    listed = {"a": {**entry, "propagated": propagated}, "b": {**entry, "propagated": []}}
    (tmp_path / "cases.json").write_text(json.dumps(listed))
    found = read_dataset(tmp_path)
    assert [(case.name, case.bent_from) for case in found.cases] == [("b", "")]
    (problem,) = found.problems
    assert f'case a has "propagated": {json.dumps(propagated)}; must be a list' in problem


def test_one_cases_json_for_several_folders(tmp_path: Path):
    touch(tmp_path / "x", "images/a_0000", "labels/a")
    touch(tmp_path / "y", "images/b_0000")
    (tmp_path / "cases.json").write_text('{"x": {"a": {"organs": ["aorta"]}}, "y": {"b": {}}}')
    found = read_datasets([tmp_path / "x", tmp_path / "y"])
    assert [case.organs for case in found.cases] == [("aorta",), ()] and not found.problems


def test_every_fault_of_a_folder_is_named(tmp_path: Path):
    touch(tmp_path, "images/a_0000", "images/b_0000", "images/c_0000")
    touch(tmp_path, "labels/a", "labels/b", "labels/c", "labels/lonely")
    (tmp_path / "cases.json").write_text('{"a": {"organs": ["liver"]}, "b": {"organs": ["brain"]}}')
    found = read_dataset(tmp_path)
    assert [case.name for case in found.cases] == ["a"]
    lonely, unknown, silent = found.problems
    assert "lonely.nii.gz: a label map without an image; images/lonely_0000.nii.gz" in lonely
    assert "case b names unknown organs ['brain']" in unknown
    assert "case c has a label map, but no" in silent
    with pytest.raises(UserError, match="a label map without an image"):
        find_cases(tmp_path)


def test_labels_alone_are_refused(tmp_path: Path):
    touch(tmp_path / "data", "labels/a")
    (tmp_path / "data" / "cases.json").write_text('{"a": {"organs": ["liver"]}}')
    found = read_dataset(tmp_path / "data")
    assert not found.cases and "no image (NAME_0000.nii.gz) in it" in found.problems[0]
    touch(tmp_path / "maps", "flare22_0001", "flare22_0002")
    with pytest.raises(UserError, match="neither images/ nor imagesTr/"):
        read_dataset(tmp_path / "maps")


def test_labels_that_nobody_explains(tmp_path: Path):
    touch(tmp_path / "data", "images/a_0000", "labels/a")
    with pytest.raises(UserError, match="no cases.json here or above it"):
        read_dataset(tmp_path / "data")


def nnunet(folder: Path, **description) -> Path:
    touch(folder, "imagesTr/a_0000", "imagesTr/b_0000", "labelsTr/a")
    description = {"channel_names": {"0": "CT"}, **description}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "Gall Bladder": 1, "kidney-left": 2, "Postcava": 3, "ignore": 4},
        {"0": "background", "1": "gallbladder", "2": "LK", "3": "IVC", "4": "ignore"},
    ],
)
def test_nnunet_names_are_mapped_to_ours(tmp_path: Path, labels: dict):
    one, two = read_dataset(nnunet(tmp_path, labels=labels, name="mine")).cases
    assert one.renumbering == ((0, 0), (1, 9), (2, 13), (3, 6), (4, 255))
    assert set(one.organs) == {"gallbladder", "left_kidney", "inferior_vena_cava"}
    assert one.source == "mine" and two.labels is None and two.organs == ()


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({"labels": {"background": 0, "prostate": 1, "liver": 2}}, "unknown 'prostate'"),
        ({"labels": {"liver": [1, 2]}}, "liver is a region of several values"),
        ({"labels": {"liver": 1, "Liver": 2}}, "two of them mean liver"),
        ({"labels": {"liver": 700}}, "liver = 700; must be 0 to 255"),
        ({"labels": {"\u00b2": "liver"}}, "liver = '\u00b2'; must be 0 to 255"),
        ({"labels": {"background": 0, "liver": 0}}, "liver = 0; 0 is the background"),
        ({"labels": {"liver": 0}}, "liver = 0; 0 is the background"),
        ({"labels": {"liver": 1, "spleen": 1}}, "spleen = 1, and another too; one a value"),
        ({"labels": {"liver": 1}, "channel_names": 1}, "channel_names is 1; must be as"),
        ({"labels": {"liver": 1}, "channel_names": None}, "channel_names is null; must be as"),
        ({"labels": {"liver": 1}, "channel_names": {"0": "T1", "1": "T2"}}, "several modalities"),
        ({}, 'no "labels"'),
    ],
)
def test_nnunet_descriptions_that_are_refused(tmp_path: Path, description: dict, words: str):
    with pytest.raises(UserError, match=words) as caught:
        read_dataset(nnunet(tmp_path, **description))
    assert "\n" not in str(caught.value)


def test_several_values_may_be_ignored_or_background(tmp_path: Path):
    labels = {"background": 0, "Background": 2, "ignore": 3, "Ignore": 4, "liver": 1}
    (case, _) = read_dataset(nnunet(tmp_path, labels=labels)).cases
    assert case.renumbering == ((0, 0), (1, 1), (2, 0), (3, 255), (4, 255))


def test_a_second_channel_is_refused(tmp_path: Path):
    touch(tmp_path, "imagesTr/a_0001")
    with pytest.raises(UserError, match="several modalities"):
        read_dataset(nnunet(tmp_path, labels={"liver": 1}))


def test_the_challenges_folders(tmp_path: Path):
    later = tmp_path / "later"  # FLARE23 and 24 label some organs only
    touch(later, "images/FLARE23_0001_0000", "labels/FLARE23_0001")
    with pytest.raises(UserError, match="no cases.json here or above it; it names each case's"):
        read_dataset(later)
    part = tmp_path / "FLARE22LabeledCase50"
    touch(part, "images/FLARE22_Tr_0001_0000", "labels/FLARE22_Tr_0001")
    touch(tmp_path / "FLARE22UnlabeledCase2000", "Case_00001_0000", "Case_00002_0000")
    (case,) = read_dataset(part).cases
    assert (case.name, case.organs) == ("FLARE22_Tr_0001", ALL)
    found = read_dataset(tmp_path)
    assert [c.name for c in found.cases] == ["FLARE22_Tr_0001", "Case_00001", "Case_00002"]
    assert [c.labels is None for c in found.cases] == [False, True, True]


def test_two_cases_of_one_name_and_a_missing_folder(tmp_path: Path):
    touch(tmp_path, "x/images/a_0000", "y/images/a_0000")
    found = read_datasets([tmp_path / "x", tmp_path / "nowhere", tmp_path / "y"])
    assert len(found.cases) == 1
    missing, twice = found.problems
    assert "no such folder" in missing and "a case a is in" in twice

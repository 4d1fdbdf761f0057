"""What the files of a batch hold after one run, several, and several at once."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from flare_clef.errors import UserError
from flare_clef.images import image_from_array
from flare_clef.measurement_files import MeasurementFiles
from flare_clef.measurements import measure
from flare_clef.organs import ORGAN_BY_NAME

LIVER, RIGHT = (ORGAN_BY_NAME[n].index for n in ("liver", "right_kidney"))


def case(name: str, organs: set[int]):
    labels = np.full((3, 3, 3), LIVER, np.uint8)
    scan = image_from_array(np.zeros(labels.shape, np.int16), (2.0, 3.0, 5.0))
    return measure(name, labels, scan, organs=organs)


def written(folder, name="measurements.json"):
    return [c["case"] for c in json.loads((folder / name).read_text())["cases"]]


def test_files_keep_what_an_earlier_run_wrote(tmp_path):
    MeasurementFiles(tmp_path).add(case("a", {LIVER, RIGHT}), {"input": "a.nii.gz"})
    again = MeasurementFiles(tmp_path, keep=True)
    assert again.knows("a", tmp_path / "a.mha") and not again.knows("b", tmp_path / "b.mha")
    again.gather()
    again.add(case("b", {LIVER}), {})
    assert written(tmp_path) == ["a", "b"]
    first = json.loads((tmp_path / "measurements.json").read_text())["cases"][0]
    assert first["input"] == "a.nii.gz"
    with (tmp_path / "measurements.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["organ"]) for r in rows] == [
        ("a", "liver"), ("a", "right_kidney"), ("b", "liver"),
    ]  # fmt: skip
    assert rows[0]["volume_ml"] == "0.81" and rows[0]["box_depth_mm"] == "9.0"
    assert rows[0]["touches_edge"] == "inferior superior anterior posterior right left"
    assert rows[1]["hu_mean"] == "" and rows[1]["parts"] == "0"
    # A case that is computed again has one row an organ, not two.
    MeasurementFiles(tmp_path, keep=True).add(case("a", {LIVER}), {})
    assert written(tmp_path) == ["a", "b"]
    MeasurementFiles(tmp_path).add(case("c", {LIVER}), {})
    assert written(tmp_path) == ["c"]
    (tmp_path / "measurements.json").write_text("{")
    with pytest.raises(UserError, match="not readable as earlier measurements"):
        MeasurementFiles(tmp_path, keep=True)


def test_what_is_wrong_with_a_scan_stands_in_both_files(tmp_path):
    MeasurementFiles(tmp_path).add(case("a", {RIGHT, LIVER}), {}, ["not HU"])
    kidney = "right kidney missing: removed, outside, or overlooked"
    whole = json.loads((tmp_path / "measurements.json").read_text())["cases"][0]
    assert whole["warnings"] == ["not HU", kidney]
    with (tmp_path / "measurements.csv").open() as file:
        assert {r["case_warnings"] for r in csv.DictReader(file)} == {f"not HU; {kidney}"}


def test_files_of_others_are_left_alone_or_told(tmp_path):
    MeasurementFiles(tmp_path).add(case("a", {LIVER}), {})
    ours = (tmp_path / "measurements.json").read_text()
    for name in ("measurements_old.json", "measurements.0-of-2.json.json", "measurements2.json"):
        (tmp_path / name).write_text(ours.replace('"a"', '"old"'))
    (tmp_path / "measurements_profile.json").write_text('{"wall_s": 2}')
    files = MeasurementFiles(tmp_path, keep=True)
    assert files.knows("a", tmp_path / "a.mha") and not files.knows("old", tmp_path / "old.mha")
    for text in (
        "[]",
        '{"cases": [{"case": "b"}]}',
        '{"cases": [{"case": "b", "organs": [{"dsc": 0.9}]}]}',
        '{"cases": [{"case": "b", "organs": ["liver"]}]}',
        '{"cases": {"b": {}}}',
        ours.replace("volume_ml", "volume_l"),
    ):
        for name in ("measurements.1-of-2.json", "measurements.json"):
            (tmp_path / name).write_text(text)
            with pytest.raises(UserError, match=f"{name}: not readable as earlier measurements"):
                MeasurementFiles(tmp_path, keep=True)
            (tmp_path / name).write_text(ours)


def test_shards_write_files_of_their_own_and_a_later_run_gathers_them(tmp_path):
    for number, name in enumerate("ab"):
        part = MeasurementFiles(tmp_path, part=f"{number}/2", keep=True)
        part.gather()
        part.add(case(name, {LIVER}), {})
    assert written(tmp_path, "measurements.1-of-2.json") == ["b"]
    assert (tmp_path / "measurements.0-of-2.csv").exists()
    assert not (tmp_path / "measurements.json").exists()
    whole = MeasurementFiles(tmp_path, keep=True)
    assert whole.knows("a", tmp_path / "a.mha") and whole.knows("b", tmp_path / "b.mha")
    whole.gather()
    assert written(tmp_path) == ["a", "b"]
    before = (tmp_path / "measurements.json").stat().st_mtime_ns
    MeasurementFiles(tmp_path, keep=True).gather()
    assert (tmp_path / "measurements.json").stat().st_mtime_ns == before


def test_a_case_is_known_by_its_label_map(tmp_path):
    """Of a.nii.gz and a.mha the figures of the one are not those of the other."""
    (tmp_path / "a.mha").write_bytes(b"")
    MeasurementFiles(tmp_path).add(case("a", {LIVER}), {"labels": "elsewhere/a.mha"})
    again = MeasurementFiles(tmp_path, keep=True)
    assert again.knows("a", tmp_path / "a.mha") and not again.knows("a", tmp_path / "a.nii.gz")


def test_cases_whose_labels_are_gone_leave_the_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.mha").write_bytes(b"")
        MeasurementFiles(tmp_path, keep=True).add(case(name, {LIVER}), {"labels": f"{name}.mha"})
    (tmp_path / "a.mha").unlink()
    MeasurementFiles(tmp_path, keep=True).gather()
    assert written(tmp_path) == ["b"]
    assert "a,liver" not in (tmp_path / "measurements.csv").read_text()


def test_a_run_without_any_case_leaves_no_figures_of_another(tmp_path):
    MeasurementFiles(tmp_path).add(case("a", {LIVER}), {})
    MeasurementFiles(tmp_path).gather()
    assert written(tmp_path) == []
    (tmp_path / "new").mkdir()
    MeasurementFiles(tmp_path / "new").gather()
    assert list((tmp_path / "new").iterdir()) == []

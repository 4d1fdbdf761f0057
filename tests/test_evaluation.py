"""``flare-clef evaluate`` on small label maps whose figures are known by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import body_hu, write_scan
from scipy.stats import wilcoxon
from typer.testing import CliRunner

from flare_clef import evaluation
from flare_clef.cli import app
from flare_clef.errors import UserError
from flare_clef.evaluation import CSV_COLUMNS, evaluate_files
from flare_clef.evaluation_summary import compare, intervals_of_means, summarise
from flare_clef.images import image_from_array
from flare_clef.writing import write_labels

SHAPE = (10, 12, 40)
SPACING_MM = (2.0, 2.0, 5.0)
LIVER, SPLEEN, AORTA = 1, 3, 5


def label_map(shift: int = 0, spleen: bool = True) -> np.ndarray:
    """A liver of 4 x 6 x 8 voxels, ``shift`` further in x, and a spleen that stays in place."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[3:7, 3:9, 4 + shift : 12 + shift] = LIVER
    if spleen:
        labels[3:7, 3:9, 28:34] = SPLEEN
    return labels


def write(path: Path, labels: np.ndarray, origin=(0.0, 0.0, 0.0)) -> Path:
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(SPACING_MM)
    image.SetOrigin(origin)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


def folders(root: Path, shifts: list[int], name: str = "predictions") -> tuple[Path, Path]:
    """References without a shift, and one prediction for each of ``shifts``."""
    for number, shift in enumerate(shifts):
        write(root / "references" / f"case_{number}.nii.gz", label_map())
        write(root / name / f"case_{number}.nii.gz", label_map(shift))
    return root / name, root / "references"


def evaluate(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def shifted_dsc(shift: int) -> float:
    return max(0, 8 - shift) / 8


def test_table_csv_and_summary(tmp_path: Path):
    predictions, references = folders(tmp_path, [0, 2, 4])
    ran = evaluate(predictions, references, "-o", tmp_path / "out", "--organs", "liver,spleen")
    assert ran.exit_code == 0, ran.output
    assert "3 case(s), 2022 rules" in ran.output
    with (tmp_path / "out" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert len(rows) == 3 * 2
    assert [float(row["dsc"]) for row in rows if row["organ"] == "liver"] == [1, 0.75, 0.5]
    assert all(row["label"] == "3" and row["dsc"] == "1.000000" for row in rows[1::2])
    # 192 voxels of 20 mm3.
    assert {(row["volume_ml"], row["reference_ml"]) for row in rows[::2]} == {("3.840000",) * 2}
    # The whole surface of a box shifted by 4 voxels of 2 mm is at most 8 mm away.
    assert [float(row["hd95_mm"]) for row in rows[::2]] == [0, 4, 8]

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    liver = summary["organs"]["liver"]
    assert (liver["cases"], liver["dsc"]["mean"], liver["dsc"]["median"]) == (3, 0.75, 0.75)
    assert liver["dsc"]["sd"] == pytest.approx(0.25)
    assert liver["difference_ml"]["mean"] == 0
    assert summary["all_organs"]["dsc"]["mean"] == pytest.approx((0.75 + 1) / 2)
    low, high = liver["dsc"]["interval"]
    assert 0.5 <= low < 0.75 < high <= 1


def test_worst_five_come_first_and_name_their_lowest_organs(tmp_path: Path):
    shifts = [1, 6, 0, 4, 7, 3, 5]
    ran = evaluate(*folders(tmp_path, shifts), "-o", tmp_path / "out", "--organs", "liver,spleen")
    worst = json.loads((tmp_path / "out" / "summary.json").read_text())["worst_cases"]
    assert [case["case"] for case in worst] == [f"case_{i}" for i in (4, 1, 6, 3, 5)]
    assert worst[0]["dsc"] == pytest.approx((shifted_dsc(7) + 1) / 2, abs=1e-6)
    assert list(worst[0]["lowest"]) == ["liver", "spleen"]
    assert "case_4  0.562  lowest: Liver 0.12" in ran.output


def test_sheared_axes_are_told_and_no_failure(tmp_path: Path):
    leaning = np.sin(np.radians(12)), np.cos(np.radians(12))
    for folder in ("predictions", "references"):
        (tmp_path / folder).mkdir()
        scan = image_from_array(
            label_map(), (1, 1, 3), direction=(1, 0, 0, 0, 1, leaning[0], 0, 0, leaning[1])
        )
        write_labels(label_map(), scan, tmp_path / folder / "tilted.nii.gz")
    ran = evaluate(tmp_path / "predictions", tmp_path / "references", "--organs", "liver")
    assert ran.exit_code == 0, ran.output
    assert "tilted.nii.gz: axes 12.0 degrees off upright (a tilted gantry?); NSD and HD95" in (
        " ".join(ran.output.split())
    )


def test_every_kind_of_problem_is_named_counted_and_scored_as_said(tmp_path: Path):
    predictions, references = folders(tmp_path, [0, 0, 0, 0, 0, 0, 0])
    (predictions / "case_1.nii.gz").unlink()
    (predictions / "case_2.nii.gz").write_bytes(b"text")
    write(predictions / "case_3.nii.gz", label_map()[1:])
    write(predictions / "case_4.nii.gz", label_map(), origin=(0, 0, 3.0))
    odd = label_map()
    odd[0, 0, :2] = 77
    write(predictions / "case_5.nii.gz", odd)
    write(references / "case_6.nii.gz", label_map().astype(np.float32) + 0.5)
    write(predictions / "extra.nii.gz", label_map())
    ran = evaluate(predictions, references, "-o", tmp_path / "out", "--organs", "liver")
    assert ran.exit_code == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["problem_counts"] == {
        "no reference": 1,
        "missing prediction": 1,
        "unusable prediction": 1,
        "other shape": 1,
        "other geometry": 1,
        "unknown labels": 1,
        "unusable reference": 1,
    }
    assert {p["case"]: p["kind"] for p in summary["problems"]} == {
        "extra": "no reference",
        "case_1": "missing prediction",
        "case_2": "unusable prediction",
        "case_3": "other shape",
        "case_4": "other geometry",
        "case_5": "unknown labels",
        "case_6": "unusable reference",
    }
    rows = csv.DictReader((tmp_path / "out" / "cases.csv").open())
    assert {row["case"]: float(row["dsc"]) for row in rows} == {
        "case_0": 1,
        "case_1": 0,
        "case_2": 0,
        "case_3": 0,
        "case_4": 1,
        "case_5": 1,
    }
    errors = [line for line in ran.stderr.splitlines() if line.startswith("flare-clef:")]
    assert len(errors) == 8
    assert any("40 x 12 x 9 voxels, its reference has 40 x 12 x 10" in line for line in errors)
    assert any("2 voxel(s) outside 0 to 13 (77)" in line for line in errors)
    assert any("up to 3 mm from" in line for line in errors)
    assert "7 problem(s)" in errors[-1]
    assert "Traceback" not in ran.stderr


def test_a_prediction_without_a_reference_alone_is_no_failure(tmp_path: Path):
    predictions, references = folders(tmp_path, [0])
    write(predictions / "extra.nii.gz", label_map())
    ran = evaluate(predictions, references)
    assert ran.exit_code == 0
    assert "extra.nii.gz: no reference of this name" in ran.stderr


def test_cases_json_leaves_out_what_has_no_labels(tmp_path: Path):
    predictions, references = folders(tmp_path, [4, 4, 0])
    listed = {"case_0": {"organs": ["spleen"]}, "references": {"case_1": ["liver", "spleen"]}}
    (tmp_path / "cases.json").write_text(json.dumps(listed))
    result = evaluate_files(predictions, references, organs=["liver", "spleen", "aorta"])
    scored = {(row.case, row.organ.name): row.score.dsc for row in result.rows}
    assert scored == {
        ("case_0", "spleen"): 1,
        ("case_1", "liver"): 0.5,
        ("case_1", "spleen"): 1,
        # A case that the file doesn't name is taken as labelled in full.
        ("case_2", "liver"): 1,
        ("case_2", "spleen"): 1,
        ("case_2", "aorta"): 1,
    }
    assert result.unlisted == ["case_2"]
    ran = evaluate(predictions, references, "--organs", "liver")
    assert "1 case(s) labelled for none of the organs asked for, not scored: case_0" in ran.output
    (tmp_path / "cases.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        evaluate_files(predictions, references)
    (tmp_path / "cases.json").write_text('{"case_0": ["lung"]}')
    with pytest.raises(UserError, match="lung"):
        evaluate_files(predictions, references)
    (tmp_path / "cases.json").write_text('{"case_0": [["liver"]]}')
    with pytest.raises(UserError, match=r"the organ \['liver'\]; known are liver.*--cases FILE"):
        evaluate_files(predictions, references)


def test_a_cases_json_of_other_things_is_of_no_matter(tmp_path: Path):
    predictions, references = folders(tmp_path, [0, 0])
    split = {"train": ["case_0"], "test": ["case_1"], "x": {"q": ["liver"]}, "y": {"q": ["lung"]}}
    (tmp_path / "cases.json").write_text(json.dumps(split))
    result = evaluate_files(predictions, references, organs=["liver"])
    assert len(result.rows) == 2 and result.unlisted == ["case_0", "case_1"]


def test_compare_is_paired(tmp_path: Path):
    ours, other = [0, 1, 2, 0, 1, 3, 0], [2, 2, 3, 2, 4, 3, 1]
    predictions, references = folders(tmp_path, ours)
    others, _ = folders(tmp_path, other, "others")
    # A case that only one side has counts as 0 there: it was to be found.
    result = compare(evaluate_files(predictions, references), evaluate_files(others, references))
    differences = [shifted_dsc(a) - shifted_dsc(b) for a, b in zip(ours, other, strict=True)]
    liver = result["liver"]
    assert liver["cases"] == result["cases"] == 7
    assert liver["dsc"]["difference"] == pytest.approx(np.mean(differences), abs=1e-6)
    assert liver["dsc"]["wilcoxon_p"] == pytest.approx(wilcoxon(differences).pvalue)
    low, high = liver["dsc"]["interval"]
    assert min(differences) <= low < np.mean(differences) < high <= max(differences)
    assert result["spleen"]["dsc"] == {"difference": 0, "interval": [0, 0], "wilcoxon_p": 1}
    assert result["all_organs"]["dsc"]["difference"] == pytest.approx(
        np.mean(differences) / 13, abs=1e-6
    )
    ran = evaluate(predictions, references, "--compare", others, "--organs", "liver,spleen")
    assert ran.exit_code == 0, ran.output
    assert f"Difference to {others}, 7 case(s) in both" in ran.output
    assert f"{np.mean(differences):+.3f}" in ran.output


def test_bootstrap_interval_is_that_of_the_normal_theory():
    values = np.random.default_rng(3).normal(0.7, 0.1, (400, 2))
    values[::3, 1] = np.nan
    for column, interval in zip(values.T, intervals_of_means(values)[:2], strict=True):
        known = column[~np.isnan(column)]
        half = 1.96 * known.std(ddof=1) / len(known) ** 0.5
        assert interval == pytest.approx([known.mean() - half, known.mean() + half], abs=0.003)
    assert intervals_of_means(np.array([[0.5]])) == [None, None]


def test_box_plot_and_pictures_of_the_worst(tmp_path: Path):
    predictions, references = folders(tmp_path, [0, 2, 4])
    for number in (0, 1):
        write_scan(
            tmp_path / "scans" / f"case_{number}_0000.nii.gz",
            body_hu(SHAPE),
            spacing=SPACING_MM,
            origin=(0.0, 0.0, 0.0),
        )
    (tmp_path / "out").mkdir()
    earlier = tmp_path / "out" / "worst_1_of_an_earlier_run.png"
    earlier.touch()
    options = ("-o", tmp_path / "out", "--plots", "--images", tmp_path / "scans")
    ran = evaluate(predictions, references, *options)
    assert ran.exit_code == 0, ran.output
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == ["boxes.png", "worst_1_case_2.png", "worst_2_case_1.png", "worst_3_case_0.png"]
    for path in (tmp_path / "out").glob("*.png"):
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        assert min(array.shape[:2]) > 200 and array.std() > 5
    assert "no scan of case_2; drawn without it" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "references"], "nowhere: no such file or folder"),
        (["predictions", "references", "--organs", "lung"], "organ 'lung' is unknown"),
        (["predictions", "references", "--rules", "2021"], "expected one of 2022, later, plain"),
        (["predictions", "references", "--plots"], "name one with --output"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, arguments, words, monkeypatch):
    folders(tmp_path, [0])
    monkeypatch.chdir(tmp_path)
    ran = evaluate(*arguments)
    assert isinstance(ran.exception, UserError)
    assert words in str(ran.exception) and "\n" not in str(ran.exception)


def test_nothing_that_can_be_scored_is_an_error(tmp_path: Path):
    predictions, references = folders(tmp_path, [0])
    write(references / "case_0.nii.gz", label_map().astype(np.float32) + 0.5)
    with pytest.raises(UserError, match="none of 1 case"):
        evaluate_files(predictions, references)


def test_segmentations_of_slicer_and_ours_are_label_maps(tmp_path: Path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    write(ours / "a.seg.nrrd", label_map(2))
    write(ours / "b.nii.gz", label_map())
    write(theirs / "a.nii.gz", label_map())
    write(theirs / "b.seg.nrrd", label_map())
    found = evaluate_files(ours, theirs)
    assert found.cases == ["a", "b"] and not found.problems
    assert summarise(found)["organs"]["liver"]["dsc"]["mean"] == pytest.approx((0.75 + 1) / 2)


def test_what_does_not_fit_into_memory_is_a_problem_of_its_case(tmp_path: Path, monkeypatch):
    predictions, references = folders(tmp_path, [0, 0])
    read = evaluation.read_label_map

    def with_little_memory(path: Path):
        if path == predictions / "case_0.nii.gz":
            raise MemoryError
        return read(path)

    monkeypatch.setattr(evaluation, "read_label_map", with_little_memory)
    found = evaluate_files(predictions, references)
    (problem,) = found.problems
    assert (problem.case, problem.kind) == ("case_0", "unusable prediction")
    assert "case_0.nii.gz: too large for the memory; counted as 0" in problem.text


def test_two_files_are_a_pair_whatever_their_names(tmp_path: Path):
    ours = write(tmp_path / "a.nii.gz", label_map(2))
    summary = summarise(evaluate_files(ours, write(tmp_path / "b.nii.gz", label_map())))
    assert summary["organs"]["liver"]["dsc"]["mean"] == 0.75


@pytest.mark.filterwarnings("error")
def test_no_interval_of_what_exists_nowhere():
    assert intervals_of_means(np.full((3, 2), np.nan)) == [None] * 3

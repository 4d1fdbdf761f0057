"""Outputs beside the labels, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import body_hu, write_dicom, write_scan
from typer.testing import CliRunner

from flare_clef.cli import app
from flare_clef.errors import UserError
from flare_clef.extras import Extras
from flare_clef.images import read_image
from flare_clef.jobs import plan_jobs
from flare_clef.segmenter import Segmenter


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    write_scan(tmp_path / "in" / "a_0000.nii.gz")
    write_scan(tmp_path / "in" / "b.mha", body_hu(seed=1))
    return tmp_path / "in"


def predict(scans: Path, out: Path, weights: Path, *options: str):
    arguments = ["predict", scans, out, "--weights", weights, "--precision", "fp32", *options]
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_measurements_of_a_batch(scans: Path, tmp_path: Path, tiny_weights: Path):
    done = predict(scans, tmp_path / "out", tiny_weights, "--measurements", "--json")
    rows = {r["case"]: r for r in map(json.loads, done.stdout.splitlines()) if isinstance(r, dict)}
    written = json.loads((tmp_path / "out" / "measurements.json").read_text())
    assert [case["case"] for case in written["cases"]] == ["a", "b"]
    for case in written["cases"]:
        assert len(case["organs"]) == 13
        assert {o["organ"]: o["volume_ml"] for o in case["organs"]} == rows[case["case"]][
            "volume_ml"
        ]
        assert all(0.5 <= o["confidence"] <= 1 for o in case["organs"] if o["volume_ml"] > 1)
    assert any("adults" in w for w in rows["a"]["warnings"])


def test_skipped_cases_keep_their_measurements(scans: Path, tmp_path: Path, tiny_weights: Path):
    out = tmp_path / "out"
    predict(scans, out, tiny_weights, "--measurements")
    before = json.loads((out / "measurements.json").read_text())["cases"]
    (out / "b.mha").unlink()
    predict(scans, out, tiny_weights, "--measurements", "--skip-existing")
    assert json.loads((out / "measurements.json").read_text())["cases"] == before


def test_measurements_of_other_labels_are_made_anew(
    scans: Path, tmp_path: Path, tiny_weights: Path
):
    """Labels written anew, by other options, without --measurements: the figures are stale."""
    out = tmp_path / "out"

    def liver_ml() -> list[float]:
        cases = json.loads((out / "measurements.json").read_text())["cases"]
        return [c["organs"][0]["volume_ml"] for c in cases]

    for shard in ("0/2", "1/2"):
        predict(scans, out, tiny_weights, "--measurements", "--shard", shard)
    predict(scans, out, tiny_weights, "--measurements", "--skip-existing")
    first = liver_ml()
    predict(scans, out, tiny_weights, "--postprocess", "none")
    done = predict(scans, out, tiny_weights, "--postprocess", "none", "--measurements",
                   "--skip-existing", "--json")  # fmt: skip
    rows = [r for r in map(json.loads, done.stdout.splitlines()) if isinstance(r, dict)]
    assert [r["status"] for r in rows] == ["done", "done"]
    assert liver_ml() == [r["volume_ml"]["liver"] for r in rows] != first


def test_labels_come_last(scans: Path, tmp_path: Path, tiny_weights: Path, monkeypatch):
    """A run that is broken off leaves no labels beside files of another run."""
    pytest.importorskip("PIL", reason="Pillow is not installed (extra: report)")
    options = ("--report", "--split", "--measurements")
    predict(scans / "b.mha", tmp_path / "out", tiny_weights, *options)
    assert (tmp_path / "out" / "b.mha").exists()

    def killed(*_):
        raise SystemExit(137)

    monkeypatch.setattr(Extras, "_write_report", killed)
    job = plan_jobs(scans / "b.mha", tmp_path / "out")[0]
    image = read_image(job.source)
    found = Segmenter(tiny_weights, precision="fp32").segment(image, with_confidence=True)
    with pytest.raises(SystemExit):
        Extras(report=True, split=True).write(job, found, image)
    assert not (tmp_path / "out" / "b.mha").exists()
    monkeypatch.undo()
    done = predict(scans / "b.mha", tmp_path / "out", tiny_weights, *options, "--skip-existing")
    assert "skipped" not in done.output and (tmp_path / "out" / "b.mha").exists()


def test_masks_and_scores_of_an_earlier_run_go(tmp_path: Path, tiny_weights: Path):
    write_scan(tmp_path / "in" / "a.nii.gz", body_hu())
    out, options = tmp_path / "out", ("--split", "--probabilities")
    predict(tmp_path / "in", out, tiny_weights, *options)
    assert len(list((out / "a").iterdir())) == 13
    (out / "a" / "mine.nii.gz").write_bytes(b"")
    write_scan(tmp_path / "in" / "a.nii.gz", np.full((9, 9, 9), -1000, np.int16))
    done = predict(tmp_path / "in", out, tiny_weights, *options, "--organs", "liver")
    assert sorted(p.name for p in (out / "a").iterdir()) == ["liver.nii.gz", "mine.nii.gz"]
    assert not (out / "a.probabilities.npz").exists()
    assert "warning: " in done.stderr and "no probabilities: nothing of the scan" in done.stderr


def test_masks_that_lie_beside_no_labels_are_not_ours(tmp_path: Path, tiny_weights: Path):
    write_scan(tmp_path / "ct.nii.gz", body_hu())
    theirs = tmp_path / "segmentations" / "spleen.nii.gz"
    theirs.parent.mkdir()
    theirs.write_bytes(b"by hand")
    labels = tmp_path / "segmentations.nii.gz"
    predict(tmp_path / "ct.nii.gz", labels, tiny_weights, "--split", "--organs", "liver")
    assert theirs.read_bytes() == b"by hand"
    assert sorted(p.name for p in theirs.parent.iterdir()) == ["liver.nii.gz", "spleen.nii.gz"]


def test_report_split_tables_probabilities(scans: Path, tmp_path: Path, tiny_weights: Path):
    pytest.importorskip("PIL", reason="Pillow is not installed (extra: report)")
    out = tmp_path / "out"
    options = ("--report", "--split", "--label-tables", "--probabilities", "--format", "nrrd")
    predict(scans / "b.mha", out, tiny_weights, *options, "--organs", "liver,spleen")
    assert sorted(p.name for p in out.iterdir()) == [
        "b", "b.png", "b.probabilities.npz", "b.report.html", "b.seg.nrrd", "labels.ctbl",
        "labels.itksnap.txt",
    ]  # fmt: skip
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "b.seg.nrrd")))
    assert sorted(p.name for p in (out / "b").iterdir()) == ["liver.nrrd", "spleen.nrrd"]
    spleen = sitk.ReadImage(str(out / "b" / "spleen.nrrd"))
    assert np.array_equal(sitk.GetArrayFromImage(spleen), labels == 3)
    assert spleen.GetSpacing() == (1.5, 1.5, 3.0)
    maps = np.load(out / "b.probabilities.npz")["probability_x255"]
    assert maps.shape == (13, 32, 32, 32) and maps.std() > 1


def test_largest_part_only(scans: Path, tmp_path: Path, tiny_weights: Path):
    predict(scans, tmp_path / "all", tiny_weights, "--postprocess", "none")
    predict(scans, tmp_path / "one", tiny_weights, "--postprocess", "largest", "--measurements")
    cases = json.loads((tmp_path / "one" / "measurements.json").read_text())["cases"]
    assert all(o["parts"] <= 1 for c in cases for o in c["organs"] if o["organ"] != "aorta")
    before, after = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name / "a.nii.gz")))
        for name in ("all", "one")
    )
    assert 0 < (after > 0).sum() < (before > 0).sum()
    assert np.array_equal(after[after > 0], before[after > 0])


def test_strays_go_unless_they_are_kept(scans: Path, tmp_path: Path, tiny_weights: Path):
    """What goes and what stays: tests/test_stray_parts.py. Here, that the option reaches it."""
    for name in ("none", "strays"):
        predict(scans, tmp_path / name, tiny_weights, "--postprocess", name)
    predict(scans, tmp_path / "default", tiny_weights)
    none, strays, default = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name / "a.nii.gz")))
        for name in ("none", "strays", "default")
    )
    assert np.array_equal(strays, default) and not np.array_equal(strays, none)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--format", "jpeg"), "--format jpeg: unknown; known are nifti, nrrd, mha, dicom-seg"),
        (("--postprocess", "all"), "--postprocess all: unknown; known are none, strays, largest"),
    ],
)
def test_mistakes(scans: Path, tmp_path: Path, options, words):
    with pytest.raises(UserError, match=words):
        CliRunner().invoke(
            app, ["predict", str(scans), str(tmp_path / "out"), *options], catch_exceptions=False
        )


def test_a_file_of_another_format_is_refused(scans: Path, tmp_path: Path):
    with pytest.raises(UserError, match="--format nrrd writes .seg.nrrd files"):
        plan_jobs(scans / "b.mha", tmp_path / "labels.nii.gz", "nrrd")
    jobs = plan_jobs(scans / "b.mha", tmp_path / "labels.nii", "nifti")
    assert jobs[0].target.name == "labels.nii"
    assert [job.target.name for job in plan_jobs(scans, tmp_path / "o", "dicom-seg")] == [
        "a.dcm",
        "b.dcm",
    ]
    assert [job.case for job in plan_jobs(scans, tmp_path / "o", "nrrd")] == ["a", "b"]


def test_dicom_seg_of_a_file_fails_by_name(scans: Path, tmp_path: Path, tiny_weights: Path):
    pytest.importorskip("highdicom", reason="highdicom is not installed (extra: dicom)")
    arguments = ["predict", scans / "b.mha", tmp_path / "out", "--weights", tiny_weights]
    options = ["--precision", "fp32", "--format", "dicom-seg"]
    with pytest.raises(UserError, match=r"b.mha: .* needs a folder of one DICOM series"):
        CliRunner().invoke(app, [*map(str, arguments), *options], catch_exceptions=False)
    # Beside a series the others are done, and the file is a case that failed.
    write_dicom(scans / "series", [0, 3, 6, 9])
    done = CliRunner().invoke(app, ["predict", str(scans), *map(str, arguments[2:]), *options])
    assert done.exit_code == 1 and "b.mha: --format dicom-seg needs a folder" in done.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["series.dcm"]

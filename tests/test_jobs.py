"""Which scan goes where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import write_dicom, write_scan

from flare_clef.errors import UsageError, UserError
from flare_clef.images import image_from_array, read_image
from flare_clef.jobs import Job, is_there, of_another_scan, plan_jobs, shard
from flare_clef.organs import ORGANS
from flare_clef.writing import labels_to_sitk, write_labels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.nii.gz", "a_0000.nii.gz", "c.mha"):
        write_scan(tmp_path / "in" / name)
    return tmp_path / "in"


def test_folder_to_folder(folder: Path, tmp_path: Path):
    jobs = plan_jobs(folder, tmp_path / "out")
    assert [(j.source.name, j.target) for j in jobs] == [
        ("a_0000.nii.gz", tmp_path / "out" / "a.nii.gz"),
        ("b.nii.gz", tmp_path / "out" / "b.nii.gz"),
        ("c.mha", tmp_path / "out" / "c.mha"),
    ]
    assert [job.case for job in jobs] == ["a", "b", "c"]


def test_file_to_file_or_folder(folder: Path, tmp_path: Path):
    scan = folder / "a_0000.nii.gz"
    (tmp_path / "there").mkdir()
    for target, expected in (
        (tmp_path / "labels.nii.gz", tmp_path / "labels.nii.gz"),
        (tmp_path / "labels.nrrd", tmp_path / "labels.nrrd"),
        (tmp_path / "there", tmp_path / "there" / "a.nii.gz"),
        (tmp_path / "new", tmp_path / "new" / "a.nii.gz"),
    ):
        assert plan_jobs(scan, target) == [Job(scan, expected)]


def test_folder_to_file_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="folder of 3 scan.*must be a folder, not a file"):
        plan_jobs(folder, tmp_path / "labels.nii.gz")


def test_output_of_another_kind_is_refused(folder: Path, tmp_path: Path):
    (tmp_path / "labels.txt").write_text("")
    with pytest.raises(UserError, match="file of another kind"):
        plan_jobs(folder / "c.mha", tmp_path / "labels.txt")
    with pytest.raises(UserError, match=r"lab\.dcm: labels are written as .*--format dicom-seg"):
        plan_jobs(folder / "c.mha", tmp_path / "lab.dcm")
    with pytest.raises(UserError, match=r"out\.png: labels are written as .* or into a folder$"):
        plan_jobs(folder / "c.mha", tmp_path / "out.png")
    dotted = tmp_path / "results.v2"
    assert plan_jobs(folder / "c.mha", dotted)[0].target == dotted / "c.mha"


def test_same_output_twice_is_refused(folder: Path, tmp_path: Path):
    write_scan(folder / "a.nii.gz")
    with pytest.raises(UserError, match="both a.* and a.* would be written there"):
        plan_jobs(folder, tmp_path / "out")


def test_overwriting_an_input_is_refused(folder: Path):
    (folder / "b.nii.gz").unlink()
    (folder / "c.mha").unlink()
    # Once it would go well: the labels of a_0000 are a new file.
    with pytest.raises(UserError, match="the labels would lie among the scans"):
        plan_jobs(folder, folder)
    write_scan(folder / "b.nii.gz")
    with pytest.raises(UserError, match="would overwrite this input"):
        plan_jobs(folder / "b.nii.gz", folder / "b.nii.gz")


def test_output_inside_the_input_folder(folder: Path):
    first = plan_jobs(folder, folder / "out")
    for job in first:
        write_scan(job.target)
    assert plan_jobs(folder, folder / "out") == first


def test_shards_are_disjoint_and_complete(folder: Path):
    jobs = [Job(Path(str(i)), Path(f"out/{i}")) for i in range(11)]
    parts = [shard(jobs, f"{k}/4") for k in range(4)]
    assert [len(p) for p in parts] == [3, 3, 3, 2]
    assert sorted((j for p in parts for j in p), key=lambda j: int(j.source.name)) == jobs


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/4", "1/0", "", "²/4"])
def test_bad_shard(text: str):
    with pytest.raises(UsageError, match="expected K/N"):
        shard([], text)


def test_a_file_beside_the_labels_is_written_by_one_case_only(folder: Path, tmp_path: Path):
    write_scan(folder / "b.mha")
    assert len(plan_jobs(folder, tmp_path / "out")) == 4
    write_scan(folder / "c.seg.nrrd")  # a segmentation of c, no scan
    with pytest.raises(UserError, match=r"out/b: both b\..* and b\..* would be written there"):
        plan_jobs(folder, tmp_path / "out", files_beside=True)


def test_formats_of_two_files_become_those_of_one(folder: Path, tmp_path: Path):
    names = {}
    for name in ("x.mhd", "y.nhdr"):
        scan = write_scan(tmp_path / name)
        names[name] = plan_jobs(scan, tmp_path / "out")[0].target.name
        with pytest.raises(UserError, match="labels are written as"):
            plan_jobs(scan, tmp_path / f"labels{scan.suffix}")
    assert names == {"x.mhd": "x.mha", "y.nhdr": "y.nrrd"}


def test_nothing_is_written_into_a_dicom_series(tmp_path: Path, monkeypatch):
    write_dicom(tmp_path / "all" / "s", [0, 3, 6])
    series = tmp_path / "all" / "s"
    with pytest.raises(UserError, match="would be written into the DICOM series"):
        plan_jobs(series, series)
    # Its masks would go to all/s/.
    with pytest.raises(UserError, match="would be written into the DICOM series"):
        plan_jobs(series, tmp_path / "all", files_beside=True, masks=True)
    plan_jobs(series, tmp_path / "all", files_beside=True)
    assert plan_jobs(series, tmp_path / "all")[0].target == tmp_path / "all" / "s.nii.gz"
    monkeypatch.chdir(series)
    assert plan_jobs(Path("."), tmp_path / "out")[0].target == tmp_path / "out" / "s.nii.gz"


def test_whether_all_files_are_there(tmp_path: Path):
    job = Job(tmp_path / "a_0000.nii.gz", tmp_path / "out" / "a.nii.gz")
    nothing = {"report": False, "split": False, "probabilities": False}
    assert not is_there(job, **nothing)
    write_scan(job.target)
    assert is_there(job, **nothing)
    for what, names in (
        ("report", ("a.report.html", "a.png")),
        ("probabilities", ("a.probabilities.npz",)),
        ("split", [f"a/{organ.name}.nii.gz" for organ in ORGANS]),
    ):
        asked = {**nothing, what: True}
        for name in names:
            assert not is_there(job, **asked)
            (job.target.parent / name).parent.mkdir(exist_ok=True)
            (job.target.parent / name).touch()
        assert is_there(job, **asked)


def test_labels_of_another_scan_are_not_skipped(tmp_path: Path):
    """Of another size or place; damage of either is told when it is read."""
    scan, labels = tmp_path / "in" / "a.mha", tmp_path / "out" / "a.nii.gz"
    volume = image_from_array(np.zeros((3, 4, 5), np.int16), (1.0, 2.0, 3.0), (7.0, 8.0, 9.0))
    job = Job(scan, labels)
    scan.parent.mkdir()
    sitk.WriteImage(labels_to_sitk(volume.array, volume), str(scan))
    write_labels(np.zeros((3, 4, 5), np.uint8), volume, labels)
    assert of_another_scan(job) == ""
    write_labels(np.zeros((3, 4, 6), np.uint8), volume, labels)
    assert of_another_scan(job) == (
        f"{labels}: exists, but is of another scan than {scan} (6 x 4 x 3 voxels from 7.0, 8.0, "
        "9.0 mm, not 5 x 4 x 3 voxels from 7.0, 8.0, 9.0 mm); give each folder of scans a folder "
        "of labels of its own"
    )
    other = image_from_array(volume.array, (1.0, 2.0, 3.0), (7.0, 8.2, 9.0))
    write_labels(np.zeros((3, 4, 5), np.uint8), other, labels)
    assert "from 7.0, 8.2, 9.0 mm, not" in of_another_scan(job)
    labels.write_bytes(b"cut")
    assert of_another_scan(job) == ""


def test_flat_files_are_of_another_scan(tmp_path: Path):
    flat = sitk.GetImageFromArray(np.zeros((4, 5), np.int16))
    for name, there in (("a.mha", "b.mha"), ("b.mha", "a.mha")):
        sitk.WriteImage(flat, str(tmp_path / "a.mha"))
        sitk.WriteImage(sitk.JoinSeries(flat), str(tmp_path / "b.mha"))
        assert "is of another scan" in of_another_scan(Job(tmp_path / name, tmp_path / there))


def test_headers_are_read_whatever_the_letters_of_their_suffix(tmp_path: Path):
    volume = image_from_array(np.zeros((3, 4, 5), np.int16), (1.0, 2.0, 3.0))
    sitk.WriteImage(labels_to_sitk(volume.array, volume), str(tmp_path / "a.mha"))
    (tmp_path / "a.mha").rename(tmp_path / "A.MHA")
    write_labels(np.zeros((3, 4, 6), np.uint8), volume, tmp_path / "out.nii.gz")
    assert "6 x 4 x 3" in of_another_scan(Job(tmp_path / "A.MHA", tmp_path / "out.nii.gz"))


def test_dicom_labels_refer_to_the_space_of_their_series(tmp_path: Path):
    """Their own frames may be fewer than the slices, or more."""
    write_dicom(tmp_path / "s", [6, 0, 3], uid="1.2.3")
    for uid, said in (("1.2.3", ""), ("1.2.4", "(frame of reference 1.2.4.0, not 1.2.3.0)")):
        write_dicom(tmp_path / uid, [3], uid=uid)
        (made,) = (tmp_path / uid).iterdir()
        found = of_another_scan(Job(tmp_path / "s", made))
        assert said in found and bool(found) == bool(said)


def test_labels_of_another_series_of_one_name_are_not_skipped(tmp_path: Path):
    labels = tmp_path / "out" / "SE1.nii.gz"
    one, other, shifted = (tmp_path / name / "SE1" for name in ("P1", "P2", "P3"))
    write_dicom(one, [6, 0, 3])
    write_dicom(other, [6, 0, 3, 9])
    write_dicom(shifted, [7, 1, 4])
    scan = read_image(one)
    write_labels(np.zeros(scan.array.shape, np.uint8), scan, labels)
    assert of_another_scan(Job(one, labels)) == ""
    assert "16 x 16 x 3 voxels from" in of_another_scan(Job(other, labels))
    assert "not 16 x 16 x 3 voxels from" in of_another_scan(Job(shifted, labels))

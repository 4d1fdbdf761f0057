from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import body_hu

from flare_clef import writing
from flare_clef.errors import UserError
from flare_clef.images import image_from_array, read_image
from flare_clef.writing import write_labels, write_scan


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch, suffix: str):
    image = image_from_array(body_hu(), (1.0, 1.0, 1.0))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_labels(np.zeros(image.array.shape, np.uint8), image, tmp_path / f"l{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_output_folder_that_is_a_file(tmp_path: Path):
    (tmp_path / "out").write_text("")
    image = image_from_array(body_hu(), (1.0, 1.0, 1.0))
    with pytest.raises(UserError, match="cannot be written"):
        write_labels(np.zeros(image.array.shape, np.uint8), image, tmp_path / "out" / "l.nii.gz")


def test_files_under_way_are_removed_on_the_way_out(tmp_path: Path):
    with writing._written_beside(tmp_path / "l.nii.gz") as temporary:
        temporary.write_bytes(b"half")
        writing.remove_temporary_files()
        assert list(tmp_path.iterdir()) == []
        temporary.write_bytes(b"whole")
    assert [p.name for p in tmp_path.iterdir()] == ["l.nii.gz"]


@pytest.mark.parametrize("name", ["L.NII.GZ", "L.Nii", "L.MHA", "L.NRRD"])
def test_suffixes_in_capitals(tmp_path: Path, name: str):
    image = image_from_array(body_hu(), (1.0, 2.0, 3.0))
    labels = np.random.default_rng(0).integers(0, 14, image.array.shape).astype(np.uint8)
    write_labels(labels, image, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    back = read_image(tmp_path / name)
    assert np.array_equal(back.array, labels) and back.spacing_mm == image.spacing_mm


def test_what_is_written_to_a_link_goes_where_it_leads(tmp_path: Path):
    image = image_from_array(body_hu(), (1.0, 1.0, 1.0))
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "l.nii.gz").symlink_to(tmp_path / "disk" / "kept.nii.gz")
    for value in (1, 2):
        labels = np.full(image.array.shape, value, np.uint8)
        write_labels(labels, image, tmp_path / "out" / "l.nii.gz")
        assert (tmp_path / "out" / "l.nii.gz").is_symlink()
        assert read_image(tmp_path / "disk" / "kept.nii.gz").array.max() == value
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["kept.nii.gz", "l.nii.gz"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs an administrator")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_a_disk_that_is_really_full(small_disk: Path, suffix: str):
    (small_disk / "other").write_bytes(b"x" * 60 * 1024)
    image = image_from_array(body_hu((40, 60, 60)), (1.0, 1.0, 1.0))
    noise = np.random.default_rng(0).integers(0, 14, image.array.shape).astype(np.uint8)
    with pytest.raises(UserError, match="cannot be written") as caught:
        write_labels(noise, image, small_disk / f"l{suffix}")
    assert len(str(caught.value).splitlines()) == 1
    assert [p.name for p in small_disk.iterdir()] == ["other"]
    with pytest.raises(UserError, match="No space left on device"):
        write_scan(image, small_disk / "scan.nii")
    assert [p.name for p in small_disk.iterdir()] == ["other"]


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd", ".seg.nrrd"])
def test_a_disk_that_holds_all_but_the_last_bytes(small_disk: Path, suffix: str):
    """Which are written when the file is closed: who doesn't look then calls a part whole."""
    noise = np.random.default_rng(0).integers(0, 14, (150, 32, 32)).astype(np.uint8)
    target = small_disk / f"l{suffix}"
    outcomes = set()
    for slices in (*range(50, 80, 3), *range(90, 150, 2)):
        image = image_from_array(noise[:slices], (1.0, 1.0, 1.0))
        try:
            write_labels(noise[:slices], image, target)
        except UserError:
            outcomes.add("refused")
            assert not list(small_disk.iterdir())
            continue
        outcomes.add("whole")
        assert np.array_equal(read_image(target).array, noise[:slices])
        target.unlink()
    assert outcomes == {"refused", "whole"}

"""NRRD headers: what places a scan in space goes to its label map as it stands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from flare_clef.images import image_from_array, read_image
from flare_clef.nrrd import geometry_lines
from flare_clef.writing import labels_to_sitk, write_labels

HEADER = b"""NRRD0005
# a comment: space origin: (9,9,9)
type: int16
dimension: 3
space: right-anterior-superior
sizes: 4 3 2
space directions: (0.1,0.7,0) (-0.7,0.1,0) (0,0,1.3)
kinds: domain domain domain
endian: little
encoding: raw
space origin: (0.1,0.2,0.3)
my key:=space: nowhere
"""
VOXELS = np.arange(24, dtype="<i2").tobytes()


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_foreign_header_of_another_space(tmp_path: Path, line_end: bytes):
    path = tmp_path / "a.nrrd"
    path.write_bytes((HEADER + b"\n").replace(b"\n", line_end) + VOXELS)
    assert geometry_lines(path) == (
        b"space: right-anterior-superior",
        b"space directions: (0.1,0.7,0) (-0.7,0.1,0) (0,0,1.3)",
        b"space origin: (0.1,0.2,0.3)",
    )
    image = read_image(path)
    labels = (image.array > 11).astype(np.uint8)
    write_labels(labels, image, tmp_path / "b.seg.nrrd")
    scan, found = (sitk.ReadImage(str(tmp_path / name)) for name in ("a.nrrd", "b.seg.nrrd"))
    assert found.GetOrigin() == scan.GetOrigin() == (-0.1, -0.2, 0.3)
    assert found.GetSpacing() == scan.GetSpacing()
    assert found.GetDirection() == scan.GetDirection()
    assert np.array_equal(sitk.GetArrayFromImage(found), labels)
    assert found.GetMetaData("Segment0_Name")


@pytest.mark.parametrize("named", [True, False])
def test_without_a_header_to_repeat_it_is_what_itk_writes(tmp_path: Path, named: bool):
    turn = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    scan = image_from_array(np.zeros((3, 4, 5), np.int16), (0.7, 0.8, 2.5), (1.5, -2.0, 3.0), turn)
    labels = np.random.default_rng(0).integers(0, 14, (3, 4, 5)).astype(np.uint8)
    write_labels(labels, scan, tmp_path / "ours.nrrd", named=named)
    sitk.WriteImage(labels_to_sitk(labels, scan), str(tmp_path / "itk.nrrd"), True)
    ours, itk = (sitk.ReadImage(str(tmp_path / name)) for name in ("ours.nrrd", "itk.nrrd"))
    assert np.array_equal(sitk.GetArrayFromImage(ours), labels)
    for found in (ours.GetSpacing, itk.GetSpacing), (ours.GetOrigin, itk.GetOrigin):
        assert found[0]() == found[1]()
    assert ours.GetDirection() == itk.GetDirection()
    assert ours.HasMetaDataKey("Segment0_Name") is named
    if named:
        assert ours.GetMetaData("Segment0_Extent") == "0 4 0 3 0 2"


def test_a_detached_header(tmp_path: Path):
    (tmp_path / "a.raw").write_bytes(VOXELS)
    (tmp_path / "a.nhdr").write_bytes(HEADER + b"data file: a.raw\n")
    image = read_image(tmp_path / "a.nhdr")
    write_labels(np.ones((2, 3, 4), np.uint8), image, tmp_path / "b.nrrd")
    again = sitk.ReadImage(str(tmp_path / "b.nrrd"))
    assert again.GetSpacing() == image.spacing_mm and again.GetDirection() == image.direction


def test_a_header_with_a_fourth_axis_or_no_space_is_left_to_itk(tmp_path: Path):
    four = HEADER.replace(b"directions: ", b"directions: none ")
    none = b"NRRD0005\ntype: int16\ndimension: 3\nsizes: 4 3 2\nencoding: raw\n"
    for content in (four, none):
        (tmp_path / "a.nrrd").write_bytes(content + b"\n" + VOXELS)
        assert geometry_lines(tmp_path / "a.nrrd") == ()

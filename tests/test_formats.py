"""Names and colours inside and beside label files, read back by other readers."""

from __future__ import annotations

import gzip
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import write_scan

from flare_clef.formats import itksnap_labels, nifti_extension, slicer_colours
from flare_clef.images import image_from_array, read_image
from flare_clef.organs import ORGANS
from flare_clef.writing import write_labels

LABELS = (np.arange(20 * 40 * 44).reshape(20, 40, 44) % 14).astype(np.uint8)


@pytest.mark.parametrize("order", "<>")
def test_extension_is_what_the_standard_asks(order):
    raw = nifti_extension(order)
    size, code = struct.unpack_from(order + "ii", raw, 4)
    assert raw[:4] == b"\1\0\0\0" and code == 30
    assert len(raw) == 4 + size and size % 16 == 0
    table = ElementTree.fromstring(raw[12:].rstrip(b"\0"))
    found = {int(label.get("Key")): label.text for label in table.iter("Label")}
    assert found == {0: "background"} | {o.index: o.name for o in ORGANS}
    liver = next(label for label in table.iter("Label") if label.get("Key") == "1")
    assert float(liver.get("Red")) == pytest.approx(ORGANS[0].colour[0] / 255, abs=1e-4)


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.mha"])
def test_nifti_keeps_geometry_and_voxels(tmp_path: Path, name):
    scan = read_image(
        write_scan(tmp_path / name, direction=(-1.0, 0, 0, 0, 0.6, 0.8, 0, -0.8, 0.6))
    )
    write_labels(LABELS, scan, tmp_path / "labels.nii.gz")
    found = sitk.ReadImage(str(tmp_path / "labels.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(found), LABELS)
    expected = sitk.ReadImage(str(tmp_path / name))
    assert found.GetSpacing() == pytest.approx(expected.GetSpacing(), abs=1e-6)
    assert found.GetOrigin() == pytest.approx(expected.GetOrigin(), abs=1e-5)
    assert found.GetDirection() == pytest.approx(expected.GetDirection(), abs=1e-6)
    if name == "scan.nii.gz":
        raw = [gzip.decompress((tmp_path / n).read_bytes())[:348] for n in (name, "labels.nii.gz")]
        # pixdim, then codes, quaternion, offsets and the three rows of the sform.
        assert raw[0][76:108] == raw[1][76:108] and raw[0][252:328] == raw[1][252:328]


def test_nibabel_reads_the_extension(tmp_path: Path):
    nibabel = pytest.importorskip("nibabel")
    scan = image_from_array(LABELS.astype(np.int16), (1.0, 1.0, 2.0))
    write_labels(LABELS, scan, tmp_path / "labels.nii.gz")
    image = nibabel.load(tmp_path / "labels.nii.gz")
    assert np.array_equal(np.asarray(image.dataobj).T, LABELS)
    assert b">right_adrenal_gland<" in image.header.extensions[0].content


def test_nrrd_carries_slicers_segments(tmp_path: Path):
    scan = image_from_array(LABELS.astype(np.int16), (1.0, 1.0, 2.0), (5.0, 6.0, 7.0))
    write_labels(LABELS, scan, tmp_path / "a.seg.nrrd")
    found = sitk.ReadImage(str(tmp_path / "a.seg.nrrd"))
    assert np.array_equal(sitk.GetArrayFromImage(found), LABELS)
    assert found.GetOrigin() == (5.0, 6.0, 7.0)
    assert found.GetMetaData("Segment1_Name") == "Right kidney"
    assert found.GetMetaData("Segment1_LabelValue") == "2"
    assert found.GetMetaData("Segment0_Extent") == "0 43 0 39 0 19"


def test_tables_beside():
    row = itksnap_labels().splitlines()[2].split(maxsplit=7)
    assert row == ["2", "240", "196", "60", "1", "1", "1", '"Right kidney"']
    assert slicer_colours().splitlines()[3] == "2 right_kidney 240 196 60 255"
    assert len(slicer_colours().splitlines()) == 15

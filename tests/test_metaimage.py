"""MetaImage headers: what ITK writes passes, what is broken gets its own reason."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from flare_clef.errors import UserError
from flare_clef.images import read_image
from flare_clef.metaimage import check_header
from flare_clef.scan_files import files_of

START = (
    "ObjectType = Image\nNDims = 3\nDimSize = 5 4 3\nElementType = MET_SHORT\n"
    "BinaryData = True\nElementByteOrderMSB = False\nElementDataFile = "
)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """3 slices of 4 x 5 voxels of two bytes: 120 bytes."""
    path = tmp_path / "scan.mha"
    image = sitk.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5) - 40)
    sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("name", ["scan.mha", "scan.mhd"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "kind", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64]
)
def test_what_itk_writes_is_read(tmp_path, capfd, name, packed, kind):
    values = np.arange(60).reshape(3, 4, 5).astype(kind)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / name), packed)
    assert np.array_equal(read_image(tmp_path / name).array, values)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"NDims = 3\n", b"", "its header has no line NDims; export it again"),
        (b"NDims = 3", b"NDims = x", "says NDims = x, DimSize = 5 4 3; export"),
        (b"DimSize = 5 4 3", b"DimSize = 5 4", "says NDims = 3, DimSize = 5 4; export"),
        (b"DimSize = 5 4 3", b"DimSize = 5 0 3", "DimSize = 5 0 3; export"),
        (b"DimSize = 5 4 3", b"DimSize = 5 4 -3", "DimSize = 5 4 -3; export"),
        (b"DimSize = 5 4 3", b"DimSize = 5 4 4", "cut off, 120 of 160 bytes of voxels"),
        (b"ElementType = MET_SHORT\n", b"", "no line ElementType"),
        (b"MET_SHORT", b"MET_HALF", "ElementType = MET_HALF, unknown"),
        (b"= LOCAL", b"= gone:1.raw", "its voxels' file gone:1.raw is not beside it"),
        (b"ElementDataFile = LOCAL\n", b"", "no line ElementDataFile"),
    ],
)
def test_a_broken_header_is_one_line(scan: Path, capfd, old, new, said):
    whole = scan.read_bytes()
    assert old in whole
    scan.write_bytes(whole.replace(old, new))
    with pytest.raises(UserError) as caught:
        read_image(scan)
    assert said in str(caught.value) and str(caught.value).startswith(f"{scan}: ")
    assert capfd.readouterr() == ("", "")


def test_voxels_cut_off_are_counted(scan: Path):
    scan.write_bytes(scan.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"scan.mha: cut off, 113 of 120 bytes of voxels; copy"):
        check_header(scan)


def test_of_voxels_in_a_file_of_their_own_too(scan: Path):
    sitk.WriteImage(sitk.ReadImage(str(scan)), str(scan.with_suffix(".mhd")))
    raw = scan.with_suffix(".raw")
    raw.write_bytes(raw.read_bytes()[:100])
    with pytest.raises(UserError, match=r"scan.raw: cut off, 100 of 120 bytes"):
        check_header(scan.with_suffix(".mhd"))
    raw.unlink()
    with pytest.raises(UserError, match=r"scan.mhd: its voxels' file scan.raw is not beside it"):
        check_header(scan.with_suffix(".mhd"))


def packed(scan: Path, suffix: str) -> tuple[Path, Path]:
    """A packed copy's header and the file of its voxels."""
    path = scan.with_name(f"packed{suffix}")
    values = np.random.default_rng(0).integers(-1000, 1000, (9, 40, 50)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(path), True)
    return path, path if suffix == ".mha" else path.with_suffix(".zraw")


@pytest.mark.parametrize("suffix", [".mha", ".mhd"])
def test_packed_voxels_are_checked(scan: Path, capfd, suffix):
    path, voxels = packed(scan, suffix)
    whole = voxels.read_bytes()
    check_header(path)

    def said() -> str:
        with pytest.raises(UserError) as caught:
            read_image(path)
        return str(caught.value)

    voxels.write_bytes(whole[: len(whole) // 2])
    assert f"{voxels}: cut off, " in said() and "of packed voxels" in said()
    for at in (len(whole) // 2, len(whole) - 2):  # in the middle, and in the checksum
        voxels.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        assert f"{voxels}: damaged (" in said()
    voxels.write_bytes(whole)
    header = path.read_bytes()
    path.write_bytes(header.replace(b"DimSize = 50 40 9", b"DimSize = 50 40 8"))
    assert "unpacks to 36000 of 32000 bytes" in said()
    path.write_bytes(re.sub(rb"CompressedDataSize = \d+\n", b"", header))
    if suffix == ".mha":
        assert "no line CompressedDataSize" in said()
    else:  # the size of the file says it
        assert read_image(path).array.shape == (9, 40, 50)
    assert capfd.readouterr() == ("", "")


def test_a_missing_slice_is_named(scan: Path, capfd):
    start = scan.read_bytes().partition(b"LOCAL\n")[0].decode()
    path = scan.with_suffix(".mhd")
    for number in (0, 2):
        scan.with_name(f"{number}.raw").write_bytes(b"\0" * 40)
    for place in ("LIST\n0.raw\n1.raw\n2.raw\n", "%d.raw 0 2 1\n", "%01d.raw 0 3\n"):
        path.write_text(start + place)
        with pytest.raises(UserError, match=r"scan.mhd: its voxels' file 1.raw is not beside it"):
            read_image(path)
    assert capfd.readouterr() == ("", "")


def test_colons_and_windows_line_ends_are_read(scan: Path):
    whole = scan.read_bytes()
    end = whole.index(b"LOCAL\n") + len(b"LOCAL\n")
    scan.write_bytes(whole[:end].replace(b" = ", b": ").replace(b"\n", b"\r\n") + whole[end:])
    check_header(scan)


def test_another_format_by_this_name_is_refused(scan: Path):
    nifti = scan.with_name("volume.nii")
    sitk.WriteImage(sitk.ReadImage(str(scan)), str(nifti))
    with pytest.raises(UserError, match=r"scan.mha: does not begin with a MetaImage header; name"):
        read_image(nifti.rename(scan))


def test_slices_in_files_of_their_own_are_left_to_itk(tmp_path: Path):
    slices = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    for number, values in enumerate(slices):
        values.tofile(tmp_path / f"{number}.raw")
    for name, place in (("a.mhd", "LIST\n0.raw\n1.raw\n2.raw\n"), ("b.mhd", "%d.raw 0 2 1\n")):
        (tmp_path / name).write_text(START + place)
        assert np.array_equal(read_image(tmp_path / name).array, slices)


def test_files_beyond_the_last_slice_are_not_asked_for(tmp_path: Path):
    slices = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    for number, values in enumerate(slices):
        values.tofile(tmp_path / f"{number}.raw")
    for place in (
        "LIST\n0.raw\n1.raw\n2.raw\ngone.raw\nby hand\n",
        "%d.raw 0 9 1\n",
        "%d.raw 0 3\n",
    ):
        (tmp_path / "a.mhd").write_text(START + place)
        assert np.array_equal(read_image(tmp_path / "a.mhd").array, slices)


@pytest.mark.parametrize(
    "place", ["50%_%d.raw 0 2 1", "%d.raw 0 2 0", "%d%d.raw 0 2 1", "%d.raw 0 2"]
)
def test_a_pattern_that_names_no_files_is_refused(tmp_path: Path, place: str):
    (tmp_path / "a.mhd").write_text(START + place)
    with pytest.raises(UserError, match=r"a.mhd: ElementDataFile = .* names no series of files"):
        read_image(tmp_path / "a.mhd")


def test_voxels_in_a_file_of_a_foreign_name(tmp_path: Path):
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    for packed_too in (False, True):
        sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "Müller.mhd"), packed_too)
        assert np.array_equal(read_image(tmp_path / "Müller.mhd").array, values)
    assert len(files_of(tmp_path / "Müller.mhd")) == 2


def test_packed_voxels_alone_in_a_file_need_no_size(tmp_path: Path):
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    header = START.replace("ElementDataFile", "CompressedData = True\nElementDataFile")
    (tmp_path / "a.zraw").write_bytes(zlib.compress(values.tobytes()))
    (tmp_path / "a.mhd").write_text(f"{header}a.zraw\n")
    assert np.array_equal(read_image(tmp_path / "a.mhd").array, values)
    (tmp_path / "a.zraw").write_bytes(bytes(100) + zlib.compress(values.tobytes()))
    (tmp_path / "a.mhd").write_text(f"HeaderSize = 100\n{header}a.zraw\n")
    check_header(tmp_path / "a.mhd")

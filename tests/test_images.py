"""Reading, checks and writing, with files as users bring them."""

from __future__ import annotations

import gzip
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import body_hu, write_dicom, write_scan
from hypothesis import given, settings
from hypothesis import strategies as st

from flare_clef.errors import UserError
from flare_clef.images import (
    IDENTITY,
    describe,
    image_from_array,
    read_image,
)
from flare_clef.orientation import reorient
from flare_clef.scan_files import (
    files_of,
    find_inputs,
    output_name,
    passed_over,
    strip_suffix,
)
from flare_clef.stress import crop_third
from flare_clef.writing import write_labels


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_image(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


def rotation(a: float, b: float, c: float) -> tuple[float, ...]:
    turn = np.eye(3)
    for axis, angle in enumerate((a, b, c)):
        i, j = [k for k in range(3) if k != axis]
        part = np.eye(3)
        part[i, i] = part[j, j] = np.cos(angle)
        part[i, j], part[j, i] = -np.sin(angle), np.sin(angle)
        turn = turn @ part
    return tuple(turn.ravel())


def patched(source: Path, target: Path, offset: int, form: str, *values: object) -> Path:
    """``source`` (an uncompressed NIfTI) with header fields replaced."""
    raw = bytearray(source.read_bytes())
    struct.pack_into(form, raw, offset, *values)
    target.write_bytes(raw)
    return target


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    image = sitk.GetImageFromArray(body_hu())
    image.SetSpacing((1.5, 1.25, 3.0))
    sitk.WriteImage(image, str(tmp_path / "plain.nii"))
    return tmp_path / "plain.nii"


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
@given(angles=st.tuples(*[st.floats(-3, 3)] * 3), spacing=st.tuples(*[st.floats(0.3, 8)] * 3))
@settings(max_examples=10, deadline=None)
def test_geometry_is_simpleitks_and_comes_back_to_the_last_bit(
    suffix: str, angles, spacing, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("geometry")
    path = write_scan(folder / f"a{suffix}", spacing=spacing, direction=rotation(*angles))
    expected = sitk.ReadImage(str(path))
    image = read_image(path)
    assert image.spacing_mm == expected.GetSpacing()
    assert image.origin_mm == expected.GetOrigin()
    assert image.direction == expected.GetDirection()
    assert np.array_equal(image.array, sitk.GetArrayFromImage(expected))
    labels = (image.array > 0).astype(np.uint8)
    write_labels(labels, image, folder / f"b{suffix}")
    again = sitk.ReadImage(str(folder / f"b{suffix}"))
    assert again.GetPixelID() == sitk.sitkUInt8
    for found, wanted in (
        (again.GetSpacing(), expected.GetSpacing()),
        (again.GetOrigin(), expected.GetOrigin()),
        (again.GetDirection(), expected.GetDirection()),
    ):
        assert found == wanted
    assert np.array_equal(sitk.GetArrayFromImage(again), labels)


def test_nifti_header_geometry_is_repeated_byte_for_byte(plain: Path, tmp_path: Path):
    write_labels(np.ones_like(body_hu(), dtype=np.uint8), read_image(plain), tmp_path / "l.nii")
    old, new = plain.read_bytes(), (tmp_path / "l.nii").read_bytes()
    assert old[76:108] == new[76:108]  # pixdim
    assert old[252:344] == new[252:344]  # qform, sform and their codes
    assert new.endswith(np.ones_like(body_hu(), dtype=np.uint8).tobytes())


def test_sheared_scan_is_read_and_kept(plain: Path, tmp_path: Path):
    rows = (-1.5, 0.0, 0.6, 10.0, 0.0, -1.25, 0.0, 20.0, 0.0, 0.0, 3.0, 30.0)
    path = patched(plain, tmp_path / "sheared.nii", 252, "<hh", 0, 1)
    path = patched(path, path, 280, "<12f", *rows)
    image = read_image(path)
    third = np.array([-0.6, 0.0, 3.0])
    assert image.spacing_mm == pytest.approx((1.5, 1.25, np.linalg.norm(third)))
    assert np.reshape(image.direction, (3, 3))[:, 2] == pytest.approx(third / np.linalg.norm(third))
    write_labels(np.zeros_like(body_hu(), dtype=np.uint8), image, tmp_path / "l.nii")
    assert (tmp_path / "l.nii").read_bytes()[252:344] == path.read_bytes()[252:344]


@pytest.mark.parametrize(
    "kind", ["uint8", "int16", "uint16", "int32", "float32", "float64", "int8", "uint32"]
)
def test_voxel_types(tmp_path: Path, kind: str):
    values = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(kind)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "a.nii.gz"))
    image = read_image(tmp_path / "a.nii.gz")
    assert np.array_equal(image.array, values)
    assert image.array.dtype == (np.float32 if kind == "float64" else np.dtype(kind))


def test_big_endian(tmp_path: Path):
    values = np.arange(-12, 12, dtype=">i2").reshape(2, 3, 4)
    raw = bytearray(352)
    struct.pack_into(">i", raw, 0, 348)
    struct.pack_into(">8h", raw, 40, 3, 4, 3, 2, 1, 1, 1, 1)
    struct.pack_into(">hh", raw, 70, 4, 16)
    struct.pack_into(">8f", raw, 76, 1, 1, 1, 1, 1, 1, 1, 1)
    struct.pack_into(">f", raw, 108, 352)
    raw[344:348] = b"n+1\0"
    (tmp_path / "a.nii").write_bytes(bytes(raw) + values.tobytes())
    assert np.array_equal(read_image(tmp_path / "a.nii").array, values)


@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [(2.0, -1024.0, (2.0, -1024.0)), (0.0, 7.0, (1, 0)), (float("nan"), 7.0, (1, 0))],
)
def test_scaling(plain: Path, tmp_path: Path, slope, intercept, expected):
    path = patched(plain, tmp_path / "scaled.nii", 112, "<ff", slope, intercept)
    wanted = body_hu() * expected[0] + expected[1]
    assert np.array_equal(read_image(path).array, wanted)


def test_four_dimensions(plain: Path, tmp_path: Path):
    one = patched(plain, tmp_path / "one.nii", 40, "<8h", 4, 44, 40, 20, 1, 1, 1, 1)
    assert read_image(one).array.shape == (20, 40, 44)
    two = patched(plain, tmp_path / "two.nii", 40, "<8h", 4, 44, 40, 10, 2, 1, 1, 1)
    assert "4-D (44 x 40 x 10 x 2)" in refused(two)


def test_tiny_scans(tmp_path: Path):
    for shape in ((1, 40, 44), (3, 2, 1)):
        path = write_scan(tmp_path / "a.nii.gz", np.zeros(shape, np.int16))
        assert read_image(path).array.shape == shape


def test_wrong_suffixes_about_compression_are_forgiven(plain: Path, tmp_path: Path):
    (tmp_path / "not_zipped.nii.gz").write_bytes(plain.read_bytes())
    (tmp_path / "zipped.nii").write_bytes(gzip.compress(plain.read_bytes()))
    for name in ("not_zipped.nii.gz", "zipped.nii"):
        image = read_image(tmp_path / name)
        assert np.array_equal(image.array, body_hu())
        assert image.spacing_mm == (1.5, 1.25, 3.0)


def test_gzip_in_pieces_members_and_with_padding(plain: Path, tmp_path: Path):
    # Noise, so that the compressed file is longer than what is read at once, and two members
    # that part in the middle of the voxels.
    hu = np.random.default_rng(0).integers(-900, 900, (24, 200, 220), dtype=np.int16)
    raw = write_scan(tmp_path / "noise.nii", hu).read_bytes()
    members = gzip.compress(raw[:1_000_001], 1) + b"\0" * 5 + gzip.compress(raw[1_000_001:], 1)
    assert len(members) > 2**20
    for name, content in (
        ("one", gzip.compress(raw, 1)),
        ("two", members),
        ("padded", members + b"\0" * 600),
        ("longer", gzip.compress(raw + b"behind the voxels")),
        ("garbage", gzip.compress(raw) + b"not gzip"),
    ):
        path = tmp_path / f"{name}.nii.gz"
        path.write_bytes(content)
        assert np.array_equal(read_image(path).array, hu), name
    zipped = bytearray(gzip.compress(raw, 1))
    (tmp_path / "cut.nii.gz").write_bytes(zipped[:-40])
    assert "damaged gzip" in refused(tmp_path / "cut.nii.gz")
    zipped[-8] ^= 1  # the checksum
    (tmp_path / "flipped.nii.gz").write_bytes(zipped)
    assert "damaged gzip" in refused(tmp_path / "flipped.nii.gz")


def test_what_is_not_a_scan(tmp_path: Path, plain: Path):
    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    zipped = gzip.compress(plain.read_bytes())
    noise = np.random.default_rng(0).bytes(5000)
    assert "no such file" in refused(tmp_path / "none.nii.gz")
    assert "empty (0 bytes)" in refused(file("empty.nii.gz", b""))
    assert "damaged gzip" in refused(file("cut.nii.gz", zipped[: len(zipped) // 2]))
    assert "does not begin with a NIfTI header" in refused(file("noise.nii.gz", noise))
    assert "348" in refused(file("text.nii.gz", b"just a text"))
    assert "damaged gzip" in refused(file("magic.nii.gz", b"\x1f\x8b" + noise))
    raw = plain.read_bytes()
    assert f"{len(raw) - 100} bytes where its header promises {len(raw)}" in refused(
        file("cut.nii", raw[:-100])
    )
    assert "cut: " in refused(file("cut_inside.nii.gz", gzip.compress(raw[:-100])))
    assert "does not begin with a MetaImage header" in refused(file("noise.mha", noise))
    assert "cannot be read as an image" in refused(file("noise.nrrd", noise))
    assert "cannot be read as an image" in refused(file("noise.nrrd", noise))
    assert "not a known kind" in refused(file("scan.jpg", noise))


def test_unusable_headers(plain: Path, tmp_path: Path):
    def changed(offset: int, form: str, *values: object) -> str:
        return refused(patched(plain, tmp_path / "changed.nii", offset, form, *values))

    assert "2-D (44 x 40)" in changed(40, "<3h", 2, 44, 40)
    assert "impossible dimensions" in changed(40, "<2h", 3, -4)
    assert "RGB" in changed(70, "<h", 128)
    assert "complex" in changed(70, "<h", 32)
    assert "unknown voxel type 999" in changed(70, "<h", 999)
    assert "3 numbers a voxel" in changed(40, "<8h", 5, 44, 40, 2, 1, 3, 1, 1)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        assert f"spacing {bad:g}, 1.25, 3 mm" in changed(80, "<f", bad)


def test_form_disagreement_is_a_warning(plain: Path, tmp_path: Path):
    path = patched(plain, tmp_path / "moved.nii", 252, "<hh", 1, 1)
    x_offset = struct.unpack_from("<f", path.read_bytes(), 280 + 12)[0]
    path = patched(path, path, 280 + 12, "<f", x_offset + 25)
    assert read_image(plain).warnings == ()
    assert any("differ by up to 25.0 mm" in w for w in read_image(path).warnings)


@pytest.mark.parametrize("taken", ["sform", "qform"])
def test_of_two_forms_the_one_taken_is_named(tmp_path: Path, taken: str):
    """One number of the sform changes its sign: upright axes are mirrored, oblique ones sheared,
    for which ITK takes the qform."""
    turned = {"direction": rotation(0.1, -0.2, 0.15)} if taken == "qform" else {}
    plain = write_scan(tmp_path / "plain.nii", **turned)
    path = patched(plain, tmp_path / "mirrored.nii", 252, "<hh", 1, 1)
    step = struct.unpack_from("<f", path.read_bytes(), 280)[0]
    path = patched(path, path, 280, "<f", -step)
    image = read_image(path)
    mirrored = image.direction[0] * read_image(plain).direction[0] < 0
    assert mirrored == (taken == "sform")
    assert f"the {taken} is taken: check the sides" in image.warnings[0]


def test_voxel_sizes_are_the_sforms_where_it_alone_is_given(plain: Path, tmp_path: Path):
    path = patched(plain, tmp_path / "sizes.nii", 252, "<hh", 0, 1)
    assert read_image(path).warnings == ()
    path = patched(path, path, 80, "<fff", 1.0, 1.0, 1.0)
    image, expected = read_image(path), read_image(plain)
    assert image.spacing_mm == pytest.approx(expected.spacing_mm)
    assert image.direction == pytest.approx(expected.direction, abs=1e-6)
    assert image.origin_mm == pytest.approx(expected.origin_mm)
    assert image.warnings == (
        "voxels of 1 x 1 x 1 mm by pixdim, of 1.5 x 1.25 x 3 by the sform, which is taken",
    )


def test_numbers_beyond_float32_are_told_in_one_line(plain: Path, tmp_path: Path, capfd, recwarn):
    path = patched(plain, tmp_path / "slope.nii", 112, "<ff", 1e38, 0.0)
    assert any("NaN or infinite" in w for w in read_image(path).warnings)
    path = patched(plain, tmp_path / "sform.nii", 252, "<hh", 0, 1)
    assert "the sform in its header is not finite" in refused(
        patched(path, path, 280, "<f", float("nan"))
    )
    assert not recwarn.list and capfd.readouterr() == ("", "")


def test_vector_voxels_of_other_formats(tmp_path: Path):
    image = sitk.GetImageFromArray(np.zeros((3, 4, 5, 3), np.uint8), isVector=True)
    sitk.WriteImage(image, str(tmp_path / "rgb.mha"))
    assert "3 numbers a voxel" in refused(tmp_path / "rgb.mha")


def test_axes_of_other_formats(tmp_path: Path):
    slice_of = sitk.GetImageFromArray(np.zeros((4, 5), np.int16))
    sitk.WriteImage(slice_of, str(tmp_path / "slice.mha"))
    assert "2-D (5 x 4)" in refused(tmp_path / "slice.mha")
    series = sitk.JoinSeries([sitk.Image(5, 4, 3, sitk.sitkInt16)] * 2)
    sitk.WriteImage(series, str(tmp_path / "series.nrrd"))
    assert "4-D (5 x 4 x 3 x 2)" in refused(tmp_path / "series.nrrd")


def test_nifti_2_is_refused_by_name(tmp_path: Path):
    (tmp_path / "two.nii").write_bytes(struct.pack("<i", 540) + bytes(600))
    assert "NIfTI-2" in refused(tmp_path / "two.nii")


def test_a_name_that_is_not_utf8(tmp_path: Path, plain: Path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/sch\xf6n.nii.gz"))
    path.write_bytes(plain.read_bytes())
    with pytest.raises(UserError, match=r"sch\\xf6n.nii.gz: a name that is not UTF-8"):
        read_image(path)
    with pytest.raises(UserError, match="not UTF-8"):
        write_labels(np.zeros((20, 40, 44), np.uint8), read_image(plain), path)
    write_dicom(tmp_path / "s", [0, 3, 6])
    slice_of = Path(os.fsdecode(os.fsencode(tmp_path / "s") + b"/\xf6.dcm"))
    (tmp_path / "s" / "1.2.3-0.dcm").rename(slice_of)
    with pytest.raises(UserError, match="not UTF-8"):
        read_image(tmp_path / "s")


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_voxels_outlive_the_image_that_they_came_from(tmp_path: Path, suffix: str):
    """SimpleITK's view of them does not: it showed what came into their memory next."""
    path = write_scan(tmp_path / f"a{suffix}", body_hu((20, 24, 28)))
    wanted = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    voxels = read_image(path).array
    turned = reorient(read_image(path), "LPS").array
    cut = crop_third(read_image(path), above=True).array
    filled = [np.full(wanted.shape, 99, wanted.dtype) for _ in range(20)]
    assert np.array_equal(voxels, wanted) and np.array_equal(turned, wanted)
    assert np.isin(cut, wanted).all() and len(filled) == 20


def test_values_of_a_scan_without_any(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        facts = describe(image_from_array(np.full((4, 5, 6), np.nan, np.float32), (1, 1, 1)))
    assert (facts["lowest_value"], facts["percentiles_1_50_99"]) == (None, [])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((3, 4, 5), -1000.0), "will be empty"),
        (np.full((3, 4, 5), 40.0), "all voxels have the same value (40)"),
        (np.linspace(0, 255, 60).reshape(3, 4, 5), "picture or an MR"),
        (np.linspace(0, 3000, 60).reshape(3, 4, 5), "offset of 1024"),
        (np.where(np.arange(60) == 7, np.nan, -50.0 + np.arange(60)).reshape(3, 4, 5), "1 voxel"),
        (np.where(np.arange(60) < 2, np.inf, -50.0 + np.arange(60)).reshape(3, 4, 5), "2 voxel"),
        (np.full((3, 4, 5), np.nan), "60 voxel(s) are NaN"),
    ],
)
def test_odd_values_are_warnings(values, words):
    image = image_from_array(values.astype(np.float32), (1.0, 1.0, 1.0))
    assert any(words in warning for warning in image.warnings)


def test_an_ordinary_scan_has_no_warning():
    assert image_from_array(body_hu(), (1.0, 1.0, 1.0)).warnings == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "must be above 0"),
        ({"origin_mm": (0.0, float("nan"), 0.0)}, "origin"),
        ({"direction": (1.0, 0, 0, 1.0, 0, 0, 0, 0, 1.0)}, "do not span a volume"),
        ({"array": np.zeros((3, 4))}, "expected (z, y, x)"),
        ({"array": np.zeros((3, 4, 5), complex)}, "expected numbers"),
        ({"array": [[[1, 2]]]}, "a scan of type list"),
        ({"spacing_mm": 1.5}, "voxel spacing (1.5,) mm"),
        ({"spacing_mm": "abc"}, "spacing 'abc'; numbers are needed"),
        ({"direction": None}, "do not span a volume"),
    ],
)
def test_arrays_are_checked_too(change, words):
    arguments = {"array": body_hu(), "spacing_mm": (1.0, 1.0, 1.0), **change}
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
        image_from_array(**arguments)


def test_find_inputs(tmp_path: Path):
    folder = tmp_path / "a folder with ünïcode"
    for name in ("-b.nii.gz", "a#1%.mha", ".hidden.nii.gz"):
        write_scan(folder / name)
    (folder / "notes.txt").write_text("")
    (folder / "linked.nii.gz").symlink_to(folder / "-b.nii.gz")
    (folder / "dangling.nii.gz").symlink_to(folder / "nothing")
    (folder / "loop.nii.gz").symlink_to(folder / "loop.nii.gz")
    (folder / "round").symlink_to(folder)
    found = [path.name for path in find_inputs(folder)]
    assert found == ["-b.nii.gz", "a#1%.mha", "dangling.nii.gz", "linked.nii.gz", "loop.nii.gz"]
    for name in ("dangling.nii.gz", "loop.nii.gz"):
        refused(folder / name)
    for name in ("-b.nii.gz", "a#1%.mha", "linked.nii.gz"):
        assert np.array_equal(read_image(folder / name).array, body_hu())


def test_files_of_a_header_and_its_voxels(tmp_path: Path):
    for name in ("a.raw", "b.raw", "c 1.raw", "a.nii.gz"):
        (tmp_path / name).touch()
    headers = {
        "a.mhd": "NDims = 3\nElementDataFile = a.raw\n",
        "list.MHD": "NDims = 3\nElementDataFile = LIST\na.raw\nc 1.raw\n",
        "b.nhdr": "NRRD0004\ndimension: 3\ndata file: b.raw\n",
        "gone.mhd": "ElementDataFile = gone.raw\n",
        "odd.mhd": "nothing",
    }
    for name, text in headers.items():
        (tmp_path / name).write_text(text)
    found = {name: [p.name for p in files_of(tmp_path / name)[1:]] for name in headers}
    assert found == {
        "a.mhd": ["a.raw"], "list.MHD": ["a.raw", "c 1.raw"], "b.nhdr": ["b.raw"],
        "gone.mhd": [], "odd.mhd": [],
    }  # fmt: skip
    assert files_of(tmp_path / "a.nii.gz") == [tmp_path / "a.nii.gz"]
    assert files_of(tmp_path / "none.mhd") == [tmp_path / "none.mhd"]


def test_sub_folders_of_scans_that_are_passed_over(tmp_path: Path):
    for name in ("in/a.nii.gz", "in/later/b.nii.gz", "in/.cache/c.nii.gz", "in/out/a.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "in/notes").mkdir()
    (tmp_path / "in/notes/read.txt").touch()
    folder = tmp_path / "in"
    assert passed_over(folder, folder / "out") == [folder / "later"]
    assert passed_over(folder, folder / "out" / "a.nii.gz") == [folder / "later"]
    assert passed_over(folder / "a.nii.gz", folder / "out") == []


def test_find_inputs_refuses(tmp_path: Path):
    with pytest.raises(UserError, match="no such file or folder"):
        find_inputs(tmp_path / "none")
    with pytest.raises(UserError, match="no scan among its 0 entries; expected .nii.gz"):
        find_inputs(tmp_path)
    # A folder for each patient, as archives have them: the line says where the scans are.
    for patient in ("a", "b"):
        (tmp_path / patient).mkdir()
        (tmp_path / patient / "ct.nii.gz").write_bytes(b"")
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match=r"3 entries, but in 2 sub-folder.*first is .*/a$"):
        find_inputs(tmp_path)


def test_a_folder_that_cannot_be_looked_into_is_a_case_that_fails(tmp_path: Path, monkeypatch):
    for name in ("lost+found", "secret"):
        (tmp_path / name).mkdir()
    write_scan(tmp_path / "a.nii.gz")
    listed = Path.iterdir

    def iterdir(path: Path):
        if path.name in ("lost+found", "secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert [path.name for path in find_inputs(tmp_path)] == ["a.nii.gz", "secret"]
    assert "Permission denied" in refused(tmp_path / "secret")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("case_0000.nii.gz", "case.nii.gz"),
        ("case.nii.gz", "case.nii.gz"),
        ("case_0001.nii.gz", "case_0001.nii.gz"),
        ("a.b_0000.mha", "a.b.mha"),
        ("_0000.nii.gz", "_0000.nii.gz"),
        ("series", "series.nii.gz"),
    ],
)
def test_output_name(name: str, expected: str):
    assert output_name(Path(name)) == expected


def test_strip_suffix():
    assert strip_suffix("a.b.NII.GZ") == ("a.b", ".NII.GZ")
    assert strip_suffix("notes.txt") == ("notes.txt", "")
    assert strip_suffix(".nii.gz") == (".nii.gz", "")


def test_dicom_series(tmp_path: Path):
    write_dicom(tmp_path / "s", [6, 0, 3, 9])
    image = read_image(tmp_path / "s")
    assert image.array[:, 0, 0].tolist() == [0, 3, 6, 9]
    assert image.spacing_mm[2] == 3
    assert find_inputs(tmp_path / "s") == [tmp_path / "s"]
    assert find_inputs(tmp_path) == [tmp_path / "s"]


def test_what_lies_beside_a_series_does_not_hide_it(tmp_path: Path):
    series = tmp_path / "s"
    write_dicom(series, [0, 3, 6, 9])
    write_scan(series / "converted.nii.gz")
    write_dicom(series / "late", [0, 3])
    assert find_inputs(series) == [series, series / "converted.nii.gz", series / "late"]
    # What is DICOM but no scan counts neither there nor in a folder of its own.
    for uid in (
        "1.2.840.10008.5.1.4.1.1.88.67", "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.1.3.10",
        "1.2.840.10008.5.1.4.1.1.11.1", "1.2.840.10008.5.1.4.1.1.104.1",
        "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66",
    ):  # fmt: skip
        name = uid.encode() + b"\0" * (len(uid) % 2)
        head = bytes(128) + b"DICM" + b"\2\0\2\0UI" + len(name).to_bytes(2, "little") + name
        (tmp_path / f"other{uid}").mkdir()
        (tmp_path / f"other{uid}" / "one").write_bytes(head + b"\2\0\3\0UI")
    assert find_inputs(tmp_path) == [series]
    (tmp_path / "DICOMDIR").write_bytes(head.replace(name, b"1.2.840.10008.1.3.10"))
    assert find_inputs(tmp_path) == [series]
    # A PET (1.1.128) is an image, whose values will be warned of.
    (tmp_path / "pet").mkdir()
    (tmp_path / "pet" / "one").write_bytes(head.replace(name, b"1.2.840.10008.5.1.4.1.1.128\0"))
    assert find_inputs(tmp_path) == [tmp_path / "pet", series]


def test_many_frames_in_one_file_are_read_with_a_warning(tmp_path: Path):
    frames = sitk.GetImageFromArray(np.arange(1024, dtype=np.uint16).reshape(4, 16, 16))
    (tmp_path / "s").mkdir()
    sitk.WriteImage(frames, str(tmp_path / "s" / "all.dcm"))
    image = read_image(tmp_path / "s")
    assert image.array.shape == (4, 16, 16)
    assert image.warnings[0].startswith("one file of 4 frames: gaps or a tilt")
    assert "its voxels read as 1 x 1 x 1 mm, which is probably wrong" in image.warnings[0]
    write_dicom(tmp_path / "t", [6, 0, 3, 9])
    assert not any("frames" in warning for warning in read_image(tmp_path / "t").warnings)


def test_one_slice_whose_position_is_empty(tmp_path: Path):
    write_dicom(tmp_path / "s", [3])
    slice_of = next((tmp_path / "s").iterdir())
    image = read_image(tmp_path / "s")
    assert image.array.shape == (1, 16, 16) and image.spacing_mm == (1.0, 1.0, 3.0)
    assert image.warnings[0] == "a single slice, taken for 3 mm thick: volumes depend on that"
    whole = slice_of.read_bytes()
    at = whole.index(b"\x20\0\x32\0")  # implicit value representation: four bytes of length
    size = int.from_bytes(whole[at + 4 : at + 8], "little")
    empty = whole[: at + 4] + bytes(4) + whole[at + 8 + size :]
    slice_of.write_bytes(empty)
    assert read_image(tmp_path / "s").array.shape == (1, 16, 16)
    write_dicom(tmp_path / "s", [6, 9], uid="1.2.3")
    slice_of.with_name("no position.dcm").write_bytes(empty)
    assert "position" in refused(tmp_path / "s")


def test_a_tilted_series_is_a_sheared_volume(tmp_path: Path):
    write_dicom(tmp_path / "tilted", [6, 0, 9, 3], tilt=0.2)
    image = read_image(tmp_path / "tilted")
    assert image.warnings[0] == "gantry tilt of 11.3 degrees, kept: a sheared volume"
    assert image.array[:, 0, 0].tolist() == [0, 3, 6, 9]
    # Each slice lies where its header says: 3 mm up and .6 mm backwards from the one below.
    step = np.reshape(image.direction, (3, 3))[:, 2] * image.spacing_mm[2]
    assert step == pytest.approx([0, 0.6, 3])
    labels = np.arange(4, dtype=np.uint8).repeat(256).reshape(4, 16, 16)
    for suffix in (".nii.gz", ".nrrd", ".mha"):
        write_labels(labels, image, tmp_path / f"labels{suffix}")
        again = read_image(tmp_path / f"labels{suffix}")
        axes = np.reshape(again.direction, (3, 3)) * again.spacing_mm
        assert axes[:, 2] == pytest.approx([0, 0.6, 3], abs=1e-5)
        assert again.array.tolist() == labels.tolist()
    write_dicom(tmp_path / "rounded", [0, 3, 6, 9], tilt=0.001)
    image = read_image(tmp_path / "rounded")
    assert image.direction == IDENTITY and not any("tilt" in told for told in image.warnings)


def test_slices_without_a_preamble(tmp_path: Path):
    write_dicom(tmp_path / "s", [0, 3, 6, 9])
    for file in (tmp_path / "s").iterdir():
        whole = file.read_bytes()
        meta = int.from_bytes(whole[140:144], "little")
        file.write_bytes(whole[144 + meta :])
    assert find_inputs(tmp_path) == [tmp_path / "s"]
    assert read_image(tmp_path / "s").array[:, 0, 0].tolist() == [0, 3, 6, 9]
    (tmp_path / "s" / "1.2.3-0.dcm").write_bytes(b"\x08\0\x16\0")
    assert "a slice that cannot be read" in refused(tmp_path / "s")


def test_dicom_trouble(tmp_path: Path):
    write_dicom(tmp_path / "two", [0, 3], uid="1.2.3")
    write_dicom(tmp_path / "two", [0, 3, 6], uid="1.2.4")
    assert "2 DICOM series" in refused(tmp_path / "two")
    write_dicom(tmp_path / "gap", [0, 3, 6, 12, 15])
    assert "slices are missing: 6.00 mm between the slices at 6.0 and 12.0 mm" in refused(
        tmp_path / "gap"
    )
    write_dicom(tmp_path / "uneven", [0, 3, 6, 9.5, 12.5])
    assert "uneven spacing: 3.50 mm" in refused(tmp_path / "uneven")
    write_dicom(tmp_path / "moved", [0, 3, 6, 9], shift_mm={6: 40})
    assert "slices at 3.0 and 6.0 mm are shifted sideways by 40.0 mm" in refused(tmp_path / "moved")
    write_dicom(tmp_path / "pixels", [0, 3, 6, 9], pixel_mm={6: 2})
    assert "pixels of 1.000 to 2.000 mm; not one volume" in refused(tmp_path / "pixels")
    # GDCM passes over what it cannot read: the scan would lose its first slice.
    for size in (0, 100, 150, 700):
        write_dicom(tmp_path / f"cut{size}", [0, 3, 6, 9])
        first = tmp_path / f"cut{size}" / "1.2.3-0.dcm"
        first.write_bytes(first.read_bytes()[:size])
        assert f"1.2.3-0.dcm: a slice that cannot be read ({size} bytes, cut?)" in refused(
            first.parent
        )
    write_dicom(tmp_path / "zeros", [0, 3, 6, 9])
    first = tmp_path / "zeros" / "1.2.3-0.dcm"
    first.write_bytes(bytes(first.stat().st_size))
    assert "a slice that cannot be read" in refused(first.parent)
    first.unlink()
    first.symlink_to("nothing")
    assert "1.2.3-0.dcm: a slice that cannot be read (No such file" in refused(first.parent)
    # What is no slice does not matter, even where it tells of some, as a DICOMDIR does.
    series = tmp_path / "cut0"
    for name, slice_of in enumerate(sorted(series.glob("*.dcm"))):
        slice_of.rename(series / f"IM{name}")
    (series / "IM0").rename(series / "VERSION")
    directory = bytearray((series / "IM1").read_bytes())
    at = directory.index(b"1.2.840.10008.5.1.4.1.1.2")
    directory[at : at + 25] = b"1.2.840.10008.1.3.10\0\0\0\0\0"
    (series / "DICOMDIR").write_bytes(directory[:700] + b"1.2.840.10008.5.1.4.1.1.2\0")
    (series / os.fsdecode(b"lies \xf6.txt")).write_text("by someone")
    assert read_image(series).array.shape[0] == 3
    (tmp_path / "none").mkdir()
    assert "no DICOM series" in refused(tmp_path / "none")

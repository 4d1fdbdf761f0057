"""A DICOM Segmentation read back: voxels, codes, and the series that it refers to."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import body_hu

from flare_clef.dicom_seg import _CATEGORY, _SIDES, SNOMED_CT, segmentation_file
from flare_clef.errors import UserError
from flare_clef.images import read_image
from flare_clef.organs import ORGANS
from flare_clef.scan_files import find_inputs

pytest.importorskip("highdicom", reason="highdicom is not installed (extra: dicom)")

SHAPE = (6, 24, 32)
SLICE_MM = 3.0


def write_series(folder: Path) -> Path:
    """A CT of ``SHAPE``, its slices written from head to feet, named against their order."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True)
    study, series, frame = (generate_uid() for _ in range(3))
    hu = body_hu(SHAPE)
    for z in range(SHAPE[0]):
        one = Dataset()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = CTImageStorage
        one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = generate_uid()
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, frame
        one.PatientName, one.PatientID, one.PatientBirthDate, one.PatientSex = (
            "Phantom",
            "P1",
            "",
            "O",
        )
        one.StudyDate, one.StudyTime, one.StudyID, one.AccessionNumber = (
            "20200101",
            "120000",
            "1",
            "",
        )
        one.ReferringPhysicianName, one.PositionReferenceIndicator = "", ""
        one.Modality, one.Manufacturer, one.SeriesNumber = "CT", "Synthetic", 3
        one.InstanceNumber = SHAPE[0] - z
        one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        one.ImagePositionPatient = [-20.0, -15.0, 100.0 + SLICE_MM * z]
        one.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        one.PixelSpacing, one.SliceThickness = [1.5, 1.25], SLICE_MM
        one.Rows, one.Columns = SHAPE[1:]
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.RescaleIntercept, one.RescaleSlope, one.RescaleType = 0, 1, "HU"
        one.KVP, one.AcquisitionNumber = 120, 1
        one.PixelData = np.ascontiguousarray(hu[z]).tobytes()
        one.save_as(folder / f"{SHAPE[0] - z:03}.dcm", enforce_file_format=True)
    return folder


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_series(tmp_path_factory.mktemp("dicom") / "series")


def some_labels() -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    for organ in ORGANS:
        labels[organ.index % 5, organ.index, 3 : 4 + organ.index] = organ.index
    return labels


def test_a_folder_of_segmentations_is_no_series(series: Path, tmp_path: Path):
    (tmp_path / "scan").symlink_to(series)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scan.dcm").write_bytes(segmentation_file(some_labels(), series, None))
    assert find_inputs(tmp_path) == [tmp_path / "scan"]
    with pytest.raises(UserError, match="no scan among its 1 entries"):
        find_inputs(tmp_path / "out")


def test_voxels_codes_and_source(series: Path):
    import highdicom
    from pydicom import dcmread

    image, labels = read_image(series), some_labels()
    assert np.array_equal(image.array, body_hu(SHAPE))
    found = highdicom.seg.segread(io.BytesIO(segmentation_file(labels, series)))
    assert found.number_of_segments == 13
    volume = found.get_volume(combine_segments=True, skip_overlap_checks=False)
    # Only slices with organs are stored; put each back where its position says.
    rebuilt = np.zeros(SHAPE, np.uint8)
    for index, plane in enumerate(volume.array):
        position = volume.map_indices_to_reference(np.array([[index, 0, 0]]))[0]
        rebuilt[round((position[2] - 100) / SLICE_MM)] = plane
    assert np.array_equal(rebuilt, labels)

    sources = [dcmread(path) for path in series.iterdir()]
    referred = found.ReferencedSeriesSequence[0]
    assert referred.SeriesInstanceUID == sources[0].SeriesInstanceUID
    assert {i.ReferencedSOPInstanceUID for i in referred.ReferencedInstanceSequence} == {
        s.SOPInstanceUID for s in sources
    }
    assert found.StudyInstanceUID == sources[0].StudyInstanceUID

    kidney = found.get_segment_description(2)
    assert kidney.SegmentLabel == "Right kidney"
    code = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert (code.CodeValue, code.CodingSchemeDesignator) == ("64033007", "SCT")
    assert code.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == "24028007"
    assert found.get_segment_description(1).SegmentedPropertyTypeCodeSequence[0].CodeMeaning == (
        "Liver"
    )


@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
        ("", "Phantom^P"),
        ("ISO 2022 IR 6", "Phantom^P"),
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 192", "王^小明"),
    ],
)
def test_patients_keep_their_names_in_any_character_set(
    series: Path, tmp_path: Path, character_set: str | list[str], name: str
):
    import highdicom
    from pydicom import dcmread

    for path in series.iterdir():
        one = dcmread(path)
        one.SpecificCharacterSet, one.PatientName = character_set, name
        one.save_as(tmp_path / path.name)
    assert dcmread(tmp_path / path.name).PatientName == name
    found = highdicom.seg.segread(io.BytesIO(segmentation_file(some_labels(), tmp_path)))
    assert found.PatientName == name


def test_some_organs_are_numbered_from_one(series: Path):
    import highdicom

    found = highdicom.seg.segread(io.BytesIO(segmentation_file(some_labels(), series, {3, 9})))
    names = [found.get_segment_description(n).SegmentLabel for n in found.segment_numbers]
    assert names == ["Spleen", "Gallbladder"]


def test_every_organ_has_a_code():
    assert len(SNOMED_CT) == 11
    assert all(o.name.removeprefix("right_").removeprefix("left_") in SNOMED_CT for o in ORGANS)


def test_codes_stand_in_the_context_groups_of_the_standard():
    """By pydicom's dictionary, made from DICOM PS3.16: code, meaning, and the groups it is in."""
    from pydicom.sr._concepts_dict import concepts

    listed: dict[tuple[str, str], set[int]] = {}
    for terms in concepts["SCT"].values():
        for code, (meaning, groups) in terms.items():
            listed.setdefault((code, meaning), set()).update(groups)
    assert 7150 in listed[_CATEGORY]  # Segmentation Property Category
    for name, coded in SNOMED_CT.items():
        assert 7151 in listed[coded], name  # Segmentation Property Type
        assert coded[1] == name.replace("_", " ").capitalize()
    for name, coded in _SIDES.items():
        assert 244 in listed[coded], name  # Laterality
        assert coded[1] == name.capitalize()
    assert len({code for code, _ in SNOMED_CT.values()}) == len(SNOMED_CT)


def test_a_file_that_is_no_series_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="needs a folder of one DICOM series"):
        segmentation_file(some_labels(), tmp_path / "scan.nii.gz")


def test_from_the_command_line(series: Path, tmp_path: Path, tiny_weights: Path):
    import highdicom
    from typer.testing import CliRunner

    from flare_clef.cli import app

    arguments = ["predict", series, tmp_path / "out", "--weights", tiny_weights]
    options = ["--precision", "fp32", "--format", "dicom-seg", "--split", "--quiet"]
    done = CliRunner().invoke(app, [*map(str, arguments), *options])
    assert done.exit_code == 0, done.output
    found = highdicom.seg.segread(tmp_path / "out" / "series.dcm")
    assert found.number_of_segments == 13
    masks = [read_image(p).array for p in sorted((tmp_path / "out" / "series").iterdir())]
    assert len(masks) == 13 and all(mask.shape == SHAPE for mask in masks)
    # Every frame that is stored holds voxels, and together they are the masks'.
    assert found.pixel_array.sum() == sum(int(mask.sum()) for mask in masks) > 0

"""What propagation leaves on disk, without a propagation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from small_cases import liver, write_pair

from flare_clef.images import read_image
from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.training.cases import Case
from flare_clef.training.datasets import read_dataset
from flare_clef.training.fusion import Calibration
from flare_clef.training.propagated_files import Propagated, write_case, write_records

ORGAN = ORGAN_BY_NAME["duodenum"]
CALIBRATION = Calibration((0.0, 1.0), (0.0, 1.0), 0.5, (0.6,))


def _case(folder: Path) -> Case:
    write_pair(folder, "a", liver())
    (case,) = read_dataset(folder).cases
    return case


def _propagate(cases: list[Case], output: Path) -> None:
    result = Propagated()
    for case in cases:
        result.cases[case.name] = write_case(case, ORGAN, None, CALIBRATION, output)
    write_records(result, {case.name: case for case in cases}, ORGAN, output)


def test_whose_bent_copy_a_case_is_stays_known(tmp_path: Path):
    _case(tmp_path / "cases")
    entry = {"organs": ["liver"], "source": "q; bent to the shapes of m", "bent_from": "q"}
    entry["shapes_of"] = "m"
    (tmp_path / "cases" / "cases.json").write_text(json.dumps({"a": entry}))
    _propagate(list(read_dataset(tmp_path / "cases").cases), tmp_path / "out")
    (case,) = read_dataset(tmp_path / "out").cases
    assert case.origins == {"a", "q", "m"} and case.source == "q; bent to the shapes of m"


def test_what_an_earlier_round_made_is_no_label_by_people(tmp_path: Path):
    _case(tmp_path / "cases")
    entry = {"organs": ["liver", "duodenum", "spleen"], "propagated": ["spleen"]}
    (tmp_path / "cases" / "cases.json").write_text(json.dumps({"a": entry}))
    (case,) = read_dataset(tmp_path / "cases").cases
    assert case.made == ("spleen",) and case.judged == ("liver", "duodenum")
    _propagate([case], tmp_path / "own")  # it has the organ already
    (again,) = read_dataset(tmp_path / "own").cases
    assert again.made == ("spleen",) and again.judged == ("liver", "duodenum")

    result, fewer = Propagated(), replace(case, organs=("liver", "spleen"))
    result.cases["a"] = write_case(fewer, ORGAN, None, CALIBRATION, tmp_path / "out")
    result.cases["a"]["labels"] = "propagated"
    chances = tmp_path / "out" / "probabilities"
    sitk.WriteImage(sitk.ReadImage(str(case.labels)), str(_made(chances) / "a.nii.gz"))
    write_records(result, {"a": fewer}, ORGAN, tmp_path / "out")
    (case,) = read_dataset(tmp_path / "out").cases
    assert case.propagated == ORGAN.name and case.chances is not None
    assert case.made == (ORGAN.name, "spleen") and case.judged == ("liver",)


def test_no_map_of_another_organ_stays(tmp_path: Path):
    """Of an earlier run into the same folder: every voxel would be in doubt by it."""
    case = _case(tmp_path / "cases")
    chances = _made(tmp_path / "out" / "probabilities") / "a.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(case.labels)), str(chances))
    _propagate([replace(case, propagated_before=("duodenum",))], tmp_path / "out")
    (again,) = read_dataset(tmp_path / "out").cases
    assert again.chances is None and not chances.exists()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_a_scan_of_two_files_can_be_read_at_its_new_place(tmp_path: Path, suffix: str):
    case = _case(tmp_path / "cases")
    _propagate([case], tmp_path / "out")
    link = tmp_path / "out" / "images" / "a_0000.nii.gz"
    assert link.is_symlink() and link.resolve() == case.image
    scan = read_image(case.image)
    header = case.image.with_name(f"a_0000{suffix}")
    sitk.WriteImage(sitk.ReadImage(str(case.image)), str(header))
    assert len(list(case.image.parent.iterdir())) == 3  # the header's voxels, too
    case.image.unlink()
    _propagate(list(read_dataset(tmp_path / "cases").cases), tmp_path / "out")
    (placed,) = read_dataset(tmp_path / "out").cases
    found = read_image(placed.image)
    np.testing.assert_array_equal(found.array, scan.array)
    np.testing.assert_allclose(found.origin_mm, scan.origin_mm)
    assert found.array.dtype == scan.array.dtype


def test_another_format_takes_the_place_of_the_former(tmp_path: Path):
    case = _case(tmp_path / "cases")
    _propagate([case], tmp_path / "out")
    sitk.WriteImage(sitk.ReadImage(str(case.image)), str(case.image.with_name("a_0000.mha")))
    case.image.unlink()
    _propagate(list(read_dataset(tmp_path / "cases").cases), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "images").iterdir()] == ["a_0000.mha"]

"""The changes that stress makes, by hand-worked values; the command as a whole, small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import write_scan
from typer.testing import CliRunner

from flare_clef import stress
from flare_clef.cli import app
from flare_clef.images import Image, image_from_array, read_image
from flare_clef.orientation import reorient


def scan() -> Image:
    """Nine slices, slice z holds 100 z; feet first."""
    array = np.zeros((9, 10, 20), np.int16) + 100 * np.arange(9, dtype=np.int16)[:, None, None]
    return image_from_array(array, (1.0, 2.0, 2.5), (5.0, 6.0, 7.0))


def test_thirds() -> None:
    above, below = (stress.crop_third(scan(), above=side) for side in (True, False))
    assert above.array[:, 0, 0].tolist() == [0, 100, 200, 300, 400, 500]
    assert above.origin_mm == (5, 6, 7)
    assert below.array[:, 0, 0].tolist() == [300, 400, 500, 600, 700, 800]
    assert below.origin_mm == (5, 6, 7 + 3 * 2.5)


def test_above_is_the_head_however_stored() -> None:
    turned = stress.crop_third(reorient(scan(), "IPL"), above=True)
    assert turned.array.shape == (20, 10, 6)
    assert turned.array[0, 0].tolist() == [500, 400, 300, 200, 100, 0]
    # The first slice left lies at the fifth of the scan's slices.
    assert turned.origin_mm == (5, 6, 7 + 5 * 2.5)


def test_thinned() -> None:
    thin = stress.thin_out(scan(), 5.0)
    assert thin.array[:, 0, 0].tolist() == [0, 200, 400, 600, 800]
    assert thin.spacing_mm == (1, 2, 5)
    assert stress.thin_out(thin, 5.0).array.shape == thin.array.shape


def test_thinning_is_named_by_what_it_reaches() -> None:
    names = {}
    for spacing in (1.0, 3.0, 4.0, 5.0, 7.5):
        image = replace(scan(), spacing_mm=(1.0, 2.0, spacing))
        (guise,) = (g for g in stress.perturbations(image) if g.name.startswith("slices of"))
        names[spacing] = guise.name
        reached = guise.change(image).spacing_mm[2]
        assert guise.name.split(" (")[0] == f"slices of {reached:g} mm"
    assert names[1.0] == "slices of 5 mm" and names[3.0] == "slices of 6 mm"
    assert names[4.0] == "slices of 4 mm (as is)" and names[7.5] == "slices of 7.5 mm (as is)"


def test_narrowed() -> None:
    small = stress.narrow(scan(), 0.8)
    assert small.array.shape == (9, 8, 16)
    assert small.origin_mm == (5 + 2 * 1, 6 + 1 * 2, 7)


def test_values() -> None:
    assert stress.shift_hu(scan(), -20).array[3, 0, 0] == 280
    noise = stress.add_noise(scan(), 30).array - scan().array
    assert noise.std() == pytest.approx(30, rel=0.05)
    assert abs(noise.mean()) < 3


def test_table_goes_and_gas_in_the_body_stays() -> None:
    array = np.full((3, 20, 20), -1000, np.int16)
    array[:, 2:12, 4:16] = 40
    array[:, 5:7, 8:10] = -900  # bowel gas
    array[:, 15, 2:18] = 200  # the table
    clean = stress.remove_table(replace(scan(), array=array)).array
    assert (clean[:, 13:] == -1000).all()
    np.testing.assert_array_equal(clean[:, :13], array[:, :13])


def test_agreement_leaves_out_what_is_in_neither() -> None:
    labels, reference = np.zeros((1, 1, 6), np.uint8), np.zeros((1, 1, 6), np.uint8)
    labels[..., :3], reference[..., 1:4] = 1, 1  # 2 * 2 / (3 + 3)
    labels[..., 5] = 3  # found, but not there
    scores = stress.agreement(labels, reference, ["liver", "spleen", "aorta"])
    assert scores == {"liver": pytest.approx(2 / 3), "spleen": 0.0, "aorta": None}
    assert stress.mean_dsc(scores) == pytest.approx(1 / 3)
    assert stress.mean_dsc({"aorta": None}) is None


def test_what_is_found_where_an_organ_was_cut_off() -> None:
    labels, reference = np.zeros((1, 1, 6), np.uint8), np.zeros((1, 1, 6), np.uint8)
    labels[..., :3], reference[..., 1:4] = 1, 1
    labels[..., 4:] = 3  # two voxels of 2 x 5 x 10 mm
    organs = ["liver", "spleen", "aorta"]
    found = stress.found_though_cut_off(labels, reference, organs, (2.0, 5.0, 10.0))
    assert found == {"spleen": 0.2}
    leaning = (1, 0, 0, 0, 1, 0.8, 0, 0, 0.6)  # a voxel is as high as .6 of its step
    found = stress.found_though_cut_off(labels, reference, organs, (2.0, 5.0, 10.0), leaning)
    assert found == {"spleen": 0.12}


def test_command(tmp_path: Path, tiny_weights: Path) -> None:
    path = write_scan(tmp_path / "scan.nii.gz")
    ran = CliRunner().invoke(
        app, ["stress", str(path), "-o", str(tmp_path / "out"), "--weights", str(tiny_weights)]
    )
    assert ran.exit_code == 0, ran.output
    result = json.loads((tmp_path / "out" / "stress.json").read_text())
    assert list(result["dsc"]) == [guise.name for guise in stress.perturbations(read_image(path))]
    # The tool looks at directions, so how a scan is stored changes next to nothing.
    assert result["mean"]["stored as RAS"] > 0.99
    lines = (tmp_path / "out" / "stress.csv").read_text().splitlines()
    assert lines[0] == "perturbation,organ,dsc"
    assert len(lines) == 1 + sum(len(row) for row in result["dsc"].values())
    assert (tmp_path / "out" / "stress.png").read_bytes().startswith(b"\x89PNG")


def test_labels_of_another_grid_are_one_line(tmp_path: Path, tiny_weights: Path) -> None:
    path = write_scan(tmp_path / "scan.nii.gz")
    sitk.WriteImage(sitk.Image(4, 4, 4, sitk.sitkUInt8), str(tmp_path / "labels.nii.gz"))
    ran = CliRunner().invoke(app, ["stress", str(path), str(tmp_path / "labels.nii.gz")])
    assert "labels.nii.gz: (4, 4, 4) voxels" in str(ran.exception)
    image = sitk.ReadImage(str(path))
    labels = sitk.Image(image.GetSize(), sitk.sitkUInt8)
    labels.CopyInformation(image)
    for change, words in (
        (lambda i: i.SetSpacing((1.5, 1.5, 5.0)), "its voxels lie up to 38 mm from those of"),
        (lambda i: i.SetPixel(1, 2, 3, 200), r"1 voxel(s) outside 0 to 13 (200)"),
    ):
        changed = sitk.Image(labels)
        change(changed)
        sitk.WriteImage(changed, str(tmp_path / "labels.nii.gz"))
        ran = CliRunner().invoke(app, ["stress", str(path), str(tmp_path / "labels.nii.gz")])
        assert words in str(ran.exception)

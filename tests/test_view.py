"""Slices on disk and in the terminal."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import body_hu, write_scan
from typer.testing import CliRunner

from flare_clef.cli import app
from flare_clef.errors import UserError
from flare_clef.images import image_from_array, read_image
from flare_clef.organs import ORGANS
from flare_clef.view import read_pair, terminal_text, view
from flare_clef.writing import write_labels


def pair(folder: Path) -> tuple[Path, Path]:
    scan = write_scan(folder / "scan.nii.gz")
    labels = np.zeros(body_hu().shape, np.uint8)
    labels[5:9, 15:25, 10:20] = 1
    write_labels(labels, read_image(scan), folder / "labels.nii.gz")
    return scan, folder / "labels.nii.gz"


def test_terminal_has_two_pixels_a_character():
    rgb = np.zeros((4, 2, 3), np.uint8)
    rgb[0], rgb[1], rgb[2], rgb[3] = (10, 0, 0), (20, 0, 0), (30, 0, 0), (40, 0, 0)
    text = terminal_text(rgb, 2)
    assert text.count("▀") == 4 and len(text.splitlines()) == 2
    red = [int(n) for n in re.findall(r"\[38;2;(\d+);", text)]
    under = [int(n) for n in re.findall(r"\[48;2;(\d+);", text)]
    assert (red, under) == ([10, 10, 30, 30], [20, 20, 40, 40])


def test_slices_count_from_the_feet_whatever_the_storage():
    hu, labels = body_hu(), np.zeros(body_hu().shape, np.uint8)
    labels[3, 10:20, 10:20] = 1
    upright = view(image_from_array(hu, (1.5, 1.5, 3)), labels, "axial", None)
    turned = image_from_array(
        hu[::-1], (1.5, 1.5, 3), (0, 0, 0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, -1.0)
    )
    found = view(turned, labels[::-1], "axial", None)
    assert (upright.slice, found.slice, found.slices) == (3, 3, 20)
    assert np.array_equal(upright.panel.rgb, found.panel.rgb)


def test_labels_outside_the_body_are_shown_beside_it():
    hu, labels = np.full((6, 40, 100), -1000, np.int16), np.zeros((6, 40, 100), np.uint8)
    hu[:, 10:30, 50:90] = 40
    labels[2:4, 15:25, 5:15] = 1
    image = image_from_array(hu, (1.0, 1.0, 1.0))
    for plane in ("axial", "coronal"):
        rgb = view(image, labels, plane, None).panel.rgb.astype(int)
        coloured = np.ptp(rgb, axis=2) > 60
        grey = (np.ptp(rgb, axis=2) < 5) & (rgb[..., 0] > 100)
        # 10 columns of label, 35 of air, 40 of body: 85 on 600 pixels.
        assert np.ptp(np.flatnonzero(coloured.any(axis=0))) == pytest.approx(10 / 85 * 600, abs=12)
        assert np.ptp(np.flatnonzero(grey.any(axis=0))) == pytest.approx(40 / 85 * 600, abs=12)


def test_a_scan_of_few_voxels_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch):
    """A voxel as large as the panel: a blur over 461 x 461 pixels would take most of a minute."""
    plain, kernels = torch.nn.functional.avg_pool2d, []

    def pooled(values, kernel, *arguments, **options):
        kernels.append(kernel)
        return plain(values, kernel, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "avg_pool2d", pooled)
    image = image_from_array(np.full((1, 1, 1), 40, np.int16), (1.0, 1.0, 1.0))
    view(image, np.ones((1, 1, 1), np.uint8), "axial", None)
    assert kernels == [(461, 1), (1, 461)]


def test_mistakes(tmp_path: Path):
    scan, labels = pair(tmp_path)
    image, found = read_pair(scan, labels)
    with pytest.raises(UserError, match="--slice 20: the scan has axial slices 0 to 19"):
        view(image, found, "axial", 20)
    with pytest.raises(UserError, match="--plane oblique: unknown"):
        view(image, found, "oblique", None)
    with pytest.raises(UserError, match="outside 0 to 13"):
        read_pair(scan, scan)
    whole = tmp_path / "float.nii.gz"
    sitk.WriteImage(sitk.Cast(sitk.ReadImage(str(labels)), sitk.sitkFloat32), str(whole))
    assert np.array_equal(read_pair(scan, whole)[1], found)
    image_of = sitk.ReadImage(str(labels))
    image_of.SetSpacing((1.5, 1.5, 2.0))
    sitk.WriteImage(image_of, str(whole))
    with pytest.raises(UserError, match="labels of another scan"):
        read_pair(scan, whole)
    other = write_scan(tmp_path / "other.nii.gz", body_hu((10, 40, 44)))
    with pytest.raises(UserError, match="labels of another scan"):
        read_pair(other, labels)
    moved = write_scan(tmp_path / "moved.nii.gz", origin=(0.0, 0.0, 0.0))
    with pytest.raises(UserError, match="voxels lie up to 101 mm from"):
        read_pair(moved, labels)


def test_command(tmp_path: Path):
    pytest.importorskip("PIL", reason="Pillow is not installed (extra: report)")
    from PIL import Image

    scan, labels = map(str, pair(tmp_path))
    picture = tmp_path / "new" / "slice.png"
    done = CliRunner().invoke(app, ["view", scan, labels, "-o", str(picture), "--slice", "6"])
    assert done.exit_code == 0 and "axial slice 6 of 0 to 19" in done.output
    assert Image.open(picture).size == (600, 460)
    shown = CliRunner().invoke(app, ["view", scan, labels, "--plane", "coronal"], color=True)
    assert "▀" in shown.output and ORGANS[0].title in shown.output
    assert "coronal slice" in shown.output and "R is on the left" in shown.output

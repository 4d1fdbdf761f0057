"""Pictures of cases: what lies below the labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from flare_clef.evaluation import score_pair
from flare_clef.evaluation_inputs import Pair
from flare_clef.evaluation_plots import draw_case

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: measure)")

SHAPE = (12, 12, 12)


def write(path: Path, array: np.ndarray, direction=(1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), x_mm=0.0):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((2.0, 2.0, 2.0))
    image.SetDirection(direction)
    image.SetOrigin((x_mm, 0.0, 0.0))
    sitk.WriteImage(image, str(path))
    return path


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:8, 4:8, 4:8] = 1
    return Pair(
        "a",
        write(tmp_path / "reference.nii.gz", labels),
        write(tmp_path / "prediction.nii.gz", np.roll(labels, 1, axis=2)),
    )


def test_a_scan_that_does_not_fit_is_left_out(pair: Pair, tmp_path: Path):
    scores, _ = score_pair(pair, ["liver"])
    hu = np.random.default_rng(0).integers(-160, 240, SHAPE).astype(np.int16)

    def drawn(scan: Path | None) -> tuple[str, bytes]:
        picture = tmp_path / "picture.png"
        misfit = draw_case(pair, scores, picture, scan)
        return misfit, picture.read_bytes()

    said, plain = drawn(None)
    assert said == ""
    said, whole = drawn(write(tmp_path / "fits.nii.gz", hu))
    assert said == "" and whole != plain
    # Half a voxel at most: a header rounded in another way is no other scan.
    assert drawn(write(tmp_path / "near.nii.gz", hu, x_mm=0.9)) == ("", whole)
    turned = (0.0, 1.0, 0, 1.0, 0.0, 0, 0, 0, 1.0)
    for scan, words in (
        (write(tmp_path / "turned.nii.gz", hu, turned), "voxels lie up to 31.1 mm from those of"),
        (write(tmp_path / "moved.nii.gz", hu, x_mm=3.0), "its voxels lie up to 3 mm from"),
        (write(tmp_path / "cut.nii.gz", hu[1:]), "its shape is not that of"),
    ):
        said, picture = drawn(scan)
        assert said.startswith(str(scan)) and words in said
        assert picture == plain

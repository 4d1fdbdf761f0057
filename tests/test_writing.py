from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import body_hu

from flare_clef import writing
from flare_clef.errors import UserError
from flare_clef.images import image_from_array
from flare_clef.writing import write_labels


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

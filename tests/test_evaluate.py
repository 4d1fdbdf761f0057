"""``flare-clef evaluate`` as a command: what it checks first, what is there when it ends early."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from typer.testing import CliRunner

from flare_clef.cli import app
from flare_clef.commands import evaluate as command
from flare_clef.errors import UserError


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    labels = np.zeros((6, 10, 12), np.uint8)
    labels[2:4, 3:7, 3:9] = 1
    for name in ("predictions", "references", "others"):
        (tmp_path / name).mkdir()
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(tmp_path / name / "case.nii.gz"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(*arguments: str):
    return CliRunner().invoke(app, ["evaluate", "predictions", "references", *arguments])


@pytest.mark.parametrize("option", ["--compare", "--images"])
def test_what_is_not_there_is_told_before_scoring(folders: Path, option: str):
    ran = evaluate(option, "nowhere", "-o", "out")
    assert isinstance(ran.exception, UserError)
    assert "nowhere: no such file or folder" in str(ran.exception)
    assert ran.stdout == "" and not (folders / "out" / "cases.csv").exists()


def test_files_are_written_before_anything_is_printed(
    folders: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: object) -> None:
        raise OSError("stdout is closed")

    monkeypatch.setattr(command, "_print_table", fails)
    assert isinstance(evaluate("-o", "out").exception, OSError)
    assert (folders / "out" / "cases.csv").read_text().count("\n") == 14
    summary = json.loads((folders / "out" / "summary.json").read_text())
    assert summary["organs"]["liver"]["dsc"]["mean"] == 1 and "comparison" not in summary


def test_the_summary_holds_the_comparison(folders: Path):
    sitk.WriteImage(sitk.Image(3, 3, 3, sitk.sitkUInt8), "others/case.nii.gz")
    assert evaluate("-o", "out", "--compare", "others").exit_code == 1  # counted as 0, named
    summary = json.loads((folders / "out" / "summary.json").read_text())
    assert summary["comparison"]["liver"]["dsc"]["difference"] == 1

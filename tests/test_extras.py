"""Outputs beside the labels, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import body_hu, write_scan
from typer.testing import CliRunner

from flare_clef.cli import app


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    write_scan(tmp_path / "in" / "a_0000.nii.gz")
    write_scan(tmp_path / "in" / "b.mha", body_hu(seed=1))
    return tmp_path / "in"


def predict(scans: Path, out: Path, weights: Path, *options: str):
    arguments = ["predict", scans, out, "--weights", weights, "--precision", "fp32", *options]
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_measurements_of_a_batch(scans: Path, tmp_path: Path, tiny_weights: Path):
    done = predict(scans, tmp_path / "out", tiny_weights, "--measurements", "--json")
    rows = {r["case"]: r for r in map(json.loads, done.stdout.splitlines()) if isinstance(r, dict)}
    written = json.loads((tmp_path / "out" / "measurements.json").read_text())
    assert [case["case"] for case in written["cases"]] == ["a", "b"]
    for case in written["cases"]:
        assert len(case["organs"]) == 13
        assert {o["organ"]: o["volume_ml"] for o in case["organs"]} == rows[case["case"]][
            "volume_ml"
        ]
        assert all(0.5 <= o["confidence"] <= 1 for o in case["organs"] if o["volume_ml"] > 1)
    assert any("adults" in w for w in rows["a"]["warnings"])


def test_skipped_cases_keep_their_measurements(scans: Path, tmp_path: Path, tiny_weights: Path):
    out = tmp_path / "out"
    predict(scans, out, tiny_weights, "--measurements")
    before = json.loads((out / "measurements.json").read_text())["cases"]
    (out / "b.mha").unlink()
    predict(scans, out, tiny_weights, "--measurements", "--skip-existing")
    assert json.loads((out / "measurements.json").read_text())["cases"] == before

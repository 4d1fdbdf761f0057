"""Phantoms as training data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flare_clef.training import synthetic
from flare_clef.training.cases import find_cases


def test_fewer_phantoms_than_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``data.phantoms`` made smaller in the same RUN: the others are no cases any more."""

    def phantom(options):  # type: ignore[no-untyped-def]
        hu = np.full((4, 5, 6), options.seed, np.int16)
        return SimpleNamespace(
            hu=hu, labels=(hu > 0).astype(np.uint8), spacing_mm=(2.0, 2.0, 4.0), origin_mm=(0, 0, 0)
        )

    monkeypatch.setattr(synthetic, "make_phantom", phantom)
    made: list[str] = []
    synthetic.make_phantoms(tmp_path, 3, made.append)
    assert len(find_cases(tmp_path)) == 3
    synthetic.make_phantoms(tmp_path, 2, made.append)
    assert [case.name for case in find_cases(tmp_path)] == ["phantom_001", "phantom_002"]
    synthetic.make_phantoms(tmp_path, 3, made.append)
    assert len(find_cases(tmp_path)) == 3
    assert made == ["phantom_001", "phantom_002", "phantom_003", "phantom_003"]

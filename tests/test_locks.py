"""One holder at a time, until it lets go."""

from __future__ import annotations

from pathlib import Path

import pytest

from flare_clef import locks


def test_one_at_a_time(tmp_path: Path):
    pytest.importorskip("fcntl", reason="this system has no such locks")
    path = tmp_path / "lock"
    with path.open("a") as first, path.open("a") as second:
        assert locks.take_lock(first.fileno(), wait=False)
        assert not locks.take_lock(second.fileno(), wait=False)
        first.close()
        assert locks.take_lock(second.fileno(), wait=True)


def test_without_locks_all_go_on(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    with (tmp_path / "lock").open("a") as first, (tmp_path / "lock").open("a") as second:
        assert locks.take_lock(first.fileno(), wait=False)
        assert locks.take_lock(second.fileno(), wait=False)

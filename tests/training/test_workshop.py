"""The pool of processes that lays atlases over cases."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flare_clef.errors import UserError
from flare_clef.training.workshop import Workshop

_HOLDER = """
import sys, time
from pathlib import Path
from flare_clef.training.workshop import Workshop
if __name__ == "__main__":
    shop = Workshop(Path(sys.argv[1]), workers=1)
    shop.maps({"none": Path(sys.argv[1]) / "none.nii.gz"})
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_worker_that_is_killed_is_one_line(tmp_path: Path) -> None:
    with Workshop(tmp_path, workers=1) as shop:
        _, failed = shop.maps({"none": tmp_path / "none.nii.gz"})
        assert failed.keys() == {"none"}
        # Not Python's own helper, which may come later where numbers of processes began anew.
        children = psutil.Process().children()
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        max(workers, key=psutil.Process.create_time).kill()
        time.sleep(0.5)
        with pytest.raises(UserError, match="ended from outside, .* fewer --workers"):
            shop.maps({"none": tmp_path / "none.nii.gz"})


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "holder.py"
    script.write_text(_HOLDER)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert workers
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive

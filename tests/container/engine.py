"""The Docker engine of the environment, as tests call it.

``DOCKER`` names the client; without it there is no engine to test with. ``DOCKER_HOST``,
``BASE_IMAGE``, ``BUILD_IMAGE`` and ``ENGINE_NETWORK`` are for engines without a registry or a
bridge network, and may be absent.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMAGE = "clef:latest"
DOCKER = os.environ.get("DOCKER", "")


def docker(
    *arguments: object, timeout_s: float = 300, stdin: bytes | None = None
) -> subprocess.CompletedProcess[str]:
    """``docker ARGUMENTS``; its streams as text."""
    done = subprocess.run(
        [DOCKER, *map(str, arguments)], input=stdin, capture_output=True, timeout=timeout_s
    )
    out, err = (stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def ask(*arguments: object) -> str:
    """What a docker command prints; it must succeed."""
    done = docker(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """``docker run`` without a network. ``arguments`` begin with docker's own options."""
    return docker("run", "--rm", "--network", "none", *arguments, **options)  # type: ignore[arg-type]


def build(revision: str, tag: str = IMAGE, *settings: str) -> None:
    """Builds ``tag`` from the checkout, with further build arguments; says what failed."""
    given = [f"--build-arg={setting}" for setting in settings]
    given += [f"--build-arg={name}" for name in ("BASE_IMAGE", "BUILD_IMAGE") if name in os.environ]
    if "ENGINE_NETWORK" in os.environ:
        given += ["--network", os.environ["ENGINE_NETWORK"]]
    done = docker(
        "build", *given, "--build-arg", f"REVISION={revision}", "-t", tag, ROOT, timeout_s=1800
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

"""What the benchmarks share: a command's wall time and peak memory, and a scan of any length."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from flare_clef import preparation
from flare_clef.images import IDENTITY, Image


@dataclass(frozen=True)
class Cost:
    """What a command took."""

    seconds: float
    peak_mib: float
    """Largest resident set of the command's own process."""
    log: str
    code: int


def run(command: Sequence[str]) -> Cost:
    """Runs ``command`` to its end and measures it, from before it starts."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    log = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return Cost(time.perf_counter() - began, usage.ru_maxrss / 1024, log, child.returncode)


def predict(scan: Path, labels: Path, *options: str) -> Cost:
    """``flare-clef predict`` as a process of its own, with this Python."""
    return run([sys.executable, "-m", "flare_clef", "predict", str(scan), str(labels), *options])


def scan_of(slices: int, path: Path, template: Path | None = None) -> Path:
    """A scan of 512 x 512 x ``slices`` written to ``path``.

    ``template``: a real scan, whose slices are repeated to and fro; else a made-up body.
    """
    if template is not None:
        image = sitk.ReadImage(str(template))
        array = sitk.GetArrayFromImage(image)
        there_and_back = np.concatenate([np.arange(len(array)), np.arange(len(array))[::-1]])
        array = array[np.resize(there_and_back, slices)]
        spacing = image.GetSpacing()
    else:
        y, x = np.mgrid[-1:1:512j, -1:1:512j]
        body = (x / 0.85) ** 2 + (y / 0.6) ** 2
        noise = np.random.default_rng(0).normal(0, 20, (16, 512, 512))
        plane = np.where(body < 0.7, 60, np.where(body < 1, -100, -1000))
        array = (plane + noise).astype(np.int16)[np.arange(slices) % 16]
        spacing = (0.8, 0.8, 1.5)
    out = sitk.GetImageFromArray(array)
    out.SetSpacing(spacing)
    sitk.WriteImage(out, str(path), True, 1)
    return path


def in_canonical_axes(scan: Image, labels: np.ndarray) -> tuple[Image, np.ndarray]:
    """``scan`` and its ``labels`` stored so that their axes are the canonical (z, y, x)."""
    axes, flips = preparation.canonical_axes(scan.direction)
    z_mm, y_mm, x_mm = preparation.canonical_voxel_mm(scan.spacing_mm, axes)
    turned = replace(
        scan,
        array=preparation.canonical_view(scan.array, axes, flips),
        spacing_mm=(x_mm, y_mm, z_mm),
        direction=IDENTITY,
        nifti_header=None,
    )
    return turned, preparation.canonical_view(labels, axes, flips)

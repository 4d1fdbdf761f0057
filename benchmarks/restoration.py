"""Restoration pruned against the plain way (13 interpolated maps, threshold, arg max).

    python benchmarks/restoration.py [--scan SCAN]

The logits are those of the shipped weights for SCAN (default: random smooth ones), and both
ways must give the same labels.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from flare_clef.images import IDENTITY, read_image
from flare_clef.inference import FoldedNetwork
from flare_clef.limits import keep_memory, usable_cores
from flare_clef.preparation import Placement, place, prepare
from flare_clef.restoration import restore
from flare_clef.stray_parts import drop_stray_parts
from flare_clef.weights import load_weights


def plain(logits: Tensor, placement: Placement) -> np.ndarray:
    """What section 2.3 says, one slice of the scan's body box at a time in z."""
    maps = functional.interpolate(
        logits[None].float(), size=placement.box_shape, mode="trilinear", align_corners=False
    )[0]
    best, channel = maps.max(dim=0)
    found = torch.where(best >= 0, channel + 1, 0).to(torch.uint8)
    labels = np.zeros(placement.shape, np.uint8)
    box = tuple(slice(*bounds) for bounds in placement.box)
    placement.canonical_view(labels)[box] = found.numpy()
    return labels


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scan", type=Path)
    scan = parser.parse_args().scan
    keep_memory()
    torch.set_num_threads(usable_cores())
    if scan is None:
        shape = (160, 512, 512)
        box = ((0, 160), (60, 452), (20, 492))
        placement = place(shape, IDENTITY, box)
        coarse = torch.randn(1, 13, 12, 12, 12, generator=torch.Generator().manual_seed(0)) - 1.5
        logits = functional.interpolate(coarse, size=placement.grid, mode="trilinear")[0]
    else:
        image = read_image(scan)
        prepared = prepare(image.array, image.direction, spacing_mm=image.spacing_mm)
        assert prepared is not None, "no body in this scan"
        volume, placement = prepared
        logits = FoldedNetwork(load_weights().network(), torch.device("cpu"), "fp32")(volume)
    before = peak_mib()
    began = time.perf_counter()
    ours = restore(logits, placement)
    pruned, ours_mib = time.perf_counter() - began, peak_mib() - before
    before = peak_mib()
    began = time.perf_counter()
    theirs = plain(logits, placement)
    whole, plain_mib = time.perf_counter() - began, peak_mib() - before
    began = time.perf_counter()
    restore(logits, placement, winners=drop_stray_parts(logits))
    without_strays = time.perf_counter() - began
    differ = int((ours != theirs).sum())
    print(f"scan {placement.shape}, box {placement.box_shape} (z, y, x)")
    print(f"plain   {whole:6.2f} s, {plain_mib:6.0f} MiB more")
    print(f"pruned  {pruned:6.2f} s, {ours_mib:6.0f} MiB more: {pruned / whole:.2f} x the time")
    print(f"pruned, stray parts dropped first {without_strays:6.2f} s")
    print(f"{differ} of {ours.size} voxels differ (rounding of ties)")


if __name__ == "__main__":
    main()

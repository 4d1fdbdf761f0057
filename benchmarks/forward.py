"""The forward pass against a plain torch form of the same weights, in one run.

    python benchmarks/forward.py [--grid 192]

Plain: fp32, contiguous, norms live, upsample, concatenate, convolve. Ours: folded, slabs, in
fp32, bf16 (unless emulated) and 8 bits. The share of the matrix-multiplication rate counts the
operations really done.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from flare_clef.inference import FoldedNetwork
from flare_clef.integer_convolution import highest_activation
from flare_clef.limits import keep_memory, usable_cores
from flare_clef.network import SegmentationNetwork
from flare_clef.precision import PRECISIONS, bf16_is_emulated
from flare_clef.quantised import QuantisedNetwork, calibration_from_norms
from flare_clef.weights import load_weights


def plain_forward(network: SegmentationNetwork, x: Tensor) -> Tensor:
    """What a textbook U-Net does with these weights."""
    skips = []
    for level, stack in enumerate(network.backbone.encoder):
        if level:
            x = functional.max_pool3d(x, 2)
        for block in stack:
            x = functional.relu(block.norm(block.conv(x)))
        skips.append(x)
    skips.pop()
    for level in reversed(range(len(network.backbone.decoder))):
        x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        x = torch.cat([skips.pop(), x], dim=1)
        for block in network.backbone.decoder[level]:
            x = functional.relu(block.norm(block.conv(x)))
    return network.head(x)


def operations(network: SegmentationNetwork, grid: int) -> float:
    """Multiplications and additions of the folded form (halos not counted)."""
    total = 0.0
    widths = network.architecture.widths
    for level, stack in enumerate(network.backbone.encoder):
        voxels = (grid / 2**level) ** 3
        total += sum(2 * block.conv.weight.numel() * voxels for block in stack)
    for level, stack in enumerate(network.backbone.decoder):
        voxels = (grid / 2**level) ** 3
        total += 2 * voxels * widths[level] * (27 * widths[level] + 8 * widths[level + 1])
        total += sum(2 * block.conv.weight.numel() * voxels for block in stack[1:])
    return total


def best_of(action: Callable[[], object], runs: int = 3) -> float:
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times)


def matmul_rate(dtype: torch.dtype) -> float:
    a = torch.zeros(2048, 2048, dtype=dtype)
    return 2 * 2048**3 / best_of(lambda: a @ a, 5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--grid", type=int, default=192)
    grid = parser.parse_args().grid
    keep_memory()
    torch.set_num_threads(usable_cores())
    network = load_weights().network()
    volume = torch.rand(grid, grid, grid) * 2 - 1
    print(f"{usable_cores()} cores, {grid}^3, {operations(network, grid) / 1e12:.2f} TFLOP")
    actions: dict[str, Callable[[], object]] = {
        "plain torch.nn, fp32": lambda: plain_forward(network, volume[None, None])
    }
    for name in ("fp32", "bf16"):
        if name == "bf16" and bf16_is_emulated():
            print("folded, slabs, bf16: left out, emulated here, it would take hours")
            continue
        folded = FoldedNetwork(network, torch.device("cpu"), name)
        actions[f"folded, slabs, {name}"] = lambda folded=folded: folded(volume)
    highest = highest_activation()
    if highest is not None:
        quantised = QuantisedNetwork(network, calibration_from_norms(network), highest)
        actions["8 bits, slabs, int8"] = lambda: quantised(volume)
    # They take turns, so that a machine busy with something else slows all of them.
    best = dict.fromkeys(actions, float("inf"))
    rates = {"fp32": 0.0, "bf16": 0.0}
    with torch.inference_mode():
        for _ in range(3):
            for name, action in actions.items():
                best[name] = min(best[name], best_of(action, 1))
                kind = name[-4:]
                if kind in rates:
                    rates[kind] = max(rates[kind], matmul_rate(PRECISIONS[kind]))
    plain = best["plain torch.nn, fp32"]
    for name, seconds in best.items():
        rate = operations(network, grid) / seconds
        line = f"{name:<22}{seconds:6.2f} s  {seconds / plain:.2f} x plain"
        if name[-4:] in rates:
            line += f", {rate / 1e9:.0f} GFLOP/s, "
            line += f"{rate / rates[name[-4:]]:.0%} of the matrix-multiplication rate"
        print(line)


if __name__ == "__main__":
    main()

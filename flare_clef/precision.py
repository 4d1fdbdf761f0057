"""Where the network runs and in which number format: measured, never guessed.

Two machines with the same ``avx512_bf16`` flag differ by a factor of three in what bf16 is
worth, so ``auto`` times both formats for a fraction of a second and takes the faster.
"""

from __future__ import annotations

import time

import torch
from torch.nn import functional

from flare_clef.errors import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """The device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, and why. Raises UserError."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0), f"GPU found: {torch.cuda.get_device_name(0)}"
        return torch.device("cpu"), "no GPU found"
    if wanted == "cpu":
        return torch.device("cpu"), "asked for"
    kind, _, number = wanted.partition(":")
    if kind != "cuda" or (number and not number.isdigit()):
        raise UserError(f"--device {wanted}: expected auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        reason = "this torch has no CUDA" if torch.version.cuda is None else "no GPU is visible"
        raise UserError(f"--device {wanted}: {reason}; use --device cpu or auto")
    index = int(number or 0)
    if index >= torch.cuda.device_count():
        raise UserError(
            f"--device {wanted}: only {torch.cuda.device_count()} GPU(s) here, numbered from 0"
        )
    return torch.device("cuda", index), f"asked for: {torch.cuda.get_device_name(index)}"


def choose_precision(wanted: str, device: torch.device, threads: int) -> tuple[str, str]:
    """``fp32``, ``bf16`` or ``fp16``, and why. ``auto`` on a CPU times fp32 and bf16.

    Raises UserError for an unknown name and for fp16 on a CPU.
    """
    if wanted != "auto":
        if wanted not in PRECISIONS:
            raise UserError(f"--precision {wanted}: expected auto, fp32, bf16 or fp16")
        if wanted == "fp16" and device.type == "cpu":
            raise UserError("--precision fp16: for GPUs only; use bf16, fp32 or auto on a CPU")
        return wanted, "asked for"
    if device.type == "cuda":
        return "fp16", "the GPU's fast format"
    seconds = {name: _convolution_seconds(PRECISIONS[name]) for name in ("fp32", "bf16")}
    chosen = min(seconds, key=seconds.__getitem__)
    times = ", ".join(f"{name} {value * 1e3:.0f} ms" for name, value in seconds.items())
    return chosen, f"faster here: {times} for a trial with {threads} thread(s)"


def _convolution_seconds(dtype: torch.dtype) -> float:
    """Best of three of what the network mostly does, in small."""
    x = torch.zeros(1, 32, 32, 32, 32, dtype=dtype).to(memory_format=torch.channels_last_3d)
    weight = torch.zeros(32, 32, 3, 3, 3, dtype=dtype).to(memory_format=torch.channels_last_3d)
    best = float("inf")
    with torch.inference_mode():
        functional.conv3d(x, weight, padding=1)
        for _ in range(3):
            began = time.perf_counter()
            functional.relu_(functional.conv3d(x, weight, padding=1))
            best = min(best, time.perf_counter() - began)
    return best

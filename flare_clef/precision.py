"""Where the network runs and in which number format: measured, never guessed.

Two machines with the same ``avx512_bf16`` flag differ by a factor of three in what bf16 is
worth, so ``auto`` times the formats for a fraction of a second and takes the fastest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from flare_clef.errors import UsageError, UserError, one_line
from flare_clef.integer_convolution import FULL, IntegerConvolution, highest_activation

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INT8 = "int8"

_HOPELESS = 3.0
"""So many times slower on a small trial, bf16 cannot win on a large one."""

_LEAST_GPU_BYTES = 512 * 2**20
"""Weights and the thinnest slabs in fp16, about."""


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """The device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, and why. Raises UserError."""
    if wanted == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu"), "no GPU found"
        device, name = torch.device("cuda", 0), torch.cuda.get_device_name(0)
        trouble = gpu_trouble(device)
        if trouble:
            return torch.device("cpu"), f"GPU found, {name}, but of no use: {trouble}"
        return device, f"GPU found: {name}"
    wanted = str(wanted)
    if wanted == "cpu":
        return torch.device("cpu"), "asked for"
    kind, _, number = wanted.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise UsageError(f"--device {wanted}: expected auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        reason = "this torch has no CUDA" if torch.version.cuda is None else "no GPU is visible"
        raise UserError(f"--device {wanted}: {reason}; use --device cpu or auto")
    index = int(number or 0)
    if index >= torch.cuda.device_count():
        raise UserError(
            f"--device {wanted}: only {torch.cuda.device_count()} GPU(s) here, numbered from 0"
        )
    device = torch.device("cuda", index)
    trouble = gpu_trouble(device)
    if trouble:
        raise UserError(f"--device {wanted}: {trouble}; use --device cpu")
    return device, f"asked for: {torch.cuda.get_device_name(index)}"


def gpu_trouble(device: torch.device) -> str:
    """Why ``device`` cannot be used, in one line; empty where a small convolution works.

    A card may be there and full, taken by someone else alone, or too old or new for this torch.
    """
    try:
        room = torch.empty(_LEAST_GPU_BYTES, dtype=torch.uint8, device=device)
        x = torch.ones(1, 16, 8, 8, 8, dtype=torch.float16, device=device)
        weight = torch.ones(16, 16, 3, 3, 3, dtype=torch.float16, device=device)
        right = bool((functional.conv3d(x, weight) == 16 * 27).all())
        del room
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return one_line(error)
    return "" if right else "it miscalculates a small convolution"


def choose_precision(
    wanted: str, device: torch.device, threads: int, *, calibrated: bool = False
) -> tuple[str, str]:
    """``fp32``, ``bf16``, ``fp16`` or ``int8``, and why. ``auto`` on a CPU times them.

    ``calibrated``: the weights hold the ranges of activations that ``int8`` is best with;
    ``auto`` leaves it out without them, and where the processor only adds up 7-bit numbers.
    Raises UserError for an unknown name and for a format that the device doesn't have.
    """
    if wanted != "auto":
        if wanted not in (*PRECISIONS, INT8):
            raise UsageError(f"--precision {wanted}: expected auto, fp32, bf16, fp16 or int8")
        if wanted == "fp16" and device.type == "cpu":
            raise UserError("--precision fp16: for GPUs only; use bf16, fp32 or auto on a CPU")
        if wanted == INT8:
            return wanted, _why_int8(device, calibrated=calibrated)
        if wanted == "bf16" and device.type == "cpu" and bf16_is_emulated():
            return wanted, "asked for; this processor emulates it: expect hours, take fp32 or auto"
        return wanted, "asked for"
    if device.type == "cuda":
        return "fp16", "the GPU's fast format"
    bits = highest_activation() if calibrated else None
    # Without the instructions bf16 is emulated, hundreds of times slower the larger the cube:
    # small ones tell before a large one takes longer than the whole scan.
    for side in (8, 16, 32):
        seconds = _trial_seconds(side, int8=bits == FULL)
        if seconds["bf16"] > _HOPELESS * seconds["fp32"]:
            if bits == FULL and side < 32:
                seconds.update(_trial_seconds(32, int8=True, bf16=False))
            break
    chosen = min(seconds, key=seconds.__getitem__)
    times = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in seconds.items())
    return chosen, f"faster here: {times} for a trial with {threads} thread(s)"


def _why_int8(device: torch.device, *, calibrated: bool) -> str:
    if device.type != "cpu":
        raise UserError("--precision int8: for CPUs only; use fp16, bf16 or fp32 on a GPU")
    highest = highest_activation()
    if highest is None:
        raise UserError("--precision int8: this torch has no 8-bit convolutions; use auto")
    bits = "" if highest == FULL else "; 7-bit activations, as this processor lacks VNNI"
    return "asked for" + bits + ("" if calibrated else "; ranges by the norms, not calibrated")


def bf16_is_emulated() -> bool:
    """Whether this CPU lacks the instructions, so that bf16 is many times slower than fp32."""
    seconds = _trial_seconds(16)
    return seconds["bf16"] > _HOPELESS * seconds["fp32"]


def _trial_seconds(side: int, *, int8: bool = False, bf16: bool = True) -> dict[str, float]:
    """Best time of each format for what the network mostly does, on a cube of ``side``.

    The formats take turns, so that a machine busy with something else slows all alike.
    """
    actions: dict[str, Callable[[], object]] = {}
    for name in ("fp32", "bf16") if bf16 else ("fp32",):
        x = torch.zeros(1, 32, side, side, side, dtype=PRECISIONS[name])
        weight = torch.zeros(32, 32, 3, 3, 3, dtype=PRECISIONS[name])
        x, weight = (t.to(memory_format=torch.channels_last_3d) for t in (x, weight))
        actions[name] = partial(_convolved, x, weight)
    if int8:
        bytes_ = torch.zeros(1, 32, side, side, side, dtype=torch.uint8)
        convolution = IntegerConvolution.of(
            torch.ones(32, 32, 3, 3, 3), torch.zeros(32), torch.ones(32), torch.ones(32), FULL
        )
        actions[INT8] = partial(
            convolution, bytes_.contiguous(memory_format=torch.channels_last_3d)
        )
    best = dict.fromkeys(actions, float("inf"))
    with torch.inference_mode():
        # The first round is for the engine to choose its kernels; it doesn't count.
        for turn in range(4):
            for name, action in actions.items():
                began = time.perf_counter()
                action()
                if turn:
                    best[name] = min(best[name], time.perf_counter() - began)
    return best


def _convolved(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.relu_(functional.conv3d(x, weight, padding=1))

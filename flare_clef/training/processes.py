"""Several processes that train one network: who am I, and what all agree on.

Started by ``torchrun``, which sets RANK, WORLD_SIZE and LOCAL_RANK; without it there is one
process, and nothing here communicates.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_LONGEST_WAIT = timedelta(days=2)
"""The first process prepares and judges while the others wait; torch gives up after minutes."""


def join_processes(device: torch.device) -> torch.device:
    """Joins the group that ``torchrun`` started; returns this process's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_LONGEST_WAIT)
    return device


def leave_processes() -> None:
    """Leaves the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0; the first one writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(values: Tensor) -> Tensor:
    """``values`` added over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def from_first(value: Any) -> Any:
    """What the first process holds, on all."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """What each process holds, by rank, on all."""
    if not dist.is_initialized():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def wait() -> None:
    """Until all are here."""
    if dist.is_initialized():
        dist.barrier()

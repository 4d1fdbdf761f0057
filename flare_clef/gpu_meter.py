"""Memory in use and utilisation of one NVIDIA card, through NVML (``pynvml``).

Whatever is missing or fails, the readings are ``None`` and ``notes`` says why: a profile without
a GPU is a profile all the same.
"""

from __future__ import annotations

import os
from typing import Any

_BYTES_PER_MB = 1024**2


class GpuMeter:
    """One card, found when this object is made (NVML takes up to a second to start).

    ``gpu_index`` counts among the cards that ``CUDA_VISIBLE_DEVICES`` leaves visible, as CUDA
    does; on a machine with unlike cards set ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` so that CUDA and
    NVML number them alike.
    """

    def __init__(self, gpu_index: int = 0) -> None:
        self.name: str | None = None
        self.notes: list[str] = []
        self._nvml: Any = None
        self._handle: Any = None
        self._has_utilisation = True
        try:
            import pynvml
        except ImportError:
            self.notes.append(
                "pynvml is missing: no GPU figures; on a machine with an NVIDIA GPU "
                'pip install "flare-clef[measure]"'
            )
            return
        try:
            pynvml.nvmlInit()
        except Exception as error:
            # No base class covers all: NVMLError, a driver library that cannot be loaded.
            self.notes.append(f"no NVIDIA GPU or driver ({error}): no GPU figures")
            return
        self._nvml = pynvml
        try:
            card = _visible_card(gpu_index, pynvml.nvmlDeviceGetCount())
            if card is None:
                self.notes.append(f"GPU {gpu_index} is not visible to CUDA: no GPU figures")
                return
            if isinstance(card, int):
                self._handle = pynvml.nvmlDeviceGetHandleByIndex(card)
            else:
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(card)
            name = pynvml.nvmlDeviceGetName(self._handle)
            self.name = name.decode() if isinstance(name, bytes) else name
        except Exception as error:
            self._handle = None
            self.notes.append(f"NVML cannot open GPU {gpu_index} ({error}): no GPU figures")

    def read(self, time_s: float) -> tuple[float | None, float | None]:
        """Memory in use on the whole card (total - free) in MB, and utilisation in percent.

        ``time_s`` is the moment that a note mentions when NVML fails.
        """
        if self._handle is None:
            return None, None
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
            memory_mb = (memory.total - memory.free) / _BYTES_PER_MB
        except Exception as error:
            self._handle = None
            self.notes.append(f"NVML failed at {time_s:.1f} s ({error}): no GPU figures after that")
            return None, None
        percent = None
        if self._has_utilisation:
            try:
                percent = float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)
            except Exception as error:
                self._has_utilisation = False  # a slice of a card (MIG) has none
                self.notes.append(
                    f"NVML gave no GPU utilisation at {time_s:.1f} s ({error}): none after that"
                )
        return memory_mb, percent

    def close(self) -> None:
        if self._nvml is not None:
            self._handle = None
            try:
                self._nvml.nvmlShutdown()
            except Exception as error:
                self.notes.append(f"NVML failed while closing ({error})")
            self._nvml = None


def _visible_card(gpu_index: int, count: int) -> int | str | None:
    """NVML's index, or the UUID, of CUDA's device ``gpu_index``; None where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpu_index if gpu_index < count else None
    entries: list[int | str] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdigit() and int(entry) < count:
            entries.append(int(entry))
        elif entry.startswith(("GPU-", "MIG-")):
            entries.append(entry)
        else:
            break  # as CUDA: the first entry that names no card ends the list
    return entries[gpu_index] if gpu_index < len(entries) else None

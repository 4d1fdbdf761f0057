"""An average of weights along a run: judged and exported if the recipe says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """average = d * average + (1 - d) * weights after each step; ``decay`` 0 turns it off.

    Parameters and running statistics alike. Early on d is (1 + n) / (10 + n) if that is less,
    n being the steps done, so that the random weights of the start are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        # Only what is a number of its own: counters of batches stay the network's.
        self._live = (
            {k: v for k, v in module.state_dict().items() if v.is_floating_point()} if decay else {}
        )
        self._average = {name: tensor.clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self._average.items():
            average.lerp_(self._live[name], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the network has the average's weights; changes to its statistics are kept."""
        with torch.no_grad():
            kept = {name: tensor.clone() for name, tensor in self._live.items()}
            for name, tensor in self._live.items():
                tensor.copy_(self._average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._live.items():
                    self._average[name].copy_(tensor)
                    tensor.copy_(kept[name])

    @torch.no_grad()
    def copy_to_network(self) -> None:
        """Gives the network the average's weights for good."""
        for name, average in self._average.items():
            self._live[name].copy_(average)

    def state(self) -> dict[str, Tensor]:
        return self._average

    def restore(self, saved: dict[str, Tensor] | None) -> None:
        """None (a checkpoint of before): begins with the present weights."""
        source = saved or self._live
        for name, average in self._average.items():
            average.copy_(source[name])

"""The mean of several runs' weights, which often serves better than any of them.

Runs from one start lie in one valley of the loss; the mean of their weights, and of a run and its
start, lies deeper in it and bears unlike data better (M. Wortsman et al., Model soups, ICML 2022;
Robust fine-tuning of zero-shot models, CVPR 2022). Inference costs what it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from flare_clef.network import Architecture, SegmentationNetwork
from flare_clef.training.backbone import load_fitting
from flare_clef.training.operating_points import without_points
from flare_clef.weights import Weights


def load_others(paths: Sequence[Path], architecture: Architecture) -> list[Weights]:
    """Weights files that fit ``architecture``; raises UserError, one line, where one doesn't."""
    return [load_fitting(path, architecture, "take it out of export.mean_with") for path in paths]


@torch.no_grad()
def take_mean(network: SegmentationNetwork, others: Sequence[Weights]) -> None:
    """Makes ``network`` the mean of itself and ``others``, each counting alike; in place.

    Parameters and running statistics. Operating points that a file of ``others`` was exported
    with are taken back first: the mean gets its own.
    """
    own = network.state_dict()
    for count, weights in enumerate(others, start=2):
        for name, tensor in without_points(weights).state_dict().items():
            if tensor.is_floating_point():
                own[name].lerp_(tensor.to(own[name]), 1 / count)

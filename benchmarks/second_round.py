"""Would a second round help: a trained network's probabilities times the propagated ones?

    python benchmarks/second_round.py WEIGHTS CASES PROPAGATED --organ duodenum

CASES is a training set whose labels of the organ are the truth and were never seen by WEIGHTS;
PROPAGATED is what ``flare-clef train propagate`` wrote for the same scans with these labels
taken away (the organ's voxels and its name in cases.json). Prints DSC per case: the propagated
probabilities alone, the network's alone, and their geometric mean, voxels of the other labelled
organs ruled out in all three, each at the threshold that suits it best on that case.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from torch.nn.functional import interpolate

from flare_clef.images import Image, read_image
from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.segmenter import Segmenter
from flare_clef.training.cases import read_labels
from flare_clef.training.datasets import read_dataset
from flare_clef.training.fusion import dsc

THRESHOLDS = [step / 40 for step in range(1, 37)]


def network_probability(segmenter: Segmenter, image: Image, index: int) -> np.ndarray:
    """(z, y, x) float32 sigmoid of one organ on the scan's own grid; 0 outside the body's box."""
    found = segmenter.segment(image, with_logits=True)
    result = np.zeros(image.array.shape, np.float32)
    placement = found.placement
    if found.logits is None or placement is None:
        return result
    on_grid = found.logits[index - 1].float().sigmoid()[None, None]
    box = interpolate(on_grid, placement.box_shape, mode="trilinear", align_corners=False)[0, 0]
    shown = placement.box_in_scan
    # A short scan's box reaches into air beyond its slices.
    cut = tuple(
        slice(first - start, last - start)
        for (first, last), (start, _) in zip(shown, placement.box, strict=True)
    )
    target = placement.canonical_view(result)
    target[tuple(slice(*bounds) for bounds in shown)] = box.numpy()[cut]
    return result


def best(probability: np.ndarray, true: np.ndarray) -> str:
    scores = [dsc(probability >= t, true) for t in THRESHOLDS]
    top = int(np.argmax(scores))
    return f"{scores[top]:.3f} (from {THRESHOLDS[top]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("cases", type=Path)
    parser.add_argument("propagated", type=Path)
    parser.add_argument("--organ", default="duodenum", choices=sorted(ORGAN_BY_NAME))
    options = parser.parse_args()
    index = ORGAN_BY_NAME[options.organ].index
    segmenter = Segmenter(options.weights, precision="fp32", keep_strays=True)
    print("| case | propagated | network | both |")
    print("| --- | --- | --- | --- |")
    for case in read_dataset(options.cases).cases:
        file = options.propagated / "probabilities" / f"{case.name}.nii.gz"
        if options.organ not in case.organs or not file.exists():
            continue
        labels = read_labels(case).array
        free = (labels == 0) | (labels == index)
        propagated = read_image(file).array / 255 * free
        network = network_probability(segmenter, read_image(case.image), index) * free
        both = np.sqrt(propagated * network)
        columns = [best(p, labels == index) for p in (propagated, network, both)]
        print(f"| `{case.name}` | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()

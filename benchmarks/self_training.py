"""Does self-training help? Labels that the network gives to unlabelled scans, trained on again.

    python benchmarks/self_training.py label WEIGHTS FOLDER [FOLDER ...] --output NEW
    flare-clef train finetune RECIPE.toml --output WITHOUT --data LABELLED
    flare-clef train finetune RECIPE.toml --output WITH --data LABELLED --data NEW
    python benchmarks/self_training.py compare WITHOUT WITH
    python benchmarks/self_training.py twice WEIGHTS LABELLED --cases NAME [NAME ...]

``label`` writes a training set (images/, labels/, cases.json) from the scans of the folders,
labelled in part or not at all; labels by hand stay, also where they say that an organ is not.
The network looks twice, at the scan as it is and 8 % smaller, and its logits are averaged. A
voxel is left undecided (255) if organs would win or lose it by a logit of ``MARGIN``; an organ
is named as labelled if ``SURE`` of its voxels are decided; all parts of it but the largest are
undecided (of the aorta none); a scan without any organ labelled is left out. ``compare`` prints
the DSC of two runs' cases kept aside and the paired differences with 95 % intervals (bootstrap
over the cases). ``twice`` prints the DSC of the cases by one look and by the two.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from flare_clef.evaluation_summary import intervals_of_means
from flare_clef.images import Image, read_image
from flare_clef.inference import FoldedNetwork
from flare_clef.largest_part import keep_largest
from flare_clef.metrics import dice_per_organ
from flare_clef.organs import ORGANS
from flare_clef.preparation import prepare
from flare_clef.restoration import restore
from flare_clef.training.case_files import link_volume
from flare_clef.training.cases import Case, read_labels
from flare_clef.training.datasets import read_dataset
from flare_clef.training.doubt import UNDECIDED
from flare_clef.training.resampling import resample
from flare_clef.weights import load_weights
from flare_clef.writing import write_labels

MARGIN = 1.5
SURE = 0.6
SMALLER = 1.08


def look_twice(network: FoldedNetwork, volume: torch.Tensor) -> torch.Tensor:
    """(13, z, y, x) logits, the mean of those of ``volume`` and of a smaller view of it."""
    logits = network(volume).float().clone()
    smaller = torch.eye(3, 4)
    smaller[:, :3] *= SMALLER
    back = torch.eye(3, 4)
    back[:, :3] /= SMALLER
    second = network(resample(volume, smaller)[0])
    for own, other in zip(logits, second, strict=True):
        own.add_(resample(other.float(), back)[0]).div_(2)
    return logits


def label(
    network: FoldedNetwork, case: Case, image: Image, grid: int
) -> tuple[np.ndarray, list[str]]:
    """(z, y, x) uint8 labels of ``case``, 255 where undecided, and the organs they name."""
    prepared = prepare(image.array, image.direction, grid, spacing_mm=image.spacing_mm)
    assert prepared is not None
    volume, placement = prepared
    logits = look_twice(network, volume)
    by_hand = [organ for organ in ORGANS if case.labels is not None and organ.name in case.organs]
    for organ in by_hand:
        logits[organ.index - 1] = -2 * MARGIN  # nothing is asked about it
    labels = restore(logits, placement)
    sure = keep_largest(np.where(restore(logits - MARGIN, placement) == labels, labels, 0))
    ruled_out = restore(logits + MARGIN, placement) == 0
    result = np.where(ruled_out, 0, np.where(sure > 0, sure, UNDECIDED)).astype(np.uint8)
    named = []
    for organ in ORGANS:
        if organ in by_hand:
            continue
        count = int((labels == organ.index).sum())
        share = (sure == organ.index).sum() / count if count else 0.0
        if share >= SURE:
            named.append(organ.name)
        else:
            result[sure == organ.index] = UNDECIDED
    if by_hand:
        truth = read_labels(case).array
        result[truth == UNDECIDED] = UNDECIDED
        for organ in by_hand:
            result[truth == organ.index] = organ.index
            named.append(organ.name)
    return result, [organ.name for organ in ORGANS if organ.name in named]


def label_all(weights: Path, folders: list[Path], output: Path) -> None:
    loaded = load_weights(weights)
    network = FoldedNetwork(loaded.network(), torch.device("cpu"), "fp32")
    output.mkdir(parents=True, exist_ok=True)
    listed = output / "cases.json"
    entries = json.loads(listed.read_text()) if listed.exists() else {}
    for case in (case for folder in folders for case in read_dataset(folder).cases):
        if case.name in entries:
            continue
        image = read_image(case.image)
        result, organs = label(network, case, image, loaded.grid)
        if not organs:  # training refuses labels of nothing
            print(f"{case.name}: no organ is sure; left out", flush=True)
            continue
        link_volume(case.image, output / "images", f"{case.name}_0000")
        write_labels(result, image, output / "labels" / f"{case.name}.nii.gz")
        source = f"{case.source}; labels by {weights.name}"
        entries[case.name] = {
            "organs": organs, "source": source, "bent_from": case.bent_from,
            "shapes_of": case.shapes_of,
        }  # fmt: skip
        listed.write_text(json.dumps(entries, indent=1))
        undecided = (result == UNDECIDED).mean()
        left_out = [organ.name for organ in ORGANS if organ.name not in organs]
        print(f"{case.name}: {undecided:.1%} undecided; without {', '.join(left_out)}", flush=True)


def twice(weights: Path, folder: Path, names: list[str]) -> None:
    """Does the second look pay by itself, as test-time augmentation?"""
    loaded = load_weights(weights)
    network = FoldedNetwork(loaded.network(), torch.device("cpu"), "fp32")
    print("| case | one look | two |")
    print("| --- | --- | --- |")
    rows = []
    for case in read_dataset(folder).cases:
        if case.name not in names:
            continue
        image, truth = read_image(case.image), read_labels(case).array
        prepared = prepare(image.array, image.direction, loaded.grid, spacing_mm=image.spacing_mm)
        assert prepared is not None
        volume, placement = prepared
        row = [
            float(np.mean(list(dice_per_organ(restore(x, placement), truth, case.organs).values())))
            for x in (network(volume), look_twice(network, volume))
        ]
        rows.append(row)
        print(f"| {case.name} | {row[0]:.3f} | {row[1]:.3f} |", flush=True)
    if not rows:
        raise SystemExit(f"{folder}: none of {', '.join(names)} is there")
    once, again = np.mean(rows, axis=0)
    print(f"| mean | {once:.3f} | {again:.3f} |")


def compare(runs: list[Path]) -> None:
    """The last line of each run's validation.jsonl: that of its exported weights."""
    tables = [
        json.loads((run / "validation.jsonl").read_text().splitlines()[-1])["dice"] for run in runs
    ]
    print("| organ | without | with | difference | 95 % interval |")
    print("| --- | --- | --- | --- | --- |")
    rows = {}
    for organ in (organ.name for organ in ORGANS):
        cases = [case for case in sorted(tables[0]) if organ in tables[0][case]]
        if cases:
            rows[organ] = [[table[case][organ] for case in cases] for table in tables]
    rows["mean"] = [
        [float(np.mean(list(table[case].values()))) for case in sorted(tables[0])]
        for table in tables
    ]
    for name, (without, with_) in rows.items():
        pairs = np.subtract(with_, without)
        low, high = intervals_of_means(pairs[:, None])[0] or (np.nan, np.nan)
        print(
            f"| {name} | {np.mean(without):.3f} | {np.mean(with_):.3f} | {pairs.mean():+.3f} | "
            f"{low:+.3f} to {high:+.3f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("label")
    one.add_argument("weights", type=Path)
    one.add_argument("folders", type=Path, nargs="+")
    one.add_argument("--output", type=Path, required=True)
    one.set_defaults(run=lambda o: label_all(o.weights, o.folders, o.output))
    look = commands.add_parser("twice")
    look.add_argument("weights", type=Path)
    look.add_argument("folder", type=Path)
    look.add_argument("--cases", nargs="+", required=True)
    look.set_defaults(run=lambda o: twice(o.weights, o.folder, o.cases))
    two = commands.add_parser("compare")
    two.add_argument("runs", type=Path, nargs=2)
    two.set_defaults(run=lambda o: compare(o.runs))
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()

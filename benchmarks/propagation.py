"""Each label map in turn lacks the organ, and the others tell where it lies.

A network's answer counts where it has not learnt from that map or the others of its part.

    python benchmarks/propagation.py ATLASES STORE --organ duodenum --results results.jsonl
    python benchmarks/propagation.py --table results.jsonl
    python benchmarks/propagation.py ATLASES STORE --organ duodenum --cases SLABS TRAIN

A line a map is appended as it is done; run again to go on. Judged on the map's own grid.
Every fifth map chose the parameters and the thresholds; the table gives the others and all.
The last form judges scans that have labels of the organ, with the networks of the first.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from flare_clef.errors import UserError
from flare_clef.images import Image, read_image
from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.training.atlas_votes import Surroundings, Votes
from flare_clef.training.cases import read_labels
from flare_clef.training.datasets import read_dataset
from flare_clef.training.fusion import dsc, possible_values
from flare_clef.training.neighbourhood import Learnt
from flare_clef.training.propagated_files import vote_on
from flare_clef.training.propagation import find_atlases, organ_weights
from flare_clef.training.registration import Grid
from flare_clef.training.workshop import Workshop
from flare_clef.writing import labels_to_sitk, write_labels

THRESHOLDS = [round(0.1 + 0.05 * step, 2) for step in range(11)]
STEPS = {
    "affine": "affine vote of all atlases",
    "affine_free": "the same, other organs' voxels excluded",
    "deformed": "the 12 that fit best deformed, their mean",
    "local": "the same, weighted where they fit",
    "learnt": "learnt from the neighbours, no deformed atlas",
    "both": "mean of the last two",
}
PARAMETERS_EVERY = 5


def steps_of(
    name: str, around: Surroundings, votes: Votes, learnt: Learnt
) -> dict[str, np.ndarray]:
    """What each of ``STEPS`` says, 0 to 1, on the working grid."""
    vote, chance = votes.fused(around.taken), learnt.chance(name, around)
    return {
        "affine": around.affine_vote,
        "affine_free": np.where(around.taken, 0, around.affine_vote),
        "deformed": votes.organ.mean(0),
        "local": vote,
        "learnt": chance,
        "both": (vote + chance) / 2,
    }


def table_of(
    vote: np.ndarray, grid: Grid, true: Image, organ: int, free: bool, hu: np.ndarray | None = None
) -> list[float]:
    """DSC at each of ``THRESHOLDS`` on the grid of ``true``; ``free``: no other organ's voxels."""
    share = vote_on(vote, grid, labels_to_sitk(true.array.astype(np.uint8), true))
    if free:
        share[(true.array != 0) & (true.array != organ)] = 0
    if hu is not None:
        share[~possible_values(hu)] = 0
    return [round(dsc(share >= 255 * t, true.array == organ), 4) for t in THRESHOLDS]


def measure(folder: Path, store: Path, organ: int, results: Path, every: int) -> None:
    """Appends a line of ``results`` for each map that it lacks yet."""
    done = [json.loads(line)["name"] for line in results.open()] if results.exists() else []
    files = {path.name.split(".")[0]: path for path in find_atlases(folder)}
    with Workshop(store, workers=2) as shop:
        maps, failed = shop.maps(files)
        print(*failed.values(), sep="\n")
        weights = organ_weights(maps, organ)
        learnt = shop.learnt(maps, maps, organ, weights)
        if learnt is None:
            raise UserError(f"{folder}: too few label maps to learn from")
        names = sorted(maps)
        # Those that chose the parameters first, then the others.
        chose = names[::PARAMETERS_EVERY]
        order = chose + [name for name in names if name not in chose]
        for name in order[::every]:
            if name in done:
                continue
            began = time.monotonic()
            polled = shop.votes({name: maps[name]}, maps, organ, weights)
            if polled.failed:
                raise UserError(polled.failed[name])
            around, collected = polled.votes[name]
            true = read_image(files[name])
            tables = {
                step: table_of(vote, around.grid, true, organ, free=step != "affine")
                for step, vote in steps_of(name, around, collected, learnt).items()
            }
            seconds = round(time.monotonic() - began, 1)
            record = {"name": name, "chose": name in chose, "seconds": seconds, **tables}
            with results.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(name, *(max(tables[step]) for step in STEPS), seconds, flush=True)


def judge(folder: Path, store: Path, organ: int, datasets: list[Path]) -> None:
    """Prints DSC per step of each case that has labels of ``organ``, which are hidden."""
    files = {path.name.split(".")[0]: path for path in find_atlases(folder)}
    cases = {case.name: case for path in datasets for case in read_dataset(path).cases}
    true = {name: read_labels(case) for name, case in cases.items() if case.labels is not None}
    true = {name: labels for name, labels in true.items() if (labels.array == organ).any()}
    hidden = {}
    for name, labels in true.items():
        hidden[name] = store / "hidden" / f"{name}.nii.gz"
        write_labels(np.where(labels.array == organ, 0, labels.array), labels, hidden[name])
    print("threshold", *THRESHOLDS)
    with Workshop(store, workers=2) as shop:
        maps, _ = shop.maps(files)
        weights = organ_weights(maps, organ)
        learnt = shop.learnt(maps, maps, organ, weights)
        if learnt is None:
            raise UserError(f"{folder}: too few label maps to learn from")
        targets, _ = shop.maps(hidden)
        for name, (around, votes) in shop.votes(targets, maps, organ, weights).votes.items():
            hu = read_image(cases[name].image).array
            for step, vote in steps_of(name, around, votes, learnt).items():
                free = step != "affine"
                print(name, step, *table_of(vote, around.grid, true[name], organ, free))
            print(name, "values", *table_of(vote, around.grid, true[name], organ, True, hu))


def show(results: Path) -> None:
    """A table: thresholds by the maps of the parameters, DSC of the others and of all."""
    lines = [json.loads(line) for line in results.open()]
    chose = [line for line in lines if line["chose"]]
    others = [line for line in lines if line not in chose]
    print(f"| step | threshold | {len(others)} others | lowest | all {len(lines)} |")
    print("| --- | --- | --- | --- | --- |")
    for step, what in STEPS.items():
        best = int(np.mean([line[step] for line in chose], axis=0).argmax())
        rest = [line[step][best] for line in others]
        every = np.mean([line[step][best] for line in lines])
        print(
            f"| {what} | {THRESHOLDS[best]:.2f} | {np.mean(rest):.3f} | {min(rest):.3f} | "
            f"{every:.3f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("atlases", type=Path, nargs="?")
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("--organ", default="duodenum", choices=sorted(ORGAN_BY_NAME))
    parser.add_argument("--results", type=Path, default=Path("propagation.jsonl"))
    parser.add_argument("--every", type=int, default=1, help="every n-th map only")
    parser.add_argument("--cases", type=Path, nargs="+", help="judge these training sets")
    parser.add_argument("--table", type=Path, help="only show what is in this file")
    options = parser.parse_args()
    organ = ORGAN_BY_NAME[options.organ].index
    if options.cases:
        judge(options.atlases, options.store, organ, options.cases)
        return
    if options.table is None:
        measure(options.atlases, options.store, organ, options.results, options.every)
    show(options.table or options.results)


if __name__ == "__main__":
    main()

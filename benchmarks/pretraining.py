"""Does pre-training without labels help fine-tuning, and which of its losses carries it?

    python benchmarks/pretraining.py DATA --unlabelled DIR --output OUT

DATA is a training set (images/, labels/, cases.json) that holds the four cases of
recipes/experiment.toml which are kept aside. Each variant is pre-trained once, on the scans of
DIR and the images of the training cases; then each (variant, number of training cases, seed) is
fine-tuned equally long. Results are appended to OUT/results.jsonl as they come; run again to go
on. The table at the end: DSC on the cases kept aside, at their own grids, and differences to no
pre-training, paired by case and seed, with 95 % intervals (bootstrap).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from flare_clef.organs import ORGANS
from flare_clef.training.case_files import link_volume
from flare_clef.training.cases import read_labels
from flare_clef.training.datasets import read_dataset
from flare_clef.writing import write_labels

RECIPE = Path(__file__).parents[1] / "recipes" / "experiment.toml"
ASIDE = ("btcv_06", "btcv_13", "btcv_20", "btcv_28")
VARIANTS: dict[str, tuple[str, ...] | None] = {
    "none": None,
    "all three losses": (),
    "without decoding": ("pretrain.decoding_weight=0.0",),
    "without discriminativeness": ("pretrain.discriminativeness_weight=0.0",),
    "without equivariance": ("pretrain.equivariance_weight=0.0",),
}


def subset(data: Path, count: int, folder: Path) -> Path:
    """A training set of links: the cases kept aside and ``count`` others, spread over the names.

    Labels that are numbered otherwise are written in our numbers, which ``cases.json`` means.
    """
    cases = [case for case in read_dataset(data).cases if case.labels is not None]
    others = [case for case in cases if case.name not in ASIDE]
    chosen = [others[round(i)] for i in np.linspace(0, len(others) - 1, min(count, len(others)))]
    kept = [case for case in cases if case.name in ASIDE] + chosen
    entries = {}
    for case in kept:
        assert case.labels is not None
        link_volume(case.image, folder / "images", f"{case.name}_0000")
        if case.renumbering:
            labels = read_labels(case)
            write_labels(labels.array, labels, folder / "labels" / f"{case.name}.nii.gz")
        else:
            link_volume(case.labels, folder / "labels", case.name)
        entries[case.name] = {
            "organs": list(case.organs), "source": case.source, "bent_from": case.bent_from,
            "shapes_of": case.shapes_of,
        }  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(entries))
    return folder


def train(command: str, run: Path, data: Path, settings: list[str]) -> float:
    """Seconds of ``flare-clef train COMMAND``."""
    overrides = [part for text in settings for part in ("--set", text)]
    began = time.perf_counter()
    run.mkdir(parents=True, exist_ok=True)
    with (run / f"{command}.log").open("a") as log:
        subprocess.run(
            [sys.executable, "-m", "flare_clef", "train", command, str(RECIPE), "--output",
             str(run), "--data", str(data), *overrides],
            stdout=log, stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip
    return time.perf_counter() - began


def losses_over_time(metrics: Path) -> list[float]:
    """Mean loss of each tenth of the run; skipped steps have none."""
    logged = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    losses = [loss for loss in logged if loss is not None]
    return [round(float(np.mean(part)), 4) for part in np.array_split(losses, 10)]


def table(results: list[dict[str, Any]]) -> str:
    """Mean DSC by variant and number of cases, and paired differences to no pre-training."""
    names = [organ.name for organ in ORGANS]
    lines = [
        "| cases | pre-training | seeds | DSC | difference | 95 % interval | first, last loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    means: dict[tuple[Any, ...], float] = {}
    for r in results:
        for case, row in r["dice"].items():
            scores = [row[name] for name in names if name in row]
            means[(r["cases"], r["variant"], r["seed"], case)] = float(np.mean(scores))
    draws = np.random.default_rng(0)
    for count, variant in product(sorted({r["cases"] for r in results}, reverse=True), VARIANTS):
        own = [r for r in results if (r["cases"], r["variant"]) == (count, variant)]
        if not own:
            continue
        keys = [(r["seed"], case) for r in own for case in r["dice"]]
        scores = [means[(count, variant, *key)] for key in keys]
        pairs = [
            means[(count, variant, *key)] - means[(count, "none", *key)]
            for key in keys
            if (count, "none", *key) in means
        ]
        difference, interval = "", ""
        if variant != "none" and pairs:
            sampled = draws.choice(pairs, (10_000, len(pairs))).mean(1)
            low, high = np.quantile(sampled, [0.025, 0.975])
            difference, interval = f"{np.mean(pairs):+.3f}", f"{low:+.3f} to {high:+.3f}"
        first, last = (np.mean([r["loss"][i] for r in own]) for i in (0, -1))
        lines.append(
            f"| {count} | {variant} | {len(own)} | {np.mean(scores):.3f} | {difference} | "
            f"{interval} | {first:.2f}, {last:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("--unlabelled", type=Path, nargs="*", default=[])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--counts", type=int, nargs="+", default=[16, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    file = output / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["variant"], r["cases"], r["seed"]) for r in results}
    whole = subset(options.data, 1000, output / "data")
    unlabelled = json.dumps([str(folder.resolve()) for folder in options.unlabelled])
    for variant, count, seed in product(options.variants, options.counts, options.seeds):
        if (variant, count, seed) in done:
            continue
        place = output / variant.replace(" ", "_")
        settings = [*options.set, f"finetune.seed={seed}"]
        changes = VARIANTS[variant]
        if changes is not None:
            backbone = place / "pretraining" / "backbone.safetensors"
            if not backbone.exists():
                train("pretrain", place, whole,
                      [*options.set, *changes, f"data.unlabelled={unlabelled}"])  # fmt: skip
            settings.append(f'finetune.start="{backbone}"')
        run = place / f"{count}_cases_seed_{seed}"
        data = subset(options.data, count, output / f"data_{count}")
        seconds = train("finetune", run, data, [*settings, "pretrain=false"])
        last = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])
        result = {
            "variant": variant, "cases": count, "seed": seed, "seconds": round(seconds),
            "cores": os.cpu_count(), "loss": losses_over_time(run / "metrics.jsonl"),
            "dice": last["dice"],
        }  # fmt: skip
        with file.open("a") as stream:
            stream.write(json.dumps(result) + "\n")
        results.append(result)
        print(f"{variant}, {count} cases, seed {seed}: {seconds:.0f} s", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()

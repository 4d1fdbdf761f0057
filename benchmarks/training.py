"""One training step against size, against the plain form, and pre-training against fine-tuning.

    python benchmarks/training.py [--grids 64 96 128 192] [--steps 3] [--precision auto]

Each form runs in a process of its own, so that its peak memory is its own; ratios hold within
one run of this command. Plain: torch's defaults (upsample, concatenate, convolve, contiguous,
fp32, Adam's loop), same weights, loss and volumes. Augmenting is timed on one thread, as it
runs beside the step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from forward import plain_forward
from measuring import run

from flare_clef.limits import keep_memory, usable_cores
from flare_clef.network import Architecture, SegmentationNetwork
from flare_clef.organs import ORGANS
from flare_clef.precision import choose_precision
from flare_clef.training.cases import Case, PreparedCase
from flare_clef.training.finetuning import Finetuning
from flare_clef.training.finetuning_plan import FinetuningPlan, Stage
from flare_clef.training.losses import softmax_dice_loss
from flare_clef.training.pretraining import Pretraining, PretrainingPlan

FORMS = ("plain", "finetune", "finetune, checkpointed", "pretrain", "augment")


def made_up_case(folder: Path, grid: int) -> PreparedCase:
    """A prepared volume with all organs somewhere in it."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 14, (8, 8, 8), dtype=np.uint8)
    labels = blocks.repeat(grid // 8, 0).repeat(grid // 8, 1).repeat(grid // 8, 2)
    image = (labels / 10 - 0.6 + random.normal(0, 0.1, labels.shape)).clip(-1, 1)
    np.save(folder / "image.npy", image.astype(np.float16))
    np.save(folder / "labels.npy", labels)
    case = Case("made_up", folder, folder, tuple(organ.name for organ in ORGANS))
    return PreparedCase(case, folder, (2.0, 2.0, 2.0))


def plain_steps(grid: int, steps: int) -> list[float]:
    torch.manual_seed(0)
    network = SegmentationNetwork().train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, foreach=False, fused=False)
    with tempfile.TemporaryDirectory() as folder:
        case = made_up_case(Path(folder), grid)
        image = torch.from_numpy(case.image.astype(np.float32))[None, None]
        labels = torch.from_numpy(case.labels.copy())
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        loss, _ = softmax_dice_loss(plain_forward(network, image), labels, case.case.labelled)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def trainer_steps(form: str, grid: int, steps: int, precision: str) -> list[float]:
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = [made_up_case(folder, grid)]
        settings = {
            "precision": precision,
            "on_step": lambda record: seconds.append(record["seconds"]),
            "checkpoint_seconds": 1e9,
        }
        if form == "pretrain":
            plan = PretrainingPlan(steps=steps + 1, grid=grid)
            trainer = Pretraining(plan, cases, folder, architecture=Architecture(), **settings)
        else:
            tuning = FinetuningPlan(
                stages=(Stage(grid, steps + 1),),
                activation_checkpointing=form.endswith("checkpointed"),
            )
            trainer = Finetuning(tuning, cases, folder, **settings)
        if form == "augment":
            torch.set_num_threads(1)
            times = []
            for index in range(steps):
                began = time.perf_counter()
                trainer.make_batch(index)
                times.append(time.perf_counter() - began)
            return times
        # The last checkpoint is not part of a step, nor of its memory.
        trainer.save = lambda: None  # type: ignore[method-assign]
        trainer.train()
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--grids", type=int, nargs="+", default=[64, 96, 128, 192])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--form", choices=FORMS)
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    if options.form:
        (grid,) = options.grids
        if options.form == "plain":
            seconds = plain_steps(grid, options.steps)
        else:
            if options.form != "finetune, checkpointed":
                keep_memory()
            seconds = trainer_steps(options.form, grid, options.steps, options.precision)
        print(json.dumps(seconds))
        return
    precision, why = choose_precision(options.precision, torch.device("cpu"), usable_cores())
    print(f"{usable_cores()} cores, {precision} ({why}); median of {options.steps} steps")
    print(f"{'grid':>5}  {'form':24s} {'s':>7} {'x plain':>8} {'x finetune':>11} {'peak GiB':>9}")
    for grid in options.grids:
        measured = {}
        for form in FORMS:
            cost = run(
                [sys.executable, __file__, "--form", form, "--grids", str(grid),
                 "--steps", str(options.steps), "--precision", precision]
            )  # fmt: skip
            if cost.code:
                print(f"{grid:5d}  {form:24s} failed: {cost.log.strip().splitlines()[-1]}")
                continue
            measured[form] = median(json.loads(cost.log.strip().splitlines()[-1]))
            ratios = [
                f"{measured[form] / measured[other]:.2f}" if other in measured else "-"
                for other in ("plain", "finetune")
            ]
            print(
                f"{grid:5d}  {form:24s} {measured[form]:7.2f} {ratios[0]:>8} {ratios[1]:>11} "
                f"{cost.peak_mib / 1024:9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""Do the features of pre-training mean places? Nearest neighbours across patients.

    python benchmarks/features.py DATA RUN [RUN ...] --picture features.png

DATA is a training set with labels, RUN a run of ``flare-clef train pretrain`` by
recipes/experiment.toml (or another recipe, named with --recipe). A voxel in the middle of an
organ of patient A is looked up in patient B: the voxel of B's body whose features are most like
its own. Printed: the median distance in mm to the middle of that organ in B, over all pairs; beside
it a network before training, and the voxel at the same share of B's body along each axis.
"""

from __future__ import annotations

import argparse
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from flare_clef.organs import ORGANS
from flare_clef.training.cases import PreparedCase
from flare_clef.training.checkpoints import load_checkpoint
from flare_clef.training.datasets import read_dataset
from flare_clef.training.preparing import prepare_all
from flare_clef.training.pretraining import PretrainingObjective
from flare_clef.training.pretraining_losses import TISSUE
from flare_clef.training.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "experiment.toml"


def middle_of(organ: np.ndarray) -> np.ndarray:
    """(3,) the organ's voxel (z, y, x) nearest to its centre."""
    voxels = np.argwhere(organ)
    return voxels[((voxels - voxels.mean(0)) ** 2).sum(1).argmin()]


def middles(case: PreparedCase) -> dict[str, np.ndarray]:
    labels = np.asarray(case.labels)
    found = {organ.name: labels == organ.index for organ in ORGANS}
    return {name: middle_of(organ) for name, organ in found.items() if organ.any()}


def features_of(objective: PretrainingObjective, case: PreparedCase) -> torch.Tensor:
    """(D, z, y, x) unit vectors, each the mean over its 3 x 3 x 3 voxels."""
    image = torch.from_numpy(np.array(case.image, np.float32))[None, None]
    with torch.no_grad():
        found = functional.normalize(objective.head(objective.backbone(image)), dim=1)
    return functional.normalize(functional.avg_pool3d(found, 3, 1, 1), dim=1)[0]


def same_share(at: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The voxel at the same share of the other body's box."""
    (low, high), (first, last) = ((b.min(0), b.max(0)) for b in (one, other))
    return first + (at - low) / (high - low) * (last - first)


def distances(
    cases: list[PreparedCase], features: list[torch.Tensor] | None
) -> dict[str, list[float]]:
    """By organ, mm to the true middle, for all ordered pairs; None: the place alone."""
    bodies = [np.argwhere(np.asarray(case.image) > TISSUE) for case in cases]
    places = [middles(case) for case in cases]
    rows = None
    if features is not None:
        rows = [
            f[(slice(None), *torch.from_numpy(b.T))] for f, b in zip(features, bodies, strict=True)
        ]
    found: dict[str, list[float]] = {}
    for one, other in permutations(range(len(cases)), 2):
        for name in places[one].keys() & places[other].keys():
            at = places[one][name]
            if features is None or rows is None:
                guess = same_share(at, bodies[one], bodies[other])
            else:
                query = features[one][:, at[0], at[1], at[2]]
                guess = bodies[other][int((query @ rows[other]).argmax())]
            offset = (guess - places[other][name]) * np.array(cases[other].spacing_mm)
            found.setdefault(name, []).append(float(np.linalg.norm(offset)))
    return found


def colours(features: list[torch.Tensor], cases: list[PreparedCase]) -> list[np.ndarray]:
    """(z, y, x, 3) of each case: three principal components, the same for all of them."""
    bodies = [torch.from_numpy(np.asarray(c.image) > TISSUE) for c in cases]
    joint = torch.cat([f[:, b].t()[::7] for f, b in zip(features, bodies, strict=True)])
    mean = joint.mean(0)
    some = (joint - mean)[:: len(joint) // 20_000 + 1]
    _, _, axes = torch.linalg.svd(some, full_matrices=False)
    low, high = torch.quantile(some @ axes[:3].t(), torch.tensor([0.02, 0.98]), 0)
    out = []
    for feature, body in zip(features, bodies, strict=True):
        values = (feature.flatten(1).t() - mean) @ axes[:3].t()
        shown = ((values - low) / (high - low)).clamp(0, 1).view(*body.shape, 3)
        out.append((shown * body[..., None]).numpy())
    return out


def draw(path: Path, cases: list[PreparedCase], rows: dict[str, list[torch.Tensor]]) -> None:
    """For two patients a coronal slice through the pancreas: image, then features as colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * (1 + len(rows)), 6.4), layout="constrained")
    grid = figure.subplots(2, 1 + len(rows))
    tints = {name: colours(features, cases) for name, features in rows.items()}
    for line, case in enumerate(cases):
        y = middles(case)["pancreas"][1]
        volumes = [np.asarray(case.image, np.float32), *(tint[line] for tint in tints.values())]
        pictures = [volume[::-1, y] for volume in volumes]
        height, _, width = case.spacing_mm
        for axis, picture, title in zip(grid[line], pictures, ("scan", *rows), strict=True):
            axis.imshow(picture, cmap="gray", aspect=height / width)
            axis.set_axis_off()
            axis.set_title(f"{case.case.name}: {title}" if title == "scan" else title, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--cases", nargs="+", help="names; by default those kept aside")
    parser.add_argument("--store", type=Path, default=Path("prepared"))
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    assert recipe.pretrain is not None
    names = options.cases or recipe.data.validation
    chosen = [case for case in read_dataset(options.data).cases if case.name in names]
    cases = prepare_all(chosen, options.store, recipe.pretrain.grid).prepared
    torch.manual_seed(recipe.pretrain.seed)
    fresh = PretrainingObjective(recipe.pretrain, recipe.network, "fp32").train()
    features = {"before training": [features_of(fresh, case) for case in cases]}
    for run in options.runs:
        saved = load_checkpoint(run / "pretraining")
        if saved is None:
            parser.error(f"{run}: no pre-training in it")
        fresh.load_state_dict(saved["pretraining"])
        # Statistics of the volume itself, as pre-training saw them.
        features[run.name] = [features_of(fresh, case) for case in cases]
    columns = {"same share of the body": distances(cases, None)} | {
        name: distances(cases, found) for name, found in features.items()
    }
    print(f"| median mm, {len(cases)} patients | " + " | ".join(columns) + " |")
    print("| --- " * (1 + len(columns)) + "|")
    for organ in [o.name for o in ORGANS if all(o.name in c for c in columns.values())]:
        row = " | ".join(f"{np.median(found[organ]):.0f}" for found in columns.values())
        print(f"| {organ} | {row} |")
    pooled = [np.median([mm for found in c.values() for mm in found]) for c in columns.values()]
    print("| all | " + " | ".join(f"{mm:.0f}" for mm in pooled) + " |")
    if options.picture:
        draw(options.picture, cases[:2], {name: found[:2] for name, found in features.items()})
        print(f"wrote {options.picture}")


if __name__ == "__main__":
    main()

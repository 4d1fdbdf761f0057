"""Organ maps, surveys, votes and small networks on disk, named by the content of their sources.

What is there is never made again, so that a propagation that was broken off goes on. The
functions take paths and plain values: they are what the processes of a pool run.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk

from flare_clef.errors import UserError
from flare_clef.training.atlas_votes import Surroundings, survey, vote_of
from flare_clef.training.registration import Grid, OrganMaps, load_organ_maps, warp

if TYPE_CHECKING:
    from flare_clef.training.neighbourhood import NeighbourhoodNetwork

STORE_FORMAT = 2


def _key(*parts: object) -> str:
    text = " ".join(str(part) for part in (STORE_FORMAT, *parts))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _save(path: Path, **arrays: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{secrets.token_hex(4)}.npz")
    try:
        np.savez_compressed(temporary, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def store_maps(labels: Path, store: Path, spacing_mm: float) -> Path:
    """The organ maps of the file ``labels``: where they are kept. Raises UserError."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        content = hashlib.sha256(labels.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{labels}: cannot be read ({error.strerror or error})") from None
    path = store / f"maps-{_key(content, spacing_mm)}.npz"
    if not path.is_file():
        maps = load_organ_maps(labels, spacing_mm)
        shares = {f"organ_{organ}": share for organ, share in maps.shares.items()}
        _save(path, **_grid_arrays(maps.grid), volume_mm=maps.volume_mm, **shares)
    return path


def load_maps(path: Path) -> OrganMaps:
    """What :func:`store_maps` kept."""
    with np.load(path) as kept:
        return OrganMaps(_grid(kept), _organs(kept), kept["volume_mm"])


def _grid_arrays(grid: Grid) -> dict[str, Any]:
    return {"origin_mm": grid.origin_mm, "shape": grid.shape, "spacing_mm": grid.spacing_mm}


def _grid(kept: Any) -> Grid:
    return Grid(
        tuple(kept["origin_mm"].tolist()), tuple(kept["shape"].tolist()), float(kept["spacing_mm"])
    )


def _organs(kept: Any) -> dict[int, np.ndarray]:
    return {int(name[6:]): kept[name] for name in kept.files if name.startswith("organ_")}


def store_survey(
    target: Path, atlases: list[Path], organ: int, weights: dict[int, float], store: Path
) -> Path:
    """The surroundings of ``organ`` in ``target``: where they are kept. Raises UserError."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    path = store / f"survey-{_key(target.name, [a.name for a in atlases], organ)}.npz"
    if not path.is_file():
        around = survey(load_maps(target), [load_maps(a) for a in atlases], organ, weights)
        _save(
            path,
            **_grid_arrays(around.grid),
            **{f"organ_{k}": share for k, share in around.organs.items()},
            affine_vote=around.affine_vote,
            near=around.near,
            ranking=around.ranking,
        )
    return path


def load_survey(path: Path) -> Surroundings:
    """What :func:`store_survey` kept."""
    with np.load(path) as kept:
        ranking = tuple(kept["ranking"].tolist())
        return Surroundings(_grid(kept), _organs(kept), kept["affine_vote"], kept["near"], ranking)


def store_vote(
    target: Path, around: Path, atlas: Path, organ: int, weights: dict[int, float], store: Path
) -> Path:
    """One atlas's vote on ``target``: where it is kept."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    path = store / f"vote-{_key(around.name, atlas.name, organ)}.npz"
    if not path.is_file():
        vote, misfit, fit = vote_of(
            load_maps(target), load_survey(around), load_maps(atlas), organ, weights
        )
        _save(path, vote=vote.astype(np.float16), misfit=misfit.astype(np.float16), agreement=fit)
    return path


def load_vote(path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """What :func:`store_vote` kept: the organ, the misfit, the agreement."""
    with np.load(path) as kept:
        vote, misfit = kept["vote"].astype(np.float32), kept["misfit"].astype(np.float32)
        return vote, misfit, float(kept["agreement"])


def store_network(
    bodies: list[tuple[Path, Path]],
    organ: int,
    shown: list[tuple[int, ...]],
    seed: int,
    store: Path,
) -> Path:
    """A network that learnt where ``organ`` lies in ``bodies``: where it is kept.

    ``bodies`` are organ maps and their survey; see :func:`~.neighbourhood.learn` for ``shown``.
    Raises UserError where it cannot be written.
    """
    import torch

    from flare_clef.training.neighbourhood import STEPS, Example, learn, network_inputs

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    torch.set_num_threads(1)
    names = [path.name for body in bodies for path in body]
    path = store / f"network-{_key(names, organ, shown, seed, STEPS)}.npz"
    if not path.is_file():
        examples = []
        for maps, survey_file in bodies:
            around = load_survey(survey_file)
            true = warp(load_maps(maps), organ, around.grid, sitk.Transform())
            examples.append(Example(network_inputs(around), torch.from_numpy(true)))
        network = learn(examples, [frozenset(organs) for organs in shown], seed, STEPS)
        _save(path, **{name: value.numpy() for name, value in network.state_dict().items()})
    return path


def load_network(path: Path) -> NeighbourhoodNetwork:
    """What :func:`store_network` kept."""
    import torch

    from flare_clef.training.neighbourhood import NeighbourhoodNetwork

    network = NeighbourhoodNetwork()
    with np.load(path) as kept:
        network.load_state_dict({name: torch.from_numpy(kept[name]) for name in kept.files})
    return network.eval()

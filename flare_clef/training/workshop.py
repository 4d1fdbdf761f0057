"""The processes that lay atlases over targets, and the store they share."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flare_clef.errors import UserError
from flare_clef.images import itk_reason
from flare_clef.training.atlas_store import (
    load_network,
    load_survey,
    load_vote,
    store_maps,
    store_network,
    store_survey,
    store_vote,
)
from flare_clef.training.atlas_votes import FUSED_ATLASES, Surroundings, Votes, collect
from flare_clef.training.neighbourhood import LEAST_ATLASES, Learnt

SPACING_MM = 4.0
PARTS = 4
"""So many networks learn, each from all atlases but one part."""
WORKER_LOST = (
    "a process of the pool was ended from outside, most likely for want of memory; "
    "run the same command again with fewer --workers"
)


def _others(target: str, atlases: dict[str, Path]) -> list[str]:
    return [name for name in sorted(atlases) if name != target]


def end_with_parent() -> None:
    """In a worker: a parent that a signal ends at once cannot end its workers."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass
class Polled:
    """What the atlases say of several targets."""

    votes: dict[str, tuple[Surroundings, Votes]] = field(default_factory=dict)
    """By target."""
    failed: dict[str, str] = field(default_factory=dict)
    """Targets without a vote: why."""
    unfit: list[str] = field(default_factory=list)
    """A line for each pair that could not be laid over each other."""
    placed: set[str] = field(default_factory=set)
    """Atlases that lie on one target at least."""


class Workshop:
    """A pool of processes and the store they share; usable as a context.

    ``on_done`` is told after each finished piece of work what it was.
    """

    def __init__(
        self, store: Path, workers: int, on_done: Callable[[str], None] | None = None
    ) -> None:
        self.store = store
        self._tell = on_done or (lambda what: None)
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, spawn, end_with_parent)

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, work: Callable[..., Path], *arguments: Any) -> Future[Path]:
        try:
            return self._pool.submit(work, *arguments)
        except BrokenExecutor:
            raise UserError(f"propagate: {WORKER_LOST}") from None

    def _gather(
        self, work: dict[Future[Path], Any], what: str
    ) -> tuple[dict[Any, Path], dict[Any, str]]:
        """Results and error lines, by the work's own key."""
        done, failed = {}, {}
        for future in as_completed(work):
            key = work[future]
            try:
                done[key] = future.result()
            except UserError as error:
                failed[key] = str(error)
            except BrokenExecutor:
                raise UserError(f"propagate: {WORKER_LOST}") from None
            except (RuntimeError, MemoryError) as error:
                failed[key] = f"{what} failed ({itk_reason(error)})"
            self._tell(what)
        return done, failed

    def maps(self, files: dict[str, Path]) -> tuple[dict[str, Path], dict[str, str]]:
        """Organ maps of label files, by name, and what is wrong with the others."""
        work = {
            self._submit(store_maps, path, self.store, SPACING_MM): name
            for name, path in files.items()
        }
        return self._gather(work, "organ maps")

    def _surveys(
        self,
        targets: dict[str, Path],
        atlases: dict[str, Path],
        organ: int,
        weights: dict[int, float],
    ) -> tuple[dict[str, Path], dict[str, str]]:
        """The surroundings of ``organ`` in each target by atlases of another name."""
        work = {}
        for name, path in targets.items():
            others = [atlases[other] for other in _others(name, atlases)]
            work[self._submit(store_survey, path, others, organ, weights, self.store)] = name
        return self._gather(work, "survey")

    def learnt(
        self,
        targets: dict[str, Path],
        atlases: dict[str, Path],
        organ: int,
        weights: dict[int, float],
    ) -> Learnt | None:
        """What small networks learn of the atlases, to be asked about ``targets``.

        Each does without a part of the atlases, for which it can be asked, too. None with fewer
        than ``LEAST_ATLASES``, or if no target lies near any.
        """
        surveys, _ = self._surveys(atlases, atlases, organ, weights)
        asked, _ = self._surveys(targets, atlases, organ, weights)
        if len(surveys) < LEAST_ATLASES or not asked:
            return None
        shown = sorted({tuple(sorted(load_survey(path).organs)) for path in asked.values()})
        names = sorted(surveys)
        taught = [[n for n in names if n not in names[part::PARTS]] for part in range(PARTS)]
        work = {
            self._submit(
                store_network,
                [(atlases[n], surveys[n]) for n in some],
                organ,
                shown,
                seed,
                self.store,
            ): seed
            for seed, some in enumerate(taught)
        }
        kept, failed = self._gather(work, "network")
        if failed:
            raise UserError(f"propagate: {next(iter(failed.values()))}")
        return Learnt([(frozenset(taught[seed]), load_network(kept[seed])) for seed in kept])

    def votes(
        self,
        targets: dict[str, Path],
        atlases: dict[str, Path],
        organ: int,
        weights: dict[int, float],
    ) -> Polled:
        """The votes that atlases of another name have on each target."""
        used = {target: _others(target, atlases) for target in targets}
        surveys, failed = self._surveys(targets, atlases, organ, weights)
        pairs = {
            self._submit(
                store_vote,
                targets[name],
                around,
                atlases[used[name][number]],
                organ,
                weights,
                self.store,
            ): (name, number)
            for name, around in surveys.items()
            for number in load_survey(around).ranking[:FUSED_ATLASES]
        }
        fitted, unfit = self._gather(pairs, "pair")
        polled = Polled(failed=failed)
        for name, path in surveys.items():
            around = load_survey(path)
            polled.placed.update(used[name][number] for number in around.ranking)
            own = [vote for (target, _), vote in sorted(fitted.items()) if target == name]
            why = [text for (target, _), text in unfit.items() if target == name]
            if own:
                polled.votes[name] = around, collect([load_vote(vote) for vote in own])
            else:
                failed[name] = why[0]
        polled.unfit = [
            f"atlas {used[target][number]} on {target}: {text}; pair left out"
            for (target, number), text in sorted(unfit.items())
            if target in polled.votes
        ]
        return polled

"""A recipe, a folder and this machine: the cases of a run, prepared and split."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flare_clef.errors import UserError, one_line
from flare_clef.training import provenance
from flare_clef.training.cases import Case, PreparedCase
from flare_clef.training.datasets import read_datasets
from flare_clef.training.preparing import Store, prepare_all
from flare_clef.training.processes import rank, wait
from flare_clef.training.propagation_stage import propagate_onto, with_propagated
from flare_clef.training.recipe import Recipe


@dataclass
class Run:
    """A recipe, a folder, and how this machine computes."""

    recipe: Recipe
    base: Path
    """The folder that paths in the recipe are relative to."""
    folder: Path
    precision: str
    device: torch.device
    say: Callable[[str], None]
    data: Sequence[Path] = ()
    """Folders in place of the recipe's."""
    quiet: bool = False
    _propagated: bool = field(default=False, init=False)
    _found: list[Case] | None = field(default=None, init=False)
    _told: set[str] = field(default_factory=set, init=False)

    @property
    def precision_on_cpu(self) -> str:
        """What networks are judged in. Beside a GPU, whose bf16 the CPU may lack, fp32."""
        return self.precision if self.device.type == "cpu" else "fp32"

    def labelled(self, *, needed: bool = True) -> list[Case]:
        """The cases with labels, also such as ``[propagate]`` makes for those to train on.

        Raises UserError after naming every fault; also where there are none, if ``needed``.
        """
        cases = [case for case in self._given() if case.labels is not None]
        if not cases and needed:
            names = ", ".join(map(str, self._folders())) or "data.folders names no folder"
            raise UserError(f"{names}: no cases with labels; name a folder with --data")
        return self._with_propagated(cases) if cases and self.recipe.propagate else cases

    def labelled_names(self) -> set[str]:
        """Of the cases that may be kept aside: those with labels, which are no bent copies."""
        return {case.name for case in self._given() if case.labels and not case.bent_from}

    def unlabelled(self) -> list[Case]:
        """Further scans for pre-training: those of the data without labels, data.unlabelled's."""
        cases = [case for case in self._given() if case.labels is None]
        # Nor those with labels, or copies of them: they are trained on already, or kept aside.
        further = self._read([self.base / folder for folder in self.recipe.data.unlabelled])
        aside = self.recipe.data.kept_aside(self.labelled_names())
        store = Store(self.folder / "prepared", self.recipe.data.grid)
        known = {name for name, _ in provenance.same_scans(self._given(), further, store)}
        new = [case for case in further if case.name not in known and not aside & case.origins]
        if len(new) < len(further):
            self.say(
                f"{len(further) - len(new)} scan(s) of data.unlabelled are left out: among the "
                "others, or of the name of a case kept aside"
            )
        return cases + new

    def _folders(self) -> list[Path]:
        return list(self.data) or [self.base / folder for folder in self.recipe.data.folders]

    def _given(self) -> list[Case]:
        """All cases of the data's folders, with and without labels."""
        if self._found is None:
            folders = self._folders()
            if self.recipe.data.phantoms and not self.data:
                folders.append(self._phantoms())
            self._found = self._read(folders)
        return self._found

    def _with_propagated(self, cases: list[Case]) -> list[Case]:
        assert self.recipe.propagate is not None
        # Those kept aside are judged by labels that people made.
        trained, aside = split(self, cases)
        settings = self.recipe.propagate
        output = self.folder / "propagated" / settings.organ
        if rank() == 0 and not self._propagated:
            propagate_onto(trained, aside, settings, self.base, output, self.say)
            self._propagated = True
        wait()
        return [*with_propagated(trained, settings, output), *aside]

    def _phantoms(self) -> Path:
        from flare_clef.training.synthetic import make_phantoms

        folder = self.folder / "phantoms"
        if rank() == 0:
            make_phantoms(folder, self.recipe.data.phantoms, lambda name: self.say(f"made {name}"))
        wait()
        return folder

    def prepare(self, cases: Sequence[Case]) -> list[PreparedCase]:
        """Prepared volumes, made where they are missing; called by every process."""
        made = [] if rank() else self.prepare_here(cases)
        wait()
        return self.prepare_here(cases) if rank() else made

    def prepare_here(self, cases: Sequence[Case]) -> list[PreparedCase]:
        """:meth:`prepare` for one process, which waits for none. Names all bad cases."""
        result = prepare_all(cases, self.folder / "prepared", self.recipe.data.grid)
        for warning in result.warnings:
            if warning not in self._told:  # some cases are asked for twice, as for calibration
                self._told.add(warning)
                self.say(f"warning: {warning}")
        for problem in result.problems:
            self.say(f"flare-clef: {problem}")
        if result.problems:
            raise UserError(f"{len(result.problems)} problem(s) in the data, named above")
        return result.prepared

    def describe(
        self,
        cases: Sequence[Case],
        what: str = provenance.CASES,
        kept_aside: Sequence[Case] = (),
        *,
        begun: bool = False,
        finished: bool = False,
        start_trained_on: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Writes and returns the run's record; says what changed since it began.

        ``what`` the cases are for: a key of the record; ``kept_aside`` are among them; ``begun``:
        steps were done before; ``start_trained_on``: what the start has learnt from. Only the
        first process has it. Raises UserError where a ``finished`` run, which learns nothing
        more, had other cases or another recipe.
        """
        if rank():
            return {}
        store = Store(self.folder / "prepared", self.recipe.data.grid)
        described = provenance.describe(
            self.recipe, {what: cases}, store, self.precision, self.device.type,
            kept_aside=kept_aside,
        )  # fmt: skip
        learnt = [case for case in cases if case not in kept_aside]
        for one, other in provenance.same_scans(learnt, kept_aside, store):
            self.say(f"warning: {one}, kept aside, is the same scan as {other}, trained on")
        store.save_checksums()
        if start_trained_on:
            described[provenance.START_TRAINED_ON] = dict(start_trained_on)
        if begun and (self.folder / provenance.FILE_NAME).is_file():
            former = provenance.read_run(self.folder)
            changes = provenance.changes_of_training(former, described) if finished else []
            if changes:
                raise UserError(
                    f"{self.folder}: this run has done all its steps, and {changes[0]}; name "
                    "another folder with --output, or give it more steps"
                )
            # Cases that were taken out since have been learnt from all the same.
            seen = provenance.trained_on(former)
            described[provenance.TRAINED_ON] = {**seen, **described[provenance.TRAINED_ON]}
        described, changes = provenance.write_run(self.folder, described)
        for change in changes:
            self.say(f"warning: {change}")
        return described

    def _read(self, folders: Sequence[Path]) -> list[Case]:
        dataset = read_datasets(folders)
        if len(dataset.problems) == 1:
            raise UserError(dataset.problems[0])
        if dataset.problems:
            for problem in dataset.problems:
                self.say(f"flare-clef: {problem}")
            raise UserError(f"{len(dataset.problems)} problem(s) in the data, named above")
        return list(dataset.cases)

    def draw(self, picture: Callable[[], object]) -> None:
        """Draws; a training goes on where a picture cannot be drawn."""
        try:
            picture()
        except UserError as error:
            self.say(f"warning: {error}")
        except Exception as error:  # of matplotlib: hours of steps are worth more than a picture
            self.say(f"warning: a picture of the training cannot be drawn ({one_line(error)})")


def split(run: Run, cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Cases to train on, and those kept aside, of which no bent copy is trained on either."""
    aside = run.recipe.data.kept_aside(case.name for case in cases if not case.bent_from)
    trained = [case for case in cases if not aside & case.origins]
    copies = len(cases) - len(trained) - len(aside)
    if copies:
        run.say(f"{copies} bent scan(s) of cases kept aside, or in their shapes, are left out")
    if cases and not trained:
        raise UserError(
            f"data.validation keeps all {len(cases)} labelled case(s) aside; leave some to train on"
        )
    names = [case.name for case in cases]
    unknown = sorted(p for p in run.recipe.finetune.repeats if not fnmatch.filter(names, p))
    if unknown:
        run.say(f"warning: finetune.repeats: no case of this name: {', '.join(unknown)}")
    return trained, [case for case in cases if case.name in aside]

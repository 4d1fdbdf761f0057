"""The folder layouts in which training sets come.

- ours: ``images/NAME_0000.nii.gz``, ``labels/NAME.nii.gz`` and a ``cases.json`` there or one
  folder up that names each case's organs; a folder with ``images/`` alone is for pre-training;
- nnU-Net's raw layout: ``imagesTr``, ``labelsTr``, ``dataset.json``, whose label names are
  mapped to ours;
- the challenge's: ``images`` and ``labels`` whose files are named ``FLARE…``, all 13 organs,
  or a plain folder of ``NAME_0000.nii.gz`` (its unlabelled part); the folder above them too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flare_clef.errors import UserError
from flare_clef.organs import ORGAN_BY_NAME, ORGANS
from flare_clef.scan_files import strip_suffix
from flare_clef.training.cases import Case
from flare_clef.training.doubt import UNDECIDED

_CHANNEL = "_0000"
_ALL_ORGANS = tuple(organ.name for organ in ORGANS)
_SYNONYMS = {
    "kidney_right": "right_kidney",
    "kidney_left": "left_kidney",
    "r_kidney": "right_kidney",
    "l_kidney": "left_kidney",
    "rk": "right_kidney",
    "lk": "left_kidney",
    "ivc": "inferior_vena_cava",
    "postcava": "inferior_vena_cava",
    "vena_cava": "inferior_vena_cava",
    "vena_cava_inferior": "inferior_vena_cava",
    "adrenal_gland_right": "right_adrenal_gland",
    "adrenal_gland_left": "left_adrenal_gland",
    "right_adrenal": "right_adrenal_gland",
    "left_adrenal": "left_adrenal_gland",
    "rag": "right_adrenal_gland",
    "lag": "left_adrenal_gland",
    "gall_bladder": "gallbladder",
    "oesophagus": "esophagus",
}


@dataclass(frozen=True)
class Dataset:
    """The cases of a folder, sorted by name, and what is wrong with it, a line each."""

    cases: tuple[Case, ...]
    problems: tuple[str, ...] = ()


def read_datasets(folders: Sequence[Path]) -> Dataset:
    """The cases of several folders; two of the same name are refused, the first is kept."""
    cases: dict[str, Case] = {}
    problems: list[str] = []
    for folder in folders:
        try:
            dataset = read_dataset(folder)
        except UserError as error:
            problems.append(str(error))
            continue
        problems += dataset.problems
        for case in dataset.cases:
            if case.name in cases:
                first = cases[case.name].image
                problems.append(f"{case.image}: a case {case.name} is in {first} too; rename one")
            else:
                cases[case.name] = case
    return Dataset(tuple(cases.values()), tuple(problems))


def read_dataset(folder: Path) -> Dataset:
    """The cases of ``folder``, whatever its layout. Raises UserError if it has none of them."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check the path")
    if (folder / "dataset.json").is_file() or (folder / "imagesTr").is_dir():
        return _read_nnunet(folder)
    if (folder / "images").is_dir() or (folder / "labels").is_dir():
        return _read_ours(folder)
    plain = _images(folder)
    if plain:
        sources = _sources(folder)
        cases = [Case(n, p, None, (), source=sources.get(n, "")) for n, p in plain.items()]
        return Dataset(tuple(cases))
    parts = [part for part in sorted(folder.iterdir()) if _is_challenge_part(part)]
    if parts:
        return read_datasets(parts)
    raise UserError(
        f"{folder}: neither images/ nor imagesTr/ nor NAME_0000.nii.gz in it; see docs/training.md "
        "for the layouts"
    )


def _is_challenge_part(folder: Path) -> bool:
    return folder.is_dir() and folder.name.startswith("FLARE") and any(folder.iterdir())


def _files(folder: Path, name_of: Callable[[str], str] = str) -> dict[str, Path]:
    """Image files of ``folder`` by what ``name_of`` makes of their stem, sorted; '': left out.

    Raises UserError where two have the same name.
    """
    if not folder.is_dir():
        return {}
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        stem, suffix = strip_suffix(path.name)
        if not suffix or path.name.startswith(".") or not (name := name_of(stem)):
            continue
        if name in found:
            raise UserError(f"{path}: {found[name].name} beside it is of the same case; remove one")
        found[name] = path
    return found


def _images(folder: Path) -> dict[str, Path]:
    """``NAME_0000.nii.gz`` files by NAME; files without the channel's number are not images."""
    return _files(folder, lambda s: s.removesuffix(_CHANNEL) if s.endswith(_CHANNEL) else "")


def _pair(images: dict[str, Path], labels: dict[str, Path]) -> tuple[list[Case], list[str]]:
    """Cases without organs yet, and a line for each label map without an image."""
    cases = [Case(name, path, labels.get(name), ()) for name, path in images.items()]
    folder = next(iter(images.values())).parent if images else Path("images")
    lonely = [
        f"{path}: a label map without an image; {folder.name}/{name}{_CHANNEL}.nii.gz is missing"
        for name, path in labels.items()
        if name not in images
    ]
    return cases, lonely


def _read_ours(folder: Path) -> Dataset:
    # In a folder of this name a file without the channel's number is an image all the same.
    images = _files(folder / "images", lambda stem: stem.removesuffix(_CHANNEL))
    labels = _files(folder / "labels")
    cases, problems = _pair(images, labels)
    if not images:
        problems.insert(0, f"{folder / 'images'}: no image (NAME_0000.nii.gz) in it")
    entries, listed = _read_cases_json(folder)
    if entries is None:
        if labels and all(name.startswith("FLARE22") for name in labels):
            entries = {name: {"organs": list(_ALL_ORGANS)} for name in labels}
        elif labels:
            raise UserError(
                f"{folder}: no cases.json here or above it; it names each case's organs"
            )
        else:
            entries = {}
    chances = _files(folder / "probabilities")
    kept = []
    for case in cases:
        entry = entries.get(case.name, {})
        entry = entry if isinstance(entry, dict) else {}
        organs, source = entry.get("organs", []), str(entry.get("source") or "")
        propagated = entry.get("propagated", [])
        problem = None if case.labels is None else _organs_problem(organs)
        if not isinstance(propagated, list):
            problem = f'has "propagated": {json.dumps(propagated)}; must be a list of organs'
        if problem:
            problems.append(f"{listed}: case {case.name} {problem}")
        else:
            named = tuple(organs) if case.labels is not None and organs else ()
            if case.labels is None and organs:
                problems.append(
                    f"{listed}: case {case.name} names organs, but {folder / 'labels'} has no "
                    f"{case.name}.nii.gz; taken as a scan without labels"
                )
            made = tuple(organ for organ in propagated if organ in named)
            if made and case.name in chances:
                case = replace(case, propagated=made[0], chances=chances[case.name])
            case = replace(case, propagated_before=made[bool(case.propagated) :])
            scan, shapes = (str(entry.get(key) or "") for key in ("bent_from", "shapes_of"))
            case = replace(case, organs=named, source=source, bent_from=scan, shapes_of=shapes)
            kept.append(case)
    return Dataset(tuple(kept), tuple(problems))


def _organs_problem(organs: Any) -> str | None:
    if not isinstance(organs, list) or not organs:
        return 'has a label map, but no "organs": ["liver", ...] here says what is labelled'
    unknown = [organ for organ in organs if organ not in _ALL_ORGANS]
    if unknown:
        return f"names unknown organs {unknown}; known are {', '.join(_ALL_ORGANS)}"
    return None


def _read_cases_json(folder: Path) -> tuple[dict[str, Any] | None, Path]:
    """Entries by case name. One file may serve several folders: a table for each, by its name."""
    here, above = folder / "cases.json", folder.resolve().parent / "cases.json"
    listed = here if here.is_file() or not above.is_file() else above
    if not listed.is_file():
        return None, listed
    entries = read_json(listed)
    own = entries.get(folder.resolve().name, entries)
    if not isinstance(own, dict):
        raise UserError(f"{listed}: {folder.name}: must be a table of cases")
    return own, listed


def _sources(folder: Path) -> dict[str, str]:
    """Where the scans of a folder without labels are from, as a ``cases.json`` near it says."""
    if folder.resolve().name == "images":
        folder = folder.resolve().parent
    entries, _ = _read_cases_json(folder)
    return {
        name: str(entry.get("source") or "")
        for name, entry in (entries or {}).items()
        if isinstance(entry, dict)
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object")
    return value


def _read_nnunet(folder: Path) -> Dataset:
    listed = folder / "dataset.json"
    description = read_json(listed)
    channels = description.get("channel_names", description.get("modality", {"0": "CT"}))
    if not isinstance(channels, (dict, list)):
        raise UserError(
            f'{listed}: channel_names is {json.dumps(channels)}; must be as {{"0": "CT"}}'
        )
    stems = _files(folder / "imagesTr")
    others = [stem for stem in stems if not stem.endswith(_CHANNEL)]
    if len(channels) != 1 or any(stem.removesuffix("_0001") in _names(stems) for stem in others):
        raise UserError(f"{listed}: several modalities {channels}; one CT is needed")
    cases, problems = _pair(_images(folder / "imagesTr"), _files(folder / "labelsTr"))
    problems += [f"{stems[s]}: not named NAME{_CHANNEL}; rename it" for s in others]
    if not any(case.labels for case in cases):
        return Dataset(tuple(cases), tuple(problems))
    renumbering = _renumbering(description.get("labels"), listed)
    by_index = {organ.index: organ.name for organ in ORGANS}
    organs = tuple(by_index[ours] for _, ours in sorted(renumbering) if ours in by_index)
    source = str(description.get("name", folder.name))
    kept = (
        case
        if case.labels is None
        else replace(case, organs=organs, source=source, renumbering=renumbering)
        for case in cases
    )
    return Dataset(tuple(kept), tuple(problems))


def _names(stems: dict[str, Path]) -> set[str]:
    return {stem.removesuffix(_CHANNEL) for stem in stems if stem.endswith(_CHANNEL)}


def _renumbering(labels: Any, listed: Path) -> tuple[tuple[int, int], ...]:
    """(their value, ours) from dataset.json's ``labels``, ``name: value`` or ``value: name``."""
    if not isinstance(labels, dict) or not labels:
        raise UserError(f'{listed}: no "labels"; it names the organ of each value')
    ours: dict[int, int] = {}
    unknown = []
    for key, value in labels.items():
        name, number = (value, key) if isinstance(value, str) else (key, value)
        if isinstance(number, list):
            raise UserError(f"{listed}: labels: {name} is a region of several values; give one")
        if not str(number).isdecimal() or int(number) > 255:
            raise UserError(f"{listed}: labels: {name} = {number!r}; must be 0 to 255")
        index = _index_of(name)
        if index is None:
            unknown.append(name)
        elif index and not int(number):
            raise UserError(f"{listed}: labels: {name} = 0; 0 is the background")
        elif ours.get(int(number), index) != index:
            raise UserError(f"{listed}: labels: {name} = {number}, and another too; one a value")
        elif index in ours.values() and index not in (0, UNDECIDED):
            raise UserError(f"{listed}: labels: two of them mean {_ALL_ORGANS[index - 1]}")
        else:
            ours[int(number)] = index
    if unknown:
        raise UserError(
            f"{listed}: labels: unknown {', '.join(map(repr, unknown))}; known are "
            f"{', '.join(_ALL_ORGANS)}; set other structures to 0 in the label maps"
        )
    return tuple(sorted({0: 0, **ours}.items()))


def _index_of(name: str) -> int | None:
    """Our value for a label's name in whatever spelling; None if we know no such organ."""
    plain = "_".join(name.lower().replace("-", " ").replace("_", " ").split())
    if plain == "background":
        return 0
    if plain == "ignore":
        return UNDECIDED
    organ = ORGAN_BY_NAME.get(_SYNONYMS.get(plain, plain))
    return organ.index if organ else None

"""The store of prepared volumes: made once, in parallel, kept by content, mapped from disk.

An entry is a folder ``NAME-KEY`` with ``image.npy`` (float16), ``labels.npy`` (uint8) and
``record.json``. KEY is a hash of the files' content, the numbering, the grid and the format,
so a changed label map makes a new entry. An entry is made under a hidden name and renamed
when it is whole; what was broken off is made again, the rest is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flare_clef.errors import UserError
from flare_clef.images import Image, read_image
from flare_clef.limits import available_memory_bytes, usable_cores
from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.preparation import prepare
from flare_clef.scan_files import files_of
from flare_clef.training.cases import (
    IMAGE_FILE,
    LABELS_FILE,
    Case,
    PreparedCase,
    check_pair,
    histogram,
    place_labels,
    read_labels,
)
from flare_clef.training.checking import problems_of, warnings_of
from flare_clef.training.doubt import with_doubt

STORE_FORMAT = 5
_CHECKSUMS = "checksums.json"
_MEMORY_PER_WORKER = 2 << 30
"""What a scan of 512 x 512 x 600 needs on its way into the store, with room to spare."""


@dataclass(frozen=True)
class Made:
    """A prepared case and what should be looked at, a line each with the file's name."""

    prepared: PreparedCase
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Preparation:
    """What :func:`prepare_all` came to, in the order of the cases."""

    prepared: list[PreparedCase]
    problems: list[str]
    """A line for each thing that is wrong; such cases are not in ``prepared``."""
    warnings: list[str]


def prepare_all(
    cases: Sequence[Case],
    folder: Path,
    grid: int,
    *,
    workers: int | None = None,
    on_case: Callable[[Case], None] = lambda case: None,
) -> Preparation:
    """Prepares every case of a training set; the bad ones are all named, the others done.

    ``workers``: scans worked on at once, by default as many as cores and memory allow; they
    are threads, since reading, decompressing and resizing all run outside Python's lock.
    ``on_case`` is called after each, from any of them.
    """
    if workers is None:
        room = available_memory_bytes() // _MEMORY_PER_WORKER
        workers = max(1, min(usable_cores(), room))
    store = Store(folder, grid)

    def one(case: Case) -> Made | list[str]:
        try:
            return store.prepare(case)
        except CaseProblems as error:
            return error.lines
        except UserError as error:
            return [str(error)]
        finally:
            on_case(case)

    preparation = Preparation([], [], [])
    pool = ThreadPoolExecutor(max_workers=workers)
    try:
        for result in pool.map(one, cases):
            if isinstance(result, Made):
                preparation.prepared.append(result.prepared)
                preparation.warnings.extend(result.warnings)
            else:
                preparation.problems.extend(result)
    finally:
        pool.shutdown(cancel_futures=True)
        store.save_checksums()
    return preparation


class CaseProblems(UserError):
    """A case with more than one fault; its text is the first line."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(lines[0])
        self.lines = lines


class Store:
    """Prepared volumes of one grid under ``folder``. Safe to share among threads."""

    def __init__(self, folder: Path, grid: int) -> None:
        self.folder, self.grid = folder, grid
        with _disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _remove_broken_off(folder)
        self._lock = threading.Lock()
        self._checksums = _read_checksums(folder / _CHECKSUMS)

    def prepare(self, case: Case) -> Made:
        """The entry of ``case``, made if it isn't there. Raises UserError; nothing stays then."""
        entry = self.folder / f"{case.name}-{self._key(case)}"
        record = _read_entry(entry, case)
        if record is None:
            with _disk_errors(entry), _made_beside(entry) as temporary:
                _make(case, self.grid, temporary)
            record = _read_entry(entry, case)
            if record is None:
                raise UserError(f"{entry}: written, but cannot be read back; check the disk")
        spacing = tuple(record["spacing_mm"])
        # Without the file's name on disk: the data may have moved since.
        files = {"image": case.image, "labels": case.labels}
        warnings = tuple(f"{files[kind]}: {text}" for kind, text in record["warnings"])
        return Made(PreparedCase(case, entry, spacing), warnings)

    def _key(self, case: Case) -> str:
        files = [
            self.checksum(file)
            for path in (case.image, case.labels)
            if path is not None
            for file in files_of(path)
        ]
        # What the case claims decides whether it is refused: a refused claim must not be
        # answered by an entry made under another one.
        parts = [STORE_FORMAT, self.grid, *files, sorted(case.organs), case.renumbering]
        if case.chances is not None:
            parts += [case.propagated, self.checksum(case.chances)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def checksum(self, path: Path) -> str:
        """SHA-256 of a file; remembered with size and time, since 2,000 scans are 60 GB."""
        try:
            status = path.stat()
            name, mark = str(path.resolve()), [status.st_size, status.st_mtime_ns]
            with self._lock:
                known = self._checksums.get(name)
            if known and known[:2] == mark:
                return known[2]
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        with self._lock:
            self._checksums[name] = [*mark, digest.hexdigest()]
        return digest.hexdigest()

    def save_checksums(self) -> None:
        """Writes what is known of the files, so that the next start need not read them all."""
        path = self.folder / _CHECKSUMS
        temporary = path.with_name(f".{path.name}.{_mark()}")
        with self._lock, _disk_errors(path):
            try:
                temporary.write_text(json.dumps(self._checksums, indent=0))
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)


def _make(case: Case, grid: int, folder: Path) -> None:
    """Reads, checks and prepares ``case`` into ``folder``."""
    image = read_image(case.image)
    warnings = [("image", warning) for warning in image.warnings]
    labels = None
    if case.labels is not None:
        labels = read_labels(case)
        check_pair(case, image, labels)
    prepared = prepare(image.array, image.direction, grid, spacing_mm=image.spacing_mm)
    if prepared is None:
        raise UserError(f"{case.image}: no voxel above -500 HU, so there is no body in it")
    volume, placement = prepared
    if labels is not None:
        counts, placed = histogram(labels.array), place_labels(labels.array, placement)
        problems = problems_of(case, counts, placed)
        if problems:
            raise CaseProblems([f"{case.labels}: {problem}" for problem in problems])
        warnings += [("labels", warning) for warning in warnings_of(case, counts, placed)]
        if case.chances is not None:
            chance = place_labels(_read_chance(case.chances, labels), placement)
            placed = with_doubt(placed, chance, ORGAN_BY_NAME[case.propagated].index)
        np.save(folder / LABELS_FILE, placed)
    np.save(folder / IMAGE_FILE, volume.to(torch.float16).numpy())
    record = {"spacing_mm": placement.grid_spacing_mm(image.spacing_mm), "warnings": warnings}
    (folder / "record.json").write_text(json.dumps(record))


def _read_chance(path: Path, labels: Image) -> np.ndarray:
    """The probability map of a propagated organ, on the grid of its ``labels``."""
    chance = read_image(path).array
    if chance.shape != labels.array.shape or chance.dtype != np.uint8:
        raise UserError(
            f"{path}: {chance.shape} voxels (z, y, x) of {chance.dtype}, its labels "
            f"{labels.array.shape} of uint8; run train propagate again"
        )
    return chance


def _read_entry(entry: Path, case: Case) -> dict[str, Any] | None:
    """The record of a whole entry; None if there is none or one of its files is damaged."""
    try:
        record = json.loads((entry / "record.json").read_text())
        for name in (IMAGE_FILE, LABELS_FILE)[: 1 if case.labels is None else 2]:
            np.load(entry / name, mmap_mode="r")
    except (OSError, ValueError):
        return None
    return record


def _mark() -> str:
    return f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


@contextlib.contextmanager
def _made_beside(entry: Path) -> Iterator[Path]:
    """A hidden folder that takes the place of ``entry`` when all went well."""
    temporary = entry.with_name(f".{entry.name}.{_mark()}")
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(entry, ignore_errors=True)
        try:
            os.replace(temporary, entry)
        except OSError:
            # Another process made the same entry meanwhile; its content is the same.
            if not entry.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_broken_off(folder: Path) -> None:
    """Removes what processes of this machine left behind that run no more."""
    for path in folder.glob(f".*.{socket.gethostname()}.*.tmp"):
        owner = path.name.split(".")[-3]
        if owner.isdigit() and not _runs(int(owner)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _read_checksums(path: Path) -> dict[str, list[Any]]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); is the disk full?"
        ) from None

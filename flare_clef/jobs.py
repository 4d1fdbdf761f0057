"""Which scan's labels go to which file, and what is refused before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flare_clef.errors import UsageError, UserError
from flare_clef.formats import ENDINGS, SUFFIX_OF
from flare_clef.organs import ORGANS
from flare_clef.paths import check_name
from flare_clef.scan_files import SUFFIXES, find_inputs, output_name, strip_suffix

_FOREIGN = (
    ".dcm", ".png", ".jpg", ".npy", ".npz", ".gz", ".zip", ".json", ".csv", ".txt", ".stl", ".hdr",
    ".img",
)  # fmt: skip
"""Suffixes that a folder's name has by mistake alone."""
_SAME_PLACE_MM = 0.1
"""So far apart the first voxels of a scan and of its labels may be: formats round."""
_APART = "give each folder of scans a folder of labels of its own"


@dataclass(frozen=True)
class Job:
    """One scan and the file that its labels go to."""

    source: Path
    target: Path

    @property
    def case(self) -> str:
        name = self.target.name
        return strip_suffix(name)[0].removesuffix(".seg").removesuffix(".dcm")


def plan_jobs(
    source: Path,
    target: Path,
    form: str | None = None,
    *,
    files_beside: bool = False,
    masks: bool = False,
) -> list[Job]:
    """Jobs for INPUT and OUTPUT of the command line. Raises UserError before anything runs.

    A file in: a file or folder out (a folder is what exists as one, or has no suffix of an
    image). A folder in: a folder out. Two inputs with the same output are refused, and so is
    an output that would overwrite an input or lie in a DICOM series. ``form``: one of
    ``SUFFIX_OF``; by default the input's own format, NIfTI for DICOM. ``files_beside``: files
    named after the case are written beside the labels, so that no two cases may share a name.
    ``masks``: a folder of that name is, too, which must be no input.
    """
    ending = _ending(form)
    check_name(target)
    inputs = find_inputs(source)
    one = len(inputs) == 1 and inputs[0] == source
    suffix = "" if target.is_dir() else strip_suffix(target.name)[1]
    if ending == ".dcm" and target.suffix == ".dcm":
        suffix = ".dcm"
    if suffix.lower() in (".mhd", ".nhdr"):
        raise UserError(f"{target}: labels are written as .nii.gz, .nii, .mha or .nrrd")
    if suffix and form and not target.name.lower().endswith(ENDINGS[form]):
        raise UsageError(f"{target}: --format {form} writes {ending} files; rename the output")
    if suffix and not one:
        raise UserError(
            f"{target}: {source} is a folder of {len(inputs)} scan(s), so the output must be a "
            "folder, not a file"
        )
    if target.is_file() and not suffix:
        raise UserError(f"{target}: is a file of another kind; labels go to {' '.join(SUFFIXES)}")
    if not suffix and not target.is_dir() and target.suffix.lower() in _FOREIGN:
        hint = "; for DICOM add --format dicom-seg" if target.suffix.lower() == ".dcm" else ""
        raise UserError(
            f"{target}: labels are written as .nii.gz, .nii, .mha or .nrrd, or into a folder{hint}"
        )
    if not one and target.resolve() == source.resolve():
        raise UserError(
            f"{target}: the labels would lie among the scans, and the next run would take them "
            "for scans; choose another folder"
        )
    jobs = [Job(path, target if suffix else target / output_name(path, ending)) for path in inputs]
    _check_clashes(jobs, files_beside=files_beside, masks=masks)
    return jobs


def _check_clashes(jobs: Sequence[Job], *, files_beside: bool, masks: bool) -> None:
    """Raises UserError where an output would be written twice, or over or into an input."""
    writers: dict[Path, Path] = {}
    taken = {job.source.resolve(): job.source for job in jobs}
    for job in jobs:
        named = job.target.with_name(job.case)
        for place in (job.target, named) if files_beside else (job.target,):
            other = writers.setdefault(place, job.source)
            if other is not job.source:
                raise UserError(
                    f"{place}: both {other.name} and {job.source.name} would be written there; "
                    "rename one of them"
                )
        if job.target.resolve() in taken:
            raise UserError(
                f"{job.target}: the labels would overwrite this input; choose another folder"
            )
        # The next run would take labels there for the scan.
        series = taken.get(job.target.resolve().parent)
        if masks:
            series = series or taken.get(named.resolve())
        if series is not None:
            raise UserError(
                f"{job.target}: files would be written into the DICOM series {series}; choose "
                "another folder"
            )


def is_there(
    job: Job,
    *,
    organs: Sequence[str] | None = None,
    report: bool = False,
    split: bool = False,
    probabilities: bool = False,
) -> bool:
    """Whether a run has left all files of ``job``: masks of ``organs`` (None: all) if ``split``."""
    beside = {
        f"{job.case}.report.html": report,
        f"{job.case}.png": report,
        f"{job.case}.probabilities.npz": probabilities,
    }
    wanted = [job.target.with_name(name) for name, asked in beside.items() if asked]
    if split:
        suffix = strip_suffix(job.target.name)[1] or ".nii.gz"
        names = [organ.name for organ in ORGANS] if organs is None else organs
        wanted += [job.target.with_name(job.case) / f"{name}{suffix}" for name in names]
    return all(path.exists() for path in (job.target, *wanted))


def of_another_scan(job: Job) -> str:
    """In words, why the label map that is there cannot be of this scan; empty where it may be.

    Their headers are compared: series of many patients share a name, and so a place for labels.
    """
    from flare_clef.dicom import frame_of_reference
    from flare_clef.images import read_place

    if job.target.suffix == ".dcm":
        own, other = frame_of_reference(job.source), frame_of_reference(job.target)
        if not (own and other) or own == other:
            return ""
        return (
            f"{job.target}: exists, but refers to another scan than {job.source} (frame of "
            f"reference {other}, not {own}); {_APART}"
        )
    try:
        size, origin_mm = read_place(job.source)
        found, place_mm = read_place(job.target)
    except UserError:  # damage is told when the scan is read
        return ""
    gaps_mm = [abs(a - b) for a, b in zip(origin_mm, place_mm, strict=False)]
    if size == found and max(gaps_mm) <= _SAME_PLACE_MM:
        return ""
    seen, expected = (
        f"{' x '.join(map(str, n))} voxels from {', '.join(f'{x:.1f}' for x in at)} mm"
        for n, at in ((found, place_mm), (size, origin_mm))
    )
    return (
        f"{job.target}: exists, but is of another scan than {job.source} "
        f"({seen}, not {expected}); {_APART}"
    )


def _ending(form: str | None) -> str | None:
    if form is None:
        return None
    if form not in SUFFIX_OF:
        raise UsageError(f"--format {form}: unknown; known are {', '.join(SUFFIX_OF)}")
    return SUFFIX_OF[form]


def shard(jobs: Sequence[Job], part: str) -> list[Job]:
    """Every N-th job from K on, for ``part`` = ``K/N`` with K from 0 to N - 1."""
    index, _, count = part.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"--shard {part}: expected K/N with K from 0 to N-1, such as 0/4")
    return list(jobs[int(index) :: int(count)])

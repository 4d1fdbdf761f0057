"""``flare-clef predict``: a thin skin on the modules ``jobs``, ``batch`` and ``segmenter``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flare_clef.commands.options import MACHINE, DeviceOption, PrecisionOption, WeightsOption

if TYPE_CHECKING:
    from flare_clef.batch import CaseResult
    from flare_clef.jobs import Job
    from flare_clef.progress import Progress
    from flare_clef.resources import ConsecutiveStages

LABELS, BESIDE = "The labels", "Beside the labels"
_POSTPROCESS = ("none", "strays", "largest")


def predict(
    input: Annotated[
        Path,
        typer.Argument(
            help="A scan in HU (.nii .nii.gz .mha .mhd .nrrd .nhdr), a folder of scans, or a "
            "folder of one DICOM series.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            help="For one scan a file or a folder, else a folder. X_0000.nii.gz becomes X.nii.gz.",
            show_default=False,
        ),
    ],
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    weights: WeightsOption = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=MACHINE,
            help="CPU threads; by default the cores this process may use.",
        ),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=MACHINE,
            help="Memory to stay under, such as 2G or 1500M: on the CPU RAM above the loaded "
            "program (default: what is free), on a GPU device memory (default: 2048M, estimated).",
        ),
    ] = None,
    organs: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…",
            rich_help_panel=LABELS,
            help="Only these organs, such as liver,spleen; by default all 13.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite/--skip-existing",
            help="What to do where all files asked for exist, whatever they hold.",
        ),
    ] = True,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Only every N-th case from the K-th on (K = 0 … N-1), for job arrays; by "
            "default all.",
        ),
    ] = None,
    measurements: Annotated[
        bool,
        typer.Option(
            "--measurements",
            rich_help_panel=BESIDE,
            help="Write measurements.csv and .json: volume in ml, HU, box in mm, parts, hints.",
        ),
    ] = False,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            rich_help_panel=BESIDE,
            help="Write NAME.report.html and NAME.png: planes, surfaces, table. Needs the extra "
            "'report'.",
        ),
    ] = False,
    split: Annotated[
        bool,
        typer.Option("--split", rich_help_panel=BESIDE, help="Write one mask an organ to NAME/."),
    ] = False,
    probabilities: Annotated[
        bool,
        typer.Option(
            "--probabilities",
            rich_help_panel=BESIDE,
            help="Write NAME.probabilities.npz: 13 maps of 192^3, 92 MB in memory and up to "
            "368 MB a case kept for it.",
        ),
    ] = False,
    label_tables: Annotated[
        bool,
        typer.Option(
            "--label-tables",
            rich_help_panel=BESIDE,
            help="Write names and colours for ITK-SNAP and 3D Slicer beside the labels.",
        ),
    ] = False,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="nifti|nrrd|mha|dicom-seg",
            rich_help_panel=LABELS,
            help="Format of the labels; by default the input's, NIfTI for DICOM. dicom-seg needs "
            "a DICOM series and the extra 'dicom'.",
        ),
    ] = None,
    postprocess: Annotated[
        str,
        typer.Option(
            metavar="none|strays|largest",
            rich_help_panel=LABELS,
            help="strays: small parts apart from an organ's main part go; largest: all but the "
            "largest part of each organ but the aorta; none: all parts stay.",
        ),
    ] = "strays",
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.json",
            help="Measure time, RAM, CPU and GPU every 0.1 s, by case and stage.",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object a case on stdout, with volumes in ml.")
    ] = False,
) -> None:
    """Segment scans: 13 organs as labels 1-13 on each scan's own grid."""
    from flare_clef import batch
    from flare_clef.jobs import is_there, of_another_scan, plan_jobs
    from flare_clef.jobs import shard as take_shard
    from flare_clef.organs import organ_indices
    from flare_clef.paths import check_writable
    from flare_clef.progress import Progress
    from flare_clef.scan_files import passed_over

    limit_bytes = _bytes(memory_limit) if memory_limit is not None else None
    names = [name.strip() for name in organs.split(",")] if organs is not None else None
    wanted = organ_indices(names)
    beside = {"report": report, "split": split, "probabilities": probabilities}
    files_beside = measurements or any(beside.values())
    jobs = plan_jobs(input, output, form, files_beside=files_beside, masks=split)
    folder = jobs[0].target.parent
    _check_outputs(jobs, form, postprocess, report=report)
    if shard is not None:
        jobs = take_shard(jobs, shard)
    stages = _start_profile(profile, device) if profile is not None else None
    progress = Progress(len(jobs), quiet=quiet)
    results: list[CaseResult] = []
    if aside := passed_over(input, output):
        progress.line(
            f"note: {len(aside)} sub-folder(s) of {input} hold scans too and are left out, the "
            f"first is {aside[0].name}; give such a folder by itself"
        )

    def on_stage(job: Job, stage: str) -> None:
        progress.stage(job.case, stage)
        if stages is not None:
            stages.begin(job.case, stage)

    def on_result(result: CaseResult) -> None:
        results.append(result)
        _report(result, progress, json=json, number=len(results), total=len(jobs))

    files = None
    if measurements:
        from flare_clef.measurement_files import MeasurementFiles

        files = MeasurementFiles(folder, part=shard or "", keep=not overwrite)
    todo, anew = [], []
    for job in jobs:
        labelled = not overwrite and job.target.exists()
        if labelled and (problem := of_another_scan(job)):
            on_result(batch.CaseResult(job, error=problem))
            continue
        known = files is None or files.knows(job.case, job.target)
        if overwrite or not known or not is_there(job, organs=names, **beside):
            todo.append(job)
            anew += [job.target] if labelled else []
        else:
            on_result(batch.CaseResult(job, status="skipped"))
    if anew:
        progress.line(
            f"note: {len(anew)} label map(s) are made anew, since other files asked for are "
            f"missing or of other labels; the first is {anew[0]}"
        )
    if todo or label_tables:
        # Made when there is something to write: of a wrong option nothing is left behind.
        check_writable(folder, make=False)
    if files is not None:
        files.gather()
    if todo:
        # The first scan is read while torch is still being imported.
        reader = batch.Reader(todo)
        from flare_clef.extras import Extras
        from flare_clef.segmenter import Segmenter

        extras = Extras(
            organs=wanted,
            largest=postprocess == "largest",
            report=report,
            split=split,
            probabilities=probabilities,
            measurements=files,
        )
        segmenter = Segmenter(
            weights,
            device=device,
            precision=precision,
            threads=threads,
            memory_limit_bytes=limit_bytes,
            keep_strays=postprocess != "strays",
        )
        progress.line(
            f"{segmenter.device} ({segmenter.device_reason}), "
            f"{segmenter.precision} ({segmenter.precision_reason}), {segmenter.threads} thread(s)"
        )
        batch.run(
            todo,
            reader,
            segmenter,
            organs=names,
            on_stage=on_stage,
            on_result=on_result,
            measure_volumes=json,
            extras=extras,
        )
    if label_tables:
        from flare_clef.extras import write_label_tables

        write_label_tables(folder)
    progress.close()
    if stages is not None and profile is not None:
        stages.end()
        stages.profiler.stop()
        stages.profiler.write_json(profile)
    _summary(results, progress)


def _start_profile(path: Path, device: str) -> ConsecutiveStages:
    """Starts measuring this process. Raises UserError where ``path`` cannot be written to."""
    from flare_clef.errors import UserError
    from flare_clef.paths import check_writable
    from flare_clef.resources import ConsecutiveStages, ResourceProfiler

    check_writable(path.parent)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; --profile takes the name of a file")
    number = device.partition(":")[2]
    profiler = ResourceProfiler(gpu_index=int(number) if number.isdecimal() else 0)
    profiler.start()
    return ConsecutiveStages(profiler)


def _check_outputs(jobs: list[Job], form: str | None, postprocess: str, *, report: bool) -> None:
    """What can be known to fail before anything is computed. Raises UserError."""
    from importlib.util import find_spec

    from flare_clef.errors import UsageError, UserError

    if postprocess not in _POSTPROCESS:
        known = ", ".join(_POSTPROCESS)
        raise UsageError(f"--postprocess {postprocess}: unknown; known are {known}")
    if report and find_spec("PIL") is None:
        raise UserError('--report: Pillow is missing; pip install "flare-clef[report]"')
    if form == "dicom-seg" and find_spec("highdicom") is None:
        raise UserError('--format dicom-seg: highdicom is missing; pip install "flare-clef[dicom]"')
    if form == "dicom-seg" and not any(job.source.is_dir() for job in jobs):
        raise UserError(f"{jobs[0].source}: --format dicom-seg needs a folder of one DICOM series")


def _report(result: CaseResult, progress: Progress, *, json: bool, number: int, total: int) -> None:
    place = f"[{number}/{total}]"
    if result.status == "failed":
        progress.line(f"{place} failed: {result.error}", error=True)
    elif result.status == "skipped":
        progress.line(f"{place} {result.job.target}: exists, skipped")
    else:
        for warning in result.warnings:
            progress.line(f"{place} warning: {result.job.source}: {warning}")
        parts = ", ".join(f"{stage} {s:.1f}" for stage, s in result.seconds.items())
        progress.line(
            f"{place} {result.job.target}  {sum(result.seconds.values()):.1f} s ({parts})"
        )
    progress.case_done()
    if json:
        import json as encoder

        print(
            encoder.dumps(
                {
                    "case": result.job.case,
                    "input": str(result.job.source),
                    "output": str(result.job.target) if result.status != "failed" else None,
                    "status": result.status,
                    "error": result.error or None,
                    "warnings": list(result.warnings),
                    "seconds": result.seconds,
                    "volume_ml": result.volume_ml,
                }
            ),
            flush=True,
        )


def _summary(results: list[CaseResult], progress: Progress) -> None:
    from flare_clef.errors import EXIT_FAILED

    counts = {s: sum(r.status == s for r in results) for s in ("done", "skipped", "failed")}
    if len(results) != 1:
        parts = [f"{n} {status}" for status, n in counts.items() if n or status == "done"]
        progress.line(f"{len(results)} case(s): {', '.join(parts)}", error=counts["failed"] > 0)
    if counts["failed"]:
        raise typer.Exit(EXIT_FAILED)


def _bytes(text: str) -> int:
    import re

    from flare_clef.errors import UsageError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"--memory-limit {text}: expected a size such as 2G or 1500M")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))

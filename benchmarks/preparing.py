"""Seconds to prepare a scan for training, and what loading and augmenting take of a step.

    python benchmarks/preparing.py [--scan SCAN --labels LABELS] [--grids 96 192] [--cases 6]

Default: a made-up scan of 512 x 512 x 160 whose labels are slabs of it. Every grid's loader and
step are timed in turn, in the same run. The loader works beside the step in a training, so what
it costs is its share of the cores' time; that also holds on a machine with other work to do.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import SimpleITK as sitk
import torch
from measuring import scan_of

from flare_clef.images import read_image
from flare_clef.limits import keep_memory, usable_cores
from flare_clef.network import SegmentationNetwork
from flare_clef.organs import ORGANS
from flare_clef.preparation import prepare
from flare_clef.training.augmentation import AugmentationSettings, augment
from flare_clef.training.cases import Case, PreparedCase, place_labels, read_labels
from flare_clef.training.losses import softmax_dice_loss
from flare_clef.training.preparing import prepare_all

ALL = tuple(organ.name for organ in ORGANS)


def made_up(folder: Path) -> tuple[Path, Path]:
    """A scan, and labels with the right kidney and the liver on the patient's right."""
    scan = scan_of(160, folder / "scan_0000.nii.gz")
    image = sitk.ReadImage(str(scan))
    labels = np.zeros((160, 512, 512), np.uint8)
    for organ in ORGANS:
        left = organ.name in ("left_kidney", "spleen")
        columns = slice(320, 400) if left else slice(120, 200)
        labels[10 * organ.index : 10 * organ.index + 10, 200:300, columns] = organ.index
    out = sitk.GetImageFromArray(labels)
    out.CopyInformation(image)
    path = folder / "scan.nii.gz"
    sitk.WriteImage(out, str(path), True, 1)
    return scan, path


def seconds_of(work, times: int) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """Median wall time of ``work``, and its mean time on all cores together."""
    taken = []
    on_cores = time.process_time()
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken), (time.process_time() - on_cores) / times


def report_parts(case: Case) -> None:
    began = time.perf_counter()
    image = read_image(case.image)
    read_scan = time.perf_counter()
    labels = read_labels(case)
    read_map = time.perf_counter()
    prepared = prepare(image.array, image.direction, spacing_mm=image.spacing_mm)
    assert prepared is not None, "no body in this scan"
    resized = time.perf_counter()
    place_labels(labels.array, prepared[1])
    placed = time.perf_counter()
    print(
        f"scan {image.array.shape} (z, y, x): read {read_scan - began:.2f} s, "
        f"labels {read_map - read_scan:.2f} s, prepare {resized - read_map:.2f} s, "
        f"place labels {placed - resized:.2f} s"
    )


def report_store(case: Case, count: int, folder: Path) -> PreparedCase:
    cases = [Case(f"c{k}", case.image, case.labels, case.organs) for k in range(count)]
    for workers in (1, usable_cores()):
        store = folder / f"store{workers}"
        began = time.perf_counter()
        result = prepare_all(cases, store, 192, workers=workers)
        seconds = time.perf_counter() - began
        assert not result.problems, result.problems
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{count} scans at 192^3, {workers} at once: {seconds / count:.2f} s a scan, "
            f"peak {peak:.0f} MiB"
        )
        began = time.perf_counter()
        prepare_all(cases, store, 192, workers=workers)
        print(f"  again, all there: {(time.perf_counter() - began) / count * 1000:.1f} ms a scan")
    return result.prepared[0]


def report_share(prepared: PreparedCase, grid: int, times: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def load() -> tuple[torch.Tensor, torch.Tensor]:
        return augment(
            torch.from_numpy(prepared.image.copy()),
            torch.from_numpy(prepared.labels.copy()),
            (grid,) * 3,
            AugmentationSettings(),
            generator,
        )

    torch.manual_seed(0)
    network = SegmentationNetwork().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    image, labels = load()

    def step() -> None:
        logits = network(image[None, None])
        loss, _ = softmax_dice_loss(logits, labels, prepared.case.labelled)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    (loading, load_cores), (stepping, step_cores) = (
        seconds_of(load, 4 * times),
        seconds_of(step, times),
    )
    print(
        f"{grid}^3: load and augment {loading:.3f} s ({load_cores:.2f} core-seconds), a step in "
        f"fp32 {stepping:.2f} s ({step_cores:.2f}): {100 * load_cores / step_cores:.1f} % of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scan", type=Path)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--grids", type=int, nargs="*", default=[96, 192])
    parser.add_argument("--cases", type=int, default=6)
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(usable_cores())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scan, labels = (arguments.scan, arguments.labels) if arguments.scan else made_up(folder)
        case = Case("case", scan, labels, ALL)
        report_parts(case)
        prepared = report_store(case, arguments.cases, folder)
        for grid in arguments.grids:
            report_share(prepared, grid, 3)


if __name__ == "__main__":
    main()

"""Scoring one pair of label maps: ``flare-clef evaluate`` beside the plain library call.

    python benchmarks/evaluate.py [PREDICTION REFERENCE]

The library is surface-distance (``pip install surface-distance``), called as the challenge's
script calls it: once per organ on the whole volume, for NSD and the Hausdorff distance. Each
side is a process of its own, measured from before it starts. Without files: the labels of a
phantom of 512 x 512 x 160, and the same with each organ's rim and place disturbed.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path

import measuring
import numpy as np
import SimpleITK as sitk

OURS = """
import sys, time
from flare_clef.evaluation_inputs import read_label_map
from flare_clef.limits import usable_cores
from flare_clef.metrics import score_organs
from flare_clef.organs import ORGANS
prediction, reference = (read_label_map(__import__("pathlib").Path(p)) for p in sys.argv[1:3])
import scipy.ndimage, scipy.spatial
began = time.perf_counter()
score_organs(
    prediction.labels, reference.labels, reference.image.spacing_mm,
    [organ.name for organ in ORGANS], "plain", usable_cores(),
)
print(time.perf_counter() - began)
"""

LIBRARY = """
import sys, time, warnings
warnings.simplefilter("ignore")
import SimpleITK as sitk
from surface_distance import (
    compute_robust_hausdorff, compute_surface_dice_at_tolerance, compute_surface_distances
)
from flare_clef.organs import ORGANS
images = [sitk.ReadImage(path) for path in sys.argv[1:3]]
prediction, reference = map(sitk.GetArrayFromImage, images)
spacing_mm = images[1].GetSpacing()[::-1]
began = time.perf_counter()
for organ in ORGANS:
    a, b = reference == organ.index, prediction == organ.index
    if not a.any() or not b.any():
        continue
    distances = compute_surface_distances(a, b, spacing_mm)
    nsd = compute_surface_dice_at_tolerance(distances, organ.nsd_tolerance_mm)
    print(organ.name, nsd, compute_robust_hausdorff(distances, 95))
print(time.perf_counter() - began)
"""


def pair(folder: Path) -> tuple[Path, Path]:
    """A phantom's labels as reference, and a disturbed copy as prediction."""
    from scipy import ndimage

    from flare_clef.phantom import PhantomOptions, make_phantom

    options = PhantomOptions(
        pixel_mm=0.78125, slice_thickness_mm=2.0, field_of_view_mm=400, scan_length_mm=320
    )
    phantom = make_phantom(options)
    noise = np.random.default_rng(0).standard_normal(phantom.labels.shape, dtype=np.float32)
    rough = ndimage.gaussian_filter(noise, (2, 5, 5)) > 0
    moved = np.roll(phantom.labels, (1, 2, -2), (0, 1, 2))
    paths = folder / "prediction.nii.gz", folder / "reference.nii.gz"
    for path, labels in zip(
        paths, (np.where(rough, moved, phantom.labels), phantom.labels), strict=True
    ):
        image = sitk.GetImageFromArray(labels)
        image.SetSpacing(phantom.spacing_mm)
        sitk.WriteImage(image, str(path), True, 1)
    print(f"{' x '.join(map(str, phantom.labels.shape[::-1]))} voxels")
    return paths


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prediction, reference = map(Path, sys.argv[1:3]) if len(sys.argv) > 2 else pair(folder)
        files = [str(prediction), str(reference)]
        ours = measuring.run(
            [sys.executable, "-m", "flare_clef", "evaluate", *files, "--rules", "plain"]
            + ["--output", str(folder / "scores")]
        )
        alone = measuring.run([sys.executable, "-c", OURS, *files])
        library = measuring.run([sys.executable, "-c", LIBRARY, *files])
        for side, cost in (("ours", ours), ("scoring alone", alone), ("library", library)):
            if cost.code:
                raise SystemExit(f"{side} failed:\n{cost.log}")
        with (folder / "scores" / "cases.csv").open() as file:
            scores = {row["organ"]: row for row in csv.DictReader(file)}
    *lines, library_alone = library.log.splitlines()
    ours_alone = float(alone.log)
    print("| | s, whole command | s, scoring alone | MiB peak |\n| --- | --- | --- | --- |")
    for side, cost, seconds in (
        ("`flare-clef evaluate`", ours, ours_alone),
        ("surface-distance", library, float(library_alone)),
    ):
        print(f"| {side} | {cost.seconds:.1f} | {seconds:.1f} | {cost.peak_mib:.0f} |")
    print(
        f"| ratio | {library.seconds / ours.seconds:.1f} | "
        f"{float(library_alone) / ours_alone:.1f} | {ours.peak_mib / library.peak_mib:.2f} |"
    )
    apart = 0.0
    for line in lines:
        organ, nsd, hd95_mm = line.split()
        row = scores[organ]
        apart = max(apart, abs(float(row["nsd"]) - float(nsd)))
        apart = max(apart, abs(float(row["hd95_mm"]) - float(hd95_mm)))
    print(f"figures of {len(lines)} organs differ by at most {apart:.1g}")


if __name__ == "__main__":
    main()

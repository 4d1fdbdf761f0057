#!/bin/sh
# Makes two pictures of docs/images/, of synthetic abdomens (no patient stands behind them):
#   report.png   the report, with the phantom's own labels: it shows the report and not what the
#                weights can do
#   failure.png  the shipped weights on phantom 1, by `flare-clef evaluate --plots`
# Needs the extras "measure" and "report".
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flare-clef phantom "$work" --pixel-mm 0.9 --slice-thickness-mm 2
flare-clef phantom "$work/one" --seed 1
flare-clef predict "$work/one/images" "$work/found" --precision fp32
flare-clef evaluate "$work/found" "$work/one/labels" --quiet --rules plain \
  --output "$work/scores" --plots --images "$work/one/images"
mkdir -p "$here/images"
cp "$work/scores/worst_1_phantom_1.png" "$here/images/failure.png"
python3 - "$work" "$here/images" <<'PYTHON'
import sys
from pathlib import Path

from flare_clef.measurements import measure
from flare_clef.report import write_report
from flare_clef.view import read_pair

work, pictures = map(Path, sys.argv[1:])
scan = work / "images" / "phantom_0_0000.nii.gz"
image, labels = read_pair(scan, work / "labels" / "phantom_0.nii.gz")
case = measure("phantom_0", labels, image)
_, made = write_report(work / "phantom_0", labels, image, case, scan)
made.replace(pictures / "report.png")
PYTHON

#!/bin/sh
# Makes docs/images/report.png: the report of a synthetic abdomen (no patient stands behind it)
# with the phantom's own labels, so that it shows the report and not what the weights can do.
# Needs the extra "report".
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flare-clef phantom "$work" --pixel-mm 0.9 --slice-thickness-mm 2
mkdir -p "$here/images"
python3 - "$work" "$here/images/report.png" <<'PYTHON'
import sys
from pathlib import Path

from flare_clef.measurements import measure
from flare_clef.report import write_report
from flare_clef.view import read_pair

work, picture = map(Path, sys.argv[1:])
scan = work / "images" / "phantom_0_0000.nii.gz"
image, labels = read_pair(scan, work / "labels" / "phantom_0.nii.gz")
case = measure("phantom_0", labels, image)
_, made = write_report(work / "phantom_0", labels, image, case, scan)
made.replace(picture)
PYTHON

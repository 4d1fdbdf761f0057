"""flare-clef: 13 abdominal organs from a CT scan, on the scan's own grid.

from flare_clef import Segmenter
labels = Segmenter().predict("scan.nii.gz")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flare_clef.organs import ORGANS
from flare_clef.version import __version__

if TYPE_CHECKING:
    from flare_clef.segmenter import Segmenter

__all__ = ["ORGANS", "Segmenter", "__version__"]


def __getattr__(name: str) -> Any:
    # torch and SimpleITK take a second to import: only who segments pays for them.
    if name == "Segmenter":
        from flare_clef.segmenter import Segmenter

        return Segmenter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

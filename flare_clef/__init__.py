"""flare-clef: 13 abdominal organs from a CT scan, on the scan's own grid."""

from flare_clef.organs import ORGANS
from flare_clef.version import __version__

__all__ = ["ORGANS", "__version__"]

"""The 13 organs of the FLARE22 challenge: index, names, scoring tolerance, colour.

Ground floor of the package: imports nothing of it but the errors, and nothing heavy.
Indices and NSD tolerances: FLARE22 evaluation script. Colours are ours, chosen so that
neighbouring organs differ in hue and lightness.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from flare_clef.errors import UsageError


@dataclass(frozen=True)
class Organ:
    """One organ: ``index`` is its value in a label map, 0 being background."""

    index: int
    name: str
    """Lower case with underscores, as in ``cases.json`` and on the command line."""
    short: str
    """Column prefix of the challenge's result table (``Liver_DSC``)."""
    nsd_tolerance_mm: float
    """Distance within which a surface counts as right (normalised surface Dice)."""
    colour: tuple[int, int, int]
    """Red, green, blue, 0 to 255."""

    @property
    def title(self) -> str:
        """The name as a person reads it: ``Right kidney``."""
        return self.name.replace("_", " ").capitalize()


ORGANS: tuple[Organ, ...] = (
    Organ(1, "liver", "Liver", 5, (184, 84, 62)),
    Organ(2, "right_kidney", "RK", 3, (240, 196, 60)),
    Organ(3, "spleen", "Spleen", 3, (150, 90, 190)),
    Organ(4, "pancreas", "Pancreas", 5, (250, 160, 90)),
    Organ(5, "aorta", "Aorta", 2, (225, 40, 50)),
    Organ(6, "inferior_vena_cava", "IVC", 2, (50, 100, 220)),
    Organ(7, "right_adrenal_gland", "RAG", 2, (60, 210, 210)),
    Organ(8, "left_adrenal_gland", "LAG", 2, (20, 150, 160)),
    Organ(9, "gallbladder", "Gallbladder", 2, (70, 180, 75)),
    Organ(10, "esophagus", "Esophagus", 3, (245, 130, 190)),
    Organ(11, "stomach", "Stomach", 5, (120, 200, 250)),
    Organ(12, "duodenum", "Duodenum", 7, (190, 220, 90)),
    Organ(13, "left_kidney", "LK", 3, (215, 150, 20)),
)

ORGAN_BY_NAME: dict[str, Organ] = {organ.name: organ for organ in ORGANS}
ORGAN_BY_INDEX: dict[int, Organ] = {organ.index: organ for organ in ORGANS}


def organ_indices(names: Sequence[str] | None) -> Collection[int] | None:
    """Label values of the organs named; None means all. Raises UserError for unknown names."""
    if names is None:
        return None
    listed = [names] if isinstance(names, str) else list(names)
    unknown = [str(name) for name in listed if name not in ORGAN_BY_NAME]
    if unknown or not listed:
        known = ", ".join(organ.name for organ in ORGANS)
        raise UsageError(f"organs: {', '.join(unknown) or 'none named'}; known are {known}")
    return {ORGAN_BY_NAME[name].index for name in listed}

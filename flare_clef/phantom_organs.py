"""The 13 organs of a phantom: shapes at their usual places, and HU by contrast phase.

The origin of body coordinates lies midway between the kidneys, at the height of the disc
below the first lumbar vertebra. Places, sizes and courses follow what is typical of adults.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from flare_clef.phantom_shapes import (
    Point,
    Shape,
    column,
    curve,
    dome,
    ellipsoid,
    half_space,
    inside,
    moved,
    outside,
    tilted,
    tube,
    union,
    within,
)

Phase = Literal["native", "arterial", "portal"]
PHASES: tuple[str, ...] = get_args(Phase)

# native, arterial, portal venous
_HU = {
    "liver": (57, 72, 108),
    "right_kidney": (33, 105, 172),
    "left_kidney": (33, 105, 172),
    "renal_cortex": (34, 175, 185),
    "spleen": (48, 122, 118),
    "pancreas": (40, 105, 92),
    "aorta": (42, 310, 150),
    "inferior_vena_cava": (40, 95, 135),
    "right_adrenal_gland": (32, 80, 72),
    "left_adrenal_gland": (32, 80, 72),
    "gallbladder": (8, 9, 10),
    "esophagus": (38, 55, 62),
    "stomach": (38, 75, 82),
    "duodenum": (36, 75, 80),
    "gut_content": (15, 15, 16),
    "portal_vein": (40, 120, 165),
    "hepatic_vein": (38, 70, 150),
    "heart": (42, 220, 145),
    "muscle": (52, 56, 62),
    "bowel_wall": (38, 85, 92),
}


def tissue_hu(name: str, phase: Phase) -> float:
    """Mean HU of an organ or tissue in a contrast phase."""
    return float(_HU[name][PHASES.index(phase)])


CAVITY = column((0, -45), (136, 93), -260, 190, 0.35)
"""The inside of the muscular wall."""

DIAPHRAGM = union(
    dome((-70, -46, 28), (72, 94, 92), -260),
    dome((74, -42, 22), (68, 92, 88), -260),
    dome((0, -82, 22), (75, 56, 82), -260),
    blend_mm=18,
)
"""The domes: what lies below the lungs."""

AORTA_COURSE: list[Point] = [
    (26, -4, 165), (22, -8, 140), (17, -13, 115), (12, -17, 90), (7, -20, 60), (5, -23, 40),
    (4, -25, 20), (2, -31, 0), (1, -37, -25), (1, -40, -60), (2, -44, -92),
]  # fmt: skip


def organ_shapes(rng: np.random.Generator) -> dict[str, Shape]:
    """The organs by name, in the order in which they are painted: the later wins.

    Each is shifted and scaled a little at random; those that lean on others give way.
    """

    def vary(shape: Shape, shift_mm: float = 2.5, scale: float = 0.04) -> Shape:
        offset = rng.normal(0, shift_mm, 3).clip(-2 * shift_mm, 2 * shift_mm)
        factor = 1 + float(np.clip(rng.normal(0, scale), -2 * scale, 2 * scale))
        x, y, z = (float(value) for value in offset)
        return moved(shape, (x, y, z), factor)

    right_kidney, left_kidney = vary(_kidney(-1)), vary(_kidney(1))
    stomach, spleen = vary(_stomach()), _spleen()
    cava = vary(_cava(), 1.5)
    gallbladder = vary(_gallbladder(), 2.5, 0.1)
    spleen = within(
        vary(spleen), outside(stomach, 4), outside(left_kidney, 5), *_UNDER_DIAPHRAGM, blend_mm=6
    )
    liver = within(
        _liver(float(rng.normal(0, 6)), float(rng.normal(0, 8))),
        outside(right_kidney, 4),
        outside(cava, 1.5),
        outside(gallbladder, 0.5),
        outside(stomach, 3),
        outside(spleen, 5),
        blend_mm=8,
    )
    return {
        "liver": liver,
        "spleen": spleen,
        "stomach": stomach,
        "duodenum": vary(_duodenum(), 1.5),
        "pancreas": vary(_pancreas(), 1.5),
        "esophagus": vary(_esophagus(), 1.0),
        "inferior_vena_cava": cava,
        "aorta": vary(tube(*curve(AORTA_COURSE, np.linspace(11.5, 8.5, 11).tolist())), 1.0),
        "right_kidney": right_kidney,
        "left_kidney": left_kidney,
        "right_adrenal_gland": vary(_right_adrenal(), 1.5),
        "left_adrenal_gland": vary(_left_adrenal(), 1.5),
        "gallbladder": gallbladder,
    }


_UNDER_DIAPHRAGM = (inside(DIAPHRAGM, 3.5), inside(CAVITY, 3))


def _liver(left_extent_mm: float, tip_mm: float) -> Shape:
    """All of the right dome above a slanting underside, the left lobe in front of the stomach."""
    filling = union(
        ellipsoid((-70, -48, 32), (75, 88, 92)),
        ellipsoid((-2, -88, 72), (66 + left_extent_mm, 50, 34)),
        tube([(-98, -40, 20), (-113, -55, -38 + tip_mm)], [28, 11], (1, 1.6, 1)),
        blend_mm=24,
    )
    return within(
        filling,
        *_UNDER_DIAPHRAGM,
        half_space((-66, 0, 0), (1.0, 0.0, -1.5)),
        outside(ellipsoid((22, 14, 60), (54, 66, 150)), 0),
        outside(tube([(-30, -50, -20), (-52, -78, 22), (-30, -66, 42)], [26, 14, 6]), 0),
        blend_mm=14,
    )


def _kidney(side: int) -> Shape:
    """A bean; ``side`` is -1 for the right. Its long axis leans in and back at the top."""
    tilt = tilted(("z", side * 28), ("y", -side * 13), ("x", -14))
    bean = ellipsoid((side * 74.0, 2, 0), (24, 31, 53), tilt)
    hollow = tilt @ np.array([-side * 24.0, -9, 0]) + (side * 74.0, 2, 0)
    x, y, z = (float(value) for value in hollow)
    return within(bean, outside(ellipsoid((x, y, z), (17, 13, 19), tilt)), blend_mm=7)


def renal_medulla(kidney: Shape) -> Shape:
    """What lies more than 7 mm below the surface of ``kidney``."""
    return within(kidney, inside(kidney, 7))


def _spleen() -> Shape:
    tilt = tilted(("y", -18), ("x", -12), ("z", 10))
    whole = ellipsoid((98, 2, 66), (33, 50, 56), tilt)
    return within(whole, outside(ellipsoid((52, -44, 60), (34, 50, 60), tilt)), blend_mm=8)


def _stomach() -> Shape:
    """From the fundus below the left dome down and across to the pylorus."""
    body = tube(
        *curve(
            [(62, -22, 78), (66, -45, 72), (60, -78, 56), (46, -99, 34), (18, -110, 12),
             (-12, -103, 12), (-30, -93, 17)],
            [29, 33, 29, 25, 20, 14, 9],
        )
    )  # fmt: skip
    return within(body, *_UNDER_DIAPHRAGM, blend_mm=5)


def gastric_lumen(stomach: Shape) -> Shape:
    """The inside of the stomach: a wall of 5 mm is left."""
    return within(stomach, inside(stomach, 5))


def _duodenum() -> Shape:
    return tube(
        *curve(
            [(-30, -92, 17), (-42, -78, 19), (-47, -64, 6), (-47, -55, -22), (-38, -51, -43),
             (-14, -53, -49), (12, -56, -42), (30, -56, -24), (35, -66, -4)],
            [9, 12, 12, 12, 12.5, 11, 10.5, 10.5, 10],
        )
    )  # fmt: skip


def _pancreas() -> Shape:
    """Head in the duodenum's bend, tail at the hilum of the spleen."""
    head = tube(
        *curve(
            [(-22, -60, -22), (-28, -64, -4), (-20, -69, 14), (0, -77, 24), (22, -72, 32),
             (48, -53, 42), (70, -33, 50), (86, -18, 54)],
            [9, 13, 12, 9, 9.5, 10.5, 11, 8],
        ),
        (1, 1, 1.15),
    )  # fmt: skip
    return head


def _cava() -> Shape:
    course: list[Point] = [
        (-17, -34, -95), (-20, -32, -60), (-22, -34, -20), (-26, -34, 0), (-28, -34, 30),
        (-28, -32, 70), (-25, -35, 100), (-22, -38, 120), (-18, -48, 138),
    ]  # fmt: skip
    return tube(*curve(course, [9, 9, 9, 9.5, 11, 11, 11, 11.5, 12]), (1.15, 0.9, 1))


def _gallbladder() -> Shape:
    return tube(*curve([(-78, -92, -4), (-70, -84, 14), (-58, -72, 32)], [14, 13, 6]))


def _esophagus() -> Shape:
    """Behind the heart, through the diaphragm, into the stomach below the left dome."""
    course: list[Point] = [
        (6, -8, 165),
        (5, -14, 140),
        (8, -25, 118),
        (12, -33, 100),
        (18, -40, 86),
        (34, -43, 76),
    ]
    return tube(*curve(course, [7, 7.5, 8, 8.5, 8.5, 9]), (1.15, 0.95, 1))


def _right_adrenal() -> Shape:
    """Behind the vena cava: two thin leaves that part towards the back."""
    inner = ellipsoid((-34, -9, 57), (2.8, 16, 16), tilted(("z", 6), ("x", -35)))
    outer = ellipsoid((-39, -6, 55), (2.8, 14, 14), tilted(("z", 24), ("x", -35)))
    return union(inner, outer, blend_mm=3)


def _left_adrenal() -> Shape:
    """In front of the kidney's upper pole: a lambda, open towards the back."""
    inner = ellipsoid((32, -21, 46), (2.9, 15, 18), tilted(("z", -10), ("x", -25)))
    outer = ellipsoid((41, -23, 44), (2.9, 14, 17), tilted(("z", -38), ("x", -25)))
    return union(inner, outer, blend_mm=3)


def hepatic_vessels(rng: np.random.Generator) -> tuple[list[Shape], list[Shape]]:
    """Portal branches and hepatic veins, to be painted within the liver."""

    def branch(start: Point, end: Point, radius: float, spread_mm: float) -> list[Shape]:
        middle = (np.add(start, end) / 2 + rng.normal(0, 5, 3)).tolist()
        found = [tube(*curve([start, tuple(middle), end], [radius, radius * 0.8, radius * 0.5]))]
        for tip in rng.normal(0, spread_mm, (4, 3)) + end:
            found.append(tube([end, tuple(tip.tolist())], [radius * 0.5, radius * 0.25]))
        return found

    portal = branch((-30, -62, 44), (-82, -38, 50), 5.5, 24)
    portal += branch((-34, -64, 46), (-75, -85, 52), 4.5, 22)
    portal += branch((-30, -64, 46), (-5, -98, 74), 4.5, 18)
    veins: list[Shape] = []
    for end in ((-98, -30, 72), (-66, -92, 82), (-4, -92, 84), (-110, -70, 60)):
        veins += branch((-24, -42, 108), end, 4.0, 20)
    return portal, veins

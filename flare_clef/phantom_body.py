"""What surrounds the organs of a phantom: skin, fat, muscle, bone, lungs, bowel and the table."""

from __future__ import annotations

import numpy as np

from flare_clef.phantom_canvas import EDGE_MM, Canvas
from flare_clef.phantom_organs import AORTA_COURSE, CAVITY, DIAPHRAGM, Phase, tissue_hu
from flare_clef.phantom_shapes import (
    Field,
    Point,
    Shape,
    as_point,
    column,
    curve,
    ellipsoid,
    half_space,
    inside,
    outside,
    tube,
    union,
    within,
)

FAT_HU, SKIN_HU, AIR_HU, LUNG_HU, TABLE_HU = -103.0, 15.0, -990.0, -850.0, 150.0
CORTEX_HU, MARROW_HU, DISC_HU, CARTILAGE_HU = 480.0, 165.0, 80.0, 105.0
_LOW, _HIGH = -260.0, 190.0

# Heights of the vertebral bodies' middles, T6 to the sacrum, and the front of the spine.
VERTEBRAE_Z = (198.0, 174.0, 150.0, 126.0, 100.0, 73.0, 42.0, 8.0, -26.0, -60.0, -94.0, -127.0)
_FRONT_Z = (-160.0, -125.0, -80.0, -40.0, 0.0, 40.0, 80.0, 120.0, 160.0, 200.0)
_FRONT_Y = (-24.0, -34.0, -34.0, -29.0, -22.0, -13.0, -8.0, -4.0, -2.0, 0.0)


def spine_front_mm(z: float) -> float:
    """y of the vertebral bodies' front at height ``z``."""
    return float(np.interp(z, _FRONT_Z, _FRONT_Y))


def paint_table(canvas: Canvas, top_mm: float) -> None:
    """Two thin shells across the whole grid; ``top_mm`` is the y of the upper one's middle."""
    x, y, _ = canvas.axes_mm
    for depth, half_mm, width_mm in ((0.0, 1.6, 205.0), (46.0, 1.0, 120.0)):
        bent = np.abs(y[:, None] - (top_mm + depth - x * x / 1500)) - half_mm
        distance = np.maximum(bent, np.abs(x) - width_mm)
        canvas.hu += np.clip(0.5 - distance / EDGE_MM, 0, 1) * (TABLE_HU - canvas.hu)


def paint_trunk(canvas: Canvas, phase: Phase, fat_mm: float) -> None:
    """Skin, subcutaneous fat of ``fat_mm``, the wall's muscles, and fat inside."""
    muscle = tissue_hu("muscle", phase)
    outline = trunk(fat_mm)
    canvas.paint(outline, SKIN_HU)
    canvas.paint(within(outline, inside(outline, 2.2)), FAT_HU)
    wall = column((0, -44), (151, 107), _LOW, _HIGH, 0.31)
    groove = tube([(0, 92, _LOW), (0, 92, _HIGH)], [14, 14])
    backs = [
        tube([(s * 34, 44, _LOW), (s * 36, 42, 0), (s * 33, 46, _HIGH)], [24, 25, 19], (1.25, 1, 1))
        for s in (-1, 1)
    ]
    canvas.paint(within(union(wall, *backs, blend_mm=8), outside(groove), blend_mm=6), muscle)
    for inset in (5.0, 9.5):
        layer = within(wall, inside(wall, inset), outside(within(wall, inside(wall, inset + 1))))
        side = within(layer, half_space((0, 20, 0), (0, 1, 0)), half_space((0, 0, 30), (0, 0, 1)))
        canvas.paint(within(side, outside(column((0, -100), (62, 90), _LOW, 40))), -30.0)
    canvas.paint(CAVITY, FAT_HU)
    for s in (-1, 1):
        canvas.paint(
            tube([(s * 32, 38, _LOW), (s * 34, 38, _HIGH)], [22, 18], (1.4, 0.95, 1)), muscle
        )
        psoas = tube(
            *curve(
                [(s * 27, -6, 18), (s * 33, -12, -20), (s * 42, -18, -70), (s * 55, -28, -170)],
                [5, 13, 20, 23],
            ),
            (0.95, 1.1, 1),
        )
        canvas.paint(psoas, muscle)
        canvas.paint(tube([(s * 68, 22, 30), (s * 84, 14, -115)], [8, 10], (1.9, 0.9, 1)), muscle)
        gluteus = tube([(s * 92, 40, -130), (s * 100, 30, -230)], [26, 46], (1.2, 0.8, 1))
        canvas.paint(within(gluteus, inside(outline, 12), blend_mm=8), muscle)


def trunk(fat_mm: float) -> Shape:
    """The body's outline."""
    flanks = column((0, -40), (151 + 1.15 * fat_mm, 108 + fat_mm), _LOW, _HIGH, 0.28)
    return within(flanks, outside(tube([(0, 98, _LOW), (0, 98, _HIGH)], [9, 9])), blend_mm=14)


def paint_chest(canvas: Canvas, phase: Phase, rng: np.random.Generator) -> None:
    """Lungs with vessels above the diaphragm, the heart's lower half, the domes."""
    spine = union(column((0, 8), (25, 26), -60, _HIGH), column((0, 48), (58, 34), -60, _HIGH))
    middle = tube([(4, -30, 70), (4, -35, 120), (2, -40, _HIGH)], [24, 28, 32], (1.0, 1.5, 1))
    heart = ellipsoid((18, -88, 146), (62, 47, 50))
    space = column((0, -46), (139, 104), -10, _HIGH, 0.42)
    limits = (half_space((0, 0, 14), (0, -0.4, -1)), outside(spine), outside(middle))
    space = within(space, *limits, outside(heart, 4), outside(DIAPHRAGM), blend_mm=5)
    lungs = within(space, outside(DIAPHRAGM, 2.5))
    canvas.paint(space, tissue_hu("muscle", phase))
    canvas.paint(lungs, LUNG_HU)
    for _ in range(46):
        side = int(rng.choice((-1, 1)))
        root = np.array([side * 38.0, -30.0, 175.0])
        tip = np.array([side * rng.uniform(55, 120), rng.uniform(-90, 35), rng.uniform(50, 160)])
        start, end = root + (tip - root) * 0.35, tip
        vessel = tube([as_point(start), as_point(end)], [rng.uniform(1.5, 3.5), 0.8])
        canvas.paint(within(vessel, inside(lungs, 2)), 40.0)
    above = within(heart, outside(DIAPHRAGM, 2), blend_mm=6)
    canvas.paint(above, tissue_hu("muscle", phase) + 25)
    for centre, radii in (((-12, -82, 150), (26, 28, 36)), ((36, -86, 150), (28, 26, 36))):
        chamber = ellipsoid(centre, radii)
        canvas.paint(within(chamber, inside(above, 6), blend_mm=4), tissue_hu("heart", phase))


def paint_bones(canvas: Canvas, phase: Phase) -> None:
    """Vertebrae with discs, arches and processes, ribs with cartilage, sternum, pelvis."""
    for below, z in zip(VERTEBRAE_Z[1:], VERTEBRAE_Z, strict=False):
        _paint_vertebra(canvas, z, z - below)
    _paint_vertebra(canvas, VERTEBRAE_Z[-1], 33.0)
    canal = [(0.0, spine_front_mm(z) + 43, z) for z in (_LOW, *VERTEBRAE_Z[::-1], 200.0)]
    canvas.paint(tube(canal, [8.5] * len(canal), (1.15, 0.95, 1)), 18.0)
    canvas.paint(tube(canal, [5.0] * len(canal), (1.2, 0.95, 1)), 42.0)
    for number, z in zip(range(6, 13), VERTEBRAE_Z, strict=False):
        for side in (-1, 1):
            _paint_rib(canvas, side, z + 8, {12: 62, 11: 95, 10: 122}.get(number, 138))
    for side in (-1, 1):
        arch: list[Point] = [
            (side * 128, -92, 22), (side * 106, -121, 22), (side * 74, -139, 42),
            (side * 40, -147, 84), (side * 16, -149, 120),
        ]  # fmt: skip
        canvas.paint(tube(*curve(arch, [5, 5, 5.5, 6, 6])), CARTILAGE_HU)
        _paint_pelvis(canvas, side)
    _paint_bone(canvas, tube([(0, -149, 105), (0, -147, _HIGH)], [5, 6], (2.6, 1, 1)), 1.8)
    sacrum = tube([(0, 2, -152), (0, 28, -190), (0, 48, -240)], [17, 16, 10], (2.3, 1, 1))
    _paint_bone(canvas, sacrum, 2)


def _paint_bone(canvas: Canvas, shape: Shape, cortex_mm: float) -> None:
    canvas.paint(shape, CORTEX_HU)
    canvas.paint(within(shape, inside(shape, cortex_mm)), MARROW_HU)


def _paint_vertebra(canvas: Canvas, z: float, pitch_mm: float) -> None:
    width = float(np.interp(z, (-130, 0, 200), (25, 21.5, 16)))
    y = spine_front_mm(z) + 16
    disc = column((0, y), (width, 16), z - pitch_mm / 2 - 5.5, z - pitch_mm / 2 + 5.5, 0.2)
    canvas.paint(_capped(disc), DISC_HU)
    half = pitch_mm / 2 - 4
    body = _capped(column((0, y), (width, 16), z - half, z + half, 0.2))
    for s in (-1, 1):
        _paint_bone(canvas, tube([(s * 13, y + 12, z + 5), (s * 17, y + 24, z)], [5, 5]), 2)
        lamina = tube([(s * 16, y + 24, z), (0, y + 40, z - 7)], [5, 5], (1, 1, 1.6))
        _paint_bone(canvas, lamina, 2)
        _paint_bone(canvas, tube([(s * 17, y + 24, z), (s * 40, y + 29, z + 2)], [5, 3.5]), 2)
        _paint_bone(canvas, ellipsoid((s * 19, y + 28, z - pitch_mm / 2), (7, 8, 11)), 2)
    process = tube([(0, y + 40, z - 6), (0, y + 52, z - 14)], [4, 5], (0.9, 1, 2))
    _paint_bone(canvas, process, 1.8)
    _paint_bone(canvas, body, 1.6)


def _capped(upright: Shape) -> Shape:
    """A column cut at its box's top and bottom."""
    low, high = upright.low, upright.high
    return within(upright, half_space(low, (0, 0, -1)), half_space(high, (0, 0, 1)), blend_mm=3)


def _paint_rib(canvas: Canvas, side: int, z: float, end_degrees: float) -> None:
    """From the spine round the chest, ever lower; the last third rises a little."""
    angles = np.arange(14, end_degrees + 1, 6.0)
    line: list[Point] = []
    for angle in angles:
        turn = np.radians(angle)
        x = side * 146 * np.sign(np.sin(turn)) * np.abs(np.sin(turn)) ** 0.85
        y = -44 + 101 * np.sign(np.cos(turn)) * np.abs(np.cos(turn)) ** 0.85
        drop = 0.95 * min(angle - 14, 112) - 0.5 * max(angle - 126, 0)
        line.append((float(x), float(y), float(z - drop)))
    _paint_bone(canvas, tube(line, [4.0] * len(line), (0.85, 0.85, 1.45)), 1.5)


def _paint_pelvis(canvas: Canvas, side: int) -> None:
    """The wing of the ilium, which starts some 10 cm below the kidneys."""
    for depth in np.arange(0, 120, 9.0):
        z = -104 - depth
        lean = depth / 120
        back: Point = (side * (62 - 12 * lean), 44.0 - 4 * lean, z - 12)
        crest: Point = (side * (112 - 22 * lean), 18.0 - 10 * lean, z)
        front: Point = (side * (124 - 20 * lean), -30.0 - 22 * lean, z - 14)
        wing = tube(*curve([back, crest, front], [8, 6, 6]), (1, 1, 1.4))
        _paint_bone(canvas, wing, 2)


def paint_bowel(canvas: Canvas, phase: Phase, rng: np.random.Generator) -> None:
    """Colon with stool and gas, loops of small bowel, vessels in the fat between."""
    wall = tissue_hu("bowel_wall", phase)
    ascending: list[Point] = [
        (-88, -50, -185), (-100, -38, -140), (-104, -40, -90), (-100, -52, -50), (-88, -72, -32),
    ]  # fmt: skip
    transverse: list[Point] = [
        (-84, -90, -34), (-62, -116, -44), (-20, -124, -58), (28, -124, -48), (66, -112, -18),
        (96, -78, 8), (108, -46, 18),
    ]  # fmt: skip
    descending: list[Point] = [
        (112, -24, 8), (114, -12, -40), (110, -14, -90), (102, -36, -140), (84, -60, -190),
    ]  # fmt: skip
    for course, girth, gas_mm in ((ascending, 21, 9), (transverse, 17, -2), (descending, 13, 7)):
        points, _ = curve(course, [1.0] * len(course), steps=7)
        swell = 1 + 0.14 * np.sin(np.arange(len(points)) * 1.7 + rng.uniform(0, 6))
        colon = within(tube(points, (girth * swell).tolist()), inside(CAVITY, 2))
        canvas.paint(colon, wall)
        lumen = within(colon, inside(colon, 2.8))
        canvas.paint(lumen, _stool(rng))
        _paint_gas(canvas, lumen, points, gas_mm)
    for number in range(46):
        upper = number % 3 == 0
        start = np.array(
            [rng.uniform(-62, 82), rng.uniform(-112, -70), rng.uniform(-190, -58)]
            if not upper
            else [rng.uniform(38, 92), rng.uniform(-96, -44), rng.uniform(-60, 4)]
        )
        steps = np.cumsum(rng.normal(0, 1, (6, 3)) * (17, 12, 12), axis=0)
        low, high = (
            ((34, -104, -64), (98, -38, 8)) if upper else ((-68, -118, -215), (88, -64, -54))
        )
        knots = np.clip(np.vstack([start, start + steps]), low, high)
        radius = rng.uniform(9, 13)
        points, radii = curve([as_point(k) for k in knots], [radius] * len(knots), steps=3)
        loop = tube(points, radii)
        canvas.paint(within(loop, inside(loop, -1.5)), FAT_HU)
        canvas.paint(loop, wall)
        lumen = within(loop, inside(loop, 2.4))
        canvas.paint(lumen, float(rng.choice((14.0, 22.0, 30.0, 45.0))))
        if number % 5 == 0:
            _paint_gas(canvas, lumen, points, 3.0)


def _stool(rng: np.random.Generator) -> Field:
    phases = rng.uniform(0, 6, 3)

    def field(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        lumps = np.sin((x + 0.6 * y) / 3.3 + phases[0] + 2 * np.sin(z / 9 + y / 7))
        lumps = lumps * np.sin((y - 0.5 * x) / 2.9 + phases[1] + 2 * np.sin(x / 11))
        return 12 + 75 * np.minimum(lumps + 0.7 * np.sin((z + x + y) / 4.1 + phases[2]), 0.5)

    return field


def _paint_gas(canvas: Canvas, lumen: Shape, points: list[Point], depth_mm: float) -> None:
    """Gas in front of a level ``depth_mm`` in front of the course's middle."""
    level = float(np.mean([point[1] for point in points])) - depth_mm
    canvas.paint(within(lumen, half_space((0, level, 0), (0, 1, 0))), AIR_HU)


def paint_vessels(canvas: Canvas, phase: Phase, rng: np.random.Generator) -> None:
    """Vessels without a label: mesenteric, splenic, renal, iliac, and the crura beside them."""
    artery, vein = tissue_hu("aorta", phase), tissue_hu("portal_vein", phase)
    cava = tissue_hu("inferior_vena_cava", phase)
    for s in (-1, 1):
        crus = [(s * 12.0 + 3, y + 1, z) for _, y, z in AORTA_COURSE[3:9]]
        canvas.paint(tube(crus, [4, 5.5, 5.5, 5, 4, 3]), tissue_hu("muscle", phase))
    courses: list[tuple[list[Point], list[float], float]] = [
        ([(3, -30, 14), (2, -58, 2), (4, -70, -50), (0, -80, -120)], [4.5, 4, 3.5, 2], artery),
        ([(5, -28, 30), (3, -50, 34), (40, -38, 46), (84, -8, 62)], [4, 3.5, 3, 2.5], artery),
        ([(-12, -72, -110), (-10, -70, -40), (-8, -66, 8)], [3.5, 5, 6], vein),
        ([(82, -10, 56), (45, -46, 40), (0, -64, 22), (-8, -66, 14)], [3.5, 4, 4.5, 5.5], vein),
        ([(-8, -66, 12), (-20, -63, 28), (-34, -63, 45)], [6.5, 6.5, 6], vein),
        ([(-24, -33, 4), (-46, -14, 2), (-58, -6, 2)], [4.5, 4.5, 3.5], cava),
        ([(-20, -38, 6), (2, -47, 5), (32, -30, 4), (58, -6, 2)], [4.5, 3.5, 4.5, 3.5], cava),
        ([(4, -30, 6), (-30, -16, 0), (-58, -2, 0)], [3, 2.5, 2.5], artery),
        ([(4, -30, 4), (34, -18, 0), (58, -2, 0)], [3, 2.5, 2.5], artery),
        ([(2, -44, -90), (-24, -42, -135), (-48, -34, -190)], [6, 5.5, 5], artery),
        ([(2, -44, -90), (28, -42, -135), (50, -34, -190)], [6, 5.5, 5], artery),
        ([(-17, -34, -92), (-30, -28, -140), (-52, -24, -190)], [8, 7, 6.5], cava),
        ([(-17, -34, -92), (24, -28, -138), (48, -24, -190)], [8, 7, 6.5], cava),
    ]
    for points, radii, hu in courses:
        canvas.paint(tube(*curve(points, radii)), hu)
    for _ in range(40):
        root = np.array([0.0, -76.0, rng.uniform(-110, -30)])
        tip = root + rng.normal(0, 1, 3) * (42, 16, 28)
        tip[1] = min(tip[1], -62)
        canvas.paint(tube([as_point(root), as_point(tip)], [1.8, 0.9]), vein * 0.8)

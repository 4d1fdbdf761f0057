"""A synthetic CT of an abdomen with its 13 organs and their labels, made from a seed.

No patient stands behind it: every shape is a formula in :mod:`~flare_clef.phantom_organs` and
:mod:`~flare_clef.phantom_body`. The same options and seed give the same arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.phantom_body import (
    AIR_HU,
    paint_bones,
    paint_bowel,
    paint_chest,
    paint_table,
    paint_trunk,
    paint_vessels,
    trunk,
)
from flare_clef.phantom_canvas import Canvas, Sway, coarse_noise
from flare_clef.phantom_organs import (
    Phase,
    gastric_lumen,
    hepatic_vessels,
    organ_shapes,
    renal_medulla,
    tissue_hu,
)
from flare_clef.phantom_shapes import Shape, half_space, within

TOP_MM, BOTTOM_MM = 155.0, -245.0
"""Between which heights there is anatomy: the heart's middle and the upper pelvis."""

_CENTRE_MM = (0.0, -22.0)
"""x and y of the grid's middle: body and table both fit."""


@dataclass(frozen=True)
class PhantomOptions:
    """What a phantom is made of. Lengths in mm."""

    seed: int = 0
    phase: Phase = "portal"
    pixel_mm: float = 1.5
    slice_thickness_mm: float = 3.0
    field_of_view_mm: float = 400.0
    """Width and depth of the scan."""
    scan_length_mm: float = 300.0
    """Height of the scan, from the lower chest down."""
    noise_hu: float = 12.0


@dataclass(frozen=True)
class Phantom:
    """Arrays (z, y, x); x grows to the patient's left, y to the back, z to the head (LPS)."""

    hu: np.ndarray
    """int16."""
    labels: np.ndarray
    """uint8, 0 to 13."""
    spacing_mm: tuple[float, float, float]
    """x, y, z."""
    origin_mm: tuple[float, float, float]


def make_phantom(options: PhantomOptions) -> Phantom:
    """Paints the body from the outside in, and the organs last."""
    rng = np.random.default_rng(options.seed)
    axes_mm = _axes_mm(options)
    size = float(rng.uniform(0.95, 1.05))
    # A body of another size is the same body on a grid of another spacing.
    canvas = Canvas(_scaled(axes_mm, 1 / size), Sway.random(rng))
    fat_mm = float(rng.uniform(14, 30))
    paint_table(canvas, trunk(fat_mm).high[1] + 8)
    paint_trunk(canvas, options.phase, fat_mm)
    paint_chest(canvas, options.phase, rng)
    paint_bones(canvas, options.phase)
    paint_bowel(canvas, options.phase, rng)
    paint_vessels(canvas, options.phase, rng)
    paint_organs(canvas, options.phase, rng)
    _add_noise(canvas, options.noise_hu, rng)
    hu = np.rint(np.clip(canvas.hu, -1024, 1800)).astype(np.int16)
    return Phantom(
        hu,
        canvas.labels,
        (options.pixel_mm, options.pixel_mm, options.slice_thickness_mm),
        (float(axes_mm[0][0]), float(axes_mm[1][0]), float(axes_mm[2][0])),
    )


def paint_organs(canvas: Canvas, phase: Phase, rng: np.random.Generator) -> None:
    """The 13 organs with their labels, then what can be seen inside them."""
    shapes = organ_shapes(rng)
    for name, shape in shapes.items():
        hu = tissue_hu(name, phase)
        canvas.paint(shape, hu, ORGAN_BY_NAME[name].index)
    liver = ORGAN_BY_NAME["liver"].index
    portal, veins = hepatic_vessels(rng)
    for vessel in portal:
        canvas.paint(vessel, tissue_hu("portal_vein", phase), only_label=liver)
    for vessel in veins:
        canvas.paint(vessel, tissue_hu("hepatic_vein", phase), only_label=liver)
    for side in ("right", "left"):
        kidney = shapes[f"{side}_kidney"]
        index = ORGAN_BY_NAME[f"{side}_kidney"].index
        canvas.paint(kidney, tissue_hu("renal_cortex", phase), only_label=index)
        medulla = renal_medulla(kidney)
        canvas.paint(medulla, tissue_hu(f"{side}_kidney", phase), only_label=index, edge_mm=5)
    _fill_stomach(canvas, shapes["stomach"], phase)
    content = tissue_hu("gut_content", phase) + 10
    middle = shapes["duodenum"]
    canvas.paint(
        within(middle, lambda *place: middle.distance(*place) + 6),
        content,
        only_label=ORGAN_BY_NAME["duodenum"].index,
    )


def _fill_stomach(canvas: Canvas, stomach: Shape, phase: Phase) -> None:
    """Fluid, and gas that has risen to the front of a patient on the back."""
    index = ORGAN_BY_NAME["stomach"].index
    lumen = gastric_lumen(stomach)
    canvas.paint(lumen, tissue_hu("gut_content", phase), only_label=index)
    level = lumen.low[1] + 0.24 * (lumen.high[1] - lumen.low[1])
    gas = within(lumen, half_space((0, level, 0), (0, 1, 0)))
    canvas.paint(gas, AIR_HU, only_label=index)


def _axes_mm(options: PhantomOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions along x, y and z of the voxels' middles."""
    wide = max(1, round(options.field_of_view_mm / options.pixel_mm))
    high = max(1, round(options.scan_length_mm / options.slice_thickness_mm))
    across = (np.arange(wide) - (wide - 1) / 2) * options.pixel_mm
    up = TOP_MM - (np.arange(high)[::-1] + 0.5) * options.slice_thickness_mm
    return across + _CENTRE_MM[0], across + _CENTRE_MM[1], up


def _scaled(
    axes: tuple[np.ndarray, np.ndarray, np.ndarray], factor: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y, z = (axis * factor for axis in axes)
    return x, y, z


def _add_noise(canvas: Canvas, noise_hu: float, rng: np.random.Generator) -> None:
    """Texture of tissue, then a scanner's noise, whose grain is about two pixels wide."""
    hu = canvas.hu
    soft = (hu > -200) & (hu < 250)
    texture = 4 * coarse_noise(rng, canvas.axes_mm, 5.0)
    texture += 3 * coarse_noise(rng, canvas.axes_mm, 17.0)
    hu += soft * texture
    for plane in hu:
        white = rng.standard_normal(plane.shape, dtype=np.float32)
        grain = white + 0.6 * (np.roll(white, 1, 0) + np.roll(white, 1, 1))
        grain += 0.4 * np.roll(white, (1, 1), (0, 1))
        plane += noise_hu / np.float32(np.sqrt(1 + 2 * 0.36 + 0.16)) * grain

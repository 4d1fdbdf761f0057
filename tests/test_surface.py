"""Surface elements, their areas and distances, against values worked out by hand."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest

from flare_clef.surface import (
    SurfaceDistances,
    extract_surface,
    hausdorff_mm,
    patch_areas_mm2,
    surface_dice,
    surface_distances,
)

CORNERS = list(product((0, 1), repeat=3))
SPACINGS_MM = [(1.0, 1.0, 1.0), (0.7, 1.1, 2.3), (5.0, 0.6, 0.9)]


def code_of(corners):
    return sum(1 << (4 * z + 2 * y + x) for z, y, x in corners)


def patch_area_by_formula(corners, size_mm):
    """Closed forms, worked out on paper from the patches of marching cubes.

    ``size_mm`` is (z, y, x). With n = (yz, xz, xy) and |n| its length, in mm²:
    corner |n|/8; pair along k: k·hypot(i, j)/2; L in the plane ij: ij/2 + 3|n|/8; a side of the
    cube ij: ij; a corner with its 3 neighbours 3|n|/4; chain along p, then m, then r:
    |n|/2 + r·hypot(p, m)/4 + p·hypot(m, r)/4.
    """
    if len(corners) > 4:
        corners = [c for c in CORNERS if c not in corners]
    a, b, c = size_mm
    n = math.sqrt((a * b) ** 2 + (a * c) ** 2 + (b * c) ** 2)

    def edges(group):
        pairs = [(p, q) for p in group for q in group if p < q]
        steps = [[k for k in range(3) if p[k] != q[k]] for p, q in pairs]
        return [(p, q, s[0]) for (p, q), s in zip(pairs, steps, strict=True) if len(s) == 1]

    groups = [{c} for c in corners]
    for p, q, _ in edges(corners):
        touching = [g for g in groups if p in g or q in g]
        groups = [g for g in groups if g not in touching] + [set().union(*touching)]
    total = 0.0
    for group in groups:
        links = edges(group)
        axes = [axis for _, _, axis in links]
        rest = [size_mm[k] for k in range(3) if k not in axes]
        degree = {corner: sum(corner in link[:2] for link in links) for corner in group}
        if len(group) == 1:
            total += n / 8
        elif len(group) == 2:
            total += size_mm[axes[0]] * math.hypot(*rest) / 2
        elif len(group) == 3:
            total += size_mm[axes[0]] * size_mm[axes[1]] / 2 + 3 * n / 8
        elif len(links) == 4:
            i, j = set(axes)
            total += size_mm[i] * size_mm[j]
        elif max(degree.values()) == 3:
            total += 3 * n / 4
        else:
            (middle,) = (k for p, q, k in links if degree[p] == degree[q] == 2)
            p, r = (size_mm[k] for k in range(3) if k != middle)
            m = size_mm[middle]
            total += n / 2 + r * math.hypot(p, m) / 4 + p * math.hypot(m, r) / 4
    return total


@pytest.mark.parametrize("spacing_mm", SPACINGS_MM)
def test_every_patch_has_the_area_worked_out_on_paper(spacing_mm):
    areas = patch_areas_mm2(spacing_mm)
    for inside in product((False, True), repeat=8):
        corners = [c for c, is_in in zip(CORNERS, inside, strict=True) if is_in]
        expected = patch_area_by_formula(corners, spacing_mm[::-1])
        assert areas[code_of(corners)] == pytest.approx(expected, abs=1e-12), corners


def test_areas_turn_with_the_spacing():
    """Permuting the axes of a block and of the spacing alike changes no area."""
    areas = patch_areas_mm2((0.7, 1.1, 2.3))
    for order in permutations(range(3)):
        size = [(2.3, 1.1, 0.7)[k] for k in order]
        turned = patch_areas_mm2(tuple(size[::-1]))
        for code in range(256):
            corners = [c for c in CORNERS if code >> (4 * c[0] + 2 * c[1] + c[2]) & 1]
            moved = [tuple(c[k] for k in order) for c in corners]
            assert turned[code_of(moved)] == pytest.approx(areas[code], abs=1e-12)


def test_areas_are_those_of_the_published_library():
    tables = pytest.importorskip(
        "surface_distance.lookup_tables", reason="surface-distance is not installed"
    )
    kernel = tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL
    published = tables.create_table_neighbour_code_to_surface_area((2.3, 1.1, 0.7))
    ours = patch_areas_mm2((0.7, 1.1, 2.3))
    for code in range(256):
        corners = [c for c in CORNERS if code >> (4 * c[0] + 2 * c[1] + c[2]) & 1]
        assert ours[code] == pytest.approx(published[sum(kernel[c] for c in corners)], abs=1e-9)


def test_one_voxel_is_an_octahedron():
    """Eight corners of √3/8 mm² each, around the voxel."""
    surface = extract_surface(np.ones((1, 1, 1), dtype=bool), (1.0, 1.0, 1.0), (4, 5, 6))
    assert surface.areas_mm2.sum() == pytest.approx(math.sqrt(3))
    assert {tuple(p) for p in surface.points} == set(product((4, 5), (5, 6), (6, 7)))


def test_cuboid_by_hand():
    """4 x 3 x 2 voxels (z, y, x) of 1 x 2 x 3 mm (x, y, z): corners, edges and sides.

    n = (yz, xz, xy) = (6, 3, 2), |n| = 7. Corners: 8 · 7/8 = 7. Edges, (voxels - 1) elements
    each and four of each kind: z: 4·3 · 3·√5/2; y: 4·2 · 2·√10/2; x: 4·1 · 1·√13/2.
    Sides: 2·(3·2 of 6 + 3·1 of 3 + 2·1 of 2) = 98.
    """
    surface = extract_surface(np.ones((4, 3, 2), dtype=bool), (1.0, 2.0, 3.0))
    edges = 12 * 1.5 * math.sqrt(5) + 8 * math.sqrt(10) + 2 * math.sqrt(13)
    assert surface.areas_mm2.sum() == pytest.approx(7 + edges + 2 * (36 + 9 + 4))
    assert len(surface.points) == 5 * 4 * 3 - 3 * 2 * 1


def test_an_empty_mask_has_no_surface():
    surface = extract_surface(np.zeros((3, 3, 3), dtype=bool), (1.0, 1.0, 1.0))
    assert surface.points.shape == (0, 3)
    assert surface.areas_mm2.shape == (0,)


def box(offset, shape=(4, 4, 4), spacing_mm=(1.0, 1.0, 1.0)):
    return extract_surface(np.ones(shape, dtype=bool), spacing_mm, offset)


def test_distance_between_shifted_cubes():
    """A cube of 4 voxels, 2 apart along z (3 mm slices): of each one's 98 elements, those of
    the far side are 6 mm away; the near side lies inside the other, 6 mm from it or less."""
    spacing_mm = (1.0, 1.0, 3.0)
    distances = surface_distances(
        box((0, 0, 0), spacing_mm=spacing_mm), box((2, 0, 0), spacing_mm=spacing_mm), spacing_mm
    )
    assert len(distances.from_reference_mm) == 5**3 - 3**3
    assert distances.from_reference_mm.max() == 6.0
    # The far side's 25 elements: 9 in its middle, 12 on its edges, 4 on its corners.
    far = 9 * 1.0 + 12 * math.sqrt(1 + 9) / 2 + 4 * math.sqrt(1 + 9 + 9) / 8
    assert distances.reference_areas_mm2[distances.from_reference_mm == 6].sum() >= far - 1e-9


def test_distances_equal_brute_force():
    rng = np.random.default_rng(3)
    spacing_mm = (0.7, 0.9, 2.5)
    size_mm = np.array(spacing_mm[::-1])
    one, two = (extract_surface(rng.random((6, 7, 8)) < 0.1, spacing_mm) for _ in range(2))
    distances = surface_distances(one, two, spacing_mm)
    gaps = np.linalg.norm((one.points[:, None] - two.points[None]) * size_mm, axis=2)
    np.testing.assert_allclose(distances.from_reference_mm, gaps.min(axis=1), atol=1e-12)
    np.testing.assert_allclose(distances.from_prediction_mm, gaps.min(axis=0), atol=1e-12)


def test_a_distance_of_exactly_the_tolerance_counts_as_near():
    """Cubes 5 voxels of 0.6 mm apart, far from the array's origin: 3 mm, not a rounding more.

    Coordinates in mm would give 105 · 0.6 - 100 · 0.6 = 3.0000000000000071.
    """
    spacing_mm = (0.6, 0.6, 0.6)
    shape = (40, 40, 1)
    one, two = (box((90, 90, x), shape, spacing_mm) for x in (100, 105))
    distances = surface_distances(one, two, spacing_mm)
    assert surface_dice(distances, 3.0) == 1.0
    # A plate one voxel thick: its near face is 4 voxels (2.4 mm) away, its far face 5 (3.0 mm).
    assert surface_dice(distances, 2.999) == pytest.approx(0.5, abs=0.05)


def test_surface_dice_weighs_by_area():
    distances = SurfaceDistances(
        np.array([0.0, 2.0, 5.0]), np.array([1.0, 2.0, 4.0]),
        np.array([1.0, 9.0]), np.array([3.0, 6.0]),
    )  # fmt: skip
    assert surface_dice(distances, 2.0) == pytest.approx((1 + 2 + 3) / (7 + 9))
    assert surface_dice(distances, 0.5) == pytest.approx(1 / 16)


def test_hausdorff_weighs_by_area():
    """Areas 1 : 2 : 97 from near to far: 3 % of the surface lies within 2 mm."""
    near = SurfaceDistances(
        np.array([7.0, 0.0, 2.0]), np.array([97.0, 1.0, 2.0]), np.array([1.0]), np.array([1.0])
    )
    assert hausdorff_mm(near, 2.9) == 2.0
    assert hausdorff_mm(near, 3.1) == 7.0
    assert hausdorff_mm(near, 0.5) == 1.0  # the other direction is the larger one


def test_one_empty_surface_is_infinitely_far():
    empty = extract_surface(np.zeros((2, 2, 2), dtype=bool), (1.0, 1.0, 1.0))
    distances = surface_distances(box((0, 0, 0)), empty, (1.0, 1.0, 1.0))
    assert np.isinf(distances.from_reference_mm).all()
    assert surface_dice(distances, 1e9) == 0.0
    assert hausdorff_mm(distances) == math.inf
    nothing = surface_distances(empty, empty, (1.0, 1.0, 1.0))
    assert math.isnan(surface_dice(nothing, 1.0))
    assert math.isnan(hausdorff_mm(nothing))

"""The losses of pre-training (paper, section 2.2): decoding, discriminativeness, equivariance.

Features are unit vectors, one a voxel: the paper's "feature space is a sphere". Volumes are
(z, y, x); a feature map is rows, (voxels, D), in the volume's order, because all three losses
look at voxels one by one. Coordinates of voxels are (z, y, x) indices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

TISSUE = -0.999
"""A prepared voxel above this (-200 HU) is of the body; air and lung are clipped to -1."""


def unit_rows(features: Tensor) -> Tensor:
    """(1, D, z, y, x) features of any length to (voxels, D) float32 of length 1."""
    rows = features[0].permute(1, 2, 3, 0).reshape(-1, features.shape[1])
    return functional.normalize(rows.float(), dim=1)


def decoding_loss(decoded: Tensor, volume: Tensor) -> Tensor:
    """Mean squared error between the decoding head's output and the prepared image.

    L_dec = 1/N sum over i, j, k of (f_dec(f_enc(X))[i, j, k] - X[i, j, k])^2, over all N
    voxels. Both (1, 1, z, y, x).
    """
    return functional.mse_loss(decoded.float(), volume)


@dataclass(frozen=True)
class Discrimination:
    """Equation 1 of one volume, and what shows a collapse."""

    loss: Tensor
    similarity: float
    """Mean inner product of far pairs: 1 when all features are equal, near 0 when spread."""
    far_pairs: int


def discriminativeness_loss(
    anchors: Tensor,
    leaves: Tensor,
    anchor_voxels: Tensor,
    leaf_voxels: Tensor,
    spacing_mm: tuple[float, float, float],
    *,
    margin: float = -0.9,
    far_mm: float = 10.0,
) -> Discrimination:
    """Equation 1: voxels far apart must not have the same features.

    L_d = sum over anchors a, sum over leaves l in F(a) of relu(M - D[a, l]), D = -<f_a, f_l>,
    F(a) = leaves at 10 mm or more of a. ``anchors`` (A, D) and ``leaves`` (L, D) are unit
    features, the voxels (A, 3) and (L, 3) their indices (z, y, x), ``spacing_mm`` the size of
    a voxel of *this* prepared volume: the resize gives every case its own.

    The sum is divided by the number of its terms, the far pairs. That number changes from draw
    to draw and with A and L; as a mean the term lies between 0 and 1 + M = 0.1 whatever they
    are, so its weight against the other two keeps its meaning. 0 where no pair is far.
    """
    scale = anchors.new_tensor(spacing_mm)
    distance_mm = torch.cdist(anchor_voxels * scale, leaf_voxels * scale)
    # A hair of tolerance: 10 mm as a sum of rounded products must count as far.
    far = distance_mm >= far_mm * (1 - 1e-5)
    products = anchors @ leaves.t()
    count = int(far.sum())
    terms = torch.relu(margin + products) * far
    similarity = float((products.detach() * far).sum()) / max(count, 1)
    return Discrimination(terms.sum() / max(count, 1), similarity, count)


def draw_voxels(volume: Tensor, count: int, generator: Generator) -> Tensor:
    """(count, 3) indices (z, y, x) of random voxels of the body, drawn with replacement.

    The body is what lies above -200 HU. An empty volume gives (0, 3).
    """
    places = torch.nonzero(volume.reshape(-1) > TISSUE).flatten()
    if len(places) == 0:
        return torch.empty(0, 3, dtype=torch.long)
    chosen = places[torch.randint(len(places), (count,), generator=generator)]
    return torch.stack(torch.unravel_index(chosen, volume.shape), dim=1)


def flat_index(voxels: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Rows of (N, 3) voxels (z, y, x) in a feature map of a volume of ``shape``."""
    return (voxels[:, 0] * shape[1] + voxels[:, 1]) * shape[2] + voxels[:, 2]


def draw_transform(
    generator: Generator,
    *,
    scale: tuple[float, float] = (1.0, 1.5),
    shift: float = 0.1,
    rotation_degrees: float = 30.0,
) -> Tensor:
    """The random affine map of equation 2, (3, 4): from coordinates of T(X) to those of X.

    Two of the three axes are drawn; in their plane the image is scaled by a factor in
    ``scale``, rotated by up to ``rotation_degrees`` either way, and shifted along each of the
    two by up to ``shift`` of the volume's side. A factor above 1 magnifies, so that nearly all
    of T(X) comes from inside of X. Coordinates are (x, y, z) in (-1, 1) over the volume, as
    ``torch.nn.functional.affine_grid`` has them with ``align_corners=False``.
    """
    a, b = torch.randperm(3, generator=generator)[:2].tolist()
    draws = torch.rand(4, generator=generator).tolist()
    size = scale[0] + (scale[1] - scale[0]) * draws[0]
    angle = math.radians((2 * draws[1] - 1) * rotation_degrees)
    affine = torch.eye(3, 4)
    affine[a, a] = affine[b, b] = math.cos(angle) / size
    affine[a, b], affine[b, a] = -math.sin(angle) / size, math.sin(angle) / size
    affine[a, 3], affine[b, 3] = ((2 * d - 1) * 2 * shift for d in draws[2:])
    return affine


def source_positions(voxels: Tensor, affine: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Where (N, 3) voxels of T(X) lie in X: (N, 3) positions (z, y, x) in voxels of X."""
    size = torch.tensor(shape[::-1], dtype=torch.float32)
    centred = (2 * voxels.flip(1).float() + 1) / size - 1
    source = centred @ affine[:, :3].t() + affine[:, 3]
    return (((source + 1) * size - 1) / 2).flip(1)


def defined(positions: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(N,) bool: positions from whose eight neighbours all lie in the volume."""
    last = torch.tensor(shape, dtype=torch.float32) - 1
    return ((positions >= 0) & (positions <= last)).all(dim=1)


def interpolate_rows(rows: Tensor, positions: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Trilinear values (N, D) of a feature map (voxels, D) at (N, 3) positions (z, y, x).

    All positions must be :func:`defined`.
    """
    last = torch.tensor(shape, device=rows.device) - 1
    low = torch.minimum(positions.floor().long(), (last - 1).clamp_min(0))
    part = (positions - low).to(rows.dtype)
    out = rows.new_zeros(len(positions), rows.shape[1])
    for corner in range(8):
        step = torch.tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1], device=rows.device)
        weight = torch.where(step.bool(), part, 1 - part).prod(dim=1, keepdim=True)
        index = flat_index(torch.minimum(low + step, last), shape)
        out = out + weight * rows.index_select(0, index)
    return out


def equivariance_loss(transformed_features: Tensor, features_of_transformed: Tensor) -> Tensor:
    """Equation 2: L_e = -<T(f(X)), f(T(X))>, the mean over the voxels given.

    Both are (N, D): the same voxels of T(X), only those where both are defined. f(T(X)) has
    length 1; T(f(X)) is interpolated between unit vectors and not stretched again, so -1 is
    reached only where the features also agree among neighbours.
    """
    return -(transformed_features * features_of_transformed).sum(dim=1).mean()


def effective_rank(features: Tensor) -> float:
    """How many directions (N, D) unit features use: 1 (collapse) to D.

    exp of the entropy of the eigenvalues of the mean of f f^T, which sum to 1. NaN where there
    are no features or some are not finite: the step is skipped for its loss then, not ended here.
    """
    moments = features.detach().double().t() @ features.detach().double() / len(features)
    if not bool(moments.isfinite().all()):
        return math.nan
    values = torch.linalg.eigvalsh(moments).clamp_min(1e-12)
    values = values / values.sum()
    return float(torch.exp(-(values * values.log()).sum()))

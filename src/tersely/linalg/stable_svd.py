"""Derivatives through a singular value decomposition, and through the truncation that is made of one.

With Y = U Σ Vᵀ and gradients gU, gS, gV of a loss in its parts, the gradient in Y is

    U [ (F ∘ (UᵀgU - gUᵀU)) Σ + Σ (F ∘ (VᵀgV - gVᵀV)) + diag(gS) ] Vᵀ + (I - UUᵀ) gU Σ⁻¹ Vᵀ + U Σ⁻¹ gVᵀ (I - VVᵀ),

with F_ij = 1 / (σ_j² - σ_i²) off the diagonal.  Where two singular values meet, their vectors are not defined and F is
infinite.  `stable_svd` keeps it finite as the paper does: for σ_j ≥ σ_i and q = σ_i / σ_j,

    1 / (σ_j² - σ_i²) = σ_j⁻² (1 + q² + q⁴ + ...)

is cut after K = 10 powers of q² where the two differ by 1e-10 or less, so that it never exceeds (K + 1) / σ_j²; two
values below the floor of 1e-10 get 100; the other triangle is filled with the opposite sign.

A cap is a price: in the derivative of U T Σ Vᵀ, which is smooth wherever equal singular values have equal gates T, two
infinities cancel and leave something finite, and of two capped numbers nothing is left.  `gated` therefore takes the
truncation as one function.  It needs one orthogonal basis and no division by a singular value: with H = YᵀY = V Λ Vᵀ,

    Ỹ = Y P,   P = V T Vᵀ,   gY = g P + 2 Y V [ D ∘ sym(Vᵀ Yᵀ g V) ] Vᵀ,   D_ij = (T_j - T_i) F_ij,   gT = diag(VᵀYᵀgV).

Where gates are equal D is exactly 0, whatever the singular values do; where they differ the same capped F stands.  The
last formula is the paper's for a truncation position γ, u_iᵀ g v_i σ_i ∂T_i/∂γ, in another dress.

Departures: the paper decomposes Y at random into a few more components than it keeps, and differentiates that; here all
components of the smaller side are exact, in float64, by the symmetric eigenproblem.  That squares the condition number,
which costs directions below 1e-8 of the loudest one their accuracy: in Ỹ they amount to as much.

Source: Wang et al., Dobi-SVD: Differentiable SVD for LLM Compression and Some New Perspectives, 2025, section 3.1 and
their code (arXiv 2502.02723).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import NumericalError

ORDER = 10
"""K: powers of q² that are kept, the first one aside."""

FLOOR = 1e-10
"""Singular values are at least this large where they are divided by."""

NEAR = 1e-10
"""Two singular values that differ by no more count as nearly equal."""

BOTH_AT_THE_FLOOR = 1e2


def inverse_gaps(singular: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k k"]:
    """F of falling singular values, capped; 0 on the diagonal, and F_ij = -F_ji."""
    values = singular.clamp(min=FLOOR)
    larger = torch.maximum(values[..., None, :], values[..., :, None])
    smaller = torch.minimum(values[..., None, :], values[..., :, None])
    ratio = (smaller / larger).square()
    series = torch.ones_like(ratio)
    for _ in range(ORDER):
        series = series * ratio + 1
    gap = larger - smaller
    near = gap <= NEAR
    inverse = torch.where(near, series / larger.square(), 1 / (torch.where(near, 1.0, gap) * (larger + smaller)))
    inverse = torch.where(larger <= FLOOR, BOTH_AT_THE_FLOOR, inverse)
    # σ_j ≥ σ_i below the diagonal
    return inverse.tril(-1) - inverse.triu(1)


class _StableSVD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        ctx.save_for_backward(u, s, vh)
        return u, s, vh

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        u, s, vh = ctx.saved_tensors
        in_u, in_s, in_v = gradients[0], gradients[1], gradients[2].mT
        v, gaps, inverse = vh.mT, inverse_gaps(s), 1 / s.clamp(min=FLOOR)[..., None, :]
        of_u, of_v = u.mT @ in_u, vh @ in_v
        core = (gaps * (of_u - of_u.mT)) * s[..., None, :] + s[..., :, None] * (gaps * (of_v - of_v.mT))
        core = core + torch.diag_embed(in_s)
        outside_u = ((in_u - u @ of_u) * inverse) @ vh
        outside_v = u @ ((in_v - v @ of_v) * inverse).mT
        return u @ core @ vh + outside_u + outside_v


def stable_svd(
    matrix: Float[Tensor, "*batch rows columns"],
) -> tuple[Float[Tensor, "*batch rows k"], Float[Tensor, "*batch k"], Float[Tensor, "*batch k columns"]]:
    """(U, σ, Vᵀ), reduced, σ falling; the gradient is finite whatever the singular values are.

    It is the true one for losses that do not ask which of several equal vectors is meant, up to the cap.
    Raises NumericalError for entries that are not finite.
    """
    _require_finite(matrix)
    found: tuple[Tensor, Tensor, Tensor] = _StableSVD.apply(matrix)
    return found


class _Gated(torch.autograd.Function):
    """For a matrix with at least as many rows as columns."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, gates: Tensor) -> Tensor:
        y, t = matrix.double(), gates.double()
        energy, v = torch.linalg.eigh(y.mT @ y)
        energy, v = energy.flip(-1).clamp(min=0), v.flip(-1)
        projector = (v * t[..., None, :]) @ v.mT
        ctx.save_for_backward(y, t, energy, v, projector)
        ctx.dtypes = matrix.dtype, gates.dtype
        return (y @ projector).to(matrix.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        y, t, energy, v, projector = ctx.saved_tensors
        g = gradients[0].double()
        yv = y @ v
        seen = yv.mT @ g @ v
        in_gates = seen.diagonal(dim1=-2, dim2=-1)
        differences = (t[..., None, :] - t[..., :, None]) * inverse_gaps(energy.sqrt())
        in_matrix = g @ projector + yv @ (differences * (seen + seen.mT)) @ v.mT
        while in_gates.ndim > t.ndim:
            in_gates = in_gates.sum(0)
        return in_matrix.to(ctx.dtypes[0]), in_gates.to(ctx.dtypes[1])


def gated(
    matrix: Float[Tensor, "*batch rows columns"], gates: Float[Tensor, " k"]
) -> Float[Tensor, "*batch rows columns"]:
    """U diag(T σ) Vᵀ for the gates T of the k = min(rows, columns) directions, the loudest first; in the dtype of
    `matrix`.

    Gates of 1 give the matrix back; gates of 1 and 0 truncate it.  Raises NumericalError for entries that are not
    finite.
    """
    _require_finite(matrix)
    if matrix.shape[-2] < matrix.shape[-1]:
        return gated(matrix.mT, gates).mT
    truncated: Tensor = _Gated.apply(matrix, gates)
    return truncated


def _require_finite(matrix: Tensor) -> None:
    # LAPACK would not terminate, or return noise
    if not torch.isfinite(matrix).all():
        raise NumericalError("a matrix to be decomposed has entries that are not finite")

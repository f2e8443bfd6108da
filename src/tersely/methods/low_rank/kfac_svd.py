"""Truncated SVD in two metrics at once: of the inputs, and of the gradients that come back from the loss.

Whitening minimises the error of a linear's outputs, all of them alike.  The loss does not mind all of them alike.  With
the Kronecker-factored approximation of its Hessian, a change Δ of the weight raises the loss by about

    ½ tr(R Δ G Δᵀ) = ½ ‖R^½ Δ G^½‖²    (nats per token),    R = E[g gᵀ],  G = E[x xᵀ],

g = ∂L/∂y being the gradient in the output.  With R = L Lᵀ this is the error of the weight Lᵀ W in the metric of the
inputs, so its best W' of rank r is that of whitening, turned there and back:

    W' = L⁻ᵀ U_r U_rᵀ Lᵀ W ,    and what is left is   Σ_{i>r} λ_i ,

U, λ the eigenvectors and eigenvalues of Lᵀ W G Wᵀ L (see `linalg.truncation`; for tall weights that is again a problem
of the smaller side).  The authors whiten on both sides and invert both roots.  Here G is neither rooted nor inverted,
and may be singular.  R takes one Cholesky factor and a triangular solve of r columns; shrunk, its condition is at most
the number of outputs divided by the shrinkage, and L⁻ᵀ costs two or three digits of sixteen.

Both metrics are shrunk towards multiples of the identity, (1-a) M + a · mean(diag M) · I, as they are estimates from
few tokens; R, from fewer and noisier ones, more than G.  With R = I this is `svd_llm` with shrinkage in the place of
damping.

Source: Thoma et al., Advancing SVD-based LLM Compression via Layer-Wise Error Model Search, 2026 (ICML), for KFAC-SVD;
after Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, 2015
(arXiv 1503.05671).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import NumericalError, RecipeError
from tersely.kinds import LinearKind, LowRankLinear, PivotedLinear
from tersely.linalg.truncation import balanced, output_basis
from tersely.methods.low_rank.factorise import check_rank, leaves_as_stored, rank_options, rank_sizes
from tersely.option import Option
from tersely.stats import Gram, OutputGram, Statistic, Stats

FLOOR = 1e-9  # added to the diagonal of R, as a fraction of its mean: without shrinkage it may be singular


@dataclass(frozen=True)
class TwoSidedSVD:
    shrink_inputs: float = 0.1
    """How much of the Gram matrix of the inputs gives way to a multiple of the identity, 0 to 1 (no unit)."""

    shrink_gradients: float = 0.3
    """The same of the Gram matrix of the gradients in the outputs; at 1 all outputs count alike."""

    pivot: bool = False
    """Store r rows of the product in place of a factor: r² numbers fewer at rank r, so a higher rank in as many
    bytes (see `kinds.pivoted`)."""

    paper: ClassVar[str] = (
        "Thoma et al., 2026, Advancing SVD-based LLM Compression via Layer-Wise Error Model Search (ICML)"
    )
    summary: ClassVar[str] = "truncated SVD in the metrics of inputs and of the loss's gradients in outputs (K-FAC)"
    leaves: ClassVar[tuple[str, ...]] = leaves_as_stored()

    def __post_init__(self) -> None:
        for name in ("shrink_inputs", "shrink_gradients"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"kfac_svd: {name} {getattr(self, name)}; wanted 0 (none) to 1 (nothing else)")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram, OutputGram)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        return rank_sizes(shape, itemsize, self.pivot)

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are tr(R Δ G Δᵀ) in the shrunk metrics: twice the nats that the loss is to rise by per token, on one
        scale for all linears of a model."""
        root = felt_root(stats, self.shrink_gradients)
        basis = output_basis(root.T @ weight.double(), shrunk(stats[Gram].mean(), self.shrink_inputs), vectors=False)
        return rank_options(weight, basis, self.pivot)

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> LinearKind:
        return two_sided(
            weight,
            felt_root(stats, self.shrink_gradients),
            shrunk(stats[Gram].mean(), self.shrink_inputs),
            amount,
            self.pivot,
        )


def two_sided(
    weight: Float[Tensor, "out in"],
    root: Float[Tensor, "out out"],
    metric: Float[Tensor, "in in"],
    rank: int,
    pivot: bool = False,
) -> LinearKind:
    """The module of that rank, in the weight's dtype, with the least ‖Lᵀ (W - W') M^½‖²; L is the root."""
    check_rank(weight, rank, pivot)
    up, down = output_basis(root.T @ weight.double(), metric, rank=rank).factors(rank)
    up, down = balanced(torch.linalg.solve_triangular(root.T, up, upper=True), down)
    kind = PivotedLinear if pivot else LowRankLinear
    return kind.from_factors(up, down, dtype=weight.dtype)


def felt_root(stats: Stats, share: float) -> Float[Tensor, "out out"]:
    """L, lower triangular, of the shrunk R = L Lᵀ."""
    felt = shrunk(stats[OutputGram].mean(), share)
    if not felt.isfinite().all():
        raise NumericalError("the gradients have entries that are not finite; calibrate in float32 or bfloat16")
    felt.diagonal().add_(FLOOR * felt.diagonal().mean())
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(felt)
    if failed:
        raise NumericalError(
            "the Gram matrix of the gradients is not positive definite; raise shrink_gradients, or give more text"
        )
    return root


def shrunk(gram: Float[Tensor, "n n"], share: float) -> Float[Tensor, "n n"]:
    """(1-a) M + a · mean(diag M) · I, a fresh tensor; the identity where nothing was observed."""
    power = gram.diagonal().mean()
    if power == 0:  # every direction counts alike
        return torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    mixed = (1 - share) * (gram + gram.T) / 2
    mixed.diagonal().add_(share * power)
    return mixed

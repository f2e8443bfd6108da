"""Error feedback: decide the columns of a weight one after another, and let the later ones repair the earlier.

Let G = E[x xᵀ] be the Gram matrix of the inputs, H = G + λI, and W' what a weight W is to become, its columns taken
from a grid, or zero.  The output error is

    tr((W - W') H (W - W')ᵀ) = Σ_i ‖e_i‖²,    e_i = (w_i - w'_i) / U_ii,    H⁻¹ = Uᵀ U,  U upper triangular,

where w_i is column i as it stands when its turn comes: after column i was decided, every later column j moves by
-e_i U_ij, the best that unrounded columns can do (optimal brain surgeon, one Hessian for all rows).  So 1 / U_ii² is
the price of an error in column i once all later columns have made up for it, and the price of the whole is known
without another product.

U is never formed by way of H⁻¹: with the columns in reverse order H has the Cholesky factor L, and U is L⁻¹ turned
back.  All this is float64; the sweep itself runs in the dtype of the weight.

The sweep is in blocks: a block is brought up to date by one product with all errors before it, and only inside it the
columns update each other one by one.  The result does not depend on the size of the blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tersely.errors import NumericalError

LARGEST_DAMPING = 1.0

Decide = Callable[[int, Tensor], Tensor]
"""(place in the order, the columns from this one to the end of its block, up to date, as rows ``[left, out]``) → the
values ``[out]`` that this column takes."""


@dataclass(frozen=True)
class Feedback:
    """How errors spread, for one Gram matrix; everything in the order in which columns are decided."""

    factor: Float[Tensor, "in in"]
    """U, float64."""
    order: Int[Tensor, " in"]
    """Place → column of the weight."""
    dead: Bool[Tensor, " in"]
    """Columns of the weight whose input was silent throughout; they cost nothing, whatever they become."""
    damping: float
    """What was added in the end, as a fraction of the mean input power: what was asked for, or more."""
    added: float
    """λ, in the unit of the Gram matrix."""

    def loss(self, errors: Float[Tensor, "in out"], off: Float[Tensor, "out in"]) -> float:
        """tr((W - W') G (W - W')ᵀ), from the errors of a sweep and ``off`` = W - W': the damping's share is taken
        out."""
        errors, off = (torch.linalg.vector_norm(x, dtype=torch.float64) for x in (errors, off))  # no square in float32
        return max(float(errors**2 - self.added * off**2), 0.0)  # what is negative is rounding


def feedback(gram: Float[Tensor, "in in"], *, damping: float, loudest_first: bool) -> Feedback:
    """Factorise a Gram matrix.

    damping: λ as a fraction of the mean power of the inputs that were not silent.  Where the matrix is not positive
        definite nevertheless, ten times as much is tried, up to 1.
    loudest_first: decide columns by falling power of their inputs (act-order), else from left to right.

    A silent input has no say: its diagonal entry becomes the mean power.  If all were silent, H is the identity.
    Raises NumericalError for entries that are not finite, or if a damping of 1 does not suffice.
    """
    if not torch.isfinite(gram).all():
        raise NumericalError("the input statistic has entries that are not finite; calibrate in float32 or bfloat16")
    gram = gram.double()
    power = gram.diagonal()
    dead = power <= 0
    mean = float(power[~dead].mean()) if not dead.all() else 1.0
    order = (
        power.sort(descending=True, stable=True).indices if loudest_first else torch.arange(len(gram)).to(dead.device)
    )
    backwards = order.flip(0)
    while True:
        damped = gram[backwards][:, backwards]
        diagonal = damped.diagonal()
        diagonal.add_(dead[backwards].to(power.dtype), alpha=mean).add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        if damping >= LARGEST_DAMPING:
            raise NumericalError(
                f"the Gram matrix of the inputs is not positive definite, even with {damping:g} times the mean input "
                "power on its diagonal; calibrate in float32 on more text"
            )
        damping = min(max(10 * damping, 1e-6), LARGEST_DAMPING)
    del damped, diagonal
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return Feedback(factor, order, dead, damping, damping * mean)


def sweep(
    weight: Float[Tensor, "out in"], spread: Feedback, decide: Decide, *, block: int = 128
) -> Float[Tensor, "in out"]:
    """Decide all columns; the errors e, in the order of the sweep.  What was decided only `decide` knows."""
    columns = weight.T[spread.order].contiguous()
    factor = spread.factor.to(weight.dtype)
    own = factor.diagonal().tolist()
    errors = torch.empty_like(columns)
    for start in range(0, len(columns), block):
        end = min(start + block, len(columns))
        left = torch.addmm(columns[start:end], factor[:start, start:end].T, errors[:start], alpha=-1)
        inside = factor[start:end, start:end]
        for i in range(end - start):
            error = torch.sub(left[i], decide(start + i, left[i:]), out=errors[start + i]).div_(own[start + i])
            left[i + 1 :].addr_(inside[i, i + 1 :], error, alpha=-1)
    return errors

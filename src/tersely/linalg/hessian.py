"""Error feedback: decide the columns of a weight one after another, and let the later ones repair the earlier.

Let G = E[x xᵀ] be the Gram matrix of the inputs, H = G + λI, and W' what a weight W is to become, its columns taken
from a grid, or zero.  With H = Rᵀ R, R lower triangular, the output error is

    tr((W - W') H (W - W')ᵀ) = Σ_i ‖R_ii (v_i - w'_i)‖²,    v_i = w_i + Σ_{j<i} (R_ij / R_ii) (w_j - w'_j).

So column i, at its turn, is to be near v_i in the place of w_i: that is the best that columns which are still free can
do for those that were decided (optimal brain surgeon, one Hessian for all rows; GPTQ).  R_ii² is the price of an error
in column i once all later columns have made up for it, and the price of the whole is known without another product.

Nothing is inverted.  The papers walk the rows of U, H⁻¹ = Uᵀ U; that is U = R⁻ᵀ, and both name the same v_i, as
rounding to the nearest plane of a lattice does (Babai, 1986; Chen et al., The Geometry of LLM Quantization, 2025,
arXiv 2507.18553).  R is the Cholesky factor of H with the columns in reverse order, turned back.  All this is float64;
the sweep itself runs in the dtype of the weight.

The sweep is in blocks: a block is brought up to date by one product with all that was decided before it, and only
inside it the columns update each other one by one.  The result does not depend on the size of the blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tersely.errors import NumericalError
from tersely.kernels import Block, Decide, one_by_one

LARGEST_DAMPING = 1.0


@dataclass(frozen=True)
class Feedback:
    """How errors spread, for one Gram matrix; everything in the order in which columns are decided."""

    root: Float[Tensor, "in in"]
    """R, float64."""
    order: Int[Tensor, " in"]
    """Place → column of the weight."""
    dead: Bool[Tensor, " in"]
    """Columns of the weight whose input was silent throughout; they cost nothing, whatever they become."""
    damping: float
    """What was added in the end, as a fraction of the mean input power: what was asked for, or more."""
    added: float
    """λ, in the unit of the Gram matrix."""

    @property
    def own(self) -> Float[Tensor, " in"]:
        """R_ii: an error of 1 in a column costs its square."""
        return self.root.diagonal()

    def inverse(self) -> Float[Tensor, "in in"]:
        """U = R⁻ᵀ, upper triangular: an error e in column i moves a later column j by -e U_ij / U_ii."""
        identity = torch.eye(len(self.root), dtype=self.root.dtype, device=self.root.device)
        return torch.linalg.solve_triangular(self.root, identity, upper=False).T


@dataclass(frozen=True)
class Swept:
    """What a sweep leaves."""

    off: Float[Tensor, "in out"]
    """W - W', in the order of the sweep."""
    cost: float
    """tr((W - W') H (W - W')ᵀ), the damping's share included."""

    def loss(self, spread: Feedback) -> float:
        """tr((W - W') G (W - W')ᵀ): the damping's share is taken out."""
        off = torch.linalg.vector_norm(self.off, dtype=torch.float64)  # no square in float32
        return max(float(self.cost - spread.added * off**2), 0.0)  # what is negative is rounding


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
    return Feedback(lower.flip(0, 1).T, order, dead, damping, damping * mean)


def sweep(weight: Float[Tensor, "out in"], spread: Feedback, decide: Decide, *, block: int = 128) -> Swept:
    """Decide all columns.  What was decided only `decide` knows."""
    return sweep_blocks(weight, spread, partial(one_by_one, decide), block=block)


def sweep_blocks(
    weight: Float[Tensor, "out in"], spread: Feedback, decide: Callable[[Block], None], *, block: int = 128
) -> Swept:
    """Likewise, by something that decides all columns of a block, of `block` columns or less."""
    columns = weight.T[spread.order].contiguous()
    own = spread.own.to(weight.dtype)
    follows = (spread.root / spread.own[:, None]).to(weight.dtype)
    off, cost = torch.empty_like(columns), own.new_zeros((), dtype=torch.float64)
    for start in range(0, len(columns), block):
        end = min(start + block, len(columns))
        left = torch.addmm(columns[start:end], follows[start:end, :start], off[:start])
        decide(Block(start, columns[start:end], left, off[start:end], follows[start:end, start:end]))
        cost += torch.linalg.vector_norm(left.mul_(own[start:end, None]), dtype=torch.float64) ** 2
    return Swept(off, float(cost))

"""The best approximation of a weight by rank r, under any quadratic measure of error.

Let `W` (out x in) be a weight and `M` (in x in, positive semi-definite) say how much each input direction matters.
Over all W' of rank r,

    ‖(W - W') M^½‖²   is least for   W' = U_r U_rᵀ W,   and what is left is   Σ_{i>r} λ_i ,

where U, λ are the eigenvectors and eigenvalues (falling) of the output covariance  W M Wᵀ  (out x out).  Plain SVD is
M = I (Eckart and Young, 1936), channel scaling is a diagonal M, whitening is M = E[x xᵀ]: three papers, one function.

Nothing is inverted and no root of M is taken, so a rank-deficient M needs no special case: U is orthonormal whatever
M is, and at full rank U Uᵀ W is W itself.  The symmetric eigenproblem squares the condition number, which costs
singular values below 1e-8 of the largest their accuracy; in the error above, which adds their squares, that is 1e-16
of the whole.  For a weight that is taller than wide, W = Q R first, and the eigenproblem is that of R M Rᵀ (in x in):
always the smaller side.

Whoever knows the rank asks for that many vectors alone.  On a processor LAPACK's MRRR finds some eigenvectors of a
tridiagonal matrix without the others (Dhillon and Parlett, 2004), and only those are turned back: at side 4096 a third
of the time of all of them for a fifth of them.  PyTorch has no call for that; SciPy has.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from scipy import linalg
from threadpoolctl import ThreadpoolController
from torch import Tensor

from tersely.errors import NumericalError

SMALL = 512
"""Sides below this are done in an instant, with the same bits for every rank."""


@dataclass(frozen=True)
class OutputBasis:
    """The eigenvectors U and eigenvalues of W M Wᵀ, by falling energy; everything float64, k = min(out, in), or as many
    of the strongest as were asked for.

    For a tall weight U = Q V is kept in its parts, Q as the Householder reflectors of W = Q R: no product is formed
    that a truncation would mostly throw away.
    """

    energy: Float[Tensor, " k"]
    vectors: Float[Tensor, "side k"] | None  # V, or U itself for a weight that is not tall; None if not asked for
    core: Float[Tensor, "side in"]  # R, or W itself
    reflectors: tuple[Float[Tensor, "out in"], Float[Tensor, " in"]] | None

    def left_over(self) -> Float[Tensor, " k_plus_one"]:
        """Error left at rank 0, 1, ..., k, in the unit of `energy`.  Summed from the small end, where accuracy is."""
        if len(self.energy) < len(self.core):
            raise ValueError("this basis holds only the strongest directions; ask output_basis for all")
        return tails(self.energy)

    def factors(self, rank: int) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """(up, down) with up · down = U_r U_rᵀ W, balanced: column i of `up` has the norm of row i of `down`.

        Balanced factors share the dynamic range between them, which matters once they are rounded to 16 bits or less.
        """
        if self.vectors is None:
            raise ValueError("this basis was computed without vectors; ask output_basis for them")
        up = self.vectors[:, :rank]
        down = up.T @ self.core
        if self.reflectors is not None:
            reflectors, scales = self.reflectors
            padded = torch.cat([up, up.new_zeros(reflectors.shape[0] - up.shape[0], rank)])
            up = torch.ormqr(reflectors, scales, padded)
        return balanced(up, down)


def tails(energy: Float[Tensor, " k"]) -> Float[Tensor, " k_plus_one"]:
    """The sum from each entry on, and zero."""
    tail = energy.flip(0).cumsum(0).flip(0)
    return torch.cat([tail, tail.new_zeros(1)])


def balanced(
    up: Float[Tensor, "out rank"], down: Float[Tensor, "rank in"]
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """The same product; column i of `up` gets the norm of row i of `down`."""
    ratio = down.norm(dim=1) / up.norm(dim=0)
    scale = torch.where(ratio > 0, ratio, torch.ones_like(ratio)).sqrt()
    return up * scale, down / scale[:, None]


def covariance_of_outputs(
    weight: Float[Tensor, "out in"], metric: Float[Tensor, "in in"] | Float[Tensor, " in"] | None
) -> Float[Tensor, "out out"]:
    """W M Wᵀ for M full, diagonal (a vector), or the identity (None).  Same dtype as `weight`."""
    if metric is None:
        return weight @ weight.T
    return (weight * metric if metric.ndim == 1 else weight @ metric) @ weight.T


def output_basis(
    weight: Float[Tensor, "out in"],
    metric: Float[Tensor, "in in"] | Float[Tensor, " in"] | None = None,
    *,
    rank: int | None = None,
    vectors: bool = True,
) -> OutputBasis:
    """Eigenvectors and eigenvalues of W M Wᵀ, falling, by the symmetric eigenproblem of the smaller side.

    `metric`: full, a vector for a diagonal one, or None for the identity.  `rank`: how many of the strongest are
    wanted, all by default.  With ``vectors=False`` only the energies are computed, five times faster.  Raises
    NumericalError for entries that are not finite, on which LAPACK would not terminate or would return noise.
    """
    if not torch.isfinite(weight).all():
        raise NumericalError("the weight has entries that are not finite; repair the checkpoint before compressing it")
    if metric is not None and not torch.isfinite(metric).all():
        raise NumericalError("the input statistic has entries that are not finite; calibrate in float32 or bfloat16")
    core, reflectors = weight.double(), None
    if weight.shape[0] > weight.shape[1]:
        packed, scales = torch.geqrf(core)
        core, reflectors = packed[: weight.shape[1]].triu(), (packed, scales)
    covariance = covariance_of_outputs(core, None if metric is None else metric.double())
    covariance = (covariance + covariance.T) / 2  # equal to its transpose up to rounding; made exactly so
    if not torch.isfinite(covariance).all():
        raise NumericalError("the product of weight and input statistic overflows float64; a scale is wrong by far")
    if not vectors:
        return OutputBasis(torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0), None, core, reflectors)
    energy, directions = _strongest(covariance, len(covariance) if rank is None else rank)
    return OutputBasis(energy.flip(0).clamp(min=0), directions.flip(1), core, reflectors)


def _strongest(
    symmetric: Float[Tensor, "side side"], count: int
) -> tuple[Float[Tensor, " count"], Float[Tensor, "side count"]]:
    """The `count` largest eigenvalues, rising, and their eigenvectors; all together where that is as fast."""
    side = len(symmetric)
    elsewhere = symmetric.device.type != "cpu" or symmetric.requires_grad  # SciPy knows neither
    if elsewhere or side < SMALL or 2 * count > side:
        energy, directions = torch.linalg.eigh(symmetric)
        return energy[side - count :], directions[:, side - count :]
    with _blas().limit(limits=torch.get_num_threads(), user_api="blas"):
        try:
            found = linalg.eigh(
                symmetric.numpy(), subset_by_index=(side - count, side - 1), driver="evr", check_finite=False
            )
        except linalg.LinAlgError as error:
            raise NumericalError(f"the eigenvalues of a matrix of side {side} were not found: {error}") from error
    energy, directions = (torch.from_numpy(part) for part in found)
    return energy, directions


@cache
def _blas() -> ThreadpoolController:
    """SciPy's own, which knows nothing of PyTorch's number of threads; looking for it takes a while."""
    return ThreadpoolController()

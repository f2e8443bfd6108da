"""Columns that speak for the others: the interpolative decomposition of a tall matrix, from its Gram matrix alone.

Let `Z` (tokens x n) hold what n channels said.  Keep some of them, J, and write every other one as a combination of
these: Z ≈ Z_J T with T[:, J] = 1.  Pivoted QR chooses J: it takes the column with the most energy, projects it out of
all others, and repeats.  With Z P = Q R the best T and what it misses can be read off the parts of R:

    T = [1, R₁₁⁻¹ R₁₂] Pᵀ = argmin ‖Z - Z_J T‖,        Z - Z_J T = Q [0, R₂₂] Pᵀ.

Z has as many rows as there are tokens, but R needs G = Zᵀ Z only (n x n): it is the Cholesky factor of G with the same
pivots, RᵀR = PᵀGP, and T = G[J, J]⁻¹ G[J, :], the Nyström form.  G here is the mean of z zᵀ, so errors are per token.

If the channels go on into a matrix W (out x n), replacing Z by Z_J T costs E‖W (z - Tᵀ z_J)‖² = ‖R₂₂ W₂ᵀ‖², the sum
over the rows i ≥ k of ‖(R Wᵀ)ᵢ‖²: as R is triangular, its later rows know nothing of the first k columns.  So one
factorisation and one product give the error for every k at once.

Weights on the columns change which of them are chosen and nothing else: G scaled on both sides eliminates to the same
remainder, scaled on both sides, and T is a least-squares solution whatever led to J.  So they enter as factors of the
energy at the moment of choice; nothing is scaled, and nothing has to be divided by a weight that may be zero.

Squaring Z squares its condition number.  A column whose remaining energy has fallen to rounding (n · 2⁻⁵² of its own)
counts as spoken for: its row of R is zero, it is chosen after all others, and no coefficient is ever put on it.  Exact
copies, silent channels and fewer tokens than channels therefore need no special case.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tersely.errors import NumericalError

PANEL = 128
"""Pivots between two updates of the whole remainder: each alone costs a matrix times a vector, an update a product."""


@dataclass(frozen=True)
class Interpolation:
    """The order in which columns were chosen, and R.  Everything float64.

    Row i of `factor` belongs to the column `order[i]`; its columns are numbered as in the Gram matrix, so that
    factorᵀ factor = G.  It is zero for the columns chosen before, and zero as a whole where nothing was left.
    """

    order: Int[Tensor, " n"]
    factor: Float[Tensor, "n n"]

    def left_over(self, outgoing: Float[Tensor, "out n"]) -> Float[Tensor, " n_plus_one"]:
        """E‖W(z - Tᵀ z_J)‖² for the first 0, 1, ..., n columns kept.  Summed from the small end, where accuracy is."""
        lost = (self.factor @ outgoing.double().T).square().sum(1)
        tail = lost.flip(0).cumsum(0).flip(0)
        return torch.cat([tail, tail.new_zeros(1)])

    def kept(self, count: int) -> Int[Tensor, " kept"]:
        """The first `count` columns chosen, in rising order."""
        return self.order[:count].sort().values

    def coefficients(self, count: int) -> Float[Tensor, "kept n"]:
        """T for the first `count` columns: row i belongs to ``kept(count)[i]``."""
        first, others = self.order[:count], self.order[count:].sort().values
        rows, height = self.factor[:count], self._heights(count)
        live = height > 0
        solved = rows.new_zeros(count, len(others))
        solved[live] = torch.linalg.solve_triangular(rows[live][:, first[live]], rows[live][:, others], upper=True)
        t = rows.new_zeros(count, self.factor.shape[1])
        t[:, others] = solved[first.argsort()]
        t[torch.arange(count, device=t.device), self.kept(count)] = 1
        return t

    def condition(self, count: int) -> float:
        """Largest over smallest diagonal entry of R₁₁, those that are zero aside: a lower bound of its condition."""
        height = self._heights(count)
        live = height[height > 0]
        return float(live.max() / live.min()) if len(live) else 1.0

    def _heights(self, count: int) -> Float[Tensor, " kept"]:
        return self.factor[torch.arange(count, device=self.factor.device), self.order[:count]]


def pivoted_cholesky(gram: Float[Tensor, "n n"], weights: Float[Tensor, " n"] | None = None) -> Interpolation:
    """Choose columns one by one, the one with the most energy left first: what pivoted QR of Z·diag(weights) chooses.

    Columns of weight zero come after all others, by their energy.
    """
    run = _Elimination(gram)
    energy = torch.ones_like(run.power) if weights is None else weights.double().square()
    while run.choose(energy, PANEL):
        pass
    while run.choose(torch.ones_like(energy), PANEL):
        pass
    # what remains cannot be told from rounding; the louder first
    return run.result(run.rest[(run.power * energy)[run.rest].argsort(descending=True, stable=True)])


def cholesky_in_order(gram: Float[Tensor, "n n"], width: int, order: Int[Tensor, " blocks"]) -> Interpolation:
    """Choose blocks of `width` neighbouring columns in a given order."""
    remaining = iter(order.tolist())
    return _by_blocks(gram, width, lambda residual, blocks: next(remaining))


def cholesky_by_energy(gram: Float[Tensor, "n n"], width: int, outgoing: Float[Tensor, "out n"]) -> Interpolation:
    """Choose blocks of `width` neighbouring columns, the one whose remainder sends most into the output first.

    That is E‖W_b r_b‖² with r_b the part of block b that the blocks chosen before cannot express.  It does not depend
    on the basis inside a block (z_b → A z_b, W_b → W_b A⁻¹).  For width 1 it is the weighted energy |r_b|² ‖W_b‖² of
    `pivoted_cholesky`.
    """
    parts = outgoing.double().unflatten(1, (-1, width)).permute(1, 0, 2)
    reach = parts.transpose(1, 2) @ parts  # W_bᵀ W_b of every block

    def loudest(residual: Tensor, blocks: Tensor) -> int:
        own = residual.unflatten(0, (-1, width)).unflatten(2, (-1, width)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return int(blocks[(own * reach[blocks]).sum((1, 2)).argmax()])

    return _by_blocks(gram, width, loudest)


def _by_blocks(gram: Float[Tensor, "n n"], width: int, pick: Callable[[Tensor, Tensor], int]) -> Interpolation:
    """`pick` is given the remainder and the numbers of the blocks in it, and returns one of these."""
    if gram.shape[0] % width:
        raise ValueError(f"{gram.shape[0]} columns are no whole number of blocks of {width}")
    run = _Elimination(gram)
    while len(run.rest):
        block = pick(run.residual, run.rest[::width] // width)
        inside = torch.zeros_like(run.power)
        inside[block * width : (block + 1) * width] = 1
        run.choose(inside, width, whole=True)
    return run.result(run.rest)


class _Elimination:
    """A Gram matrix from which columns are projected out; `residual` is what is left, over the columns `rest`."""

    def __init__(self, gram: Tensor) -> None:
        if not torch.isfinite(gram).all():
            raise NumericalError(
                "the input statistic has entries that are not finite; calibrate in float32 or bfloat16"
            )
        gram = gram.double()
        self.power = gram.diagonal().clamp(min=0)
        self.residual = (gram + gram.T) / 2  # equal to its transpose up to rounding; made exactly so
        self.rest = torch.arange(gram.shape[0], device=gram.device)
        self._floor = self.power * gram.shape[0] * torch.finfo(torch.float64).eps
        self._factor = torch.zeros_like(gram)
        self._order: list[Tensor] = []

    def choose(self, weights: Tensor, most: int, *, whole: bool = False) -> int:
        """Project out up to `most` columns, each the one with the largest weighted energy left; how many there were.

        With `whole` all other columns of positive weight go too, as columns that others speak for: their rows of the
        factor stay zero.
        """
        of_rest, floor = weights[self.rest], self._floor[self.rest]
        left = self.residual.diagonal().clone()
        free = torch.ones_like(left)
        rows = self.residual.new_zeros(min(most, len(self.rest)), len(self.rest))
        taken: list[int] = []
        while len(taken) < len(rows):
            score = torch.where(left > floor, left * of_rest, 0.0) * free
            pivot = int(score.argmax())
            if not score[pivot] > 0:
                break
            done = len(taken)
            height = left[pivot].sqrt()
            # a row, since the remainder is symmetric and rows lie together in memory
            row = (self.residual[pivot] - rows[:done, pivot] @ rows[:done]) / height * free
            row[pivot] = height
            free[pivot] = 0
            left -= row.square()
            rows[done] = row
            taken.append(pivot)
        rows = rows[: len(taken)]
        begin = sum(map(len, self._order))
        self._factor[begin : begin + len(taken), self.rest] = rows
        if whole:
            taken += ((of_rest > 0) & (free > 0)).nonzero().flatten().tolist()
        if taken:
            self._remove(torch.tensor(taken, device=self.rest.device), rows)
        return len(taken)

    def result(self, last: Tensor) -> Interpolation:
        """`last`: what is still in `rest`, in the order in which it is to be chosen."""
        return Interpolation(torch.cat([*self._order, last]), self._factor)

    def _remove(self, places: Tensor, rows: Tensor) -> None:
        """Take the columns at `places` of `rest` out, and `rows`ᵀ `rows` from what stays.

        What stands in front and stays moves to the places that become free, and the front is cut off: the remainder is
        large, and to copy it each time would take longer than to compute it.  Neighbours that move stay neighbours.
        """
        self._order.append(self.rest[places])
        count = len(places)
        goes = torch.zeros_like(self.rest, dtype=torch.bool)
        goes[places] = True
        movers = (~goes[:count]).nonzero().flatten()
        freed = goes[count:].nonzero().flatten() + count
        self.residual[freed] = self.residual[movers]
        self.residual[:, freed] = self.residual[:, movers]
        rows[:, freed] = rows[:, movers]
        self.rest[freed] = self.rest[movers]
        self.rest = self.rest[count:]
        self.residual = self.residual[count:, count:]
        self.residual.addmm_(rows[:, count:].T, rows[:, count:], alpha=-1)

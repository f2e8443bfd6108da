"""A few weights in 16 bits, all others as small integers: what methods share that tell the two apart.

Exactly ⌈r · out · in⌉ weights of a linear are outliers, r being the share asked for, so that its bytes follow from its
shape.  The grid is fitted without them: in their places it sees zero, which lies in every range and is a level, so they
widen nothing and cost nothing.  There the integers hold the code of zero, and a sparse term (kind `sparse`) holds the
whole weight; both together are a kind `sum`.  Without outliers there is nothing to add, and the integers stand alone.

Under error feedback an outlier takes the value that its weight has when its turn comes, whatever that is, in 16 bits:
it causes no error of its own, makes up for those of the columns before it, and hands none on.

What leaving a weight out is worth: the priced error of its group, Σ_j p_j (w_j - w'_j)², on the grid of all its
weights, minus that of the others on the grid of the others.  A grid knows its least and its largest weight only:
leaving out any other changes nothing but its own share, so that one weight at a time is left out of every group at the
cost of three grids, not of as many as a group has weights.  A group may hold several outliers that hide each other, so
they are taken in rounds, `ROUNDS` parts of them, each on the grids that the former leave.

What an entry costs in a sweep is R_ii |w - level(w)|, with w the weight at its turn: its square is what rounding it
adds to the output error once all later columns have made up for it (`linalg.hessian`).
"""

import logging
import math
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from tersely.errors import NumericalError, RecipeError
from tersely.kernels import nearest_codes
from tersely.kinds import LinearKind, SumLinear
from tersely.kinds.quantized import QuantizedLinear
from tersely.kinds.sparse import SparseLinear, sparse_bytes
from tersely.linalg.grid import Form, Grid, fit_grid, group_size, in_groups
from tersely.linalg.hessian import Feedback, feedback, sweep
from tersely.stats import Gram, Stats

logger = logging.getLogger(__name__)

ROUNDS = 4
"""Parts in which outliers are left out."""


def check_outliers(method: str, share: float, damping: float) -> None:
    """Raises RecipeError for what is no share, and for no damping."""
    if not 0 <= share <= 1:
        raise RecipeError(f"{method}: share {share}; wanted 0 to 1, of the weights of each linear")
    if not 0 <= damping < math.inf:
        raise RecipeError(f"{method}: damping {damping}; wanted 0 or more, a fraction of the mean input power")


def outlier_count(share: float, shape: tuple[int, int]) -> int:
    """⌈share · out · in⌉, of the share as it was written: 0.07 of 100 is 7, though not in binary."""
    return math.ceil(Fraction(str(share)) * shape[0] * shape[1])


def outlier_bytes(shape: tuple[int, int], count: int) -> int:
    """Of the sparse term; no outliers, no term."""
    return sparse_bytes(shape, count) if count else 0


def metric_of(stats: Stats) -> Float[Tensor, "in in"]:
    """The Gram matrix of the inputs; the identity where all of them were silent, as nothing is known of any then."""
    gram = stats[Gram].mean()
    return gram if gram.diagonal().any() else torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def spread_of(method: str, stats: Stats, damping: float, *, loudest_first: bool) -> Feedback:
    """How errors spread on these inputs; a warning where that took more damping than was asked for."""
    spread = feedback(metric_of(stats), damping=damping, loudest_first=loudest_first)
    if spread.damping > damping:
        logger.warning(
            "%s: a Gram matrix is not positive definite with damping %g; took %g", method, damping, spread.damping
        )
    return spread


def largest(score: Float[Tensor, "out in"], count: int) -> Bool[Tensor, "out in"]:
    """The places of the `count` largest scores; of equal ones those first that lie first, row by row.

    Raises NumericalError for scores that are not finite.
    """
    if not torch.isfinite(score).all():
        raise NumericalError("the scores of weights are not finite; calibrate in float32 or bfloat16")
    if not count:
        return torch.zeros_like(score, dtype=torch.bool)
    flat = score.flatten()
    least = flat.topk(count).values[-1]
    chosen = flat > least
    ties = (flat == least).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.view_as(score)


def left_out(
    weight: Float[Tensor, "out in"],
    prices: Float[Tensor, "#out in"],
    count: int,
    bits: int,
    group: int,
    form: Form,
) -> tuple[Bool[Tensor, "out in"], float]:
    """The `count` weights that are worth most when left out, and the least that one of them is worth, or 0.

    prices: of the square of an error in an entry.
    """
    outliers, least = torch.zeros_like(weight, dtype=torch.bool), math.inf
    for part in range(ROUNDS):
        wanted = count * (part + 1) // ROUNDS - count * part // ROUNDS
        if not wanted:
            continue
        worth = worth_leaving_out(weight.masked_fill(outliers, 0.0), prices, bits, group, form)
        found = largest(worth.masked_fill_(outliers, -torch.finfo(worth.dtype).max), wanted)
        least = min(least, float(worth[found].min()))
        outliers |= found
    return outliers, max(least, 0.0) if count else 0.0


def worth_leaving_out(
    weight: Float[Tensor, "out in"], prices: Float[Tensor, "#out in"], bits: int, group: int, form: Form
) -> Float[Tensor, "out in"]:
    """See above; float64.  Below zero where the grid of the others happens to fit worse."""

    def errors(of: Tensor) -> Float[Tensor, "out in"]:
        grid = fit_grid(of, bits, group, form)
        return (of.double() - grid.levels(grid.nearest(of)).double()).square_() * prices

    own, grouped = errors(weight), in_groups(weight, group)
    of_group = in_groups(own, group).sum(-1, keepdim=True)
    worth = own.clone()
    # zeros are in every range, and so they are never what stretches it
    ends = (grouped, -grouped) if form == "asymmetric" else (grouped.abs(),)
    for end in ends:
        farthest = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, end.argmax(-1, keepdim=True), True)
        there = farthest.flatten(1)[:, : weight.shape[1]]
        others = in_groups(errors(weight.masked_fill(there, 0.0)), group).sum(-1, keepdim=True)
        of_end = (of_group - others).expand_as(grouped).flatten(1)[:, : weight.shape[1]]
        worth = torch.where(there, of_end, worth)
    return worth


def with_outliers(
    codes: UInt8[Tensor, "out in"],
    grid: Grid,
    outliers: Bool[Tensor, "out in"],
    values: Float[Tensor, "out in"],
    dtype: torch.dtype,
) -> LinearKind:
    """The codes, which stand for zero at the outliers, and the values there."""
    integers = QuantizedLinear.from_codes(codes, grid, dtype)
    if not outliers.any():
        return integers
    return SumLinear.of([integers, SparseLinear.of(values, outliers, dtype)])


def swept(
    weight: Float[Tensor, "out in"],
    spread: Feedback,
    grid: Grid,
    outliers: Bool[Tensor, "out in"] | None = None,
    *,
    threshold: float = math.inf,
    block: int = 128,
) -> tuple[UInt8[Tensor, "out in"], Float[Tensor, "out in"], Float[Tensor, "out in"]]:
    """Round with error feedback on a grid, outliers aside: those given, or else whatever costs more than `threshold`.

    Returns the codes, the values of all entries at their turn, and what each costs if it is rounded.  With an
    infinite threshold this is GPTQ's sweep.  Raises NumericalError where it diverges.
    """
    scales = grid.scales.values().to(weight.dtype).T.contiguous()
    zeros = grid.zeros(weight.dtype).T.contiguous()
    given = None if outliers is None else outliers.T.contiguous()
    columns, size = spread.order.tolist(), group_size(weight.shape[1], grid.group)
    own = spread.own.tolist()
    codes = torch.empty(weight.T.shape, dtype=torch.uint8, device=weight.device)
    values, costs = torch.empty_like(weight.T), torch.empty_like(weight.T)

    def decide(place: int, left: Tensor) -> Tensor:
        column, value = columns[place], left[0]
        scale, zero = scales[column // size], zeros[column // size]
        code = nearest_codes(value, scale, zero, grid.top)
        rounded = (code - zero).mul_(scale)
        values[column] = value
        cost = torch.sub(value, rounded, out=costs[column]).mul_(own[place]).abs_()
        out = cost > threshold if given is None else given[column]
        codes[column] = torch.where(out, zero, code)
        return torch.where(out, value, rounded)

    sweep(weight, spread, decide, block=block)
    if not torch.isfinite(values).all() or not torch.isfinite(costs).all():
        raise NumericalError("the error feedback diverged; give a larger damping")
    return codes.T.contiguous(), values.T, costs.T

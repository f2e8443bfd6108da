"""What the truncating methods share: ranks, their bytes, the metric of the inputs, and the factorised module.

All of them may store their result pivoted (`pivot`, see `kinds.pivoted`): r rows of the product take the place of a
factor, and r² numbers fewer are stored at rank r.  The product and its error are the same, so at equal bytes the rank
is larger.  Some may store it remapped (`remap`, see `kinds.remapped`), in one byte and two; their errors then are those
of what is stored, rounding included.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import RecipeError
from tersely.kinds import LinearKind, LowRankLinear, PivotedLinear, RemappedLinear
from tersely.kinds.pivoted import pivoted_bytes
from tersely.kinds.remapped import remapped_bytes
from tersely.linalg.randomised import LeadingBasis, leading_basis
from tersely.linalg.truncation import OutputBasis, covariance_of_outputs, output_basis
from tersely.option import Amount, Option
from tersely.stats import Gram, Stats


class Pivots(Protocol):
    """A method that lets the user choose."""

    @property
    def pivot(self) -> bool: ...


class _Leaves:
    """Of an instance they depend on how it stores its result, of the class they are those of its defaults."""

    def __get__(self, method: Pivots | None, owner: type) -> tuple[str, ...]:
        if getattr(method, "remap", False):
            return ()
        return ("down", "rest") if method is not None and method.pivot else ("down", "up")


def leaves_as_stored() -> tuple[str, ...]:
    """The children of the result that are linears again, for the class attribute `leaves` of a method that pivots."""
    return _Leaves()  # type: ignore[return-value]  # a tuple is what whoever reads the attribute is given


def largest_rank(shape: tuple[int, int], pivot: bool = False) -> int:
    """Of a weight; a pivoted one keeps a row at least that it combines out of others."""
    return min(shape[0] - pivot, shape[1])


def rank_sizes(
    shape: tuple[int, int], itemsize: int, pivot: bool = False, ranks: Sequence[int] | None = None
) -> list[Option]:
    """Rank 0 and the ranks that are offered (default: all), and the bytes of what is stored of them."""
    sizes = [Option(0, 0, None)]
    for rank in range(1, largest_rank(shape, pivot) + 1) if ranks is None else ranks:
        nbytes = pivoted_bytes(shape, rank, itemsize) if pivot else rank * sum(shape) * itemsize
        sizes.append(Option(rank, nbytes, None))
    return sizes


def rank_options(weight: Float[Tensor, "out in"], basis: OutputBasis, pivot: bool = False) -> list[Option]:
    """Every rank with its bytes and the energy it leaves behind."""
    sizes = rank_sizes((weight.shape[0], weight.shape[1]), weight.element_size(), pivot)
    left = basis.left_over().tolist()
    return [replace(size, error=left[size.amount]) for size in sizes]


def check_storage(method: str, pivot: bool, remap: bool) -> None:
    if pivot and remap:
        raise RecipeError(f"{method}: pivot and remap are two ways to store the factors; wanted one of them at most")


def remapped_sizes(shape: tuple[int, int], ranks: Sequence[int] | None = None) -> list[Option]:
    """As `rank_sizes` for what is stored remapped, whose bytes do not depend on the weight's dtype."""
    offered = range(1, largest_rank(shape) + 1) if ranks is None else ranks
    return [Option(0, 0, None), *(Option(rank, remapped_bytes(shape, rank), None) for rank in offered)]


def remapped_options(
    weight: Float[Tensor, "out in"], basis: OutputBasis, metric: Float[Tensor, "in in"] | None
) -> list[Option]:
    """Every rank with its bytes and the error of what is stored; the components of a rank are the first of them all."""
    stored = remapped(weight, basis, len(basis.energy))
    left = left_by_remapped(weight, stored, metric).tolist()
    return [replace(size, error=left[size.amount]) for size in remapped_sizes((weight.shape[0], weight.shape[1]))]


def left_by_remapped(
    weight: Float[Tensor, "out in"], stored: RemappedLinear, metric: Float[Tensor, "in in"] | None
) -> Float[Tensor, " rank_plus_one"]:
    """tr(Δ M Δᵀ) of the first 0, 1, ... components."""
    up, scale, down = (part.double() for part in stored.factors())
    sides, wide = up * scale[:, None], weight.double()
    reached = down if metric is None else down @ metric
    met = ((sides @ wide) * reached).sum(1)
    among = (sides @ sides.T) * (reached @ down.T)
    # what a component adds to the square of the sum of those before it
    added = 2 * among.tril(-1).sum(1) + among.diagonal()
    whole = covariance_of_outputs(wide, metric).diagonal().sum()
    return (whole + torch.cat([whole.new_zeros(1), (added - 2 * met).cumsum(0)])).clamp(min=0)


def remapped(weight: Float[Tensor, "out in"], basis: OutputBasis | LeadingBasis, rank: int) -> RemappedLinear:
    """The first vectors of a basis and what belongs to them, rounded."""
    return RemappedLinear.of(weight, basis.factors(rank)[0])


def low_rank(
    weight: Float[Tensor, "out in"],
    metric: Float[Tensor, "in in"] | Float[Tensor, " in"] | None,
    rank: int,
    pivot: bool = False,
    remap: bool = False,
    power: int | None = None,
) -> LinearKind:
    """The best module of that rank under a metric (see `linalg.truncation`), in the weight's dtype; with `power` the
    nearly best by a randomised projection with so many products (see `linalg.randomised`)."""
    check_rank(weight, rank, pivot)
    if power is not None:
        basis: OutputBasis | LeadingBasis = leading_basis(weight, metric, rank, power)
    else:  # rounded to bytes, errors hang on the signs of the vectors: those have to be the ones of `options`
        basis = output_basis(weight, metric, rank=None if remap else rank)
    return remapped(weight, basis, rank) if remap else factorised(weight, basis, rank, pivot)


def factorised(
    weight: Float[Tensor, "out in"], basis: OutputBasis | LeadingBasis, rank: int, pivot: bool = False
) -> LowRankLinear | PivotedLinear:
    """U_r U_rᵀ W for the first vectors of a basis, as a module in the weight's dtype."""
    up, down = basis.factors(rank)
    kind = PivotedLinear if pivot else LowRankLinear
    return kind.from_factors(up, down, dtype=weight.dtype)


def check_rank(weight: Float[Tensor, "out in"], rank: Amount, pivot: bool = False) -> None:
    """Raises RecipeError for a rank that the weight cannot be given."""
    largest = largest_rank((weight.shape[0], weight.shape[1]), pivot)
    if not isinstance(rank, int) or not 1 <= rank <= largest:
        stored = " that is stored pivoted" if pivot else ""
        raise RecipeError(f"rank {rank} for a weight of {tuple(weight.shape)}{stored}; wanted 1 to {largest}")


def check_damping(method: str, damping: float) -> None:
    if not 0 <= damping < math.inf:
        raise RecipeError(f"{method}: damping {damping}; wanted 0 or more, a fraction of the mean input power")


def damped_gram(stats: Stats, damping: float) -> Float[Tensor, "in in"]:
    """E[x xᵀ] with `damping` times the mean input power added to its diagonal; the identity for silent inputs."""
    gram = stats[Gram].mean()
    power = gram.diagonal().mean()
    if power == 0:  # nothing was observed: every direction counts alike
        return torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    gram.diagonal().add_(damping * power)  # of the fresh tensor that `mean` made
    return gram

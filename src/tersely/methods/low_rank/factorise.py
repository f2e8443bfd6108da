"""What the truncating methods share: ranks, their bytes, and the factorised module."""

from jaxtyping import Float
from torch import Tensor

from tersely.errors import RecipeError
from tersely.kinds import LowRankLinear
from tersely.linalg.truncation import OutputBasis, output_basis
from tersely.option import Option


def rank_sizes(shape: tuple[int, int], itemsize: int) -> list[Option]:
    """Every rank from 0 and the bytes of both its factors."""
    return [Option(rank, rank * sum(shape) * itemsize, None) for rank in range(min(shape) + 1)]


def rank_options(weight: Float[Tensor, "out in"], basis: OutputBasis) -> list[Option]:
    """Every rank with its bytes and the energy it leaves behind."""
    sizes = rank_sizes((weight.shape[0], weight.shape[1]), weight.element_size())
    return [
        Option(size.amount, size.nbytes, left) for size, left in zip(sizes, basis.left_over().tolist(), strict=True)
    ]


def low_rank(
    weight: Float[Tensor, "out in"],
    metric: Float[Tensor, "in in"] | Float[Tensor, " in"] | None,
    rank: int,
) -> LowRankLinear:
    """The best `LowRankLinear` of that rank under a metric (see `linalg.truncation`), in the weight's dtype."""
    if not 1 <= rank <= min(weight.shape):
        raise RecipeError(f"rank {rank} for a weight of {tuple(weight.shape)}; wanted 1 to {min(weight.shape)}")
    up, down = output_basis(weight, metric).factors(rank)
    return LowRankLinear.from_factors(up, down, dtype=weight.dtype)

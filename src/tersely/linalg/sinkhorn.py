"""Scales of rows and columns under which all of them vary alike: a damped iteration like Sinkhorn's.

The imbalance of a matrix is what its liveliest row or column has over its dullest,

    I(W) = max(max_i sd(W_i), max_j sd(W^j)) / min(min_i sd(W_i), min_j sd(W^j)) >= 1,

with unbiased deviations, the denominator at least 1e-12.  Wanted are μ and t for which that of  W / (μ tᵀ)  is small.
With u = log μ and v = log t, both zero at first, τ the least deviation of the matrix, clipped, plus 1e-6,

    C = W / (exp(u) exp(v)ᵀ)
    v ← v + log clamp(clip(sd C^j) / τ, 0.7, 2)      u ← u + log clamp(clip(sd C_i) / τ, 0.7, 2)     both of the same C

and both are kept in [-0.3, 10]; clip is to [1e-3, 1e3].  Since both sides correct the same excess the imbalance may
rise again: the iterate with the least one is kept, and at the first rise the matrix is left as it is.

The constants are absolute, so the matrix is first divided by the deviation of all its entries (the authors leave that
out, and matrices whose columns deviate by less than 1e-3 are then not touched at all).

C is never formed.  With a = 1/exp(v) and b = 1/exp(u),

    Σ_j C_ij = b_i Σ_j W_ij a_j,     Σ_j C_ij² = b_i² Σ_j W_ij² a_j²,

so deviations are products of W and of the squares of its entries with vectors: in float64, all slabs at once.

A matrix of one row or one column has no deviation on one side, and is balanced as it stands.

Source: Müller et al., SINQ: Sinkhorn-Normalized Quantization for Calibration-Free Low-Precision LLM Weights, 2025,
section 2 (arXiv 2509.22944).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.linalg.grid import group_size

STEP = (0.7, 2.0)
LOG_SCALES = (-0.3, 10.0)
DEVIATIONS = (1e-3, 1e3)
LEAST = 1e-12
ABOVE_LEAST = 1e-6


def balance(
    slabs: Float[Tensor, "slabs rows columns"], rounds: int
) -> tuple[Float[Tensor, "slabs rows"], Float[Tensor, "slabs columns"], Float[Tensor, " slabs"]]:
    """μ and t of every matrix, float64, and the imbalance that they leave.

    slabs: of two rows and two columns at least, float64, in units of their deviation.
    rounds: iterates that are looked at; the first is u = v = 0.
    """
    squares = slabs.square()
    count, rows, columns = slabs.shape
    u, v = slabs.new_zeros(count, rows), slabs.new_zeros(count, columns)

    def deviations() -> tuple[Tensor, Tensor]:
        """Of the rows and of the columns of C."""
        b, a = torch.exp(-u), torch.exp(-v)
        of_rows = _deviation(slabs, squares, a, b)
        return of_rows, _deviation(slabs.mT, squares.mT, b, a)

    row, column = deviations()
    smallest = torch.minimum(row.clamp(*DEVIATIONS).amin(1), column.clamp(*DEVIATIONS).amin(1))
    target = (smallest + ABOVE_LEAST)[:, None]
    least, best_u, best_v = _imbalance(row, column), u, v
    running = torch.ones(count, 1, dtype=torch.bool, device=slabs.device)
    for _ in range(rounds):
        found = _imbalance(row, column)
        kept = (found <= least)[:, None]
        least = torch.minimum(found, least)
        best_u, best_v = torch.where(kept, u, best_u), torch.where(kept, v, best_v)
        running = running & kept
        if not running.any():
            break
        u, v = (
            torch.where(running, (log + _step(found_there, target)).clamp(*LOG_SCALES), log)
            for log, found_there in ((u, row), (v, column))
        )
        row, column = deviations()
    return best_u.exp(), best_v.exp(), least


def _deviation(
    slabs: Float[Tensor, "slabs long across"],
    squares: Float[Tensor, "slabs long across"],
    across: Float[Tensor, "slabs across"],
    along: Float[Tensor, "slabs long"],
) -> Float[Tensor, "slabs long"]:
    """Unbiased deviations of the rows of slabs whose columns and rows are multiplied by two vectors."""
    count = slabs.shape[2]
    total = (slabs @ across[..., None])[..., 0]
    power = (squares @ across.square()[..., None])[..., 0]
    return ((power - total.square() / count).clamp(min=0) / (count - 1)).sqrt() * along


def _imbalance(row: Float[Tensor, "slabs rows"], column: Float[Tensor, "slabs columns"]) -> Float[Tensor, " slabs"]:
    return torch.maximum(row.amax(1), column.amax(1)) / torch.minimum(row.amin(1), column.amin(1)).clamp(min=LEAST)


def _step(deviation: Float[Tensor, "slabs some"], target: Float[Tensor, "slabs 1"]) -> Float[Tensor, "slabs some"]:
    return (deviation.clamp(*DEVIATIONS) / target).clamp(*STEP).log()


def column_balance(weight: Float[Tensor, "rows columns"], group: int, rounds: int) -> Float[Tensor, " columns"]:
    """t of a weight, float64: slabs of `group` neighbouring columns (0: all) are balanced each for itself, the last one
    as narrow as it is.  The same for any multiple of the weight."""
    wide = weight.detach().double()
    deviation = wide.std() if wide.numel() > 1 else wide.new_zeros(())
    wide = wide / torch.where(deviation == 0, torch.ones_like(deviation), deviation)
    rows, columns = wide.shape
    size = group_size(columns, group)
    whole = columns // size * size
    parts = [wide[:, :whole].view(rows, -1, size)] if whole else []
    if whole < columns:
        parts.append(wide[:, None, whole:])
    found = [
        balance(part.transpose(0, 1), rounds)[1].flatten()
        if min(rows, part.shape[2]) > 1
        else torch.ones_like(part[0]).flatten()
        for part in parts
    ]
    return torch.cat(found)

"""Which column of a weight gets how many bits, where the bytes of a row are given.

There are n columns and a few widths b.  Column j at width b costs c_jb, in any unit.  A row of the stored weight takes

    R = Σ_b f_b(n_b),        n_b columns of width b,        Σ_b n_b = n,

f_b(k) being the bytes of k columns in a segment of their own: codes, packed and rounded up to bytes, and the scales and
zero points of their groups, the last of which may be smaller.  Metadata is part of the price, so a width that few
columns have is dear: it begins a group.  Wanted is

    minimise  Σ_j c_j,b(j)    with   R = the bytes that are asked for, exactly.

Every set of widths is tried by itself.  One width is a yes or no.  Of two, low and high, the columns with the smallest
c_high - c_low are the high ones, and all numbers of them are compared: exact.  Of more, where the costs of a column are
convex in its width, taking the steps of all columns in the order of what they gain per bit is the optimum for every
total that it passes; where they are not convex, the same holds of their lower hull.  That walk ends next to the asked
bytes.  From there some columns are exchanged: the cheapest few steps up and down between neighbouring widths, in all
numbers up to `REACH`, and the cheapest combination that meets R is taken.  The best of all sets wins.

Where f is proportional to the bits, every step costs the same, so that the walk meets R by itself: the greedy division
of a convex cost is then the exact optimum.

Source: Fox, Discrete Optimization via Marginal Analysis, Management Science 13 (3), 1966, for the optimality of steps
taken by what they gain (10.1287/mnsc.13.3.210).
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy

from tersely.kinds.quantized import quantized_bytes

Array = numpy.ndarray

REACH = {3: 24, 4: 10}
"""Number of widths → columns that are exchanged between two neighbouring ones at most; of more widths, `FEWEST`."""

FEWEST = 5


@dataclass(frozen=True)
class RowBytes:
    """What a row takes, by how many of its columns have which width."""

    widths: tuple[int, ...]
    """Rising."""
    of_segment: Array
    """f: ``[widths, columns + 1]``, bytes of so many columns."""

    @property
    def columns(self) -> int:
        return int(self.of_segment.shape[1]) - 1

    def of(self, counts: Array) -> Array:
        """``[..., widths]`` → ``[...]``."""
        return sum(of_width[counts[..., place]] for place, of_width in enumerate(self.of_segment))

    @property
    def even(self) -> Array:
        """Bytes with one width for all, ``[widths]``."""
        return self.of_segment[:, -1]

    def met(self, wanted: float) -> int | None:
        """The most bytes up to `wanted` that some two widths, or one, take exactly; None if there are none."""
        within = self._reachable()[self._reachable() <= wanted]
        return int(within[-1]) if len(within) else None

    def _reachable(self) -> Array:
        pairs = [low[::-1] + high for low, high in combinations(self.of_segment, 2)]
        return numpy.unique(numpy.concatenate([self.even, *pairs]))


@lru_cache(maxsize=256)
def row_bytes(columns: int, widths: tuple[int, ...], group: int, *, zeros: bool) -> RowBytes:
    """Of integer codes in groups of so many columns; a width of 1 has no zero points."""

    def segment(width: int, count: int) -> int:
        return quantized_bytes((1, count), width, group, zeros=zeros and width > 1) if count else 0

    return RowBytes(widths, numpy.array([[segment(w, count) for count in range(columns + 1)] for w in widths]))


def divide(costs: Array, budget: RowBytes, nbytes: int, judged: Array | None = None) -> Array:
    """The place of its width for every column, with rows of exactly so many bytes.

    costs: ``[columns, widths]``.
    judged: by which sets of widths are compared, likewise; None for the costs themselves.
    Raises ValueError for bytes that `RowBytes.met` does not give.
    """
    judged = costs if judged is None else judged
    columns, count = costs.shape
    best: tuple[float, Array] | None = None
    for size in range(1, min(count, columns) + 1):
        for chosen in combinations(range(count), size):
            part = RowBytes(tuple(budget.widths[i] for i in chosen), budget.of_segment[list(chosen)])
            found = _among(costs[:, list(chosen)], part, nbytes)
            if found is None:
                continue
            places = numpy.array(chosen)[found]
            price = float(judged[numpy.arange(columns), places].sum())
            if best is None or price < best[0]:
                best = price, places
    if best is None:
        raise ValueError(f"no widths for {columns} columns give rows of {nbytes} bytes")
    return best[1]


def _among(costs: Array, budget: RowBytes, nbytes: int) -> Array | None:
    """Places in this set of widths."""
    columns, count = costs.shape
    if count == 1:
        return numpy.zeros(columns, dtype=int) if budget.even[0] == nbytes else None
    if count == 2:
        gains = costs[:, 1] - costs[:, 0]
        order = numpy.argsort(gains, kind="stable")
        low, high = budget.of_segment
        total = numpy.concatenate([[0.0], numpy.cumsum(gains[order])])
        total[low[::-1] + high != nbytes] = numpy.inf
        if not numpy.isfinite(total).any():
            return None
        places = numpy.zeros(columns, dtype=int)
        places[order[: int(total.argmin())]] = 1
        return places
    return _exchanged(costs, _walked(costs, budget, nbytes), budget, nbytes)


def _walked(costs: Array, budget: RowBytes, nbytes: int) -> Array:
    """The division nearest below the asked bytes on the walk down the hulls, or its first one."""
    columns, count = costs.shape
    widths = numpy.array(budget.widths, dtype=float)
    at, steps = numpy.zeros(columns, dtype=int), []
    everyone = numpy.arange(columns)
    for _ in range(count - 1):
        climbing = everyone[at < count - 1]
        if not len(climbing):
            break
        here = at[climbing]
        further = numpy.arange(count) > here[:, None]
        rise = numpy.where(further, widths - widths[here][:, None], 1.0)
        slopes = numpy.where(further, (costs[climbing] - costs[climbing, here][:, None]) / rise, numpy.inf)
        there = slopes.argmin(1)
        steps.append((slopes[numpy.arange(len(climbing)), there], climbing, here, there))
        at[climbing] = there
    slope, column, before, after = (numpy.concatenate(parts) for parts in zip(*steps, strict=True))
    order = numpy.argsort(slope, kind="stable")  # stable: of a flat hull the lower step stays first
    moves = numpy.zeros((len(order) + 1, count), dtype=int)
    moves[0, 0] = columns
    taken = numpy.arange(1, len(order) + 1)
    moves[taken, before[order]] -= 1
    moves[taken, after[order]] += 1
    within = numpy.flatnonzero(budget.of(moves.cumsum(0)) <= nbytes)
    places = numpy.zeros(columns, dtype=int)
    for step in order[: int(within[-1])] if len(within) else ():
        places[column[step]] = after[step]
    return places


def _exchanged(costs: Array, places: Array, budget: RowBytes, nbytes: int) -> Array | None:
    """A few columns moved between neighbouring widths, so that the bytes are met; None where that does not do."""
    columns, count = costs.shape
    reach = min(REACH.get(count, FEWEST), columns)
    lists, totals = [], []
    for low in range(count - 1):  # between the widths `low` and `low + 1`
        up, down = numpy.flatnonzero(places == low), numpy.flatnonzero(places == low + 1)
        up = up[numpy.argsort(costs[up, low + 1] - costs[up, low], kind="stable")]
        down = down[numpy.argsort(costs[down, low] - costs[down, low + 1], kind="stable")]
        lists.append((up, down))
        raised = numpy.cumsum(costs[up, low + 1] - costs[up, low])[:reach]
        lowered = numpy.cumsum(costs[down, low] - costs[down, low + 1])[:reach]
        total = numpy.full(2 * reach + 1, numpy.inf)
        total[reach] = 0.0
        total[reach + 1 : reach + 1 + len(raised)] = raised
        total[reach - len(lowered) : reach] = lowered[::-1]
        totals.append(total)
    net = numpy.stack(numpy.meshgrid(*[numpy.arange(-reach, reach + 1)] * (count - 1), indexing="ij"), -1)
    price = sum(total[net[..., i] + reach] for i, total in enumerate(totals))
    change = numpy.zeros((*net.shape[:-1], count), dtype=int)
    change[..., :-1] -= net
    change[..., 1:] += net
    start = numpy.bincount(places, minlength=count)
    leaving = numpy.zeros_like(change)
    leaving[..., :-1] += net.clip(min=0)
    leaving[..., 1:] += (-net).clip(min=0)
    price = numpy.where((leaving <= start).all(-1), price, numpy.inf)
    price = numpy.where(budget.of((start + change).clip(0, columns)) == nbytes, price, numpy.inf)
    if not numpy.isfinite(price).any():
        return None
    chosen = net[numpy.unravel_index(int(price.argmin()), price.shape)]
    moved, found = set(), places.copy()
    for low, number in enumerate(chosen.tolist()):
        candidates = lists[low][0] if number > 0 else lists[low][1]
        free = [column for column in candidates.tolist() if column not in moved][: abs(number)]
        found[free] = low + 1 if number > 0 else low
        moved.update(free)
    return found

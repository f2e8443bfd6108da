"""Joint rank k: linears that read the same tensor share the directions that they keep of it.

Stack the members of a group, W = [W_1; W_2; …] with Σm_i rows and n columns, and truncate once:  W'_i = up_i · down,
one `down` for all (see `kinds.shared`).  Identities of truncation hold for the stack:

    Σ_i ‖(W_i - W'_i) M^½‖² = Σ_{j>k} λ_j ,   λ the eigenvalues of W M Wᵀ,   W'_i = U_k^(i) · U_kᵀ W,

with U^(i) the rows of U that belong to W_i.  M = I is the paper, which sees no data; M = E[x xᵀ] (`metric = "gram"`) is
whitening, and natural here: members read one tensor, so that one M is exactly that of each.

It costs k (Σm_i + n) numbers where factors of every member cost Σ r_i (m_i + n).  Of two square weights the joint rank
is a third larger at equal numbers; whether that pays depends on how alike their input spaces are.  If these are
unrelated it does not, so `compare` offers members by themselves as well, at ranks in proportion (each takes the same
share of its own bytes), and an allocator that knows errors takes what loses less.

`normalise` divides every member by a number s_i before they are stacked, and multiplies it back into up_i, so that the
sum of the errors over s_i² is minimised, and predicted.  s_i² is what the best rank 1 leaves of a member, per row: as
with the allocator `greedy`, a member counts by its size and not by its whole energy, since of the outputs of q and k a
first direction, much the same for every token, carries most.  Without it q and k drown the others.

The paper shares {q, k} and {gate, up}, keeps v, o and down apart, and says no more of how they are treated: here they
are truncated by themselves.  It has no metric, no normalisation and no comparison; the first two are off unless asked
for.

Source: Peng et al., Data-free Weight Compress and Denoise for Large Language Models, 2024 (arXiv 2402.16319).
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.anatomy import DEPTH, READING, Site, Unit, reading_units
from tersely.errors import AnatomyError, RecipeError
from tersely.kinds import Kind, LinearKind, shared_bytes, shared_from_factors
from tersely.linalg.truncation import OutputBasis, output_basis
from tersely.methods.low_rank.factorise import (
    check_damping,
    damped_gram,
    largest_rank,
    leaves_as_stored,
    low_rank,
    rank_options,
    rank_sizes,
)
from tersely.option import Amount, Option
from tersely.stats import Gram, Statistic, Stats

FLOOR = 1e-9
"""The least share of a member's energy that its best rank 1 is taken to leave."""

SHARING = {"pairs": (("q", "k"), ("gate", "up")), "all": (("q", "k", "v"), ("gate", "up"))}

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class JointRank:
    metric: Literal["none", "gram"] = "none"
    """What is approximated: weights (none, without data), or their outputs (gram)."""

    share: Literal["pairs", "all"] = "pairs"
    """pairs: q with k, gate with up, all others by themselves; all: everything that reads one tensor."""

    normalise: bool = False
    """Members count by their size, and by what they lose of what the best rank 1 leaves of them."""

    compare: bool = True
    """Also offer the members of a group by themselves.  An allocator that knows no errors, such as uniform, cannot tell
    which is better, and takes what fills its share best."""

    damping: float = 1e-6
    """Added to the diagonal of the Gram matrix, as a fraction of the mean input power (no unit)."""

    pivot: bool = False
    """Store r rows of the stack in place of a factor: r² numbers fewer at rank r, so a higher rank in as many bytes
    (see `kinds.shared`)."""

    paper: ClassVar[str] = "Peng et al., 2024, Data-free Weight Compress and Denoise (arXiv 2402.16319)"
    summary: ClassVar[str] = "one shared factor for linears that read the same tensor: q and k, gate and up"
    roles: ClassVar[tuple[str, ...]] = (READING,)
    leaves: ClassVar[tuple[str, ...]] = leaves_as_stored()

    def __post_init__(self) -> None:
        check_damping("joint_rank", self.damping)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram,) if self.metric == "gram" else ()

    def units(self, sites: Sequence[Site]) -> Sequence[Unit]:
        return reading_units(sites, SHARING[self.share])

    def check(self, unit: Unit) -> None:
        check_group("joint_rank", unit, READING)

    def sizes(self, unit: Unit, itemsize: int) -> Sequence[Option]:
        """An amount is the rank of a group, or the list of the ranks of its members by themselves."""
        shapes = shapes_of(unit)
        if len(shapes) == 1:
            return rank_sizes(shapes[0], itemsize, self.pivot)
        shared = shared_sizes(shapes, itemsize, self.pivot)
        alone = _sizes_alone(shapes, itemsize, self.pivot, shared) if self.compare else []
        return sorted([*shared, *alone], key=lambda option: option.nbytes)

    def options(self, unit: Unit, weights: Tensors, stats: Mapping[str, Stats]) -> Sequence[Option]:
        """Errors, summed over the members, are exact without damping; with it they are upper bounds, by at most
        damping · power · ‖W - W'‖².  Normalised, they are so in the unit of the method, in which the members' energies
        add up to what they are."""
        members, metric = [weights[role] for role in unit.sites], self._metric(unit, stats)
        if len(members) == 1:
            return rank_options(members[0], output_basis(members[0], metric, vectors=False), self.pivot)
        size_of = members[0].element_size()
        members = [member.double() / scale for member, scale in zip(members, self.scales(members, metric), strict=True)]
        left = output_basis(torch.cat(members), metric, vectors=False).left_over().tolist()
        alone = [output_basis(m, metric, vectors=False).left_over().tolist() for m in members] if self.compare else []

        def error(amount: int | list[int]) -> float:
            if isinstance(amount, int):
                return left[amount]
            return sum(of_member[rank] for of_member, rank in zip(alone, amount, strict=True))

        return [replace(size, error=error(size.amount)) for size in self.sizes(unit, size_of)]

    def compress(
        self, unit: Unit, weights: Tensors, biases: Tensors, stats: Mapping[str, Stats], amount: Amount
    ) -> dict[str, Kind]:
        members, metric = [weights[role] for role in unit.sites], self._metric(unit, stats)
        made: dict[str, Kind]
        if len(members) == 1 or isinstance(amount, list):
            ranks = amount if isinstance(amount, list) else [amount]
            if len(ranks) != len(members):
                raise RecipeError(f"{unit.name}: {len(ranks)} ranks for {len(members)} linears; wanted one for each")
            alone = zip(unit.sites, members, ranks, strict=True)
            made = {role: low_rank(member, metric, rank, self.pivot) for role, member, rank in alone}
        else:
            check_shared_rank(unit, amount, self.pivot)
            scales = self.scales(members, metric)
            stacked = torch.cat([member.double() / scale for member, scale in zip(members, scales, strict=True)])
            basis = output_basis(stacked, metric, rank=amount)
            made = shared(unit, weights, *basis.factors(amount), scales=scales, pivot=self.pivot)
        return with_biases(made, biases)

    def _metric(self, unit: Unit, stats: Mapping[str, Stats]) -> Float[Tensor, "in in"] | None:
        return damped_gram(stats[next(iter(unit.sites))], self.damping) if self.metric == "gram" else None

    def scales(self, members: Sequence[Tensor], metric: Float[Tensor, "in in"] | None) -> list[float]:
        """s_i, what each member is divided by; their squares average to 1, weighed with the energies over them."""
        if not self.normalise:
            return [1.0] * len(members)
        curves = [output_basis(member, metric, vectors=False).left_over().tolist() for member in members]
        # of a member that is of rank 1, rounding would be what is left
        rest = [max(curve[1], FLOOR * curve[0]) for curve in curves]
        units = [(left / len(member)) or 1.0 for left, member in zip(rest, members, strict=True)]
        energy = sum(curve[0] for curve in curves)
        counted = sum(curve[0] / unit for curve, unit in zip(curves, units, strict=True))
        return [(unit * counted / energy) ** 0.5 if energy > 0 else 1.0 for unit in units]


def shapes_of(unit: Unit) -> list[tuple[int, int]]:
    return [(site.out_features, site.in_features) for site in unit.sites.values()]


def shared_sizes(shapes: Sequence[tuple[int, int]], itemsize: int, pivot: bool = False) -> list[Option]:
    """Rank 0 and all ranks of a group, and the bytes of what is stored of them; an amount is a rank."""
    counts, width = [rows for rows, _ in shapes], shapes[0][1]
    sizes = [Option(0, 0, None)]
    for rank in range(1, largest_rank((sum(counts), width), pivot) + 1):
        sizes.append(Option(rank, shared_bytes(counts, width, rank, itemsize, pivot), None))
    return sizes


def _sizes_alone(
    shapes: Sequence[tuple[int, int]], itemsize: int, pivot: bool, shared: Sequence[Option]
) -> list[Option]:
    """The members by themselves, each within the same share of its own bytes as the group has at a rank."""
    offered = [rank_sizes(shape, itemsize, pivot) for shape in shapes]
    dense = sum(rows * columns for rows, columns in shapes) * itemsize
    found: dict[tuple[int, ...], int] = {}
    for size in shared:
        chosen = []
        for (rows, columns), sizes in zip(shapes, offered, strict=True):
            # in whole numbers: bytes / dense bytes within the share of the group
            within = size.nbytes * rows * columns * itemsize // dense
            chosen.append(sizes[bisect_right(sizes, within, key=lambda option: option.nbytes) - 1])
        if all(option.amount for option in chosen):
            found[tuple(option.amount for option in chosen)] = sum(option.nbytes for option in chosen)
    return [Option(list(ranks), nbytes, None) for ranks, nbytes in found.items()]


def check_group(method: str, unit: Unit, role: str) -> None:
    """Raises AnatomyError for linears that cannot share a factor."""
    if unit.role not in (READING, DEPTH):
        raise AnatomyError(f"{unit.name}: {method} treats linears that read alike ({role}), not {unit.role}")
    widths = {width for _, width in shapes_of(unit)}
    if len(widths) != 1:
        raise AnatomyError(f"{unit.name}: linears of {sorted(widths)} inputs cannot share a factor")


def check_shared_rank(unit: Unit, rank: Amount, pivot: bool) -> None:
    """Raises RecipeError for a rank that the group cannot be given."""
    shapes = shapes_of(unit)
    largest = largest_rank((sum(rows for rows, _ in shapes), shapes[0][1]), pivot)
    if type(rank) is not int or not 1 <= rank <= largest:
        raise RecipeError(f"{unit.name}: rank {rank!r} of a shared factor; wanted 1 to {largest}")


def shared(
    unit: Unit,
    weights: Tensors,
    up: Float[Tensor, "stacked rank"],
    down: Float[Tensor, "rank in"],
    *,
    scales: Sequence[float] = (),
    pivot: bool = False,
    same_input: bool = True,
) -> dict[str, Kind]:
    """The modules of a group in the dtype of its weights, without biases, by the roles of the unit.

    `up`: the rows of all members one below the other; those of member i times ``scales[i]``, where scales are given.
    """
    parts = list(up.split([len(weights[role]) for role in unit.sites]))
    if scales:
        parts = [part * scale for part, scale in zip(parts, scales, strict=True)]
        # balanced again: both factors of a column of the product share its range
        outer, inner = torch.cat(parts).norm(dim=0), down.norm(dim=1)
        ratio = torch.where((outer > 0) & (inner > 0), inner / outer, torch.ones_like(outer)).sqrt()
        parts, down = [part * ratio for part in parts], down / ratio[:, None]
    names = {site.name: role for role, site in unit.sites.items()}
    ups = dict(zip(names, parts, strict=True))
    dtype = weights[next(iter(unit.sites))].dtype
    made = shared_from_factors(ups, down, dtype, pivot=pivot, same_input=same_input)
    return {names[name]: kind for name, kind in made.items()}


def with_biases(made: dict[str, Kind], biases: Tensors) -> dict[str, Kind]:
    """The same modules, which now have the biases of the linears that they stand for."""
    for role, kind in made.items():
        if role in biases and isinstance(kind, LinearKind):
            kind.set_bias(biases[role])
    return made


def orthonormal(basis: OutputBasis) -> tuple[Float[Tensor, "stacked k"], Float[Tensor, "k in"]]:
    """U and Uᵀ W of a basis, in full."""
    up, down = basis.factors(len(basis.energy))
    norm = up.norm(dim=0)
    return up / norm, down * norm[:, None]

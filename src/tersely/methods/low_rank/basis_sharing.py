"""Basis Sharing: the same linear of neighbouring blocks keeps the same directions of its input.

The weights W_1 … W_g of one role in g consecutive blocks are stacked, and truncated once in the metric of all their
inputs taken together, M = Σ_l E[x_l x_lᵀ]:

    W'_l = up_l · down,   down = U_kᵀ W,  up_l = U_k^(l),   Σ_l ‖(W_l - W'_l) M^½‖² = Σ_{j>k} λ_j ,

with U, λ the eigenvectors and eigenvalues of W M Wᵀ (`linalg.truncation`).  `down` is stored once, for all g blocks,
and computed in each, since each reads another tensor.  q, k, v, gate and up share; the inputs of o and of down have
nothing in common from block to block, so these are truncated by themselves, which is SVD-LLM.

The pooled loss above counts the inputs of all blocks for each of them.  The errors that are predicted are those that
members make on their own inputs, Σ_l tr(Δ_l E[x_l x_lᵀ] Δ_lᵀ), found for all ranks at once: with P = Uᵀ W and
C_l = U^(l)ᵀ U^(l), every rank k adds up the first k rows and columns of  C_l ∘ (P E[x_l x_lᵀ] Pᵀ).

All blocks of a group must be observed before the first of them can be cut, so that there is no compressed prefix to
observe the second one behind: the method takes propagate = "none", and unless told otherwise does.  The paper's refit
of the coefficients on shifted inputs, for high ratios, is left out for the same reason; what it adds where a Cholesky
factor fails is not needed.

Source: Wang et al., Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model Compression, 2024
(arXiv 2410.03765).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.anatomy import DEPTH, Site, Unit, depth_units
from tersely.errors import NumericalError, RecipeError
from tersely.kinds import Kind
from tersely.linalg.truncation import OutputBasis, output_basis
from tersely.methods.low_rank.factorise import (
    check_damping,
    damped_gram,
    leaves_as_stored,
    low_rank,
    rank_options,
    rank_sizes,
)
from tersely.methods.low_rank.joint import (
    check_group,
    check_shared_rank,
    orthonormal,
    shapes_of,
    shared,
    shared_sizes,
    with_biases,
)
from tersely.option import Amount, Option
from tersely.stats import Gram, Statistic, Stats

SHARED = ("q", "k", "v", "qkv", "gate", "up", "gate_up")
"""Last words of the roles that share; the fused ones stand for their parts."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class BasisSharing:
    layers: int = 2
    """Consecutive blocks that share; the paper's default."""

    damping: float = 1e-6
    """Added to the diagonal of the Gram matrix, as a fraction of the mean input power (no unit)."""

    pivot: bool = False
    """Store r rows of the stack in place of a factor: r² numbers fewer at rank r, so a higher rank in as many bytes
    (see `kinds.shared`)."""

    paper: ClassVar[str] = "Wang et al., 2024, Basis Sharing: Cross-Layer Parameter Sharing (arXiv 2410.03765)"
    summary: ClassVar[str] = "one shared factor for the same linear of neighbouring blocks, in the metric of all inputs"
    roles: ClassVar[tuple[str, ...]] = (DEPTH,)
    usual_propagate: ClassVar[str] = "none"
    leaves: ClassVar[tuple[str, ...]] = leaves_as_stored()

    def __post_init__(self) -> None:
        if self.layers < 2:
            raise RecipeError(f"basis_sharing: layers {self.layers}; wanted 2 or more that share")
        check_damping("basis_sharing", self.damping)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram,)

    def units(self, sites: Sequence[Site]) -> Sequence[Unit]:
        return depth_units(sites, self.layers, SHARED)

    def check(self, unit: Unit) -> None:
        check_group("basis_sharing", unit, DEPTH)

    def sizes(self, unit: Unit, itemsize: int) -> Sequence[Option]:
        """An amount is a rank."""
        shapes = shapes_of(unit)
        if len(shapes) == 1:
            return rank_sizes(shapes[0], itemsize, self.pivot)
        return shared_sizes(shapes, itemsize, self.pivot)

    def options(self, unit: Unit, weights: Tensors, stats: Mapping[str, Stats]) -> Sequence[Option]:
        """Errors are upper bounds: of a single linear, by at most damping · power · ‖W - W'‖²; of a group, the largest
        that any higher rank leaves on the members' own inputs, since a rank more may serve one at the other's cost."""
        members = [weights[role] for role in unit.sites]
        if len(members) == 1:
            metric = damped_gram(stats[next(iter(unit.sites))], self.damping)
            return rank_options(members[0], output_basis(members[0], metric, vectors=False), self.pivot)
        errors = self._errors(members, [_gram(stats[role]) for role in unit.sites])
        return [replace(size, error=errors[size.amount]) for size in self.sizes(unit, members[0].element_size())]

    def compress(
        self, unit: Unit, weights: Tensors, biases: Tensors, stats: Mapping[str, Stats], amount: Amount
    ) -> dict[str, Kind]:
        made: dict[str, Kind]
        if len(unit.sites) == 1:
            (role,) = unit.sites
            made = {role: low_rank(weights[role], damped_gram(stats[role], self.damping), amount, self.pivot)}
        else:
            check_shared_rank(unit, amount, self.pivot)
            members = [weights[role] for role in unit.sites]
            basis = self._basis(members, [_gram(stats[role]) for role in unit.sites])
            made = shared(unit, weights, *basis.factors(amount), pivot=self.pivot, same_input=False)
        return with_biases(made, biases)

    def _basis(self, members: Sequence[Tensor], grams: Sequence[Float[Tensor, "in in"]]) -> OutputBasis:
        """Of the stack, in the pooled metric."""
        pooled = torch.stack(list(grams)).sum(0)
        power = pooled.diagonal().mean()
        if power == 0:  # nothing was observed: every direction counts alike
            pooled = torch.eye(len(pooled), dtype=pooled.dtype, device=pooled.device)
        pooled.diagonal().add_(self.damping * power)
        return output_basis(torch.cat([member.double() for member in members]), pooled)

    def _errors(self, members: Sequence[Tensor], grams: Sequence[Float[Tensor, "in in"]]) -> list[float]:
        """What the members lose on their own inputs, at every rank; never less than at a higher one."""
        basis, projected = orthonormal(self._basis(members, grams))
        total = basis.new_zeros(basis.shape[1] + 1)
        for rows, member, gram in zip(basis.split([len(m) for m in members]), members, grams, strict=True):
            weight = member.double()
            heard = gram @ projected.T
            kept = (rows * (weight @ heard)).sum(0)
            both = (rows.T @ rows) * (projected @ heard)
            total += ((weight @ gram) * weight).sum()
            total[1:] += both.cumsum(0).cumsum(1).diagonal() - 2 * kept.cumsum(0)
        found: list[float] = total.clamp(min=0).flip(0).cummax(0).values.flip(0).tolist()
        return found


def _gram(stats: Stats) -> Float[Tensor, "in in"]:
    gram = stats[Gram].mean()
    if not torch.isfinite(gram).all():
        raise NumericalError("the input statistic has entries that are not finite; calibrate in float32 or bfloat16")
    return gram

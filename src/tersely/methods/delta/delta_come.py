"""Delta-CoMe: the leading singular vectors of a fine-tuned model's difference in many bits, the long tail in few.

The difference W_tuned - W_base of a linear has few large singular values and a long tail of small ones.  Cutting the
tail off loses what many small directions do together; one bit for every entry is too coarse for the large ones.  So the
components  Σ_i u_i σ_i v_iᵀ,  by falling σ, are cut into groups, and a group of r components in b bits takes about
b · r · (in + out) bits:  Σ_g b_g r_g (in + out) = α · 16 · in · out  bits are a fraction α of the 16-bit matrix.

Each group becomes a pair of quantized factors.  down = diag(σ) Vᵀ is rounded with error feedback (GPTQ) in the metric
G of the linear's inputs, then  up = U  in the metric  D̂ G D̂ᵀ  of what the rounded down hands on: U makes up for what
its inputs have lost.  σ needs no place of its own, since a row of `down` may be scaled: it goes into the scales of the
rows, and the codes are those of Vᵀ.

What is stored is more than the formula: every group of columns has a scale in 16 bits, and a zero point.  A row of
`down` is as long as the input, where groups of 128 add 0.14 bits or so to a code; but a row of `up` has as few columns
as the group has components: two in 8 bits take 5 bytes, one more than two numbers in 16 bits.  Sizes are real bytes.

Differences from the authors' code: they store σ beside the factors.  A finished group is seen by later layers, through
the inputs that the runner replays; later groups of the same linear cannot see it, as the targets of all are given by
one decomposition.  Two options of ours change that and the decomposition itself.  With `refit` the target of `up` is
the least-squares answer, through the rounded `down`, to what the groups so far were to reach and did not; the last
group answers for the components that were dropped as well.  With ``metric = "gram"`` components are ordered by the
output energy they carry (see `linalg.truncation`) instead of by their norm.

Source: Ping et al., Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large Language Models, 2024,
sections 3 and 4 (arXiv 2406.08903).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersely.errors import NumericalError, RecipeError
from tersely.kinds import LinearKind, LowRankLinear
from tersely.kinds.quantized import quantized_bytes
from tersely.kinds.sum import SumLinear
from tersely.linalg.grid import fit_grid
from tersely.linalg.truncation import output_basis
from tersely.methods.quantize.gptq import GPTQ
from tersely.option import Amount, Option
from tersely.stats import Gram, Statistic, Stats

WHOLE = 16
"""Bits of a group that is not rounded: numbers in the dtype of the weight."""

STIFFNESS = 0.1  # how much `up` is held to the singular vectors, as a fraction of the power of each component


@dataclass(frozen=True)
class DeltaCoMe:
    widths: str = "8+3+2"
    """Bits of a code in each group of singular components, the largest first; 1 to 8, or 16 for a group that is not
    rounded.  The paper's triple; "2" alone is a single precision."""

    ranks: str = "2+32"
    """Components in each group but the last, which takes the rest; the paper's, for matrices of width 4096.  Narrower
    models want fewer."""

    group: int = 128
    """Neighbouring columns that share a scale; 0 for all of a row."""

    damping: float = 0.01
    """Added to the diagonal of a Gram matrix, as a fraction of the mean input power (no unit)."""

    act_order: bool = True
    """Take the columns by falling power of their inputs, rather than from left to right."""

    metric: Literal["plain", "gram"] = "plain"
    """What orders the components: "plain" their singular values (the paper), "gram" the output they make."""

    refit: bool = False
    """Let `up` answer for all that the rounded factors before it leave over, instead of being the singular vectors."""

    paper: ClassVar[str] = (
        "Ping et al., 2024, Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large Language Models "
        "(arXiv 2406.08903)"
    )
    summary: ClassVar[str] = "differences of fine-tuned models: singular vectors in bits that fall with their rank"
    needs_base: ClassVar[bool] = True
    leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        widths, ranks = _numbers("widths", self.widths), _numbers("ranks", self.ranks) if self.ranks else []
        for width in widths:
            if width not in (*range(1, 9), WHOLE):
                raise RecipeError(f"delta_come: widths {self.widths!r}; wanted widths of 1 to 8, or 16, joined by +")
        if len(ranks) != len(widths) - 1 or any(rank < 1 for rank in ranks):
            raise RecipeError(
                f"delta_come: ranks {self.ranks!r} for widths {self.widths!r}; wanted one positive number for each "
                "group but the last, joined by +"
            )
        if self.group < 0:
            raise RecipeError(f"delta_come: group {self.group}; wanted 0 for whole rows, or the columns of a group")
        if not 0 <= self.damping < math.inf:
            raise RecipeError(f"delta_come: damping {self.damping}; wanted 0 or more, a fraction of the mean power")
        if self.metric not in ("plain", "gram"):
            raise RecipeError(f"delta_come: metric {self.metric!r}; wanted 'plain' or 'gram'")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram,)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        """Every total rank from 0, and the bytes of codes, scales and zero points of both factors of all groups."""
        return [Option(rank, self._nbytes(shape, rank, itemsize), None) for rank in range(min(shape) + 1)]

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are estimates: what is cut off, exactly, and what rounding to nearest would lose of each component
        that is kept (error feedback loses less), or all of it where that were more."""
        shape = (weight.shape[0], weight.shape[1])
        gram = _gram(stats)
        up, down = self._components(weight, gram, min(shape))
        whole = ((down @ gram) * down).sum(1)  # up is orthonormal: the energies of components add
        lost = torch.minimum(whole, self._rounding(up, down, gram, whole))
        left = whole.flip(0).cumsum(0).flip(0)
        errors = torch.cat([left, left.new_zeros(1)]) + torch.cat([lost.new_zeros(1), lost.cumsum(0)])
        # of terms that all fall; what rounding makes of their sums must not rise
        errors = errors.flip(0).cummax(0).values.flip(0)
        sizes = self.sizes(shape, weight.element_size())
        return [Option(s.amount, s.nbytes, error) for s, error in zip(sizes, errors.tolist(), strict=True)]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: Amount) -> LinearKind:
        if type(amount) is not int or not 1 <= amount <= min(weight.shape):
            raise RecipeError(
                f"a total rank of {amount!r} for a weight of {tuple(weight.shape)}; wanted 1 to {min(weight.shape)}"
            )
        gram = _gram(stats)
        up, down = self._components(weight, gram, amount)
        made = torch.zeros_like(weight, dtype=torch.float64)
        terms: list[nn.Module] = []
        for bits, first, last in self._groups(amount):
            inner = self._factor(down[first:last].to(weight.dtype), gram, bits)
            rows = _dense(inner)
            passed = rows @ gram @ rows.T
            target = up[:, first:last]
            if self.refit and passed.any():
                wanted = weight.double() if last == amount else up[:, :last] @ down[:last]
                target = target + _correction(wanted - made - target @ rows, rows, gram, passed)
            outer = self._factor(target.to(weight.dtype), passed, bits)
            made = made + _dense(outer) @ rows
            term = LowRankLinear.from_factors(target, rows, dtype=weight.dtype)
            term.down, term.up = inner, outer  # type: ignore[assignment]  # a kind stands where a linear stood
            terms.append(term)
        if len(terms) == 1 and isinstance(terms[0], LinearKind):
            return terms[0]
        return SumLinear.of(terms)

    def _groups(self, rank: int) -> list[tuple[int, int, int]]:
        """(bits, first component, one behind the last) of every group that a total rank reaches."""
        ranks = [*(_numbers("ranks", self.ranks) if self.ranks else []), rank]
        groups, first = [], 0
        for bits, size in zip(_numbers("widths", self.widths), ranks, strict=True):
            last = min(first + size, rank)
            if last > first:
                groups.append((bits, first, last))
            first = last
        return groups

    def _components(
        self, weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], rank: int
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """(U, Uᵀ W) with U orthonormal: in the plain metric the rows of the second are σ_i v_i."""
        metric = None
        if self.metric == "gram":
            metric = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        up, down = output_basis(weight, metric, rank=rank).factors(rank)
        balance = up.norm(dim=0)
        return up / balance, down * balance[:, None]

    def _factor(
        self, factor: Float[Tensor, "rows columns"], gram: Float[Tensor, "columns columns"], bits: int
    ) -> nn.Module:
        """One factor in so many bits, or in the dtype it has."""
        if bits == WHOLE:
            linear = nn.Linear(factor.shape[1], factor.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(factor.detach().clone().contiguous())
            return linear
        gptq = GPTQ(group=self.group, width=bits, damping=self.damping, act_order=self.act_order)
        observed = Gram.restore({"sum": gram, "tokens": torch.tensor(1)})
        return gptq.compress(factor, Stats({Gram: observed}), bits)

    def _nbytes(self, shape: tuple[int, int], rank: int, itemsize: int) -> int:
        total = 0
        for bits, first, last in self._groups(rank):
            for factor in ((last - first, shape[1]), (shape[0], last - first)):
                if bits == WHOLE:
                    total += factor[0] * factor[1] * itemsize
                else:
                    total += quantized_bytes(factor, bits, self.group, zeros=True)
        return total

    def _rounding(
        self,
        up: Float[Tensor, "out rank"],
        down: Float[Tensor, "rank in"],
        gram: Float[Tensor, "in in"],
        energy: Float[Tensor, " rank"],
    ) -> Float[Tensor, " rank"]:
        """What rounding to nearest loses of each component: errors of `down` in the metric of the inputs, those of `up`
        times the energy of the component, as if components were uncorrelated."""
        lost = torch.zeros_like(energy)
        for bits, first, last in self._groups(len(energy)):
            if bits == WHOLE:
                continue
            off = self._off(down[first:last], bits)
            lost[first:last] += ((off @ gram) * off).sum(1)
            lost[first:last] += self._off(up[:, first:last], bits).square().sum(0) * energy[first:last]
        return lost

    def _off(self, factor: Float[Tensor, "rows columns"], bits: int) -> Float[Tensor, "rows columns"]:
        grid = fit_grid(factor, bits, self.group)
        return factor - grid.levels(grid.nearest(factor))


def _gram(stats: Stats) -> Float[Tensor, "in in"]:
    """E[x xᵀ]; of an input that was silent throughout, nothing is known and all directions count alike."""
    gram = stats[Gram].mean()
    if not torch.isfinite(gram).all():
        raise NumericalError("the input statistic has entries that are not finite; calibrate in float32 or bfloat16")
    return gram if gram.diagonal().any() else torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def _correction(
    missed: Float[Tensor, "out in"],
    rows: Float[Tensor, "rank in"],
    gram: Float[Tensor, "in in"],
    passed: Float[Tensor, "rank rank"],
) -> Float[Tensor, "out rank"]:
    """The C that makes  E‖(missed - C rows) x‖² + STIFFNESS · Σ_i P_ii ‖c_i‖²  least; P is `passed`,  rows G rowsᵀ.

    The second term keeps C small where rows can hardly be told apart: a target with a few large entries would widen the
    grid of all others.
    """
    power = passed.diagonal()
    stiff = STIFFNESS * torch.where(power > 0, power, power.mean())
    return torch.linalg.solve(passed + torch.diag(stiff), rows @ gram @ missed.T).T


def _dense(factor: nn.Module) -> Float[Tensor, "rows columns"]:
    weight = factor.to_dense() if isinstance(factor, LinearKind) else factor.get_parameter("weight").detach()
    return weight.double()


def _numbers(field: str, joined: str) -> list[int]:
    """8+3+2 → [8, 3, 2]."""
    parts = str(joined).split("+")
    if not all(part.strip().isdecimal() for part in parts):
        raise RecipeError(f"delta_come: {field} {joined!r}; wanted whole numbers joined by +, such as 8+3+2")
    return [int(part) for part in parts]

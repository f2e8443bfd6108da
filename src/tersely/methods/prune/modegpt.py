"""Narrower MLPs and narrower heads: whatever lies between two matrices loses channels, and both get smaller.

Factorising one matrix puts a second one beside it and pays only below half of the rank.  Two matrices in a row already
are a product; its inner width shrinks without anything new.  A block has three such widths, and what can be done to
each depends on what happens in between:

1. Neurons, between gate, up and down (a nonlinearity between).  With C = E[z zᵀ] of the neurons z and λ > 0 the ridge
   leverage of neuron i is  [C (C + λ)⁻¹]ᵢᵢ = 1 - λ [(C + λ)⁻¹]ᵢᵢ .  The largest stay, J, and down is refitted to them:

       W ← W C[:, J] C[J, J]⁻¹ ,    lost is  tr(W_rest S W_restᵀ),  S = C_rest - C[rest, J] C[J, J]⁻¹ C[J, rest] .

2. Channels of queries and keys (a rotation by the position between).  A rotation turns channels in pairs, so that a
   pair stays or goes as one, its cosine and sine with it.  The score q·k is the sum of what the pairs (1, 2) say:

       those stay that have the largest  E[q₁²] E[k₁²] + E[q₂²] E[k₂²] ,

   the mean squares of two products, of independent tokens.  Nothing is refitted, since rotations let no pair speak for
   another.  A key head is asked by several query heads: their sums are added, and all of them keep the same pairs.

3. Channels of values and output (nothing between: the mixing of tokens acts on both sides alike).  With M the weights
   of o for all query heads of a value head, one below the other, and C = E[x xᵀ] of the input,

       M W_v C^½ = U Σ Vᵀ ,    M ← U_r ,    W_v ← U_rᵀ M W_v ,    lost is  Σ_{i>r} σᵢ² = Σ_h E‖W_o^h Δv‖² .

   Mixing weights sum to one, so a bias of v is a constant of the output: it goes into the bias of o, exactly.

The scale of scores stays that of the original head.  Norms of queries and keys (Qwen3) take the mean over the channels
of a head: a pair cannot leave without changing all others.  Such heads keep their pairs and lose only values.

An attention has two widths and one budget.  They are tied: kept pairs and kept values are the same share of a head, in
steps of one pair or two values in turn, values first.  Errors are those of the unit's output, E‖W z‖² with W = o or
down, but only for neurons are they exact.  What is lost of scores is in the unit of squared scores, and what is lost of
values is summed before tokens are mixed; neither says what the output will miss.  As in `cache.latent` the two shares
that are lost are averaged, and multiplied by the energy of the output.  That is a yardstick, not a prediction.

Biases of q and k are counted when pairs are chosen, as if they were uncorrelated with the rest; in the curve, which
sees weights only, they are not.  Bytes are those of weights: cosines and sines of a head cost four bytes a pair more.

Departures: λ is relative to the mean power of the neurons, as is the damping that keeps C[J, J] invertible; absolute
numbers would mean another thing for every layer.  The paper divides the budget among the blocks by how much they turn
the residual stream; here that is the work of allocators.  The score (E[q₁²] + E[q₂²]) (E[k₁²] + E[k₂²]) would not
depend on the basis inside a pair, which no output tells; on a small trained model with 0.6 of its attention it was a
little worse all the same (perplexity 39.9 for 39.5).
Leverage is computed once: two neurons that say the same both score low, and both may go.

Source: Lin et al., MoDeGPT: Modular Decomposition for Large Language Model Compression, 2024 (arXiv 2408.09632).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tersely.anatomy import Unit
from tersely.errors import AnatomyError, NumericalError, RecipeError
from tersely.kinds import Kind
from tersely.kinds.attention import LINEARS, Attention, AttentionSettings, PositionTables, linear_of
from tersely.linalg.interpolative import Interpolation
from tersely.linalg.truncation import OutputBasis, output_basis
from tersely.methods.base import UnitMethod
from tersely.methods.prune import Coupling, coupling_of
from tersely.option import Amount, Option
from tersely.stats import Gram, Statistic, Stats

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class ModularDecomposition:
    """Neurons; of attention it has to be asked `for_attention`."""

    ridge: float = 1.0
    """λ of the leverage scores, as a fraction of the mean power of the neurons (no unit).  Large: the loudest neurons
    stay; small: those that the others say least of."""

    damping: float = 1e-6
    """Added to the diagonal of Gram matrices, as a fraction of the mean power (no unit): keeps refits finite."""

    paper: ClassVar[str] = "Lin et al., 2024, MoDeGPT: Modular Decomposition (arXiv 2408.09632)"
    summary: ClassVar[str] = "narrower MLPs and heads: neurons refitted, pairs of q and k dropped, v and o truncated"
    roles: ClassVar[tuple[str, ...]] = ("attention", "mlp")

    def __post_init__(self) -> None:
        for name in ("ridge", "damping"):
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(
                    f"modegpt: {name} {getattr(self, name)}; wanted above 0, a fraction of the mean power"
                )

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram,)

    def for_attention(self, attention: AttentionSettings) -> UnitMethod:
        return NarrowHeads(attention, self.damping)

    def check(self, unit: Unit) -> None:
        self._coupling(unit)

    def sizes(self, unit: Unit, itemsize: int) -> Sequence[Option]:
        """An amount is the number of neurons to keep."""
        return self._coupling(unit).sizes(itemsize)

    def options(self, unit: Unit, weights: Tensors, stats: Mapping[str, Stats]) -> Sequence[Option]:
        """Errors are exact in the damped metric, and so upper bounds, by at most damping · power · ‖W - W'‖²."""
        coupling, last = self._coupling(unit), weights["down"]
        errors = self._refit(unit, weights, stats).left_over(last)
        return coupling.priced(errors.tolist(), last.element_size())

    def compress(
        self,
        unit: Unit,
        weights: Tensors,
        biases: Tensors,
        stats: Mapping[str, Stats],
        amount: Amount,
    ) -> dict[str, Kind]:
        coupling = self._coupling(unit)
        count = coupling.checked(amount)
        found = self._refit(unit, weights, stats)
        refitted = weights["down"].double() @ found.coefficients(count).T
        return coupling.narrow(weights, biases, found.kept(count), refitted)

    def _coupling(self, unit: Unit) -> Coupling:
        if unit.role != "mlp":
            raise AnatomyError(
                f"{unit.name}: modegpt builds attention anew; tell it what this one does (for_attention)"
            )
        return coupling_of(unit)

    def _refit(self, unit: Unit, weights: Tensors, stats: Mapping[str, Stats]) -> Interpolation:
        """Neurons by falling leverage, and what the first of them say of the others."""
        _check_finite(unit, weights)
        gram = _gram(stats["down"])
        order = leverage(gram, self.ridge * _power(gram)).argsort(descending=True, stable=True)
        factor = torch.zeros_like(gram)
        damped = _damped(gram, self.damping)
        factor[:, order] = _cholesky(damped[order][:, order], "damping").mT
        return Interpolation(order, factor)


@dataclass(frozen=True)
class NarrowHeads:
    """Pairs of queries and keys, and values with their output, in an attention of which everything is known."""

    attention: AttentionSettings
    damping: float

    paper: ClassVar[str] = ModularDecomposition.paper
    summary: ClassVar[str] = ModularDecomposition.summary
    roles: ClassVar[tuple[str, ...]] = ("attention",)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram,)

    def check(self, unit: Unit) -> None:
        shape = self.attention.shape
        if shape.query_heads % shape.key_value_heads:
            raise AnatomyError(
                f"{unit.name}: {shape.query_heads} query heads do not divide over {shape.key_value_heads} key heads"
            )
        queries, keys = shape.query_heads * shape.key_width, shape.key_value_heads * shape.key_width
        expected = {"q": (queries, shape.hidden), "k": (keys, shape.hidden), "v": (keys, shape.hidden)}
        expected["o"] = shape.hidden, queries
        found = {role: (unit.sites[role].out_features, unit.sites[role].in_features) for role in LINEARS}
        if found != expected:
            raise AnatomyError(f"{unit.name}: its heads ask for weights (out, in) of {expected}, found {found}")

    def sizes(self, unit: Unit, itemsize: int) -> Sequence[Option]:
        """An amount is {"qk": pairs, "vo": values} that every head keeps."""
        shape = self.attention.shape
        channels = itemsize * shape.hidden * (shape.query_heads + shape.key_value_heads)
        kept = [Option({"qk": qk, "vo": vo}, (2 * qk + vo) * channels, None) for qk, vo in self._amounts()]
        return [Option(0, 0, None), *kept]

    def options(self, unit: Unit, weights: Tensors, stats: Mapping[str, Stats]) -> Sequence[Option]:
        """Errors are the mean of the two shares lost, of scores and of values, in the unit of the output's energy; of
        heads whose pairs all stay, the share of values."""
        _check_finite(unit, weights)
        last = weights["o"].double()
        energy = ((last @ _gram(stats["o"])) * last).sum().clamp(min=0).item()
        of_values = torch.stack([basis.left_over() for _, basis in self._bases(weights, stats)]).sum(0)
        lost = _shares(of_values)
        if not self._normed:
            by_head = self._scores(weights, {}, stats).sort(dim=1, descending=True).values
            dropped = by_head.sum(0).flip(0).cumsum(0).flip(0)
            shares = _shares(torch.cat([dropped, dropped.new_zeros(1)]))
        whole, *smaller = self.sizes(unit, weights["o"].element_size())
        found = [replace(whole, error=energy)]
        for size in smaller:
            share = lost[size.amount["vo"]]
            if not self._normed:
                share = (share + shares[size.amount["qk"]]) / 2
            found.append(replace(size, error=share.item() * energy))
        return found

    def compress(
        self,
        unit: Unit,
        weights: Tensors,
        biases: Tensors,
        stats: Mapping[str, Stats],
        amount: Amount,
    ) -> dict[str, Kind]:
        _check_finite(unit, weights)
        pairs, values = self._checked(unit, amount)
        shape = replace(self.attention.shape, key_width=2 * pairs, value_width=values)
        linears, tables = self._queries_and_keys(weights, biases, stats, pairs)
        linears |= self._values_and_output(weights, biases, stats, values)
        return {"": Attention.of(shape, tables, linears, weights)}

    @property
    def _pairs(self) -> int:
        return self.attention.shape.key_width // 2

    @property
    def _values(self) -> int:
        """The most values that a head can need."""
        return min(self.attention.shape.value_width, self.attention.shape.hidden)

    @property
    def _normed(self) -> bool:
        return self.attention.shape.norm_eps is not None

    def _amounts(self) -> list[tuple[int, int]]:
        """Pairs and values by rising bytes: the same share of both."""
        steps = range(2, 2 * self._pairs + 1)
        kept = ((self._pairs if self._normed else n // 2, min((n + 1) // 2 * 2, self._values)) for n in steps)
        return list(dict.fromkeys(kept))

    def _checked(self, unit: Unit, amount: Amount) -> tuple[int, int]:
        offered = {"qk": range(self._pairs if self._normed else 1, self._pairs + 1), "vo": range(1, self._values + 1)}
        if not isinstance(amount, dict) or amount.keys() != offered.keys():
            raise RecipeError(f"{unit.name}: amount {amount!r} for heads; wanted {{'qk': pairs, 'vo': values}}")
        for what, numbers in offered.items():
            if type(amount[what]) is not int or amount[what] not in numbers:
                normed = "; normed queries and keys keep all pairs" if self._normed else ""
                wanted = f"wanted {what} from {numbers[0]} to {numbers[-1]}{normed}"
                raise RecipeError(f"{unit.name}: amount {amount!r} for heads; {wanted}")
        return amount["qk"], amount["vo"]

    def _scores(self, weights: Tensors, biases: Tensors, stats: Mapping[str, Stats]) -> Float[Tensor, "heads pairs"]:
        """E[q₁²] E[k₁²] + E[q₂²] E[k₂²], added up over the query heads of a key head."""
        q, k = (
            _power_of_rows(weights[role], biases.get(role), stats[role]).view(
                self.attention.shape.key_value_heads, -1, 2, self._pairs
            )
            for role in ("q", "k")
        )
        return (q * k).sum((1, 2))

    def _queries_and_keys(
        self, weights: Tensors, biases: Tensors, stats: Mapping[str, Stats], pairs: int
    ) -> tuple[dict[str, nn.Module], PositionTables]:
        device = weights["q"].device
        if pairs == self._pairs:
            whole: dict[str, nn.Module] = {role: linear_of(weights[role], biases.get(role)) for role in ("q", "k")}
            return whole, self.attention.tables().to(device)
        scores = self._scores(weights, biases, stats)
        kept = scores.argsort(dim=1, descending=True, stable=True)[:, :pairs].sort(dim=1).values
        linears: dict[str, nn.Module] = {}
        for role in ("q", "k"):
            rows = self._rows(kept, weights[role].shape[0])
            linears[role] = linear_of(weights[role][rows], biases[role][rows] if role in biases else None)
        frequencies = torch.tensor(self.attention.frequencies, dtype=torch.float32, device=device)
        scaling = self.attention.table_scaling
        return linears, PositionTables.of(frequencies[kept], pairs=pairs, scaling=scaling)

    def _rows(self, kept: Int[Tensor, "heads kept"], rows: int) -> Int[Tensor, " rows"]:
        """Of q or k: both members of the pairs `kept`, first all first ones, as heads are laid out."""
        width = 2 * self._pairs
        heads = rows // width
        members = torch.cat([kept, kept + self._pairs], dim=1).repeat_interleave(heads // len(kept), dim=0)
        return (members + width * torch.arange(heads, device=kept.device)[:, None]).flatten()

    def _bases(
        self, weights: Tensors, stats: Mapping[str, Stats]
    ) -> list[tuple[Float[Tensor, "stacked k"], OutputBasis]]:
        """Of every value head: Q and the basis of R W_v, where M = Q R.  Q is orthonormal and changes no error."""
        shape = self.attention.shape
        metric = _damped(_gram(stats["v"]), self.damping)
        makers = weights["v"].double().unflatten(0, (shape.key_value_heads, -1))
        readers = weights["o"].double().unflatten(1, (shape.key_value_heads, -1, shape.value_width))
        found = []
        for head, maker in enumerate(makers):
            frame, core = torch.linalg.qr(readers[:, head].transpose(0, 1).flatten(0, 1))
            found.append((frame, output_basis(core @ maker, metric)))
        return found

    def _values_and_output(
        self, weights: Tensors, biases: Tensors, stats: Mapping[str, Stats], values: int
    ) -> dict[str, nn.Module]:
        shape = self.attention.shape
        if values == shape.value_width:
            return {role: linear_of(weights[role], biases.get(role)) for role in ("v", "o")}
        makers, readers = [], []
        for frame, basis in self._bases(weights, stats):
            up, down = basis.factors(values)
            makers.append(down)
            # [heads, hidden, values], as they were stacked
            readers.append((frame @ up).unflatten(0, (-1, shape.hidden)))
        output = torch.cat(readers).transpose(0, 1).flatten(1)
        bias = biases.get("o")
        if "v" in biases:
            heads = biases["v"].double().unflatten(0, (shape.key_value_heads, -1))
            each = heads.repeat_interleave(shape.query_heads // shape.key_value_heads, dim=0)
            constant = weights["o"].double() @ each.flatten()
            bias = constant if bias is None else bias.double() + constant
        dtype = weights["o"].dtype
        return {"v": linear_of(torch.cat(makers).to(dtype), None), "o": linear_of(output.to(dtype), bias)}


def leverage(gram: Float[Tensor, "n n"], ridge: Float[Tensor, ""] | float) -> Float[Tensor, " n"]:
    """[C (C + λ)⁻¹]ᵢᵢ, from 0 to 1: how little of channel i the others say."""
    regular = gram.clone()
    regular.diagonal().add_(ridge)
    return (1 - ridge * torch.cholesky_inverse(_cholesky(regular, "ridge")).diagonal()).clamp(min=0)


def _cholesky(matrix: Float[Tensor, "n n"], what: str) -> Float[Tensor, "n n"]:
    """The lower factor.  Raises NumericalError, which names the field that would help."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise NumericalError(
            f"modegpt: a Gram matrix of {len(matrix)} inputs is not positive definite; calibrate on more tokens than "
            f"inputs, or give a larger {what}"
        )
    return factor


def _power_of_rows(
    weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, stats: Stats
) -> Float[Tensor, " out"]:
    """E[yᵢ²] of the outputs, where the mean of the input is taken to be zero."""
    exact = weight.double()
    power = ((exact @ _gram(stats)) * exact).sum(1).clamp(min=0)
    return power if bias is None else power + bias.double().square()


def _gram(stats: Stats) -> Float[Tensor, "n n"]:
    gram = stats[Gram].mean()
    if not torch.isfinite(gram).all():
        raise NumericalError("the input statistic has entries that are not finite; calibrate in float32 or bfloat16")
    if not gram.any():  # nothing was observed: every channel counts alike
        gram = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return gram


def _damped(gram: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    damped = gram.clone()
    damped.diagonal().add_(damping * _power(gram))
    return damped


def _power(gram: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    return gram.diagonal().mean()


def _shares(left: Float[Tensor, " options"]) -> Float[Tensor, " options"]:
    """Of the whole; nothing is lost where there is nothing."""
    return left / left[0] if left[0] > 0 else left


def _check_finite(unit: Unit, weights: Tensors) -> None:
    for role, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise NumericalError(f"{unit.name}: {role} has entries that are not finite; repair the checkpoint")

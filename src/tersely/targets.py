"""What one step of compression acts on: a linear, a unit of linears, an attention with its cache.

The sweeps know nothing of methods and their shapes; they see targets.  A target knows the sites it reads, what it costs
now, what could become of it, and how to do that.  All names are full paths in the model.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tersely.anatomy import Site, Table, Unit
from tersely.cache import CacheMethod, dense_bytes_per_token
from tersely.errors import RecipeError
from tersely.kinds import Kind, LinearKind, QuantizedEmbedding, QuantizedLinear, SumLinear, TiedHead
from tersely.kinds.attention import AttentionSettings
from tersely.linalg.truncation import output_basis
from tersely.methods import Method, UnitMethod
from tersely.option import Amount, Option
from tersely.stats import Cross, Gram, Statistic, Stats

Weights = Mapping[str, Tensor]


class Target(ABC):
    """Something that is replaced at once.

    `weights` are [out, in] and `biases` [out] by the name of the site.  `stats` are found under the input
    (`Site.reads`), those of gradients under the name of the site.
    """

    name: str
    role: str
    block: int
    sites: tuple[Site, ...]
    """The linears whose weights and inputs it looks at, in order of execution."""

    @property
    @abstractmethod
    def needs(self) -> tuple[type[Statistic], ...]: ...

    @abstractmethod
    def dense_bytes(self, itemsize: int) -> int:
        """What the budget counts, as it is now."""

    @abstractmethod
    def sizes(self, itemsize: int) -> Sequence[Option]: ...

    @abstractmethod
    def options(self, weights: Weights, stats: Mapping[str, Stats]) -> Sequence[Option]: ...

    @abstractmethod
    def compress(
        self, weights: Weights, biases: Weights, stats: Mapping[str, Stats], amount: Amount
    ) -> dict[str, Kind]:
        """The modules to put in place, by their full names, with their biases."""

    def error(self, weights: Weights, made: Mapping[str, Kind], stats: Mapping[str, Stats]) -> float | None:
        """Share of the output energy that was really lost, rounding included; None where that is not known."""
        return None

    def spectrum(self, weights: Weights, stats: Mapping[str, Stats]) -> list[float] | None:
        """Share of the output energy that the best approximation of rank 0, 1, … leaves: on the observed inputs, or,
        where their second moments were not asked for, on white ones.  None for what does not read one input."""
        return None

    @property
    def spans_blocks(self) -> bool:
        """Whether it has sites before its `block`, the last one that it touches."""
        return any(site.block != self.block for site in self.sites)

    @property
    def elements(self) -> int:
        """Weights that the sites consist of."""
        return sum(site.out_features * site.in_features for site in self.sites)


@dataclass(frozen=True)
class SiteTarget(Target):
    """One linear; with a `base`, its difference to that weight of another checkpoint."""

    site: Site
    method: Method
    base: Tensor | None = field(default=None, compare=False)
    """[out, in]; the linear then becomes this weight, plus a compressed update."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.site.name

    @property
    def role(self) -> str:  # type: ignore[override]
        return self.site.role

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.site.block

    @property
    def sites(self) -> tuple[Site, ...]:  # type: ignore[override]
        return (self.site,)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return self.method.needs

    def dense_bytes(self, itemsize: int) -> int:
        return self.elements * itemsize

    def sizes(self, itemsize: int) -> Sequence[Option]:
        return self.method.sizes((self.site.out_features, self.site.in_features), itemsize)

    def options(self, weights: Weights, stats: Mapping[str, Stats]) -> Sequence[Option]:
        return self.method.options(self._weight(weights), of_site(self.site, stats))

    def compress(
        self, weights: Weights, biases: Weights, stats: Mapping[str, Stats], amount: Amount
    ) -> dict[str, Kind]:
        kind = self.method.compress(self._weight(weights), of_site(self.site, stats), amount)
        if self.base is not None:
            kind = SumLinear.of([_linear(self.base), kind.to(weights[self.name].dtype)])
        if self.name in biases:
            kind.set_bias(biases[self.name])
        return {self.name: kind}

    def error(self, weights: Weights, made: Mapping[str, Kind], stats: Mapping[str, Stats]) -> float | None:
        """tr(Δ G Δᵀ) / tr(W G Wᵀ) on the inputs that the site was fitted to; of a method that compares with the dense
        inputs, E‖W x - W' x̂‖² / E‖W x‖²."""
        observed, kind = stats.get(self.site.reads, Stats()), made[self.name]
        if Gram not in observed or not isinstance(kind, LinearKind):
            return None
        weight, stands_for = self._weight(weights).double(), kind.to_dense().double()
        if self.base is None:
            lost, energy = _lost(weight, stands_for, observed)
        else:
            lost, energy = _lost_of(weight, stands_for - self.base.double(), observed[Gram].mean())
        return lost / energy if energy > 0 else 0.0

    def spectrum(self, weights: Weights, stats: Mapping[str, Stats]) -> list[float]:
        return _spectrum(self._weight(weights), stats.get(self.site.reads, Stats()))

    def _weight(self, weights: Weights) -> Tensor:
        weight = weights[self.name]
        # in float32 at least: the difference of two checkpoints is small beside what bfloat16 rounds away
        return weight if self.base is None else weight.float() - self.base.float()


@dataclass(frozen=True)
class TableTarget(SiteTarget):
    """The token embedding, and with it the head of a tied model.

    It is rounded as the weight of a linear is; what it reads are token numbers, of which there are no statistics.
    """

    table: Table = field(kw_only=True)
    head_bias: Tensor | None = field(default=None, compare=False, kw_only=True)
    """``[tokens]``; of a tied head, where there is one."""

    def compress(
        self, weights: Weights, biases: Weights, stats: Mapping[str, Stats], amount: Amount
    ) -> dict[str, Kind]:
        (rounded,) = super().compress(weights, biases, stats, amount).values()
        if not isinstance(rounded, QuantizedLinear):
            raise RecipeError(f"{self.name}: the method makes a {rounded.name} of a table; wanted plain integers")
        table = self.table
        made = QuantizedEmbedding.of(rounded, self.name, padding=table.padding, multiplier=table.multiplier)
        if table.head is None:
            return {self.name: made}
        head = TiedHead.of(made)
        if self.head_bias is not None:
            head.set_bias(self.head_bias)
        return {self.name: made, table.head.name: head}


class OfUnit(Target):
    """A target that takes a whole unit; a method for units says what could become of it."""

    unit: Unit
    method: UnitMethod | CacheMethod

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.unit.block

    @property
    def sites(self) -> tuple[Site, ...]:  # type: ignore[override]
        return tuple(self.unit.sites.values())

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return self.method.needs

    def sizes(self, itemsize: int) -> Sequence[Option]:
        return self.method.sizes(self.unit, itemsize)

    def options(self, weights: Weights, stats: Mapping[str, Stats]) -> Sequence[Option]:
        return self.method.options(self.unit, by_role(self.unit, weights), read_by_role(self.unit, stats))


@dataclass(frozen=True)
class UnitTarget(OfUnit):
    """The attention or the MLP of a block."""

    unit: Unit
    method: UnitMethod
    norms: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    """Gains of the norms of heads, where there are any and the method builds the attention anew."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.unit.name

    @property
    def role(self) -> str:  # type: ignore[override]
        return self.unit.role

    def dense_bytes(self, itemsize: int) -> int:
        return self.elements * itemsize

    def compress(
        self, weights: Weights, biases: Weights, stats: Mapping[str, Stats], amount: Amount
    ) -> dict[str, Kind]:
        made = self.method.compress(
            self.unit,
            by_role(self.unit, weights) | dict(self.norms),
            by_role(self.unit, biases),
            read_by_role(self.unit, stats),
            amount,
        )
        return {self.unit.sites[role].name if role else self.unit.module: kind for role, kind in made.items()}


@dataclass(frozen=True)
class GroupTarget(UnitTarget):
    """Linears that read alike, each of which stays a linear of its shape; perhaps in several blocks."""

    def error(self, weights: Weights, made: Mapping[str, Kind], stats: Mapping[str, Stats]) -> float | None:
        """What all of them lose together, over what all of them say; see `SiteTarget.error`."""
        lost, energy = 0.0, 0.0
        for site in self.sites:
            observed, kind = stats.get(site.reads, Stats()), made[site.name]
            if Gram not in observed or not isinstance(kind, LinearKind):
                return None
            of_site = _lost(weights[site.name].double(), kind.to_dense().double(), observed)
            lost, energy = lost + of_site[0], energy + of_site[1]
        return lost / energy if energy > 0 else 0.0

    def spectrum(self, weights: Weights, stats: Mapping[str, Stats]) -> list[float] | None:
        if len({site.reads for site in self.sites}) > 1:
            return None
        stacked = torch.cat([weights[site.name] for site in self.sites])
        return _spectrum(stacked, stats.get(self.sites[0].reads, Stats()))


def _lost(weight: Tensor, compressed: Tensor, observed: Stats) -> tuple[float, float]:
    """E‖W x - W' x‖² and E‖W x‖²; with the cross moment E‖W x - W' x̂‖², both float64."""
    gram = observed[Gram].mean()
    if Cross not in observed:
        return _lost_of(weight, compressed, gram)
    cross = observed[Cross]
    energy = ((weight @ cross.dense()) * weight).sum().item()
    shared = ((weight @ (cross.mean() + gram)) * compressed).sum().item()
    own = ((compressed @ gram) * compressed).sum().item()
    return max(energy - 2 * shared + own, 0.0), energy


def _lost_of(weight: Tensor, compressed: Tensor, gram: Tensor) -> tuple[float, float]:
    difference = weight - compressed
    return ((difference @ gram) * difference).sum().item(), ((weight @ gram) * weight).sum().item()


def _spectrum(weight: Tensor, observed: Stats) -> list[float]:
    gram = observed[Gram].mean() if Gram in observed else None
    left = output_basis(weight, gram, vectors=False).left_over()
    return (left / left[0]).tolist() if left[0] > 0 else [0.0] * len(left)


def by_role(unit: Unit, tensors: Weights) -> dict[str, Tensor]:
    """Tensors of the unit's sites by the last word of their roles, as far as there are any."""
    return {role: tensors[site.name] for role, site in unit.sites.items() if site.name in tensors}


def read_by_role(unit: Unit, stats: Mapping[str, Stats]) -> dict[str, Stats]:
    """What is known of the unit's sites, by the last word of their roles."""
    return {role: of_site(site, stats) for role, site in unit.sites.items()}


def of_site(site: Site, stats: Mapping[str, Stats]) -> Stats:
    """What is known of a site: of the input that it reads, and of the gradients in it."""
    return stats.get(site.reads, Stats()) | stats.get(site.name, Stats())


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.detach().contiguous())
    return linear


@dataclass(frozen=True)
class CacheTarget(OfUnit):
    """The keys and values that the attention of a block leaves behind; bytes are those of one token."""

    unit: Unit
    method: CacheMethod
    attention: AttentionSettings
    norms: Mapping[str, Tensor] = field(compare=False)
    """Gains of the norms of heads, where there are any."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.unit.module

    @property
    def role(self) -> str:  # type: ignore[override]
        return "cache"

    def dense_bytes(self, itemsize: int) -> int:
        return dense_bytes_per_token(self.unit, itemsize)

    def compress(
        self, weights: Weights, biases: Weights, stats: Mapping[str, Stats], amount: Amount
    ) -> dict[str, Kind]:
        made = self.method.compress(
            self.unit,
            by_role(self.unit, weights) | dict(self.norms),
            by_role(self.unit, biases),
            read_by_role(self.unit, stats),
            amount,
            self.attention,
        )
        return {f"{self.unit.module}.{path}" if path else self.unit.module: kind for path, kind in made.items()}

"""A low-rank update beside a frozen linear: y = base(x) + η B A x, with η = alpha / rank.

Only A (rank × in, `down`) and B (out × rank, `up`) train; ∂L/∂B = ∂L/∂W · η Aᵀ.  B begins as zero, so that the first
step sees exactly the model that was handed over, be it dense, factorised or quantized: healing starts from the
compressed model and never from something worse.

Hardening keeps the function and, where it can, the form.  A plain linear takes the update into its weight; the factors
of a low-rank linear are extended, [up, ηB] · [down; A]; whatever else (packed integers, or `merge = false`) becomes
the kind `sum` of the frozen base and a low-rank update.

Of a factorised linear, `factors` names children that get an update each, taken into them at the end: no number is
stored more than before.  SVD-LLM heals that way, one factor after the other, since the gradient of each depends on the
other: a step with ``factors = ["up"]``, then one with ``factors = ["down"]`` (Wang et al., 2024, section 3.3, arXiv
2403.07378).  A linear that was left dense has no factors; its update goes into its weight.  `down` of a shared factor
is a child of its owner, and trains there alone.

Differs from the authors' code: the update is held and computed in float32 or better when the model computes in less,
because steps of Adam are smaller than a bfloat16 can resolve; A begins uniform within ±1/√in (Kaiming's with a = √5),
as theirs does, where the paper says Gaussian.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, section 4 (arXiv 2106.09685).
"""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from tersely.errors import RecipeError
from tersely.kinds import DenseLinear, LinearKind, LowRankLinear, SharedLinear
from tersely.kinds.sum import SumLinear
from tersely.stats import Statistic, Stats
from tersely.train.relax.base import Relaxed

Form = Literal["plain", "extended", "sum"]
Factor = Literal["down", "up", "rest"]


@dataclass(frozen=True)
class Adapter:
    rank: int = 8
    """Width of the update."""

    alpha: float = 16.0
    """The update is scaled by alpha / rank, so that the rank can change without another rate."""

    dropout: float = 0.0
    """Share of the update's inputs that is set to zero while training, the others scaled up."""

    merge: bool = True
    """Take the update into the weight, or into the factors, where that is exact; else keep it apart, as a sum."""

    factors: tuple[Factor, ...] = ()
    """Children of factorised linears that get an update each, merged into them (`rest`: of pivoted ones); none: an
    update beside the linear as a whole."""

    paper: ClassVar[str] = "Hu et al., 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685)"
    summary: ClassVar[str] = "low-rank update beside frozen weights (LoRA), for healing"

    def __post_init__(self) -> None:
        check_update("adapter", self.rank, self.alpha, self.dropout)
        unknown = [name for name in self.factors if name not in get_args(Factor)]
        if unknown or len(set(self.factors)) < len(self.factors):
            raise RecipeError(
                f"adapter: factors = {list(self.factors)}; wanted each of {get_args(Factor)} once at most"
            )
        if self.factors and not self.merge:
            raise RecipeError("adapter: updates of factors are merged into them; leave merge = false out, or factors")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return ()

    @property
    def leaves(self) -> tuple[str, ...] | None:
        return None if self.merge else ("terms.0", "terms.1.down", "terms.1.up")

    def check(
        self, shapes: Sequence[tuple[int, int]], kinds: Sequence[tuple[int, int]], packed: int, bits: float | None
    ) -> None:
        learns_no_size("adapter", bits)
        check_width("adapter", self.rank, [*shapes, *kinds])
        if self.factors and not kinds:
            raise RecipeError("adapter: no target is factorised; leave factors out, or factorise in a step before")

    def relax(self, linear: nn.Module, stats: Stats, generator: torch.Generator) -> Relaxed:
        if self.factors and isinstance(linear, LinearKind):
            return AdaptedFactors(linear, self, generator)
        return Adapted(linear, self, generator)

    def budget(self, modules: Sequence[Relaxed], bits: float | None) -> Tensor:
        return modules[0].bits().new_zeros(())


def learns_no_size(name: str, bits: float | None) -> None:
    if bits is not None:
        raise RecipeError(f"{name}: bits = {bits}, but it learns no size; leave bits out")


class Adapted(Relaxed):
    """base(x) + η up (down (dropout x))."""

    def __init__(self, base: nn.Module, asked: Adapter, generator: torch.Generator) -> None:
        super().__init__()
        out_features, in_features = shape_of(base)
        self.base = base
        self.scale = asked.alpha / asked.rank
        self._merge = asked.merge
        self._dropout = Dropout(asked.dropout, generator)
        like = master(base)
        self.down = nn.Parameter(kaiming_rows(asked.rank, in_features, generator).to(like))
        self.up = nn.Parameter(like.new_zeros(out_features, asked.rank))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        inner = functional.linear(self._dropout(x.to(self.down)), self.down)
        return (y + self.scale * functional.linear(inner, self.up)).to(y.dtype)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"adapters": [self.down, self.up]}

    def update(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """B and A, detached, with η taken into B."""
        return self.scale * self.up.detach(), self.down.detach()

    def harden(self) -> nn.Module:
        return absorb(self.base, *self.update(), merge=self._merge)

    def bits(self) -> Tensor:
        return absorbed_bits(self.base, len(self.down), merge=self._merge).to(self.up.device)


class AdaptedFactors(Relaxed):
    """A factorised linear, some children of which have an update beside them."""

    def __init__(self, base: LinearKind, asked: Adapter, generator: torch.Generator) -> None:
        super().__init__()
        children = dict(base.named_children())
        chosen = {name: children[name] for name in asked.factors if isinstance(children.get(name), nn.Linear)}
        if not chosen and not _in_the_group(base, asked.factors):
            linears = ", ".join(name for name, child in children.items() if isinstance(child, nn.Linear)) or "none"
            raise RecipeError(
                f"adapter: a {type(base).__name__} has no plain linear {' or '.join(asked.factors)} that an update "
                f"could be merged into; it has {linears}"
            )
        adapted = {id(child): Adapted(child, asked, generator) for child in chosen.values()}
        self.base = deepcopy(base, dict(adapted))  # a copy with the adapted children in the places of the plain ones
        self._names = tuple(chosen)
        self._bytes = sum(t.nbytes for name, t in base.state_dict().items() if not name.endswith("bias"))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return out

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"adapters": [p for child in self._adapted() for p in child.groups()["adapters"]]}

    def harden(self) -> nn.Module:
        return deepcopy(self.base, {id(child): child.harden() for child in self._adapted()})

    def bits(self) -> Tensor:
        return torch.tensor(8.0 * self._bytes, device=stock(self.base).device)

    def _adapted(self) -> Iterator[Adapted]:
        for name in self._names:
            child = self.base.get_submodule(name)
            assert isinstance(child, Adapted)
            yield child


def _in_the_group(base: LinearKind, factors: Sequence[str]) -> bool:
    """Whether a member of a shared factor lacks one of these because another member stores it, or nobody has to."""
    if not isinstance(base, SharedLinear):
        return False
    return ("down" in factors and not base.owner) or ("rest" in factors and base.rows == 0)


class Dropout(nn.Module):
    """Zeroes a share of the elements while training and scales the others up, by numbers of the given generator."""

    def __init__(self, share: float, generator: torch.Generator) -> None:
        super().__init__()
        self._share = share
        self._generator = generator

    def forward(self, x: Tensor) -> Tensor:
        if self._share == 0 or not self.training:
            return x
        kept = torch.rand(x.shape, generator=self._generator, device=self._generator.device) >= self._share
        return x * kept.to(x) / (1 - self._share)


def check_update(name: str, rank: int, alpha: float, dropout: float) -> None:
    """Raise RecipeError for hyperparameters out of range."""
    if rank < 1:
        raise RecipeError(f"{name}: rank = {rank}; wanted 1 or more")
    if not 0 < alpha < math.inf:
        raise RecipeError(f"{name}: alpha = {alpha}; wanted above 0")
    if not 0 <= dropout < 1:
        raise RecipeError(f"{name}: dropout = {dropout}; wanted 0 or more, below 1")


def check_width(name: str, rank: int, shapes: Sequence[tuple[int, int]]) -> None:
    """Raise RecipeError for an update of a higher rank than some target can have, which would be numbers for nothing.

    shapes: (out, in) of the targets."""
    narrowest = min(shapes, key=min, default=None)
    if narrowest is not None and rank > min(narrowest):
        raise RecipeError(
            f"{name}: rank = {rank}, and a target has the shape {tuple(narrowest)}; wanted at most {min(narrowest)}, "
            "or other targets"
        )


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear.  Raises RecipeError for a module that is none."""
    match linear:
        case nn.Linear() | LinearKind():
            return linear.out_features, linear.in_features
        case Conv1D():
            return linear.weight.shape[1], linear.weight.shape[0]
    raise RecipeError(f"a {type(linear).__name__} is no linear; name linears as the targets of training")


def master(linear: nn.Module) -> Tensor:
    """An empty tensor on the linear's device, in the dtype that its training numbers are held in: float32 or better."""
    like = stock(linear)
    return torch.empty(0, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def kaiming_rows(rank: int, in_features: int, generator: torch.Generator) -> Float[Tensor, "rank in"]:
    """Uniform within ±1/√in, float64, on the generator's device."""
    drawn = torch.rand(rank, in_features, dtype=torch.float64, generator=generator, device=generator.device)
    return (2 * drawn - 1) / math.sqrt(in_features)


def absorb(
    linear: nn.Module, up: Float[Tensor, "out rank"], down: Float[Tensor, "rank in"], *, merge: bool = True
) -> nn.Module:
    """A linear that computes linear(x) + up (down x); `linear` stays as it is, and may share numbers with the result.

    Products are taken in float64 and rounded once, to the dtype of the linear.
    """
    match _form(linear, merge=merge):
        case "plain":
            return _merged(linear, up.double() @ down.double())
        case "extended":
            return _extended(linear, up, down)
        case "sum":
            return _summed(linear, up, down)


def absorbed_bits(linear: nn.Module, rank: int, *, merge: bool = True) -> Tensor:
    """Bits of the weights that `absorb` gives for an update of this rank."""
    biases = sum(p.numel() * p.element_size() for name, p in linear.named_parameters() if name.endswith("bias"))
    whole = sum(t.numel() * t.element_size() for t in linear.state_dict().values())
    update = 0 if _form(linear, merge=merge) == "plain" else sum(shape_of(linear)) * rank * stock(linear).itemsize
    return torch.tensor(8.0 * (whole - biases + update))


def _form(linear: nn.Module, *, merge: bool) -> Form:
    match linear:
        case _ if not merge:
            return "sum"
        case nn.Linear() | Conv1D():
            return "plain"
        case DenseLinear(dense=nn.Linear()):
            return "plain"
        case LowRankLinear(down=nn.Linear(), up=nn.Linear()):
            return "extended"
    return "sum"


def stock(linear: nn.Module) -> Tensor:
    """What bears the stock name `weight`, which of a kind is an empty guard: it tells dtype and device."""
    return linear.get_buffer("weight") if isinstance(linear, LinearKind) else linear.get_parameter("weight")


def _merged(linear: nn.Module, update: Float[Tensor, "out in"]) -> nn.Module:
    if isinstance(linear, DenseLinear):
        weight = linear.dense.weight
        return DenseLinear.from_weight((weight.double() + update).to(weight.dtype), linear.dense.bias)
    weight = linear.get_parameter("weight").detach()
    added = weight.double() + (update.T if isinstance(linear, Conv1D) else update)
    with torch.device("meta"):
        made = _like(linear)
    made.weight = nn.Parameter(added.to(weight.dtype).contiguous())
    if made.bias is not None:
        made.bias = nn.Parameter(linear.get_parameter("bias").detach().clone())
    return made


def _like(linear: nn.Module) -> nn.Linear | Conv1D:
    out_features, in_features = shape_of(linear)
    if isinstance(linear, Conv1D):
        return Conv1D(out_features, in_features)
    return nn.Linear(in_features, out_features, bias=linear.bias is not None)


def _extended(linear: nn.Module, up: Float[Tensor, "out rank"], down: Float[Tensor, "rank in"]) -> LowRankLinear:
    assert isinstance(linear, LowRankLinear)
    old_up, old_down = linear.up.weight.detach(), linear.down.weight.detach()
    wider = LowRankLinear.from_factors(
        torch.cat([old_up, up.to(old_up)], dim=1), torch.cat([old_down, down.to(old_down)], dim=0)
    )
    if linear.up.bias is not None:
        wider.set_bias(linear.up.bias)
    return wider


def _summed(linear: nn.Module, up: Float[Tensor, "out rank"], down: Float[Tensor, "rank in"]) -> nn.Module:
    update = LowRankLinear.from_factors(up, down, dtype=stock(linear).dtype)
    if isinstance(linear, SumLinear):
        return SumLinear.of([*linear.terms, update])
    if isinstance(linear, Conv1D):
        linear = DenseLinear.from_weight(linear.weight.detach().T, linear.bias.detach())
    return SumLinear.of([linear, update])

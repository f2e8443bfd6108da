"""One thin factor that several weights share: W'_i = up_i · down, with a single `down`.

Linears that read the same tensor x may project it onto the same r directions: h = down x is computed once, and each of
them makes its own output of h.  Stacked, [W'_1; W'_2; …] is one weight of rank r with Σm_i rows, so that

    r (Σ m_i + n)  numbers stand where factors of every weight by itself take  Σ r (m_i + n).

One member of the group is its *owner*: `down` is its child, lies in its part of the checkpoint, and counts there, once.
The others hold `up` alone and refer to the owner, which is no child of theirs.  All of them bear the name of the group
(the owner's path in the model when it was made), and `link` finds by that name who belongs together, wherever later
steps have moved or wrapped them; it has to be called whenever modules were put in place.

Computed once.  Whoever of the group is asked first computes h and leaves it for the others, who take it if they are
given the very same tensor (by identity and version) while nothing else has changed: weights, gradients on or off.  The
product is dropped when the last one has taken it, when another input comes, and when the input is no more.  Whoever
finds none, or has taken this one before, computes it anew, so that every order of calls gives the right numbers.  Under
a compiler every member says down x, and the compiler sees that they are one.  Members that read different tensors
(`same_input` false: the same role in several blocks) share the numbers of `down` and nothing else.

Pivoted (see `kinds.pivoted`, here of the stacked weight): r rows of the stack are `down` itself, wherever they belong,
and a member combines its other rows out of those, `rest`; `place` says which number of [h, rest h] every output is.
r (Σ m_i + n) - r² numbers are stored.  A member may have all of its rows among the r, and then has no `rest`.

`down`, `up` and `rest` are plain `nn.Linear`, so that a later step may quantize each of them.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersely.errors import CheckpointError
from tersely.kinds.base import Kind, LinearKind, Spec, dense_weight
from tersely.kinds.pivoted import pivot_rows, place_dtype


class SharedLinear(LinearKind):
    """W' = up · down, where `down` is a child of the owner alone."""

    name = "shared"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        group: str,
        *,
        owner: bool,
        same_input: bool,
        rest: int | None = None,
        bias: bool = False,
    ) -> None:
        """`rest`: of a pivoted member, the rows that are not stored themselves; None for plain factors."""
        super().__init__(in_features, out_features)
        if rank < 1 or not 0 <= (rest or 0) <= out_features:
            raise CheckpointError(f"a shared factor of rank {rank}, {rest} of {out_features} rows combined of it")
        self.rank = rank
        self.group = group
        self.owner = owner
        self.same_input = same_input
        self.rows = rest
        self.has_bias = bias
        self._owner: tuple[SharedLinear, ...] = ()  # in a tuple, where it is neither a child nor a parameter
        self._readers = 1
        self._latest = _Latest()
        if owner:
            self.down: nn.Module = nn.Linear(in_features, rank, bias=False)
        if rest is None:
            self.up: nn.Module = nn.Linear(rank, out_features, bias=bias)
            return
        if rest:
            self.rest: nn.Module = nn.Linear(rank, rest, bias=False)
        self.register_buffer("place", torch.empty(out_features, dtype=place_dtype(rank + out_features)))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @property
    def holder(self) -> "SharedLinear":
        """Whose child `down` is.  Raises CheckpointError for a member that has not been linked."""
        if self.owner:
            return self
        if not self._owner:
            raise CheckpointError(f"the owner of the shared factor {self.group} is missing; link the model that has it")
        return self._owner[0]

    def set_bias(self, bias: Float[Tensor, " out"]) -> None:
        if self.rows is None:
            self.up.bias = nn.Parameter(bias.detach().to(self.weight, copy=True))
        else:
            self.bias = nn.Parameter(bias.detach().to(self.weight, copy=True))
        self.has_bias = True

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        holder = self.holder
        latent = holder._latest.product(holder.down, x, self, holder._readers)
        if self.rows is None:
            made: Tensor = self.up(latent)
            return made
        made = torch.cat([latent, self.rest(latent)], -1) if self.rows else latent
        made = made.index_select(-1, self.get_buffer("place").int())
        return made if self.bias is None else made + self.bias

    def spec(self) -> Spec:
        return {
            "kind": self.name,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "group": self.group,
            "owner": self.owner,
            "same_input": self.same_input,
            "rest": self.rows,
            "bias": self.has_bias,
        }

    @classmethod
    def from_spec(cls, spec: Spec) -> Self:
        return cls(
            spec["in_features"],
            spec["out_features"],
            spec["rank"],
            spec["group"],
            owner=spec["owner"],
            same_input=spec["same_input"],
            rest=spec["rest"],
            bias=spec["bias"],
        )

    def to_dense(self) -> Float[Tensor, "out in"]:
        down = dense_weight(self.holder.down)
        if self.rows is None:
            return dense_weight(self.up) @ down
        rows = torch.cat([down, dense_weight(self.rest) @ down]) if self.rows else down
        return rows[self.get_buffer("place").long()]

    def extra_repr(self) -> str:
        owner = "" if self.owner else f", of {self.group}"
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{owner}"


class _Latest:
    """The product of the last input, for those of the group that have not taken it yet."""

    def __init__(self) -> None:
        self._held: _Held | None = None

    def __reduce__(self) -> tuple[type["_Latest"], tuple[()]]:
        return _Latest, ()  # a copy of the module begins without

    def product(self, down: nn.Module, x: Tensor, reader: "SharedLinear", readers: int) -> Tensor:
        """down x, computed or taken."""
        if readers == 1 or torch.compiler.is_compiling() or torch.jit.is_tracing():
            made: Tensor = down(x)
            return made
        circumstances = _circumstances(down, x)
        held = self._held
        if (
            held is not None
            and held.read() is x
            and held.circumstances == circumstances
            and id(reader) not in held.taken
        ):
            held.taken.add(id(reader))
            if len(held.taken) == readers:
                self._held = None
            return held.product
        self._held = None  # freed before the next one is made
        made = down(x)
        self._held = _Held(weakref.ref(x, self._forget), circumstances, made, {id(reader)})
        return made

    def _forget(self, read: "weakref.ref[Tensor]") -> None:
        if self._held is not None and self._held.read is read:
            self._held = None


@dataclass
class _Held:
    read: "weakref.ref[Tensor]"
    circumstances: tuple[Any, ...]
    product: Tensor
    taken: set[int]


def _circumstances(down: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """All that the product of the very same tensor may depend on: equal before and after means that nothing changed."""
    numbers = (*down.parameters(), *down.buffers())
    return (
        _version(x),
        tuple((id(tensor), _version(tensor)) for tensor in numbers),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(x.device.type),
    )


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version  # what inference mode makes counts no versions


def link(model: nn.Module, beyond: Iterable[SharedLinear] = ()) -> None:
    """Tell all members of shared factors in a model who their owner is, and the owners how many they serve.

    `beyond`: owners that are no part of it, for members that have none inside.  Members that found one before keep it
    where there is none now.  Raises CheckpointError for a member without an owner, for a group with two, and for
    shapes that do not go together.
    """
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, SharedLinear)]
    owners: dict[str, SharedLinear] = {}
    for name, module in named:
        if module.owner and owners.setdefault(module.group, module) is not module:
            raise CheckpointError(f"{name}: the shared factor {module.group} has an owner already")
    outside = {module.group: module for module in beyond}
    for name, module in named:
        if module.owner:
            continue
        found = owners.get(module.group) or outside.get(module.group)
        if found is not None:
            module._owner = (found,)
        try:
            holder = module.holder
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
        if (holder.in_features, holder.rank) != (module.in_features, module.rank):
            raise CheckpointError(
                f"{name}: a member of rank {module.rank} for {module.in_features} inputs; the owner of its factor "
                f"{module.group} has rank {holder.rank} for {holder.in_features}"
            )
    serving = Counter(module.group for _, module in named if module.same_input)
    for group, owner in (outside | owners).items():
        owner._readers = max(serving[group], 1)


def orphans(module: nn.Module) -> set[str]:
    """The groups of shared factors that have members in a module and no owner."""
    found = [part for part in module.modules() if isinstance(part, SharedLinear)]
    return {part.group for part in found} - {part.group for part in found if part.owner}


def owner_of(model: nn.Module, group: str) -> tuple[str, SharedLinear]:
    """Path and module of the owner of a shared factor.  Raises CheckpointError where there is none."""
    for name, module in model.named_modules():
        if isinstance(module, SharedLinear) and module.owner and module.group == group:
            return name, module
    raise CheckpointError(f"the owner of the shared factor {group} is missing from the model")


def shared_from_factors(
    ups: Mapping[str, Float[Tensor, "_ rank"]],
    down: Float[Tensor, "rank in"],
    dtype: torch.dtype | None = None,
    *,
    pivot: bool = False,
    same_input: bool = True,
) -> dict[str, Kind]:
    """Modules that stand for up_i · down, by the full names of the linears that they replace, the owner first.

    `ups`: name → factor, in order of execution.  They are linked, hold copies in `dtype` (default: that of `down`), and
    have no bias yet.  Pivoted, the rank must leave a row of the stack to be combined.
    """
    dtype = dtype or down.dtype
    counts = [len(up) for up in ups.values()]
    stacked = torch.cat([up.detach() for up in ups.values()])
    if not pivot:
        factors = [_Part(up, None) for up in stacked.split(counts)]
    else:
        factors, down = _pivoted(stacked, down, counts)
    made: dict[str, SharedLinear] = {}
    group = next(iter(ups))
    for name, rows, part in zip(ups, counts, factors, strict=True):
        with torch.device("meta"):
            module = SharedLinear(
                down.shape[1],
                rows,
                down.shape[0],
                group,
                owner=not made,
                same_input=same_input,
                rest=None if part.place is None else len(part.matrix),
            )
        module.weight = torch.empty(0, dtype=dtype, device=down.device)
        if module.owner:
            module.down.weight = nn.Parameter(down.detach().to(dtype, copy=True).contiguous())
        if part.place is not None:
            module.place = part.place.to(place_dtype(down.shape[0] + rows))
        if len(part.matrix):
            leaf = module.up if part.place is None else module.rest
            leaf.weight = nn.Parameter(part.matrix.to(dtype, copy=True).contiguous())
        made[name] = module
    first = made[group]
    first._readers = len(made) if same_input else 1
    for module in made.values():
        module._owner = () if module.owner else (first,)
    return dict(made)


@dataclass(frozen=True)
class _Part:
    """What one member stores."""

    matrix: Tensor
    """`up`, or `rest` ``[rows, rank]``."""
    place: Tensor | None
    """Pivoted: for every output its index into [h, rest h]."""


def _pivoted(
    up: Float[Tensor, "stacked rank"], down: Float[Tensor, "rank in"], counts: Sequence[int]
) -> tuple[list[_Part], Float[Tensor, "rank in"]]:
    """The parts of the members, and the rows of the stack that stand for themselves; in float64."""
    rank = up.shape[1]
    if rank >= len(up):
        raise CheckpointError(f"a pivoted stack of rank {rank} with {len(up)} rows; wanted a rank below")
    basis, mixing = torch.linalg.qr(up.double())
    chosen, others = pivot_rows(basis)
    combined = torch.linalg.solve(basis[chosen], basis[others], left=False)
    # index of every row of the stack into [rows that are chosen, rows that are combined]
    place = torch.cat([chosen, others]).argsort()
    parts = []
    for places in place.split(list(counts)):
        own = places[places >= rank] - rank
        inside = places.clone()
        inside[places >= rank] = rank + torch.arange(len(own), device=up.device)
        parts.append(_Part(combined[own], inside))
    return parts, basis[chosen] @ (mixing @ down.detach().double())


def shared_bytes(counts: Sequence[int], in_features: int, rank: int, itemsize: int, pivot: bool = False) -> int:
    """Bytes of the weights of a group whose members have so many rows each, all of it counted once."""
    numbers = rank * (sum(counts) + in_features)
    if not pivot:
        return numbers * itemsize
    places = sum(rows * place_dtype(rank + rows).itemsize for rows in counts)
    return (numbers - rank**2) * itemsize + places

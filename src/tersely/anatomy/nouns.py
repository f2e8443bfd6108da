"""The parts that an anatomy names, as plain values; see `parts`."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """A linear that a method may replace.

    `name` is its path in the model and `block` an index into `Anatomy.blocks`.  `role` is ``attention.q|k|v|o|qkv`` or
    ``mlp.gate|up|down|gate_up``; below a replaced site the name of the child follows, as in ``attention.q.down``.
    `reads` is equal for all sites that read the very same tensor.  A `transposed` weight is stored (in, out).
    """

    name: str
    role: str
    block: int
    reads: str
    out_features: int
    in_features: int
    bias: bool
    transposed: bool


@dataclass(frozen=True)
class Place:
    """Where the family has a linear, whatever stands there by now: the linear itself, or a kind that replaced it."""

    name: str
    role: str
    block: int
    reads: str


@dataclass(frozen=True)
class Kept:
    """A linear, or a weight that works like one, that is no site: left as it is, and said so.

    `name` is the path of a linear, or of a parameter in a mixture of experts; `shape` is (out, in) of the former and
    the stored shape of the latter.  `reason` reads well after a number: ``4 fused over all experts``.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Heads:
    """Attention heads of a block: how many ask, how many are asked (fewer where queries are grouped), channels each."""

    query: int
    key_value: int
    width: int


@dataclass(frozen=True)
class Norm:
    """A norm with a gain in front of linears; its output goes nowhere else.

    `feeds` is the input (`Site.reads`) that comes out of it, or ``"head"`` for the last one.  What multiplies is the
    stored ``<name>.weight`` plus `offset`; with a `bias` it subtracts the mean first (LayerNorm).
    """

    name: str
    feeds: str
    bias: bool
    offset: float


@dataclass(frozen=True)
class Unit:
    """Coupled linears of a block that can only be made narrower together: its attention or its MLP.

    `sites` maps the last word of the role (q, k, v, o, or gate, up, down, or a fused name) to the linear.  `module` is
    the path of the attention module, "" for an MLP; `heads` is None for an MLP.  For linears that may share a factor
    (roles reads and depth), see `groups`.
    """

    name: str
    role: str
    block: int
    sites: Mapping[str, Site]
    module: str
    heads: Heads | None
    flexible: bool
    """Heads may be removed and the model's own attention still runs; always true of an MLP."""


@dataclass(frozen=True)
class Table:
    """The token embedding, whose rows are looked up.

    `site` is its weight ``[tokens, width]``.  `padding` is the number of the token whose row takes no gradient;
    `multiplier` scales what is looked up, where the embedding itself does that.  `head` makes logits from the same
    weight in tied models, None in others.
    """

    site: Site
    padding: int | None
    multiplier: float | None
    head: Site | None

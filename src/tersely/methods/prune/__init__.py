"""Structured pruning: a unit becomes narrower, and stays dense.

What can be removed is an *element*: a row that the first linears of a unit make together with the column of the last
linear that reads it.  In an MLP an element is a neuron (a row of gate and of up, a column of down).  In attention it is
a key/value head with all query heads that ask it, since the model repeats the former for the latter: rows of k and v,
the rows of q of its group, and the columns of o that read the group.  Which elements go and what is put in their place
is each paper's own; how the linears hang together is the same for all, and stands here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tersely.anatomy import Unit
from tersely.errors import AnatomyError, RecipeError
from tersely.kinds import DenseLinear, Kind
from tersely.option import Amount, Option


@dataclass(frozen=True)
class Coupling:
    """The elements of a unit, and where each of its linears has them.

    `last` is the linear that reads them, `width` inputs each.  `makers` are those that make them: role → for each part
    of its rows (a fused linear has several) the first row and the rows of an element.  `per_element` counts the weights
    that an element takes in all linears.
    """

    name: str
    count: int
    width: int
    last: str
    makers: Mapping[str, tuple[tuple[int, int], ...]]
    per_element: int

    def rows(self, role: str, kept: Int[Tensor, " kept"]) -> Int[Tensor, " rows"]:
        """The rows of a maker that belong to the elements `kept`."""
        return torch.cat([first + _spread(kept, size) for first, size in self.makers[role]])

    def columns(self, kept: Int[Tensor, " kept"]) -> Int[Tensor, " columns"]:
        """The columns of the last linear that belong to the elements `kept`."""
        return _spread(kept, self.width)

    def sizes(self, itemsize: int) -> list[Option]:
        """Every number of elements from 0 and the bytes of the unit's weights."""
        return [Option(kept, kept * self.per_element * itemsize, None) for kept in range(self.count + 1)]

    def priced(self, errors: Sequence[float], itemsize: int) -> list[Option]:
        """`sizes` with the error at each."""
        return [
            Option(size.amount, size.nbytes, error) for size, error in zip(self.sizes(itemsize), errors, strict=True)
        ]

    def checked(self, amount: Amount) -> int:
        """The number of elements to keep.  Raises RecipeError for anything else."""
        if isinstance(amount, bool) or not isinstance(amount, int) or not 1 <= amount <= self.count:
            raise RecipeError(f"{self.name}: {amount!r} elements to keep; wanted a whole number from 1 to {self.count}")
        return amount

    def narrow(
        self,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        kept: Int[Tensor, " kept"],
        last: Float[Tensor, "out columns"],
    ) -> dict[str, Kind]:
        """The linears of the unit with the elements `kept` only, in order of their roles in `weights`.

        `last` is the weight of the last linear, one column for each of ``columns(kept)``; its bias stays as it is.
        """
        made: dict[str, Kind] = {}
        for role, weight in weights.items():
            bias = biases.get(role)
            if role == self.last:
                made[role] = DenseLinear.from_weight(last.to(weight.dtype), bias)
            else:
                rows = self.rows(role, kept).to(weight.device)
                made[role] = DenseLinear.from_weight(weight[rows], None if bias is None else bias[rows])
        return made


def coupling_of(unit: Unit) -> Coupling:
    """Raises AnatomyError, with the reason, for a unit whose elements cannot be removed."""
    return _neurons(unit) if unit.role == "mlp" else _heads(unit)


def _neurons(unit: Unit) -> Coupling:
    sites = unit.sites
    count = sites["down"].in_features
    makers: dict[str, tuple[tuple[int, int], ...]]
    if "gate_up" in sites:
        makers = {"gate_up": ((0, 1), (count, 1))}
    else:
        makers = {role: ((0, 1),) for role in sites if role != "down"}
    return _coupling(unit, count, 1, "down", makers)


def _heads(unit: Unit) -> Coupling:
    heads = unit.heads
    if heads is None:
        raise AnatomyError(f"{unit.name}: its heads are not known; leave it out of the targets")
    if not {"q", "k", "v"} <= unit.sites.keys():
        raise AnatomyError(
            f"{unit.name} holds q, k and v in one matrix, which its module splits at places that the configuration "
            "fixes: no head can be removed; leave attention out of the targets"
        )
    if not unit.flexible:
        raise AnatomyError(
            f"{unit.name}: its module counts heads by the configuration, not by the width of q, k and v: no head can "
            "be removed; leave attention out of the targets"
        )
    if heads.query % heads.key_value:
        raise AnatomyError(f"{unit.name}: {heads.query} query heads do not divide over {heads.key_value} key heads")
    group = heads.query // heads.key_value * heads.width
    makers: dict[str, tuple[tuple[int, int], ...]]
    makers = {"q": ((0, group),), "k": ((0, heads.width),), "v": ((0, heads.width),)}
    return _coupling(unit, heads.key_value, group, "o", makers)


def _coupling(
    unit: Unit, count: int, width: int, last: str, makers: dict[str, tuple[tuple[int, int], ...]]
) -> Coupling:
    """Checks that the shapes are those that the elements ask for."""
    expected = {role: count * sum(size for _, size in parts) for role, parts in makers.items()}
    found = {role: unit.sites[role].out_features for role in makers}
    if found != expected or unit.sites[last].in_features != count * width:
        raise AnatomyError(
            f"{unit.name}: {count} elements ask for rows {expected} and {count * width} inputs of {last}; found rows "
            f"{found} and {unit.sites[last].in_features} inputs"
        )
    per_element = sum(site.out_features * site.in_features for site in unit.sites.values()) // count
    return Coupling(unit.name, count, width, last, makers, per_element)


def _spread(kept: Tensor, size: int) -> Tensor:
    """Indices of the elements' members, where each element is `size` neighbours."""
    return (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()

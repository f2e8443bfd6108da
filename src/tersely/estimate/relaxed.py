"""What a relaxation holds of a linear while it trains, told by one small linear that it is given."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersely.anatomy import Site
from tersely.stats import Stats
from tersely.train import Relaxation, Relaxed

NARROWEST = 128
"""Width of the small linear; those of updates are twice as wide as the update at least."""

TOKENS = 64
"""That are sent through it."""

PER_NUMBER = 4
"""What there is of a number that trains: itself, its gradient, two moments of AdamW."""


@dataclass(frozen=True)
class Share:
    """Of what stands in the place of a linear: numbers and bytes for each of its weights."""

    frozen: float
    """Bytes that stand there and do not train."""
    own: float
    """Numbers that train, as many as there are weights or fewer."""
    update: float
    """Numbers of an update beside them, for each row and column."""
    graph: float
    """Bytes that a forward pass keeps for the backward pass however few tokens there are: tensors as large as the
    weight."""
    of_token: float
    """Bytes that it keeps for every token and feature that the linear reads, the input itself aside."""

    def numbers(self, site: Site) -> float:
        """That train."""
        both = site.out_features + site.in_features
        return self.own * site.out_features * site.in_features + self.update * both

    def nbytes(self, site: Site, *, kept: bool) -> float:
        """In the midst of a step.  `kept`: whether the best numbers so far are, too."""
        fixed = (self.frozen + self.graph) * site.out_features * site.in_features
        return fixed + 4 * (PER_NUMBER + kept) * self.numbers(site)


def share_of(relaxation: Relaxation, dtype: torch.dtype) -> Share:
    """Relax a small linear of random numbers, send a token through it, and count."""
    width = max(NARROWEST, 2 * getattr(relaxation, "rank", 0))
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        linear = nn.Linear(width, width, bias=False)
    linear.weight = nn.Parameter(torch.randn(width, width, generator=generator).to(dtype))
    seen = Stats({kind: kind(width) for kind in relaxation.needs})
    seen.update(torch.randn(2 * width, width, generator=generator))
    relaxed = relaxation.relax(linear, seen, generator).train()
    groups = relaxed.groups()
    trained = [parameter for group in groups.values() for parameter in group]
    updates = sum(parameter.numel() for parameter in groups.get("adapters", []))
    own = sum(parameter.numel() for parameter in trained) - updates
    known = _storages([*relaxed.parameters(), *relaxed.buffers()])
    frozen = sum(known.values()) - sum(_storages(trained).values())
    weights = width * width
    one, more = (_kept(relaxed, torch.ones(tokens, width, dtype=dtype), known) for tokens in (1, 1 + TOKENS))
    of_token = (more - one) / TOKENS / width
    graph = one / weights - of_token / width
    return Share(frozen / weights, own / weights, updates / (2 * width), graph, max(0.0, of_token - dtype.itemsize))


def _kept(relaxed: Relaxed, x: Tensor, known: dict[int, int]) -> int:
    """Bytes of what autograd keeps of a forward pass, parameters and buffers aside, which are there anyway."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    for parameter in relaxed.parameters():
        parameter.requires_grad_(False)
    for group in relaxed.groups().values():
        for parameter in group:
            parameter.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(keep, _same):
        given = relaxed(x.requires_grad_(True))
    del given
    return sum(size for place, size in _storages(kept.values()).items() if place not in known)


def _same(saved: Any) -> Any:
    return saved


def _storages(tensors: Any) -> dict[int, int]:
    """Where the numbers lie → bytes there, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}

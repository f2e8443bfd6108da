"""Which linears the model minds most: what the loss would rise by if one of them alone were made smaller, foretold.

How far an output moves says little of what is lost by it.  Let g be the gradient of the loss in the output y = W x of a
linear at one token, and e what a smaller linear would add to y there.  To second order, with the squares of gradients
in the place of the Hessian,

    rise    ½ E[(g · e)²]        nats per token
    error   E ‖e‖² / E ‖y‖²      beside it: what is seen without gradients

for two smaller linears: at `half size` W is truncated in the metric of its inputs to the rank at which two factors take
half of its weights (`svd_llm`), at `4 bits` it is rounded to the nearest of 16 levels in groups of 64 (`rtn`).

The order can be relied on, not the height: half the size loses two to three times what is foretold (`docs/lab.md`).  A
linear is flagged *sensitive* where its part of the rise at half size, of all linears together, is `FLAG` times its part
of the weights.

Every linear is made smaller block by block; then the whole model is in memory, with what was made beside it, for one
backward pass over the windows.  Of those the first and last eighth does not count, and gradients are clipped, as
`tersely.gradients` says.

Source: Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, 2015, section 3
(arXiv 1503.05671), for the second order; the expectation is taken as it stands here, and not factored.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from tersely.anatomy import Site
from tersely.diagnose.base import Row, Subject, row
from tersely.gradients import clipped, go_back, whole_model, within_margins
from tersely.methods import METHODS
from tersely.stats import Gram, Stats

FLAG = 3.0
"""How many times its part of the weights a linear's part of the rise is that is flagged."""

BITS = 4
HALF, ROUNDED = "half size", f"{BITS} bits"


@dataclass
class Foretold:
    """Sums over tokens for one linear and something smaller in its place."""

    made: nn.Module
    rise: float = 0.0
    moved: float = 0.0
    whole: float = 0.0
    tokens: int = 0

    def add(
        self,
        read: Float[Tensor, "windows tokens in"],
        y: Float[Tensor, "windows tokens out"],
        felt: Float[Tensor, "windows tokens out"],
    ) -> None:
        """What was read, what came of it without a bias, and the gradient there."""
        e = (self.made(read) - y).float()
        self.rise += 0.5 * torch.linalg.vecdot(felt, e).square().sum(dtype=torch.float64).item()
        self.moved += e.square().sum(dtype=torch.float64).item()
        self.whole += y.float().square().sum(dtype=torch.float64).item()
        self.tokens += felt.shape[0] * felt.shape[1]

    def rows(self, name: str, what: str) -> list[Row]:
        error = self.moved / self.whole if self.whole else None
        return [
            row(name, f"rise at {what}", self.rise / self.tokens, "nats"),
            row(name, f"error at {what}", error),
        ]


def look(subject: Subject) -> list[Row]:
    """Every linear of the blocks.  Raises AnatomyError for a model that predicts no next token."""
    sites = {site.name: site for site in subject.anatomy.sites if site.block < len(subject.anatomy.blocks)}
    found = dict(_smaller(subject))
    model = whole_model(subject.source, subject.device)
    modules = {name: model.get_submodule(name) for name in sites}

    @torch.no_grad()
    def show(name: str, x: Tensor, gradient: Tensor, last: bool) -> None:
        weight = modules[name].weight.T if sites[name].transposed else modules[name].weight
        read, felt = within_margins(x), clipped(gradient.float())
        y = linear(read, weight)
        for one in found[name].values():
            one.add(read, y, felt)

    go_back(model, subject.anatomy, list(sites), subject.windows, show)
    whole = sum(of_site[HALF].rise for of_site in found.values())
    weights = sum(_weights(site) for site in sites.values())
    rows = []
    for name, of_site in found.items():
        for what, one in of_site.items():
            rows += one.rows(name, what)
        sensitive = of_site[HALF].rise * weights > FLAG * whole * _weights(sites[name])
        rows.append(row(name, "flag", "sensitive" if sensitive else None))
    return rows


def _smaller(subject: Subject) -> Iterator[tuple[str, dict[str, Foretold]]]:
    """Name of a site → what it could become."""
    for seen in subject.blocks([Gram]):
        for site in seen.sites:
            weight, read = subject.weight(site), seen.inputs[site.reads]
            yield site.name, {HALF: Foretold(_truncated(weight, read)), ROUNDED: Foretold(_rounded(weight, read))}


def _truncated(weight: Float[Tensor, "out in"], read: Stats) -> nn.Module:
    rank = max(1, weight.numel() // (2 * sum(weight.shape)))
    return METHODS["svd_llm"]().compress(weight, read, rank)


def _rounded(weight: Float[Tensor, "out in"], read: Stats) -> nn.Module:
    return METHODS["rtn"]().compress(weight, read, BITS)


def _weights(site: Site) -> int:
    return site.in_features * site.out_features

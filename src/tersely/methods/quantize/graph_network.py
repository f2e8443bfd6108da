"""A graph network over the columns of weights: what a column is worth, as it and its neighbours look.

Nodes are the columns of one linear.  With the Gram matrix damped, inverted and factorised, H⁻¹ = Uᵀ U in the order in
which columns are rounded (`linalg.hessian`), an error e in column i moves a later column j by e U_ij, where one of its
own would have moved it by e U_jj.  Errors count by their squares, so the graph has

    A_ij = (U_ij / U_jj)² + (U_ji / U_ii)²,   of every node the `NEIGHBOURS` strongest,   Ã = D^(-½) (A + I) D^(-½).

Rescaling an input, or all of them, changes no edge.  Features are free of scale too, logarithms less their mean over
the columns, so that one network serves every linear of a model:

    log ‖w_j‖       log max|w_j| / rms       log kurtosis       ½ log H_jj       -log U_jj
    log e_j2        log (1 + Σ_i U_ij² / U_jj²),   what the columns before it pass on to it

e_jk = ‖w_j - Q_k(w_j)‖² / U_jj² is the error of column j at width k once all later columns have made up for it, as if
columns did not disturb each other.  Two layers mix a node with its neighbours, a third says by how many bits its width
is to be off the mean:

    Z₁ = relu([Ã F, m] W₁ + b₁),   Z₂ = relu(Ã Z₁ W₂ + b₂),   t = Z₂ w₃ + b₃,   p_jk ∝ exp(-β (k - m - t_j)²).

m is the mean width that is asked for: one network for every budget.  A step of its training takes a few linears, each
with a mean m drawn anew, and minimises the additive loss and what exceeds m:

    4^(m-1) Σ_j Σ_k y_jk e_jk / Σ_j e_j1  +  λ relu(mean_j Σ_k y_jk k - m)²

y is the choice itself, all or nothing, with the gradient of p (straight-through); λ rises from 0 during the first
third, without which one width takes everything.  The factor puts all m on one scale: a bit takes three quarters of an
error.  One that were free to choose its logits for every width learned far less in as many steps; these make log p
concave in k, so that the most probable widths of a given mean are found exactly (`column_budget`).

Without edges, where Ã is the identity, this is a network on the features of each column alone.

Departures: the paper feeds columns of weights, whose length is another in every linear.  Where the relative position of
a column would be a feature, here stands what the columns before it pass on: it is zero for inputs that are not
correlated, and nothing but the neighbourhood tells columns of the same looks apart.  With |U_ij| for its square the
many weak couplings that chance brings outweigh a node's own features.

Source: Liu et al., Mixed-Precision Graph Neural Quantization for Low Bit Large Language Models, 2025
(arXiv 2501.18154); what it does not say is filled in, see `methods.quantize.mg_ptq`.
Source: Kipf and Welling, Semi-Supervised Classification with Graph Convolutional Networks, 2017, section 2
(arXiv 1609.02907), for the layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from tersely.errors import NumericalError
from tersely.linalg.hessian import Feedback

NEIGHBOURS = 32
HIDDEN = 64
RATE = 5e-3
"""Of Adam, at the start; it falls to nothing along a cosine."""

PENALTY = 10.0
"""λ, per squared bit, after its rise."""

RISE = 1 / 3
"""Share of the steps in which λ rises."""

NODES = 4096
"""Of the linears in a step, at least one of them."""

SHARPNESS = 2.0
"""β, per squared bit: of two widths one of which is as wanted, the other is e² times less probable."""

FLOOR = 1e-12
"""As a share of the largest: what a logarithm sees at least."""

FARTHEST = 8.0
"""No feature is larger: a column of zeros is far from all others, but not by e^27."""

TRAINING = repr((NEIGHBOURS, HIDDEN, RATE, PENALTY, RISE, NODES, SHARPNESS, FLOOR, FARTHEST))
"""What a trained network depends on, besides its linears and its method's fields."""


@dataclass(frozen=True)
class ColumnGraph:
    """The columns of one linear, and all that is learned from them."""

    features: Float[Tensor, "columns features"]
    """Ã F, float64."""
    reach: Float[Tensor, "columns columns"] | None
    """Ã, sparse; None for the identity."""
    costs: Float[Tensor, "columns widths"]
    """e_jk, in units of its mean over columns at the least width."""


def column_graph(
    weight: Float[Tensor, "out in"],
    power: Float[Tensor, " in"],
    spread: Feedback,
    costs: Float[Tensor, "in widths"],
    *,
    edges: bool,
) -> ColumnGraph:
    """Graph, features and costs of a weight.

    power: the diagonal of H.  costs: e_jk, of which the second column, or the only one, is a feature.
    """
    weight = weight.double()
    squares = weight.square()
    mean = squares.mean(0).clamp(min=squares.mean().clamp(min=1e-300) * FLOOR)
    own = torch.empty_like(power).index_copy_(0, spread.order, spread.own)
    factor = spread.inverse()
    passed = factor.square().sum(0) * spread.own.square()  # its own share is 1
    features = torch.stack(
        [
            _centred(mean.sqrt()),
            (weight.abs().amax(0).square() / mean).clamp(min=1.0).log() / 2,
            (squares / mean).square().mean(0).clamp(min=1.0).log(),
            _centred(power.sqrt()),
            _centred(own),
            _centred(costs[:, min(1, costs.shape[1] - 1)]),
            torch.empty_like(power).index_copy_(0, spread.order, passed.log()),
        ],
        1,
    ).clamp(-FARTHEST, FARTHEST)
    unit = costs[:, 0].mean()
    costs = costs / unit if unit > 0 else costs
    if not torch.isfinite(features).all() or not torch.isfinite(costs).all():
        raise NumericalError("the features of a weight's columns are not finite; calibrate in float32 on more text")
    reach = adjacency(factor, spread.order) if edges else None
    return ColumnGraph(features if reach is None else torch.sparse.mm(reach, features), reach, costs)


def adjacency(
    factor: Float[Tensor, "columns columns"], order: Int[Tensor, " columns"]
) -> Float[Tensor, "columns columns"]:
    """Ã, sparse, of columns as they stand in the weight; U has them in their order."""
    moves = (factor / factor.diagonal()).square()
    strength = torch.empty_like(moves)
    strength[order[:, None], order] = moves + moves.T
    strength.fill_diagonal_(0.0)
    count = len(strength)
    strongest = strength.topk(min(NEIGHBOURS, count)).indices
    kept = torch.zeros_like(strength, dtype=torch.bool).scatter_(1, strongest, True)
    strength = torch.where(kept | kept.T, strength, 0.0).fill_diagonal_(1.0)
    degree = strength.sum(1).rsqrt()
    places = strength.nonzero().T
    values = strength[places[0], places[1]] * degree[places[0]] * degree[places[1]]
    return torch.sparse_coo_tensor(places, values, (count, count), is_coalesced=True, check_invariants=False)


def _centred(values: Float[Tensor, " columns"]) -> Float[Tensor, " columns"]:
    """Logarithms less their mean; zeros, where there is nothing but zeros."""
    largest = values.max()
    logs = (values / largest if largest > 0 else torch.ones_like(values)).clamp(min=FLOOR).log()
    return logs - logs.mean()


Weights = Mapping[str, Tensor]
"""W₁ b₁ W₂ b₂ W₃ b₃, float64, by the names w1 b1 and so on."""


def logits(
    network: Weights, graph: ColumnGraph, bits: Float[Tensor, " widths"], mean: float
) -> Float[Tensor, "columns widths"]:
    """For each column and width, where the mean width is to be this one."""
    asked = graph.features.new_full((len(graph.features), 1), mean)
    first = functional.relu(torch.cat([graph.features, asked], 1) @ network["w1"] + network["b1"])
    mixed = first @ network["w2"]
    second = functional.relu((mixed if graph.reach is None else torch.sparse.mm(graph.reach, mixed)) + network["b2"])
    off = second @ network["w3"] + network["b3"]
    return -SHARPNESS * (bits - mean - off).square()


def train(graphs: Sequence[ColumnGraph], widths: Sequence[int], steps: int, seed: int) -> dict[str, Tensor]:
    """The network that all of these linears teach.  Raises NumericalError where it is not finite."""
    generator = torch.Generator().manual_seed(seed)
    device = graphs[0].costs.device
    network = _drawn(graphs[0].features.shape[1] + 1, generator, device)
    optimizer = torch.optim.Adam(list(network.values()), lr=RATE)
    bits = torch.tensor(widths, dtype=torch.float64, device=device)
    waiting: list[int] = []
    for step in range(steps):
        share = step / steps
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * share)) / 2
        terms: list[Tensor] = []
        nodes = 0
        while not terms or nodes < NODES:
            waiting = waiting or torch.randperm(len(graphs), generator=generator).tolist()
            if terms and nodes + len(graphs[waiting[-1]].costs) > NODES:
                break
            graph = graphs[waiting.pop()]
            nodes += len(graph.costs)
            drawn = torch.rand((), generator=generator, dtype=torch.float64).item()
            mean = widths[0] + (widths[-1] - widths[0]) * drawn
            terms.append(_loss(network, graph, bits, mean, PENALTY * min(share / RISE, 1.0)))
            if len(terms) >= len(graphs):
                break
        with torch.enable_grad():
            loss = torch.stack(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = {name: tensor.detach() for name, tensor in network.items()}
    if not all(torch.isfinite(tensor).all() for tensor in trained.values()):
        raise NumericalError("the graph network diverged while it learned the widths of columns")
    return trained


@torch.enable_grad()
def _loss(network: Weights, graph: ColumnGraph, bits: Tensor, mean: float, penalty: float) -> Tensor:
    chances = logits(network, graph, bits, mean).softmax(1)
    choice = functional.one_hot(chances.argmax(1), len(bits)).to(chances)
    choice = choice + chances - chances.detach()
    lost = (choice * graph.costs).sum(1).mean() * 4.0 ** (mean - float(bits[0]))
    return lost + penalty * functional.relu((choice @ bits).mean() - mean).square()


def _drawn(inputs: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """As He and others begin: normal, of variance 2 / inputs; the head begins with nothing, all columns alike."""
    sizes = [(inputs, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)]
    network = {}
    for place, (read, given) in enumerate(sizes, start=1):
        scale = 0.0 if place == len(sizes) else math.sqrt(2 / read)
        values = scale * torch.randn(read, given, generator=generator, dtype=torch.float64)
        network[f"w{place}"] = values.to(device).requires_grad_()
        network[f"b{place}"] = torch.zeros(given, dtype=torch.float64, device=device, requires_grad=True)
    return network

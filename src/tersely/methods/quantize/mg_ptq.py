"""MG-PTQ: a graph network says how many bits each column of a weight gets, GPTQ rounds it.

Below 3 bits the columns of a weight stop being alike: an error in a column that meets loud inputs, and that no later
column can make up for, costs many times that of another.  Here every column has a width of its own, 1 to 4 bits:

1.  H = G + λI = E[x xᵀ] + λI, and U with H⁻¹ = Uᵀ U, columns by falling power (`linalg.hessian`)
2.  e_jk = ‖w_j - Q_k(w_j)‖² / U_jj²: what column j loses at width k, every column by itself
3.  a graph over columns, features of them, and a network of two graph convolutions that says how probable every width
    is, trained once over all linears of the model (`methods.quantize.graph_network`)
4.  the choice with the largest Σ_j log p_j,b(j) among those whose rows take the given bytes (`column_budget`)
5.  the sweep of GPTQ over all columns, each rounded on the grid of its segment: columns of one width, in groups

Columns of a width are put side by side (kind `columns`), so the input is permuted once and every segment is an ordinary
quantized linear.  Of k bits each group has 2^k even levels and a scale; of 1 bit, sign and mean:  ±mean|w|.  With one
width for all this is GPTQ, bit for bit.

Bits are those on disk: codes, scales, zero points and permutation.  Options are means of stored bits per weight, a
quarter of a bit apart, each met from below by less than a byte a row; the budget of the step is divided among linears
by its allocator, `uniform` gives all of them the same mean.  The amount {"row": r, "widths": [...]} is the bytes of a
row without the permutation, r, and the widths it is made of.

`network`: "graph"; "mlp", the same without edges, which shows what the graph is worth; "none" minimises Σ_j e_j,b(j)
itself.  The network is trained on that very sum, so it cannot beat "none" in it: whatever it is good for must be what
the sum leaves out, the disturbance of columns by each other.

Departures, the paper being short on detail: everything about the graph, the features and the training is ours, as said
in `graph_network`; a width is paid for with its metadata; the network is trained for all mean widths at once.  A method
that is asked about one weight alone, outside of a run, trains on that.

Source: Liu et al., Mixed-Precision Graph Neural Quantization for Low Bit Large Language Models, 2025
(arXiv 2501.18154).
Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2022,
section 3 (arXiv 2210.17323), for the sweep.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersely.errors import NumericalError, RecipeError, unknown
from tersely.kinds.columns import ColumnsLinear, order_bytes
from tersely.kinds.quantized import QuantizedLinear
from tersely.linalg.grid import Form, Grid, Scales, fit_grid, group_size, in_groups, wide
from tersely.linalg.hessian import Feedback, feedback, sweep
from tersely.linalg.packing import WIDEST
from tersely.methods.quantize.column_budget import RowBytes, divide, row_bytes
from tersely.methods.quantize.graph_network import TRAINING, ColumnGraph, Weights, column_graph, logits, train
from tersely.methods.quantize.widths import check_grid
from tersely.option import Amount, Option
from tersely.stats import Gram, Statistic, Stats

logger = logging.getLogger(__name__)

Network = Literal["graph", "mlp", "none"]


@dataclass(frozen=True)
class _Seen:
    """A weight in the metric of its inputs."""

    weight: Float[Tensor, "out in"]
    """In float32 or better; zero where the input was silent."""
    gram: Float[Tensor, "in in"]
    spread: Feedback
    costs: Float[Tensor, "in widths"]
    """e_jk, of the weight divided by a power of two."""
    graph: ColumnGraph | None


@dataclass(frozen=True)
class MixedColumns:
    network: Network = "graph"
    """What chooses the widths of columns: "graph", a network over columns and their couplings; "mlp", the same without
    couplings; "none", the least sum of the errors of single columns."""

    widths: tuple[int, ...] = (1, 2, 3, 4)
    """Bits that a column can get, rising."""

    group: int = 128
    """Columns of one width that share a scale, as they follow each other; 0 for all of that width.  Every width begins
    a group of its own, so that small ones are dear where weights are narrow."""

    grid: Form = "asymmetric"
    """Levels of a group: "asymmetric" from its least to its largest weight, with a zero point; "symmetric" around zero;
    "symmetric_full" likewise, using the lowest level and clipping the largest weight by half a step.  Of 1 bit it is
    always plus and minus the mean."""

    shrink: bool = True
    """Search for the range of each group that rounds best, instead of spanning all of it: pays most at 2 bits."""

    spacing: float = 0.25
    """Bits per weight between two options.  Each takes one sweep over the weight where errors are asked for."""

    damping: float = 0.01
    """λ, added to the diagonal of the Gram matrix, as a fraction of the mean input power (no unit)."""

    act_order: bool = True
    """Take the columns by falling power of their inputs, rather than from left to right."""

    steps: int = 200
    """Of the training of the network, over a few linears each."""

    seed: int = 0
    """Of the network's first weights, and of the order of linears."""

    block: int = 128
    """Columns between two products with the rest; changes the time, not the result."""

    paper: ClassVar[str] = (
        "Liu et al., 2025, Mixed-Precision Graph Neural Quantization for Low Bit Large Language Models "
        "(arXiv 2501.18154)"
    )
    summary: ClassVar[str] = "GPTQ with a width for every column, chosen by a graph network"
    leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_grid("mg_ptq", self.group, self.grid, None)
        if self.network not in get_args(Network):
            raise RecipeError(f"mg_ptq: {unknown('network', str(self.network), get_args(Network))}")
        if not self.widths or list(self.widths) != sorted(set(self.widths)):
            raise RecipeError(f"mg_ptq: widths {list(self.widths)}; wanted one or more, rising, each once")
        if not 1 <= self.widths[0] <= self.widths[-1] <= WIDEST:
            raise RecipeError(f"mg_ptq: widths {list(self.widths)}; wanted 1 to {WIDEST} bits")
        if not 0 <= self.damping < math.inf:
            raise RecipeError(f"mg_ptq: damping {self.damping}; wanted 0 or more, a fraction of the mean input power")
        if not 0 < self.spacing < math.inf:
            raise RecipeError(f"mg_ptq: spacing {self.spacing}; wanted above 0 bits, 0.25 is usual")
        if self.steps < 1 or self.block < 1:
            raise RecipeError(f"mg_ptq: steps {self.steps}, block {self.block}; wanted 1 or more of each")
        if not 0 <= self.seed < 2**63:
            raise RecipeError(f"mg_ptq: seed {self.seed}; wanted 0 or more, below 2^63")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram,)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        rows, columns = shape
        budget, order = self._budget(columns), order_bytes(columns)
        least, most = int(budget.even.min()), int(budget.even[-1])
        spacing = Fraction(str(self.spacing))
        mean = spacing * math.ceil(Fraction(8 * (rows * least + order), rows * columns) / spacing)
        found = {least, most}
        while (wanted := (mean * rows * columns / 8 - order) / rows) < most:
            met = budget.met(float(wanted))
            found |= set() if met is None else {met}
            mean += spacing
        return [Option(0, 0, None), *(Option(self._amount(r), rows * r + order, None) for r in sorted(found))]

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are exact, tr((W - W') G (W - W')ᵀ) of the W' that `compress` will make."""
        whole, *sizes = self.sizes((weight.shape[0], weight.shape[1]), weight.element_size())
        seen = self._seen(weight, stats)
        network = None if seen.graph is None else self._network(seen.graph)
        dense = wide(weight).double()
        energy = ((dense @ seen.gram) * dense).sum().item()
        lost = (self._rounded(seen, self._divided(seen, network, size.amount["row"]))[2] for size in sizes)
        return [replace(whole, error=energy), *(replace(size, error=e) for size, e in zip(sizes, lost, strict=True))]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: Amount) -> ColumnsLinear:
        offered = [size.amount for size in self.sizes((weight.shape[0], weight.shape[1]), weight.element_size())]
        if not isinstance(amount, dict) or amount not in offered:
            rows = [option["row"] for option in offered[1:]]
            raise RecipeError(
                f"mg_ptq: amount {amount!r} for a weight of {tuple(weight.shape)}; wanted widths {list(self.widths)} "
                f"in rows of {', '.join(map(str, rows))} bytes"
            )
        seen = self._seen(weight, stats)
        network = None if seen.graph is None else self._network(seen.graph)
        parts, order, _ = self._rounded(seen, self._divided(seen, network, amount["row"]))
        kinds = [QuantizedLinear.from_codes(codes, grid, weight.dtype) for codes, grid in parts]
        return ColumnsLinear.of(kinds, order, weight.dtype)

    # --- what is learned from all linears together, see `steps.learning` ----------------------------------------------

    @property
    def learns(self) -> str:
        return "" if self.network == "none" else TRAINING

    def lesson(self, weight: Float[Tensor, "out in"], stats: Stats) -> ColumnGraph:
        """What the network is shown of one linear."""
        graph = self._seen(weight, stats).graph
        assert graph is not None  # asked only where something is learned
        return graph

    def learned(self, lessons: Sequence[ColumnGraph]) -> dict[str, Any]:
        """The network's weights, in plain values."""
        return {name: tensor.tolist() for name, tensor in self._trained(lessons).items()}

    def taught(self, learned: Mapping[str, Any]) -> "MixedColumns":
        state = {name: torch.tensor(values, dtype=torch.float64) for name, values in learned.items()}
        return TaughtColumns(**{f.name: getattr(self, f.name) for f in fields(self)}, state=state)

    def _network(self, graph: ColumnGraph) -> Weights:
        return self._trained([graph])

    def _trained(self, graphs: Sequence[ColumnGraph]) -> Weights:
        return train(graphs, self.widths, self.steps, self.seed)

    # --- one weight ---------------------------------------------------------------------------------------------------

    def _budget(self, columns: int) -> RowBytes:
        return row_bytes(columns, self.widths, self.group, zeros=self.grid == "asymmetric")

    def _amount(self, row: int) -> dict[str, Any]:
        return {"row": row, "widths": list(self.widths)}

    def _seen(self, weight: Float[Tensor, "out in"], stats: Stats) -> _Seen:
        if not torch.isfinite(weight).all():
            raise NumericalError("the weight has entries that are not finite; repair the checkpoint before compressing")
        gram = stats[Gram].mean()
        if not gram.diagonal().any():  # nothing is known of any input: all count alike
            gram = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        spread = feedback(gram, damping=self.damping, loudest_first=self.act_order)
        if spread.damping > self.damping:
            logger.warning(
                "mg_ptq: a Gram matrix is not positive definite with damping %g; took %g", self.damping, spread.damping
            )
        live = wide(weight).masked_fill(spread.dead, 0.0).contiguous()
        largest = live.abs().max()
        unit = live * 2.0 ** -int(torch.frexp(largest).exponent) if largest > 0 else live
        own = torch.empty_like(spread.own)
        own[spread.order] = spread.own
        costs = torch.stack([self._lost(unit, width) * own.square() for width in self.widths], 1)
        graph = None
        if self.network != "none":
            power = gram.double().diagonal()
            power = torch.where(spread.dead, power[~spread.dead].mean(), power) + spread.added
            graph = column_graph(unit, power, spread, costs, edges=self.network == "graph")
        return _Seen(live, gram, spread, costs, graph)

    def _lost(self, weight: Float[Tensor, "out in"], width: int) -> Float[Tensor, " in"]:
        """‖w_j - Q_k(w_j)‖² of every column, in groups as if all had this width."""
        grid = self._grid(weight, width)
        return (weight - grid.levels(grid.nearest(weight))).double().square().sum(0)

    def _grid(self, weight: Float[Tensor, "out columns"], width: int) -> Grid:
        if width == 1:
            return sign_grid(weight, self.group)
        return fit_grid(weight, width, self.group, self.grid, shrink=self.shrink)

    def _divided(self, seen: _Seen, network: Weights | None, row: int) -> list[int]:
        """The width of every column."""
        budget, judged = self._budget(len(seen.costs)), seen.costs.cpu().numpy()
        costs = judged
        if network is not None and seen.graph is not None:
            bits = torch.tensor(self.widths, dtype=torch.float64, device=seen.costs.device)
            mean = float(bits[divide(judged, budget, row).tolist()].mean())  # what such rows leave for codes
            with torch.no_grad():
                costs = -logits(network, seen.graph, bits, mean).log_softmax(1).cpu().numpy()
        return [self.widths[place] for place in divide(costs, budget, row, judged)]

    def _rounded(
        self, seen: _Seen, widths: Sequence[int]
    ) -> tuple[list[tuple[UInt8[Tensor, "out columns"], Grid]], Tensor, float]:
        """Codes and grid of each segment, the columns in their order, and the error."""
        chosen = torch.tensor(widths, device=seen.weight.device)
        segments = [(chosen == width).nonzero().flatten() for width in sorted(set(widths))]
        parts = [
            _Segment.of(seen.weight, places, self._grid(seen.weight[:, places].contiguous(), width))
            for places, width in zip(segments, sorted(set(widths)), strict=True)
        ]
        home = {column: (part, at) for part, places in zip(parts, segments, strict=True)
                for at, column in enumerate(places.tolist())}  # fmt: skip
        columns = seen.spread.order.tolist()

        def decide(place: int, left: Tensor) -> Tensor:
            part, at = home[columns[place]]
            return part.rounded(at, left[0])

        sweep(seen.weight, seen.spread, decide, block=self.block)
        order = torch.cat(segments)
        made = [(part.codes.T.contiguous(), part.grid) for part in parts]
        off = seen.weight.to(torch.float64, copy=True)
        off[:, order] -= torch.cat([grid.levels(codes) for codes, grid in made], 1)
        # not from the errors of the sweep, where a silent input counts: at 1 bit its weights cannot be zero
        lost = ((off @ seen.gram) * off).sum().item()
        if not math.isfinite(lost):
            raise NumericalError("mg_ptq: the error feedback diverged; give a larger damping")
        return made, order, lost


@dataclass(frozen=True, eq=False)
class TaughtColumns(MixedColumns):
    """With a network that has seen all linears."""

    state: Weights = field(default_factory=dict)
    """Its weights."""

    @property
    def learns(self) -> str:
        return ""

    def _network(self, graph: ColumnGraph) -> Weights:
        return {name: tensor.to(graph.features.device) for name, tensor in self.state.items()}


@dataclass(frozen=True)
class _Segment:
    """Columns of one width while they are rounded."""

    grid: Grid
    scales: Float[Tensor, "groups out"]
    zeros: Float[Tensor, "groups out"]
    codes: UInt8[Tensor, "columns out"]
    size: int
    """Columns of a group."""

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"], places: Tensor, grid: Grid) -> Self:
        scales = grid.scales.values().to(weight.dtype).T.contiguous()
        zeros = grid.zeros(weight.dtype).T.contiguous()
        codes = torch.empty(len(places), len(weight), dtype=torch.uint8, device=weight.device)
        return cls(grid, scales, zeros, codes, group_size(len(places), grid.group))

    def rounded(self, column: int, values: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """The levels nearest to a column; their codes are kept."""
        scale, zero = self.scales[column // self.size], self.zeros[column // self.size]
        code = self.grid.codes(values, scale, zero)
        self.codes[column] = code
        return self.grid.placed(code, values.dtype).sub(zero).mul_(scale)


def sign_grid(weight: Float[Tensor, "rows columns"], group: int) -> Grid:
    """±mean|w| of each group: of two levels around zero the best.  A group of zeros stays zero."""
    groups = in_groups(wide(weight), group).abs()
    inside = in_groups(torch.ones_like(weight[:1], dtype=groups.dtype), group)
    mean = groups.sum(-1) / inside.sum(-1)
    scales = Scales.of(mean)
    return Grid(1, group, replace(scales, raw=scales.raw.masked_fill(mean == 0, 0)), None, "sign")

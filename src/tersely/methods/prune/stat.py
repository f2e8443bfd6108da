"""Remove neurons and heads that the others can speak for, and let the others speak for them.

Let z be what the last linear W of a unit reads: the neurons of an MLP, the context vectors of the heads.  A pivoted QR
of the activations keeps the elements J whose outputs span those of the rest (see `linalg.interpolative`), z ≈ Tᵀ z_J,
and the coefficients are folded into the weight that follows:

    W ← W Tᵀ = W_J + W_rest T_restᵀ,        all that makes elements of the rest is dropped.

No gradient, no training; the model keeps its architecture, only narrower.  W Tᵀ is the least-squares solution: nothing
else put behind the kept elements comes nearer to the dense output.

Errors are E‖W(z - Tᵀ z_J)‖², those of the layer's output, exact for every size at once.  For heads that is the authors'
own curve.  For neurons theirs is ‖R₂₂‖ in units scaled by ‖W[:, j]‖, the sum over dropped neurons of what each alone
would cost; it leaves out that dropped neurons add up or cancel in the output, and it cannot be compared with the error
of a method that works otherwise.

Departures from the authors' code: theirs factorises a sketch of the activations, ours the Gram matrix of all of them,
which gives the same pivots and coefficients.  Theirs stores kept heads in the order in which they were chosen, ours in
the order of the model, which is the same function.  Theirs divides by column norms, ours never does.  Theirs chooses
heads by comparing coordinate i of one head with coordinate i of another, although a rotation inside a head (v and o
absorb it) changes no output; ``selection = "pivot"`` does so, while "energy" takes the head whose part that the kept
ones cannot express sends most into the output.  For neurons, which have one coordinate, both are the authors' weighted
pivots.  With grouped queries a key/value head goes together with its query heads.

Lost for good is what the kept elements do not span.  What is expressed by coefficients fitted to few tokens may not
hold on other text: `ridge` keeps them small.

Source: Flynn et al., STAT: Shrinking Transformers After Training, 2024 (arXiv 2406.00061); for coefficients from QR
also Chee et al., Model Preserving Compression for Neural Networks, NeurIPS 2022.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.anatomy import Unit
from tersely.errors import NumericalError, RecipeError
from tersely.kinds import Kind
from tersely.linalg.interpolative import Interpolation, cholesky_by_energy, cholesky_in_order, pivoted_cholesky
from tersely.methods.prune import Coupling, coupling_of
from tersely.option import Amount, Option
from tersely.stats import Gram, Statistic, Stats

logger = logging.getLogger(__name__)

WORST_CONDITION = 1e6
"""Of the kept activations; beyond it coefficients may grow so large that a weight in float32 cannot hold them."""


@dataclass(frozen=True)
class InterpolativePruning:
    selection: Literal["energy", "pivot"] = "energy"
    """How heads are chosen: by the output energy that the kept ones cannot express, or by the paper's pivots, which
    depend on the basis inside each head.  Neurons are the same under both."""

    ridge: float = 0.0
    """Added to the power of every channel, as a fraction of that power (no unit); 0 is the paper's.  Worth 0.01 to 0.1
    where there are hardly more calibration tokens than channels, and nothing where there are many."""

    paper: ClassVar[str] = "Flynn et al., 2024, STAT: Shrinking Transformers After Training (arXiv 2406.00061)"
    summary: ClassVar[str] = "removes neurons and heads, folds what the others can say for them into the next weight"
    roles: ClassVar[tuple[str, ...]] = ("attention", "mlp")

    def __post_init__(self) -> None:
        if self.selection not in ("energy", "pivot"):
            raise RecipeError(f"stat: selection {self.selection!r}; wanted 'energy' or 'pivot'")
        if not 0 <= self.ridge < math.inf:
            raise RecipeError(f"stat: ridge {self.ridge}; wanted 0 or more, a fraction of each channel's power")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram,)

    def check(self, unit: Unit) -> None:
        coupling_of(unit)

    def sizes(self, unit: Unit, itemsize: int) -> Sequence[Option]:
        """An amount is the number of neurons, or of key/value heads, to keep."""
        return coupling_of(unit).sizes(itemsize)

    def options(self, unit: Unit, weights: Mapping[str, Tensor], stats: Mapping[str, Stats]) -> Sequence[Option]:
        """Errors are exact without ridge; with it they are upper bounds, by ridge · Σⱼ power_j ‖(W - W')_j‖²."""
        coupling = coupling_of(unit)
        last = weights[coupling.last]
        errors = self._interpolation(coupling, last, stats).left_over(last)[:: coupling.width]
        return coupling.priced(errors.tolist(), last.element_size())

    def compress(
        self,
        unit: Unit,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        stats: Mapping[str, Stats],
        amount: Amount,
    ) -> dict[str, Kind]:
        coupling = coupling_of(unit)
        count = coupling.checked(amount) * coupling.width
        for role, weight in weights.items():
            if not torch.isfinite(weight).all():
                raise NumericalError(f"{unit.name}: {role} has entries that are not finite; repair the checkpoint")
        last = weights[coupling.last].double()
        found = self._interpolation(coupling, last, stats)
        columns, others = found.kept(count), found.order[count:]
        coefficients = found.coefficients(count)[:, others]
        condition = found.condition(count)
        if condition > WORST_CONDITION:
            logger.warning(
                "%s: the activations of the %s elements kept have condition %.1e, the largest coefficient is %.1e; "
                "keep fewer, or set a ridge",
                unit.name, amount, condition, coefficients.abs().max() if len(others) else 0.0,
            )  # fmt: skip
        folded = last[:, columns] + last[:, others] @ coefficients.T
        return coupling.narrow(weights, biases, columns[:: coupling.width] // coupling.width, folded)

    def _interpolation(
        self, coupling: Coupling, last: Float[Tensor, "out n"], stats: Mapping[str, Stats]
    ) -> Interpolation:
        if not torch.isfinite(last).all():
            raise NumericalError(
                f"{coupling.name}: {coupling.last} has entries that are not finite; repair the checkpoint"
            )
        gram = stats[coupling.last][Gram].mean()
        if not gram.any():  # nothing was observed: every channel counts alike
            gram = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        gram.diagonal().mul_(1 + self.ridge)  # of the fresh tensor that `mean` made
        if coupling.last == "down":
            return pivoted_cholesky(gram, last.double().norm(dim=0))
        if self.selection == "energy":
            return cholesky_by_energy(gram, coupling.width, last)
        # one column per element: its coordinates over all tokens, one below the other
        shape = (coupling.count, coupling.width, coupling.count, coupling.width)
        stacked = gram.reshape(shape).diagonal(dim1=1, dim2=3).sum(-1)
        return cholesky_in_order(gram, coupling.width, pivoted_cholesky(stacked).order)

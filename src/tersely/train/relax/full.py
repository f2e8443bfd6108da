"""The linear's own weight trains: ordinary fine-tuning of chosen linears.

The numbers are held in float32 or better and cast to the dtype of the input in every forward pass: steps of Adam are
smaller than a bfloat16 can resolve.  It hardens into what stood there before, rounded once to the old dtype.

Members of a shared factor (`kinds.shared`) compute with numbers of one another.  In a model below float32 these would
be of two dtypes while some of them train, so there they are refused.

Source: Howard and Ruder, Universal Language Model Fine-tuning for Text Classification, 2018 (arXiv 1801.06146).
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tersely.errors import RecipeError
from tersely.kinds import LinearKind, SharedLinear
from tersely.stats import Statistic, Stats
from tersely.train.relax.adapter import learns_no_size, master, shape_of
from tersely.train.relax.base import Relaxed


@dataclass(frozen=True)
class Full:
    paper: ClassVar[str] = (
        "Howard and Ruder, 2018, Universal Language Model Fine-tuning for Text Classification (arXiv 1801.06146)"
    )
    summary: ClassVar[str] = "all numbers of the linears train"

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return ()

    @property
    def leaves(self) -> tuple[str, ...] | None:
        return None

    def check(
        self, shapes: Sequence[tuple[int, int]], kinds: Sequence[tuple[int, int]], packed: int, bits: float | None
    ) -> None:
        learns_no_size("full", bits)
        if packed:
            raise RecipeError(f"full: the numbers of {packed} targets are packed; train an adapter beside them")

    def relax(self, linear: nn.Module, stats: Stats, generator: torch.Generator) -> "FullyTrained":
        shape_of(linear)  # refuses what is no linear
        # whole numbers may stand beside: those of pivoted factors are places
        dtypes = {tensor.dtype for tensor in linear.state_dict().values() if tensor.is_floating_point()}
        packed = any(isinstance(part, LinearKind) and part.packed for part in linear.modules())
        if packed or len(dtypes) != 1:
            raise RecipeError(f"full: the numbers of a {type(linear).__name__} are packed; train an adapter beside it")
        (dtype,) = dtypes
        if any(isinstance(part, SharedLinear) for part in linear.modules()):
            refuse_shared(dtype)
        return FullyTrained(linear, dtype)

    def budget(self, modules: Sequence[Relaxed], bits: float | None) -> Tensor:
        return modules[0].bits().new_zeros(())


def refuse_shared(dtype: torch.dtype) -> None:
    """Raises RecipeError for members of a shared factor whose numbers would train in another dtype than they have."""
    if dtype.itemsize < 4:
        raise RecipeError(
            f"full: a factor is shared with other linears, which compute with it in {dtype}, and it would train in "
            'float32; set dtype = "float32", or train an adapter'
        )


class FullyTrained(Relaxed):
    """The linear, computing with numbers that train in float32 or better."""

    def __init__(self, linear: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self.linear = deepcopy(linear).to(master(linear).dtype)

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.linear, {name: p.to(x) for name, p in self.linear.named_parameters()}, (x,))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"weights": list(self.linear.parameters())}

    def harden(self) -> nn.Module:
        return deepcopy(self.linear).to(self._dtype)

    def bits(self) -> Tensor:
        counted = [t for name, t in self.linear.state_dict().items() if not name.endswith("bias")]
        sizes = (t.numel() * (self._dtype if t.is_floating_point() else t.dtype).itemsize for t in counted)
        return torch.tensor(8.0 * sum(sizes), device=counted[0].device)

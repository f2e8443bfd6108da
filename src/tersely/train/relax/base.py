"""The contract of a relaxation: a weight that pretends to be something else while it trains.

A relaxation is a frozen dataclass of hyperparameters.  `relax` puts a module of its own in the place of a linear; that
module trains by gradient descent, and `harden` turns it into what a checkpoint can hold: the same kinds that methods
without training produce, or a plain linear of the old shape.  What hardens says nothing of how it was trained.

The loop (`tersely.train.loop`) minimises  objectives + Σ penalty / modules + budget,  over the parameters that `groups`
names; every other parameter of the model is frozen.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from tersely.stats import Statistic, Stats

GROUPS = ("weights", "adapters", "quantizers")
"""What may train: the linear's own numbers, an update beside them, step sizes and widths.  Each may have a rate of its
own."""


class Relaxed(nn.Module, ABC):
    """What stands in the place of a linear while it trains."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """A name of GROUPS → the parameters that train under it.  Every other parameter is frozen."""

    @abstractmethod
    def harden(self) -> nn.Module:
        """A kind, or a plain linear (`nn.Linear`, `Conv1D`) of the old shape and dtype, on the same device.  The
        relaxed module stays as it is."""

    @abstractmethod
    def bits(self) -> Tensor:
        """Bits that the weights of what `harden` would give are stored in, bias not counted; a scalar, differentiable
        where they are learned."""

    def towards(self, weight: Tensor) -> None:
        """Told before training, where it is known, the dense weight ``[out, in]`` that the linear stood for in the
        model before any step; a relaxation may begin as near to it as it can."""

    def advance(self, done: float) -> None:
        """Told before every step how much of the training is over, 0 to 1, and 1 at its end; for phases and schedules.
        May be called with any value at any time: a resumed run begins in the middle."""

    def penalty(self) -> Tensor:
        """The regulariser of this module, a scalar; zero where there is none.  The loop adds the mean over modules."""
        return torch.zeros((), device=next(self.parameters()).device)


class Relaxation(Protocol):
    paper: ClassVar[str]
    """Authors, year, title, identifier."""

    summary: ClassVar[str]
    """One line for listings."""

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """The statistics of the linear's input that `relax` reads; empty where it reads none."""

    @property
    def leaves(self) -> tuple[str, ...] | None:
        """Children of what `harden` gives that are linears again, for later steps; None where the linears that were
        there stay."""

    def check(
        self, shapes: Sequence[tuple[int, int]], kinds: Sequence[tuple[int, int]], packed: int, bits: float | None
    ) -> None:
        """Raises RecipeError for what no training could do, before any is begun.

        shapes: (out, in) of the targets that are plain linears; kinds: of those that are something else by now, as they
        were before the first step (none has become wider); packed: how many of the latter hold codes and no linear;
        bits: the average that is asked for."""

    def relax(self, linear: nn.Module, stats: Stats, generator: torch.Generator) -> Relaxed:
        """The module that stands in for `linear`, which is an `nn.Linear`, a `Conv1D` of transformers, or a linear
        kind.  It may hold `linear` itself, whose numbers it must not change.

        All random numbers come from `generator`.  The module may keep it and draw from it in `forward` while training:
        the loop seeds it anew at every step, from the seed of the run and the number of the step, so that a resumed run
        draws what an unbroken one would have drawn.

        Raises RecipeError where this relaxation cannot treat such a linear."""

    def budget(self, modules: Sequence[Relaxed], bits: float | None) -> Tensor:
        """A scalar: the price of missing `bits` on average per weight over all modules (`Relaxed.bits`); zero where
        the relaxation learns no size."""

"""The contract of a rewrite.

A rewrite changes the weights of a model and not the function it computes: in exact arithmetic all logits stay what they
were, and the result is an ordinary model of the same family.  It is done for what comes next, when numbers are easier
to round or to cut after it than before.

A rewrite is a frozen dataclass of hyperparameters, seeds among them, with pure functions from tensors to tensors.  The
runner goes through the model once: first what is outside the blocks, then block by block, so that never more than one
block has to be in memory.  Each function returns only the tensors that change, under their full names.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from tersely.anatomy import Anatomy
from tersely.stats import Statistic, Stats

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Rewrite(Protocol):
    paper: ClassVar[str]
    """Authors, year, title, identifier."""

    summary: ClassVar[str]
    """One line for listings."""

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """The statistics of the inputs that `block` reads; empty for a rewrite that needs no data."""

    def check(self, anatomy: Anatomy, config: "PreTrainedConfig") -> None:
        """Raises AnatomyError with the reason where the rewrite does not apply to the model."""

    def left_alone(self, anatomy: Anatomy) -> dict[str, str]:
        """What it could change and does not: path → reason, for the report."""

    def settings(self, anatomy: Anatomy) -> dict[str, Any]:
        """What has to change in the configuration, such as ``{"tie_word_embeddings": False}``."""

    def outside(self, anatomy: Anatomy, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New values of tensors outside the blocks, in the dtype they had.  `state`: full name → tensor, each tied
        tensor under its first name only.  A name that was tied before comes back as a tensor of its own."""

    def block(
        self, anatomy: Anatomy, index: int, state: Mapping[str, Tensor], stats: Mapping[str, Stats]
    ) -> dict[str, Tensor]:
        """New values of tensors of one block, in the dtype they had.  `state`: full name → tensor, at least of this
        block; `stats`: key of an input (`Site.reads`) → its statistics."""

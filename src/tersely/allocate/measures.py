"""What only the model can tell an allocator."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Measures:
    """What only the model tells.  A field is empty where nobody measured it, and what is known without the model
    stands in for it: before a run, when a budget is checked.  A run measures what its allocator asks for."""

    similarity: Mapping[str, float] = field(default_factory=dict)
    """Site → mean cosine of what its block is given and what it returns."""
    harm: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Site → bytes of an option → nats that the model loses when this is done to the site and to nothing else."""
    learned: Mapping[str, float] = field(default_factory=dict)
    """Site → bytes that gradient descent on the whole model gave it, for one budget."""
    spikes: Mapping[str, float] = field(default_factory=dict)
    """Site → its largest number over the usual one, of what it reads or of its weight; see `allocate.spikes`."""


UNMEASURED = Measures()

Measured = Literal["similarity", "spikes", "kl", "loss"]
"""`Measures.similarity`; `Measures.spikes`; or `Measures.harm`, as divergence from the dense model or as rise of the
mean loss."""

Learned = Literal["gates", "truncation"]
"""`Measures.learned`, with gates in the method's factors or on truncated outputs."""

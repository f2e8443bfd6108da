"""What methods offer and allocators choose from."""

from dataclasses import dataclass
from typing import Any

Amount = Any
"""A plain JSON value that only the method reads: a rank, a width in bits, {"rank": 8, "bits": 4}, kept channels.  0 is
nothing at all; None leaves the site dense."""


@dataclass(frozen=True)
class Option:
    """One thing a method could do to a site.

    nbytes: bytes of the site's weight afterwards, bias not counted (of a cache: bytes per token).
    error: predicted mean squared output error per token, in the method's own metric; None where it was not asked for.
    drift: predicted change of the model's loss, first order in what is removed, in nats per token and signed; None
    where a method predicts none.
    """

    amount: Amount
    nbytes: int
    error: float | None
    drift: float | None = None

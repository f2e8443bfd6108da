"""What methods offer and allocators choose from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One thing a method could do to a site.

    amount: rank (later: bits, kept channels); None leaves the site dense.
    nbytes: bytes of the site's weight afterwards, bias not counted.
    error: predicted mean squared output error per token, in the method's own metric; None where it was not asked for.
    """

    amount: int | None
    nbytes: int
    error: float | None

"""The methods, by their names in recipes."""

from tersely.methods.base import Method
from tersely.methods.low_rank.asvd import ChannelScaledSVD
from tersely.methods.low_rank.svd import PlainSVD
from tersely.methods.low_rank.svd_llm import WhitenedSVD

METHODS: dict[str, type[Method]] = {
    "asvd": ChannelScaledSVD,
    "svd": PlainSVD,
    "svd_llm": WhitenedSVD,
}

__all__ = ["METHODS", "Method"]

"""The methods, by their names in recipes."""

from tersely.methods.base import Method, UnitMethod
from tersely.methods.delta.delta_come import DeltaCoMe
from tersely.methods.low_rank.aa_svd import AnchoredSVD
from tersely.methods.low_rank.asvd import ChannelScaledSVD
from tersely.methods.low_rank.svd import PlainSVD
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.methods.mixed import Mixed
from tersely.methods.prune.stat import InterpolativePruning
from tersely.methods.quantize.gptq import GPTQ
from tersely.methods.quantize.rtn import RoundToNearest

METHODS: dict[str, type[Method]] = {
    "aa_svd": AnchoredSVD,
    "asvd": ChannelScaledSVD,
    "delta_come": DeltaCoMe,
    "gptq": GPTQ,
    "mixed": Mixed,
    "rtn": RoundToNearest,
    "svd": PlainSVD,
    "svd_llm": WhitenedSVD,
}
"""Methods that see one linear."""

UNIT_METHODS: dict[str, type[UnitMethod]] = {
    "stat": InterpolativePruning,
}
"""Methods that see the linears of an attention or an MLP together."""

__all__ = ["METHODS", "UNIT_METHODS", "Method", "UnitMethod"]

"""The methods, by their names in recipes."""

from tersely.methods.base import Method, RebuildsAttention, UnitMethod
from tersely.methods.delta.delta_come import DeltaCoMe
from tersely.methods.low_rank.aa_svd import AnchoredSVD
from tersely.methods.low_rank.adasvd import AdaSVD
from tersely.methods.low_rank.asvd import ChannelScaledSVD
from tersely.methods.low_rank.fwsvd import FisherWeightedSVD
from tersely.methods.low_rank.kfac_svd import TwoSidedSVD
from tersely.methods.low_rank.nsvd import NSVD
from tersely.methods.low_rank.svd import PlainSVD
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.methods.mixed import Mixed
from tersely.methods.prune.modegpt import ModularDecomposition
from tersely.methods.prune.stat import InterpolativePruning
from tersely.methods.quantize.gptq import GPTQ
from tersely.methods.quantize.rtn import RoundToNearest

METHODS: dict[str, type[Method]] = {
    "aa_svd": AnchoredSVD,
    "adasvd": AdaSVD,
    "asvd": ChannelScaledSVD,
    "delta_come": DeltaCoMe,
    "fwsvd": FisherWeightedSVD,
    "gptq": GPTQ,
    "kfac_svd": TwoSidedSVD,
    "mixed": Mixed,
    "nsvd": NSVD,
    "rtn": RoundToNearest,
    "svd": PlainSVD,
    "svd_llm": WhitenedSVD,
}
"""Methods that see one linear."""

UNIT_METHODS: dict[str, type[UnitMethod]] = {
    "modegpt": ModularDecomposition,
    "stat": InterpolativePruning,
}
"""Methods that see the linears of an attention or an MLP together."""

__all__ = ["METHODS", "UNIT_METHODS", "Method", "RebuildsAttention", "UnitMethod"]

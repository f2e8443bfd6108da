"""The methods, by their names in recipes."""

from tersely.methods.base import FormsUnits, Method, RebuildsAttention, UnitMethod
from tersely.methods.delta.delta_come import DeltaCoMe
from tersely.methods.low_rank.aa_svd import AnchoredSVD
from tersely.methods.low_rank.adasvd import AdaSVD
from tersely.methods.low_rank.anchored_kfac import AnchoredTwoSidedSVD
from tersely.methods.low_rank.asvd import ChannelScaledSVD
from tersely.methods.low_rank.basis_sharing import BasisSharing
from tersely.methods.low_rank.dobi import DobiSVD
from tersely.methods.low_rank.fwsvd import FisherWeightedSVD
from tersely.methods.low_rank.joint import JointRank
from tersely.methods.low_rank.kfac_svd import TwoSidedSVD
from tersely.methods.low_rank.nsvd import NSVD
from tersely.methods.low_rank.svd import PlainSVD
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.methods.low_rank.zs_svd import ZeroSumSVD
from tersely.methods.mixed import Mixed
from tersely.methods.prune.modegpt import ModularDecomposition
from tersely.methods.prune.stat import InterpolativePruning
from tersely.methods.quantize.gptq import GPTQ
from tersely.methods.quantize.rtn import RoundToNearest

METHODS: dict[str, type[Method]] = {
    "aa_svd": AnchoredSVD,
    "adasvd": AdaSVD,
    "anchored_kfac": AnchoredTwoSidedSVD,
    "asvd": ChannelScaledSVD,
    "delta_come": DeltaCoMe,
    "dobi": DobiSVD,
    "fwsvd": FisherWeightedSVD,
    "gptq": GPTQ,
    "kfac_svd": TwoSidedSVD,
    "mixed": Mixed,
    "nsvd": NSVD,
    "rtn": RoundToNearest,
    "svd": PlainSVD,
    "svd_llm": WhitenedSVD,
    "zs_svd": ZeroSumSVD,
}
"""Methods that see one linear."""

UNIT_METHODS: dict[str, type[UnitMethod]] = {
    "basis_sharing": BasisSharing,
    "joint_rank": JointRank,
    "modegpt": ModularDecomposition,
    "stat": InterpolativePruning,
}
"""Methods that see several linears together: those of an attention or an MLP, or those that read alike."""

__all__ = ["METHODS", "UNIT_METHODS", "FormsUnits", "Method", "RebuildsAttention", "UnitMethod"]

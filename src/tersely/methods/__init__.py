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
from tersely.methods.quantize.aqlm import AQLM
from tersely.methods.quantize.awq import ActivationAware
from tersely.methods.quantize.finequant import FineQuant
from tersely.methods.quantize.gptq import GPTQ
from tersely.methods.quantize.gwq import GradientAware
from tersely.methods.quantize.hqq import HalfQuadratic
from tersely.methods.quantize.mg_ptq import MixedColumns
from tersely.methods.quantize.mxfp4 import MXFP4
from tersely.methods.quantize.nf4 import NormalFloat
from tersely.methods.quantize.qera import QERA
from tersely.methods.quantize.rtn import RoundToNearest
from tersely.methods.quantize.sinq import SinkhornNormalized
from tersely.methods.quantize.spike_aware import SpikeAware
from tersely.methods.quantize.spqr import SpQR

METHODS: dict[str, type[Method]] = {
    "aa_svd": AnchoredSVD,
    "adasvd": AdaSVD,
    "anchored_kfac": AnchoredTwoSidedSVD,
    "aqlm": AQLM,
    "asvd": ChannelScaledSVD,
    "awq": ActivationAware,
    "delta_come": DeltaCoMe,
    "dobi": DobiSVD,
    "finequant": FineQuant,
    "fwsvd": FisherWeightedSVD,
    "gptq": GPTQ,
    "gwq": GradientAware,
    "hqq": HalfQuadratic,
    "kfac_svd": TwoSidedSVD,
    "mg_ptq": MixedColumns,
    "mixed": Mixed,
    "mxfp4": MXFP4,
    "nf4": NormalFloat,
    "nsvd": NSVD,
    "qera": QERA,
    "rtn": RoundToNearest,
    "sinq": SinkhornNormalized,
    "spike_aware": SpikeAware,
    "spqr": SpQR,
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

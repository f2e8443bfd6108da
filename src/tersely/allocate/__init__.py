"""Who gets how many bytes.

An allocator sees one curve per site (what each amount costs and what error it leaves) and a budget in bytes; it returns
a plan.  Ranks, bits and channels compete on the one scale of bytes, and every curve ends with the option to leave the
site dense, so that no factorisation larger than what it replaces can ever be chosen.  What only the model can tell, an
allocator declares, and the runner measures it.
"""

from tersely.allocate.balance import zero_sum
from tersely.allocate.base import POINTS, Allocator, Choice, Curve, Plan, Spectrum, curve_of
from tersely.allocate.learned import consensus, learned
from tersely.allocate.measures import UNMEASURED, Learned, Measured, Measures
from tersely.allocate.optimum import STATES, greedy, knapsack, lems, lems_probe, total
from tersely.allocate.search import ratio_probes, sensitivity
from tersely.allocate.shares import block_influence, effective_rank, importance, svd_llm_v2, uniform
from tersely.allocate.spikes import spikes

ALLOCATORS: dict[str, Allocator] = {
    "block_influence": Allocator(
        block_influence,
        False,
        "blocks that change little of what they are given lose more, by a softmax (MoDeGPT)",
        "Lin et al., 2024, MoDeGPT: Modular Decomposition (arXiv 2408.09632)",
        measures="similarity",
    ),
    "consensus": Allocator(
        consensus,
        True,
        "halfway between what lems measures and what gates learns",
        measures="kl",
        probes=lems_probe,
        learns="gates",
    ),
    "dobi": Allocator(
        learned,
        False,
        "ranks learned by gradient descent through truncated outputs (Dobi-SVD)",
        "Wang et al., 2025, Dobi-SVD: Differentiable SVD for LLM Compression (arXiv 2502.02723)",
        learns="truncation",
    ),
    "effective_rank": Allocator(
        effective_rank,
        True,
        "ranks grow with the root of a site's effective rank over the bytes of a rank (D-Rank)",
        "Mi et al., 2025, Layer-wise dynamic rank for compressing large language models (arXiv 2509.25622)",
    ),
    "gates": Allocator(
        learned,
        True,
        "ranks learned by gradient descent through gates in the method's own factors",
        "Wang et al., 2025, Dobi-SVD: Differentiable SVD for LLM Compression (arXiv 2502.02723)",
        learns="gates",
    ),
    "greedy": Allocator(
        greedy, True, "bytes go where they avoid most of the predicted output error that can be avoided"
    ),
    "importance": Allocator(
        importance,
        False,
        "blocks that change most of what they are given keep more (AdaSVD's adaCR)",
        "Li et al., 2025, AdaSVD: Adaptive Singular Value Decomposition for Large Language Models (arXiv 2502.01403)",
        measures="similarity",
    ),
    "knapsack": Allocator(
        knapsack,
        True,
        "the least predicted output error of all divisions, proven; as greedy counts it",
        "Pisinger, 1995, A minimal algorithm for the multiple-choice knapsack problem",
    ),
    "lems": Allocator(
        lems,
        True,
        "as knapsack; a site counts by the divergence that the model was measured to suffer through it",
        "Thoma et al., 2026, Advancing SVD-based LLM Compression via Layer-Wise Error Model Search (ICML)",
        measures="kl",
        probes=lems_probe,
    ),
    "sensitivity": Allocator(
        sensitivity,
        True,
        "what was measured to raise the model's loss least goes first (ASVD's STRS)",
        "Yuan et al., 2023, ASVD: Activation-aware Singular Value Decomposition (arXiv 2312.05821)",
        measures="loss",
        probes=ratio_probes,
    ),
    "spikes": Allocator(
        spikes,
        False,
        "what spikes stays dense, as far as the budget goes; all else takes its smallest form",
        "Maisonnave et al., 2025, Precision Where It Matters: A Novel Spike Aware Mixed-Precision Quantization "
        "Strategy (arXiv 2504.21553)",
        measures="spikes",
    ),
    "svd_llm_v2": Allocator(
        svd_llm_v2,
        True,
        "the same share for every role; within it, sites that lose more there keep more (SVD-LLM V2)",
        "Wang et al., 2025, SVD-LLM V2: Optimizing Singular Value Truncation (arXiv 2503.12340)",
    ),
    "total": Allocator(
        total,
        True,
        "the least plain sum of predicted errors, for methods that predict losses (kfac_svd, fwsvd)",
        "Pisinger, 1995, A minimal algorithm for the multiple-choice knapsack problem",
    ),
    "uniform": Allocator(uniform, False, "the same share of bytes for every site"),
    "zero_sum": Allocator(
        zero_sum,
        True,
        "components go so that predicted rises and falls of the loss cancel (ZS-SVD); for zs_svd",
        "Abbasi et al., 2026, Zero Sum SVD: Balancing Loss Sensitivity (arXiv 2602.02848)",
        needs_drift=True,
    ),
}

__all__ = [
    "ALLOCATORS",
    "POINTS",
    "STATES",
    "UNMEASURED",
    "Allocator",
    "Choice",
    "Curve",
    "Learned",
    "Measured",
    "Measures",
    "Plan",
    "Spectrum",
    "block_influence",
    "consensus",
    "curve_of",
    "effective_rank",
    "greedy",
    "importance",
    "knapsack",
    "learned",
    "lems",
    "lems_probe",
    "ratio_probes",
    "sensitivity",
    "spikes",
    "svd_llm_v2",
    "uniform",
    "zero_sum",
]

"""A cache of latents: what k and v are made of, in place of k and v.

With k = up_k (down_k x) and v = up_v (down_v x) of ranks r_k and r_v, a token leaves  down_k x  and  down_v x  behind:
r_k + r_v numbers in place of the widths of all its key and value heads.  Keys are rebuilt and turned to their positions
when they are read (see `kinds.attention`).  Keys and values of a layer are far from full rank where weights are not, so
half the cache costs little where half the weights would be ruinous; the weights of k and v may grow by it.

The truncation is the paper's: input channels are scaled by (mean |x|)^alpha before it.  The other metric, "gram",
truncates in E[x xᵀ] itself, which the paper mentions and does not use.  That is the least possible error in k and v for
a given rank, so never worse by the measure below, and the better choice wherever calibration text resembles the use.

Ranks.  For every total r_k + r_v the two are chosen so that the share of the keys' energy that is lost and the share of
the values' energy that is lost, added up, are least.  Shares, because the plain sum of E‖Δ_k x‖² and E‖Δ_v x‖² does not
know that much of the keys' energy is nothing that queries would tell apart: on a small trained model of perplexity 33,
a quarter of the cache costs 6 with ranks by shares, 10 with even ones and 29 with ranks by the plain sum.  At half the
cache values get 7 ranks in 10.  Shares are measured in G = E[x xᵀ] whatever the metric of the truncation: with
Δ = (I - U_r U_rᵀ) W and columns u_i of U,

    tr(Δ G Δᵀ) = Σ_{i>r} (u_iᵀ W) G (u_iᵀ W)ᵀ .

Departures from the paper: its ranks come from perplexity, measured layer by layer, ours from these errors; its code
only exchanges the linears, so that nothing is saved yet, ours stores the latents.  A bias of k or v is added by `up`,
after the cache.

Source: Yuan et al., ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models, 2023,
section 3.4 (arXiv 2312.05821).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersely.anatomy import Unit
from tersely.errors import AnatomyError, NumericalError, RecipeError
from tersely.kinds import Kind
from tersely.kinds.attention import LINEARS, Attention, AttentionSettings, linear_of
from tersely.methods import Method
from tersely.methods.low_rank.asvd import ChannelScaledSVD
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.option import Amount, Option
from tersely.stats import Gram, Statistic, Stats


@dataclass(frozen=True)
class LatentCache:
    metric: Literal["channels", "gram"] = "channels"
    """In what the truncation is best: scaled input channels (the paper's), or the mean square of the error itself."""

    alpha: float = 0.5
    """Exponent of the channel scale (no unit), 0 to 1; 0.5 is the paper's.  Of the metric "channels" only."""

    paper: ClassVar[str] = "Yuan et al., 2023, ASVD: Activation-aware Singular Value Decomposition (arXiv 2312.05821)"
    summary: ClassVar[str] = "keys and values as low-rank latents in the cache"
    roles: ClassVar[tuple[str, ...]] = ("attention",)

    def __post_init__(self) -> None:
        if self.metric not in ("channels", "gram"):
            raise RecipeError(f"latent: metric {self.metric!r}; wanted 'channels' or 'gram'")
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"latent: alpha {self.alpha}; wanted 0 (plain SVD) to 1")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return tuple(dict.fromkeys((*self._truncation.needs, Gram)))

    @property
    def _truncation(self) -> Method:
        return ChannelScaledSVD(alpha=self.alpha) if self.metric == "channels" else WhitenedSVD()

    def check(self, unit: Unit) -> None:
        if unit.role != "attention" or not LINEARS.keys() <= unit.sites.keys():
            raise AnatomyError(f"{unit.name}: a latent cache needs separate linears for q, k, v and o")

    def sizes(self, unit: Unit, itemsize: int) -> Sequence[Option]:
        """Every total of ranks; `compress` divides it between keys and values."""
        most = _largest(unit, "k") + _largest(unit, "v")
        return [Option(0, 0, None), *(Option(total, total * itemsize, None) for total in range(2, most + 1))]

    def options(self, unit: Unit, weights: Mapping[str, Tensor], stats: Mapping[str, Stats]) -> Sequence[Option]:
        """Every total of ranks at its best division, {"k": rank, "v": rank}; the error is the mean share that is lost
        of keys and values, in the unit of their energy."""
        left = self._left_over(weights, stats)
        energy = sum(of_role[0].item() for of_role in left.values())
        shares = {role: _share(of_role) for role, of_role in left.items()}
        found = [Option(0, 0, energy)]
        for total in range(2, sum(len(share) - 1 for share in shares.values()) + 1):
            amount, lost = _divided(shares["k"], shares["v"], total)
            found.append(Option(amount, total * weights["k"].element_size(), lost / 2 * energy))
        return found

    def compress(
        self,
        unit: Unit,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        stats: Mapping[str, Stats],
        amount: Amount,
        attention: AttentionSettings,
    ) -> dict[str, Kind]:
        if isinstance(amount, int):
            left = self._left_over(weights, stats)
            if not 2 <= amount <= sum(len(of_role) - 1 for of_role in left.values()):
                raise RecipeError(f"{unit.name}: {amount} ranks for keys and values; wanted at least one of each")
            amount, _ = _divided(_share(left["k"]), _share(left["v"]), amount)
        if not isinstance(amount, dict) or amount.keys() != {"k", "v"}:
            raise RecipeError(f"{unit.name}: amount {amount!r} for a latent cache; wanted {{'k': rank, 'v': rank}}")
        linears: dict[str, nn.Module] = {}
        for role in LINEARS:
            if role in amount:
                truncated = self._truncation.compress(weights[role], stats[role], amount[role])
                if role in biases:
                    truncated.set_bias(biases[role])
                linears[role] = truncated
            else:
                linears[role] = linear_of(weights[role], biases.get(role))
        tables = attention.tables().to(weights["q"].device)
        return {"": Attention.of(attention.shape, tables, linears, weights, latent=True)}

    def _left_over(
        self, weights: Mapping[str, Tensor], stats: Mapping[str, Stats]
    ) -> dict[str, Float[Tensor, " ranks"]]:
        """k, v → E‖Δ x‖² at rank 0, 1, …, full."""
        left = {}
        for role in ("k", "v"):
            weight = weights[role]
            whole = self._truncation.compress(weight.double(), stats[role], min(weight.shape))
            # row i of `down` times the norm of column i of `up` is u_iᵀ W
            up, down = whole.get_parameter("up.weight").detach(), whole.get_parameter("down.weight").detach()
            gram = stats[role][Gram].mean()
            if not torch.isfinite(gram).all():
                raise NumericalError(
                    "the input statistic has entries that are not finite; calibrate in float32 or bfloat16"
                )
            energy = ((down @ gram) * down).sum(1) * up.square().sum(0)
            tail = energy.clamp(min=0).flip(0).cumsum(0).flip(0)
            left[role] = torch.cat([tail, tail.new_zeros(1)])
        return left


def _largest(unit: Unit, role: str) -> int:
    return min(unit.sites[role].out_features, unit.sites[role].in_features)


def _share(left: Float[Tensor, " ranks"]) -> Float[Tensor, " ranks"]:
    """Of the energy; nothing is lost where there is none."""
    return left / left[0] if left[0] > 0 else left


def _divided(
    share_k: Float[Tensor, " ranks_k"], share_v: Float[Tensor, " ranks_v"], total: int
) -> tuple[dict[str, int], float]:
    """The best ranks with that sum, at least 1 each, and the sum of the shares that are lost."""
    most_k, most_v = len(share_k) - 1, len(share_v) - 1
    of_k = torch.arange(max(1, total - most_v), min(most_k, total - 1) + 1, device=share_k.device)
    lost = share_k[of_k] + share_v[total - of_k]
    best = int(lost.argmin())
    rank = int(of_k[best])
    return {"k": rank, "v": total - rank}, lost[best].item()

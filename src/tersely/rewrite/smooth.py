"""Large input channels made smaller, and the weights that read them larger, by the same factor.

A few channels of a linear's input are often a hundred times larger than the others, which leaves no room for the others
when the input is rounded to 8 bits; the weights have no such channels.  The difficulty can be shared: for every channel
j of the output of a norm, over all linears that read it together,

    s_j = max|x_j|^α / max_i|W_ij|^(1-α),     γ_j ← γ_j / s_j,   β_j ← β_j / s_j,     W_ij ← W_ij · s_j .

With α = 0.5 and a single linear both maxima become √(max|x_j| · max_i|W_ij|).  With α = 1 all of the difficulty goes
into the weights, with α = 0 into the inputs.  Norms that store γ - 1 get (1 + w) / s - 1.

Only inputs that a norm makes are treated: those of o and down have no gain in front of them, and the input of the head
is not rounded.  In a mixture of experts the norm also feeds the router and weights that are no sites; nothing is
measured there, and the norm is left as it is (`left_alone`).

Departure from the authors' code: a channel that was never active, or that no weight reads, gets s = 1, where theirs
clamps the maxima to 1e-5 and so blows the gain of a silent channel up by orders of magnitude.  In 16 bits the changed
gains and weights are rounded once more, like any weight.

Source: Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, 2022,
section 4 (arXiv 2211.10438).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.anatomy import Anatomy, Norm
from tersely.errors import AnatomyError, NumericalError, RecipeError
from tersely.rewrite.fold_norms import (
    EXPERT_READERS,
    closed,
    experts_at,
    norms_of_blocks,
    opened,
    rounded,
    sealed_at,
    sites_at,
)
from tersely.stats import AbsMax, Statistic, Stats

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SMALLEST = 1e-5
"""Bound of the scales from below, as in the authors' code (no unit)."""


@dataclass(frozen=True)
class Smooth:
    strength: float = 0.5
    """α of the paper, from 0 to 1: how much of the inputs' range moves into the weights (no unit).  The authors take
    0.5 for OPT and BLOOM, 0.8 to 0.9 for Llama and Mistral."""

    paper: ClassVar[str] = (
        "Xiao et al., 2022, SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models "
        "(arXiv 2211.10438)"
    )
    summary: ClassVar[str] = "large input channels made smaller, the weights that read them larger"

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise RecipeError(
                f"smooth: strength {self.strength}; wanted 0 (inputs stay hard) to 1 (all in the weights)"
            )

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (AbsMax,)

    def check(self, anatomy: Anatomy, config: "PreTrainedConfig") -> None:
        treated = 0
        for norm in norms_of_blocks(anatomy):
            sealed = sealed_at(anatomy, norm.feeds)
            if sealed:
                raise AnatomyError(
                    f"smooth: {norm.name} also feeds {', '.join(sealed)}, whose columns cannot be scaled any more; "
                    "smooth before quantizing"
                )
            treated += norm.name not in self.left_alone(anatomy)
        if not treated:
            reason = anatomy.mixed_norms or "no norm with a gain of its own stands right before plain linears"
            raise AnatomyError(f"smooth: nothing to do in a model of family {anatomy.family}: {reason}")

    def left_alone(self, anatomy: Anatomy) -> dict[str, str]:
        """The norms in front of linears that stay as they are: path → reason."""
        return {
            norm.name: "it also feeds a mixture of experts"
            for norm in norms_of_blocks(anatomy)
            if norm.feeds.endswith(":mlp.in") and experts_at(anatomy, norm.feeds.partition(":")[0], EXPERT_READERS)
        }

    def settings(self, anatomy: Anatomy) -> dict[str, Any]:
        return {}

    def outside(self, anatomy: Anatomy, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def block(
        self, anatomy: Anatomy, index: int, state: Mapping[str, Tensor], stats: Mapping[str, Stats]
    ) -> dict[str, Tensor]:
        changed: dict[str, Tensor] = {}
        left_alone = self.left_alone(anatomy)
        for norm in norms_of_blocks(anatomy):
            if norm.feeds.partition(":")[0] != anatomy.blocks[index] or norm.name in left_alone:
                continue
            sites = sites_at(anatomy, norm.feeds)
            weights = [opened(site, state) for site in sites]
            inputs = stats[norm.feeds][AbsMax].mean()
            if not torch.isfinite(inputs).all():
                raise NumericalError(f"{norm.feeds}: an input channel is not finite; calibrate in float32 or bfloat16")
            scale = smoothing_scale(inputs.to(weights[0].device), weights, self.strength)
            changed |= _divided(norm, scale, state)
            for site, weight in zip(sites, weights, strict=True):
                changed |= closed(site, weight * scale, None, state)
        return changed


def smoothing_scale(
    inputs: Float[Tensor, " in"], weights: Sequence[Float[Tensor, "_ in"]], strength: float
) -> Float[Tensor, " in"]:
    """s of the paper, from the largest |x| of every channel and all weights that read it; 1 where either is zero."""
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    scale = (inputs**strength / largest ** (1 - strength)).clamp(min=SMALLEST)
    return torch.where((inputs > 0) & (largest > 0), scale, torch.ones_like(scale))


def _divided(norm: Norm, scale: Float[Tensor, " width"], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gain and bias of a norm whose output is divided by a scale."""
    name = f"{norm.name}.weight"
    changed = {name: rounded(name, (state[name].double() + norm.offset) / scale - norm.offset, state[name])}
    if norm.bias:
        name = f"{norm.name}.bias"
        changed[name] = rounded(name, state[name].double() / scale, state[name])
    return changed

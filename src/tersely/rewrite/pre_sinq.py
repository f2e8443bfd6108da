"""SINQ without its overhead: the scales of columns folded into whatever makes the input, for any quantizer to follow.

SINQ divides the columns of a weight by t, so that rows and columns vary alike, and multiplies the input by t when the
model runs.  Where the input comes from a norm, or from another linear with nothing but products in between, t can live
there, and the network stays what it was:

    o        columns / t,   rows of v · t      heads mix tokens channel by channel; query heads that share a head of
                                               keys and values share its t                       (only with `values`)
    down     columns / t,   rows of up · t     of gated MLPs, where up enters as a factor
    q, k, v  columns / t,   γ · t, β · t       of the norm before them, balanced as one matrix, their rows stacked
    gate, up columns / t,   γ · t, β · t       likewise

in this order, `sweeps` times: rows of up and v change when down and o do.  t is found in slabs of `group` columns
(`linalg.sinkhorn`) and divided by its median, so that nothing grows as a whole.  Linears that read one input share one
t, which is what is lost against the method.  Norms that store γ - 1 get (1 + w) t - 1.

Differences from the authors' code: the numbers of rounds and sweeps are options, 16 and 1, where theirs tries several
and takes those with the least divergence of the logits on a short text; one matrix is divided by its deviation before
it is balanced; all is done in float64 and rounded once.  Inputs without a place to fold into are left alone: of down in
an MLP without gate, and of norms that feed a mixture of experts (`left_alone`).

Source: Müller et al., SINQ: Sinkhorn-Normalized Quantization for Calibration-Free Low-Precision LLM Weights, 2025,
section on no-overhead SINQ (arXiv 2509.22944).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.anatomy import Anatomy, Norm, Site, Unit, fused_rows
from tersely.errors import AnatomyError, RecipeError
from tersely.linalg.sinkhorn import column_balance
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
from tersely.stats import Statistic, Stats

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class FoldedSinkhorn:
    group: int = 64
    """Neighbouring columns that are balanced together; that of the quantizer to follow.  0 for all of a row."""

    rounds: int = 16
    """Iterates that are looked at for every matrix; the authors try 2 to 32."""

    sweeps: int = 1
    """Times that all of a block is gone through; the authors try 1 and 2."""

    values: bool = False
    """Scale between v and o as well."""

    paper: ClassVar[str] = (
        "Müller et al., 2025, SINQ: Sinkhorn-Normalized Quantization for Calibration-Free Low-Precision LLM Weights "
        "(arXiv 2509.22944)"
    )
    summary: ClassVar[str] = "columns of weights evened out, their scales folded into norms and neighbours"

    def __post_init__(self) -> None:
        if self.group < 0:
            raise RecipeError(f"pre_sinq: group {self.group}; wanted 0 for whole rows, or columns balanced together")
        for name, value in (("rounds", self.rounds), ("sweeps", self.sweeps)):
            if value < 1:
                raise RecipeError(f"pre_sinq: {name} {value}; wanted 1 or more")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return ()

    def check(self, anatomy: Anatomy, config: "PreTrainedConfig") -> None:
        left_alone = self.left_alone(anatomy)
        treated = sum(_gated(unit) or (self.values and unit.role == "attention") for unit in anatomy.units)
        for norm in norms_of_blocks(anatomy):
            sealed = sealed_at(anatomy, norm.feeds)
            if sealed:
                raise AnatomyError(
                    f"pre_sinq: {norm.name} also feeds {', '.join(sealed)}, whose columns cannot be scaled any more; "
                    "rewrite before quantizing"
                )
            treated += norm.name not in left_alone
        if not treated:
            reason = anatomy.mixed_norms or "no norm with a gain of its own stands right before plain linears"
            raise AnatomyError(f"pre_sinq: nothing to do in a model of family {anatomy.family}: {reason}")

    def left_alone(self, anatomy: Anatomy) -> dict[str, str]:
        """The norms in front of linears that stay as they are, and the linears that nothing can be folded out of."""
        alone = {
            norm.name: "it also feeds a mixture of experts"
            for norm in norms_of_blocks(anatomy)
            if norm.feeds.endswith(":mlp.in") and experts_at(anatomy, norm.feeds.partition(":")[0], EXPERT_READERS)
        }
        for unit in anatomy.units:
            if unit.role == "mlp" and not _gated(unit) and "down" in unit.sites:
                alone[unit.sites["down"].name] = "its input comes out of an activation"
        return alone

    def settings(self, anatomy: Anatomy) -> dict[str, Any]:
        return {}

    def outside(self, anatomy: Anatomy, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def block(
        self, anatomy: Anatomy, index: int, state: Mapping[str, Tensor], stats: Mapping[str, Stats]
    ) -> dict[str, Tensor]:
        sites = [site for site in anatomy.sites if site.block == index]
        units = [unit for unit in anatomy.units if unit.block == index]
        left_alone = self.left_alone(anatomy)
        norms = [
            norm
            for norm in norms_of_blocks(anatomy)
            if norm.feeds.partition(":")[0] == anatomy.blocks[index] and norm.name not in left_alone
        ]
        # working copies in float64, rounded once
        weights = {site.name: opened(site, state) for site in sites}
        biases = {site.name: state[f"{site.name}.bias"].double() for site in sites if site.bias}
        scales = {norm.name: torch.ones_like(state[f"{norm.name}.weight"], dtype=torch.float64) for norm in norms}
        touched: set[str] = set()
        for _ in range(self.sweeps):
            for unit in units:
                if unit.role == "attention" and self.values:
                    touched |= self._scale_values(anatomy, unit, weights, biases)
            for unit in units:
                if _gated(unit):
                    touched |= self._scale_middle(anatomy, unit, weights, biases)
            for norm in norms:
                readers = [site.name for site in sites_at(anatomy, norm.feeds)]
                scale = self._balance([weights[name] for name in readers])
                scales[norm.name] *= scale
                for name in readers:
                    weights[name] = weights[name] / scale
                touched |= set(readers)
        changed: dict[str, Tensor] = {}
        for norm in norms:
            changed |= _multiplied(norm, scales[norm.name], state)
        for site in sites:
            if site.name in touched:
                changed |= closed(site, weights[site.name], biases.get(site.name), state)
        return changed

    def _balance(self, stacked: Sequence[Float[Tensor, "_ in"]]) -> Float[Tensor, " in"]:
        scale = column_balance(torch.cat(list(stacked)), self.group, self.rounds)
        return scale / scale.median()

    def _scale_middle(
        self, anatomy: Anatomy, unit: Unit, weights: dict[str, Tensor], biases: dict[str, Tensor]
    ) -> set[str]:
        """down / t, rows of up · t, in the working copies of a block; the names of what changed."""
        down = unit.sites["down"].name
        scale = self._balance([weights[down]])
        weights[down] = weights[down] / scale
        return {down, _multiply_rows(anatomy, unit, "up", scale, weights, biases)}

    def _scale_values(
        self, anatomy: Anatomy, unit: Unit, weights: dict[str, Tensor], biases: dict[str, Tensor]
    ) -> set[str]:
        """o / t, rows of v · t, likewise."""
        assert unit.heads is not None  # of an attention
        groups, width = unit.heads.key_value, unit.heads.width
        out = unit.sites["o"].name
        by_head = weights[out].unflatten(1, (groups, -1, width))  # [out, key heads, queries of each, width]
        scale = self._balance([by_head.transpose(1, 2).reshape(-1, groups * width)])
        weights[out] = (by_head / scale.view(groups, 1, width)).flatten(1)
        return {out, _multiply_rows(anatomy, unit, "v", scale, weights, biases)}


def _multiply_rows(
    anatomy: Anatomy,
    unit: Unit,
    part: str,
    scale: Float[Tensor, " rows"],
    weights: dict[str, Tensor],
    biases: dict[str, Tensor],
) -> str:
    """Multiply the outputs of a linear, or of its part of a fused one; the name of that."""
    site = _holder(unit, part)
    factor = scale
    if part not in unit.sites:
        rows = fused_rows(site, anatomy)[part].to(scale.device)
        factor = torch.ones_like(weights[site.name][:, 0]).index_copy(0, rows, scale)
    weights[site.name] = weights[site.name] * factor[:, None]
    if site.name in biases:
        biases[site.name] = biases[site.name] * factor
    return site.name


def _holder(unit: Unit, part: str) -> Site:
    return unit.sites[part] if part in unit.sites else unit.sites["qkv" if part == "v" else "gate_up"]


def _gated(unit: Unit) -> bool:
    return unit.role == "mlp" and "down" in unit.sites and bool(unit.sites.keys() & {"gate", "gate_up"})


def _multiplied(norm: Norm, scale: Float[Tensor, " width"], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gain and bias of a norm whose output is multiplied by a scale."""
    name = f"{norm.name}.weight"
    changed = {name: rounded(name, (state[name].double() + norm.offset) * scale - norm.offset, state[name])}
    if norm.bias:
        name = f"{norm.name}.bias"
        changed[name] = rounded(name, state[name].double() * scale, state[name])
    return changed

"""What reads the output of a norm, and how the norm's gain and bias move into these readers.

A norm computes y = γ ⊙ n + β, with n the normalised hidden state.  Its readers are linear, so that

    W y + b = (W diag(γ)) n + (b + W β),

and the gain may sit in either place: all of it in the readers (a rotation needs a norm without gain), or split at will
(smoothing divides the gain by s and multiplies the columns by s).  The one condition is to find *all* readers of the
norm; what cannot be rewritten, such as a weight that is quantized already, is a reason to refuse.

Where a reader has no bias of its own, β stays in the norm, as β / γ in front of the folded weights:
W diag(γ) (n + β / γ).  A channel whose gain is zero, or next to nothing beside its bias, has no such form.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.anatomy import FAMILIES, READS, Anatomy, Norm, Site
from tersely.anatomy.families import SAME_INPUT
from tersely.errors import AnatomyError, NumericalError

# Weights of a mixture of experts, by their paths in a block.  The router is (experts, width); the experts' readers are
# stacked as (experts, out, width) and their writers as (experts, width, in).
EXPERT_READERS = ("mlp.gate.weight", "mlp.experts.gate_up_proj")
EXPERT_WRITERS = ("mlp.experts.down_proj",)

STEEPEST = 1e3
"""Largest |β / γ| that a norm may keep: rounding errors grow with it, and spread over all channels by a rotation."""

PIECE = 1 << 24
"""Elements of a large tensor that are treated at once: 128 MiB in float64."""


@dataclass(frozen=True)
class Folded:
    """A norm without gain, and what its readers take over instead."""

    gain: Float[Tensor, " width"] | Float[Tensor, ""]
    """The columns of every reader are multiplied by it; a plain one where the norm has no gain."""
    shift: Float[Tensor, " width"] | None
    """Every reader adds W · shift (W before the gain) to its bias; None where nothing is to be added."""
    rest: Float[Tensor, " width"] | None
    """The bias that the norm has from now on; None where it has none."""


def fold(norm: Norm | None, state: Mapping[str, Tensor], *, into_biases: bool) -> Folded:
    """Take gain and bias out of a norm; `into_biases` where all its readers have biases.  Everything in float64.
    A norm that has neither is None, and hands nothing over.

    Raises AnatomyError where the bias has to stay and a gain is too small for that.
    """
    if norm is None:
        return Folded(torch.ones((), dtype=torch.float64), None, None)
    gain = state[f"{norm.name}.weight"].double() + norm.offset
    if not norm.bias:
        return Folded(gain, None, None)
    bias = state[f"{norm.name}.bias"].double()
    if into_biases:
        return Folded(gain, bias, torch.zeros_like(bias))
    steep = bias.abs() > STEEPEST * gain.abs()
    if steep.any():
        channel = int(steep.nonzero()[0])
        raise AnatomyError(
            f"{norm.name}: channel {channel} has a gain of {gain[channel]:.3g} beside a bias of {bias[channel]:.3g}, "
            f"and what reads it has no bias to take that over; wanted a bias of at most {STEEPEST:g} times the gain"
        )
    return Folded(gain, None, torch.where(bias == 0, bias, bias / gain))


def norm_at(anatomy: Anatomy, feeds: str) -> Norm | None:
    """The norm that makes an input, or None where it has no gain of its own."""
    return next((norm for norm in anatomy.norms if norm.feeds == feeds), None)


def norms_of_blocks(anatomy: Anatomy) -> tuple[Norm, ...]:
    """All but the one in front of the head."""
    return tuple(norm for norm in anatomy.norms if norm.feeds != "head")


def sites_at(anatomy: Anatomy, feeds: str) -> tuple[Site, ...]:
    """The linears that read an input."""
    return tuple(site for site in anatomy.sites if site.reads == feeds)


def experts_at(anatomy: Anatomy, block: str, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Full names of those weights of a mixture of experts that a block has."""
    kept = {weight.name for weight in anatomy.kept}
    return tuple(f"{block}.{path}" for path in paths if f"{block}.{path}" in kept)


def sealed_at(anatomy: Anatomy, feeds: str) -> tuple[str, ...]:
    """What reads an input and is no plain linear any more, each as ``<path> (<reason>)``."""
    block, _, door = feeds.partition(":")
    found = []
    for kept in anatomy.kept:
        for role, path in FAMILIES[anatomy.family].linears.items():
            below = f"{kept.name}.".removeprefix(f"{block}.{path}.")
            children = [child for child in below.split(".") if child]
            if READS[role] == door and below != f"{kept.name}." and all(map(_same_input, children)):
                found.append(f"{kept.name} ({kept.reason})")
    return tuple(found)


def _same_input(child: str) -> bool:
    return child in SAME_INPUT or child.isdecimal()


def opened(site: Site, state: Mapping[str, Tensor]) -> Float[Tensor, "out in"]:
    """The weight of a site in float64, one row for each output."""
    weight = state[f"{site.name}.weight"].double()
    return weight.T if site.transposed else weight


def closed(
    site: Site, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weight and bias of a site as they are stored, in the dtype and layout that they had; a bias that is still the
    same is left out."""
    name = f"{site.name}.weight"
    changed = {name: rounded(name, weight.T if site.transposed else weight, state[name])}
    if bias is not None:
        name = f"{site.name}.bias"
        new = rounded(name, bias, state[name])
        if not torch.equal(new, state[name]):
            changed[name] = new
    return changed


def rounded(name: str, new: Tensor, old: Tensor) -> Tensor:
    """A new value in the dtype of the old one.  Raises NumericalError where it is not finite any more."""
    result = new.to(old.dtype).contiguous()
    if not torch.isfinite(result).all():
        raise NumericalError(
            f"{name}: the rewritten values are not finite in {str(old.dtype).removeprefix('torch.')}; repair the "
            "checkpoint, or convert it to bfloat16 or float32 first"
        )
    return result


def in_pieces(name: str, old: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A large tensor changed piece by piece along its first axis, by a function of float64 tensors."""
    rows = max(1, PIECE // max(1, old[:1].numel()))
    return torch.cat([rounded(name, change(piece.double()), piece) for piece in old.split(rows)])

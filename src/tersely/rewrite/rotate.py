"""The residual stream in another basis, in which no channel stands out.

Rounding hurts where one channel is much larger than the rest.  Such channels belong to the basis, not to the function:
for any orthogonal R, the hidden states h may be stored as h R, if whatever writes to the residual stream writes in the
new basis and whatever reads it turns back first.  With R flat (a Hadamard matrix with random signs, `linalg.hadamard`)
a spike of size a in one of d channels becomes ±a/√d in all of them.  Every product below is a change of weights, made
once in float64; nothing is computed at run time, and the result is a stock model.

    embedding rows              E ← E R              head, and readers of the stream (q, k, v, gate, up)    W ← W R
    writers (o, down)           W ← Rᵀ W, b ← b R    router and stacked experts in the same way

A norm has to commute with R.  RMSNorm does once its gain is folded into its readers (`fold_norms`), since R keeps
lengths.  LayerNorm also subtracts the mean over channels; it commutes with every R that leaves the all-ones vector
where it is, so in these models R is one of those, and the norm stays a LayerNorm.  Its bias is folded into the
readers' biases, or stays in the norm, divided by the gain and rotated, where they have none.  A tied head is untied:
the gain of the last norm goes into the head alone.

Second rotation (`values`): between v and o the tokens are mixed head by head, channel by channel alike.  So the
channels of each value head are rotated too, by one matrix in a block for all heads (queries that share a head of keys
and values see the same one): rows of v by R₂ᵀ, columns of o by R₂.

Departures from the paper: it turns LayerNorm into RMSNorm by centring all writers, which needs another norm class;
with an R that keeps the mean nothing has to be centred.  The authors' code subtracts the mean of embedding rows of
RMSNorm models as well, which changes the function, and it replaces the norms by others with an epsilon of 1e-5; neither
is done here.  The transforms that have to run with the model (queries and keys after rotary positions, across heads
before o, the input of down) are no rewrite, and are left out: the input of down keeps its outliers.

Source: Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, 2024, section 4 (arXiv 2404.00456).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tersely.anatomy import READS, Anatomy, Site, Unit, fused_rows
from tersely.errors import AnatomyError, RecipeError, unknown
from tersely.linalg.hadamard import Rotation, random_rotation
from tersely.rewrite.fold_norms import (
    EXPERT_READERS,
    EXPERT_WRITERS,
    Folded,
    closed,
    experts_at,
    fold,
    in_pieces,
    norm_at,
    opened,
    rounded,
    sites_at,
)
from tersely.stats import Statistic, Stats

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BASES = ("hadamard", "orthogonal")
READING_DOORS = ("attention.in", "mlp.in")
"""Inputs that come out of the residual stream; the linears behind the other doors write to it."""


@dataclass(frozen=True)
class Rotate:
    seed: int = 0
    """Of the random signs, and of the basis where it is random."""

    values: bool = True
    """Rotate the channels of each value head as well, between v and o."""

    basis: str = "hadamard"
    """``hadamard``: as flat as can be, and fast; ``orthogonal``: drawn at random, for comparison, and slow."""

    paper: ClassVar[str] = (
        "Ashkboos et al., 2024, QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs (arXiv 2404.00456)"
    )
    summary: ClassVar[str] = "the residual stream in a rotated basis without outlier channels"

    def __post_init__(self) -> None:
        if self.basis not in BASES:
            raise RecipeError(f"rotate: {unknown('basis', self.basis, BASES)}")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return ()

    def check(self, anatomy: Anatomy, config: "PreTrainedConfig") -> None:
        def refuse(reason: str) -> AnatomyError:
            return AnatomyError(
                f"rotate: the residual stream of this model ({anatomy.family}) cannot be turned: {reason}"
            )

        if anatomy.mixed_norms:
            raise refuse(anatomy.mixed_norms)
        if anatomy.head is None:
            raise refuse("it has no output head, so that the stream itself is what it returns")
        for reason in anatomy.unfit.values():
            raise refuse(f"{reason}; rotate before other steps")
        others = [name for name in anatomy.tied if name != _weight(anatomy.head)]
        if others:
            raise refuse(f"{', '.join(others)} is shared with another part")
        known = {anatomy.head, *_experts(anatomy)}
        for kept in anatomy.kept:
            if kept.name not in known:
                hint = "; rotate before other steps" if kept.reason.startswith("already") else ""
                raise refuse(f"{kept.name} ({kept.reason}) may read or write it{hint}")
        for index, block in enumerate(anatomy.blocks):
            found = {unit.role for unit in anatomy.units if unit.block == index}
            if experts_at(anatomy, block, EXPERT_READERS):
                found.add("mlp")
            for role in ("attention", "mlp"):
                if role not in found:
                    raise refuse(f"a linear in the {role} of {block} has been replaced; rotate before other steps")

    def left_alone(self, anatomy: Anatomy) -> dict[str, str]:
        return {}

    def settings(self, anatomy: Anatomy) -> dict[str, Any]:
        return {"tie_word_embeddings": False} if anatomy.head_is_tied else {}

    def outside(self, anatomy: Anatomy, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stream = self._stream(anatomy)
        changed = {name: in_pieces(name, state[name], stream.apply) for name in map(_weight, anatomy.embeddings)}
        head = anatomy.head or ""
        bias = f"{head}.bias"
        folded = fold(norm_at(anatomy, "head"), state, into_biases=bias in state)
        weight = state[_weight(anatomy.embeddings[0]) if anatomy.head_is_tied else _weight(head)]
        changed[_weight(head)] = in_pieces(_weight(head), weight, lambda rows: stream.apply(rows * folded.gain))
        if folded.shift is not None:
            changed[bias] = rounded(bias, state[bias].double() + weight.double() @ folded.shift, state[bias])
        return changed | self._norm_left(anatomy, "head", folded, state)

    def block(
        self, anatomy: Anatomy, index: int, state: Mapping[str, Tensor], stats: Mapping[str, Stats]
    ) -> dict[str, Tensor]:
        stream = self._stream(anatomy)
        sites = [site for site in anatomy.sites if site.block == index]
        # Working copies in float64: a weight may be rotated on both sides, and is rounded once.
        weights = {site.name: opened(site, state) for site in sites}
        biases = {site.name: state[f"{site.name}.bias"].double() for site in sites if site.bias}
        changed: dict[str, Tensor] = {}
        for door in READING_DOORS:
            changed |= self._turn_readers(anatomy, f"{anatomy.blocks[index]}:{door}", weights, biases, state)
        if self.values:
            (unit,) = (unit for unit in anatomy.units if unit.block == index and unit.role == "attention")
            self._turn_values(anatomy, unit, weights, biases)
        for site in sites:
            if READS[site.role] not in READING_DOORS:  # then it writes to the stream
                weights[site.name] = stream.apply(weights[site.name].T).T
                if site.bias:
                    biases[site.name] = stream.apply(biases[site.name])
        for expert in experts_at(anatomy, anatomy.blocks[index], EXPERT_WRITERS):
            changed[expert] = in_pieces(expert, state[expert], lambda stack: stream.apply(stack.mT).mT)
        for site in sites:
            changed |= closed(site, weights[site.name], biases.get(site.name), state)
        return changed

    def _turn_readers(
        self,
        anatomy: Anatomy,
        feeds: str,
        weights: dict[str, Tensor],
        biases: dict[str, Tensor],
        state: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Fold a norm into what reads it and rotate its input, in the working copies of a block.  Returned is what is
        no site: the norm, and weights of experts."""
        stream = self._stream(anatomy)
        readers = sites_at(anatomy, feeds)
        block, _, door = feeds.partition(":")
        experts = experts_at(anatomy, block, EXPERT_READERS) if door == "mlp.in" else ()
        folded = fold(norm_at(anatomy, feeds), state, into_biases=not experts and all(site.bias for site in readers))
        for site in readers:
            if folded.shift is not None:
                biases[site.name] = biases[site.name] + weights[site.name] @ folded.shift
            weights[site.name] = stream.apply(weights[site.name] * folded.gain)
        changed = {
            name: in_pieces(name, state[name], lambda rows: stream.apply(rows * folded.gain)) for name in experts
        }
        return changed | self._norm_left(anatomy, feeds, folded, state)

    def _turn_values(self, anatomy: Anatomy, unit: Unit, weights: dict[str, Tensor], biases: dict[str, Tensor]) -> None:
        """Rotate every value head, in the working copies of a block: rows of v (or of its part of a fused matrix) and
        their biases, columns of o."""
        assert unit.heads is not None  # of an attention
        width = unit.heads.width
        rotation = _rotation(width, self.basis, False, f"{self.seed}:{unit.name}")

        def by_head(rows: Tensor) -> Tensor:
            return rotation.apply(rows.reshape(-1, width)).reshape(rows.shape)

        out = unit.sites["o"].name
        weights[out] = by_head(weights[out])
        site = unit.sites["v"] if "v" in unit.sites else unit.sites["qkv"]
        rows = _value_rows(site, anatomy).to(weights[out].device)
        weights[site.name] = weights[site.name].index_copy(0, rows, by_head(weights[site.name][rows].T).T)
        if site.bias:
            biases[site.name] = biases[site.name].index_copy(0, rows, by_head(biases[site.name][rows]))

    def _stream(self, anatomy: Anatomy) -> Rotation:
        """The rotation of the residual stream.  It keeps the mean unless every norm is known to be an RMSNorm."""
        (width,) = {site.in_features for site in anatomy.sites if READS[site.role] in READING_DOORS}
        doors = [f"{block}:{door}" for block in anatomy.blocks for door in READING_DOORS]
        norms = [norm_at(anatomy, feeds) for feeds in (*doors, "head")]
        keep_mean = any(norm is None or norm.bias for norm in norms)
        return _rotation(width, self.basis, keep_mean, f"{self.seed}:stream")

    def _norm_left(
        self, anatomy: Anatomy, feeds: str, folded: Folded, state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The norm after folding: a gain of one, and what is left of its bias in the new basis."""
        norm = norm_at(anatomy, feeds)
        if norm is None:
            return {}
        name = f"{norm.name}.weight"
        changed = {name: torch.full_like(state[name], 1 - norm.offset)}
        if folded.rest is not None:
            bias = f"{norm.name}.bias"
            changed[bias] = rounded(bias, self._stream(anatomy).apply(folded.rest), state[bias])
        return changed


@lru_cache(maxsize=4)
def _rotation(order: int, basis: str, keep_mean: bool, seed: str) -> Rotation:
    """A rotation that its arguments determine.  Seeds are hashed: those of neighbouring blocks shall have nothing in
    common."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big", signed=True)
    generator = torch.Generator().manual_seed(number)
    return random_rotation(order, generator, keep_mean=keep_mean, hadamard=basis == "hadamard")


def _value_rows(site: Site, anatomy: Anatomy) -> Tensor:
    """The rows of v in the matrix that holds it, head by head."""
    return fused_rows(site, anatomy)["v"] if site.role == "attention.qkv" else torch.arange(site.out_features)


def _experts(anatomy: Anatomy) -> tuple[str, ...]:
    return tuple(
        name for block in anatomy.blocks for name in experts_at(anatomy, block, (*EXPERT_READERS, *EXPERT_WRITERS))
    )


def _weight(module: str) -> str:
    return f"{module}.weight"

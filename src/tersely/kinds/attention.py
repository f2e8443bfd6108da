"""The one attention of ours, for everything that the stock attention of a model cannot do.

Three things ask for it, and each is a field:

* Heads whose widths differ from the stock ones (`key_width` for queries and keys, `value_width` for values), or some of
  them removed.  The scale of the scores stays the one of the original head.
* Positions.  Queries and keys are turned pair by pair, q' = q∘[c, c] + rot(q)∘[s, s], by tables c and s of our own:
  the stock ones, those of a subset of pairs per head, or short Fourier series per head (FoPE).
* A latent cache (`latent`).  With k = up_k · down_k x and v = up_v · down_v x, both of low rank, what is cached of a
  token is  down_k x  and  down_v x : r_k + r_v numbers in place of two times heads times width.  Keys are rebuilt,
  normed and turned for all cached tokens whenever they are read, since the turning does not commute with `up`.

The call is that of stock decoder layers, the children bear the stock names, and latents go into the library's own
caches as one head of width r; `generate` needs nothing new.

Positions of cached tokens.  A cache of latents does not say where its tokens stood.  They are counted back from the
newest one: position(slot) = position of the newest query - (slot of the newest - slot).  That is exact for texts
without gaps and for rows padded on the left; where a prompt shows a gap, or pads that count, an error is raised.

Tables are functions of numbers that must be exact: an angle of position times frequency loses all meaning in 16 bits.
They are stored as the bits of float32 in integers, which no cast of the model reaches.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tersely.errors import AnatomyError, CheckpointError, RecipeError
from tersely.kinds.base import Kind, Spec
from tersely.kinds.low_rank import LowRankLinear

LINEARS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
NORMS = ("q_norm", "k_norm")


class KeyValueCache(Protocol):
    """What is used of the library's caches."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]: ...
    def get_seq_length(self, layer_idx: int) -> int | Tensor: ...


@dataclass(frozen=True)
class AttentionShape:
    """What an attention is, numbers and positions aside."""

    layer: int
    """Index by which caches address it."""
    hidden: int
    query_heads: int
    key_value_heads: int
    key_width: int
    """Of the head of a query or a key; even."""
    value_width: int
    scaling: float
    """Factor of the scores."""
    sliding_window: int | None
    """A token sees itself and the `sliding_window` - 1 tokens before it; None: all of them."""
    dropout: float
    """Of attention weights, while training."""
    norm_eps: float | None
    """RMS norms of queries and keys, head by head, before they are turned; None where there are none."""


@dataclass(frozen=True)
class TableShape:
    """What the tables of positions are, numbers aside."""

    sets: int
    """1: all heads turn alike; else one set for each key head."""
    frequencies: int
    """Pairs that turn; the pairs after them stay at one angle."""
    pairs: int
    """Half the width of a head."""
    series: bool
    """Whether cos and sin are mixed by coefficients before use."""
    rest_sine: float
    """Sine of the pairs that do not turn; their cosine is 1."""
    scaling: float
    """Factor of all entries, as some ways to lengthen the context of a model have it."""


@dataclass(frozen=True)
class AttentionSettings:
    """What a stock attention does, read off its model: all that a method needs to build one of ours in its place."""

    shape: AttentionShape
    frequencies: tuple[float, ...]
    """Of the pairs of a head, in radians per token, falling; exactly as the model has them in float32."""
    table_scaling: float
    """Factor of cosine and sine."""
    train_length: int
    """Tokens of the longest text that the model was trained on, as its configuration says."""

    def tables(self) -> "PositionTables":
        """The stock tables."""
        frequencies = torch.tensor([self.frequencies], dtype=torch.float32)
        return PositionTables.of(frequencies, pairs=len(self.frequencies), scaling=self.table_scaling)


class PositionTables(nn.Module):
    """c(t) = scaling · [cos(tω) Bc, 1], s(t) = scaling · [sin(tω) Bs, rest]: for every position t a row of pairs."""

    frequencies: Tensor
    cosine: Tensor
    sine: Tensor

    def __init__(self, shape: TableShape) -> None:
        super().__init__()
        self.shape = shape
        square = (shape.sets, shape.frequencies, shape.frequencies)
        self.register_buffer("frequencies", torch.empty(square[:2], dtype=torch.int32))
        if shape.series:
            self.register_buffer("cosine", torch.empty(square, dtype=torch.int32))
            self.register_buffer("sine", torch.empty(square, dtype=torch.int32))

    @classmethod
    def of(
        cls,
        frequencies: Float[Tensor, "sets frequencies"],
        *,
        pairs: int,
        series: tuple[Float[Tensor, "sets frequencies out"], Float[Tensor, "sets frequencies out"]] | None = None,
        rest_sine: float = 0.0,
        scaling: float = 1.0,
    ) -> Self:
        """Tables of `frequencies` (radians per token); `series`: the coefficients of cosine and sine."""
        sets, turning = frequencies.shape
        with torch.device("meta"):
            tables = cls(TableShape(sets, turning, pairs, series is not None, rest_sine, scaling))
        tables.frequencies = _bits(frequencies)
        if series is not None:
            tables.cosine, tables.sine = (_bits(coefficients) for coefficients in series)
        return tables

    def forward(
        self, positions: Int[Tensor, "batch tokens"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "batch sets tokens width"], Float[Tensor, "batch sets tokens width"]]:
        """Cosine and sine for both members of every pair, computed in float32."""
        with torch.autocast(positions.device.type, enabled=False):
            angles = positions[:, None, :, None].float() * self.frequencies.view(torch.float32)[:, None, :]
            cosine, sine = angles.cos(), angles.sin()
            if self.shape.series:
                cosine = cosine @ self.cosine.view(torch.float32)
                sine = sine @ self.sine.view(torch.float32)
            rest = self.shape.pairs - self.shape.frequencies
            if rest:
                cosine = F.pad(cosine, (0, rest), value=1.0)
                sine = F.pad(sine, (0, rest), value=self.shape.rest_sine)
            both = (torch.cat((table, table), dim=-1) * self.shape.scaling for table in (cosine, sine))
            cosine, sine = (table.to(dtype) for table in both)
        return cosine, sine


class HeadNorm(nn.Module):
    """RMS norm over the channels of a head, as the library computes it: the mean in float32, the gain in the dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        exact = x.float()
        return self.weight * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(Kind):
    """softmax(scaling · q' k'ᵀ) v, causal, with grouped queries, any widths, any tables, and perhaps a latent cache."""

    name = "attention"

    def __init__(self, shape: AttentionShape, tables: PositionTables, *, latent: bool, biases: tuple[str, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.latent = latent
        self.biases = biases
        query, key_value = shape.query_heads, shape.key_value_heads
        self.q_proj: nn.Module = nn.Linear(shape.hidden, query * shape.key_width, bias="q" in biases)
        self.k_proj: nn.Module = nn.Linear(shape.hidden, key_value * shape.key_width, bias="k" in biases)
        self.v_proj: nn.Module = nn.Linear(shape.hidden, key_value * shape.value_width, bias="v" in biases)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if shape.norm_eps is not None:
            self.q_norm = HeadNorm(shape.key_width, shape.norm_eps)
            self.k_norm = HeadNorm(shape.key_width, shape.norm_eps)
        self.positions = tables
        self.o_proj: nn.Module = nn.Linear(query * shape.value_width, shape.hidden, bias="o" in biases)

    @classmethod
    def of(
        cls,
        shape: AttentionShape,
        tables: PositionTables,
        linears: Mapping[str, nn.Module],
        gains: Mapping[str, Tensor],
        *,
        latent: bool = False,
    ) -> Self:
        """An attention that owns its parts: `linears` by q, k, v, o with their biases, `gains` by q_norm, k_norm."""
        biases = tuple(role for role in LINEARS if getattr(linears[role], "bias", None) is not None)
        with torch.device("meta"):
            module = cls(shape, tables, latent=latent, biases=biases)
        for role, name in LINEARS.items():
            setattr(module, name, linears[role])
        for name in NORMS if shape.norm_eps is not None else ():
            module.get_submodule(name).weight = nn.Parameter(gains[name].detach().clone())
        return module

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens hidden"],
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        position_ids: Int[Tensor, "#batch tokens"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        num_items_in_batch: Any = None,
    ) -> tuple[Float[Tensor, "batch tokens hidden"], None]:
        """The mixed tokens; never the weights of the mixture.

        Decoder layers hand on whatever the model was called with: `position_embeddings` are the stock tables, which are
        not used, and of what comes after `position_ids` only `output_attentions` matters, in that it is refused.
        """
        if output_attentions:
            raise RecipeError("output_attentions: this attention does not keep its weights; run the original model")
        if position_ids is None:
            raise AnatomyError("the layer around this attention gave no position_ids; its family is not supported")
        shape, tokens = self.shape, hidden_states.shape[1]
        query = self._turned(self.q_proj(hidden_states), self.q_norm, position_ids)
        if self.latent:
            down_k, up_k = _factors(self.k_proj)
            down_v, up_v = _factors(self.v_proj)
            key, value = down_k(hidden_states)[:, None], down_v(hidden_states)[:, None]
        else:
            key = self._turned(self.k_proj(hidden_states), self.k_norm, position_ids)
            value = _heads(self.v_proj(hidden_states), shape.value_width)
        seen: int | Tensor = tokens
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, shape.layer)
            # a window may have dropped the oldest, and a static cache has slots that are still empty
            seen = _least(past_key_values.get_seq_length(shape.layer), key.shape[2])
        slots = key.shape[2]
        mask, causal = self._mask(attention_mask, query, slots, seen)
        if self.latent:
            if past_key_values is not None:
                if tokens > 1 and not torch.compiler.is_compiling():
                    _check_run(position_ids, mask, slots, int(seen))
                back = seen - 1 - torch.arange(slots, device=position_ids.device)
                position_ids = position_ids[:, -1:] - back
            key = self._turned(up_k(key[:, 0]), self.k_norm, position_ids)
            value = _heads(up_v(value[:, 0]), shape.value_width)
        mixed = self._mixed(query, key, value, mask, causal)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), None

    def _turned(
        self,
        projected: Float[Tensor, "batch tokens channels"],
        norm: nn.Module | None,
        positions: Int[Tensor, "#batch tokens"],
    ) -> Float[Tensor, "batch heads tokens width"]:
        """Heads, normed and turned to their positions."""
        x = projected.unflatten(-1, (-1, self.shape.key_width))
        x = (x if norm is None else norm(x)).transpose(1, 2)
        cosine, sine = self.positions(positions, x.dtype)
        group = x.shape[1] // self.shape.key_value_heads
        if group > 1 and cosine.shape[1] > 1:  # a query is turned as the key head that it asks
            cosine, sine = (table.repeat_interleave(group, dim=1) for table in (cosine, sine))
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat((-second, first), dim=-1) * sine

    def _mask(
        self, given: Tensor | None, query: Float[Tensor, "batch heads tokens width"], slots: int, seen: int | Tensor
    ) -> tuple[Tensor | None, bool]:
        """The mask to use, and whether the kernel's own causal one will do."""
        if given is not None:
            if not isinstance(given, Tensor) or given.ndim != 4:
                got = f"{given.ndim}-D" if isinstance(given, Tensor) else type(given).__name__
                raise RecipeError(
                    f"this attention takes masks of four axes, not {got}; open the model with "
                    'attn_implementation="sdpa" or "eager"'
                )
            return (given if given.dtype == torch.bool else given.to(query.dtype)), False
        tokens, window = query.shape[2], self.shape.sliding_window
        filled = isinstance(seen, int) and seen == slots  # a tensor is never asked: that would stall a device
        if filled and (window is None or slots <= window) and tokens in (1, slots):
            return None, tokens > 1
        slot = torch.arange(slots, device=query.device)
        of_query = (seen - tokens + torch.arange(tokens, device=query.device))[:, None]
        allowed = slot <= of_query
        if window is not None:
            allowed &= slot > of_query - window
        return allowed[None, None], False

    def _mixed(
        self,
        query: Float[Tensor, "batch heads tokens width"],
        key: Float[Tensor, "batch groups slots width"],
        value: Float[Tensor, "batch groups slots out"],
        mask: Tensor | None,
        causal: bool,
    ) -> Float[Tensor, "batch heads tokens out"]:
        group = query.shape[1] // key.shape[1]
        # fast kernels take grouped heads only without a mask and with one width
        grouped = group > 1 and mask is None and key.shape[-1] == value.shape[-1]
        if group > 1 and not grouped:
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.shape.dropout if self.training else 0.0,
            is_causal=causal,
            scale=self.shape.scaling,
            enable_gqa=grouped,
        )

    def spec(self) -> Spec:
        plain = {"kind": self.name} | asdict(self.shape)
        return plain | {"positions": asdict(self.positions.shape), "latent": self.latent, "biases": list(self.biases)}

    @classmethod
    def from_spec(cls, spec: Spec) -> Self:
        fields = {name: spec[name] for name in AttentionShape.__dataclass_fields__}
        tables = PositionTables(TableShape(**spec["positions"]))
        return cls(AttentionShape(**fields), tables, latent=spec["latent"], biases=tuple(spec["biases"]))

    def extra_repr(self) -> str:
        return f"layer={self.shape.layer}, heads={self.shape.query_heads}, latent={self.latent}"


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A plain linear holding copies."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone().contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight, copy=True))
    return linear


def _bits(exact: Tensor) -> Int[Tensor, "..."]:
    """Float32 as integers, which casts of a model leave alone."""
    return exact.detach().to(torch.float32, copy=True).contiguous().view(torch.int32)


def _heads(projected: Float[Tensor, "batch tokens channels"], width: int) -> Float[Tensor, "batch heads tokens width"]:
    return projected.unflatten(-1, (-1, width)).transpose(1, 2)


def _factors(linear: nn.Module) -> tuple[nn.Module, nn.Module]:
    if not isinstance(linear, LowRankLinear):
        raise CheckpointError(f"a latent cache needs k_proj and v_proj of low rank, found {type(linear).__name__}")
    return linear.down, linear.up


def _least(length: int | Tensor, slots: int) -> int | Tensor:
    return length.clamp(max=slots) if isinstance(length, Tensor) else min(length, slots)


def _check_run(positions: Int[Tensor, "_ tokens"], mask: Tensor | None, slots: int, seen: int) -> None:
    """Raises RecipeError unless what the newest query sees is one run of tokens whose positions rise by one.

    Only then can the positions of cached tokens be counted back.  It waits for the device, so it is asked of prompts
    and not of single tokens.
    """
    tokens = positions.shape[1]
    if mask is None:
        sees = torch.ones(1, slots, dtype=torch.bool, device=positions.device)
    else:
        row = mask[:, 0, -1]
        sees = row if row.dtype == torch.bool else row > -1e4  # what hides a token is far below, in any dtype
    runs = (sees[:, 1:] & ~sees[:, :-1]).sum(1) + sees[:, 0]
    jumps = (positions.diff(dim=1) != 1) & sees[:, seen - tokens : seen - 1]
    if (runs > 1).any() or jumps.any():
        raise RecipeError(
            "a latent cache counts positions back from the newest token, which needs rows without gaps; pad on the "
            "left, or run without a cache (use_cache=False)"
        )

"""FoPE: rotary positions in which every pair carries a short Fourier series, and slow pairs stand still.

RoPE turns pair i of a head by the angle t ω_i at position t, so that a score is a sum over frequencies of the distance.
That sum extends periodically beyond the training length only if every pair really carries its one frequency, and if
every frequency has been seen for a whole period.  Neither holds: linear layers mix frequencies, and a pair with
ω_i < 2π / L never completed a turn within the training length L.  FoPE

1. drops the frequencies below 2π / L (`clip`); their pairs get a constant, of cosine 1 and sine `rest_sine`;
2. mixes the others (`series`): per key head, cos'(t) = cos(tω) Bc and sin'(t) = sin(tω) Bs with B = identity + noise of
   standard deviation  gain · sqrt(2 / (n + n))  for n frequencies: the main one, and a little of all others;
3. turns q and k as RoPE does, with these tables; a query uses those of the key head that it asks.

The coefficients are drawn once, from `seed`, the same for all layers, and are not trained.  They are stored with every
layer, 2 n² + n numbers of 4 bytes per key head: 125 kB per layer for 8 key heads of width 128 that keep 44 frequencies.

Converting is not lossless: with a gain the scores of a trained model change, and with a clip they change at far
distances; a short training afterwards is part of the method.  Gain 0 without a clip is RoPE, bit for bit.  Positions
are not relative any more: the score at a fixed distance varies with the place, by design, so cached keys cannot be
moved.

Departures from the authors' code: B is square, where theirs may be n x d/4 and then gives the identity to half of the
columns only.  The constant sine is 1 as theirs (a fixed 45 degrees and a factor of √2; they call it deliberate); 0,
which some ports of it use, leaves these pairs as they are.

Source: Hua et al., Fourier Position Embedding: Enhancing Attention's Periodic Extension for Length Generalization,
2024, section 4 (arXiv 2412.17739).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersely.anatomy import Unit
from tersely.convert.base import check_attention
from tersely.errors import AnatomyError, RecipeError
from tersely.kinds import DenseLinear, Kind
from tersely.kinds.attention import LINEARS, Attention, AttentionSettings, PositionTables, linear_of


@dataclass(frozen=True)
class FoPE:
    gain: float = 0.1
    """Weight of the other frequencies in a pair (no unit).  The paper trains from scratch with 0.3 to 0.6; 0.1 is what
    code for training trained models has as its example."""

    seed: int = 0
    """Of the coefficients."""

    train_length: int | None = None
    """Tokens of the longest text that the model was trained on, for the clip.  None: what its configuration says."""

    clip: bool = True
    """Whether frequencies that never completed a turn in training are dropped."""

    series: bool = True
    """Whether frequencies are mixed at all."""

    rest_sine: Literal[0, 1] = 1
    """Sine of the pairs that do not turn: 1 as the authors have it, or 0."""

    paper: ClassVar[str] = "Hua et al., 2024, Fourier Position Embedding (arXiv 2412.17739)"
    summary: ClassVar[str] = "rotary positions as Fourier series, slow frequencies held still; train afterwards"
    roles: ClassVar[tuple[str, ...]] = ("attention",)

    def __post_init__(self) -> None:
        if not 0 <= self.gain < math.inf:
            raise RecipeError(f"fope: gain {self.gain}; wanted 0 or more")
        if self.train_length is not None and self.train_length < 1:
            raise RecipeError(f"fope: train_length {self.train_length}; wanted a number of tokens")
        if self.rest_sine not in (0, 1):
            raise RecipeError(f"fope: rest_sine {self.rest_sine}; wanted 0 or 1")

    def check(self, unit: Unit, attention: AttentionSettings) -> None:
        check_attention(unit)
        self.tables(attention)  # refuses a length in which nothing turns

    def convert(
        self, unit: Unit, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], attention: AttentionSettings
    ) -> dict[str, Kind]:
        linears: dict[str, nn.Module] = {
            role: linear_of(weights[role], biases.get(role)) for role in LINEARS if role != "o"
        }
        # all shapes are the stock ones: this kind holds the guard that makes a stock reader refuse the folder
        linears["o"] = DenseLinear.from_weight(weights["o"], biases.get("o"))
        tables = self.tables(attention).to(weights["q"].device)
        return {"": Attention.of(attention.shape, tables, linears, weights)}

    def tables(self, attention: AttentionSettings) -> PositionTables:
        """The tables of every layer."""
        frequencies = torch.tensor(attention.frequencies, dtype=torch.float32)
        pairs = len(frequencies)
        if self.clip:
            length = self.train_length or attention.train_length
            # they fall, so that those kept keep their pairs
            frequencies = frequencies[frequencies >= 2 * math.pi / length]
            if not len(frequencies):
                raise AnatomyError(
                    f"fope: none of the {pairs} rotary frequencies completes a turn in {length} tokens; give the real "
                    "train_length"
                )
        sets = attention.shape.key_value_heads if self.series else 1
        return PositionTables.of(
            frequencies.expand(sets, -1),
            pairs=pairs,
            series=self._coefficients(sets, len(frequencies)) if self.series else None,
            rest_sine=float(self.rest_sine),
            scaling=attention.table_scaling,
        )

    def _coefficients(
        self, sets: int, count: int
    ) -> tuple[Float[Tensor, "sets frequencies out"], Float[Tensor, "sets frequencies out"]]:
        """Of cosine and sine, for every key head."""
        generator = torch.Generator().manual_seed(self.seed)
        deviation = self.gain * math.sqrt(2 / (count + count))
        noise = torch.randn(2, sets, count, count, generator=generator, dtype=torch.float32) * deviation
        cosine, sine = noise + torch.eye(count)
        return cosine, sine

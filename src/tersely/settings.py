"""The tables of a recipe that are no steps: what is calibrated on, what is measured, how blocks are refined."""

import math
from dataclasses import dataclass, field
from typing import Literal

from pydantic import ConfigDict

from tersely.errors import RecipeError


def check_seed(said: str, seed: int) -> None:
    """Raises RecipeError for a number that no generator takes; `said` is how it was given."""
    if not 0 <= seed < 2**63:
        raise RecipeError(f"{said} {seed}; wanted 0 or more, below 2^63")


@dataclass(frozen=True)
class Calibration:
    """The text that shows what inputs look like."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    source: list[str] = field(default_factory=lambda: ["stdlib"])
    """Texts, as `tersely.text.read_text` takes them; joined by two newlines."""

    samples: int = 128
    """Windows to observe; the text may hold fewer."""

    length: int | None = None
    """Tokens in a window; by default the model's training window, else min(2048, its context)."""

    order: Literal["random", "first"] = "random"
    """Which windows: drawn without replacement by the seed, or the first ones of the text."""

    own_text: float = 0.0
    """Share of the windows that the model itself writes (see `tersely.own_text`), in the place of as many of the
    text."""

    def written(self, read: int | None = None) -> int:
        """Windows that the model writes: beside so many of the text, where that holds fewer than were asked for."""
        whole = min(round(self.own_text * self.samples), self.samples - 1)
        if read is None or read + whole >= self.samples:
            return whole
        return round(read * self.own_text / (1 - self.own_text))

    def __post_init__(self) -> None:
        if not self.source:
            raise RecipeError("calibration: an empty list of sources; name at least one text, or stdlib")
        if self.samples < 1:
            raise RecipeError(f"calibration: samples = {self.samples}; wanted 1 or more windows")
        if self.length is not None and self.length < 2:
            raise RecipeError(f"calibration: length = {self.length}; wanted 2 or more tokens")
        if not 0 <= self.own_text < 1:
            raise RecipeError(f"calibration: own_text = {self.own_text}; wanted 0 or more, below 1, a share")


@dataclass(frozen=True)
class Evaluation:
    """What the result is measured on, beside the dense model, once it is written; nothing by default."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    text: list[str] = field(default_factory=list)
    """Texts, as `tersely.text.read_text` takes them, each measured on its own."""

    length: int | None = None
    """Tokens in a window; by default the model's training window, else min(2048, its context)."""

    windows: int | None = None
    """Only the first so many windows of each text."""

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 2:
            raise RecipeError(f"evaluation: length = {self.length}; wanted 2 or more tokens")
        if self.windows is not None and self.windows < 1:
            raise RecipeError(f"evaluation: windows = {self.windows}; wanted 1 or more")


@dataclass(frozen=True)
class Refinement:
    """Gradient descent on each block once it is compressed, towards what the block gave before (see `refine`)."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    epochs: int = 10
    """Passes over the windows at most."""

    rate: float = 3e-3
    """Largest learning rate; it falls to zero along a half cosine.  Best of four on a model of width 128; wider ones
    want less (the paper: 1e-4 for widths of 4096)."""

    code_rate: float | None = None
    """Largest learning rate of quantized weights, in steps of the grid, and of the ends of its ranges, as shares of
    them; None: that at which signs take a code half a step in all."""

    optimiser: Literal["adam", "sign"] = "adam"
    """AdamW, or steps along the signs of the gradient."""

    batch: int = 8
    """Windows in a step of the optimiser."""

    decay: float = 0.0
    """Weight decay of matrices; vectors have none."""

    held_out: float = 0.125
    """Share of the batches that are not trained on but decide which numbers stay."""

    patience: int | None = None
    """Passes without a new best on the windows held out after which a block is done; None: 3, and never early where
    codes train, which settle only when the rate has fallen."""

    text: list[str] | None = None
    """Texts to train on; by default the calibration texts."""

    samples: int | None = None
    """Windows of them; by default as many as for calibration."""

    def __post_init__(self) -> None:
        for what in ("epochs", "batch", "patience"):
            value = getattr(self, what)
            if value is not None and value < 1:
                raise RecipeError(f"refine: {what} = {value}; wanted 1 or more")
        if not 0 < self.rate < math.inf:
            raise RecipeError(f"refine: rate = {self.rate}; wanted above 0")
        if self.code_rate is not None and not 0 < self.code_rate < math.inf:
            raise RecipeError(f"refine: code_rate = {self.code_rate}; wanted above 0")
        if self.optimiser not in ("adam", "sign"):
            raise RecipeError(f"refine: optimiser = {self.optimiser!r}; wanted adam or sign")
        if not 0 <= self.decay < math.inf:
            raise RecipeError(f"refine: decay = {self.decay}; wanted 0 or more")
        if not 0 < self.held_out <= 0.5:
            raise RecipeError(f"refine: held_out = {self.held_out}; wanted above 0 and at most 0.5, a share")
        if self.text is not None and not self.text:
            raise RecipeError("refine: an empty list of texts; name at least one, or leave it out")
        if self.samples is not None and self.samples < 1:
            raise RecipeError(f"refine: samples = {self.samples}; wanted 1 or more windows")

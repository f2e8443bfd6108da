"""How long and how fast to train."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from tersely.errors import RecipeError

Schedule = Literal["cosine", "linear", "constant"]
Optimiser = Literal["adam", "sign"]


@dataclass(frozen=True)
class Training:
    """Length, speed, and how often to look and to save."""

    tokens: int = 1_000_000
    """Tokens to see, the same ones again where the text is shorter; rounded up to whole steps."""

    batch: int = 8
    """Windows in a step."""

    at_once: int | None = None
    """Windows in one forward pass; fewer than `batch` need less memory and give the same gradient.  None: all."""

    rate: float = 1e-3
    """Largest learning rate of weights and adapters."""

    quantizer_rate: float | None = None
    """Largest learning rate of step sizes and widths; None: `rate`."""

    optimiser: Optimiser = "adam"
    """AdamW, or steps along the signs of the gradient, all numbers moving by the rate."""

    schedule: Schedule = "cosine"
    """How the rate falls after the warm-up: to zero along a half cosine or a line, or not at all."""

    warmup: float = 0.03
    """Share of the steps in which the rate rises from zero."""

    decay: float = 0.0
    """Weight decay, decoupled, of matrices; vectors and scalars have none."""

    clip: float = 1.0
    """Largest norm of the whole gradient; 0: unlimited."""

    held_out: int = 16
    """Windows that are not trained on but measured; 0: none."""

    evaluate_every: int = 100
    """Steps between two measurements of the windows held out."""

    patience: int = 0
    """Measurements without a new best after which training stops; then, and at the end, the best numbers are taken
    back, those of the start included.  0: never, and the last numbers stay, as relaxations with phases or a budget
    want it."""

    save_every: int = 100
    """Steps between two commits of what a resumed run needs."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "evaluate_every", "save_every"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("held_out", "patience", "clip", "decay"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "0 or more")
        _require("at_once", self.at_once, self.at_once is None or self.at_once >= 1, "1 or more")
        _require("rate", self.rate, 0 < self.rate < math.inf, "above 0")
        quantizer_rate = self.quantizer_rate
        _require("quantizer_rate", quantizer_rate, quantizer_rate is None or 0 < quantizer_rate < math.inf, "above 0")
        _require("warmup", self.warmup, 0 <= self.warmup < 1, "0 or more, below 1")
        _require("optimiser", self.optimiser, self.optimiser in get_args(Optimiser), f"one of {get_args(Optimiser)}")
        _require("schedule", self.schedule, self.schedule in get_args(Schedule), f"one of {get_args(Schedule)}")
        _require("patience", self.patience, not self.patience or bool(self.held_out), "0 where no windows are held out")

    def steps(self, length: int) -> int:
        """Steps with windows of this many tokens."""
        return -(-self.tokens // (self.batch * length))

    def factor(self, step: int, steps: int) -> float:
        """Share of the largest rate that holds in step `step` (from 0)."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / (steps - warm)
        return {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[self.schedule]


def _require(name: str, value: object, holds: bool, wanted: str) -> None:
    if not holds:
        raise RecipeError(f"training: {name} = {value!r}; wanted {wanted}")

"""An update in the form of a singular value decomposition, beside a weight whose weakest directions are dropped.

    y = W_world x + η ΔU diag(σ) ΔVᵀ x,    W_world = Σ_{i ≤ min(m,n)-r} σᵢ uᵢ vᵢᵀ,    η = alpha / rank

ΔU (m × r) begins as zero, so that training begins at W_world and not at W: ‖W - W_world‖² is the sum of the r smallest
squared singular values.  The diagonal σ, drawn from a normal distribution, can switch directions of the update on and
off.  Each module adds to the loss, divided by the number of modules,

    beta ‖σ‖² + gamma (‖ΔUᵀΔU - I‖_F + ‖ΔVᵀΔV - I‖_F).

On a compressed linear there is nothing left to drop: `truncate = false` takes it as W_world and begins exactly there.

Differs from the authors' code: theirs drops the components beyond in_features - r, which for an output narrower than
the input is none; ours counts from min(m, n), as the paper says.  Theirs compares the outer products, n × n, with the
identity; since ‖AᵀA - I_n‖² = ‖AAᵀ - I_r‖² + (n - r) it has the same minimum, with a gradient that is weaker by
g / √(g² + n - r), g = ‖AAᵀ - I_r‖; ours takes the inner ones, r × r, so a gamma of theirs is to be made smaller.
What was dropped is kept beside the update: W_world + update is also W + (an update of rank 2r), which is what
`update` gives and what can be put on the original weight.

Source: Wang et al., KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models, 2024, section 3
(arXiv 2412.06071).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from tersely.errors import NumericalError, RecipeError
from tersely.stats import Statistic, Stats
from tersely.train.relax.adapter import (
    Dropout,
    absorb,
    absorbed_bits,
    check_update,
    check_width,
    kaiming_rows,
    learns_no_size,
    master,
    shape_of,
)
from tersely.train.relax.base import Relaxed


@dataclass(frozen=True)
class KnowledgeAdapter:
    rank: int = 8
    """Width of the update, and how many of the weakest singular directions are dropped."""

    alpha: float = 16.0
    """The update is scaled by alpha / rank."""

    dropout: float = 0.0
    """Share of the update's inputs that is set to zero while training, the others scaled up."""

    beta: float = 1e-4
    """Weight of the squared singular values of the update in the loss; the paper tunes it between 1e-4 and 1."""

    gamma: float = 1e-3
    """Weight of the distance of ΔU and ΔV from orthonormal; the paper tunes it between 1e-5 and 1, for a form whose
    gradient is weaker by an order of magnitude."""

    truncate: bool = True
    """Drop the weakest directions first; false takes the linear as it is, for one that is compressed already."""

    merge: bool = True
    """Take the update into the weight, or into the factors, where that is exact; else keep it apart, as a sum."""

    paper: ClassVar[str] = (
        "Wang et al., 2024, KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models (arXiv 2412.06071)"
    )
    summary: ClassVar[str] = "update with singular values of its own, beside weights without their weakest directions"

    def __post_init__(self) -> None:
        check_update("kasa", self.rank, self.alpha, self.dropout)
        for name in ("beta", "gamma"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(f"kasa: {name} = {getattr(self, name)}; wanted 0 or more")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return ()

    @property
    def leaves(self) -> tuple[str, ...] | None:
        return None if self.merge else ("terms.0", "terms.1.down", "terms.1.up")

    def check(
        self, shapes: Sequence[tuple[int, int]], kinds: Sequence[tuple[int, int]], packed: int, bits: float | None
    ) -> None:
        learns_no_size("kasa", bits)
        if self.truncate and kinds:
            raise RecipeError(
                f"kasa: of the targets {len(kinds)} are something else than a plain linear; what is compressed already "
                "and cannot be truncated wants truncate = false"
            )
        for shape in shapes if self.truncate else ():
            _check_rank(self.rank, shape)
        check_width("kasa", self.rank, [*shapes, *kinds])

    def relax(self, linear: nn.Module, stats: Stats, generator: torch.Generator) -> "KnowledgeAdapted":
        if self.truncate and not isinstance(linear, nn.Linear | Conv1D):
            raise RecipeError(
                f"kasa: a {type(linear).__name__} is compressed already and cannot be truncated; say truncate = false"
            )
        if self.truncate:
            _check_rank(self.rank, shape_of(linear))
        return KnowledgeAdapted(linear, self, generator)

    def budget(self, modules: Sequence[Relaxed], bits: float | None) -> Tensor:
        return modules[0].bits().new_zeros(())


def _check_rank(rank: int, shape: tuple[int, int]) -> None:
    if rank >= min(shape):
        raise RecipeError(
            f"kasa: dropping {rank} directions of a weight of shape {tuple(shape)} leaves nothing; choose a smaller "
            "rank, or truncate = false"
        )


class KnowledgeAdapted(Relaxed):
    """base(x) + η up (values ⊙ (down (dropout x))); the base is W_world."""

    dropped_up: Tensor
    dropped_down: Tensor

    def __init__(self, linear: nn.Module, asked: KnowledgeAdapter, generator: torch.Generator) -> None:
        super().__init__()
        out_features, in_features = shape_of(linear)
        like = master(linear)
        self.scale = asked.alpha / asked.rank
        self._asked = asked
        self._dropout = Dropout(asked.dropout, generator)
        # what `linear` has and `base` has not, as factors; made again from `linear`, hence not part of a saved state
        up, down = weakest(linear, asked.rank if asked.truncate else 0)
        self.register_buffer("dropped_up", up.to(like), persistent=False)
        self.register_buffer("dropped_down", down.to(like), persistent=False)
        self.base = absorb(linear, -up, down) if asked.truncate else linear
        self.down = nn.Parameter(kaiming_rows(asked.rank, in_features, generator).to(like))
        drawn = torch.randn(asked.rank, dtype=torch.float64, generator=generator, device=generator.device)
        self.values = nn.Parameter(drawn.to(like))
        self.up = nn.Parameter(like.new_zeros(out_features, asked.rank))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        inner = functional.linear(self._dropout(x.to(self.down)), self.down) * self.values
        return (y + self.scale * functional.linear(inner, self.up)).to(y.dtype)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"adapters": [self.down, self.values, self.up]}

    def penalty(self) -> Tensor:
        crooked = distance_from_orthonormal(self.up.T) + distance_from_orthonormal(self.down)
        return self._asked.beta * self.values.square().sum() + self._asked.gamma * crooked

    def update(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Factors, detached, of what is to be added to the *original* linear: of rank 2r where it was truncated."""
        up = torch.cat([self._scaled_up(), -self.dropped_up], dim=1)
        return up, torch.cat([self.down.detach(), self.dropped_down], dim=0)

    def harden(self) -> nn.Module:
        return absorb(self.base, self._scaled_up(), self.down.detach(), merge=self._asked.merge)

    def bits(self) -> Tensor:
        return absorbed_bits(self.base, len(self.down), merge=self._asked.merge).to(self.up.device)

    def _scaled_up(self) -> Float[Tensor, "out rank"]:
        return self.scale * self.up.detach() * self.values.detach()


def distance_from_orthonormal(rows: Float[Tensor, "rank width"]) -> Float[Tensor, ""]:
    """‖R Rᵀ - I‖_F."""
    return torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))


def weakest(linear: nn.Module, rank: int) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """The `rank` smallest singular directions of a plain linear's weight as two factors, float64; of any linear, for
    rank 0, two empty ones."""
    if rank == 0:
        out_features, in_features = shape_of(linear)
        return torch.empty(out_features, 0, dtype=torch.float64), torch.empty(0, in_features, dtype=torch.float64)
    weight = linear.get_parameter("weight").detach().double()
    if not torch.isfinite(weight).all():
        raise NumericalError("a weight to be truncated is not finite; check the checkpoint")
    u, s, vt = torch.linalg.svd(weight.T if isinstance(linear, Conv1D) else weight, full_matrices=False)
    return u[:, -rank:] * s[-rank:], vt[-rank:]

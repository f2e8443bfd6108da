"""What training minimises.

An objective is a frozen dataclass; called with the outputs of student and teacher and with the tokens they were made
from, it gives a scalar, the mean over positions.  Softmaxes are taken in float32 or better, whatever the model computes
in.

`Logits`: p is the teacher's distribution over the next token, q the student's, both of the logits divided by the
temperature τ, and λ is `mix`:

    forward     τ² KL(p ‖ λp + (1-λ)q)                       covers everything the teacher deems possible
    reverse     τ² KL(q ‖ λq + (1-λ)p)                       settles on what the teacher deems likely
    symmetric   τ² [λ KL(q ‖ m) + (1-λ) KL(p ‖ m)]           m = λq + (1-λ)p; Jensen and Shannon's for λ = ½

The factor τ² keeps the size of the gradients, which shrink by 1/τ in the logits and by another 1/τ in p - q.  The
gradient of the plain forward form in the student's logits is q - p at τ = 1.

Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2 (arXiv 1503.02531); the skewed
forms: Ko et al., DistiLLM: Towards Streamlined Distillation for Large Language Models, 2024, section 3.1
(arXiv 2402.03898).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tersely.errors import AnatomyError, RecipeError

Divergence = Literal["forward", "reverse", "symmetric"]

LOGITS_AT_ONCE = 2**18
"""How many logits are compared at once: what a core keeps at hand.  Elsewhere than on the CPU 64 times as many, where
each call costs more than its numbers."""

_NOTHING = -1e4  # logarithm of a probability that is zero in every dtype


class Objective(Protocol):
    summary: ClassVar[str]
    """One line for listings."""

    teaches: ClassVar[bool]
    """Whether it compares with a teacher."""

    def __call__(self, student: Any, teacher: Any, tokens: Int[Tensor, "windows length"]) -> Float[Tensor, ""]:
        """The loss: outputs of transformers, of the student and of the teacher (None without one), for `tokens`."""


@dataclass(frozen=True)
class Tokens:
    """Cross entropy of the next token, nats; the first token of a window is not predicted."""

    summary: ClassVar[str] = "cross entropy of the next token"
    teaches: ClassVar[bool] = False

    def __call__(self, student: Any, teacher: Any, tokens: Int[Tensor, "windows length"]) -> Float[Tensor, ""]:
        logits = _precise(student.logits[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@dataclass(frozen=True)
class Logits:
    """Divergence between the teacher's and the student's next token, nats, over all positions."""

    temperature: float = 1.0
    """Both softmaxes are of logits divided by it."""

    divergence: Divergence = "forward"
    """Which way the two distributions are compared."""

    mix: float = 0.0
    """How much of the other distribution is mixed in, 0 to below 1; `symmetric` wants more than 0."""

    summary: ClassVar[str] = "divergence from the dense model's distribution of the next token"
    teaches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise RecipeError(f"logits: temperature = {self.temperature}; wanted above 0")
        if self.divergence not in get_args(Divergence):
            raise RecipeError(f"logits: divergence = {self.divergence!r}; wanted one of {get_args(Divergence)}")
        if not 0 <= self.mix < 1:
            raise RecipeError(f"logits: mix = {self.mix}; wanted 0 or more, below 1")
        if self.divergence == "symmetric" and self.mix == 0:
            raise RecipeError("logits: symmetric with mix = 0 compares the teacher with itself; 0.5 is usual")

    def __call__(self, student: Any, teacher: Any, tokens: Int[Tensor, "windows length"]) -> Float[Tensor, ""]:
        if student.logits.shape != teacher.logits.shape:
            raise AnatomyError(
                f"the student gives logits of shape {tuple(student.logits.shape)}, the teacher "
                f"{tuple(teacher.logits.shape)}; both must know the same tokens"
            )
        rows = student.logits.flatten(0, -2), teacher.logits.flatten(0, -2)
        return self.temperature**2 * _InParts.apply(self._of, *rows).mean()

    def _of(self, student: Tensor, teacher: Tensor) -> Float[Tensor, "*positions"]:
        """The divergence at every position, from logits, without the factor."""
        wanted, given = _possible(self._distribution(teacher), self._distribution(student))
        match self.divergence:
            case "forward":
                return _divergence(wanted, self._mixed(given, wanted))
            case "reverse":
                return _divergence(given, self._mixed(wanted, given))
            case "symmetric":
                middle = self._mixed(wanted, given)
                return self.mix * _divergence(given, middle) + (1 - self.mix) * _divergence(wanted, middle)

    def _distribution(self, logits: Float[Tensor, "*positions vocabulary"]) -> Float[Tensor, "*positions vocabulary"]:
        return (_precise(logits) / self.temperature).log_softmax(-1)

    def _mixed(self, first: Tensor, second: Tensor) -> Tensor:
        """The first distribution with `mix` of the second in it; all are logarithms."""
        if self.mix == 0:
            return first
        return torch.logaddexp(first + math.log1p(-self.mix), second + math.log(self.mix))


OBJECTIVES: dict[str, type[Objective]] = {
    "logits": Logits,
    "tokens": Tokens,
}


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _possible(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of two distributions without what both deem impossible (a padded vocabulary): such a token adds
    nothing to a divergence, but the difference of two infinities would spoil its gradient."""
    impossible = (first == -math.inf) & (second == -math.inf)
    return first.masked_fill(impossible, _NOTHING), second.masked_fill(impossible, _NOTHING)


def _divergence(first: Tensor, second: Tensor) -> Float[Tensor, "*positions"]:
    """KL at every position between distributions given by their logarithms; infinite where the second deems impossible
    what the first does not."""
    difference = (first - second).masked_fill(first == -math.inf, 0)
    return (first.exp() * difference).sum(-1)


class _InParts(torch.autograd.Function):
    """A value per row of logits, a few rows at once, and with it already its gradient in the first of two logits.

    A dozen tensors as large as the logits come between logits and divergence.  Here they are as large as a few rows,
    which stay in the cache, and only the gradient is kept until it is asked for.
    """

    @staticmethod
    def forward(
        context: Any,
        value_of: Callable[[Tensor, Tensor], Tensor],
        student: Float[Tensor, "rows vocabulary"],
        teacher: Float[Tensor, "rows vocabulary"],
    ) -> Float[Tensor, " rows"]:
        learns = context.needs_input_grad[1]
        at_once = max(1, LOGITS_AT_ONCE * (1 if student.device.type == "cpu" else 64) // student.shape[-1])
        gradient = torch.empty_like(student) if learns else student.new_empty(0)
        values = []
        for first in range(0, len(student), at_once):
            part = slice(first, first + at_once)
            with torch.set_grad_enabled(learns):
                ours = student[part].detach().requires_grad_(learns)
                value = value_of(ours, teacher[part])
            if learns:
                (gradient[part],) = torch.autograd.grad(value, ours, torch.ones_like(value))
            values.append(value.detach())
        context.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(context: Any, upstream: Float[Tensor, " rows"]) -> tuple[None, Tensor, None]:
        (gradient,) = context.saved_tensors
        return None, gradient * upstream[:, None].to(gradient.dtype), None

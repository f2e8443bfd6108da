"""Where heads look, how concentrated that is, and the dynamics that the JoMA theory predicts for it.

*Of a model*, for every head, over queries t with the keys that they may see:

    entropy           mean over t of  -Σ_j a_tj ln a_tj  (natural logarithm), each head for itself
    uniform           what it would be if a query looked at all of its keys alike, mean ln(number of keys)
    without sink      the same entropy of what is left, renormalised, when the first token is taken out
    sink              mean attention paid to the first token
    peaked            share of queries that give more than `PEAK` to one key

The first query of a causal model sees itself alone and is left out.  Entropy depends on the length of the windows.  A
head is flagged *sink-only* (it could be removed), *sparse* (it could do with a few keys) or *dense* (it could be a
running mean).  The stable rank of the first MLP matrix of a block is measured beside it, since the theory ties the two.

*Of the theory.*  For one query, a contextual token l of frequency x_l, attention logits z and K hidden nodes with
inputs v_k (one coordinate for each token), attention b = x e^{z/τ} (exp), or b = x z (linear), gradient flow conserves

    exp:  z_l - Σ_k v_kl² / 2τ            linear:  z_l² - Σ_k v_kl²

so that attention follows from the MLP's weights and can be left out of the dynamics.  With a linear MLP,
v̇_l = Δ_l e^{v_l²/2}: erf(v_l/√2)/Δ_l is the same for all tokens, the largest |Δ| blows up at √(π/2)/|Δ|, attention
only ever gets sparser.  With targets μ, v̇_l = (μ_l - v_l) e^{v_l²/2}, and δ_l = 1 - v_l/μ_l obeys
ln(1/δ_l) = ∫ e^{v_l²/2} dt: salient tokens converge first, then the others, and entropy falls, reaches a minimum, and
rises.  The functions below simulate these, in float64; that their identities hold is tested.

Differences from the authors' code: entropy per head (theirs averages heads first, which overestimates it), 0 ln 0 = 0
instead of an added 1e-8, and masked keys are no keys.

Source: Tian et al., JoMA: Demystifying Multilayer Transformers via Joint Dynamics of MLP and Attention, 2024
(arXiv 2310.00535).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tersely.anatomy import FAMILIES, Anatomy, model_class
from tersely.checkpoint import check_finite
from tersely.diagnose.base import Row, Subject, row
from tersely.diagnose.spectra import spectrum
from tersely.errors import AnatomyError, NumericalError
from tersely.kinds import dense_weight
from tersely.linalg.truncation import output_basis

PEAK = 0.9
"""Share of a query's attention on one key, beyond which the query counts as peaked."""

SINK_ONLY, SPARSE, DENSE = 0.95, 0.25, 0.9
"""Flags: sink above the first; entropy below the second or above the third of that of uniform attention."""

AT_ONCE = 2**26
"""Attention probabilities of the whole model in one forward pass: 256 MB."""

Attention = Literal["linear", "exp", "softmax"]

# --- what heads of a model do -----------------------------------------------------------------------------------------


class HeadSums:
    """The measures of all heads of one layer, added up over batches."""

    def __init__(self, heads: int) -> None:
        self._sums = torch.zeros(heads, 4, dtype=torch.float64)
        self._without = torch.zeros(heads, 2, dtype=torch.float64)
        self._uniform = 0.0
        self._queries = 0

    def update(self, attention: Float[Tensor, "batch heads queries keys"]) -> None:
        """Add a batch.  Raises NumericalError for entries that are not finite."""
        a = attention.detach().double()
        if not torch.isfinite(a).all():
            raise NumericalError("attention probabilities are not finite; run in bfloat16 or float32")
        keys = (a.amax((0, 1)) > 0).sum(-1)  # what a mask hides is exactly zero, for every head and sequence
        if keys[0] == 1:
            a, keys = a[:, :, 1:], keys[1:]
        entropy = -torch.xlogy(a, a).sum(-1)
        peaked = (a.amax(-1) > PEAK).double()
        sink = a[..., 0]
        rest = a[..., 1:].sum(-1)
        looks = rest > 0
        shares = a[..., 1:] / rest.clamp(min=torch.finfo(rest.dtype).tiny)[..., None]
        without = torch.where(looks, -torch.xlogy(shares, shares).sum(-1), 0)
        ones = torch.ones_like(sink)
        self._sums += torch.stack([each.sum((0, 2)) for each in (entropy, sink, peaked, ones)], 1).cpu()
        self._without += torch.stack([each.sum((0, 2)) for each in (without, looks.double())], 1).cpu()
        self._uniform += keys.double().log().sum().item() * len(a)
        self._queries += len(keys) * len(a)

    def heads(self) -> list["Head"]:
        found = []
        for (entropy, sink, peaked, count), (without, looking) in zip(
            self._sums.tolist(), self._without.tolist(), strict=True
        ):
            uniform = self._uniform / max(self._queries, 1)
            rest = without / looking if looking else None
            count = max(count, 1)
            found.append(Head(entropy / count, uniform, rest, sink / count, peaked / count))
        return found


@dataclass(frozen=True)
class Head:
    """Means over queries; entropies in nats, `without_sink` None for a head that never looks elsewhere."""

    entropy: float
    uniform: float
    without_sink: float | None
    sink: float
    peaked: float

    @property
    def flag(self) -> str | None:
        if self.sink > SINK_ONLY:
            return "sink-only"
        if self.entropy < SPARSE * self.uniform:
            return "sparse"
        return "dense" if self.entropy > DENSE * self.uniform else None


def look(subject: Subject) -> list[Row]:
    """The heads of every layer, and the stable rank of its first MLP matrix.  The whole model is in memory.

    Raises AnatomyError for a model that does not hand out its attention probabilities.
    """
    source = subject.source
    try:
        opened: Any = model_class(source.config).from_pretrained(
            source.folder, dtype=source.dtype, attn_implementation="eager"
        )
    except ValueError as error:
        raise AnatomyError(
            f"{subject.anatomy.family} models cannot be run with eager attention, which attention measures need "
            f"({str(error).partition(chr(10))[0]})"
        ) from error
    check_finite(source.folder, opened.state_dict())
    model = opened.to(subject.device).eval()
    rows = []
    for index, (block, heads) in enumerate(zip(subject.anatomy.blocks, watch(model, subject.windows), strict=True)):
        for number, head in enumerate(heads):
            name = f"{block}:head.{number}"
            rows += [
                row(name, "entropy", head.entropy, "nats"),
                row(name, "uniform", head.uniform, "nats"),
                row(name, "without sink", head.without_sink, "nats"),
                row(name, "sink", head.sink, "share of attention"),
                row(name, "peaked", head.peaked, "share of queries"),
                row(name, "flag", head.flag),
            ]
        mean = sum(head.entropy for head in heads) / len(heads)
        rows.append(row(block, "entropy", mean, "nats"))
        rows.append(row(block, "stable rank", stable_rank_of_mlp(model, subject.anatomy, index)))
    return rows


@torch.no_grad()
def watch(model: PreTrainedModel, windows: Tensor) -> list[list[Head]]:
    """Layer by layer the heads of a model that was opened with eager attention.

    Raises AnatomyError where it returns no probabilities, NumericalError where they are not finite.
    """
    layers: list[HeadSums] = []
    settings = model.config.get_text_config()
    matrices = settings.num_hidden_layers * settings.num_attention_heads * windows.shape[1] ** 2
    for rows in windows.split(max(1, AT_ONCE // matrices)):
        out = model(rows.to(model.device), output_attentions=True, use_cache=False)
        if not out.attentions or any(attention is None for attention in out.attentions):
            raise AnatomyError(
                f"{type(model).__name__} returned no attention probabilities; only attention that is computed eagerly "
                "can be measured"
            )
        layers = layers or [HeadSums(attention.shape[1]) for attention in out.attentions]
        for layer, attention in zip(layers, out.attentions, strict=True):
            layer.update(attention)
    return [layer.heads() for layer in layers]


def stable_rank_of_mlp(model: nn.Module, anatomy: Anatomy, block: int) -> float | None:
    """Of the first MLP matrix (gate, or up where there is none); None for a mixture of experts."""
    linears = FAMILIES[anatomy.family].linears
    paths = [path for role, path in linears.items() if role.startswith("mlp.")]
    modules = dict(model.get_submodule(anatomy.blocks[block]).named_modules())
    if not paths or paths[0] not in modules:
        return None
    return spectrum(output_basis(dense_weight(modules[paths[0]]), vectors=False).energy).stable_rank


# --- what the theory says ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joint:
    """The course of a training, start included: the MLP's weights v, and the attention logits z."""

    nodes: Float[Tensor, "moments nodes tokens"]
    logits: Float[Tensor, "moments tokens"]


def attention_of(
    kind: Attention, frequencies: Float[Tensor, "*samples tokens"], logits: Float[Tensor, " tokens"], temperature: float
) -> Float[Tensor, "*samples tokens"]:
    if kind == "linear":
        return frequencies * logits / temperature
    weights = frequencies * (logits / temperature).exp()
    return weights / weights.sum(-1, keepdim=True) if kind == "softmax" else weights


def train_jointly(
    frequencies: Float[Tensor, "samples tokens"],
    targets: Float[Tensor, "samples nodes"],
    kind: Attention,
    activation: Callable[[Tensor], Tensor],
    *,
    rate: float,
    steps: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Joint:
    """Gradient descent on ½ mean Σ_k (φ(v_k · b + c_k) - target_k)² over v, c (the query's own coordinate) and z.

    As `rate` falls with rate · steps fixed, it becomes the gradient flow of which the theory speaks.
    """
    shape = targets.shape[1], frequencies.shape[1]
    nodes = (0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    own = torch.zeros(shape[0], dtype=torch.float64, requires_grad=True)
    logits = (1 + 0.3 * torch.randn(shape[1], generator=generator, dtype=torch.float64)).requires_grad_()
    course: list[tuple[Tensor, Tensor]] = [(nodes.detach().clone(), logits.detach().clone())]
    for _ in range(steps):
        attention = attention_of(kind, frequencies, logits, temperature)
        loss = (activation(attention @ nodes.T + own) - targets).square().sum(1).mean() / 2
        gradients = torch.autograd.grad(loss, (nodes, own, logits))
        with torch.no_grad():
            for parameter, gradient in zip((nodes, own, logits), gradients, strict=True):
                parameter -= rate * gradient
        course.append((nodes.detach().clone(), logits.detach().clone()))
    return Joint(torch.stack([v for v, _ in course]), torch.stack([z for _, z in course]))


def conserved(kind: Attention, course: Joint, temperature: float = 1.0) -> Float[Tensor, "moments tokens"]:
    """What gradient flow does not change, token by token.

    In linear attention the temperature cancels, if it divides the logits.  For softmax only a correlation is left
    (see `logits_from_nodes`), and this raises ValueError.
    """
    squares = course.nodes.square().sum(1)
    if kind == "linear":
        return course.logits.square() - squares
    if kind == "exp":
        return course.logits - squares / (2 * temperature)
    raise ValueError("softmax attention conserves nothing exactly; compare with logits_from_nodes")


def logits_from_nodes(
    course: Joint, attention: Float[Tensor, " tokens"], temperature: float = 1.0
) -> Float[Tensor, " tokens"]:
    """The change of the logits under softmax attention over the whole course, as the MLP's weights predict it, for the
    mean attention of the query; only approximately true."""
    squares = course.nodes.square().sum(1)
    change = squares[-1] - squares[0]
    return (change - change.sum() * attention) / (2 * temperature)


def normalised_correlation(first: Float[Tensor, " n"], second: Float[Tensor, " n"]) -> float:
    """Cosine of the angle between two vectors after their means are taken off; 0 where one of them is constant."""
    first, second = first - first.mean(), second - second.mean()
    norms = (first.norm() * second.norm()).item()
    return (first @ second).item() / norms if norms > 0 else 0.0


def grow(discriminativeness: Float[Tensor, " tokens"], until: float, steps: int) -> Float[Tensor, "moments tokens"]:
    """v(t) of  v̇_l = Δ_l e^{v_l²/2}  from v(0) = 0, by the fourth-order rule of Runge and Kutta.

    `until` must lie before √(π/2) / max |Δ|, where v is infinite; ValueError otherwise.
    """
    blow_up = math.sqrt(math.pi / 2) / discriminativeness.abs().max().item()
    if until >= blow_up:
        raise ValueError(f"v is infinite at t = {blow_up:.4g}; integrate to less than that, not to {until}")
    start = torch.zeros_like(discriminativeness, dtype=torch.float64)
    return _runge_kutta(lambda v: discriminativeness * (v.square() / 2).exp(), start, until, steps)


def converge(
    targets: Float[Tensor, " tokens"], until: float, steps: int
) -> tuple[Float[Tensor, "moments tokens"], Float[Tensor, "moments tokens"]]:
    """v(t) of  v̇_l = (μ_l - v_l) e^{v_l²/2}  from v(0) = 0, and ∫₀ᵗ e^{v_l²/2} ds."""

    def slope(state: Tensor) -> Tensor:
        speed = (state[0].square() / 2).exp()
        return torch.stack([(targets - state[0]) * speed, speed])

    course = _runge_kutta(slope, torch.zeros(2, *targets.shape, dtype=torch.float64), until, steps)
    return course[:, 0], course[:, 1]


def entropy_of_learning(
    targets: Float[Tensor, " tokens"], *, temperature: float = 3.0, rate: float = 0.02, steps: int = 5000
) -> Float[Tensor, " moments"]:
    """Entropy of softmax(v²/temperature) while v moves by rate · (μ - v) · softmax(v²/temperature) a step: the paper's
    toy of attention that gets sparse and then dense again."""
    v = torch.zeros_like(targets, dtype=torch.float64)
    course = []
    for _ in range(steps + 1):
        attention = (v.square() / temperature).softmax(0)
        course.append(-torch.xlogy(attention, attention).sum())
        v = v + rate * (targets - v) * attention
    return torch.stack(course)


def _runge_kutta(slope: Callable[[Tensor], Tensor], start: Tensor, until: float, steps: int) -> Tensor:
    step, states = until / steps, [start]
    for _ in range(steps):
        here = states[-1]
        first = slope(here)
        second = slope(here + step / 2 * first)
        third = slope(here + step / 2 * second)
        fourth = slope(here + step * third)
        states.append(here + step / 6 * (first + 2 * second + 2 * third + fourth))
    return torch.stack(states)

"""How many directions every linear should keep, learned on the whole model by gradient descent.

Whether a direction is kept is a yes or no; a gate makes a number of it.  Behind a truncation position γ, the i-th of
the directions, loudest first, passes with

    T_i = ½ + ½ tanh(β (γ - i + ½)),        i = 1, 2, ...

so that γ of them pass in all, and the loss of the model has a derivative in γ.  Of these numbers, one for each linear,
nothing but γ learns.  What the gates stand in differs:

    truncation   the output Y = X Wᵀ of one window, truncated itself: U T Σ Vᵀ (`linalg.stable_svd`).  No weight of that
                 rank could do better, and none is made; it knows neither method nor statistics.  The paper's.
    gates        the inner side of fixed factors of full rank, as the step's own method makes them on the inputs of the
                 dense model: up · (T ∘ (down · x)).  No decomposition in the loop, and the truncation is the very one
                 that will be done, for every method whose smaller ranks are the first parts of larger ones.

Bytes are those that an option of the method really takes, interpolated between ranks: pivoted or remapped storage has
other prices than two plain factors, and above the dense weight's bytes more directions cost nothing.

    minimise  the loss   over γ with   Σ bytes(γ) = budget,   0 < γ ≤ min(m, n).

The loss of `truncation` is the paper's, exp(cross entropy).  That of `gates` is the divergence from the dense model's
distribution of the next token, which is the same model with all gates open: it says more of every position than the
token that came, and does not reward becoming better at the calibration text than the dense model was.

The paper adds λ |R(γ) - R*| and penalties at both ends of γ, with a λ to be chosen.  Here these hold exactly: from the
gradient the part along the price (its multiplier) is taken away, Adam makes its step, and all γ are shifted alike until
the total is the budget again.  Every step then is a plan of the asked size, and losses of two steps can be compared.
Directions count as shares of all that a weight has, so that one rate serves all shapes.

A window of L tokens has min(L, d) directions where the weight has d = min(m, n); of the outputs the position is γ
min(L, d) / d; the paper's ratio ⌊d / L⌋ is zero for long windows.  Its gates open at i, ours at i - ½, so that Σ T is γ
and not γ - ½.  It keeps the numbers with the lowest loss of a training batch; here some windows are held out, measured
every few steps, and the best there stay, the uniform start among them.

A few dozen scalars, on a surface, with their best kept: not the training loop's business (`train.loop`), which has
weights, no constraints, and a size penalty for a price.

Every step is a unit of the journal: there is nothing random but the order of windows, which follows from the number of
the step, so a run that was stopped ends with the same numbers.  Beside shared statistics, what was learned for a budget
serves every later run.

Source: Wang et al., Dobi-SVD: Differentiable SVD for LLM Compression and Some New Perspectives, 2025, section 3.1 and
their code (arXiv 2502.02723).
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from tersely.allocate import Curve, Learned
from tersely.anatomy import Site
from tersely.calibrate import StatisticsStore
from tersely.checkpoint import Source
from tersely.errors import NumericalError, RecipeError
from tersely.gradients import whole_model
from tersely.journal import Journal
from tersely.kinds import LowRankLinear
from tersely.linalg.stable_svd import gated
from tersely.methods import Method
from tersely.sensitivity import digest_of, identity, remembered
from tersely.stats import Stats
from tersely.targets import SiteTarget, Target, of_site
from tersely.train.data import Batches, hold_out

Shares = numpy.ndarray
"""Of every site the directions that are kept, as a share of all."""

LOSS = {"truncation": "exp of the cross entropy", "gates": "divergence from the dense model"}
"""What is minimised."""

WINDOWS = {"truncation": 32, "gates": 128}
"""Calibration windows, evenly spread over those there are; the paper has 256."""

HELD_OUT = 8
"""One window in so many is held out."""

TOKENS = 1024
"""In a step, at least one window."""

STEPS = {"truncation": 50, "gates": 150}
"""The paper makes 5120; a step without decompositions is cheaper."""

RATES = (0.02, 0.005)
"""Of Adam, at the first and at the last step, as shares of a weight's directions; between them a cosine.  The paper's
go from 5 to 4 of up to 2048 directions; with a hundredth of its steps, ours are larger at first and then smaller."""

SHARPNESS = 1.0
"""β, per direction: a gate opens within two of them, so that every step hears of the directions next to the position.
With the paper's 10 it opens within a fifth of one, and most positions hear of none."""

MEASURED_EVERY = 5
"""Steps between two looks at what is held out."""

DECAYS, TINY = (0.9, 0.999), 1e-12


def gates_at(position: Float[Tensor, ""], count: int) -> Float[Tensor, " count"]:
    """T of the first `count` directions."""
    numbers = torch.arange(count, dtype=position.dtype, device=position.device) + 0.5
    return 0.5 + 0.5 * torch.tanh(SHARPNESS * (position - numbers))


class GatedLinear(nn.Module):
    """A linear whose directions pass a gate at `position`, a number that learns."""

    def __init__(self, directions: int, bias: Tensor | None) -> None:
        super().__init__()
        self.directions = directions
        self.bias = bias
        self.position = torch.zeros((), dtype=torch.float64)
        self.batch: tuple[int, ...] | None = None
        """Windows and tokens of a window that the model is given, where that is known."""


class GatedFactors(GatedLinear):
    """up · (T ∘ (down · x)) + b."""

    def __init__(self, up: Float[Tensor, "out k"], down: Float[Tensor, "k in"], bias: Tensor | None) -> None:
        super().__init__(len(down), bias)
        self._up, self._down = up, down

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        gates = gates_at(self.position, self.directions).to(x.dtype)
        return functional.linear(functional.linear(x, self._down) * gates, self._up, self.bias)


class GatedOutput(GatedLinear):
    """U T Σ Vᵀ + b, with U Σ Vᵀ the product of one window of inputs and the weight.

    For a tall W = Q R this is the truncation of X Rᵀ, times Qᵀ: always the smaller side is decomposed.
    """

    def __init__(self, weight: Float[Tensor, "out in"], bias: Tensor | None) -> None:
        super().__init__(min(weight.shape), bias)
        self._core, self._basis = weight, None
        if weight.shape[0] > weight.shape[1]:
            basis, core = torch.linalg.qr(weight.double())
            self._core, self._basis = core.to(weight.dtype), basis.to(weight.dtype)

    def forward(self, x: Float[Tensor, "*windows tokens in"]) -> Float[Tensor, "*windows tokens out"]:
        # OPT's MLP reads the tokens of all windows as the rows of one matrix
        together = self.batch if x.ndim == 2 and self.batch and len(x) == math.prod(self.batch) else None
        y = functional.linear(x.unflatten(0, together) if together else x, self._core)
        count = min(y.shape[-2:])
        if count:  # an expert may have been sent nothing
            y = gated(y, gates_at(self.position * (count / self.directions), count))
        y = functional.linear(y, self._basis, self.bias) if self._basis is not None else self._shifted(y)
        return y.flatten(0, 1) if together else y

    def _shifted(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Price:
    """Bytes of a site by the number of its directions that are kept: straight between its options."""

    ranks: tuple[float, ...]
    nbytes: tuple[float, ...]
    """Both rise, the former strictly; the last ones are those of all directions."""

    @classmethod
    def of(cls, curve: Curve, directions: int) -> "Price":
        """Raises RecipeError where amounts are not ranks."""
        useful = [option for option in curve.options if option.amount is not None]
        for option in useful:
            if not isinstance(option.amount, int) or not 1 <= option.amount <= directions:
                raise RecipeError(f"{curve.site}: ranks are learned, and this method offers {option.amount!r}")
        points = [(float(option.amount), float(option.nbytes)) for option in useful]
        (before, less), (last, most) = ([(0.0, 0.0), *points])[-2:]
        if last < directions:
            # on as between the last two, until the dense weight is no larger
            slope = (most - less) / (last - before)
            even = last + (curve.dense_bytes - most) / slope
            if even < directions:
                points.append((even, float(curve.dense_bytes)))
            points.append((float(directions), min(most + slope * (directions - last), float(curve.dense_bytes))))
        return cls(tuple(rank for rank, _ in points), tuple(size for _, size in points))

    def at(self, rank: float) -> float:
        """Bytes."""
        return float(numpy.interp(rank, self.ranks, self.nbytes))

    def slope(self, rank: float) -> float:
        """Bytes of one more direction."""
        place = min(max(bisect_right(self.ranks, rank), 1), len(self.ranks) - 1)
        if len(self.ranks) == 1:
            return 0.0
        return (self.nbytes[place] - self.nbytes[place - 1]) / (self.ranks[place] - self.ranks[place - 1])

    def afforded(self, nbytes: float) -> float:
        """The most directions for so many bytes; at least those of the smallest option."""
        return float(numpy.interp(nbytes, self.nbytes, self.ranks))


@dataclass(frozen=True)
class Asked:
    """What is to be learned, and where."""

    source: Source
    windows: Tensor
    """Token numbers ``[samples, length]``."""
    device: str
    journal: Journal
    store: StatisticsStore | None
    targets: Sequence[Target]
    curves: Sequence[Curve]
    budget: int
    progress: Callable[[str, int, int], None]


Statistics = Callable[[], Iterator[tuple[int, Mapping[str, Stats]]]]
"""Those of the dense model, block by block."""


def learn(asked: Asked, what: Learned, statistics: Statistics) -> dict[str, float]:
    """Site → bytes that it should have; those that leave nothing to choose are missing.

    Raises RecipeError for targets whose amounts are not ranks of factors, and for a model without predictions;
    NumericalError where a loss is not finite.
    """
    require_windows(asked.windows)
    sites = _sites(asked)
    walk = LOSS[what], WINDOWS[what], HELD_OUT, TOKENS, STEPS[what], RATES, SHARPNESS, MEASURED_EVERY, DECAYS, TINY
    told = repr((what, walk, _spendable(asked)))
    told += repr([(identity(target), [(o.amount, o.nbytes) for o in c.options]) for target, c, _ in sites])
    found: dict[str, float] = remembered(
        asked.journal,
        asked.store,
        "learned.json",
        f"learned.{digest_of(told)}.json",
        lambda: _learned(asked, what, sites, statistics),
    )
    return found


def check(targets: Sequence[Target]) -> None:
    """Raises RecipeError for targets whose amounts are not ranks of factors."""
    for target in targets:
        single = isinstance(target, SiteTarget) and target.base is None
        check_method(target.name, getattr(target, "method", None), single=single)


def check_method(name: str, method: Any, *, single: bool) -> None:
    """Raises RecipeError unless a method makes two factors of `single` linears, whose ranks can be learned."""
    if not single or not _makes_factors(method):
        raise RecipeError(
            f"{name}: this allocator learns the ranks of linears, and what the step makes of it is not two factors; "
            "choose another one"
        )


def require_windows(windows: Tensor) -> None:
    """Raises RecipeError for fewer windows than are learned on and held out.  `windows`: ``[samples, length]``."""
    if len(windows) < 2 or windows.shape[1] < 2:
        raise RecipeError(
            f"this allocator learns on calibration text, and {len(windows)} windows of {windows.shape[1]} tokens came; "
            "wanted two windows of 2 or more tokens at least"
        )


def _spendable(asked: Asked) -> int:
    """Bytes for those sites that have something to choose."""
    return asked.budget - sum(curve.dense_bytes for curve in asked.curves if len(curve.options) == 1)


Learning = tuple[SiteTarget, Curve, Price]


def _sites(asked: Asked) -> list[Learning]:
    """Those with something to choose."""
    check(asked.targets)
    sites = []
    for target, curve in zip(asked.targets, asked.curves, strict=True):
        assert isinstance(target, SiteTarget)  # as was checked
        if len(curve.options) > 1:
            directions = min(target.site.out_features, target.site.in_features)
            sites.append((target, curve, Price.of(curve, directions)))
    return sites


def _makes_factors(method: Method) -> bool:
    return tuple(_in_plain_factors(method).leaves) == ("down", "up")


def _in_plain_factors(method: Method) -> Method:
    """The method, its result stored as two factors whatever it would store: gates stand between these."""
    stored = {field.name: False for field in fields(method) if field.name in ("pivot", "remap")}  # type: ignore[arg-type]
    return replace(method, **stored)  # type: ignore[type-var]


def _learned(asked: Asked, what: Learned, sites: Sequence[Learning], statistics: Statistics) -> dict[str, float]:
    if not sites:
        return {}
    model = whole_model(asked.source, asked.device)
    if not model.can_generate():
        raise RecipeError(
            f"{type(model).__name__} has no head that predicts tokens, and this allocator learns from predictions; "
            "choose another one"
        )
    make = {
        "truncation": lambda: _gated_outputs(model, sites),
        "gates": lambda: _gated_factors(model, sites, statistics()),
    }
    gates = make[what]()
    surface = Surface([price for _, _, price in sites], _spendable(asked))
    shares = _Descent(asked, what, model, list(gates.values()), surface).shares()
    sizes = surface.nbytes(shares)
    return {target.name: size for (target, _, _), size in zip(sites, sizes, strict=True)}


def _gated_outputs(model: Any, sites: Sequence[Learning]) -> dict[str, GatedLinear]:
    made: dict[str, GatedLinear] = {}
    for target, _, _ in sites:
        weight, bias = _numbers(model, target.site)
        made[target.name] = GatedOutput(weight, bias)
        model.set_submodule(target.name, made[target.name])  # at once: the old numbers go
    return made


@torch.no_grad()
def _gated_factors(
    model: Any, sites: Sequence[Learning], statistics: Iterator[tuple[int, Mapping[str, Stats]]]
) -> dict[str, GatedLinear]:
    """Factors of full rank, on the inputs of the dense model."""
    made: dict[str, GatedLinear] = {}
    for index, stats in statistics:
        for target in (target for target, _, _ in sites if target.block == index):
            weight, bias = _numbers(model, target.site)
            factors = _in_plain_factors(target.method).compress(weight, of_site(target.site, stats), min(weight.shape))
            if not isinstance(factors, LowRankLinear):
                raise RecipeError(
                    f"{target.name}: the step's method makes {factors.name} of it where factors are gated"
                )
            made[target.name] = GatedFactors(factors.up.weight.detach(), factors.down.weight.detach(), bias)
            model.set_submodule(target.name, made[target.name])
    return {target.name: made[target.name] for target, _, _ in sites}


def _numbers(model: Any, site: Site) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias."""
    module = model.get_submodule(site.name)
    weight = module.weight.detach()
    return (weight.T.contiguous() if site.transposed else weight), (module.bias if site.bias else None)


class Surface:
    """All divisions of a budget, in shares of directions."""

    def __init__(self, prices: Sequence[Price], budget: float) -> None:
        self._prices = prices
        self._budget = budget
        self.directions = numpy.array([price.ranks[-1] for price in prices])
        self._least = numpy.array([price.ranks[0] for price in prices]) / self.directions

    def start(self, dense: Sequence[int]) -> Shares:
        """The same share of bytes for every site, as far as that can be."""
        keep = self._budget / sum(dense)
        ranks = [price.afforded(keep * size) for price, size in zip(self._prices, dense, strict=True)]
        return self.onto(numpy.array(ranks) / self.directions)

    def nbytes(self, shares: Shares) -> list[float]:
        ranks = (shares * self.directions).tolist()
        return [price.at(rank) for price, rank in zip(self._prices, ranks, strict=True)]

    def along(self, shares: Shares, gradient: Shares) -> Shares:
        """The gradient without its part along the price."""
        ranks = (shares * self.directions).tolist()
        slopes = [price.slope(rank) for price, rank in zip(self._prices, ranks, strict=True)]
        price = numpy.array(slopes) * self.directions
        norm = float(price @ price)
        found: Shares = gradient - price * (float(gradient @ price) / norm) if norm > 0 else gradient
        return found

    def onto(self, shares: Shares) -> Shares:
        """Shifted alike until the total is the budget, or as near as there is a division."""

        def shifted(by: float) -> Shares:
            return numpy.clip(shares + by, self._least, 1.0)

        low, high = -1.0 - float(shares.max()), 1.0 - float(shares.min())
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(self.nbytes(shifted(middle))) <= self._budget else (low, middle)
        return shifted(low)


class _Descent:
    """Adam's walk on a surface."""

    def __init__(self, asked: Asked, what: Learned, model: Any, gates: Sequence[GatedLinear], surface: Surface) -> None:
        self._asked = asked
        self._what = what
        self._model = model
        self._gates = gates
        self._surface = surface
        windows = asked.windows
        places = torch.linspace(0, len(windows) - 1, min(WINDOWS[what], len(windows))).round().long()
        chosen = windows[places]
        self._windows, self._held_out = hold_out(chosen, max(1, len(chosen) // HELD_OUT))
        self._batches = Batches(len(self._windows), max(1, TOKENS // windows.shape[1]), seed=0)

    def shares(self) -> Shares:
        """The best that was met."""
        unit, journal = "learning.json", self._asked.journal
        width = len(self._gates)
        if journal.has(unit):
            state = journal.read_json(unit)
        else:
            start = self._surface.start([c.dense_bytes for c in self._asked.curves if len(c.options) > 1])
            state = {"step": 0, "at": start.tolist(), "moments": [[0.0] * width, [0.0] * width]}
            state |= {"best": state["at"], "least": self._measured(start)}
            journal.write_json(unit, state)
        steps = STEPS[self._what]
        for step in range(state["step"], steps):
            at, moments = self._moved(step, numpy.array(state["at"]), [numpy.array(m) for m in state["moments"]])
            state = state | {"step": step + 1, "at": at.tolist(), "moments": [m.tolist() for m in moments]}
            if (step + 1) % MEASURED_EVERY == 0 or step + 1 == steps:
                loss = self._measured(at)
                if loss < state["least"]:
                    state |= {"best": at.tolist(), "least": loss}
            journal.write_json(unit, state)
            self._asked.progress("learning ranks", step + 1, steps)
        return numpy.array(state["best"])

    def _moved(self, step: int, at: Shares, moments: list[Shares]) -> tuple[Shares, list[Shares]]:
        gradient = self._surface.along(at, self._gradient(step, at))
        slow, fast = DECAYS
        mean = slow * moments[0] + (1 - slow) * gradient
        square = fast * moments[1] + (1 - fast) * gradient**2
        unbiased = numpy.sqrt(square / (1 - fast ** (step + 1)))
        rate = RATES[1] + (RATES[0] - RATES[1]) * (1 + math.cos(math.pi * step / STEPS[self._what])) / 2
        moved = at - rate * mean / (1 - slow ** (step + 1)) / (unbiased + TINY)
        return self._surface.onto(moved), [mean, square]

    def _gradient(self, step: int, at: Shares) -> Shares:
        """Of the loss in the shares, on the windows of a step."""
        positions = self._placed(at)
        positions.requires_grad_()
        with torch.enable_grad():
            loss = self._loss(self._windows[self._batches.at(step)], positions)
            loss = loss.exp() if self._what == "truncation" else loss
            if not torch.isfinite(loss):
                raise NumericalError(f"the loss is not finite at step {step} of learning ranks; calibrate in float32")
            loss.backward()
        assert positions.grad is not None  # every gate stands in the model
        gradient: Shares = positions.grad.cpu().numpy() * self._surface.directions
        if not numpy.isfinite(gradient).all():
            raise NumericalError(f"the gradient is not finite at step {step} of learning ranks; calibrate in float32")
        return gradient

    @torch.no_grad()
    def _measured(self, at: Shares) -> float:
        """Mean loss of the windows held out, nats."""
        step = max(1, TOKENS // self._held_out.shape[1])
        positions = self._placed(at)
        losses = [self._loss(rows, positions).item() * len(rows) for rows in self._held_out.split(step)]
        loss = math.fsum(losses) / len(self._held_out)
        if not math.isfinite(loss):
            raise NumericalError("the loss of what is held out is not finite while ranks are learned")
        return loss

    def _placed(self, at: Shares) -> Tensor:
        return torch.tensor(at * self._surface.directions, dtype=torch.float64, device=self._asked.device)

    def _place(self, positions: Tensor) -> None:
        for gate, position in zip(self._gates, positions.unbind(), strict=True):
            gate.position = position

    def _loss(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Cross entropy or divergence with the gates at these positions, mean over tokens, nats."""
        rows = rows.to(self._asked.device)
        for gate in self._gates:
            gate.batch = tuple(rows.shape)
        wanted = None
        if self._what == "gates":
            with torch.no_grad():
                self._place(torch.full_like(positions, math.inf))
                wanted = self._logits(rows).log_softmax(-1)
        self._place(positions)
        logits = self._logits(rows)
        if wanted is None:
            return functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        return torch.linalg.vecdot(wanted.exp(), wanted - logits.log_softmax(-1)).mean()

    def _logits(self, rows: Tensor) -> Tensor:
        logits: Tensor = self._model(rows, use_cache=False).logits
        return logits if logits.dtype == torch.float64 else logits.float()

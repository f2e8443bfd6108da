"""What allocators see, and what they return.

A `Curve` says what could become of one site, a `Plan` what does.  Nothing here has seen the model: what only the model
can tell (`Measures`) is measured by the runner, for the allocators that ask for it.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from tersely.allocate.measures import UNMEASURED, Learned, Measured, Measures
from tersely.option import Amount, Option

POINTS = 256
"""A curve with errors keeps this many options: steps of 0.4 % of a site's bytes are finer than any prediction."""


@dataclass(frozen=True)
class Spectrum:
    """How a site's energy is spread over the steps of its curve; of a factorisation a step is a rank."""

    effective_rank: float
    """exp of the entropy of the shares of energy: how many steps matter, 1 to all of them."""
    step_bytes: float
    """What a step costs."""


@dataclass(frozen=True)
class Curve:
    """What can be done to one site, by rising bytes; the last option leaves it dense at no error.

    The options may be those of several methods; where errors are known, none is larger and worse than another.
    `energy` is the error of removing the site altogether, None where nobody measured it; errors are reported relative
    to it.  The errors of the options are None where only bytes are known.
    """

    site: str
    dense_bytes: int
    energy: float | None
    options: tuple[Option, ...]
    role: str = ""
    """Sites of one role, whatever their block, do the same work: attention.q, mlp.down."""
    tokens: int = 1
    """Errors are means over so many tokens; 1 where no text was read."""
    spectrum: Spectrum | None = None
    """None where errors or options are missing."""
    costly: tuple[Option, ...] = ()
    """Options that take no less than the dense weight, where drifts are known: nobody chooses them, but a site whose
    components are dropped one by one passes through them."""

    def relative(self, option: Option) -> float | None:
        """Share of the site's output energy that an option loses, 0 to 1."""
        if option.error is None or self.energy is None:
            return None
        return option.error / self.energy if self.energy > 0 else 0.0


@dataclass(frozen=True)
class Choice:
    """What happens to one site.  amount None: left dense.  `relative_error` is predicted, 0 to 1; None if unknown."""

    amount: Amount
    nbytes: int
    dense_bytes: int
    relative_error: float | None


@dataclass(frozen=True)
class Plan:
    budget: int
    choices: dict[str, Choice]

    @classmethod
    def of(cls, curves: Sequence[Curve], options: Sequence[Option], budget: int) -> "Plan":
        """One option for each curve."""
        chosen = zip(curves, options, strict=True)
        return cls(budget, {c.site: Choice(o.amount, o.nbytes, c.dense_bytes, c.relative(o)) for c, o in chosen})

    @property
    def nbytes(self) -> int:
        return sum(choice.nbytes for choice in self.choices.values())

    @property
    def dense_bytes(self) -> int:
        return sum(choice.dense_bytes for choice in self.choices.values())

    def to_json(self) -> str:
        sites = {site: asdict(choice) for site, choice in self.choices.items()}
        totals = {"budget": self.budget, "nbytes": self.nbytes, "dense_bytes": self.dense_bytes}
        return json.dumps(totals | {"sites": sites}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        plain = json.loads(text)
        return cls(plain["budget"], {site: Choice(**choice) for site, choice in plain["sites"].items()})


@dataclass(frozen=True)
class Allocator:
    rule: Callable[..., Plan]
    """(curves, budget), and the measures where it asks for some."""
    needs_errors: bool
    """Whether the curves must predict errors, which takes a sweep over the model; else their bytes are enough."""
    summary: str
    paper: str = ""
    measures: Measured | None = None
    """What the runner has to measure; None for nothing."""
    probes: Callable[[Curve], Sequence[Option]] | None = None
    """The options of a curve at which harm is measured."""
    learns: Learned | None = None
    """What the runner has to learn, for one budget; None for nothing."""
    needs_drift: bool = False
    """Whether the curves must predict drifts as well, which few methods do."""

    @property
    def reads_model(self) -> bool:
        """Whether the runner has to show the model some text for it."""
        return self.measures is not None or self.learns is not None

    def divide(self, curves: Sequence[Curve], budget: int, measures: Measures = UNMEASURED) -> Plan:
        """A plan of `budget` bytes at most.  Raises RecipeError where there is none."""
        return self.rule(curves, budget, measures) if self.reads_model else self.rule(curves, budget)


def curve_of(site: str, options: Iterable[Option], dense_bytes: int, *, role: str = "", tokens: int = 1) -> Curve:
    """The curve of a site from a method's options: those that do not pay are dropped, "leave it dense" is added."""
    everything = list(options)
    energy = next((o.error for o in everything if o.amount == 0), None)
    useful = [o for o in everything if o.amount != 0 and o.nbytes < dense_bytes]
    if any(o.error is None for o in everything):
        return Curve(site, dense_bytes, energy, (*useful, Option(None, dense_bytes, None)), role, tokens)
    drifts = all(o.drift is not None for o in everything)
    costly = _thinned([o for o in everything if o.nbytes >= dense_bytes]) if drifts else []
    options = (*_thinned(undominated(useful)), Option(None, dense_bytes, 0.0, 0.0 if drifts else None))
    return Curve(site, dense_bytes, energy, options, role, tokens, _spectrum(everything, energy), tuple(costly))


def _thinned(options: list[Option]) -> list[Option]:
    """`POINTS` of them at most, evenly spread.  What they predict is of all that is dropped, so none of it is lost."""
    if len(options) <= POINTS:
        return options
    step = (len(options) - 1) / (POINTS - 1)
    return [options[round(i * step)] for i in range(POINTS)]


def undominated(options: Iterable[Option]) -> list[Option]:
    """The options that no other one beats in bytes and error both: by rising bytes, with falling error."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, error_of(option))):
        if not kept or error_of(option) < error_of(kept[-1]):
            kept.append(option)
    return kept


def error_of(option: Option) -> float:
    if option.error is None:
        raise ValueError("this allocator compares predicted errors, and the curve has none")
    return option.error


def too_small(curve: Curve, came: str, least: float) -> str:
    """The message of a refusal: the site that suffers most, and the share that would do."""
    smallest = f"its smallest option takes {curve.options[0].nbytes} bytes"
    return f"{curve.site}: {came}; {smallest}: keep at least {math.ceil(least * 1000) / 1000}"


def neediest(curves: Sequence[Curve]) -> Curve:
    """The site whose smallest option takes the largest share of it."""
    return max(curves, key=lambda curve: curve.options[0].nbytes / curve.dense_bytes)


def _spectrum(options: Sequence[Option], energy: float | None) -> Spectrum | None:
    """From all options of a method, those larger than the dense weight too: differences of errors are energies."""
    steps = undominated(option for option in options if option.amount != 0)
    if not steps:
        return None
    errors = [error_of(option) for option in steps]
    falls = [a - b for a, b in zip([energy or errors[0], *errors], [*errors, 0.0], strict=True) if a > b]
    total = math.fsum(falls)
    entropy = -math.fsum(fall / total * math.log(fall / total) for fall in falls)
    return Spectrum(math.exp(entropy), steps[-1].nbytes / len(steps))

"""One way to compress: a step at several sizes, what comes before and after it, and with what it may be compared."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from tersely.errors import RecipeError
from tersely.recipe import STEPS, Calibration, MethodStep, Recipe, Step, plain_step, recipe_from
from tersely.report.naming import way
from tersely.tables import settled, verb_for

Group = Literal["untrained", "trained", "8-bit factors"]

GROUPS: tuple[Group, ...] = ("untrained", "trained", "8-bit factors")
"""Rows of one group may be compared with each other and with no others: weights that no gradient has touched, weights
that saw text in training, and factors that are stored in fewer bits, which are smaller for another reason."""


@dataclass(frozen=True)
class Setting:
    """What all entries of a bench share."""

    model: str
    calibration: Calibration
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Entry:
    """One way to compress, at several sizes."""

    method: str
    """Name in any table: what the row's size is asked of."""
    allocate: str | None = None
    propagate: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """All else that its step says, as in a recipe."""
    steps: tuple[dict[str, Any], ...] = ()
    """Plain values of steps before, as in a recipe."""
    then: tuple[dict[str, Any], ...] = ()
    """Plain values of steps after: healing, for one."""
    sizes: str | None = "keep"
    """What its sizes are: keep or bits, or None where the entry has a single size."""
    group: Group | None = None
    """By default trained if one of its steps trains weights, else untrained."""

    @property
    def compared_with(self) -> Group:
        """Its group, the default resolved."""
        return self.group or ("trained" if any(trains(step) for step in self.all_steps(None)) else "untrained")

    @property
    def way(self) -> str:
        return way(self.method, self.described())

    def all_steps(self, size: float | None) -> list[dict[str, Any]]:
        asked: dict[str, Any] = {"allocate": self.allocate, "propagate": self.propagate}
        if self.sizes is not None:
            asked[self.sizes] = size
        return [*self.steps, plain_step(verb_for(self.method), self.method, asked | self.options), *self.then]

    def recipe(self, setting: Setting, size: float | None) -> Recipe:
        """Raises RecipeError for whatever a recipe may not say."""
        plain = {
            "model": setting.model,
            "step": self.all_steps(size),
            "calibration": {k: v for k, v in asdict(setting.calibration).items() if v is not None},
            "seed": setting.seed,
            "device": setting.device,
        }
        return recipe_from(plain)

    def folder(self, size: float | None) -> str:
        """A name for the output, unlike that of any other row."""
        content = json.dumps([self.described(), size], sort_keys=True)
        return f"{self.method}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    def described(self) -> dict[str, Any]:
        """All that distinguishes it from other entries of its method, as JSON."""
        said: dict[str, Any] = {"allocate": self.allocate, "propagate": self.propagate}
        said = {key: value for key, value in said.items() if value is not None} | self.options
        return (
            said
            | ({"after": list(self.steps)} if self.steps else {})
            | ({"then": list(self.then)} if self.then else {})
        )


def entry_of(recipe: Recipe) -> Entry:
    """A recipe as an entry that can be asked for other sizes: its step with a `keep` is the one that they are asked of.

    Its model, calibration and seed are left behind, since a comparison has its own.  Raises RecipeError unless exactly
    one step has a `keep`.
    """
    sized = [number for number, step in enumerate(recipe.step) if getattr(step, "keep", None) is not None]
    if len(sized) != 1:
        raise RecipeError(f"a recipe with {len(sized)} steps that have a keep; a size can be asked of exactly one step")
    (number,) = sized
    step, plain = recipe.step[number], [_plain(step) for step in settled(recipe).step]
    said = plain[number]
    kept = {key: value for key, value in said.items() if key not in (*STEPS, "keep", "allocate", "propagate")}
    before, after = tuple(plain[:number]), tuple(plain[number + 1 :])
    return Entry(step.name, said.get("allocate"), said.get("propagate"), kept, before, after)


def _plain(step: Step) -> dict[str, Any]:
    """A step as it is written in TOML, without what is left to its defaults, except those that distinguish rows."""
    always = ("allocate", "propagate") if isinstance(step, MethodStep) else ("relax",)
    return _without_defaults(step, always) | step.options


def _without_defaults(said: Any, always: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass, and of those in it, that differ from their defaults; the method's own are left out."""
    plain: dict[str, Any] = {}
    for of_class in fields(said):
        value = getattr(said, of_class.name)
        default = of_class.default if of_class.default_factory is MISSING else of_class.default_factory()
        if of_class.name != "options" and (of_class.name in always or value != default):
            plain[of_class.name] = _without_defaults(value) if is_dataclass(value) else value
    return plain


def trains(step: Mapping[str, Any]) -> bool:
    """Whether a step, in plain values, changes weights by gradients."""
    return "train" in step or step.get("refine") is not None

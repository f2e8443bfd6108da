"""What is to be done, written down: a model, a calibration text, ordered steps.

A recipe is TOML, read into frozen dataclasses and validated before anything else happens; an unknown key is an error
that names the nearest known one.  The recipe that took effect, defaults included, is written back into the output.

    model = "meta-llama/Llama-3.2-1B"

    [calibration]
    source  = ["wikitext"]
    samples = 128

    [[step]]
    method = "svd_llm"
    keep   = 0.8
"""

import dataclasses
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import ConfigDict, Discriminator, Tag, TypeAdapter, ValidationError

from tersely.errors import RecipeError, unknown
from tersely.settings import Calibration, Evaluation, Refinement, check_seed


@dataclass(frozen=True)
class MethodStep:
    """A method applied to the targets within a budget: one of keep, bits, size and perplexity, or none where the
    method's own fields say how small."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    method: str
    """Name in the tables of methods and of unit methods."""

    target: list[str] = field(default_factory=lambda: ["all"])
    """Roles ("mlp", "attention.v"), module-name patterns ("*.down"), "all" linears of the blocks; outside of them
    "embeddings" and "head"."""

    keep: float | None = None
    """Bytes of the targets afterwards, as a fraction of before."""

    bits: float | None = None
    """Bits per target weight afterwards, everything that is stored for it included."""

    size: int | str | None = None
    """Bytes of the whole output folder: a number, or "300MB" (MB = 10⁶ bytes)."""

    perplexity: float | None = None
    """What the perplexity of calibration windows must stay below, everything cut on the inputs of the dense model; the
    smallest division that does is looked for."""

    base: str | None = None
    """A checkpoint of the same architecture: what is compressed is the difference to it, and the output holds no more
    than that."""

    allocate: str = "greedy"
    """How the budget is divided among the sites: name in the table of allocators."""

    propagate: Literal["none", "block", "input"] | None = None
    """Inputs that a site is fitted to: the dense model's, those behind compressed blocks, or also behind the compressed
    sites of its own block.  By default "block", or what the method can do alone."""

    on_failure: Literal["raise", "dense"] = "raise"
    """What to do where a site fails: stop, or leave it dense and report it as degraded."""

    refine: Refinement | None = None
    """Train each block once it is compressed, norms included, to give back its former output; by default nothing
    trains."""

    temper: bool = False
    """Scale the logits of the result, by one factor in the norm before the head, so that its predictions come nearest
    to those of before on windows of the calibration text that were not drawn; where there are few, with a warning."""

    options: dict[str, Any] = field(default_factory=dict)
    """The method's own fields; in TOML they stand in the step itself."""

    def __post_init__(self) -> None:
        _check_refinement(self)
        if self.temper and self.base is not None:
            raise RecipeError(
                f"step {self.name!r}: a difference to a base is stored without the norm that temper would scale; leave "
                "one of the two out"
            )
        given = {"keep": self.keep, "bits": self.bits, "size": self.size, "perplexity": self.perplexity}
        _check_budget(self.name, given)
        _check_target(self.name, self.target)

    @property
    def name(self) -> str:
        return self.method

    @property
    def has_budget(self) -> bool:
        return any(given is not None for given in (self.keep, self.bits, self.size, self.perplexity))

    @property
    def size_bytes(self) -> int | None:
        return None if self.size is None else parse_size(self.size)


@dataclass(frozen=True)
class RewriteStep:
    """Other weights, the same function."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    rewrite: str
    """Name in the table of rewrites."""

    options: dict[str, Any] = field(default_factory=dict)
    """The rewrite's own fields; in TOML they stand in the step itself."""

    @property
    def name(self) -> str:
        return self.rewrite


@dataclass(frozen=True)
class CacheStep:
    """Smaller keys and values: attention that stores something else in the cache."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    cache: str
    """Name in the table of caches."""

    keep: float
    """Bytes of keys and values per token afterwards, as a fraction of before."""

    allocate: str = "uniform"
    """How the bytes per token are divided among the blocks: name in the table of allocators."""

    propagate: Literal["none", "block"] = "block"
    """Inputs that a block is fitted to: the dense model's, or those behind compressed blocks."""

    on_failure: Literal["raise", "dense"] = "raise"
    """What to do where a block fails: stop, or leave it dense and report it as degraded."""

    options: dict[str, Any] = field(default_factory=dict)
    """The cache's own fields; in TOML they stand in the step itself."""

    def __post_init__(self) -> None:
        _check_budget(self.name, {"keep": self.keep})

    @property
    def name(self) -> str:
        return self.cache


@dataclass(frozen=True)
class ConvertStep:
    """Another part of the architecture in every block: attention, position embedding."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    convert: str
    """Name in the table of conversions."""

    options: dict[str, Any] = field(default_factory=dict)
    """The conversion's own fields; in TOML they stand in the step itself."""

    @property
    def name(self) -> str:
        return self.convert


@dataclass(frozen=True)
class TrainStep:
    """Gradient descent on objectives, while the targets pretend to be what they will become."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    train: list[str]
    """Objectives, names in their table, added up: "tokens" (the text itself), "logits" (those of the dense model)."""

    relax: str = "adapter"
    """What the targets pretend to be: name in the table of relaxations."""

    target: list[str] = field(default_factory=lambda: ["all"])
    """Roles, module-name patterns, or "all" linears of the blocks; a linear that a former step compressed counts by its
    own role."""

    tokens: int = 1_000_000
    """Tokens to see, the same ones again where the text is shorter."""

    batch: int = 8
    """Windows in a step of the optimiser."""

    rate: float = 1e-3
    """Largest learning rate."""

    quantizer_rate: float | None = None
    """Largest learning rate of step sizes and widths; by default `rate`."""

    warmup: float = 0.03
    """Share of the steps in which the rate rises."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls afterwards."""

    decay: float = 0.0
    """Weight decay of matrices; vectors have none."""

    held_out: int = 16
    """Windows that are not trained on but measured."""

    patience: int = 0
    """Measurements without a new best after which training stops and takes the best numbers back; 0: never."""

    text: list[str] | None = None
    """Texts to train on; by default the calibration texts, all of their windows."""

    bits: float | None = None
    """Average bits per target weight that a relaxation with learned widths has to reach."""

    options: dict[str, Any] = field(default_factory=dict)
    """The relaxation's own fields; in TOML they stand in the step itself."""

    def __post_init__(self) -> None:
        _check_target(self.name, self.target)
        _check_budget(self.name, {"bits": self.bits})
        if not self.train:
            raise RecipeError("step train: an empty list of objectives; name tokens or logits")
        for what in ("tokens", "batch", "rate"):
            if getattr(self, what) <= 0:
                raise RecipeError(f"step train: {what} = {getattr(self, what)}; wanted above 0")
        if not 0 <= self.warmup < 1:
            raise RecipeError(f"step train: warmup = {self.warmup}; wanted 0 or more, below 1, a share of the steps")
        if self.patience and not self.held_out:
            raise RecipeError(f"step train: patience = {self.patience} needs windows held out")

    @property
    def name(self) -> str:
        return self.relax


Step = MethodStep | RewriteStep | CacheStep | ConvertStep | TrainStep

STEPS: dict[str, type[Step]] = {
    "method": MethodStep,
    "rewrite": RewriteStep,
    "cache": CacheStep,
    "convert": ConvertStep,
    "train": TrainStep,
}
"""What a step can do.  A step has exactly one of these keys."""


def verb_of(step: Step) -> str:
    return next(verb for verb, kind in STEPS.items() if isinstance(step, kind))


def _verb_in(step: Any) -> str | None:
    """The verb of a step, in plain values or built."""
    return next((v for v in STEPS if v in step), None) if isinstance(step, dict) else verb_of(step)


AnyStep = Annotated[
    Annotated[MethodStep, Tag("method")]
    | Annotated[RewriteStep, Tag("rewrite")]
    | Annotated[CacheStep, Tag("cache")]
    | Annotated[ConvertStep, Tag("convert")]
    | Annotated[TrainStep, Tag("train")],
    Discriminator(_verb_in),
]


@dataclass(frozen=True)
class Recipe:
    __pydantic_config__ = ConfigDict(extra="forbid")

    model: str
    """Folder or hub name."""

    step: list[AnyStep]
    calibration: Calibration = field(default_factory=Calibration)
    evaluation: Evaluation = field(default_factory=Evaluation)
    seed: int = 0
    revision: str | None = None
    """Revision of a hub model."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of all numbers, computed and stored; by default that of the checkpoint."""

    device: str = "cpu"
    trust_remote_code: bool = False
    shard_size: int | str = "2GB"
    """Largest safetensors file of the output."""

    def __post_init__(self) -> None:
        check_seed("seed =", self.seed)
        if not self.step:
            raise RecipeError("a recipe without a step does nothing; add a [[step]]")
        if any(isinstance(step, MethodStep) and step.base is not None for step in self.step[:-1]):
            raise RecipeError("a step with a base writes a folder of differences; it has to be the last one")
        if parse_size(self.shard_size) <= 0:
            raise RecipeError(f"shard_size = {self.shard_size!r}; wanted above 0 bytes")

    def to_toml(self) -> str:
        """TOML that reads back as this recipe, defaults included (TOML has no null: what is None is left out)."""
        plain = _without_none(dataclasses.asdict(self))
        steps = [{k: v for k, v in s.items() if k != "options"} | s["options"] for s in plain.pop("step")]
        return tomli_w.dumps(plain | {"step": steps})

    def fingerprint(self) -> str:
        """Identity of everything that can change the weights; two recipes that say the same have the same one."""
        said = {key: value for key, value in dataclasses.asdict(self).items() if key != "evaluation"}
        return hashlib.sha256(json.dumps(_canonical(said), sort_keys=True).encode()).hexdigest()


def plain_step(verb: str, name: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a step that names one thing, with whatever else is said of it; None stands for the default.

    A step that trains names a relaxation; its objectives may be said as `objective`.
    """
    values = {key: value for key, value in said.items() if value is not None}
    if verb == "train":
        return {"train": values.pop("objective", ["tokens"]), "relax": name, **values}
    return {verb: name, **values}


def read_recipe(path: Path) -> Recipe:
    """Raises RecipeError for a file that is missing, is not TOML, or says something unknown."""
    return recipe_from(read_toml(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The plain values of a recipe, not validated yet."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"recipe {path}: no such file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: not TOML ({error})") from error
    except OSError as error:
        raise RecipeError(f"recipe {path}: cannot be read ({error.strerror})") from error


def recipe_from(plain: dict[str, Any]) -> Recipe:
    """Validate plain values.  Keys of a step that are none of its own become the method's options."""
    steps = plain.get("step", [])
    if not isinstance(steps, list):
        raise RecipeError("'step' is no list; write each step under its own [[step]]")
    return _validated(Recipe, plain | {"step": [_step(step, number) for number, step in enumerate(steps, start=1)]})


def parse_size(size: int | str) -> int:
    """Bytes of "300MB", "1.5 GB", "4000" (decimal units) or a number."""
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*([KMG]?)B?\s*", size, flags=re.IGNORECASE)
    if found is None:
        raise RecipeError(f"size {size!r}; wanted bytes such as 300MB, 1.5GB or 4000000")
    return int(Fraction(found[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[found[2].upper()])


def _step(plain: Any, number: int) -> dict[str, Any]:
    if not isinstance(plain, dict):
        raise RecipeError(f"step {number} is no table; write each step under its own [[step]]")
    verbs = [verb for verb in STEPS if verb in plain]
    if len(verbs) != 1:
        raise RecipeError(f"step {number}: wanted exactly one of {', '.join(STEPS)}; its keys: {', '.join(plain)}")
    if not isinstance(plain.get("options", {}), dict):
        raise RecipeError(f"step {number}: options = {plain['options']!r}; wanted a table of the method's own fields")
    own = {f.name for f in dataclasses.fields(STEPS[verbs[0]])}
    options = {k: v for k, v in plain.items() if k not in own} | plain.get("options", {})
    return {k: v for k, v in plain.items() if k in own and k != "options"} | {"options": options}


def _validated(kind: type[Recipe], plain: dict[str, Any]) -> Recipe:
    try:
        # through JSON, where a table is a dataclass even in strict mode: "yes" is no boolean, "12" no number
        return TypeAdapter(kind).validate_json(json.dumps(plain), strict=True)
    except TypeError as error:
        raise RecipeError(f"recipe: a value that is neither text, number, boolean, list nor table ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        # the name of a step's class is of no interest to who wrote the recipe
        parts = [part for part in first["loc"] if part not in STEPS or part in first["loc"][-1:]]
        place = ".".join(str(part + 1) if isinstance(part, int) else str(part) for part in parts)
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            tables = {"calibration": Calibration, "evaluation": Evaluation, "refine": Refinement}
            known = next((tables[part] for part in first["loc"] if part in tables), kind)
            names = [f.name for f in dataclasses.fields(known)]
            raise RecipeError("recipe: " + unknown("key", str(first["loc"][-1]), names)) from error
        raise RecipeError(f"recipe: {place}: {first['msg']} (came: {first.get('input')!r})") from error


def _check_budget(name: str, budgets: dict[str, float | int | str | None]) -> None:
    given = {key: value for key, value in budgets.items() if value is not None}
    if len(given) > 1:
        came = " and ".join(f"{key} = {value}" for key, value in given.items())
        raise RecipeError(f"step {name!r}: give only one of {', '.join(budgets)} (came: {came})")
    for key, value in given.items():
        if key == "keep" and not 0 < float(value) <= 1:
            raise RecipeError(f"step {name!r}: keep = {value}; wanted above 0 and at most 1")
        if key == "perplexity" and not 1 < float(value) < math.inf:
            raise RecipeError(f"step {name!r}: perplexity = {value}; wanted above 1, which none falls below")
        if key == "bits" and not 0 < float(value) < math.inf:
            raise RecipeError(f"step {name!r}: bits = {value}; wanted above 0")
        if key == "size" and parse_size(value) <= 0:  # type: ignore[arg-type]
            raise RecipeError(f"step {name!r}: size = {value!r}; wanted above 0 bytes")


def _check_refinement(step: MethodStep) -> None:
    if step.refine is None:
        return
    if step.propagate == "none":
        raise RecipeError(
            f"step {step.name!r}: refine trains a block on what it reads behind compressed blocks, and with propagate "
            "= 'none' every target is fitted to the dense model alone; choose block or input"
        )
    if step.base is not None:
        raise RecipeError(
            f"step {step.name!r}: a difference to a base is stored without the weights that refine would train; leave "
            "one of the two out"
        )


def _check_target(name: str, target: list[str]) -> None:
    if not target:
        raise RecipeError(f"step {name!r}: target is an empty list; name roles or patterns, or all")


def _canonical(value: Any) -> Any:
    """1 and 1.0 are one number, however they were written."""
    if isinstance(value, dict):
        return {k: _canonical(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_canonical(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value

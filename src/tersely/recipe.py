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
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import ConfigDict, TypeAdapter, ValidationError

from tersely.errors import RecipeError, unknown

VERBS = ("method",)
"""What a step can do.  A step has exactly one of these keys."""


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

    def __post_init__(self) -> None:
        if not self.source:
            raise RecipeError("calibration: an empty list of sources; name at least one text, or stdlib")
        if self.samples < 1:
            raise RecipeError(f"calibration: samples = {self.samples}; wanted 1 or more windows")
        if self.length is not None and self.length < 2:
            raise RecipeError(f"calibration: length = {self.length}; wanted 2 or more tokens")


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
class Step:
    """One method applied to the targets within a budget; exactly one of keep, bits and size is given."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    method: str
    """Name in the table of methods."""

    target: list[str] = field(default_factory=lambda: ["all"])
    """Roles ("mlp", "attention.v"), module-name patterns ("*.down"), or "all" linears of the blocks."""

    keep: float | None = None
    """Bytes of the targets afterwards, as a fraction of before."""

    bits: float | None = None
    """Bits per target weight afterwards, everything that is stored for it included."""

    size: int | str | None = None
    """Bytes of the whole output folder: a number, or "300MB" (MB = 10⁶ bytes)."""

    allocate: str = "greedy"
    """How the budget is divided among the sites: name in the table of allocators."""

    propagate: Literal["none", "block", "input"] = "block"
    """Inputs that a site is fitted to: the dense model's, those behind compressed blocks, or also behind the compressed
    sites of its own block."""

    on_failure: Literal["raise", "dense"] = "raise"
    """What to do where a site fails: stop, or leave it dense and report it as degraded."""

    options: dict[str, Any] = field(default_factory=dict)
    """The method's own fields; in TOML they stand in the step itself."""

    def __post_init__(self) -> None:
        budgets = {name: getattr(self, name) for name in ("keep", "bits", "size") if getattr(self, name) is not None}
        if len(budgets) != 1:
            came = " and ".join(f"{k} = {v}" for k, v in budgets.items()) or "none of them"
            raise RecipeError(f"step {self.method!r}: give exactly one of keep, bits and size (came: {came})")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise RecipeError(f"step {self.method!r}: keep = {self.keep}; wanted above 0 and at most 1")
        if self.bits is not None and not 0 < self.bits < math.inf:
            raise RecipeError(f"step {self.method!r}: bits = {self.bits}; wanted above 0")
        if not self.target:
            raise RecipeError(f"step {self.method!r}: target is an empty list; name roles or patterns, or all")
        if self.size is not None and parse_size(self.size) <= 0:
            raise RecipeError(f"step {self.method!r}: size = {self.size!r}; wanted above 0 bytes")

    @property
    def size_bytes(self) -> int | None:
        return None if self.size is None else parse_size(self.size)


@dataclass(frozen=True)
class Recipe:
    __pydantic_config__ = ConfigDict(extra="forbid")

    model: str
    """Folder or hub name."""

    step: list[Step]
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
        if not 0 <= self.seed < 2**63:
            raise RecipeError(f"seed = {self.seed}; wanted 0 or more, below 2^63")
        if not self.step:
            raise RecipeError("a recipe without a step does nothing; add a [[step]]")
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
    verbs = [verb for verb in VERBS if verb in plain]
    if len(verbs) != 1:
        raise RecipeError(f"step {number}: wanted exactly one of {', '.join(VERBS)}; its keys: {', '.join(plain)}")
    if not isinstance(plain.get("options", {}), dict):
        raise RecipeError(f"step {number}: options = {plain['options']!r}; wanted a table of the method's own fields")
    own = {f.name for f in dataclasses.fields(Step)}
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
        place = ".".join(str(part + 1) if isinstance(part, int) else part for part in first["loc"])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = {"calibration": Calibration, "evaluation": Evaluation}.get(str(first["loc"][0]), kind)
            names = [f.name for f in dataclasses.fields(known)]
            raise RecipeError("recipe: " + unknown("key", str(first["loc"][-1]), names)) from error
        raise RecipeError(f"recipe: {place}: {first['msg']} (came: {first.get('input')!r})") from error


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

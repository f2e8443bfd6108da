"""Recipes out of flags."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersely.errors import RecipeError
from tersely.recipe import Recipe, plain_step, read_toml, recipe_from


@dataclass(frozen=True)
class Asked:
    """What the flags of a command say; None stands for what was not said."""

    model: str
    step: dict[str, Any]
    """Flag → value, of what belongs to a step."""
    settings: list[str] | None
    calibration: dict[str, Any]
    evaluate: list[str] | None
    top: dict[str, Any]
    """seed, device, dtype, revision."""
    trust_remote_code: bool = False
    file: Path | None = None

    def recipe(self, verb: str | None = None) -> Recipe:
        """The recipe of the flags; with a file, its recipe with what the flags say on top.

        `verb`: of the one step; None for that under which the method's name stands.
        """
        plain: dict[str, Any] = {"step": [self._step(verb)]} if self.file is None else self._from_file()
        plain["calibration"] = plain.get("calibration", {}) | _said(self.calibration)
        if self.evaluate is not None:
            plain["evaluation"] = plain.get("evaluation", {}) | {"text": self.evaluate}
        plain |= _said({"model": self.model, **self.top})
        if self.trust_remote_code:
            plain["trust_remote_code"] = True
        return recipe_from(plain)

    def _from_file(self) -> dict[str, Any]:
        assert self.file is not None  # the caller has looked
        given = [f"--{flag}" for flag in _said(self.step)] + (["--set"] if self.settings is not None else [])
        if given:
            raise RecipeError(f"{', '.join(given)} and --recipe: what a step does stands in the recipe")
        return read_toml(self.file)

    def _step(self, verb: str | None) -> dict[str, Any]:
        if self.step.get("method") is None:
            raise RecipeError("give --method NAME, or --recipe FILE; `tersely list` shows the methods")
        pairs = pairs_of(self.settings)
        if twice := sorted(self.step.keys() & pairs.keys()):
            raise RecipeError(f"--set {twice[0]}: there is an option of its own for that, --{twice[0]}")
        said = _said(self.step)
        name = said.pop("method")
        if verb is None:
            from tersely.tables import verb_for

            verb = verb_for(name)
        return plain_step(verb, name, said | pairs)


def pairs_of(settings: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE with values as TOML writes them; a bare word is a string."""
    pairs: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise RecipeError(f"--set {setting}: wanted KEY=VALUE, such as alpha=0.5")
        try:
            pairs[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            pairs[key.strip()] = value
    return pairs


def _said(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}

"""All tables by the verb that uses them, and objects built from what a recipe says."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tersely.allocate import ALLOCATORS, Allocator
from tersely.cache import CACHES
from tersely.convert import CONVERSIONS
from tersely.errors import RecipeError, unknown
from tersely.methods import METHODS, UNIT_METHODS
from tersely.recipe import STEPS, MethodStep, Recipe, Step, verb_of
from tersely.rewrite import REWRITES
from tersely.train.objectives import OBJECTIVES
from tersely.train.relax import RELAXATIONS

TABLES: dict[str, Mapping[str, type]] = {
    "method": METHODS | UNIT_METHODS,
    "rewrite": REWRITES,
    "cache": CACHES,
    "convert": CONVERSIONS,
    "train": RELAXATIONS,
}
"""Verb of a step → what can be named with it."""

NOUNS = {
    "method": "method",
    "rewrite": "rewrite",
    "cache": "cache",
    "convert": "conversion",
    "train": "relaxation",
}


def build(step: Step) -> Any:
    """The object that a step names, with its fields.

    Raises RecipeError for an unknown name, objective or field, or a value of a wrong kind.
    """
    for objective in getattr(step, "train", ()):
        if objective not in OBJECTIVES:
            raise RecipeError(unknown("objective", objective, OBJECTIVES))
    verb = verb_of(step)
    return build_entry(verb, step.name, step.options)


def build_entry(verb: str, name: str, options: Mapping[str, Any]) -> Any:
    table, noun = TABLES[verb], NOUNS[verb]
    if name not in table:
        elsewhere = [other for other, names in TABLES.items() if name in names]
        hint = f"; {name!r} is a {NOUNS[elsewhere[0]]}: write {elsewhere[0]} = {name!r}" if elsewhere else ""
        raise RecipeError(unknown(noun, name, table) + hint)
    known = [f.name for f in fields(table[name])]
    own = [f.name for f in fields(STEPS[verb])]
    for option in options:
        if option not in known:
            raise RecipeError(f"{noun} {name}: " + unknown("option", option, [*known, *own]))
    try:
        # through JSON: strict, and "yes" is no boolean
        return TypeAdapter(table[name]).validate_json(json.dumps(dict(options)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{noun} {name}: {place}: {first['msg']} (came: {first.get('input')!r})") from error


def settled(recipe: Recipe) -> Recipe:
    """The recipe with every `propagate` said: of a step that leaves it open the method's own, if it has one."""
    return replace(recipe, step=[_settled(step) for step in recipe.step])


def _settled(step: Step) -> Step:
    if not isinstance(step, MethodStep) or step.propagate is not None:
        return step
    return replace(step, propagate=getattr(TABLES["method"].get(step.method), "usual_propagate", "block"))


def build_allocator(name: str) -> Allocator:
    if name not in ALLOCATORS:
        raise RecipeError(unknown("allocator", name, ALLOCATORS))
    return ALLOCATORS[name]


def verb_for(name: str) -> str:
    """The verb under which a name stands, for commands that take any.  Raises RecipeError for an unknown name."""
    for verb, table in TABLES.items():
        if name in table:
            return verb
    raise RecipeError(unknown("method", name, [name for table in TABLES.values() for name in table]))

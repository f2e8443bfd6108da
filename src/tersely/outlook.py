"""What the model will consist of after each step of a recipe, as far as names tell.

A recipe is checked as a whole before anything is done: a step that finds no target, because there is none or because a
step before it has left nothing there to compress, must not be noticed after hours of work on the steps before it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tersely import temper
from tersely.anatomy import Anatomy, Kept, Place, Site
from tersely.checkpoint import Source
from tersely.convert import attention_settings
from tersely.errors import AnatomyError, RecipeError
from tersely.gating import check_method
from tersely.kinds import SharedLinear
from tersely.kinds.attention import LINEARS, Attention
from tersely.methods import METHODS, FormsUnits
from tersely.recipe import CacheStep, ConvertStep, MethodStep, RewriteStep, Step, TrainStep
from tersely.steps.compressing import budget_bytes, check_stream, targets_of, units_of
from tersely.steps.outside import check_outside
from tersely.steps.training import settings_of
from tersely.tables import build_allocator
from tersely.train.relax.adapter import shape_of
from tersely.train.relax.full import Full, refuse_shared


class Outlook:
    """The anatomy, carried from step to step.  Names and roles are those to come; shapes are not known."""

    def __init__(self, anatomy: Anatomy, source: Source) -> None:
        self._anatomy = anatomy
        self._began = {site.name: site for site in (*anatomy.sites, *anatomy.outside)}
        self._source = source
        self._replaced: set[str] = set()
        """Sites that exist no more, and those that stand in their places."""
        self._latent = {
            f"{path}.{LINEARS[role]}"
            for path, spec in source.manifest.items()
            if spec["kind"] == Attention.name and spec["latent"]
            for role in ("k", "v")
        }
        self._shared = {path for path, spec in source.manifest.items() if spec["kind"] == SharedLinear.name}
        """Linears that have a factor together, or may come to have one."""
        self._used: dict[str, str] = {}
        """Site → what left nothing of it."""

    def check(self, number: int, step: Step, built: Any) -> tuple[Site, ...]:
        """The linears that a step acts on.  Those that a step before leaves have the shape of what they came from.
        Raises AnatomyError or RecipeError for a step that will not find what it needs."""
        try:
            return tuple(self._check(step, built))
        except AnatomyError as error:
            raise AnatomyError(f"step {number} ({step.name}): {error}{self._reason(step)}") from error

    def _check(self, step: Step, built: Any) -> Sequence[Site]:
        if isinstance(step, RewriteStep):
            sites = self._anatomy.sites
            built.check(self._anatomy, self._source.config)
            if built.settings(self._anatomy).get("tie_word_embeddings") is False:
                self._anatomy = self._anatomy.untied()
            return sites
        if isinstance(step, TrainStep):
            settings_of(step)
            places = self._anatomy.select_places(step.target)
            latent = [place.name for place in places if place.name in self._latent]
            if latent:
                raise AnatomyError(
                    f"{latent[0]} is read as two factors by the cache of latents; leave k and v untrained"
                )
            self._check_training(step, built, [place.name for place in places])
            return self._whole(places)
        if isinstance(step, ConvertStep):
            skeleton = self._source.skeleton()
            units = self._anatomy.select_units(["attention"], built.roles)
            for unit in units:
                built.check(unit, attention_settings(skeleton, unit))
                self._replace([unit.sites["o"]], ("dense",), step.name)
            return [site for unit in units for site in unit.sites.values()]
        if isinstance(step, CacheStep):
            _check_allocator(step, built)
            budget_bytes(step, targets_of(step, self._anatomy, self._source), self._source)
            units = self._anatomy.select_units(["attention"], built.roles)
            for unit in units:
                self._replace([unit.sites["k"], unit.sites["v"]], ("down", "up"), step.name)
                self._latent |= {unit.sites["k"].name, unit.sites["v"].name}
            return [site for unit in units for site in unit.sites.values()]
        return self._check_method(step, built)

    def _whole(self, places: Sequence[Place]) -> list[Site]:
        """The linears that places were before the first step, whatever stands there by then."""
        skeleton = None if all(place.name in self._began for place in places) else self._source.skeleton()
        found = []
        for place in places:
            if skeleton is None or place.name in self._began:
                found.append(self._began[place.name])
                continue
            shape = shape_of(skeleton.get_submodule(place.name))
            found.append(Site(place.name, place.role, place.block, place.reads, *shape, bias=False, transposed=False))
        return found

    def _check_training(self, step: TrainStep, built: Any, places: list[str]) -> None:
        sites = {site.name: site for site in self._anatomy.sites}
        plain = [sites[name] for name in places if name in sites]
        packed = [n for n in places if n not in sites and not any(site.startswith(f"{n}.") for site in sites)]
        shapes = [(site.out_features, site.in_features) for site in plain]
        changed = [name for name in places if name not in sites]
        began = self._source.skeleton() if changed else None
        kinds = [shape_of(began.get_submodule(name)) for name in changed] if began is not None else []
        built.check(shapes, kinds, len(packed), step.bits)
        if isinstance(built, Full) and self._shared.intersection(places):
            refuse_shared(self._source.dtype)
        for factor in getattr(built, "factors", ()):
            factorised = [name for name in places if name not in sites]
            if not any(f"{name}.{factor}" in sites for name in factorised):
                found = sorted(
                    {n.rpartition(".")[2] for n in sites if n.startswith(tuple(f"{f}." for f in factorised))}
                )
                raise RecipeError(
                    f"step {step.name!r}: no target will have a factor {factor!r} to train; there will be "
                    f"{', '.join(found) or 'none'}"
                )
        if built.leaves is not None:
            self._replace(plain, built.leaves, step.name)

    def _check_method(self, step: MethodStep, built: Any) -> Sequence[Site]:
        _check_allocator(step, built)
        if step.temper:
            temper.check(self._anatomy)
        if step.base is None and getattr(built, "needs_base", False):
            raise RecipeError(f"step {step.name!r} compresses the difference to another checkpoint; name it as base")
        if step.base is not None and step.method not in METHODS:
            raise RecipeError(f"step {step.name!r}: a base goes with methods on single linears")
        if step.base is not None and self._replaced:
            raise RecipeError(
                f"step {step.name!r}: a difference to a base needs the fine-tuned model as it was trained, and an "
                "earlier step replaces its linears"
            )
        check_outside(step, built, self._anatomy, self._source.dtype.itemsize)
        if step.method in METHODS:
            sites = list(self._anatomy.select(step.target))
            check_stream(step, built, self._anatomy, sites)
            leaves = built.leaves
        else:
            units = units_of(step, built, self._anatomy)
            sites = [site for unit in units for site in unit.sites.values()]
            leaves = built.leaves if isinstance(built, FormsUnits) else ("dense",)
            if isinstance(built, FormsUnits):  # whether they will share may be the allocator's choice
                self._shared |= {s.name for unit in units if len(unit.sites) > 1 for s in unit.sites.values()}
        # else nobody knows how many bytes there will be; whether there is a choice of sizes is known
        if not step.has_budget or all(site.name not in self._replaced for site in sites):
            budget_bytes(step, targets_of(step, self._anatomy, self._source), self._source)
        self._replace(sites, leaves, step.name)
        return sites

    def _replace(self, sites: "tuple[Site, ...] | list[Site]", leaves: tuple[str, ...], name: str) -> None:
        chosen = {site.name for site in sites}
        self._replaced |= chosen
        self._replaced |= {f"{name}.{leaf}" for name in chosen for leaf in leaves}
        if not leaves:
            self._used |= dict.fromkeys(chosen, name)

        def after() -> Iterator[Site]:
            for site in self._anatomy.sites:
                if site.name not in chosen:
                    yield site
                for leaf in leaves if site.name in chosen else ():
                    yield replace(site, name=f"{site.name}.{leaf}", role=f"{site.role}.{leaf}")

        kept = tuple(u for u in self._anatomy.units if all(s.name not in chosen for s in u.sites.values()))
        gone = [site for site in self._anatomy.outside if site.name in chosen]
        sealed = [site for site in self._anatomy.sites if site.name in chosen and not leaves]
        reason = f"compressed by an earlier step, {name}"
        self._anatomy = replace(
            self._anatomy,
            sites=tuple(after()),
            units=kept,
            kept=(*self._anatomy.kept, *(Kept(s.name, (s.out_features, s.in_features), reason) for s in sealed)),
            table=None if any(site.role == "embeddings" for site in gone) else self._anatomy.table,
            output=None if any(site.role == "head" for site in gone) else self._anatomy.output,
            unfit=dict(self._anatomy.unfit) | self._unfit(gone, name),
        )

    def _unfit(self, gone: Sequence[Site], name: str) -> dict[str, str]:
        """Of what is outside of the blocks, why nothing is left to compress."""
        words = {site.role for site in gone}
        if "embeddings" in words and self._anatomy.head_is_tied:
            words.add("head")
        return dict.fromkeys(words, f"an earlier step ({name}) has replaced it")

    def _reason(self, step: Step) -> str:
        if not self._used or not isinstance(step, MethodStep):
            return ""
        by = ", ".join(dict.fromkeys(self._used.values()))
        return f"; of {len(self._used)} linears an earlier step ({by}) leaves nothing that could be compressed again"


def _check_allocator(step: MethodStep | CacheStep, built: Any) -> None:
    """Raises RecipeError for an allocator that does not exist, and for one that learns ranks where there are none."""
    if build_allocator(step.allocate).learns is not None:
        single = isinstance(step, MethodStep) and step.method in METHODS and step.base is None
        check_method(f"step {step.name!r}", built, single=single)

"""Steps with a budget: methods on linears, on units, and caches.  The work is that of the sweeps."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from typing import Any

from tersely.allocate import Curve
from tersely.anatomy import Anatomy, Site, Unit
from tersely.cache import CACHES
from tersely.calibrate import StatisticsStore
from tersely.checkpoint import Edit, Source, State, carried_files, locate
from tersely.convert import AttentionSettings, attention_settings, norm_tensors
from tersely.deltas.folder import check_pair, open_any
from tersely.errors import AnatomyError, RecipeError
from tersely.job import Clock, Job, most
from tersely.methods import METHODS, FormsUnits, RebuildsAttention, UnitMethod
from tersely.option import Option
from tersely.planning import Sought, forced, seek_plan, size_curves
from tersely.recipe import CacheStep, MethodStep, Step
from tersely.refine import Refining
from tersely.report.rows import Row, SiteRow, thinned
from tersely.stats import Drift, MeanGradient
from tersely.steps.learning import taught
from tersely.steps.outside import check_outside, outside_target
from tersely.steps.scene import Done, Scene
from tersely.sweeps import Outcome, compress
from tersely.tables import build, build_allocator
from tersely.targets import CacheTarget, GroupTarget, SiteTarget, Target, UnitTarget
from tersely.temper import Tempered, temper

# What a folder holds beside the weights, for budgets of the whole folder: headers, manifest and reports, from above.
OVERHEAD, OVERHEAD_PER_SITE = 60_000, 2_000


def run(step: MethodStep | CacheStep, scene: Scene) -> Done:
    assert step.propagate is not None  # `settled` has seen to it
    base = base_of(step, scene.source)
    targets = targets_of(step, scene.anatomy, scene.source, base)
    job = Job(
        source=scene.source,
        anatomy=scene.anatomy,
        targets=targets,
        allocator=build_allocator(step.allocate),
        budget=budget_bytes(step, targets, scene.source),
        propagate=step.propagate,
        on_failure=step.on_failure,
        windows=scene.windows,
        device=scene.device,
        journal=scene.journal,
        store=_store(step, targets, scene),
        progress=scene.progress,
    )
    job = taught(job)
    sought = None
    if isinstance(step, MethodStep) and step.perplexity is not None:
        sought = seek_plan(job, step.perplexity)
    outcome = compress(job, _refining(step, scene))
    seconds, peaks, changed = dict(outcome.seconds), dict(outcome.peaks), dict(outcome.trained)
    sizes = [_per_token(job, outcome)] if isinstance(step, CacheStep) else [_found(sought)] if sought else []
    if isinstance(step, MethodStep) and step.temper and scene.unseen is not None:
        clock = Clock(job.device)
        tempered, scaled = temper(job, scene.unseen, outcome.replaced, changed, clock)
        changed |= scaled
        seconds, peaks = _sum(seconds, clock.seconds), most(peaks, clock.peaks)
        sizes.append(_factor(tempered))
    return Done(
        edit=Edit(replaced=outcome.replaced, changed=changed),
        touched=tuple(dict.fromkeys(site.name for target in targets for site in target.sites)),
        rows=_rows(job, outcome, scene.number, step.name),
        plan=json.loads(outcome.plan.to_json()),
        degraded=outcome.degraded,
        seconds=_sum(seconds, sought.seconds if sought else {}),
        peaks=most(peaks, sought.peaks if sought else {}),
        sizes=sizes,
        figures={"refined": {path: asdict(one) for path, one in outcome.refined.items()}} if outcome.refined else {},
        base=base,
    )


def _sum(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {stage: first.get(stage, 0.0) + second.get(stage, 0.0) for stage in dict.fromkeys([*first, *second])}


def _refining(step: MethodStep | CacheStep, scene: Scene) -> Refining | None:
    if not isinstance(step, MethodStep) or step.refine is None:
        return None
    if scene.text is None:
        raise RecipeError("a step that refines needs text")
    return Refining(step.refine, scene.text, scene.seed)


def base_of(step: Step, source: Source) -> Source | None:
    """The other checkpoint of a step on differences.  Raises CheckpointError unless it is of the same architecture."""
    if not isinstance(step, MethodStep) or step.base is None:
        return None
    base = open_any(locate(step.base), dtype=str(source.dtype).removeprefix("torch."))
    check_pair(source, base)
    return base


def targets_of(
    step: MethodStep | CacheStep, anatomy: Anatomy, source: Source, base: Source | None = None
) -> tuple[Target, ...]:
    """What a step acts on.  Raises AnatomyError where there is nothing, or something that the method cannot treat."""
    built = build(step)
    if isinstance(step, MethodStep):
        check_outside(step, built, anatomy, source.dtype.itemsize)
    if isinstance(step, CacheStep):
        units = anatomy.select_units(["attention"], CACHES[step.cache].roles)
        for unit in units:
            built.check(unit)
        settings = _settings(units, source)
        return tuple(
            CacheTarget(unit, built, settings[unit.name], _norms(unit, settings[unit.name], source)) for unit in units
        )
    if step.method in METHODS:
        sites = anatomy.select(step.target)
        check_stream(step, built, anatomy, sites)
        bases = {} if base is None else {s.name: base.tensor(f"{s.name}.weight") for s in sites}
        turned = {s.name: bases[s.name].T if s.transposed else bases[s.name] for s in sites if s.name in bases}
        return tuple(
            outside_target(site, built, anatomy, source)
            if site in anatomy.outside
            else SiteTarget(site, built, turned.get(site.name))
            for site in sites
        )
    units = units_of(step, built, anatomy)
    if isinstance(built, RebuildsAttention) and any(unit.role == "attention" for unit in units):
        return _rebuilt(built, units, source)
    for unit in units:
        built.check(unit)
    if not isinstance(built, FormsUnits):
        return tuple(UnitTarget(unit, built) for unit in units)
    targets = tuple(GroupTarget(unit, built) for unit in units)
    if step.propagate != "none" and any(target.spans_blocks for target in targets):
        raise RecipeError(
            f"step {step.name!r}: linears of several blocks share a factor, so that none of these blocks can be cut "
            f"before the last of them is observed, and propagate = {step.propagate!r} observes each behind the cut "
            'ones; set propagate = "none"'
        )
    return targets


def check_stream(step: MethodStep, method: Any, anatomy: Anatomy, sites: Sequence[Site]) -> None:
    """Raises for a method that makes up for the drift of the residual stream where that cannot be observed."""
    if Drift not in method.needs:
        return
    if step.propagate != "input":
        raise RecipeError(
            f"step {step.name!r}: residual makes up for what the linears before have done to the residual stream, and "
            f'propagate = {step.propagate!r} does not observe each behind the cut ones; set propagate = "input", or '
            "residual = 0"
        )
    if not any(site.name in anatomy.streams for site in sites):
        reason = anatomy.mixed_norms or "none of the targets is a linear that writes to it"
        raise AnatomyError(f"nothing can make up for the drift of the residual stream: {reason}; set residual = 0")


def units_of(step: MethodStep, method: UnitMethod, anatomy: Anatomy) -> tuple[Unit, ...]:
    """The linears that a step treats together.  Raises AnatomyError where there are none."""
    if not isinstance(method, FormsUnits):
        return anatomy.select_units(step.target, method.roles)
    units = tuple(method.units(anatomy.select(step.target)))
    if not units:
        raise AnatomyError(
            f"target {list(step.target)} holds no linear that is still as the model had it; {step.name} comes before "
            "steps that replace linears"
        )
    return units


def _rebuilt(method: Any, units: Sequence[Unit], source: Source) -> tuple[Target, ...]:
    """Targets of a method that has to know what an attention does."""
    try:
        settings = _settings([unit for unit in units if unit.role == "attention"], source)
        methods = {u.name: method.for_attention(settings[u.name]) if u.name in settings else method for u in units}
        for unit in units:
            methods[unit.name].check(unit)
    except AnatomyError as error:
        others = sorted({unit.role for unit in units} - {"attention"})
        hint = f"; with target = {others} attention is left as it is" if others else ""
        raise AnatomyError(f"{error}{hint}") from error
    norms = {unit.name: _norms(unit, settings[unit.name], source) for unit in units if unit.name in settings}
    return tuple(UnitTarget(unit, methods[unit.name], norms.get(unit.name, {})) for unit in units)


def _settings(units: Sequence[Unit], source: Source) -> dict[str, AttentionSettings]:
    """What the attention of each unit does.  Raises AnatomyError where ours could not stand in its place."""
    skeleton = source.skeleton()
    return {unit.name: attention_settings(skeleton, unit) for unit in units}


def _norms(unit: Unit, attention: AttentionSettings, source: Source) -> State:
    """The gains of the norms of heads; empty where only headers are known."""
    if source.is_outline:
        return {}
    return {name: source.tensor(stored) for name, stored in norm_tensors(unit, attention).items()}


def budget_bytes(step: MethodStep | CacheStep, targets: Sequence[Target], source: Source) -> int | None:
    """Bytes that the targets may take (of a cache: per token); None where the method leaves no choice.

    Raises RecipeError for a budget below the smallest that the method can do, and where the asked size leaves nothing.
    """
    itemsize = source.dtype.itemsize
    curves, allocator = size_curves(targets, itemsize), build_allocator(step.allocate)
    if isinstance(step, MethodStep) and not step.has_budget:
        forced(curves)
        return None
    if allocator.needs_drift and not all(MeanGradient in target.needs for target in targets):
        raise RecipeError(
            f"step {step.name!r}: the allocator {step.allocate} goes by the signed change of the loss that options "
            f"predict, and those of {step.name} predict none; use zs_svd, or another allocator"
        )
    budget = _asked_bytes(step, targets, source)
    if not allocator.needs_errors:
        allocator.divide(curves, budget)
    _check_smallest(step.name, curves, budget)
    return budget


def _asked_bytes(step: MethodStep | CacheStep, targets: Sequence[Target], source: Source) -> int:
    dense = sum(target.dense_bytes(source.dtype.itemsize) for target in targets)
    if step.keep is not None:
        return int(Fraction(str(step.keep)) * dense)  # 0.8 of 10 bytes is 8, though 0.8 in binary is not
    assert isinstance(step, MethodStep)  # only these have other budgets
    if step.perplexity is not None:
        if build_allocator(step.allocate).learns is not None:
            raise RecipeError(
                f"step {step.name!r}: the allocator {step.allocate} learns a division of one size, and a perplexity is "
                "looked for among many; ask for a size, or choose another allocator"
            )
        return dense  # at most; how much less, the model has to be asked
    if step.bits is not None:
        weights = sum(target.elements for target in targets)
        budget = int(Fraction(str(step.bits)) * weights / 8)
        if budget >= dense:
            now = f"the targets take {8 * dense / weights:g} bits per weight now"
            raise RecipeError(f"bits {step.bits}: {now}; ask for less")
        return budget
    beside = source.nbytes() - dense + sum(path.stat().st_size for path in carried_files(source.carried_from))
    beside += OVERHEAD + OVERHEAD_PER_SITE * sum(len(target.sites) for target in targets)
    left = (step.size_bytes or 0) - beside
    if left <= 0:
        raise RecipeError(f"size {step.size}: everything but the targets takes {beside} bytes already; ask for more")
    return min(left, dense)


def _check_smallest(name: str, curves: Sequence[Curve], budget: int) -> None:
    smallest = sum(curve.options[0].nbytes for curve in curves)
    if smallest > budget:
        dense = sum(curve.dense_bytes for curve in curves)
        raise RecipeError(
            f"step {name!r}: a budget of {budget} bytes for the targets, whose smallest form takes {smallest}; "
            f"keep at least {smallest / dense:.4f}"
        )


def spills(step: MethodStep | CacheStep, targets: Sequence[Target]) -> bool:
    """Whether statistics of the dense model go to disk: observed in sweep 1, they are read again in sweep 2."""
    needed = any(target.needs for target in targets)
    if isinstance(step, MethodStep) and step.perplexity is not None:
        return needed  # plans are made from them, one after the other
    return step.propagate == "none" and needed and build_allocator(step.allocate).needs_errors


def _store(step: MethodStep | CacheStep, targets: Sequence[Target], scene: Scene) -> StatisticsStore | None:
    shared = scene.statistics is not None
    if scene.windows is None or not (shared or spills(step, targets)):
        return None
    return StatisticsStore(scene.statistics or scene.journal.folder, scene.measured_on(), shared=shared)


def _per_token(job: Job, outcome: Outcome) -> Row:
    dense = sum(choice.dense_bytes for choice in outcome.plan.choices.values())
    saved = [outcome.plan.choices[name] for name in outcome.done]
    now = dense - sum(choice.dense_bytes - choice.nbytes for choice in saved)
    return Row("cache per token", now, "bytes", "keys and values that one token leaves, all blocks", dense)


def _found(sought: Sought) -> Row:
    how = f"of {sought.windows} calibration windows, everything cut on the inputs of the dense model"
    return Row("calibration perplexity", sought.perplexity, "", how, sought.dense_perplexity)


def _factor(found: Tempered) -> Row:
    gained = f"{found.before:.4f} to {found.after:.4f} nats from the predictions before, {found.windows} windows"
    return Row("factor of logits", found.factor, "", f"in the norm before the head; {gained}", 1.0)


def _rows(job: Job, outcome: Outcome, number: int, method: str) -> list[SiteRow]:
    rows, offered = [], _offered(job)
    for target in job.targets:
        choice = outcome.plan.choices[target.name]
        done = target.name in outcome.done
        single = target.sites[0] if len(target.sites) == 1 else None
        rows.append(
            SiteRow(
                name=target.name,
                role=target.role,
                out_features=single.out_features if single else None,
                in_features=single.in_features if single else None,
                step=number,
                method=method,
                amount=choice.amount if done else None,
                nbytes=choice.nbytes if done else choice.dense_bytes,
                dense_bytes=choice.dense_bytes,
                predicted_error=choice.relative_error if done else 0.0,
                measured_error=outcome.errors[target.name],
                curve=_curve(offered.get(target.name)) or _spectrum(outcome.spectra.get(target.name)),
            )
        )
    return rows


def _offered(job: Job) -> dict[str, Any]:
    """Target → its options as plain values, where the plan was made from what they cost."""
    units = [f"curves/{index:04}.json" for index in range(job.count)]
    found: dict[str, Any] = {}
    for unit in units:
        if job.journal.has(unit):
            found |= job.journal.read_json(unit)
    return found


def _curve(offered: Any) -> list[tuple[Any, float]] | None:
    """What every amount would lose of the output energy; None where that is not known, or amounts are no numbers."""
    options = [Option(*option) for option in offered] if isinstance(offered, list) else []
    energy = next((option.error for option in options if option.amount == 0), None)
    if not energy or any(o.error is None or not isinstance(o.amount, int | float) for o in options):
        return None
    return thinned([(option.amount, (option.error or 0.0) / energy) for option in options])


def _spectrum(left: Sequence[float] | None) -> list[tuple[int, float]] | None:
    return None if left is None else thinned(list(enumerate(left)))

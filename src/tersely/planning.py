"""How a budget is divided: the first sweep, which asks every target for its curve, and the allocator.

An allocator that needs no errors works from shapes alone.  One that has the model measured is given a laboratory, in
which each target is cut alone, and put back.  One that learns walks down the model's loss first (`gating`).

A perplexity may be asked for in the place of a size.  Then the allocator divides one budget after the other, each plan
is made in the laboratory, all of it on the inputs of the dense model, and calibration windows are read: the smallest
budget whose plan stays below the asked perplexity is found by bisection.  The budgets come from one grid, the
`GRID`-th parts of the dense bytes, so that another target meets plans that are measured already.  The perplexity of
plans that an allocator makes falls with their bytes on the whole, not step by step; what is found is a plan that stays
below, next to one that does not.

Source: Yuan et al., ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models, 2023,
section 3.3 (arXiv 2312.05821), for the perplexity as a target.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tersely import gating
from tersely.allocate import Choice, Curve, Learned, Measured, Measures, Plan, curve_of
from tersely.calibrate import Blocks
from tersely.errors import NumericalError, RecipeError
from tersely.job import Clock, Job, dense_statistics, dense_weights, tell_site
from tersely.kinds import Kind
from tersely.option import Option
from tersely.sensitivity import Laboratory
from tersely.stats import Stats
from tersely.targets import Target

GRID = 512
"""Budgets among which a perplexity is looked for: nine plans are measured."""


@dataclass(frozen=True)
class Sought:
    """What was found for a perplexity; all of the calibration windows that the laboratory reads."""

    perplexity: float
    """Of the plan, everything cut on the inputs of the dense model."""
    dense_perplexity: float
    windows: int
    seconds: dict[str, float]
    peaks: dict[str, int] = field(default_factory=dict)
    """Stage → the most bytes that were held in it."""


def size_curves(targets: Sequence[Target], itemsize: int) -> list[Curve]:
    """Curves without errors, from shapes alone."""
    return [curve_of(t.name, t.sizes(itemsize), t.dense_bytes(itemsize), role=t.role) for t in targets]


def forced(curves: Sequence[Curve]) -> Plan:
    """The plan without a budget: every target takes the one form that it has, if that is smaller than it is now.

    Raises RecipeError where there is a choice.
    """
    for curve in curves:
        if len(curve.options) > 2:
            raise RecipeError(
                f"{curve.site} could become one of {len(curve.options) - 1} sizes; give one of keep, bits, size and "
                "perplexity"
            )
    return Plan(
        sum(curve.options[0].nbytes for curve in curves),
        {
            curve.site: Choice(
                curve.options[0].amount,
                curve.options[0].nbytes,
                curve.dense_bytes,
                curve.relative(curve.options[0]),
            )
            for curve in curves
        },
    )


def make_plan(job: Job, blocks: Blocks, clock: "Clock") -> Plan:
    """Divide the budget, after sweep 1 where the allocator asks for predicted errors."""
    if job.journal.has("plan.json"):
        return Plan.from_json(job.journal.read_json("plan.json"))
    itemsize = job.source.dtype.itemsize
    if job.budget is None:
        plan = forced(size_curves(job.targets, itemsize))
        job.journal.write_json("plan.json", plan.to_json())
        return plan
    curves, measures = _known(job, blocks, clock, _laboratory(job))
    with clock("allocate"):
        plan = job.allocator.divide(curves, job.budget, measures)
    job.journal.write_json("plan.json", plan.to_json())
    return plan


def seek_plan(job: Job, ceiling: float) -> Sought:
    """Leave the smallest plan in the journal whose perplexity is below the ceiling.

    Raises RecipeError where that of the dense model is not.
    """
    if job.journal.has("sought.json"):  # written after the plan
        return Sought(**job.journal.read_json("sought.json"))
    clock, blocks = Clock(job.device), Blocks(job.source, job.anatomy, job.device)
    laboratory = _laboratory(job) or _open_laboratory(job, "loss")
    dense = sum(target.dense_bytes(job.source.dtype.itemsize) for target in job.targets)
    with clock("measure"):
        of_dense = _perplexity(job, blocks, laboratory, Plan(dense, {}))
    _require_below(ceiling, of_dense, laboratory)
    curves, measures = _known(job, blocks, clock, laboratory)
    plan, found = job.allocator.divide(curves, dense, measures), of_dense
    failing, holding = 0, GRID
    while holding - failing > 1:
        part = (failing + holding) // 2
        try:
            with clock("allocate"):
                tried = job.allocator.divide(curves, dense * part // GRID, measures)
        except RecipeError:  # too small for this allocator, which divides the dense bytes as is known by now
            failing = part
            continue
        with clock("measure"):
            reached = _perplexity(job, blocks, laboratory, tried)
        if reached < ceiling:
            holding, plan, found = part, tried, reached
        else:
            failing = part
        job.progress("looking for a perplexity", GRID - (holding - failing) + 1, GRID)
    job.progress("looking for a perplexity", GRID, GRID)
    job.journal.write_json("plan.json", plan.to_json())
    sought = Sought(found, of_dense, laboratory.windows, dict(clock.seconds), clock.peaks)
    job.journal.write_json("sought.json", asdict(sought))
    return sought


def check_ceiling(ceiling: float, laboratory: Laboratory) -> None:
    """Raises RecipeError where the perplexity of the dense model is not below the ceiling; nothing is written."""
    _require_below(ceiling, laboratory.dense_perplexity, laboratory)


def _require_below(ceiling: float, of_dense: float, laboratory: Laboratory) -> None:
    if of_dense >= ceiling:
        raise RecipeError(
            f"perplexity {ceiling:g}: the dense model itself has {of_dense:.4g} on {laboratory.windows} calibration "
            "windows; ask for more than that"
        )


def _perplexity(job: Job, blocks: Blocks, laboratory: Laboratory, plan: Plan) -> float:
    """Of the model with all of a plan done to it, on the inputs of the dense model; infinite where it breaks."""
    cut = [target for target in job.targets if plan.choices and plan.choices[target.name].amount is not None]

    def make() -> dict[str, Kind]:
        made: dict[str, Kind] = {}
        chosen = {target.name for target in cut}
        for index, stats in dense_statistics(job, blocks, job.method_needs, Clock()) if cut else ():
            for target in job.in_block(index):
                if target.name not in chosen:
                    continue
                try:
                    made |= laboratory.made(target, stats, plan.choices[target.name].amount)
                except (NumericalError, torch.linalg.LinAlgError) as error:
                    if job.on_failure == "raise":
                        raise NumericalError(f"{target.name}: {error}") from error
        return made

    loss = laboratory.loss([(target, plan.choices[target.name].amount) for target in cut], job.on_failure, make)
    return math.inf if loss is None else math.exp(loss)


def _known(job: Job, blocks: Blocks, clock: "Clock", laboratory: Laboratory | None) -> tuple[list[Curve], Measures]:
    """What an allocator goes by: the curve of every target, and what it has the model measured for."""
    itemsize = job.source.dtype.itemsize
    what = job.allocator.learns
    if what is not None:
        gating.check(job.targets)  # before anything is swept
    harm: dict[str, dict[int, float]] = {}
    if job.allocator.needs_errors:
        curves = []
        job.progress("measuring blocks", 0, job.count)
        for index, stats in dense_statistics(job, blocks, job.method_needs, clock):
            unit = f"curves/{index:04}.json"
            if not job.journal.has(unit):
                with clock("curves"):
                    job.journal.write_json(unit, _curves(job, index, stats))
            options = job.journal.read_json(unit)
            for target in job.in_block(index):
                curve = _curve(job, target, options[target.name])
                if laboratory is not None and job.allocator.probes is not None:
                    with clock("measure"):
                        measured = _harm(job, laboratory, target, stats, job.allocator.probes(curve))
                    if isinstance(measured, str):  # from now on there is nothing that could be done to it
                        job.journal.write_json(unit, options | {target.name: measured})
                        options, curve, measured = job.journal.read_json(unit), _curve(job, target, measured), {}
                    harm[target.name] = measured
                curves.append(curve)
            job.progress("measuring blocks", index + 1, job.count)
    else:
        curves = size_curves(job.targets, itemsize)
    learned = {}
    if what is not None:
        with clock("learn"):
            learned = _learned(job, blocks, curves, what)
    similarity, spikes = {}, {}
    if laboratory is not None and job.allocator.measures == "similarity":
        with clock("measure"):
            of_block = laboratory.similarity(blocks)
        similarity = {target.name: of_block[target.block] for target in job.targets}
    if laboratory is not None and job.allocator.measures == "spikes":
        with clock("measure"):
            of_site = laboratory.spikes(blocks)
        spikes = {target.name: max(of_site[site.name] for site in target.sites) for target in job.targets}
    return curves, Measures(similarity, harm, learned, spikes)


def _learned(job: Job, blocks: Blocks, curves: Sequence[Curve], what: Learned) -> dict[str, float]:
    """The bytes of every site, learned for the job's budget."""
    assert job.windows is not None  # text is read for every allocator that learns
    if job.budget is None:
        raise RecipeError("this allocator learns a division of one size; ask for a size, not for a perplexity")
    asked = gating.Asked(
        job.source, job.windows, job.device, job.journal, job.store, job.targets, curves, job.budget, job.progress
    )
    return gating.learn(asked, what, lambda: dense_statistics(job, blocks, job.method_needs, Clock()))


def _laboratory(job: Job) -> Laboratory | None:
    """Where the model is measured, if the allocator asks for that."""
    return None if job.allocator.measures is None else _open_laboratory(job, job.allocator.measures)


def _open_laboratory(job: Job, measured: Measured) -> Laboratory:
    return Laboratory(job.source, job.anatomy, job.windows, job.device, job.journal, job.store, measured)


def _harm(
    job: Job, laboratory: Laboratory, target: Target, stats: Mapping[str, Stats], probed: Sequence[Option]
) -> dict[int, float] | str:
    """What the model loses by each of these options, or why that cannot be said."""
    try:
        return laboratory.harm(job.targets.index(target), target, stats, probed)
    except (NumericalError, torch.linalg.LinAlgError) as error:
        if job.on_failure == "raise":
            raise NumericalError(f"{target.name}: {error}") from error
        return str(error)


def _curve(job: Job, target: Target, offered: Any) -> Curve:
    """From options as plain values, or from the reason why there are none."""
    options = [] if isinstance(offered, str) else [Option(*option) for option in offered]
    # the errors of a method that reads no inputs are means over nothing
    tokens = job.windows.numel() if job.windows is not None and job.method_needs else 1
    itemsize = job.source.dtype.itemsize
    return curve_of(target.name, options, target.dense_bytes(itemsize), role=target.role, tokens=tokens)


def _curves(job: Job, index: int, stats: Mapping[str, Stats]) -> dict[str, Any]:
    """Target → its options as plain values, or why there are none."""
    options: dict[str, Any] = {}
    for target in job.in_block(index):
        try:
            offered = target.options(dense_weights(job, target), stats)
        except (NumericalError, torch.linalg.LinAlgError) as error:
            if job.on_failure == "raise":
                raise NumericalError(f"{target.name}: {error}") from error
            options[target.name] = str(error)
            continue
        options[target.name] = [(o.amount, o.nbytes, o.error, o.drift) for o in offered]
        tell_site(job.progress, target.name)
    return options

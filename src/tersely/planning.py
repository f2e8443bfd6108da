"""How a budget is divided: the first sweep, which asks every target for its curve, and the allocator.

An allocator that needs no errors works from shapes alone.  One that has the model measured is given a laboratory, in
which each target is cut alone, and put back.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tersely.allocate import Choice, Curve, Measures, Plan, curve_of
from tersely.calibrate import Blocks
from tersely.errors import NumericalError, RecipeError
from tersely.job import Clock, Job, as_weight, dense_statistics
from tersely.option import Option
from tersely.sensitivity import Laboratory
from tersely.stats import Stats
from tersely.targets import Target


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
                f"{curve.site} could become one of {len(curve.options) - 1} sizes; give one of keep, bits and size"
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
    laboratory = _laboratory(job)
    harm: dict[str, dict[int, float]] = {}
    if job.allocator.needs_errors:
        curves = []
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
            job.progress("measuring", index + 1, len(job.anatomy.blocks))
    else:
        curves = size_curves(job.targets, itemsize)
    similarity = {}
    if laboratory is not None and job.allocator.measures == "similarity":
        with clock("measure"):
            of_block = laboratory.similarity(blocks)
        similarity = {target.name: of_block[target.block] for target in job.targets}
    with clock("allocate"):
        plan = job.allocator.divide(curves, job.budget, Measures(similarity, harm))
    job.journal.write_json("plan.json", plan.to_json())
    return plan


def _laboratory(job: Job) -> Laboratory | None:
    """Where the model is measured, if the allocator asks for that."""
    measured = job.allocator.measures
    if measured is None:
        return None
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
        stored = {site.name: job.source.tensor(f"{site.name}.weight") for site in target.sites}
        weights = {site.name: as_weight(stored[site.name], site).to(job.device) for site in target.sites}
        try:
            offered = target.options(weights, stats)
        except (NumericalError, torch.linalg.LinAlgError) as error:
            if job.on_failure == "raise":
                raise NumericalError(f"{target.name}: {error}") from error
            options[target.name] = str(error)
            continue
        options[target.name] = [(o.amount, o.nbytes, o.error) for o in offered]
    return options

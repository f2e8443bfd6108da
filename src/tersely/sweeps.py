"""The two sweeps over a model's blocks.

    sweep 1, dense         observe a block's inputs, ask for the curve of each target, keep only the curve
    allocate               curves and a budget of bytes become a plan
    sweep 2, compressed    observe the inputs again, now behind compressed blocks; compress; go on with the cut block

Two sweeps, because two wishes collide: to divide a budget globally, every curve must be known before the first cut; to
fit a block to the inputs that it will really see, all blocks before it must be cut.  An allocator that needs no curves
skips the first sweep.  With ``propagate = "none"`` every target is fitted to the dense model's inputs; one sweep
observes them, spills the statistics to disk, and the second one reads them.  Gradients of the loss take the whole model
at once: they are gathered when first asked for, of the dense model whatever is propagated, and kept on disk.

Every finished block is a unit of the journal, so that a stopped run loses one block at most.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from tersely.allocate import Allocator, Choice, Curve, Measures, Plan, curve_of
from tersely.anatomy import Anatomy, Site
from tersely.calibrate import Blocks, Replay, StatisticsStore, watch_list
from tersely.checkpoint import Source, State
from tersely.errors import NumericalError, RecipeError
from tersely.gradients import GradientStatistics
from tersely.journal import Journal
from tersely.kinds import Kind, Made
from tersely.option import Option
from tersely.sensitivity import Laboratory
from tersely.stats import Cross, Gram, Statistic, Stats, keyed_by
from tersely.targets import Target

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""What is being done, how many units are done, of how many."""


@dataclass(frozen=True)
class Job:
    """Everything that a step needs to know; nothing in it changes while it runs."""

    source: Source
    anatomy: Anatomy
    targets: tuple[Target, ...]
    allocator: Allocator
    budget: int | None
    """In the unit of the targets' `dense_bytes`; None where every target has a single form to take."""
    propagate: str
    """none, block or input; see `MethodStep`."""
    on_failure: str
    windows: Tensor | None
    """Token numbers ``[samples, length]``; None for a data-free method without calibration."""
    device: str
    journal: Journal
    store: StatisticsStore | None
    """Where statistics of the dense model are kept; None to keep none."""
    progress: Progress

    @cached_property
    def needs(self) -> tuple[type[Statistic], ...]:
        """What is gathered: what the method reads, and the Gram matrix, which tells the error that a site really
        makes."""
        return tuple(dict.fromkeys([*self.method_needs, Gram])) if self.windows is not None else ()

    @cached_property
    def method_needs(self) -> tuple[type[Statistic], ...]:
        return tuple(dict.fromkeys(kind for target in self.targets for kind in target.needs))

    @cached_property
    def gradients(self) -> GradientStatistics | None:
        """Those of the dense model, whatever `propagate` says; None where the method reads none.  They are kept in the
        journal where no store is."""
        kinds = [kind for kind in self.needs if keyed_by(kind) != "input"]
        if not kinds or self.windows is None:
            return None
        store = self.store or StatisticsStore(self.journal.folder, {}, shared=False)
        sites = [site for target in self.targets for site in target.sites]
        return GradientStatistics(
            self.source, self.anatomy, sites, kinds, self.windows, store, self.device, self.progress
        )

    def in_block(self, index: int) -> tuple[Target, ...]:
        return tuple(target for target in self.targets if target.block == index)

    def sites_in_block(self, index: int) -> tuple[Site, ...]:
        return tuple(site for target in self.in_block(index) for site in target.sites)


@dataclass
class Outcome:
    """What became of the targets."""

    plan: Plan
    replaced: dict[str, Made]
    """Path in the model → what stands there now."""
    done: list[str]
    """Targets that were replaced."""
    errors: dict[str, float | None]
    """Target → share of its output energy that was lost on the inputs it was fitted to; None where not known."""
    degraded: dict[str, str]
    """Target → why it was left dense against the plan."""
    seconds: dict[str, float] = field(default_factory=dict)


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


def compress(job: Job) -> Outcome:
    """Run both sweeps; goes on where an interrupted run of the same journal stopped."""
    clock = _Clock()
    blocks = Blocks(job.source, job.anatomy, job.device)
    plan = _plan(job, blocks, clock)
    outcome = Outcome(plan, {}, [], {}, {})
    for index, unit in _compressed_blocks(job, blocks, plan, clock):
        outcome.replaced |= unit.replaced
        outcome.done += unit.done
        outcome.errors |= unit.errors
        outcome.degraded |= unit.degraded
        job.progress("compressing", index + 1, len(job.anatomy.blocks))
        errors = [error for error in unit.errors.values() if error is not None]
        mean = f", {sum(errors) / len(errors):.4f} mean rel. error" if errors else ""
        logger.info("block %d/%d: %d targets cut%s", index + 1, len(job.anatomy.blocks), len(unit.done), mean)
    for index in range(len(job.anatomy.blocks)):
        if job.journal.has(f"curves/{index:04}.json"):
            offered = job.journal.read_json(f"curves/{index:04}.json")
            outcome.degraded |= {name: why for name, why in offered.items() if isinstance(why, str)}
    outcome.seconds = dict(clock.seconds)
    return outcome


def _plan(job: Job, blocks: Blocks, clock: "_Clock") -> Plan:
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
        for index, stats in _dense_statistics(job, blocks, job.method_needs, clock):
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
        weights = {site.name: _weight(stored[site.name], site).to(job.device) for site in target.sites}
        try:
            offered = target.options(weights, stats)
        except (NumericalError, torch.linalg.LinAlgError) as error:
            if job.on_failure == "raise":
                raise NumericalError(f"{target.name}: {error}") from error
            options[target.name] = str(error)
            continue
        options[target.name] = [(o.amount, o.nbytes, o.error) for o in offered]
    return options


@dataclass
class _Unit:
    """The result of one block."""

    replaced: dict[str, Made] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    errors: dict[str, float | None] = field(default_factory=dict)
    degraded: dict[str, str] = field(default_factory=dict)


def _compressed_blocks(job: Job, blocks: Blocks, plan: Plan, clock: "_Clock") -> Iterator[tuple[int, _Unit]]:
    count = len(job.anatomy.blocks)
    finished = [_read_unit(job, index) for index in range(count)]
    if all(finished) or job.windows is None or job.propagate == "none":
        # a finished block is skipped by its own unit; nothing depends on the ones before
        dense = (
            _dense_statistics(job, blocks, job.needs, clock) if not all(finished) else ((i, {}) for i in range(count))
        )
        for index, stats in dense:
            yield index, finished[index] or _cut_at_once(job, blocks.dense(index), index, stats, plan, clock)
        return
    with clock("replay"):
        replay = Replay(job.source, job.anatomy, job.windows, job.device)
        # methods that compare with what the dense model reads get its stream alongside
        beside = replay.fork() if Cross in job.needs else None
    for index, done in enumerate(finished):
        unit = done or _cut_in_stream(job, blocks, index, replay, beside, plan, clock)
        yield index, unit
        if index + 1 < count:
            with clock("replay"):
                replay.observe(blocks.cut(index, unit.replaced), {}, advance=True)
                if beside is not None:
                    beside.observe(blocks.dense(index), {}, advance=True)


def _cut_at_once(
    job: Job, block: nn.Module, index: int, stats: Mapping[str, Stats], plan: Plan, clock: "_Clock"
) -> _Unit:
    """Compress all targets of a block from statistics that are at hand."""
    unit = _Unit()
    with clock("factorise"):
        for target in job.in_block(index):
            _cut(job, block, target, stats, plan.choices[target.name], unit)
    return _commit_unit(job, index, unit)


def _cut_in_stream(
    job: Job, blocks: Blocks, index: int, replay: Replay, dense: Replay | None, plan: Plan, clock: "_Clock"
) -> _Unit:
    """Compress a block on the inputs that come out of the compressed blocks before it.

    With ``propagate = "input"`` the targets are taken in groups that read one input, and the later groups observe a
    block whose earlier groups are cut already.
    """
    unit = _Unit()
    block = blocks.dense(index)
    gradients = _gradients(job, index, clock)
    beside = None if dense is None else (dense, blocks.dense(index))
    targets = job.in_block(index)
    groups: list[tuple[Target, ...]] = [targets] if targets else []
    if job.propagate == "input":
        inputs = [reads for reads, _ in job.anatomy.inputs(index)]
        by_input = sorted(targets, key=lambda target: inputs.index(target.sites[0].reads))
        groups = [tuple(group) for _, group in groupby(by_input, key=lambda target: target.sites[0].reads)]
    for group in groups:
        sites = [site for target in group for site in target.sites]
        watched = watch_list(job.anatomy, index, sites, _of_inputs(job.needs), job.device)
        with clock("replay"):
            replay.observe(block, watched, advance=False, beside=beside)
        stats = {key: of_input for key, (_, of_input) in watched.items()} | gradients
        with clock("factorise"):
            for target in group:
                _cut(job, block, target, stats, plan.choices[target.name], unit)
    return _commit_unit(job, index, unit)


def _cut(job: Job, block: nn.Module, target: Target, stats: Mapping[str, Stats], choice: Choice, unit: _Unit) -> None:
    """Replace one target inside `block` as the plan says, and note what that did."""
    if choice.amount is None:
        unit.errors[target.name] = 0.0
        return
    prefix = f"{job.anatomy.blocks[target.block]}."
    states = {site.name: block.get_submodule(site.name.removeprefix(prefix)).state_dict() for site in target.sites}
    weights = {site.name: _weight(states[site.name]["weight"], site) for site in target.sites}
    biases = {site.name: states[site.name]["bias"] for site in target.sites if site.bias}
    try:
        made = target.compress(weights, biases, stats, choice.amount)
        for name, kind in made.items():
            _check_finite(kind, name)
    except (NumericalError, torch.linalg.LinAlgError) as error:
        if job.on_failure == "raise":
            raise NumericalError(f"{target.name}: {error}") from error
        unit.degraded[target.name] = str(error)
        unit.errors[target.name] = 0.0
        return
    unit.errors[target.name] = target.error(weights, made, stats)
    unit.done.append(target.name)
    for name, kind in made.items():
        unit.replaced[name] = Made.of(kind)
        block.set_submodule(name.removeprefix(prefix), kind)


def _weight(stored: Tensor, site: Site) -> Tensor:
    """The weight as [out, in]."""
    return stored.T.contiguous() if site.transposed else stored


def _check_finite(kind: Kind, name: str) -> None:
    for part, tensor in kind.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise NumericalError(f"{part} of the compressed {name} is not finite in {tensor.dtype}")


def _dense_statistics(
    job: Job, blocks: Blocks, needs: Sequence[type[Statistic]], clock: "_Clock"
) -> Iterator[tuple[int, Mapping[str, Stats]]]:
    """Statistics of the dense model block by block: from the store where it has them, else by replay (and stored)."""
    count = len(job.anatomy.blocks)
    inputs = _of_inputs(needs)
    if not inputs or job.windows is None:
        yield from ((index, _gradients(job, index, clock)) for index in range(count))
        return
    replay = None
    for index in range(count):
        gradients = _gradients(job, index, clock)
        if job.store is not None and job.store.has(index, inputs):
            yield index, job.store.read(index, inputs, job.device) | gradients
            continue
        with clock("replay"):
            replay = replay or Replay(job.source, job.anatomy, job.windows, job.device)
            while replay.at < index:
                replay.observe(blocks.dense(replay.at), {}, advance=True)
            # a shared store serves every later choice of targets, so it is given all inputs of the block
            shared = job.store is not None and job.store.shared
            wanted = job.anatomy.sites if shared else job.sites_in_block(index)
            kinds = inputs if job.store is None else _of_inputs(job.needs)
            watched = watch_list(job.anatomy, index, wanted, kinds, job.device)
            replay.observe(blocks.dense(index), watched, advance=True)
        stats = {key: of_input for key, (_, of_input) in watched.items()}
        if job.store is not None:
            job.store.write(index, stats)
        yield index, stats | gradients
        del watched, stats, gradients  # before the next block's are gathered


def _of_inputs(needs: Sequence[type[Statistic]]) -> tuple[type[Statistic], ...]:
    """Those that a block shows by itself; gradients take the whole model."""
    return tuple(kind for kind in needs if keyed_by(kind) == "input")


def _gradients(job: Job, index: int, clock: "_Clock") -> dict[str, Stats]:
    """Site → statistics of the gradients in it, in the dense model."""
    if job.gradients is None:
        return {}
    with clock("gradients"):
        return job.gradients.of_block(index)


def _commit_unit(job: Job, index: int, unit: _Unit) -> _Unit:
    """Write a finished block, and hand it back as it lies on disk: memory holds one block, not all of them."""
    tensors = {f"{name}.{part}": t for name, made in unit.replaced.items() for part, t in made.state.items()}
    job.journal.write_tensors(f"blocks/{index:04}.safetensors", tensors)
    plain = {
        "specs": {name: made.specs for name, made in unit.replaced.items()},
        "done": unit.done,
        "errors": unit.errors,
        "degraded": unit.degraded,
    }
    job.journal.write_json(f"blocks/{index:04}.json", plain)
    return _read_unit(job, index) or unit


def _read_unit(job: Job, index: int) -> _Unit | None:
    if not job.journal.has(f"blocks/{index:04}.json"):  # written after the tensors
        return None
    plain: dict[str, Any] = job.journal.read_json(f"blocks/{index:04}.json")
    tensors = job.journal.read_tensors(f"blocks/{index:04}.safetensors")
    states: dict[str, State] = defaultdict(dict)
    for name, tensor in tensors.items():
        place = max((p for p in plain["specs"] if name.startswith(f"{p}.")), key=len)
        states[place][name.removeprefix(f"{place}.")] = tensor
    replaced = {name: Made(specs, states[name]) for name, specs in plain["specs"].items()}
    return _Unit(replaced, plain["done"], plain["errors"], plain["degraded"])


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begun

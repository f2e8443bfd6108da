"""The two sweeps over a model's blocks.

    sweep 1, dense         observe a block's inputs, ask the method for the curve of each site, keep only the curve
    allocate               curves and a budget of bytes become a plan
    sweep 2, compressed    observe the inputs again, now behind compressed blocks; compress; go on with the cut block

Two sweeps, because two wishes collide: to divide a budget globally, every curve must be known before the first cut; to
fit a block to the inputs that it will really see, all blocks before it must be cut.  An allocator that needs no curves
skips the first sweep.  With ``propagate = "none"`` every site is fitted to the dense model's inputs; one sweep observes
them, spills the statistics to disk, and the second one reads them.

Every finished block is a unit of the journal, so that a stopped run loses one block at most.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tersely.allocate import Allocator, Choice, Curve, Plan, curve_of
from tersely.anatomy import Anatomy, Site
from tersely.calibrate import Blocks, Replay, StatisticsStore, watch_list
from tersely.checkpoint import Source, State
from tersely.errors import NumericalError
from tersely.journal import Journal
from tersely.kinds import LinearKind, Spec
from tersely.methods import Method
from tersely.option import Option
from tersely.recipe import Step
from tersely.stats import Gram, Statistic, Stats

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""What is being done, how many units are done, of how many."""

Replaced = dict[str, tuple[Spec, State]]


@dataclass(frozen=True)
class Job:
    """Everything that a step needs to know; nothing in it changes while it runs."""

    source: Source
    anatomy: Anatomy
    sites: tuple[Site, ...]
    step: Step
    method: Method
    allocator: Allocator
    budget: int
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
        return tuple(dict.fromkeys([*self.method.needs, Gram])) if self.windows is not None else ()

    def in_block(self, index: int) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.block == index)


@dataclass
class Outcome:
    """What became of the sites."""

    plan: Plan
    replaced: Replaced
    errors: dict[str, float | None]
    """Site → share of its output energy that was lost on the inputs it was fitted to; None without calibration."""
    degraded: dict[str, str]
    """Site → why it was left dense against the plan."""
    seconds: dict[str, float] = field(default_factory=dict)


def dense_bytes(site: Site, source: Source) -> int:
    return site.out_features * site.in_features * source.dtype.itemsize


def size_curves(sites: Sequence[Site], method: Method, source: Source) -> list[Curve]:
    """Curves without errors, from shapes alone."""
    itemsize = source.dtype.itemsize
    return [
        curve_of(site.name, method.sizes((site.out_features, site.in_features), itemsize), dense_bytes(site, source))
        for site in sites
    ]


def compress(job: Job) -> Outcome:
    """Run both sweeps; goes on where an interrupted run of the same journal stopped."""
    clock = _Clock()
    blocks = Blocks(job.source, job.anatomy, job.device)
    plan = _plan(job, blocks, clock)
    outcome = Outcome(plan, {}, {}, {})
    for index, unit in _compressed_blocks(job, blocks, plan, clock):
        outcome.replaced |= unit.replaced
        outcome.errors |= unit.errors
        outcome.degraded |= unit.degraded
        job.progress("compressing", index + 1, len(job.anatomy.blocks))
        errors = [error for error in unit.errors.values() if error is not None]
        mean = f", {sum(errors) / len(errors):.4f} mean rel. error" if errors else ""
        logger.info("block %d/%d: %d sites cut%s", index + 1, len(job.anatomy.blocks), len(unit.replaced), mean)
    for index in range(len(job.anatomy.blocks)):
        if job.journal.has(f"curves/{index:04}.json"):
            offered = job.journal.read_json(f"curves/{index:04}.json")
            outcome.degraded |= {site: why for site, why in offered.items() if isinstance(why, str)}
    outcome.seconds = clock.seconds
    return outcome


def _plan(job: Job, blocks: Blocks, clock: "_Clock") -> Plan:
    """Divide the budget, after sweep 1 where the allocator asks for predicted errors."""
    if job.journal.has("plan.json"):
        return Plan.from_json(job.journal.read_json("plan.json"))
    if job.allocator.needs_errors:
        curves = []
        for index, stats in _dense_statistics(job, blocks, job.method.needs, clock):
            unit = f"curves/{index:04}.json"
            if not job.journal.has(unit):
                with clock("curves"):
                    job.journal.write_json(unit, _curves(job, index, stats))
            options = job.journal.read_json(unit)
            for site in job.in_block(index):
                offered = options[site.name]
                of_site = [] if isinstance(offered, str) else [Option(*option) for option in offered]
                curves.append(curve_of(site.name, of_site, dense_bytes(site, job.source)))
            job.progress("measuring", index + 1, len(job.anatomy.blocks))
    else:
        curves = size_curves(job.sites, job.method, job.source)
    with clock("allocate"):
        plan = job.allocator.divide(curves, job.budget)
    job.journal.write_json("plan.json", plan.to_json())
    return plan


def _curves(job: Job, index: int, stats: Mapping[str, Stats]) -> dict[str, Any]:
    """Site → its options as plain values, or why there are none."""
    options: dict[str, Any] = {}
    for site in job.in_block(index):
        weight = _weight(job.source.tensor(f"{site.name}.weight"), site).to(job.device)
        try:
            offered = job.method.options(weight, stats.get(site.reads, Stats()))
        except (NumericalError, torch.linalg.LinAlgError) as error:
            if job.step.on_failure == "raise":
                raise NumericalError(f"{site.name}: {error}") from error
            options[site.name] = str(error)
            continue
        options[site.name] = [(o.amount, o.nbytes, o.error) for o in offered]
    return options


@dataclass
class _Unit:
    """The result of one block."""

    replaced: Replaced = field(default_factory=dict)
    errors: dict[str, float | None] = field(default_factory=dict)
    degraded: dict[str, str] = field(default_factory=dict)


def _compressed_blocks(job: Job, blocks: Blocks, plan: Plan, clock: "_Clock") -> Iterator[tuple[int, _Unit]]:
    count = len(job.anatomy.blocks)
    finished = [_read_unit(job, index) for index in range(count)]
    if all(finished) or job.windows is None or job.step.propagate == "none":
        # a finished block is skipped by its own unit; nothing depends on the ones before
        dense = (
            _dense_statistics(job, blocks, job.needs, clock) if not all(finished) else ((i, {}) for i in range(count))
        )
        for index, stats in dense:
            yield index, finished[index] or _cut_at_once(job, blocks.dense(index), index, stats, plan, clock)
        return
    with clock("replay"):
        replay = Replay(job.source, job.anatomy, job.windows, job.device)
    for index, done in enumerate(finished):
        unit = done or _cut_in_stream(job, blocks.dense(index), index, replay, plan, clock)
        yield index, unit
        if index + 1 < count:
            with clock("replay"):
                replay.observe(blocks.cut(index, unit.replaced), {}, advance=True)


def _cut_at_once(
    job: Job, block: nn.Module, index: int, stats: Mapping[str, Stats], plan: Plan, clock: "_Clock"
) -> _Unit:
    """Compress all sites of a block from statistics that are at hand."""
    unit = _Unit()
    with clock("factorise"):
        for site in job.in_block(index):
            _cut_site(job, block, site, stats.get(site.reads, Stats()), plan.choices[site.name], unit)
    return _commit_unit(job, index, unit)


def _cut_in_stream(job: Job, block: nn.Module, index: int, replay: Replay, plan: Plan, clock: "_Clock") -> _Unit:
    """Compress a block on the inputs that come out of the compressed blocks before it.

    With ``propagate = "input"`` the sites are taken in groups that read one input, and the later groups observe a block
    whose earlier groups are cut already.
    """
    unit = _Unit()
    sites = job.in_block(index)
    chosen = {site.name for site in sites}
    groups: list[tuple[Site, ...]] = [sites] if sites else []
    if job.step.propagate == "input":
        in_order = [tuple(s for s in group if s.name in chosen) for _, group in job.anatomy.inputs(index)]
        groups = [group for group in in_order if group]
    for group in groups:
        watched = watch_list(job.anatomy, index, group, job.needs, job.device)
        with clock("replay"):
            replay.observe(block, watched, advance=False)
        with clock("factorise"):
            for site in group:
                _cut_site(job, block, site, watched[site.reads][1], plan.choices[site.name], unit)
    return _commit_unit(job, index, unit)


def _cut_site(job: Job, block: nn.Module, site: Site, stats: Stats, choice: Choice, unit: _Unit) -> None:
    """Replace one site inside `block` as the plan says, and note what that did."""
    if choice.amount is None:
        unit.errors[site.name] = 0.0
        return
    inside = site.name.removeprefix(f"{job.anatomy.blocks[site.block]}.")
    state = block.get_submodule(inside).state_dict()
    weight = _weight(state["weight"], site)
    try:
        kind = job.method.compress(weight, stats, choice.amount)
        _check_finite(kind, site)
    except (NumericalError, torch.linalg.LinAlgError) as error:
        if job.step.on_failure == "raise":
            raise NumericalError(f"{site.name}: {error}") from error
        unit.degraded[site.name] = str(error)
        unit.errors[site.name] = 0.0
        return
    if site.bias:
        kind.set_bias(state["bias"])
    unit.errors[site.name] = _relative_error(weight, kind, stats)
    unit.replaced[site.name] = kind.spec(), {n: t.cpu() for n, t in kind.state_dict().items()}
    block.set_submodule(inside, kind)


def _weight(stored: Tensor, site: Site) -> Tensor:
    """The weight as [out, in]."""
    return stored.T.contiguous() if site.transposed else stored


def _check_finite(kind: LinearKind, site: Site) -> None:
    for name, tensor in kind.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise NumericalError(f"{name} of the compressed module is not finite in {tensor.dtype}")


def _relative_error(weight: Tensor, kind: LinearKind, stats: Stats) -> float | None:
    """tr(Δ G Δᵀ) / tr(W G Wᵀ): what the stored module, rounding included, loses of the output energy."""
    if Gram not in stats:
        return None
    gram = stats[Gram].mean()
    weight = weight.double()
    difference = weight - kind.to_dense().double()
    energy = ((weight @ gram) * weight).sum().item()
    return ((difference @ gram) * difference).sum().item() / energy if energy > 0 else 0.0


def _dense_statistics(
    job: Job, blocks: Blocks, needs: Sequence[type[Statistic]], clock: "_Clock"
) -> Iterator[tuple[int, Mapping[str, Stats]]]:
    """Statistics of the dense model block by block: from the store where it has them, else by replay (and stored)."""
    count = len(job.anatomy.blocks)
    if not needs or job.windows is None:
        yield from ((index, {}) for index in range(count))
        return
    replay = None
    for index in range(count):
        if job.store is not None and job.store.has(index, needs):
            yield index, job.store.read(index, needs, job.device)
            continue
        with clock("replay"):
            replay = replay or Replay(job.source, job.anatomy, job.windows, job.device)
            while replay.at < index:
                replay.observe(blocks.dense(replay.at), {}, advance=True)
            # a shared store serves every later choice of targets, so it is given all inputs of the block
            shared = job.store is not None and job.store.shared
            wanted = job.anatomy.sites if shared else job.in_block(index)
            kinds = needs if job.store is None else job.needs
            watched = watch_list(job.anatomy, index, wanted, kinds, job.device)
            replay.observe(blocks.dense(index), watched, advance=True)
        stats = {key: of_input for key, (_, of_input) in watched.items()}
        if job.store is not None:
            job.store.write(index, stats)
        yield index, stats
        del watched, stats  # before the next block's are gathered


def _commit_unit(job: Job, index: int, unit: _Unit) -> _Unit:
    """Write a finished block, and hand it back as it lies on disk: memory holds one block, not all of them."""
    tensors = {f"{name}.{part}": t for name, (_, state) in unit.replaced.items() for part, t in state.items()}
    job.journal.write_tensors(f"blocks/{index:04}.safetensors", tensors)
    specs = {name: spec for name, (spec, _) in unit.replaced.items()}
    job.journal.write_json(
        f"blocks/{index:04}.json", {"specs": specs, "errors": unit.errors, "degraded": unit.degraded}
    )
    return _read_unit(job, index) or unit


def _read_unit(job: Job, index: int) -> _Unit | None:
    if not job.journal.has(f"blocks/{index:04}.json"):  # written after the tensors
        return None
    plain: dict[str, Any] = job.journal.read_json(f"blocks/{index:04}.json")
    tensors = job.journal.read_tensors(f"blocks/{index:04}.safetensors")
    states: dict[str, State] = defaultdict(dict)
    for name, tensor in tensors.items():
        site = max((s for s in plain["specs"] if name.startswith(f"{s}.")), key=len)
        states[site][name.removeprefix(f"{site}.")] = tensor
    replaced = {name: (spec, states[name]) for name, spec in plain["specs"].items()}
    return _Unit(replaced, plain["errors"], plain["degraded"])


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

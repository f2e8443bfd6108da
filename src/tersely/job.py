"""What the sweeps work on, the statistics that they ask for, and whom they tell what they do."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tersely.allocate import Allocator
from tersely.anatomy import Anatomy, Site
from tersely.calibrate import Blocks, Replay, StatisticsStore, watch_list
from tersely.checkpoint import Source
from tersely.gradients import GradientStatistics
from tersely.journal import Journal
from tersely.memory import peak_of_stage
from tersely.stats import Gram, Statistic, Stats, keyed_by, of_shift
from tersely.targets import Target

Progress = Callable[[str, int, int], None]
"""What is being done, how many units are done, of how many."""


@runtime_checkable
class SeesSites(Protocol):
    """What a progress may be besides: told of every site that was looked at or compressed, inside of a unit."""

    def site(self, name: str, error: float | None) -> None:
        """`error`: share of its output energy that was lost; None where not known."""


def tell_site(progress: Progress, name: str, error: float | None = None) -> None:
    if isinstance(progress, SeesSites):
        progress.site(name, error)


@dataclass(frozen=True)
class PartProgress:
    """The progress of one part of a greater work, which names it."""

    progress: Progress
    part: str

    def __call__(self, what: str, done: int, total: int) -> None:
        self.progress(f"{self.part}, {what}", done, total)

    def site(self, name: str, error: float | None) -> None:
        tell_site(self.progress, name, error)


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

    @property
    def count(self) -> int:
        """Units of work: the blocks, and one more for what is outside of them, if that is a target."""
        blocks = len(self.anatomy.blocks)
        return blocks + any(target.block == blocks for target in self.targets)

    def in_block(self, index: int) -> tuple[Target, ...]:
        return tuple(target for target in self.targets if target.block == index)

    def sites_in_block(self, index: int) -> tuple[Site, ...]:
        """Those that some target looks at, the target of a later block too."""
        return tuple(site for target in self.targets for site in target.sites if site.block == index)

    def awaited(self, index: int) -> set[str]:
        """The inputs that show up to a block and that a target of a later one asks for."""
        later = [site for target in self.targets if target.block > index for site in target.sites]
        return {site.reads for site in later if site.block <= index}


def dense_statistics(
    job: Job, blocks: Blocks, needs: Sequence[type[Statistic]], clock: "Clock"
) -> Iterator[tuple[int, Mapping[str, Stats]]]:
    """Statistics of the dense model block by block: from the store where it has them, else by replay (and stored).

    With those of a block come the ones of former blocks that its targets ask for.
    """
    held: dict[str, Stats] = {}
    for index, stats in _of_each_block(job, blocks, needs, clock):
        yield index, held | dict(stats)
        awaited = job.awaited(index)
        held = {key: of_input for key, of_input in (held | dict(stats)).items() if key in awaited}
        del stats  # before the next block's are gathered


def _of_each_block(
    job: Job, blocks: Blocks, needs: Sequence[type[Statistic]], clock: "Clock"
) -> Iterator[tuple[int, Mapping[str, Stats]]]:
    count = job.count
    inputs = _of_dense_inputs(needs)
    if not inputs or job.windows is None:
        yield from ((index, gradients_of(job, index, clock)) for index in range(count))
        return
    replay = None
    for index in range(count):
        gradients = gradients_of(job, index, clock)
        if job.store is not None and job.store.has(index, inputs):
            yield index, job.store.read(index, inputs, job.device) | gradients
            continue
        outside = index == len(job.anatomy.blocks)
        if outside and not job.anatomy.inputs(index):
            yield index, gradients
            continue
        with clock("replay"):
            replay = replay or Replay(job.source, job.anatomy, job.windows, job.device)
            while replay.at < index:
                replay.observe(blocks.dense(replay.at), {}, advance=True)
            # a shared store serves every later choice of targets, so it is given all inputs of the block
            shared = job.store is not None and job.store.shared
            wanted = (*job.anatomy.sites, *job.anatomy.outside) if shared else job.sites_in_block(index)
            kinds = inputs if job.store is None else _of_dense_inputs(job.needs)
            watched = watch_list(job.anatomy, index, wanted, kinds, job.device)
            replay.observe(blocks.dense(index), watched, advance=index + 1 < count)  # behind the last nobody waits
        stats = {key: of_input for key, (_, of_input) in watched.items()}
        if job.store is not None:
            job.store.write(index, stats)
        yield index, stats | gradients
        del watched, stats, gradients  # before the next block's are gathered


def of_inputs(needs: Sequence[type[Statistic]]) -> tuple[type[Statistic], ...]:
    """Those that a block shows by itself; gradients take the whole model."""
    return tuple(kind for kind in needs if keyed_by(kind) == "input")


def _of_dense_inputs(needs: Sequence[type[Statistic]]) -> tuple[type[Statistic], ...]:
    """Those of them that there is something to gather for as long as all is dense."""
    return tuple(kind for kind in of_inputs(needs) if not of_shift(kind))


def gradients_of(job: Job, index: int, clock: "Clock") -> dict[str, Stats]:
    """Site → statistics of the gradients in it, in the dense model."""
    if job.gradients is None:
        return {}
    with clock("gradients"):
        return job.gradients.of_block(index)


class Clock:
    """Seconds by stage, and the most memory that was held in it."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)
        self.seconds: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, int] = {}
        """Stage → bytes, as `peak_of_stage` measures them; empty where the system does not tell."""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        with peak_of_stage(self._device) as peak:
            try:
                yield
            finally:
                self.seconds[stage] += time.perf_counter() - begun
        if peak.highest is not None:
            self.peaks[stage] = max(self.peaks.get(stage, 0), peak.highest)


def most(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    """Peaks by stage of two works together."""
    return {stage: max(first.get(stage, 0), second.get(stage, 0)) for stage in dict.fromkeys([*first, *second])}


def as_weight(stored: Tensor, site: Site) -> Tensor:
    """The weight as [out, in]."""
    return stored.T.contiguous() if site.transposed else stored


def dense_weights(job: Job, target: Target) -> dict[str, Tensor]:
    """Site → its weight as the step found it, [out, in], on the job's device."""
    stored = {site.name: job.source.tensor(f"{site.name}.weight") for site in target.sites}
    return {site.name: as_weight(stored[site.name], site).to(job.device) for site in target.sites}

"""A method that learns once from all the linears of a model, before any of them is compressed.

Most methods look at one linear and know enough.  Some have numbers of their own to choose, weights of a network for
example, and choose them on all linears together.  Such a method is asked for a lesson at every linear, on the inputs of
the dense model, learns from all lessons at once, and what it learned is told to it before the sweeps begin: from then
on it is as pure as any other, and the sweeps know nothing of it.

What was learned is a unit of the journal, so a run that was stopped goes on with the same numbers; beside shared
statistics it serves every later run that asks the same method about the same linears.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tersely.calibrate import Blocks
from tersely.errors import NumericalError
from tersely.job import Clock, Job, as_weight, dense_statistics
from tersely.methods import Method
from tersely.sensitivity import digest_of, identity, remembered
from tersely.stats import Stats
from tersely.targets import SiteTarget, of_site


@runtime_checkable
class LearnsTogether(Protocol):
    """What a method is besides, if it has something to learn from all linears."""

    @property
    def learns(self) -> str:
        """What that is, constants and all; empty where there is nothing.  Two that say the same, and have the same
        fields, learn the same from the same lessons."""

    def lesson(self, weight: Tensor, stats: Stats) -> Any:
        """What is kept of one linear, as its `options` would see it.  Lessons are held in memory, all at once."""

    def learned(self, lessons: Sequence[Any]) -> dict[str, Any]:
        """What all lessons teach, in plain JSON values; the same from the same lessons."""

    def taught(self, learned: Mapping[str, Any]) -> Method:
        """The method that knows this."""


def taught(job: Job) -> Job:
    """The job, its methods told what they had to learn; the very job, where there is nothing."""
    students = [t for t in job.targets if isinstance(t, SiteTarget) and _learns(t.method)]
    if not students:
        return job
    method: Any = students[0].method  # a step has one
    told = repr((method.learns, [identity(target) for target in students]))
    learned = remembered(
        job.journal,
        job.store,
        "learned_by_method.json",
        f"method.{digest_of(told)}.json",
        lambda: method.learned(_lessons(job, students)),
    )
    knows = {target.name: replace(target, method=method.taught(learned)) for target in students}
    return replace(job, targets=tuple(knows.get(target.name, target) for target in job.targets))


def _learns(method: Any) -> bool:
    return isinstance(method, LearnsTogether) and bool(method.learns)


def _lessons(job: Job, students: Sequence[SiteTarget]) -> list[Any]:
    """Of every linear that has one, on the inputs of the dense model."""
    method: Any = students[0].method  # a step has one
    blocks, lessons = Blocks(job.source, job.anatomy, job.device), []
    job.progress("learning from blocks", 0, len(job.anatomy.blocks))
    for index, stats in dense_statistics(job, blocks, job.method_needs, Clock()):
        for target in (target for target in students if target.block == index):
            weight = as_weight(job.source.tensor(f"{target.name}.weight"), target.site).to(job.device)
            if target.base is not None:
                weight = weight.float() - target.base.to(job.device).float()
            try:
                lessons.append(method.lesson(weight, of_site(target.site, stats)))
            except (NumericalError, torch.linalg.LinAlgError) as error:
                if job.on_failure == "raise":
                    raise NumericalError(f"{target.name}: {error}") from error
        job.progress("learning from blocks", index + 1, len(job.anatomy.blocks))
    if not lessons:
        raise NumericalError("no linear could be learned from; calibrate in float32 on more text")
    return lessons

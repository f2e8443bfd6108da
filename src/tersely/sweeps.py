"""The two sweeps over a model's blocks.

    sweep 1, dense         observe a block's inputs, ask for the curve of each target, keep only the curve
    allocate               curves and a budget of bytes become a plan
    sweep 2, compressed    observe the inputs again, now behind compressed blocks; compress; go on with the cut block

Two sweeps, because two wishes collide: to divide a budget globally, every curve must be known before the first cut; to
fit a block to the inputs that it will really see, all blocks before it must be cut.  An allocator that needs no curves
skips the first sweep.  With ``propagate = "none"`` every target is fitted to the dense model's inputs; one sweep
observes them, spills the statistics to disk, and the second one reads them.  Gradients of the loss take the whole model
at once: they are gathered when first asked for, of the dense model whatever is propagated, and kept on disk.

With `refine` every block that was cut is then trained as a whole, towards what it gave before (see `refine`), and the
streams go on with what came out of that.

What is outside of the blocks, the token embedding and the head, comes last, as if it were a block behind the last one.
The head sees what the compressed blocks make, through the final norm.

Every finished block is a unit of the journal, so that a stopped run loses one block at most.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from tersely.allocate import Choice, Plan
from tersely.calibrate import Blocks, Replay, stream_list, watch_list
from tersely.checkpoint import State
from tersely.errors import NumericalError
from tersely.job import Clock, Job, as_weight, dense_statistics, dense_weights, gradients_of, of_inputs, tell_site
from tersely.kinds import FACTORS, Kind, Made, link
from tersely.planning import make_plan
from tersely.refine import Refined, Refiner, Refining
from tersely.stats import Cross, Drift, Stats
from tersely.targets import Target

logger = logging.getLogger(__name__)

COMPRESSING = "compressing blocks"


@dataclass
class Outcome:
    """What became of the targets."""

    plan: Plan
    replaced: dict[str, Made]
    """Path in the model → what stands there now."""
    done: list[str]
    """Targets that were replaced."""
    errors: dict[str, float | None]
    """Target → share of its output energy that was lost on the inputs it was fitted to; None where not known.  As it
    was cut, before anything was refined."""
    degraded: dict[str, str]
    """Target → why it was left dense against the plan; block → why it was not refined."""
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    """Stage → the most bytes that were held in it."""
    trained: dict[str, Tensor] = field(default_factory=dict)
    """Name of a parameter outside of what was replaced → its numbers after refinement."""
    refined: dict[str, Refined] = field(default_factory=dict)
    """Block → what its refinement did."""
    spectra: dict[str, list[float]] = field(default_factory=dict)
    """Target that became factors by a plan made without errors → its spectrum on the inputs it was fitted to."""


def compress(job: Job, refining: Refining | None = None) -> Outcome:
    """Run both sweeps; goes on where an interrupted run of the same journal stopped.

    `refining`: how to train the blocks that were cut; with ``propagate = "none"`` there is nothing to train them on.
    """
    clock = Clock(job.device)
    blocks = Blocks(job.source, job.anatomy, job.device)
    plan = make_plan(job, blocks, clock)
    outcome = Outcome(plan, {}, [], {}, {})
    for index, unit in _compressed_blocks(job, blocks, plan, clock, refining):
        outcome.replaced |= unit.replaced
        outcome.trained |= unit.trained
        outcome.refined |= unit.refined
        outcome.spectra |= unit.spectra
        outcome.done += unit.done
        outcome.errors |= unit.errors
        outcome.degraded |= unit.degraded
        errors = [error for error in unit.errors.values() if error is not None]
        mean = f", {sum(errors) / len(errors):.4f} mean rel. error" if errors else ""
        logger.info("block %d/%d: %d targets cut%s", index + 1, job.count, len(unit.done), mean)
    for index in range(job.count):
        if job.journal.has(f"curves/{index:04}.json"):
            offered = job.journal.read_json(f"curves/{index:04}.json")
            outcome.degraded |= {name: why for name, why in offered.items() if isinstance(why, str)}
    outcome.seconds, outcome.peaks = dict(clock.seconds), clock.peaks
    return outcome


@dataclass
class _Unit:
    """The result of one block."""

    replaced: dict[str, Made] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    errors: dict[str, float | None] = field(default_factory=dict)
    degraded: dict[str, str] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    refined: dict[str, Refined] = field(default_factory=dict)
    spectra: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class _Streams:
    """What flows through the blocks during the second sweep."""

    shifted: Replay
    """Behind compressed blocks."""
    dense: Replay | None
    """For methods that compare with what the dense model reads."""
    refiner: Refiner | None

    def advance(self, cut: nn.Module, dense: Callable[[], nn.Module]) -> None:
        self.shifted.observe(cut, {}, advance=True)
        if self.dense is None and self.refiner is None:
            return
        block = dense()
        if self.dense is not None:
            self.dense.observe(block, {}, advance=True)
        if self.refiner is not None:
            self.refiner.advance(cut, block)


def _compressed_blocks(
    job: Job, blocks: Blocks, plan: Plan, clock: "Clock", refining: Refining | None
) -> Iterator[tuple[int, _Unit]]:
    count = job.count
    finished = [_read_unit(job, index) for index in range(count)]
    if all(finished) or job.windows is None or job.propagate == "none":
        # a finished block is skipped by its own unit; nothing depends on the ones before
        dense = (
            dense_statistics(job, blocks, job.needs, clock) if not all(finished) else ((i, {}) for i in range(count))
        )
        for index, stats in dense:
            with _told(job, index, finished[index]):
                unit = finished[index] or _cut_at_once(job, blocks.dense(index), index, stats, plan, clock)
            yield index, unit
        return
    with clock("replay"):
        replay = Replay(job.source, job.anatomy, job.windows, job.device)
        refiner = None if refining is None else Refiner(refining, job.source, job.anatomy, job.device, job.progress)
        streams = _Streams(replay, replay.fork() if Cross in job.needs else None, refiner)
    earlier: dict[str, Made] = {}  # what owns factors that later blocks share
    for index, done in enumerate(finished):
        with _told(job, index, done):
            unit = done or _cut_in_stream(job, blocks, index, earlier, streams, plan, clock)
        yield index, unit
        if index + 1 < count:
            with clock("replay"):
                streams.advance(_as_cut(job, blocks, index, earlier, unit), partial(blocks.dense, index))
            earlier |= unit.replaced


@contextmanager
def _told(job: Job, index: int, finished: _Unit | None) -> Iterator[None]:
    """Tell when a block is begun and when it is done; of what a former run finished nothing is to be told."""
    if finished is None:
        job.progress(COMPRESSING, index, job.count)
    yield
    if finished is None:
        job.progress(COMPRESSING, index + 1, job.count)


def _as_cut(job: Job, blocks: Blocks, index: int, earlier: Mapping[str, Made], unit: _Unit) -> nn.Module:
    """A finished block."""
    block = blocks.cut(index, {**earlier, **unit.replaced})
    prefix = f"{job.anatomy.blocks[index]}."
    trained = {name.removeprefix(prefix): tensor.to(job.device) for name, tensor in unit.trained.items()}
    block.load_state_dict(trained, strict=False, assign=True)
    return block


def _cut_at_once(
    job: Job, block: nn.Module, index: int, stats: Mapping[str, Stats], plan: Plan, clock: "Clock"
) -> _Unit:
    """Compress all targets of a block from statistics that are at hand."""
    unit = _Unit()
    with clock("factorise"):
        for target in job.in_block(index):
            _cut(job, block, target, stats, plan.choices[target.name], unit)
    _note_spectra(job, job.in_block(index), stats, unit, clock)
    return _commit_unit(job, index, unit)


def _cut_in_stream(
    job: Job,
    blocks: Blocks,
    index: int,
    earlier: Mapping[str, Made],
    streams: _Streams,
    plan: Plan,
    clock: "Clock",
) -> _Unit:
    """Compress a block on the inputs that come out of the compressed blocks before it.

    With ``propagate = "input"`` the targets are taken in groups that read one input, and the later groups observe a
    block whose earlier groups are cut already.
    """
    unit = _Unit()
    block = blocks.cut(index, earlier)
    gradients = gradients_of(job, index, clock)
    beside = None if streams.dense is None else (streams.dense, blocks.dense(index))
    targets = job.in_block(index)
    groups: list[tuple[Target, ...]] = [targets] if targets else []
    outside = index == len(job.anatomy.blocks)
    if job.propagate == "input" and not outside:
        inputs = [reads for reads, _ in job.anatomy.inputs(index)]
        by_input = sorted(targets, key=lambda target: inputs.index(target.sites[0].reads))
        groups = [tuple(group) for _, group in groupby(by_input, key=lambda target: target.sites[0].reads)]
    for group in groups:
        sites = [site for target in group for site in target.sites]
        watched = watch_list(job.anatomy, index, sites, of_inputs(job.needs), job.device)
        read = stream_list(job.anatomy, index, sites) if Drift in job.needs else {}
        if watched or not outside:  # nothing is seen of tokens that are looked up
            with clock("replay"):
                streams.shifted.observe(block, watched, advance=False, beside=beside, streams=read)
        stats = {key: of_input for key, (_, of_input) in watched.items()} | gradients
        with clock("factorise"):
            for target in group:
                _cut(job, block, target, stats, plan.choices[target.name], unit)
        _note_spectra(job, group, stats, unit, clock)
    if streams.refiner is not None and unit.done and not outside:
        with clock("refine"):
            _refine(job, index, block, blocks.dense(index), streams.refiner, unit)
    return _commit_unit(job, index, unit)


def _refine(job: Job, index: int, block: nn.Module, dense: nn.Module, refiner: Refiner, unit: _Unit) -> None:
    """Train a block that was cut, and note the numbers that this changed."""
    path = job.anatomy.blocks[index]
    try:
        refined = refiner.refine(block, dense)
    except NumericalError as error:
        if job.on_failure == "raise":
            raise NumericalError(f"{path} while it is refined: {error}") from error
        unit.degraded[path] = f"not refined: {error}"
        return
    unit.refined[path] = refined
    if refined.kept == 0:  # as it was cut
        return
    unit.replaced = {name: Made.of(_kind(block, name.removeprefix(f"{path}."))) for name in unit.replaced}
    inside = tuple(f"{name}." for name in unit.replaced)
    parameters = {f"{path}.{name}": parameter.detach().cpu() for name, parameter in block.named_parameters()}
    unit.trained = {name: tensor for name, tensor in parameters.items() if not name.startswith(inside)}


def _kind(block: nn.Module, path: str) -> Kind:
    module = block.get_submodule(path)
    assert isinstance(module, Kind)  # what `_cut` has put there
    return module


def _cut(job: Job, block: nn.Module, target: Target, stats: Mapping[str, Stats], choice: Choice, unit: _Unit) -> None:
    """Replace one target inside `block` as the plan says, and note what that did."""
    if choice.amount is None:
        unit.errors[target.name] = 0.0
        return
    outside = target.block == len(job.anatomy.blocks)
    prefix = None if outside else f"{job.anatomy.blocks[target.block]}."
    states = {
        # a block before has not changed: whoever cuts several blocks at once observes the dense model; nor has what is
        # outside of them
        site.name: block.get_submodule(site.name.removeprefix(prefix)).state_dict()
        if prefix is not None and site.block == target.block
        else {part: tensor.to(job.device) for part, tensor in job.source.state(f"{site.name}.").items()}
        for site in target.sites
    }
    weights = {site.name: as_weight(states[site.name]["weight"], site) for site in target.sites}
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
    tell_site(job.progress, target.name, unit.errors[target.name])
    for name, kind in made.items():
        unit.replaced[name] = Made.of(kind)
        if prefix is not None and name.startswith(prefix):
            block.set_submodule(name.removeprefix(prefix), kind)
    link(block)


def _note_spectra(job: Job, targets: Sequence[Target], stats: Mapping[str, Stats], unit: _Unit, clock: "Clock") -> None:
    """What other ranks would have left of what became factors.  A plan made of errors has said so before."""
    if job.allocator.needs_errors:
        return
    for target in targets:
        made = [unit.replaced[site.name] for site in target.sites if site.name in unit.replaced]
        if target.name not in unit.done or not any(one.specs[""]["kind"] in FACTORS for one in made):
            continue
        with clock("spectra"):
            try:
                spectrum = target.spectrum(dense_weights(job, target), stats)
            except (NumericalError, torch.linalg.LinAlgError):  # no reason to lose what was made: it is only shown
                continue
        if spectrum is not None:
            unit.spectra[target.name] = spectrum


def _check_finite(kind: Kind, name: str) -> None:
    for part, tensor in kind.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise NumericalError(f"{part} of the compressed {name} is not finite in {tensor.dtype}")


def _commit_unit(job: Job, index: int, unit: _Unit) -> _Unit:
    """Write a finished block, and hand it back as it lies on disk: memory holds one block, not all of them."""
    tensors = {f"{name}.{part}": t for name, made in unit.replaced.items() for part, t in made.state.items()}
    job.journal.write_tensors(f"blocks/{index:04}.safetensors", tensors | unit.trained)
    plain = {
        "specs": {name: made.specs for name, made in unit.replaced.items()},
        "done": unit.done,
        "errors": unit.errors,
        "degraded": unit.degraded,
        "trained": list(unit.trained),
        "spectra": unit.spectra,
        "refined": {path: asdict(refined) for path, refined in unit.refined.items()},
    }
    job.journal.write_json(f"blocks/{index:04}.json", plain)
    return _read_unit(job, index) or unit


def _read_unit(job: Job, index: int) -> _Unit | None:
    if not job.journal.has(f"blocks/{index:04}.json"):  # written after the tensors
        return None
    plain: dict[str, Any] = job.journal.read_json(f"blocks/{index:04}.json")
    tensors = job.journal.read_tensors(f"blocks/{index:04}.safetensors")
    trained = {name: tensors.pop(name) for name in plain["trained"]}
    refined = {path: Refined(**figures) for path, figures in plain["refined"].items()}
    states: dict[str, State] = defaultdict(dict)
    for name, tensor in tensors.items():
        place = max((p for p in plain["specs"] if name.startswith(f"{p}.")), key=len)
        states[place][name.removeprefix(f"{place}.")] = tensor
    replaced = {name: Made(specs, states[name]) for name, specs in plain["specs"].items()}
    return _Unit(replaced, plain["done"], plain["errors"], plain["degraded"], trained, refined, plain["spectra"])

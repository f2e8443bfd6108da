"""What a run would take, from headers alone: bytes, memory, disk, time.

Sizes are exact.  Memory counts what is held at the worst moment: one block and its compressed twin, the hidden states
of all windows, the statistics of one block, and the largest factorisation; beside these the whole model, where it is
measured, where ranks are learned on it, or where gradients are gathered.  Time counts floating-point operations and
divides by what this machine reaches on two small probes, a product and an eigenproblem; expect it within a factor of
two.  What is swept and factorised is that of the first step; of later ones counted is only what they do on the whole
model.  Of training only its forward and backward passes are: neither the model, its gradients nor a teacher in memory.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from tersely import gating, gradients, planning, sensitivity, temper
from tersely.allocate import Learned
from tersely.allocate.search import RATIOS
from tersely.anatomy import Site
from tersely.calibrate import TOKENS_AT_ONCE
from tersely.checkpoint import Source
from tersely.prepare import Examined, examine, learns, measures, seeks, statistic_bytes, tempers
from tersely.recipe import CacheStep, MethodStep, Recipe, Step, TrainStep
from tersely.report.rows import format_value
from tersely.stats import Cross, Gram, Statistic, keyed_by
from tersely.tables import build, build_allocator
from tersely.text import window_length

PROCESS = 400 * 10**6  # the interpreter with torch and transformers loaded
EIGH = 9  # operations per n³ that a symmetric eigenproblem with vectors is counted as
DOUBLE = 8  # bytes
FACTORS = 15  # that are tried for a temperature


@dataclass(frozen=True)
class Estimate:
    coverage: str
    roles: dict[str, tuple[int, int]]
    """Role → linears touched, bytes they take now."""
    model_bytes: int
    touched_bytes: int
    budget: int
    disk_bytes: int
    memory_bytes: int
    seconds: float
    from_configuration: bool
    """No headers were at hand: a hub model, or tensors under foreign names (which a run first loads and renames)."""


def estimate(recipe: Recipe) -> Estimate:
    """Check a recipe as far as headers tell, write nothing, run nothing, and say what it would take."""
    found = examine(recipe, None)
    recipe = found.recipe  # with what it left to methods
    roles: dict[str, tuple[int, int]] = {}
    itemsize = found.source.dtype.itemsize
    for site in _sites(found):
        count, nbytes = roles.get(site.role, (0, 0))
        roles[site.role] = count + 1, nbytes + site.out_features * site.in_features * itemsize
    touched = sum(nbytes for _, nbytes in roles.values())
    whole = found.source.nbytes()
    renamed = whole if found.source.is_outline else 0
    return Estimate(
        coverage=found.anatomy.coverage(_sites(found)),
        roles=roles,
        model_bytes=whole,
        touched_bytes=touched,
        budget=_afterwards(recipe, found, touched),
        disk_bytes=found.disk_bytes + renamed,
        memory_bytes=max(_memory(recipe, found), PROCESS + renamed),
        seconds=_seconds(recipe, found),
        from_configuration=found.source.is_outline,
    )


def _sites(found: Examined) -> tuple[Site, ...]:
    """The linears that the first step looks at; all of them where it has no budget."""
    sites = [site for target in found.targets for site in target.sites]
    return tuple(dict.fromkeys(sites)) or found.anatomy.sites


def _afterwards(recipe: Recipe, found: Examined, touched: int) -> int:
    """Bytes of the touched weights after the first step, at most."""
    if isinstance(recipe.step[0], MethodStep):
        smallest = sum(t.sizes(found.source.dtype.itemsize)[-1].nbytes for t in found.targets)
        return smallest if found.budget is None else found.budget
    return touched


def estimate_table(figures: Estimate) -> Table:
    table = Table(title=figures.coverage, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for role, (count, nbytes) in figures.roles.items():
        table.add_row(f"{count} × {role}", format_value(nbytes, "bytes"))
    table.add_section()
    after = figures.model_bytes - figures.touched_bytes + figures.budget
    table.add_row("touched weights, now", format_value(figures.touched_bytes, "bytes"))
    table.add_row("touched weights, at most afterwards", format_value(figures.budget, "bytes"))
    table.add_row("whole model, now", format_value(figures.model_bytes, "bytes"))
    table.add_row("whole model, at most afterwards", format_value(after, "bytes"))
    table.add_section()
    table.add_row("peak memory, about", format_value(figures.memory_bytes, "bytes"))
    table.add_row("disk while it runs, at most", format_value(figures.disk_bytes, "bytes"))
    table.add_row("time, about", _duration(figures.seconds))
    if figures.from_configuration:
        table.caption = (
            "from the configuration alone; if the weights are not stored under the modules' names, a run loads"
        )
        table.caption += " the whole model once to rename them (counted above)"
        table.caption_justify = "left"
    return table


def _tokens(recipe: Recipe, found: Examined) -> int:
    length = window_length(found.source.config, recipe.calibration.length)
    trains = max((step.tokens for step in recipe.step if isinstance(step, TrainStep)), default=0)
    return max(recipe.calibration.samples * length if found.calibrated else 0, trains)


def _memory(recipe: Recipe, found: Examined) -> int:
    source, anatomy = found.source, found.anatomy
    itemsize = source.dtype.itemsize
    block = max(sum(source.stored_bytes(n) for n in source.stored if n.startswith(f"{b}.")) for b in anatomy.blocks)
    outside = source.nbytes() - sum(
        source.stored_bytes(n) for n in source.stored if n.startswith(tuple(f"{b}." for b in anatomy.blocks))
    )
    hidden = source.config.get_text_config().hidden_size
    stream = _tokens(recipe, found) * hidden * itemsize
    first = [site for site in anatomy.sites if site.block == 0] or list(_sites(found))
    grams = _observed(recipe, found) if stream else 0
    widest = max(max(s.in_features, s.out_features) for s in first)
    batch = 4 * TOKENS_AT_ONCE * widest * itemsize if stream else 0
    work = max(
        DOUBLE * (3 * s.in_features * s.out_features + 3 * min(s.in_features, s.out_features) ** 2) for s in first
    )
    # codes and levels of all of a table at once
    work = max([work, *(4 * 4 * s.in_features * s.out_features for s in _sites(found) if s in anatomy.outside)])
    refined = _refining(recipe, block // itemsize, hidden * itemsize, source)
    beside = any(Cross in _needs(step) and step.propagate != "none" for step in _methods(recipe))
    stream *= 1 + beside  # that of the dense model
    return PROCESS + outside + 2 * block + stream + grams + max(batch, work) + refined + _at_once(recipe, found)


def _methods(recipe: Recipe) -> list[MethodStep]:
    return [step for step in recipe.step if isinstance(step, MethodStep)]


def _needs(step: MethodStep) -> tuple[type[Statistic], ...]:
    needs: tuple[type[Statistic], ...] = build(step).needs
    return needs


def _observed(recipe: Recipe, found: Examined) -> int:
    """Statistics of the inputs of one block, or of as many as a target reaches over."""
    length = window_length(found.source.config, recipe.calibration.length)
    kinds: set[type[Statistic]] = {Gram, *(kind for target in found.targets for kind in target.needs)}
    sites = {site.reads: site for site in found.anatomy.sites if site.block == 0}.values()
    of_block = sum(statistic_bytes(kind, site, length) for kind in kinds if keyed_by(kind) == "input" for site in sites)
    return of_block * max((len({site.block for site in t.sites}) for t in found.targets), default=1)


def _refining(recipe: Recipe, block: int, state: int, source: Source) -> int:
    """Two streams more, and of every number of a block its master, gradient, two moments and the best so far.

    `block`: numbers in it; `state`: bytes of a hidden state."""
    steps = [step for step in recipe.step if isinstance(step, MethodStep) and step.refine is not None]
    samples = max((s.refine.samples or recipe.calibration.samples for s in steps if s.refine is not None), default=0)
    length = window_length(source.config, recipe.calibration.length)
    return 2 * samples * length * state + 5 * 4 * block if steps else 0


def _at_once(recipe: Recipe, found: Examined) -> int:
    """What is held where the whole model is in memory: to measure it, or for gradients, with the activations of a batch
    and the statistics of all blocks."""
    source = found.source
    kinds = {kind for step in _methods(recipe) for kind in _needs(step) if keyed_by(kind) != "input"}
    measured = any(measures(step) in ("kl", "loss") for step in recipe.step)
    needed = 0
    if kinds:
        sites = _sites(found)
        gathered = sum(statistic_bytes(kind, site, gradients.TOKENS_AT_ONCE) for kind in kinds for site in sites)
        batch = gradients.TOKENS_AT_ONCE * sum(site.in_features + site.out_features for site in sites)
        needed = source.nbytes() + gathered + batch * source.dtype.itemsize
    plans = 2 * source.nbytes() if any(map(seeks, recipe.step)) else 0
    tempered = 0
    if any(map(tempers, recipe.step)):  # the model before, what a step has made of it, and what either body says
        states = 2 * _read_for_a_temperature(recipe, source) * source.dtype.itemsize
        tempered = source.nbytes() + (found.budget or 0) + states
    learning = max(_learning(step, recipe, found) for step in recipe.step)
    return max(needed, source.nbytes() if measured else 0, plans, tempered, learning)


def _read_for_a_temperature(recipe: Recipe, source: Source) -> int:
    """Numbers in the last hidden states of the windows that are read."""
    length = window_length(source.config, recipe.calibration.length)
    hidden: int = source.config.get_text_config().hidden_size
    return temper.WINDOWS * length * hidden


def _learning(step: Step, recipe: Recipe, found: Examined) -> int:
    """Where the allocator of a step learns ranks on the whole model: what takes the places of its linears, the
    activations of a step of learning, and the logits with what is made of them."""
    source, what = found.source, learns(step)
    if what is None:
        return 0
    length, itemsize = window_length(source.config, recipe.calibration.length), source.dtype.itemsize
    windows = max(1, gating.TOKENS // length)
    needed = 3 * 4 * windows * length * source.config.get_text_config().vocab_size
    for site in _sites(found):
        directions, both = min(site.in_features, site.out_features), site.in_features + site.out_features
        needed += windows * length * (both + directions) * itemsize
        if what == "gates":  # factors of full rank
            needed += directions * both * itemsize
        else:  # of every output itself, its right singular vectors and a projector
            needed += DOUBLE * windows * (length * directions + 2 * min(length, directions) ** 2)
    return source.nbytes() + needed


def _seconds(recipe: Recipe, found: Examined) -> float:
    """Sweeps over the blocks, statistics, and factorisations, at the speed of this machine."""
    tokens, sites = _tokens(recipe, found), _sites(found)
    step = recipe.step[0]
    weights = sum(found.source.elements(n) for n in found.source.stored if n.startswith(found.anatomy.blocks))
    needs_curves, streams = False, 1
    if isinstance(step, MethodStep | CacheStep):
        needs_curves = build_allocator(step.allocate).needs_errors
        assert step.propagate is not None  # `examine` has settled it
        streams = needs_curves + {"none": 0 if needs_curves else 1, "block": 2, "input": 5}[step.propagate]
    if any(isinstance(step, TrainStep) for step in recipe.step):
        streams += 3  # forward, and twice as much backward
    forward = 2.0 * tokens * weights * streams
    inputs = {site.reads: site.in_features for site in sites}
    grams = sum(2.0 * tokens * width**2 for width in inputs.values()) * (1 + needs_curves)
    factorise = sum(_eigen_operations(site) for site in sites) * (1.2 if needs_curves else 1.0)
    if any(keyed_by(kind) != "input" for step in _methods(recipe) for kind in _needs(step)):
        forward += 6.0 * tokens * weights  # once forward, and twice as much backward
    length = window_length(found.source.config, recipe.calibration.length)
    measured = 2.0 * min(sensitivity.WINDOWS, recipe.calibration.samples) * length * weights
    for step in recipe.step:
        # of every target one option, or one for each ratio and the smallest
        forward += measured * len(found.targets) * {"kl": 1, "loss": 1 + len(RATIOS)}.get(measures(step) or "", 0)
        learned = _learned(learns(step), length, weights, sites)
        forward, factorise = forward + learned[0], factorise + learned[1]
        if seeks(step):  # so many plans are made and measured
            tried = math.log2(planning.GRID)
            forward += tried * measured
            factorise += tried * sum(_eigen_operations(site) for site in sites)
        if tempers(step):  # of two models the body once, and the head for every factor that is tried
            forward += 2 * 2.0 * temper.WINDOWS * length * weights
            vocabulary = found.source.config.get_text_config().vocab_size
            forward += 2 * 2.0 * FACTORS * _read_for_a_temperature(recipe, found.source) * vocabulary
    products = _rate(lambda: _product(512), 2.0 * 512**3)
    eigen = _rate(lambda: _eigen(256), EIGH * 256.0**3)
    return (forward + grams) / products + factorise / eigen


def _learned(what: Learned | None, length: int, weights: int, sites: Sequence[Site]) -> tuple[float, float]:
    """Operations of products and of eigenproblems where ranks are learned; every step goes forward and back."""
    if what is None:
        return 0.0, 0.0
    windows, steps = max(1, gating.TOKENS // length), gating.STEPS[what]
    held_out = gating.WINDOWS[what] // gating.HELD_OUT * length / gating.MEASURED_EVERY
    forward = 2.0 * weights * steps * (3 * windows * length + held_out)
    if what == "gates":  # twice as many numbers, and the dense distribution
        return 2.0 * forward + 4.0 * weights * steps * (windows * length + held_out), 0.0
    sides = sum(min(length, site.in_features, site.out_features) ** 3 for site in sites)
    return forward, EIGH * steps * (windows + held_out / length) * sides


def _eigen_operations(site: Site) -> float:
    small, large = sorted((site.in_features, site.out_features))
    return EIGH * small**3 + 2.0 * small * large * (large + small)


def _rate(work: Callable[[], object], operations: float) -> float:
    """Operations per second of a small probe, best of five."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return operations / min(times)


def _product(width: int) -> torch.Tensor:
    square = torch.ones(width, width)
    return square @ square


def _eigen(width: int) -> object:
    return torch.linalg.eigh(torch.eye(width, dtype=torch.float64) + 1)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

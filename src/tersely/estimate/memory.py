"""The most that a run holds in memory, from headers.

Counted is what is held at the worst moment of the worst step.  Of a sweep: one block and its compressed twin, the
hidden states of all windows, the statistics of one block, and the largest factorisation; beside these the whole model,
where it is measured, where ranks are learned on it, or where gradients are gathered.  Of training: student and teacher,
what stands in the places of linears with gradients and moments, and what a batch leaves for the backward pass, the
logits above all.  Around the steps: the text that is cut into tokens, the tensors of a file that is written, and both
models where the result is measured; before them the model that writes calibration windows itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tersely import gating, gradients, own_text, temper
from tersely.anatomy import Site
from tersely.calibrate import COPIES, NARROW, TOKENS_AT_ONCE
from tersely.estimate.relaxed import share_of
from tersely.evaluation.perplexity import LOGITS_AT_ONCE, ROWS_AT_LEAST, TOKENS_PER_BATCH
from tersely.prepare import Examined, learns, measures, seeks, statistic_bytes, tempers, trained
from tersely.recipe import MethodStep, Recipe, RewriteStep, Step, TrainStep, parse_size
from tersely.rewrite.fold_norms import PIECE
from tersely.stats import Cross, Gram, Statistic, keyed_by
from tersely.targets import Target
from tersely.text import size_of, window_length
from tersely.train.objectives import OBJECTIVES
from tersely.train.relax.rounding import Rounding

PROCESS = 430 * 10**6
"""Interpreter and libraries: 404 MB are resident when `tersely.pipeline` is imported, 428 MB at the peak of ``tersely
compress`` with rtn on the bundled model of 2 MB (Linux, Python 3.11, torch 2.13 for processors)."""

READING, READ = 180, 90
"""Bytes for each one of a text while it is cut into tokens, and of what the allocator does not hand back afterwards:
measured on 1.4 and 6.1 MB of the standard library, 2.7 bytes a token."""

LOGITS, COMPARED = 5, 7
"""Tensors of float32 as large as the logits of a batch that a training step holds: with an objective that sees the
student alone, and with one that compares it with a teacher."""

SPARE = 1.15
"""What the allocator takes for what is held, between one thing and the next: measured, 1 to 1.2."""

DOUBLE = 8  # bytes


@dataclass(frozen=True)
class Part:
    """A step, with what headers say of it."""

    step: Step
    built: Any
    sites: tuple[Site, ...]
    targets: tuple[Target, ...]
    """Known of the first step only."""

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return tuple(getattr(self.built, "needs", ()))


def parts(recipe: Recipe, found: Examined) -> list[Part]:
    targets = [found.targets, *([()] * (len(recipe.step) - 1))]
    return [Part(*of_step) for of_step in zip(recipe.step, found.objects, found.sites, targets, strict=True)]


def held(recipe: Recipe, found: Examined) -> int:
    """Bytes, at the worst moment."""
    read, written = _longest_text(recipe, found), _written(recipe, found)
    largest, before = max(_evaluated(recipe, found), _writing(recipe, found)), 0
    for part in parts(recipe, found):
        trains = isinstance(part.step, TrainStep)
        needed = _trained(part, recipe, found) if trains else _swept(part, recipe, found)
        largest = max(largest, before + max(needed, written))
        # what a step made stays mapped from its journal, and the pages that were read count
        made = sum(site.in_features * site.out_features for site in part.sites) * found.source.dtype.itemsize
        before += min(made, found.source.nbytes())
    return PROCESS + max(READING * read, READ * read + int(SPARE * largest))


def _written(recipe: Recipe, found: Examined) -> int:
    """The tensors of a file, and the pages that they were read from, in the dtype of the checkpoint."""
    source = found.source
    read = sum(source.elements(name) * stored.dtype.itemsize for name, stored in source.stored.items())
    most = parse_size(recipe.shard_size)
    return min(most, source.nbytes()) + min(most, read)


def read_texts(recipe: Recipe, found: Examined) -> list[list[str]]:
    """The texts that a run reads to calibrate and to train, those together that are cut into tokens as one."""
    calibration = recipe.calibration.source if found.calibrated else []
    return [texts for texts in [calibration, *trained(recipe)] if texts]


def _longest_text(recipe: Recipe, found: Examined) -> int:
    """Bytes; a data set, whose size is not known here, has none."""
    fitted = [sum(size_of(text, "calibration") or 0 for text in texts) for texts in read_texts(recipe, found)]
    measured = [size_of(text, "evaluation") or 0 for text in recipe.evaluation.text]
    return max([0, *fitted, *measured])


def _length(recipe: Recipe, found: Examined) -> int:
    return window_length(found.source.config, recipe.calibration.length)


def _features(found: Examined, blocks: Sequence[int]) -> int:
    """Numbers that the linears of some blocks read and write of a token: about what autograd keeps of it."""
    return sum(site.in_features + site.out_features for site in found.anatomy.sites if site.block in blocks)


# --- sweeps -----------------------------------------------------------------------------------------------------------


def _swept(part: Part, recipe: Recipe, found: Examined) -> int:
    source, anatomy, step = found.source, found.anatomy, part.step
    itemsize = source.dtype.itemsize
    blocks = [[n for n in source.stored if n.startswith(f"{block}.")] for block in anatomy.blocks]
    inside = [sum(map(source.stored_bytes, names)) for names in blocks]
    outside, block = source.nbytes() - sum(inside), max(inside)
    hidden, length = source.config.get_text_config().hidden_size, _length(recipe, found)
    stream = recipe.calibration.samples * length * hidden * itemsize if found.calibrated else 0
    first = [site for site in anatomy.sites if site.block == 0] or list(part.sites)
    grams = _observed(part, recipe, found) if stream else 0
    if hidden <= NARROW and recipe.device == "cpu":  # other threads have statistics of their own
        grams += min(COPIES, (torch.get_num_threads() - 1) * grams)
    widest = max(max(s.in_features, s.out_features) for s in first)
    batch = 4 * max(TOKENS_AT_ONCE, length) * widest * itemsize if stream else 0
    work = max(
        DOUBLE * (3 * s.in_features * s.out_features + 3 * min(s.in_features, s.out_features) ** 2) for s in first
    )
    # codes and levels of all of a table at once
    work = max([work, *(4 * 4 * s.in_features * s.out_features for s in part.sites if s in anatomy.outside)])
    needed = outside + 2 * block + stream + grams + max(batch, work) + _at_once(part, recipe, found)
    if isinstance(step, RewriteStep):  # what is outside, twice anew, and a piece of it in float64 as it is turned
        turned = max(map(source.elements, set(source.stored).difference(*blocks)), default=0)
        needed += 2 * outside + 4 * DOUBLE * min(PIECE, turned)
    if isinstance(step, MethodStep):
        if Cross in part.needs and step.propagate != "none":
            needed += stream  # that of the dense model
        if step.base is not None:
            needed += itemsize * sum(site.in_features * site.out_features for site in part.sites)
        needed += _refined(step, part, recipe, found, block)
    return needed


def _observed(part: Part, recipe: Recipe, found: Examined) -> int:
    """Statistics of the inputs of one block, or of as many as a target reaches over."""
    kinds: set[type[Statistic]] = {Gram, *(kind for kind in part.needs if keyed_by(kind) == "input")}
    sites = {site.reads: site for site in found.anatomy.sites if site.block == 0}.values()
    of_block = sum(statistic_bytes(kind, site, _length(recipe, found)) for kind in kinds for site in sites)
    return of_block * max((len({site.block for site in target.sites}) for target in part.targets), default=1)


def _refined(step: MethodStep, part: Part, recipe: Recipe, found: Examined, block: int) -> int:
    """Two streams more; the dense block; of every number of a block its master, gradient, two moments and the best so
    far; and what a batch leaves for the backward pass, with the gradients in it.  `block`: its bytes."""
    if step.refine is None:
        return 0
    source, length = found.source, _length(recipe, found)
    itemsize, hidden = source.dtype.itemsize, source.config.get_text_config().hidden_size
    streams = 2 * (step.refine.samples or recipe.calibration.samples) * length * hidden * itemsize
    codes = 0.0 if part.built.leaves else share_of(Rounding(), source.dtype).graph
    batch = 2 * step.refine.batch * length * _features(found, [0]) * itemsize
    return streams + block + int(block // itemsize * (5 * 4 + codes)) + batch


# --- the whole model --------------------------------------------------------------------------------------------------


def _at_once(part: Part, recipe: Recipe, found: Examined) -> int:
    """What is held where the whole model is in memory: to measure it, or for gradients, with the activations of a batch
    and the statistics of all blocks."""
    source, step = found.source, part.step
    kinds = {kind for kind in part.needs if keyed_by(kind) != "input"}
    needed = 0
    if kinds:
        gathered = sum(statistic_bytes(kind, site, gradients.TOKENS_AT_ONCE) for kind in kinds for site in part.sites)
        kept = source.dtype.itemsize * sum(site.in_features + site.out_features for site in part.sites)
        logits = 4 * LOGITS * source.config.get_text_config().vocab_size
        needed = source.nbytes() + gathered + gradients.TOKENS_AT_ONCE * (kept + logits)
    measured = source.nbytes() if measures(step) in ("kl", "loss") else 0
    plans = 2 * source.nbytes() if seeks(step) else 0
    tempered = 0
    if tempers(step):  # the model before, what a step has made of it, and what either body says
        states = 2 * read_for_a_temperature(recipe, found) * source.dtype.itemsize
        tempered = source.nbytes() + (found.budget or 0) + states
    return max(needed, measured, plans, tempered, _learning(part, recipe, found))


def read_for_a_temperature(recipe: Recipe, found: Examined) -> int:
    """Numbers in the last hidden states of the windows that are read."""
    hidden: int = found.source.config.get_text_config().hidden_size
    return temper.WINDOWS * _length(recipe, found) * hidden


def _learning(part: Part, recipe: Recipe, found: Examined) -> int:
    """Where the allocator of a step learns ranks on the whole model: what takes the places of its linears, the
    activations of a step of learning, and the logits with what is made of them."""
    source, what = found.source, learns(part.step)
    if what is None:
        return 0
    length, itemsize = _length(recipe, found), source.dtype.itemsize
    windows = max(1, gating.TOKENS // length)
    needed = 3 * 4 * windows * length * source.config.get_text_config().vocab_size
    for site in part.sites:
        directions, both = min(site.in_features, site.out_features), site.in_features + site.out_features
        needed += windows * length * (both + directions) * itemsize
        if what == "gates":  # factors of full rank
            needed += directions * both * itemsize
        else:  # of every output itself, its right singular vectors and a projector
            needed += DOUBLE * windows * (length * directions + 2 * min(length, directions) ** 2)
    return source.nbytes() + needed


def _trained(part: Part, recipe: Recipe, found: Examined) -> int:
    """Student and teacher, the statistics that relaxations began from, what stands in the places of linears, what
    autograd keeps of a batch, and its logits."""
    source, sites, step = found.source, part.sites, part.step
    assert isinstance(step, TrainStep)  # the caller has looked
    itemsize, tokens = source.dtype.itemsize, step.batch * _length(recipe, found)
    teaches = any(OBJECTIVES[name].teaches for name in step.train)
    share = share_of(part.built, source.dtype)
    models = source.nbytes() * (1 + teaches) - itemsize * sum(s.in_features * s.out_features for s in sites)
    stands = sum(share.nbytes(site, kept=step.patience > 0) for site in sites)
    began = sum(statistic_bytes(kind, site, _length(recipe, found)) for kind in part.needs for site in sites)
    kept = itemsize * _features(found, range(len(found.anatomy.blocks)))
    kept += int(share.of_token * sum(site.in_features for site in sites))
    logits = 4 * (COMPARED if teaches else LOGITS) * source.config.get_text_config().vocab_size
    return models + int(stands) + began + tokens * (kept + logits)


def _writing(recipe: Recipe, found: Examined) -> int:
    """The whole model while it writes calibration windows: keys and values of those side by side, and their logits."""
    if not (found.calibrated and recipe.calibration.written()):
        return 0
    source, length = found.source, _length(recipe, found)
    settings, blocks = source.config.get_text_config(), len(found.anatomy.blocks)
    # where they come from one linear with the queries, as many as there can be
    kept = sum(site.out_features for site in found.anatomy.sites if site.role in ("attention.k", "attention.v"))
    states = source.dtype.itemsize * length * (kept or 2 * settings.hidden_size * blocks)
    return source.nbytes() + own_text.ROWS * (2 * states + 4 * LOGITS * settings.vocab_size)


def _evaluated(recipe: Recipe, found: Examined) -> int:
    """Both models on a text, with the activations of a batch and as many logits as are made at once."""
    if not recipe.evaluation.text:
        return 0
    source = found.source
    widest = max(max(site.in_features, site.out_features) for site in found.anatomy.sites)
    logits = max(LOGITS_AT_ONCE, 2 * ROWS_AT_LEAST * source.config.get_text_config().vocab_size)
    return 2 * source.nbytes() + 4 * TOKENS_PER_BATCH * widest * source.dtype.itemsize + 3 * 4 * logits

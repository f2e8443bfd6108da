"""What a run computes, from headers: floating-point operations of products, and those of eigenproblems, step by step.

Sweeps over the blocks, statistics, factorisations and roundings of every step; what is measured or learned on the whole
model; the forward and backward passes of training; and the windows that the result is measured on.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from tersely import gating, own_text, planning, sensitivity, temper
from tersely.allocate import Learned
from tersely.allocate.search import RATIOS
from tersely.anatomy import Site
from tersely.estimate.memory import Part, parts, read_for_a_temperature
from tersely.methods import METHODS
from tersely.option import Amount
from tersely.prepare import Examined, learns, measures, seeks, tempers
from tersely.recipe import CacheStep, MethodStep, Recipe, TrainStep
from tersely.stats import keyed_by
from tersely.steps.training import settings_of
from tersely.tables import build_allocator
from tersely.text import size_of, window_length
from tersely.train.objectives import OBJECTIVES

EIGH = 9  # operations per n³ that a symmetric eigenproblem with vectors is counted as
FACTORS = 15  # that are tried for a temperature
FORWARD, BACKWARD = 2, 4  # operations for each weight and token

TRAINING = 2.0
"""How much longer training takes than its products: what is done to logits and activations beside (measured)."""

COLUMN, ENTRY = 2e7, 500.0
"""What rounding with error feedback takes for a column, and rounding alone for a weight, beside the products: a third
of a millisecond and some nanoseconds, in operations of a processor that reaches 70 of them in a nanosecond."""

WIDEST = 16  # bits of a code; an amount above is a rank
BYTES = 3  # of a text that are a token


def operations(recipe: Recipe, found: Examined) -> tuple[float, float]:
    """Of products and of eigenproblems."""
    length = window_length(found.source.config, recipe.calibration.length)
    blocks = found.anatomy.blocks
    weights = sum(found.source.elements(n) for n in found.source.stored if n.startswith(blocks))
    products, eigen = _measured_result(recipe, found, weights) + _writing(recipe, found, length, weights), 0.0
    for part in parts(recipe, found):
        if isinstance(part.step, TrainStep):
            work = _training(part.step, part, recipe, found, length, weights)
        else:
            work = _sweeping(part, recipe, found, length, weights)
        products, eigen = products + work[0], eigen + work[1]
    return products, eigen


def _head(found: Examined) -> int:
    """Weights that make logits."""
    settings = found.source.config.get_text_config()
    return int(settings.hidden_size * settings.vocab_size)


def _writing(recipe: Recipe, found: Examined, length: int, weights: int) -> float:
    """Windows that the model writes itself, whole batches of them."""
    written = recipe.calibration.written() if found.calibrated else 0
    return FORWARD * float(-(-written // own_text.ROWS) * own_text.ROWS * length) * (weights + _head(found))


def _sweeping(part: Part, recipe: Recipe, found: Examined, length: int, weights: int) -> tuple[float, float]:
    step, sites = part.step, [_as_left(site, found) for site in part.sites]
    tokens = recipe.calibration.samples * length if found.calibrated else 0
    curves, streams = False, int(bool(part.needs))
    if isinstance(step, MethodStep | CacheStep):
        curves = build_allocator(step.allocate).needs_errors
        assert step.propagate is not None  # `examine` has settled it
        streams = curves + {"none": 0 if curves else 1, "block": 2, "input": 5}[step.propagate]
    products = FORWARD * float(tokens) * weights * streams
    inputs = {site.reads: site.in_features for site in sites}
    products += sum(2.0 * tokens * width**2 for width in inputs.values()) * (1 + curves)
    fitted = [_fitted(part, site, found.source.dtype.itemsize, curves=curves) for site in sites]
    products, eigen = products + sum(one[0] for one in fitted), sum(one[1] for one in fitted)
    if any(keyed_by(kind) != "input" for kind in part.needs):
        products += (FORWARD + BACKWARD) * float(tokens) * weights
    measured = FORWARD * float(min(sensitivity.WINDOWS, recipe.calibration.samples) * length) * weights
    # of every target one option, or one for each ratio and the smallest
    targets = len(part.targets) or len(sites)
    products += measured * targets * {"kl": 1, "loss": 1 + len(RATIOS)}.get(measures(step) or "", 0)
    learned = _learned(learns(step), length, weights, sites)
    products, eigen = products + learned[0], eigen + learned[1]
    if seeks(step):  # so many plans are made and measured
        tried = math.log2(planning.GRID)
        products += tried * measured
        eigen += tried * sum(_eigen_operations(site) for site in sites)
    if tempers(step):  # of two models the body once, and the head for every factor that is tried
        products += 2 * FORWARD * float(temper.WINDOWS * length) * weights
        vocabulary = found.source.config.get_text_config().vocab_size
        products += 2 * 2.0 * FACTORS * read_for_a_temperature(recipe, found) * vocabulary
    if isinstance(step, MethodStep) and step.refine is not None:  # the dense stream, and every pass there and back
        seen = float((step.refine.samples or recipe.calibration.samples) * length)
        products += seen * weights * (2 * FORWARD + (FORWARD + BACKWARD) * step.refine.epochs)
    return products, eigen


def _as_left(site: Site, found: Examined) -> Site:
    """A factor that an earlier step leaves is no wider than at the rank at which factors are as large as the weight."""
    rank = max(1, site.in_features * site.out_features // (site.in_features + site.out_features))
    if site in found.anatomy.sites or site in found.anatomy.outside:
        return site
    match site.role.rpartition(".")[2]:
        case "down":
            return replace(site, out_features=rank)
        case "up":
            return replace(site, in_features=rank)
    return site


def _fitted(part: Part, site: Site, itemsize: int, *, curves: bool) -> tuple[float, float]:
    """Operations that make of a linear what a step wants, and with `curves` whatever else it could be."""
    step, out, columns = part.step, site.out_features, site.in_features
    if not isinstance(step, MethodStep | CacheStep):  # as if every row were turned
        return 2.0 * out * columns**2, 0.0
    if (
        isinstance(step, CacheStep) or step.method not in METHODS or part.built.leaves
    ):  # one factorisation for all ranks
        return 0.0, _eigen_operations(site) * (1.2 if curves else 1.0)
    products, eigen = 0.0, 0.0
    amounts = [option.amount for option in part.built.sizes((out, columns), itemsize) if option.amount != 0]
    for amount in amounts if curves else amounts[-1:]:
        eigen += _eigen_operations(site) * ("branch" in amount if isinstance(amount, dict) else 0)
        width = _rounded_columns(amount, columns)
        products += 2.0 * out * width**2 + COLUMN * width if part.needs else ENTRY * out * width
    if part.needs:  # the inverse of the metric, and factors of all ranks
        ranks = any(_rounded_columns(amount, columns) < columns for amount in amounts)
        eigen += float(columns) ** 3 + _eigen_operations(site) * ranks
    return products * (1.0 + curves / max(1, len(amounts))), eigen


def _rounded_columns(amount: Amount, columns: int) -> int:
    """Columns that are rounded for an amount: of the weight, or of a factor of it; none where it is a rank alone."""
    match amount:
        case {"bits": _, "rank": int(rank)}:
            return rank
        case {"bits": _} | {"widths": _}:
            return columns
        case int() if amount <= WIDEST:
            return columns
    return 0


def _training(
    step: TrainStep, part: Part, recipe: Recipe, found: Examined, length: int, weights: int
) -> tuple[float, float]:
    """Every token there and back, in student and teacher; windows held out at both ends and on the way."""
    whole = weights + _head(found)
    teacher = FORWARD * any(OBJECTIVES[name].teaches for name in step.train)
    settings = settings_of(step)
    steps = settings.steps(length)
    products = float(steps * step.batch * length) * whole * (FORWARD + BACKWARD + teacher)
    looked = 2 + steps // settings.evaluate_every if step.held_out else 0
    products += float(looked * step.held_out * length) * whole * (FORWARD + teacher)
    products *= TRAINING
    if not part.needs:
        return products, 0.0
    tokens = float(recipe.calibration.samples * length)
    products += tokens * (FORWARD * weights + sum(2.0 * site.in_features**2 for site in part.sites))
    return products + sum(COLUMN * site.in_features for site in part.sites), 0.0


def _measured_result(recipe: Recipe, found: Examined, weights: int) -> float:
    """Both models on the texts of the evaluation, after every step."""
    tokens = 0.0
    for text in recipe.evaluation.text:
        asked = recipe.evaluation.windows, window_length(found.source.config, recipe.evaluation.length)
        whole = (size_of(text, "evaluation") or 0) / BYTES
        tokens += whole if asked[0] is None else min(whole, asked[0] * asked[1])
    return 2 * FORWARD * tokens * (weights + _head(found)) * len(recipe.step)


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

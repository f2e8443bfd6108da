"""The temperature of what was compressed: one factor for all logits.

A model that has lost weights is surer of what it says than it is right: errors in the last hidden state make logits
larger as well as wrong.  How sure it is can be corrected without touching what it says.  Of all factors t

    minimise  D(t) = E KL(p ‖ softmax(t z))   over t > 0,

where z are the logits and p is what the model predicted before it was compressed.  D is convex in t, since the
logarithm of a sum of exponentials is, so that what is found in an interval is the least there; of a model that has lost
nothing it is 1.  The likeliest token stays the likeliest at any t, as far as a gain in 16 bits can tell.

Why p, and not the tokens that came: a dense model may itself be surer than it is right, the more so on other texts.
Whoever fits t to tokens repairs that as well, and is then below the dense model's perplexity where nothing was cut.
What was lost by compression is what is to be given back here.

The factor goes into the norm before the head, t (γ ⊙ n + β): nothing is computed at run time, and the result is an
ordinary model.  A head with a bias, or one that bounds its logits, makes something else of t z; D is measured with all
that, behind the norm, and the least in the interval may then be a local one.

On windows that the weights were fitted to a model is not as wrong as elsewhere, and would be left too sure.  So t is
found on windows of the calibration text that were not drawn for calibration, as far as there are any.  It is one number
for a model, found by trying; no gradient is taken.

Source: Guo et al., On Calibration of Modern Neural Networks, 2017, section 4.2 (arXiv 1706.04599).  They scale logits
at run time, of a classifier, by what the labels of a validation set say.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from tersely.anatomy import Anatomy, Norm
from tersely.checkpoint import fill
from tersely.errors import AnatomyError, NumericalError
from tersely.gradients import whole_model
from tersely.job import Clock, Job
from tersely.kinds import Made, link, link_tables
from tersely.predictions import Predictions, divergence

RANGE = (0.25, 4.0)
"""Of factors."""

DIGITS = 1e-4
"""To which the logarithm of the factor is found."""

WINDOWS = 32
"""That are read, at most."""

FEW = 8
"""Windows below which a warning is given."""

UNIT = "tempered.json"


@dataclass(frozen=True)
class Tempered:
    """What was found.  Divergences from what was predicted before, nats per token."""

    factor: float
    before: float
    after: float
    windows: int


def check(anatomy: Anatomy) -> Norm:
    """The norm that the factor goes into.  Raises AnatomyError where there is none."""
    found = [norm for norm in anatomy.norms if norm.feeds == "head"]
    if not found or anatomy.head is None:
        raise AnatomyError(
            f"temper scales the gain of the norm before the output head, and {anatomy.family} has no such norm or no "
            "head here; set temper = false"
        )
    return found[0]


def unseen(all_windows: Tensor, *seen: Tensor) -> tuple[Tensor, str | None]:
    """Up to `WINDOWS` windows ``[samples, length]`` that are not among those seen, from all parts of the text; of those
    seen where there are no others.  With them the warning where few or none are unseen, or None."""
    known = {window.numpy().tobytes() for windows in seen for window in windows}
    fresh = [number for number, window in enumerate(all_windows) if window.numpy().tobytes() not in known]
    numbers = torch.tensor(fresh or range(len(all_windows)))
    places = torch.linspace(0, len(numbers) - 1, min(WINDOWS, len(numbers))).round().long()
    found = all_windows[numbers[places]]
    if len(fresh) >= FEW:
        return found, None
    on = f"these {len(fresh)}" if fresh else f"{len(found)} that the weights are fitted to, which leaves it too sure"
    return found, (
        f"{len(fresh)} windows of the calibration text were not drawn, and the factor of the logits (temper) is found "
        f"on {on}; give more text, or fewer samples"
    )


def temper(
    job: Job, windows: Tensor, replaced: Mapping[str, Made], changed: Mapping[str, Tensor], clock: Clock
) -> tuple[Tempered, dict[str, Tensor]]:
    """What was found for the model of a job with these parts in it, and the tensors that it changes.

    `windows`: token numbers ``[samples, length]``; `changed`: other tensors that are new, by their names.  Raises
    NumericalError where the model is not finite.
    """
    norm = check(job.anatomy)
    if not job.journal.has(UNIT):
        job.progress("temperature", 0, 1)
        with clock("temper"):
            job.journal.write_json(UNIT, asdict(_found(job, windows, replaced, changed)))
        job.progress("temperature", 1, 1)
    found = Tempered(**job.journal.read_json(UNIT))
    return found, _scaled(job, norm, found.factor, changed)


@torch.no_grad()
def _found(job: Job, windows: Tensor, replaced: Mapping[str, Made], changed: Mapping[str, Tensor]) -> Tempered:
    model = whole_model(job.source, job.device).eval()
    dense, cut = Predictions(model), Predictions(_with(model, job, replaced, changed))
    batches = dense.batches(windows)
    before, after = ([of_model.body(rows) for rows in batches] for of_model in (dense, cut))

    def lost(exponent: float) -> float:
        """D.  Raises NumericalError where it is not finite."""
        factor = math.exp(exponent)
        scaled = (type(said)({**said, "last_hidden_state": said.last_hidden_state * factor}) for said in after)
        found = divergence(batches, (dense, before), (cut, scaled))
        if not math.isfinite(found):
            raise NumericalError("what the compressed model predicts is not finite; calibrate in bfloat16 or float32")
        return found

    as_it_is = lost(0.0)
    least = minimize_scalar(
        lost, bounds=(math.log(RANGE[0]), math.log(RANGE[1])), method="bounded", options={"xatol": DIGITS}
    )
    if not least.fun < as_it_is:  # 1 is as good
        return Tempered(1.0, as_it_is, as_it_is, len(windows))
    return Tempered(math.exp(float(least.x)), as_it_is, float(least.fun), len(windows))


def _with(model: Any, job: Job, replaced: Mapping[str, Made], changed: Mapping[str, Tensor]) -> Any:
    """A second model with these parts in it, which has all other numbers in common with the first."""
    cut: Any = job.source.skeleton()
    cut.load_state_dict(model.state_dict(), strict=False, assign=True)
    cut.tie_weights()
    for path, made in replaced.items():
        module = made.build()
        fill(module, made.state, job.device)
        cut.set_submodule(path, module)
    cut.load_state_dict({name: tensor.to(job.device) for name, tensor in changed.items()}, strict=False, assign=True)
    link(cut)
    link_tables(cut)
    return cut.requires_grad_(False).to(job.device).eval()


def _scaled(job: Job, norm: Norm, factor: float, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [f"{norm.name}.weight", *([f"{norm.name}.bias"] if norm.bias else [])]
    scaled = {}
    for name in names:
        old = changed[name] if name in changed else job.source.tensor(name)
        offset = norm.offset if name.endswith(".weight") else 0.0
        scaled[name] = ((old.double() + offset) * factor - offset).to(old.dtype)
    return scaled

"""Refinement of whole blocks: gradient descent towards what a block gave before it was cut.

Each linear of a block was fitted by itself.  What its neighbours lose, the norms between them and the products of the
attention are nobody's business then.  So, once all targets of a block f are cut, the block f' is trained as a whole,

    minimise  E‖f'(x̂) - f(x)‖²  over all floating parameters of f', norms, biases and linears left dense included
                                 (but for a factor that several blocks share),

where x is what the block reads in the dense model and x̂ what it reads behind the compressed blocks before it.  Two
streams of hidden states run beside the sweep for that, one dense, one compressed, over windows of text of their own.

Weights that the step has quantized take part.  Each stands behind the relaxation `rounding` meanwhile, which begins
with the codes and the grid that it has and moves both (`train.relax.rounding`); it comes back as the same kind with the
same bytes.

The training is that of `train.loop`, with batches of recorded hidden states in the place of windows of text: the block
stands in a module that is called with the number of a batch.  Windows are shuffled once and grouped into batches; the
order of the batches changes from pass to pass.  A share of the batches is held out.  They are measured after every
pass, and the best numbers stay, those of the start included: on the windows held out no block is worse than it was cut.

The loss is counted in units of the mean squared error before refinement, so that neither the size of hidden states nor
the rate depends on the model.  Parameters below float32 train as float32 copies; every forward pass computes with these
rounded to the old dtype, and so do the measurements: what was measured is what is stored.  The products are formed in
the old dtype too, but for float16 in float32.

Departures from the authors' code: theirs trains for a fixed number of passes at a fixed rate and takes the last
numbers; ours lets the rate fall, holds out windows, stops where they gain nothing, and divides the loss by its first
value.

Source: Kumar et al., AA-SVD: Anchored and Adaptive SVD for Large Language Model Compression, 2026, section 3
(arXiv 2604.02119).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from tersely.anatomy import Anatomy
from tersely.calibrate import Replay
from tersely.checkpoint import Source
from tersely.errors import NumericalError, RecipeError
from tersely.kinds import LinearKind, QuantizedLinear, SharedLinear
from tersely.settings import Refinement
from tersely.train.data import seed_of
from tersely.train.loop import Progress, TrainingOutcome, train
from tersely.train.relax.rounding import RoundedLinear, weight_of
from tersely.train.settings import Training

PATIENCE = 3
"""Passes without a new best after which a block without codes is done."""


@dataclass(frozen=True)
class Refining:
    """What refinement is told: how, and on what."""

    asked: Refinement
    windows: Int[Tensor, "windows length"]
    seed: int

    def __post_init__(self) -> None:
        if -(-len(self.windows) // self.asked.batch) < 2:
            raise RecipeError(
                f"refine: {len(self.windows)} windows in batches of {self.asked.batch} are a single batch, and one has "
                "to be held out; give more text or samples, or a smaller batch"
            )


@dataclass(frozen=True)
class Refined:
    """What refinement did to a block.  Errors are E‖f'(x̂) - f(x)‖² / E‖f(x)‖² on the windows held out; on all of them
    where it was no more than rounding, and nothing trained."""

    before: float
    after: float
    steps: int
    """Of the optimiser."""
    tokens: int
    """Seen in them, those of several passes again and again."""
    kept: int
    """The step whose numbers stay; 0: those of the start."""


class Refiner:
    """The dense and the compressed stream over the windows to train on; both stand before the same block."""

    def __init__(
        self, refining: Refining, source: Source, anatomy: Anatomy, device: str, progress: Progress | None = None
    ) -> None:
        self._asked = refining.asked
        self._progress = progress
        self._seed = refining.seed
        self._device = device
        self._length = refining.windows.shape[1]
        generator = torch.Generator().manual_seed(seed_of(refining.seed, "refine"))
        windows = refining.windows[torch.randperm(len(refining.windows), generator=generator)]
        self._shifted = Replay(source, anatomy, windows, device, self._asked.batch)
        self._dense = self._shifted.fork()

    def refine(self, block: nn.Module, dense: nn.Module) -> Refined:
        """Train `block`, which stands for `dense`, in place; the streams stay in front of it.

        Raises NumericalError where the training leaves the finite numbers; the block is then as it was.
        """
        self._advance_dense(dense)
        asked = self._asked
        error, energy = self._errors(_InStream(block, self._shifted))
        if error <= torch.finfo(self._dense.hidden(0).dtype).eps ** 2 * energy:
            share = error / (energy or 1.0)  # rounding: nothing that could be learned
            return Refined(share, share, 0, 0, 0)
        stored = {name: parameter.data for name, parameter in block.named_parameters()}
        quantized = _quantized(block, dense)
        kept = 0
        try:
            _put(block, {n: RoundedLinear(part, _replaced(n, block, dense)) for n, part in quantized.items()})
            stands = _InStream(block, self._shifted)
            for parameter in block.parameters():
                master = torch.promote_types(parameter.dtype, torch.float32)
                parameter.data = parameter.data.to(master, copy=True)
            outcome = self._train(stands, error, asked.patience or (asked.epochs if quantized else PATIENCE))
            _put(block, {name: _hardened(block, name) for name in quantized})
            for name, parameter in block.named_parameters():
                parameter.data = parameter.data.to(stored[name].dtype)
            _require_finite(block)
            kept = outcome.kept
        finally:
            if not kept:
                _put(block, quantized)
                for name, parameter in block.named_parameters():
                    parameter.data = stored[name]
        unit = error / (energy or error)
        best = min(measured.loss for measured in outcome.held_out)
        tokens = outcome.steps * self._asked.batch * self._length
        return Refined(unit * outcome.held_out[0].loss, unit * best, outcome.steps, tokens, outcome.kept)

    def advance(self, block: nn.Module, dense: nn.Module) -> None:
        """Move both streams past a block."""
        self._advance_dense(dense)
        self._shifted.observe(block, {}, advance=True)

    def _advance_dense(self, dense: nn.Module) -> None:
        """Its outputs are what the block is to give, and what the next one reads in the dense model."""
        if self._dense.at == self._shifted.at:
            self._dense.observe(dense, {}, advance=True)

    @torch.no_grad()
    def _errors(self, stands: "_InStream") -> tuple[float, float]:
        """Mean squares, per number, of what is missing and of what is wanted."""
        missing, wanted, count = 0.0, 0.0, 0
        for batch in range(len(self._shifted)):
            target = self._dense.hidden(batch).to(self._device).double()
            missing += (stands(torch.tensor([[batch]])).double() - target).square().sum().item()
            wanted += target.square().sum().item()
            count += target.numel()
        if not math.isfinite(missing):
            raise NumericalError("the outputs of the block are not finite before it is refined")
        return missing / count, wanted / count

    def _train(self, stands: "_InStream", error: float, patience: int) -> TrainingOutcome:
        asked, batches = self._asked, len(self._shifted)
        held_out = min(max(1, round(asked.held_out * batches)), batches // 2)
        passes = batches - held_out
        training = Training(
            tokens=asked.epochs * passes,  # a window is the number of a batch, of one token
            batch=1,
            rate=asked.rate,
            quantizer_rate=asked.code_rate or 1 / (asked.epochs * passes),
            optimiser=asked.optimiser,
            decay=asked.decay,
            held_out=held_out,
            evaluate_every=passes,
            patience=patience,
        )
        generator = torch.Generator(self._device).manual_seed(seed_of(self._seed, "refine", self._shifted.at))
        return train(
            stands,
            training,
            objectives={"block": _FormerOutput(self._dense, math.sqrt(error))},
            windows=torch.arange(batches)[:, None],
            generator=generator,
            parameters=[f"block.{name}" for name in _own(stands.block)],
            progress=self._progress,
        )


class _InStream(nn.Module):
    """A block that is called with the number of a recorded batch, and computes in the dtypes that it is stored in."""

    def __init__(self, block: nn.Module, stream: Replay) -> None:
        super().__init__()
        self.block = block
        self._stream = stream
        self._dtypes = {name: parameter.dtype for name, parameter in block.named_parameters()}

    def forward(self, number: Int[Tensor, "1 1"], use_cache: bool = False) -> Float[Tensor, "batch length width"]:
        """`use_cache` is what whole models are called with; a block by itself keeps none."""
        parameters = {name: _rounded(p, self._dtypes[name]) for name, p in self.block.named_parameters()}
        device = next(iter(parameters.values())).device
        arguments, keywords = self._stream.arguments(int(number))
        hidden = self._stream.hidden(int(number)).to(device)
        out: Tensor = functional_call(self.block, parameters, _wider((hidden, *arguments)), _wider(keywords))
        return out


def _rounded(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """What is stored of a parameter.  Of a float16 in float32 again, and its gradient was never in less."""
    if dtype != torch.float16:
        return parameter.to(dtype)
    return parameter + (parameter.half().float() - parameter).detach()


def _wider(value: Any) -> Any:
    """float16 as float32, in which gradients of a mean over many numbers do not vanish; the rest as it is."""
    match value:
        case Tensor(dtype=torch.float16):
            return value.float()
        case tuple():
            return tuple(map(_wider, value))
        case dict():
            return {name: _wider(part) for name, part in value.items()}
    return value


@dataclass(frozen=True)
class _FormerOutput:
    """The mean square of what is missing of the dense output, over the square of a unit."""

    dense: Replay
    """Moved past the block."""
    unit: float

    summary: ClassVar[str] = "squared difference to the output of the block before it was cut"
    teaches: ClassVar[bool] = False

    def __call__(self, student: Any, teacher: Any, tokens: Int[Tensor, "1 1"]) -> Float[Tensor, ""]:
        given = student.to(torch.promote_types(student.dtype, torch.float32))
        return ((given - self.dense.hidden(int(tokens)).to(given)) / self.unit).square().mean()


def _quantized(block: nn.Module, dense: nn.Module) -> dict[str, QuantizedLinear]:
    """The weights with codes that the dense block has not and no other block reads."""
    before = {name for name, part in dense.named_modules() if isinstance(part, QuantizedLinear)}
    elsewhere = _elsewhere(block)
    return {
        name: part
        for name, part in block.named_modules()
        if isinstance(part, QuantizedLinear) and name not in before and not f"{name}.".startswith(elsewhere)
    }


def _replaced(name: str, block: nn.Module, dense: nn.Module) -> Float[Tensor, "out in"] | None:
    """The weight that a quantized one stands for: that of the dense block's linear, in a sum what the other terms leave
    of it; None for factors, which the dense block does not have."""
    whole, inside, term = name.rpartition(".terms.")
    weight = weight_of(dict(dense.named_modules()).get(whole if inside else name))
    if weight is None or not inside:
        return weight
    if not term.isdigit():  # a factor of a term
        return None
    own, total = (block.get_submodule(path) for path in (name, whole))
    assert isinstance(own, LinearKind) and isinstance(total, LinearKind)
    return weight.float() - (total.to_dense() - own.to_dense())


def _put(block: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    for name, part in parts.items():
        block.set_submodule(name, part)


def _hardened(block: nn.Module, name: str) -> QuantizedLinear:
    relaxed = block.get_submodule(name)
    assert isinstance(relaxed, RoundedLinear)
    return relaxed.harden()


def _elsewhere(block: nn.Module) -> tuple[str, ...]:
    """Prefixes of what other blocks read too."""
    return tuple(
        f"{name}.down."
        for name, part in block.named_modules()
        if isinstance(part, SharedLinear) and not part.same_input
    )


def _own(block: nn.Module) -> list[str]:
    """Parameters that no other block reads."""
    elsewhere = _elsewhere(block)
    return [name for name, _ in block.named_parameters() if not name.startswith(elsewhere)]


def _require_finite(block: nn.Module) -> None:
    for name, parameter in block.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NumericalError(f"{name} is not finite in {parameter.dtype} after refinement; choose a lower rate")

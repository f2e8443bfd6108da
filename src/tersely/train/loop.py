"""The one training loop.

What trains stands in the model already: modules of a relaxation in the places of linears (`relax_sites`), or parameters
that train where they are, chosen by name.  Everything else is frozen.  Minimised is, with AdamW or by
the signs of the gradient,

    mean over the objectives  +  mean over the relaxed modules of their penalty  +  budget of the relaxation,

over a number of tokens rather than of steps.  A part of the windows is held out and measured before, meanwhile and
afterwards.  `harden` then puts the kinds in place that a checkpoint can hold.

The model may be anything that is called with token numbers; objectives see what it returns.  Whole models are trained
on text, single blocks on the numbers of recorded batches (see `tersely.refine`).

The model computes in evaluation mode, so that its own dropout is off; relaxed modules are told that they train.
Numbers that train are held in float32 or better; a relaxation sees to that, and parameters that train in place in less
are refused.

A run survives a kill.  All randomness of a step, the choice of windows and what relaxations draw, depends on the seed
and the number of the step alone; so parameters, the optimizer's moments and the measurements so far are all there is
to keep.  They are committed as one file, and a run that finds it ends with the same bytes as one that never stopped.
One that is interrupted commits its last whole step before it ends.

Several processes (`torchrun`) share every batch; each must be given the same arguments.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn

from tersely.errors import CheckpointError, NumericalError, RecipeError
from tersely.journal import Journal
from tersely.train.data import Batches, hold_out, seed_of
from tersely.train.objectives import Objective, Tokens
from tersely.train.relax.base import Relaxation
from tersely.train.settings import Training
from tersely.train.standing import Trained, standing
from tersely.train.stopping import uninterrupted

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measured:
    """The windows held out, after `step` steps: objective → mean loss."""

    step: int
    losses: Mapping[str, float]

    @property
    def loss(self) -> float:
        """Mean over the objectives; penalties and budgets are not in it."""
        return sum(self.losses.values()) / len(self.losses)


@dataclass(frozen=True)
class TrainingOutcome:
    """What happened; the numbers themselves stand in the model."""

    steps: int
    tokens: int
    losses: tuple[float, ...]
    """What was minimised, step by step, penalties and budget included."""
    held_out: tuple[Measured, ...]
    """The first before any step, the last after all; empty where nothing was held out."""
    kept: int
    """The step whose numbers stand in the model: the last one, or with `patience` the best."""


def train(
    model: nn.Module,
    training: Training,
    *,
    objectives: Mapping[str, Objective],
    windows: Int[Tensor, "windows length"],
    generator: torch.Generator,
    relaxation: Relaxation | None = None,
    bits: float | None = None,
    parameters: Sequence[str] = (),
    teacher: nn.Module | None = None,
    journal: Journal | None = None,
    unit: str = "training.safetensors",
    progress: Progress | None = None,
    callback: Callable[[int, nn.Module], None] | None = None,
) -> TrainingOutcome:
    """Train what is relaxed in `model`, and the `parameters` named by patterns (``"*"``: all), in place.

    objectives: name → what to minimise; they count alike.
    generator: the one that `relax_sites` was given, freshly seeded before; its seed is the seed of the run.
    relaxation, bits: the price of missing an average width, for relaxations that learn a size.
    teacher: the model that objectives may compare with, on the same device.
    journal, unit: where a resumed run finds its state; without a journal nothing is kept.
    callback: called with the number of steps done and the model, before the first step and after every one; a resumed
    run does not call it again for steps that it found done.

    Raises NumericalError with the step at which a loss is not finite, RecipeError where nothing would train.
    """
    _check(objectives, windows, teacher, model)
    for_training, for_measuring = hold_out(windows, training.held_out)
    with standing(model, teacher, parameters) as trained:
        job = _Job(model, teacher, trained, training, objectives, for_training, for_measuring, relaxation, bits)
        run = _Run(job, generator, journal, unit)
        run.go(progress, callback)
    return run.outcome()


@dataclass(frozen=True)
class _Job:
    """What a run is about."""

    model: nn.Module
    teacher: nn.Module | None
    trained: Trained
    training: Training
    objectives: Mapping[str, Objective]
    windows: Tensor
    held_out: Tensor
    relaxation: Relaxation | None
    bits: float | None

    @property
    def steps(self) -> int:
        return self.training.steps(self.windows.shape[1])

    def identity(self, seed: int) -> Tensor:
        """Checksum of whatever decides the result, the numbers at the start aside.  How often to save does not."""
        shapes = [(name, str(t.dtype), tuple(t.shape)) for name, t in self.trained.tensors().items()]
        said = [asdict(replace(self.training, save_every=1)), dict(self.objectives), self.relaxation, self.bits, shapes]
        digest = hashlib.sha256(repr([said, seed]).encode())
        for tokens in (self.windows, self.held_out):
            digest.update(tokens.cpu().contiguous().numpy().tobytes())
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


class _Run:
    """The steps of a job, done or to be done."""

    def __init__(self, job: _Job, generator: torch.Generator, journal: Journal | None, unit: str) -> None:
        self._job = job
        self._generator = generator
        self._seed = generator.initial_seed()
        self._journal = journal
        self._unit = unit
        self._losses: list[float] = []
        self._measured: list[Measured] = []
        self._best: dict[str, Tensor] = {}
        self._saved = 0
        """Steps that a resumed run would find done."""
        self._batches = Batches(len(job.windows), job.training.batch, self._seed)
        self._device = next(iter(job.trained.parameters().values())).device
        self._accelerator = Accelerator(cpu=self._device.type == "cpu", mixed_precision="no", device_placement=False)
        self._optimizer = _optimizer(job)
        if job.training.batch % self._accelerator.num_processes:
            raise RecipeError(
                f"training: batch = {job.training.batch} windows cannot be shared evenly by "
                f"{self._accelerator.num_processes} processes; choose a multiple"
            )
        self._prepared: tuple[nn.Module, Any] = self._accelerator.prepare(job.model, self._optimizer)

    def go(self, progress: Progress | None, callback: Callable[[int, nn.Module], None] | None) -> None:
        job = self._job
        if self._journal is not None and self._journal.has(self._unit):
            self._restore(self._journal.read_tensors(self._unit))
            self._saved = len(self._losses)
            self._advance((self._saved - 1) / job.steps)
            self._measure_if_due()  # interrupted between the step and its measurement
        else:
            if job.trained.relaxed:
                self._price()  # refuses an impossible budget, and settles learned widths before they are measured
            self._measure_if_due()
            if callback is not None:
                callback(0, job.model)
        if progress is not None:
            progress("training steps", len(self._losses), job.steps)
        try:
            while not self._over():
                self._step()
                self._measure_if_due()
                done = len(self._losses)
                if progress is not None:
                    progress("training steps", done, job.steps)
                if callback is not None:
                    callback(done, job.model)
                if done % job.training.save_every == 0 or self._over():
                    self._save()
                    self._accelerator.wait_for_everyone()
        except KeyboardInterrupt:
            if len(self._losses) > self._saved:
                self._save()  # without waiting: the other processes may have been stopped elsewhere
            raise
        if progress is not None and len(self._losses) < job.steps:
            progress("training steps", len(self._losses), len(self._losses))  # nothing was gained by going on
        self._advance(1.0)
        if job.training.patience:
            _put(job.trained.tensors(), self._best)
        self._generator.manual_seed(self._seed)

    def outcome(self) -> TrainingOutcome:
        done, job = len(self._losses), self._job
        kept = self._best_at().step if job.training.patience else done
        tokens = done * job.training.batch * job.windows.shape[1]
        return TrainingOutcome(done, tokens, tuple(self._losses), tuple(self._measured), kept)

    def _over(self) -> bool:
        if len(self._losses) == self._job.steps:
            return True
        patience = self._job.training.patience
        return bool(patience) and len(self._measured) - 1 - self._measured.index(self._best_at()) >= patience

    def _best_at(self) -> Measured:
        return min(self._measured, key=lambda measured: measured.loss)

    def _step(self) -> None:
        job, done = self._job, len(self._losses)
        model, optimizer = self._prepared
        for group in self._optimizer.param_groups:
            group["lr"] = group["largest_rate"] * job.training.factor(done, job.steps)
        self._advance(done / job.steps)
        self._generator.manual_seed(seed_of(self._seed, "step", done))
        numbers = self._batches.at(done)
        total = 0.0
        for part in self._share(numbers).split(job.training.at_once or len(numbers)):
            losses = self._losses_of(model, job.windows[part])
            share = len(part) * self._accelerator.num_processes / len(numbers)
            total += self._backward(share * sum(losses.values()) / len(losses), done)
        if job.trained.relaxed:
            total += self._backward(self._price(), done)
        limit = job.training.clip or math.inf
        norm = self._accelerator.clip_grad_norm_(list(job.trained.parameters().values()), limit)
        _require_finite("norm of the gradient", float(norm), done)
        loss = self._mean(total)
        with uninterrupted():  # numbers half of which are a step ahead are nothing to go on from
            optimizer.step()
            self._losses.append(loss)
        optimizer.zero_grad()

    def _advance(self, done: float) -> None:
        for module in self._job.trained.relaxed:
            module.advance(done)

    def _price(self) -> Tensor:
        """Penalties and budget."""
        job = self._job
        price = torch.stack([module.penalty() for module in job.trained.relaxed]).mean()
        if job.relaxation is not None:
            price = price + job.relaxation.budget(job.trained.relaxed, job.bits)
        return price

    def _backward(self, loss: Tensor, done: int) -> float:
        value = loss.item()
        _require_finite("loss", value, done)
        if loss.requires_grad:  # a price may depend on nothing that trains
            self._accelerator.backward(loss)
        return value

    def _losses_of(self, model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
        job, tokens = self._job, tokens.to(self._device)
        taught = None
        if job.teacher is not None and any(objective.teaches for objective in job.objectives.values()):
            with torch.no_grad():
                taught = job.teacher(tokens, use_cache=False)
        given = model(tokens, use_cache=False)
        return {name: objective(given, taught, tokens) for name, objective in job.objectives.items()}

    def _measure_if_due(self) -> None:
        done, job = len(self._losses), self._job
        is_known = bool(self._measured) and self._measured[-1].step == done
        if len(job.held_out) and not is_known and (done % job.training.evaluate_every == 0 or done == job.steps):
            self._measure()

    @torch.no_grad()
    def _measure(self) -> None:
        job = self._job
        for module in job.trained.relaxed:
            module.eval()
        sums = dict.fromkeys(job.objectives, 0.0)
        for part in self._share(torch.arange(len(job.held_out))).split(job.training.at_once or job.training.batch):
            for name, loss in self._losses_of(job.model, job.held_out[part]).items():
                sums[name] += loss.item() * len(part)
        for module in job.trained.relaxed:
            module.train()
        processes = self._accelerator.num_processes
        losses = {name: self._mean(total) * processes / len(job.held_out) for name, total in sums.items()}
        done = len(self._losses)
        if not all(map(math.isfinite, losses.values())):
            raise NumericalError(
                f"after {done} steps of training the held-out windows have the losses {losses}; "
                + ("choose a lower rate" if done else "the model is broken before it trains")
            )
        with uninterrupted():
            self._measured.append(Measured(done, losses))
            if job.training.patience and self._best_at().step == done:
                self._best = {name: tensor.clone() for name, tensor in job.trained.tensors().items()}

    def _share(self, numbers: Tensor) -> Tensor:
        """The part of a batch that falls to this process."""
        return numbers[self._accelerator.process_index :: self._accelerator.num_processes]

    def _mean(self, value: float) -> float:
        """Over all processes."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self._device)
        return float(self._accelerator.reduce(tensor, "mean"))

    def _save(self) -> None:
        if self._journal is None:
            return
        job = self._job
        tensors = {f"number.{name}": tensor for name, tensor in job.trained.tensors().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        for name, parameter in job.trained.parameters().items():
            tensors |= {f"moment.{name}.{part}": t for part, t in self._optimizer.state.get(parameter, {}).items()}
        rows = [[float(measured.step), *measured.losses.values()] for measured in self._measured]
        tensors["losses"] = torch.tensor(self._losses, dtype=torch.float64)
        tensors["measured"] = torch.tensor(rows, dtype=torch.float64)
        tensors["identity"] = job.identity(self._seed)
        if self._accelerator.is_main_process:
            self._journal.write_tensors(self._unit, tensors)
        self._saved = len(self._losses)

    def _restore(self, kept: Mapping[str, Tensor]) -> None:
        job = self._job
        if not torch.equal(kept["identity"], job.identity(self._seed)):
            raise CheckpointError(
                f"{self._unit} is the state of another training (other settings, windows or seed); start over"
            )
        _put(job.trained.tensors(), _below("number.", kept))
        self._best = {name: tensor.clone().to(self._device) for name, tensor in _below("best.", kept).items()}
        moments = _below("moment.", kept)
        for name, parameter in job.trained.parameters().items():
            found = {part: t for part, t in _below(f"{name}.", moments).items() if "." not in part}
            if found:  # a parameter that never had a gradient has none
                self._optimizer.state[parameter] = {
                    part: t.clone() if part == "step" else t.to(parameter.device, copy=True)
                    for part, t in found.items()
                }
        self._losses = kept["losses"].tolist()
        names = tuple(job.objectives)
        self._measured = [
            Measured(int(step), dict(zip(names, losses, strict=True))) for step, *losses in kept["measured"].tolist()
        ]


def _require_finite(what: str, value: float, done: int) -> None:
    if not math.isfinite(value):
        raise NumericalError(
            f"step {done + 1} of training: the {what} is {value}; choose a lower rate, or a longer warm-up"
        )


def _check(objectives: Mapping[str, Objective], windows: Tensor, teacher: nn.Module | None, model: nn.Module) -> None:
    if not objectives:
        raise RecipeError("training without an objective; name at least one")
    least = 2 if any(isinstance(objective, Tokens) for objective in objectives.values()) else 1  # it predicts the next
    if windows.ndim != 2 or windows.shape[1] < least:
        raise RecipeError(f"training windows of shape {tuple(windows.shape)}; wanted [windows, {least} or more tokens]")
    if teacher is model:
        raise RecipeError("a model cannot teach itself; open the dense model a second time")
    taught = [name for name, objective in objectives.items() if objective.teaches]
    if taught and teacher is None:
        raise RecipeError(f"the objective {taught[0]} compares with a teacher, and there is none; give the dense model")


class SignDescent(torch.optim.Optimizer):
    """θ ← θ - rate · sign(∂L/∂θ): how far a number gets is known beforehand, whatever the size of its gradient."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


def _optimizer(job: _Job) -> torch.optim.Optimizer:
    groups = []
    for group, parameters in job.trained.groups.items():
        rate = job.training.quantizer_rate if group == "quantizers" else None
        for matrices in (True, False):
            chosen = [p for p in parameters.values() if (p.ndim > 1) == matrices]
            decay = job.training.decay if matrices and group != "quantizers" else 0.0  # codes are not small at zero
            if chosen:
                rates = {"lr": 0.0, "largest_rate": rate or job.training.rate}
                groups.append({"params": chosen, "weight_decay": decay} | rates)
    return torch.optim.AdamW(groups) if job.training.optimiser == "adam" else SignDescent(groups)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def _put(places: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, place in places.items():
        place.copy_(values[name])

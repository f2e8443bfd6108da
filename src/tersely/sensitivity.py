"""What only the model can tell an allocator: how much it minds that one site is cut.

A site's output error says how far its output moves, not whether anything behind it cares.  Here the whole model is
asked.  One target at a time is replaced, as a method would replace it on the inputs of the dense model, the model reads
calibration windows, and the target is put back.  What it lost is, in nats per position,

    kl      Σ p log(p / q) of the dense model's p and the present q, both at temperature 0.6; the first eighth of every
            window, where the model still guesses, does not count
    loss    the rise of the mean cross entropy of the next token: the logarithm of the ratio of the perplexities

Losses of single sites do not add up once many are cut; they order sites far better than output errors do.  The loss
of a model with all of a plan done to it is measured in the same way, for budgets that are perplexities.  The
similarity of a block's input and output is measured block by block and needs no whole model in memory.

The dense model's hidden states are remembered (`predictions`), so that it is not asked again for every target.

Every target is a unit of the journal.  Beside shared statistics of the dense model, under what was done to what, the
numbers serve every later budget.

Source: Thoma et al., Advancing SVD-based LLM Compression via Layer-Wise Error Model Search, 2026 (ICML).
Source: Yuan et al., ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models, 2023
(arXiv 2312.05821).
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from tersely.allocate import Measured
from tersely.anatomy import Anatomy, model_class
from tersely.calibrate import Blocks, Replay, StatisticsStore, watch_list
from tersely.checkpoint import Source
from tersely.errors import NumericalError, RecipeError
from tersely.journal import Journal, commit_text, reading
from tersely.kinds import Kind, dense_weight, link
from tersely.opening import load_with_report
from tersely.option import Amount, Option
from tersely.predictions import Predictions, divergence
from tersely.stats import Peaks, Stats
from tersely.stats.peaks import spike, weight_spike
from tersely.targets import Target

WINDOWS = 32
"""Calibration windows that are read for every measurement, as in both papers; spread evenly over those there are."""

TEMPERATURE = 0.6
"""Of both distributions in a divergence."""

SKIPPED = 8
"""One part in so many of a window comes too early for a divergence to count."""


class Laboratory:
    """Measures a dense model and remembers what it measured."""

    def __init__(
        self,
        source: Source,
        anatomy: Anatomy,
        windows: Tensor | None,
        device: str,
        journal: Journal,
        store: StatisticsStore | None,
        measured: Measured,
    ) -> None:
        """`windows`: token numbers ``[samples, length]``.  Raises RecipeError where there are none."""
        if windows is None or windows.shape[1] < 2:
            raise RecipeError(
                "this allocator measures the model on calibration text; name some, in windows of 2 or more"
            )
        places = torch.linspace(0, len(windows) - 1, min(WINDOWS, len(windows))).round().long()
        self._windows = windows[places]
        self._source = source
        self._anatomy = anatomy
        self._device = device
        self._journal = journal
        self._store = store
        self._measured = measured
        self._identities: dict[str, str] = {}

    def similarity(self, blocks: Blocks) -> list[float]:
        """Of every block the mean cosine, over tokens, of what it is given and what it returns."""
        told = repr(("similarity", WINDOWS))
        found: list[float] = self._remembered("similarity.json", told, lambda: self._similarities(blocks))
        return found

    def spikes(self, blocks: Blocks) -> dict[str, float]:
        """Site → its largest number over the usual one, of what it reads or of its weight, whichever is larger."""
        told = repr(("spikes", WINDOWS))
        found: dict[str, float] = self._remembered("spikes.json", told, lambda: self._spikes(blocks))
        return found

    def harm(
        self, number: int, target: Target, stats: Mapping[str, Stats], options: Sequence[Option]
    ) -> dict[int, float]:
        """Bytes of an option → nats that the model loses by it.

        `number` tells targets apart in the journal, `stats` are those of the dense model.  Raises NumericalError where
        a target cannot be compressed or the model is no longer finite then.
        """
        told = (
            self._measured,
            WINDOWS,
            TEMPERATURE,
            SKIPPED,
            identity(target),
            [(o.amount, o.nbytes) for o in options],
        )

        def measure() -> list[tuple[int, float]]:
            return [(option.nbytes, self._lost(target, stats, option.amount)) for option in options]

        return dict(self._remembered(f"harm/{number:05}.json", repr(told), measure))

    @property
    def windows(self) -> int:
        """How many are read for a measurement."""
        return len(self._windows)

    @property
    def dense_perplexity(self) -> float:
        """Of those windows, measured now and remembered nowhere."""
        return math.exp(self._dense_loss)

    def loss(
        self, done: Sequence[tuple[Target, Amount]], said: str, make: Callable[[], Mapping[str, nn.Module]]
    ) -> float | None:
        """The mean cross entropy of the next token with all of this done to the model, nats; None if it is not finite.

        `make` is asked for the modules where the value is not remembered; `said`: what else they depend on.
        """
        told = repr(("plan", WINDOWS, said, [(self._identity(target), amount) for target, amount in done]))

        def measure() -> float | None:
            with self._replaced(make()):
                loss = self._loss()
            return loss if math.isfinite(loss) else None

        unit = f"plans/{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"
        found: float | None = self._remembered(unit, told, measure)
        return found

    def _identity(self, target: Target) -> str:
        if target.name not in self._identities:
            self._identities[target.name] = identity(target)
        return self._identities[target.name]

    def made(self, target: Target, stats: Mapping[str, Stats], amount: Amount) -> dict[str, Kind]:
        """What a target becomes on statistics of the dense model: modules by their full names."""
        modules = {site.name: self._model.get_submodule(site.name) for site in target.sites}
        weights = {s.name: _turned(modules[s.name].weight, s.transposed) for s in target.sites}
        biases = {s.name: modules[s.name].bias for s in target.sites if s.bias}
        with torch.no_grad():
            return target.compress(weights, biases, stats, amount)

    def _remembered(self, unit: str, told: str, measure: Callable[[], Any]) -> Any:
        return remembered(self._journal, self._store, unit, f"measured.{digest_of(told)}.json", measure)

    def _similarities(self, blocks: Blocks) -> list[float]:
        replay = Replay(self._source, self._anatomy, self._windows, self._device)
        means = []
        for index in range(len(self._anatomy.blocks)):
            through = replay.advance(blocks.dense(index))
            cosines = [cosine_similarity(read.double(), given.double(), dim=-1).flatten() for read, given in through]
            means.append(torch.cat(cosines).mean().item())
        return means

    def _spikes(self, blocks: Blocks) -> dict[str, float]:
        replay = Replay(self._source, self._anatomy, self._windows, self._device)
        found = {}
        for index, name in enumerate(self._anatomy.blocks):
            block, sites = blocks.dense(index), [site for site in self._anatomy.sites if site.block == index]
            watched = watch_list(self._anatomy, index, sites, [Peaks], self._device)
            replay.observe(block, watched, advance=True)
            for site in sites:
                weight = _turned(dense_weight(block.get_submodule(site.name.removeprefix(f"{name}."))), site.transposed)
                of_input = spike(*watched[site.reads][1][Peaks].mean().tolist())
                found[site.name] = max(of_input, weight_spike(weight))
        return found

    @cached_property
    def _model(self) -> Any:
        """The dense model, whole."""
        model: Any = load_with_report(self._source.folder, model_class(self._source.config))[0]
        if not model.can_generate():
            raise RecipeError(
                f"{type(model).__name__} has no head that predicts tokens, and this allocator measures predictions; "
                "choose another one"
            )
        return model.to(self._source.dtype).to(self._device).eval()

    @cached_property
    def _dense_loss(self) -> float:
        return self._loss()

    @cached_property
    def _dense_bodies(self) -> list[Any]:
        """What the body of the dense model returns for each batch."""
        return [self._predictions.body(rows) for rows in self._batches]

    @cached_property
    def _predictions(self) -> Predictions:
        return Predictions(self._model)

    @cached_property
    def _batches(self) -> tuple[Tensor, ...]:
        return self._predictions.batches(self._windows)

    @torch.no_grad()
    def _lost(self, target: Target, stats: Mapping[str, Stats], amount: Amount) -> float:
        # of the dense model, hence before anything is replaced
        dense = self._dense_loss if self._measured == "loss" else self._dense_bodies
        with self._replaced(self.made(target, stats, amount)):
            lost = self._loss() - dense if isinstance(dense, float) else self._divergence(dense)
        if not math.isfinite(lost):
            raise NumericalError(f"the model is not finite with {target.name} at {amount}")
        return lost

    def _loss(self) -> float:
        """The mean cross entropy of the next token, of the model as it is now."""
        return self._predictions.loss(self._batches)

    def _divergence(self, dense: Sequence[Any]) -> float:
        """From the dense model to the model as it is now, mean over positions."""
        present = (self._predictions.body(rows) for rows in self._batches)
        return divergence(
            self._batches,
            (self._predictions, dense),
            (self._predictions, present),
            temperature=TEMPERATURE,
            skipped=SKIPPED,
        )

    @contextmanager
    def _replaced(self, made: Mapping[str, nn.Module]) -> Iterator[None]:
        """Other modules in some places, and afterwards the old ones."""
        before = {name: self._model.get_submodule(name) for name in made}
        try:
            for name, module in made.items():
                self._model.set_submodule(name, module.to(self._device).eval())
            link(self._model)
            yield
        finally:
            for name, module in before.items():
                self._model.set_submodule(name, module)


def remembered(
    journal: Journal, store: StatisticsStore | None, unit: str, name: str, measure: Callable[[], Any]
) -> Any:
    """Plain values: from the journal's `unit`, else from the file of that name beside shared statistics, else measured
    (and kept in both).  The name has to say what the values depend on, statistics aside."""
    if not journal.has(unit):
        if store is None or not store.shared:
            journal.write_json(unit, measure())
        else:
            place = store.folder / name
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                commit_text(place, json.dumps(measure()))
            with reading(place, shared=True):
                known = json.loads(place.read_text(encoding="utf-8"))
            journal.write_json(unit, known)
    return journal.read_json(unit)


def digest_of(told: str) -> str:
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def identity(target: Any) -> str:
    """What a target is, tensors by their content: equal for targets that become the same."""
    if isinstance(target, Tensor):
        content = target.detach().cpu().contiguous()
        return hashlib.sha256(content.view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(target, Mapping):
        return repr([(key, identity(value)) for key, value in target.items()])
    if is_dataclass(target) and not isinstance(target, type):
        return repr((type(target).__name__, [(f.name, identity(getattr(target, f.name))) for f in fields(target)]))
    return repr(target)


def _turned(weight: Tensor, transposed: bool) -> Tensor:
    return weight.detach().T.contiguous() if transposed else weight.detach()

"""Several deltas over one base in memory, told apart by the rows of a batch.

Modules that a delta touches are wrapped: a linear with an update computes the base's product for the whole batch and
the update for its rows; a module with tensors of its own (a norm, an embedding) has one version for each delta.  Which
row belongs to which delta is asked by `choose`, and is known to the modules of that one model alone.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tersely.anatomy import model_class
from tersely.checkpoint import Source, read_config, read_headers
from tersely.deltas.folder import base_record, check_digest, digest, open_any, outermost
from tersely.errors import CheckpointError, RecipeError, unknown
from tersely.hf import read_manifest
from tersely.journal import read_tensors
from tersely.kinds import LinearKind, Spec, build, replace_modules
from tersely.kinds.sum import SumLinear
from tersely.opening import load_with_report

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Settings that may differ between models whose forward passes are the same function of weights and tokens.
ASIDE = (
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "max_position_embeddings",
    "max_window_layers", "pad_token_id", "quantization_config", "transformers_version", "use_cache",
)  # fmt: skip


class Choice:
    """Which delta answers which row, shared by the switched modules of one model."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.asked: tuple[str | None, ...] | None = None
        self.rows = 0
        """Rows of the running batch."""
        self.of: dict[str | None, Tensor] = {}
        """Delta → its rows in the running batch, for those that have any; None is the base."""

    def settle(self, rows: int, device: torch.device) -> None:
        """Lay the asked deltas over a batch of so many rows."""
        if self.asked is None:
            raise RecipeError(
                "no delta was chosen; call the model inside `with choose(model, [...])`, with a name for each row, or "
                "None for the base"
            )
        times, left = divmod(rows, len(self.asked))
        if left or not times:
            raise RecipeError(
                f"{len(self.asked)} deltas were chosen for a batch of {rows} rows; wanted one for each row, or for "
                "each group of equally many rows"
            )
        self.rows = rows
        self.of = {
            name: torch.tensor([r for r in range(rows) if self.asked[r // times] == name], device=device)
            for name in dict.fromkeys(self.asked)
        }


class Switched(nn.Module):
    """A module of the base with what the deltas make of it: updates that are added, versions that take its place."""

    def __init__(self, base: nn.Module, choice: Choice) -> None:
        super().__init__()
        self.base = base
        self.updates = nn.ModuleDict()
        self.biases = nn.ParameterDict()
        """Of an updated linear, what the delta adds to the base's bias."""
        self.versions = nn.ModuleDict()
        self._choice = choice

    @property
    def weight(self) -> Tensor:
        """The base's: models ask for its dtype and device."""
        return self.base.weight  # type: ignore[return-value]

    def version(self, name: str) -> nn.Module:
        """The module that stands in for the base's where this delta is chosen; at first it shares all tensors."""
        if name not in self.versions:
            twin = copy.copy(self.base)
            twin._parameters = dict(self.base._parameters)
            twin._buffers = dict(self.base._buffers)
            self.versions[name] = twin
        return self.versions[name]

    def forward(self, x: Tensor) -> Tensor:
        chosen = self._choice.of
        if isinstance(self.base, nn.Embedding) and x.shape[0] == 1:
            x = x.expand(self._choice.rows, *x.shape[1:])  # positions, the same for all rows
        if x.shape[0] != self._choice.rows:
            raise RecipeError(
                f"a {type(self.base).__name__} was called with {x.shape[0]} rows in a batch of {self._choice.rows}; "
                "a model that mixes the rows of a batch cannot be switched by row"
            )
        if any(name in self.versions for name in chosen if name is not None):
            parts = {name: self._of(name)(_rows(x, rows)) for name, rows in chosen.items()}
            first = next(iter(parts.values()))
            y = first.new_empty(x.shape[0], *first.shape[1:])
            for name, rows in chosen.items():
                y = y.index_copy(0, rows, parts[name])
        else:
            y = self.base(x)
        for name, rows in chosen.items():
            if name is None or name not in self.updates:
                continue
            change = self.updates[name](_rows(x, rows))
            if name in self.biases:
                change = change + self.biases[name]
            y = y + change if len(rows) == x.shape[0] else y.index_add(0, rows, change)
        return y

    def _of(self, name: str | None) -> nn.Module:
        return self.versions[name] if name is not None and name in self.versions else self.base


def load_deltas(base: Path, folders: Mapping[str, Path], *, device: str = "cpu") -> "PreTrainedModel":
    """The base model, once in memory, with the deltas of these folders to choose from row by row (see `choose`).

    Raises CheckpointError for a delta of another base, or whose settings make it another function than the base's.
    """
    if base_record(read_config(base)) is not None:
        raise CheckpointError(f"{base} is itself a delta; wanted the base that the deltas were taken against")
    source = open_any(base)
    found = digest(source)
    opened = {name: _Opened.read(name, Path(folder), source, found) for name, folder in folders.items()}
    model, _ = load_with_report(base, model_class(source.config))
    choice = Choice(tuple(folders))
    for name, delta in opened.items():
        delta.attach(name, model, choice)
    model.to(torch.device(device))  # type: ignore[arg-type]
    model.register_forward_pre_hook(partial(_settle, choice), with_kwargs=True)
    model._tersely_choice = choice  # type: ignore[assignment]
    return model.eval()


@contextmanager
def choose(model: "PreTrainedModel", names: Sequence[str | None]) -> Iterator[None]:
    """Let these deltas answer, one name a row and None for the base, as long as the context lasts.

    A batch may have an integer multiple of rows: each name then holds for as many neighbours, as in beam search, and a
    single name for the whole batch.
    """
    choice = getattr(model, "_tersely_choice", None)
    if not isinstance(choice, Choice):
        raise RecipeError("this model has no deltas to choose from; open it with load_deltas")
    for name in names:
        if name is not None and name not in choice.names:
            raise RecipeError(unknown("delta", name, choice.names))
    if not names:
        raise RecipeError("an empty choice; wanted one name a row, None for the base")
    before, choice.asked = choice.asked, tuple(names)
    try:
        yield
    finally:
        choice.asked = before


@dataclass(frozen=True)
class _Opened:
    """A delta folder, read and checked against the base that will carry it."""

    updates: dict[str, LinearKind]
    others: dict[str, Tensor]
    """Tensors that replace the base's, by their names in the base's model."""

    @classmethod
    def read(cls, name: str, folder: Path, base: Source, found: str) -> "_Opened":
        if "." in name or not name:
            raise RecipeError(f"{name!r} cannot name a delta; wanted a word without dots")
        config = read_config(folder)
        record = base_record(config)
        if record is None:
            raise CheckpointError(f"{folder} is no delta folder: its config.json names no base")
        check_digest(folder, record, base, found)
        _check_settings(folder, config, base)
        manifest = read_manifest(config.quantization_config)
        files = {stored.file for stored in read_headers(folder).values()}
        tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
        updates, others = {}, dict(tensors)
        for path in outermost(manifest):
            updates[path] = _update_of(path, manifest, tensors).to(base.dtype)
            others = {name: tensor for name, tensor in others.items() if not name.startswith(f"{path}.")}
            if f"{path}.terms.0.bias" in tensors:
                others[f"{path}.bias"] = tensors[f"{path}.terms.0.bias"]
        return cls(updates, {name: tensor.to(base.dtype, copy=True) for name, tensor in others.items()})

    def attach(self, name: str, model: "PreTrainedModel", choice: Choice) -> None:
        """Make room for this delta in the model's modules."""
        tied = {twin: own for twin, own in model.all_tied_weights_keys.items() if own in self.others}
        others = self.others | {twin: self.others[own] for twin, own in tied.items()}
        for path, update in self.updates.items():
            _switched(model, path, choice).updates[name] = update
        for full, tensor in others.items():
            path, _, leaf = full.rpartition(".")
            module = _switched(model, path, choice)
            if path in self.updates:
                change = tensor - module.base.get_parameter(leaf).detach()
                module.biases[name] = nn.Parameter(change, requires_grad=False)
            elif any(True for _ in module.base.children()):
                raise CheckpointError(
                    f"delta {name!r} changes {full}, which sits in a {type(module.base).__name__} with parts of its "
                    "own; such a delta can be opened alone, not switched by row"
                )
            else:
                setattr(module.version(name), leaf, nn.Parameter(tensor, requires_grad=False))


def _switched(model: "PreTrainedModel", path: str, choice: Choice) -> Switched:
    module = model.get_submodule(path)
    if not isinstance(module, Switched):
        module = Switched(module, choice)
        model.set_submodule(path, module)
    return module


def _settle(choice: Choice, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Before each forward pass: lay the choice over the rows that came."""
    batch = (*arguments[:1], named.get("input_ids"), named.get("inputs_embeds"))
    first = next((value for value in batch if isinstance(value, Tensor)), None)
    if first is None:
        raise RecipeError("a model with deltas was called without input_ids or inputs_embeds; their rows are switched")
    choice.settle(first.shape[0], first.device)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    return x if len(rows) == x.shape[0] else x[rows]


def _update_of(path: str, manifest: Mapping[str, Spec], tensors: Mapping[str, Tensor]) -> LinearKind:
    """What a delta folder adds to one linear: its terms but the first, as one module with its numbers."""
    with torch.device("meta"):
        whole = build(manifest[path])
        inside = {name: spec for name, spec in manifest.items() if name.startswith(f"{path}.terms.")}
        replace_modules(whole, {name.removeprefix(f"{path}."): spec for name, spec in inside.items()})
    terms = list(whole.get_submodule("terms").children())[1:]
    for index, term in enumerate(terms, start=1):
        prefix = f"{path}.terms.{index}."
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        try:
            term.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"{path}: the stored update does not fit its description ({error})") from error
    return SumLinear.of(terms).requires_grad_(False)


def _check_settings(folder: Path, config: "PreTrainedConfig", base: Source) -> None:
    """Served together, all are computed by one forward pass: that of the base's settings."""
    ours, theirs = config.to_dict(), base.config.to_dict()
    differing = [
        f"{name} ({ours.get(name)} and {theirs.get(name)})"
        for name in sorted({*ours, *theirs} - {*ASIDE})
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"{folder} cannot be served over {base.folder}: their settings differ in {'; '.join(differing)}; "
            "open it alone"
        )

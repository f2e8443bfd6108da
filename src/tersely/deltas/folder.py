"""Folders of differences: what they hold, how they are written, how they are opened together with their base.

A linear X that has an update is a sum in the manifest; its first term ``X.terms.0`` is whatever the base has at X, and
is not stored.  Of all other tensors those are stored that are not bit-equal to the base's.  The guard ``X.weight`` of
the sums makes a reader that knows nothing of tersely refuse the folder.
"""

import copy
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tersely.anatomy import model_class
from tersely.checkpoint import (
    WEIGHTS,
    ForeignNamesError,
    Source,
    Stored,
    carry,
    locate,
    open_source,
    read_config,
    read_headers,
    write_shards,
)
from tersely.errors import CheckpointError
from tersely.hf import manifest_config, read_manifest
from tersely.journal import commit
from tersely.kinds import KINDS, LinearKind, Made, Spec
from tersely.kinds.sum import SumLinear
from tersely.opening import load_with_report

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SHARD_BYTES = 5 * 10**9


def check_pair(tuned: Source, base: Source) -> None:
    """Raise CheckpointError, naming what differs, unless the two have the same architecture, names and shapes.

    Settings may differ (a delta folder carries those of the tuned model); deltas that are served together are held to
    more, see `load_deltas`.  The base may be compressed, the tuned model may not.
    """
    if tuned.manifest:
        raise CheckpointError(f"{tuned.folder} is compressed; a delta needs the fine-tuned model as it was trained")
    classes = [model_class(source.config).__name__ for source in (tuned, base)]
    if classes[0] != classes[1]:
        raise CheckpointError(
            f"{tuned.folder} is a {classes[0]}, {base.folder} a {classes[1]}; wanted one architecture"
        )
    if tuned.dtype != base.dtype:
        raise CheckpointError(f"{tuned.folder} is {tuned.dtype}, {base.folder} {base.dtype}; open both with one dtype")
    compressed = outermost(base.manifest)
    ours, theirs = _shapes(tuned, compressed), _shapes(base, compressed)
    differing = [
        f"{name} ({ours.get(name, 'absent')} and {theirs.get(name, 'absent')})"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        shown = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise CheckpointError(f"{tuned.folder} was not made from {base.folder}: their shapes differ in {shown}")


def digest(base: Source) -> str:
    """sha256 of all tensors with their names, as they are stored: the same for every copy of a base, whatever dtype it
    was opened with and whatever its settings are called."""
    found = hashlib.sha256()
    for name in sorted(base.stored):
        tensor = _as_stored(base, name).contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _as_stored(source: Source, name: str) -> Tensor:
    if isinstance(source, LoadedSource):
        return source.as_stored(name)
    if isinstance(source, DeltaSource):
        return source.tensor(name)
    with safe_open(source.stored[name].file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(source.stored[name].name)
    return tensor


def write_delta(
    folder: Path,
    tuned: Source,
    base: Source,
    updates: Mapping[str, Made],
    *,
    base_name: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Spec]:
    """Write the folder of a delta; returns its manifest.

    updates: path of a linear → what approximates W_tuned - W_base, a linear kind without bias.  Linears that are not
    named here keep the tuned weight, stored whole where it is not the base's.  `base_name` is what the folder records:
    a hub name, or a path, absolute or relative to the folder; by default the base's absolute path.
    """
    check_pair(tuned, base)
    if not updates:
        raise CheckpointError(f"no linear of {tuned.folder} has an update; a delta folder needs at least one")
    dense = tuned.skeleton()
    for path, made in updates.items():
        _check_update(path, made, dense)
    manifest, parts = _merged(base, updates, {path for path in updates if f"{path}.bias" in tuned.stored})
    loans = _loans(base, manifest)
    like, kept = dict(parts), {}
    for name in tuned.stored:
        owner = name.rpartition(".")[0]
        if owner in updates and name.endswith(".weight"):
            continue  # the base's and the update take its place
        placed = f"{owner}.terms.0.bias" if owner in updates else name
        loan = loans.get(placed)
        if loan is None or not torch.equal(tuned.tensor(name), base.tensor(loan.name)):
            like[placed] = tuned.tensor(name).to("meta")
            kept[placed] = name
    write_shards(folder, like, lambda name: parts[name] if name in parts else tuned.tensor(kept[name]), shard_bytes)
    carry(tuned.carried_from, folder)
    config = copy.deepcopy(tuned.config)
    config.dtype = str(tuned.dtype).removeprefix("torch.")
    config.architectures = [model_class(tuned.config).__name__]
    record = {"model": base_name or str(base.folder.resolve()), "sha256": digest(base)}
    config.quantization_config = manifest_config(manifest) | {"base": record}
    commit(folder / "config.json", lambda temporary: config.to_json_file(temporary, use_diff=True))
    return manifest


def base_record(config: "PreTrainedConfig") -> dict[str, str] | None:
    """{"model": path or hub name, "sha256": its `digest`} of a delta folder's configuration; None of any other."""
    plain = getattr(config, "quantization_config", None)
    if plain is None:
        return None
    return (plain if isinstance(plain, dict) else plain.to_dict()).get("base")


def open_base(folder: Path, record: Mapping[str, str]) -> Source:
    """The base that a delta folder records, its weights checked.  Raises CheckpointError if it is not there, or another
    one."""
    wanted = record["model"]
    beside = folder / Path(wanted).expanduser()  # an absolute path stays what it is
    how = f"set quantization_config.base.model in {folder / 'config.json'} to the folder or hub name of the base"
    try:
        base = open_any(beside if beside.is_dir() else locate(wanted))
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is a delta over {wanted}, which cannot be opened ({error}); {how}") from error
    check_digest(folder, record, base, digest(base))
    return base


def open_delta(folder: Path) -> Source:
    """The model that a delta folder and its base are together; each tensor is read from where it lies."""
    config = read_config(folder)
    record = base_record(config)
    if record is None:
        raise CheckpointError(f"{folder} is no delta folder: its config.json names no base")
    base = open_base(folder, record)
    manifest = read_manifest(config.quantization_config)
    return DeltaSource(folder, config, base, _loans(base, manifest))


def open_any(folder: Path, *, dtype: str | None = None, trust_remote_code: bool = False) -> Source:
    """A model folder under the names of its modules: an ordinary one, a delta, or one stored under other names."""
    if base_record(read_config(folder, trust_remote_code=trust_remote_code)) is not None:
        return open_delta(folder)
    try:
        return open_source(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    except ForeignNamesError:
        return LoadedSource(folder, dtype=dtype, trust_remote_code=trust_remote_code)


class LoadedSource(Source):
    """A model that transformers has to load before its tensors have the names of the modules; all in memory."""

    def __init__(self, folder: Path, *, dtype: str | None = None, trust_remote_code: bool = False) -> None:
        config = read_config(folder, trust_remote_code=trust_remote_code)
        with torch.device("cpu"):  # whatever else is being built at the moment, on the meta device
            model, _ = load_with_report(folder, model_class(config), config=config)
        self._state = {
            name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys
        }
        stored = {n: Stored(folder / WEIGHTS, n, tuple(t.shape), t.dtype) for n, t in self._state.items()}
        super().__init__(folder, config, stored, model.dtype if dtype is None else getattr(torch, dtype))

    def unchecked(self, name: str) -> Tensor:
        tensor = self._state[name]
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def as_stored(self, name: str) -> Tensor:
        """In the dtype of the checkpoint."""
        return self._state[name]


class DeltaSource(Source):
    """A source that lies in two folders."""

    def __init__(self, folder: Path, config: "PreTrainedConfig", base: Source, loans: Mapping[str, "Loan"]) -> None:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else base.dtype
        super().__init__(folder, config, {}, dtype)
        self._base = base
        self._loans: dict[str, Loan] = {}
        skeleton, headers = self.skeleton(), read_headers(folder)
        tied = getattr(skeleton, "all_tied_weights_keys", {})
        for name, tensor in skeleton.state_dict().items():
            if name in tied:
                continue
            if name in headers:
                self.stored[name] = headers[name]
            elif name in loans:
                self._loans[name] = loan = loans[name]
                held = base.stored[loan.name]
                self.stored[name] = replace(held, shape=held.shape[::-1]) if loan.transposed else held
            else:
                raise CheckpointError(f"{folder}: {name} is neither in the delta nor in its base {base.folder}")
            if self.stored[name].shape != tuple(tensor.shape):
                shape = self.stored[name].shape
                raise CheckpointError(f"{folder}: {name} has shape {shape}, the manifest wants {tuple(tensor.shape)}")

    def unchecked(self, name: str) -> Tensor:
        if name not in self._loans:
            return super().unchecked(name)
        tensor = self._loans[name].read(self._base)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


class Borrowed:
    """The tensors that a delta's model takes from its base while transformers loads the folder.

    Made before the weights are loaded (after the modules of the manifest took their places), filled in afterwards.  In
    between transformers believes that these names may be absent.
    """

    def __init__(self, model: "PreTrainedModel", files: Sequence[str] | None, config: Mapping[str, Any]) -> None:
        if not files:
            raise CheckpointError("a delta was opened with a state dict of its own; open its folder")
        self._folder = folder = Path(files[0]).parent
        self._base = open_base(folder, config["base"])
        manifest = read_manifest(dict(config))
        loans = _loans(self._base, manifest)
        held = read_headers(folder)
        prefix = f"{model.base_model_prefix}."
        self._taken: dict[str, Loan] = {}
        for name in model.state_dict():
            spellings = (name, name.removeprefix(prefix), prefix + name)
            loan = next((loans[s] for s in spellings if s in loans), None)
            if loan is not None and not any(s in held for s in spellings):
                self._taken[name] = loan
        self._ties = dict(model.all_tied_weights_keys)
        self._optional = model._keys_to_ignore_on_load_missing
        # Of a tied pair that the delta does not hold, transformers would say that the checkpoint looks corrupted.
        absent = {t: s for t, s in self._ties.items() if s in self._taken}
        model.all_tied_weights_keys = {t: s for t, s in self._ties.items() if t not in absent}
        names = {re.escape(name) for name in (*self._taken, *absent)}
        model._keys_to_ignore_on_load_missing = {*(self._optional or ()), *(f"^{name}$" for name in names)}
        for name in self._taken:
            owner = model.get_submodule(name.rpartition(".")[0])
            if not owner._non_persistent_buffers_set:  # those are computed where random numbers would be drawn
                owner._is_hf_initialized = True  # type: ignore[assignment]  # saves drawing what is then overwritten

    @torch.no_grad()
    def fill(self, model: "PreTrainedModel") -> None:
        """Give the model the base's numbers, after it was loaded."""
        model.all_tied_weights_keys = self._ties
        model._keys_to_ignore_on_load_missing = self._optional
        for name, loan in self._taken.items():
            place = model.get_parameter_or_buffer(name)
            if place.device.type == "meta":
                raise CheckpointError(
                    f"{self._folder}: {name} was put on disk by the device map; a delta needs its base in memory"
                )
            place.copy_(loan.read(self._base))
        model.tie_weights()


@dataclass(frozen=True)
class Loan:
    """A tensor of the base that a delta's model holds under a name of its own."""

    name: str
    """In the base."""
    transposed: bool

    def read(self, base: Source) -> Tensor:
        tensor = base.tensor(self.name)
        return tensor.T.contiguous() if self.transposed else tensor


def _loans(base: Source, manifest: Mapping[str, Spec]) -> dict[str, Loan]:
    """Name in the delta's model → what the base has for it.  A linear with updates holds the base's as term 0."""
    updated = set(outermost(manifest))
    skeleton = base.skeleton()
    loans = {}
    for name in base.stored:
        owner = next((path for path in _ancestors(name) if path in updated), None)
        if owner is None:
            loans[name] = Loan(name, False)
        else:
            plain = isinstance(skeleton.get_submodule(owner), nn.Linear | LinearKind)
            moved = f"{owner}.terms.0{name.removeprefix(owner)}"
            loans[moved] = Loan(name, not plain and name == f"{owner}.weight")
    return loans


def _merged(base: Source, updates: Mapping[str, Made], biases: set[str]) -> tuple[dict[str, Spec], dict[str, Tensor]]:
    """The manifest of a delta folder, and the numbers that its updates and guards store."""
    manifest: dict[str, Spec] = {}
    parts: dict[str, Tensor] = {}
    for path, made in updates.items():
        outer = made.specs[""]
        flat = outer["kind"] == SumLinear.name  # the terms of an update that is a sum itself become terms of ours
        manifest[path] = {
            "kind": SumLinear.name,
            "in_features": outer["in_features"],
            "out_features": outer["out_features"],
            "terms": 1 + (outer["terms"] if flat else 1),
            "bias": path in biases,
        }
        for name, spec in base.manifest.items():
            if name == path or name.startswith(f"{path}."):
                manifest[f"{path}.terms.0{name.removeprefix(path)}"] = spec
        parts[f"{path}.weight"] = torch.empty(0, dtype=base.dtype)
        for name, spec in made.specs.items():
            if not (flat and name == ""):
                manifest[_placed(path, name, flat)] = spec
        for name, tensor in made.state.items():
            if not (flat and name == "weight"):
                parts[_placed(path, name, flat)] = tensor
    return manifest, parts


def _placed(path: str, name: str, flat: bool) -> str:
    """Where a name inside an update lies in the sum around it: behind term 0, which is the base's."""
    if not flat:
        return f"{path}.terms.1.{name}".removesuffix(".")
    _, index, rest = f"{name}.".split(".", 2)
    return f"{path}.terms.{int(index) + 1}.{rest}".rstrip(".")


def outermost(manifest: Mapping[str, Spec]) -> list[str]:
    """The entries that do not lie inside another one."""
    return [name for name in manifest if not any(path in manifest for path in _ancestors(name))]


def _ancestors(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _check_update(path: str, made: Made, dense: nn.Module) -> None:
    """An update has the shape of its linear, and no bias: that of the tuned model is stored beside it."""
    try:
        linear = dense.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(f"an update for {path}, which the model does not have") from error
    spec = made.specs.get("", {})
    if not issubclass(KINDS.get(spec.get("kind", ""), nn.Module), LinearKind):
        raise CheckpointError(f"{path}: an update of kind {spec.get('kind')!r}; wanted a linear kind")
    weight = linear.get_parameter("weight")
    wanted = tuple(weight.shape) if isinstance(linear, nn.Linear) else tuple(weight.shape)[::-1]
    if (spec["out_features"], spec["in_features"]) != wanted:
        raise CheckpointError(f"{path}: an update of {spec['out_features']} x {spec['in_features']}; wanted {wanted}")
    if spec["bias"]:
        raise CheckpointError(f"{path}: an update with a bias; the tuned model's own bias is what is stored")


def check_digest(folder: Path, record: Mapping[str, str], base: Source, found: str) -> None:
    if record["sha256"] != found:
        raise CheckpointError(
            f"{folder} is a delta over other weights than those of {base.folder}: sha256 {record['sha256'][:12]}… "
            f"was recorded, {found[:12]}… found; give the base it was made from"
        )


def _shapes(source: Source, compressed: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Name → shape; of linears that the base holds compressed, the sides of the weight by size."""
    shapes = {}
    for name, stored in source.stored.items():
        owner = next((path for path in _ancestors(name) if path in compressed), None)
        if owner is None:
            shapes[name] = stored.shape
        elif owner in source.manifest:
            spec = source.manifest[owner]
            if "in_features" not in spec:
                raise CheckpointError(f"{source.folder}: {owner} is of kind {spec['kind']}; wanted a base of linears")
            shapes[owner] = tuple(sorted((spec["out_features"], spec["in_features"])))
        elif name == f"{owner}.weight":
            shapes[owner] = tuple(sorted(stored.shape))
    return shapes

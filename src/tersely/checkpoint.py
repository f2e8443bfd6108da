"""Model folders: read block by block, written shard by shard.

A `Source` is a checked folder whose tensors are mapped into memory one by one; its skeleton has the right modules, our
kinds included, on the meta device.  A checkpoint whose tensors bear other names than the modules they load into (old
hub names, pickled files, experts stored one by one) is first rewritten once under the modules' names, so that
everything after this line reads one way.
"""

import copy
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import ModelCard, snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from transformers.initialization import no_init_weights

from tersely.anatomy import model_class
from tersely.errors import CheckpointError, RecipeError
from tersely.hf import METHOD, manifest_config, read_manifest
from tersely.journal import commit, commit_tensors, commit_text
from tersely.kinds import Made, Spec, replace_modules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
# What belongs to one folder only and is not carried from a model to its compressed form.
NOT_CARRIED = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.msgpack", "*.h5", "*.onnx", "*.ot", "*.index.json",
    "config.json", "README.md", "checksums.json", "recipe.toml", "plan.json", "report.json", "report.html", ".*",
)  # fmt: skip
# Buffers that old checkpoints hold and models compute.
COMPUTED = (r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$", r"position_ids$")
LICENCE_FIELDS = ("license", "license_name", "license_link")
"""Of a card's front matter; the latter two say more of the licence ``other``."""
LARGEST_CARRIED = 100 * 10**6
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")

State = dict[str, Tensor]


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: where it lies and what its header says."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Source:
    """A model folder, opened for reading."""

    def __init__(
        self,
        folder: Path,
        config: "PreTrainedConfig",
        stored: dict[str, Stored],
        dtype: torch.dtype,
        ignored: tuple[str, ...] = (),
    ) -> None:
        self.folder = folder
        self.config = config
        self.stored = stored
        """Name in the model's state dict → where the tensor lies."""
        self.dtype = dtype
        """Of the model that is read: the asked one, or the checkpoint's own."""
        self.carried_from = folder
        """Where tokenizer, licence and the like are: another folder if the weights had to be rewritten."""
        self.ignored = ignored
        """Tensors of the checkpoint for which the model has no place."""

    @property
    def is_outline(self) -> bool:
        """Whether only names and shapes are known; see `outline`."""
        return any(stored.file == self.folder for stored in self.stored.values())

    @property
    def manifest(self) -> dict[str, Spec]:
        plain = getattr(self.config, "quantization_config", None)
        return {} if plain is None else read_manifest(plain)

    def skeleton(self) -> "PreTrainedModel":
        """The model with parameters on the meta device; buffers that are computed, not stored, are real."""
        return skeleton_of(self.config, self.manifest)

    def stock_skeleton(self) -> "PreTrainedModel":
        """The model as its library makes it, without any module of ours."""
        return skeleton_of(self.config, {})

    @cached_property
    def ties(self) -> dict[str, str]:
        """Name of a parameter that is another one under a second name → its name in `stored`."""
        tied = dict(getattr(self.skeleton(), "all_tied_weights_keys", {}))
        return {name: original for name, original in tied.items() if original in self.stored}

    def tensor(self, name: str) -> Tensor:
        """One tensor by its name in the model, floating ones in `dtype`.  Raises CheckpointError where it is not
        finite."""
        tensor = self.unchecked(name)
        check_finite(self.folder, {name: tensor})
        return tensor

    def unchecked(self, name: str) -> Tensor:
        tensor = _read(self.stored[name if name in self.stored else self.ties[name]])
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def state(self, prefix: str) -> State:
        """The tensors of a module, by their names inside it."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self.stored if name.startswith(prefix)}

    def elements(self, name: str) -> int:
        """Numbers in a tensor."""
        return int(torch.Size(self.stored[name].shape).numel())

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor as the model holds it."""
        return self.elements(name) * _cast(self.stored[name].dtype, self.dtype).itemsize

    def nbytes(self) -> int:
        """Bytes of all tensors as the model holds them."""
        return sum(self.stored_bytes(name) for name in self.stored)

    def licence(self) -> dict[str, str]:
        """What the model's own card says of its licence, in the hub's words: for ``other`` also its name and where it
        stands."""
        card = self.carried_from / "README.md"
        if not card.is_file():
            return {}
        try:
            said = ModelCard.load(card).data
        except ValueError:  # a card without readable front matter
            return {}
        return {key: value for key in LICENCE_FIELDS if isinstance(value := said.get(key), str)}

    def warnings(self) -> Iterator[str]:
        """What a user should know before compressing it."""
        if self.ignored:
            shown = ", ".join(self.ignored[:3]) + (", …" if len(self.ignored) > 3 else "")
            yield f"{len(self.ignored)} tensors of the checkpoint have no place in the model and are left out: {shown}"

    def check_weights(self) -> str:
        """Read everything once; the checksum of weights and configuration, the same for every copy of a model.

        Raises CheckpointError that names the tensors with NaN or infinite entries.
        """
        settings = self.config.to_dict()
        for local in ("_name_or_path", "transformers_version"):
            settings.pop(local, None)
        digest = hashlib.sha256(json.dumps([settings, str(self.dtype)], sort_keys=True, default=str).encode())
        bad: list[str] = []
        for name in sorted(self.stored):
            tensor = self.unchecked(name)
            if not is_finite(tensor):
                bad.append(name)
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        _refuse_not_finite(self.folder, bad)
        return digest.hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; without the copies that `torch.isfinite` takes."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(math.isfinite(end) for end in torch.stack(tensor.aminmax()).tolist())


def check_finite(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError that names the tensors with NaN or infinite entries."""
    _refuse_not_finite(folder, [name for name, tensor in tensors.items() if not is_finite(tensor)])


def _refuse_not_finite(folder: Path, bad: Sequence[str]) -> None:
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise CheckpointError(f"{folder}: NaN or infinite weights in {shown}; repair the checkpoint first")


def is_here(model: str) -> bool:
    """Whether a name can only be that of a place on this machine; the hub has none like it, or is not asked."""
    return Path(model).expanduser().exists() or model.startswith((".", "/", "~")) or model.count("/") > 1


def locate(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a model: a local one, or the hub's, downloaded, without its weights if they are not wanted.

    Raises CheckpointError if there is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise RecipeError(f"--revision {revision} was given with the local folder {model}; it applies to hub names")
        return folder
    if is_here(model):
        raise CheckpointError(
            f"{model}: no such folder; give a folder with config.json, or a hub name such as owner/name"
        )
    ignored = ["*.pt", "*.pth", "*.gguf", "*.msgpack", "*.h5", "*.onnx", "*.ot", "original/*", "onnx/*", "openvino/*"]
    if not weights:
        ignored += ["*.safetensors", "*.bin"]
    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=ignored))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{model}: neither a folder nor a model that the hub would give ({reason})") from error


def require_weights(folder: Path) -> None:
    """Raises CheckpointError for a folder without any file of weights."""
    if not any(path.match(pattern) for path in folder.iterdir() for pattern in WEIGHT_FILES):
        raise CheckpointError(f"{folder}: no weights (looked for {', '.join(WEIGHT_FILES)}); fetch or write them")


def read_config(folder: Path, *, trust_remote_code: bool = False) -> "PreTrainedConfig":
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; wanted a Hugging Face model folder")
    try:
        plain = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: not JSON ({error})") from error
    if not isinstance(plain, dict):
        raise CheckpointError(f"{folder / 'config.json'}: no table of settings; wanted a Hugging Face configuration")
    if "auto_map" in plain and not trust_remote_code:
        named = ", ".join(str(value) for value in dict(plain["auto_map"]).values())
        raise CheckpointError(
            f"{folder}: the checkpoint brings its own Python code ({named}), which is not run unless you allow it with "
            "--trust-remote-code"
        )
    quantized = plain.get("quantization_config") or {}
    if not isinstance(quantized, dict):
        raise CheckpointError(f"{folder / 'config.json'}: quantization_config = {quantized!r}; wanted a table, or none")
    foreign = quantized.get("quant_method", METHOD)
    if foreign != METHOD:
        raise CheckpointError(f"{folder} is already quantized by {foreign}; start from the model's original weights")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        reason = " ".join(str(error).strip().partition("\n\n")[0].split())
        raise CheckpointError(f"{folder / 'config.json'}: {reason}") from error


def open_source(folder: Path, *, dtype: str | None = None, trust_remote_code: bool = False) -> Source:
    """Open a folder after checking its headers: all files complete, every parameter present with the right shape.

    Raises CheckpointError for what is missing, truncated or misshapen, AnatomyError for a class that does not exist,
    and `ForeignNamesError` where the tensors' names are not those of the modules (see `rewrite_names`).
    """
    config = read_config(folder, trust_remote_code=trust_remote_code)
    headers = read_headers(folder)
    if not headers:
        raise ForeignNamesError(f"{folder} has no safetensors")
    manifest = read_manifest(config.quantization_config) if getattr(config, "quantization_config", None) else {}
    skeleton = skeleton_of(config, manifest)
    tied = dict(getattr(skeleton, "all_tied_weights_keys", {}))
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    prefix = f"{skeleton.base_model_prefix}."
    stored, missing = {}, []
    for name, shape in expected.items():
        candidates = (name, name.removeprefix(prefix), prefix + name)
        found = next((headers[c] for c in candidates if c in headers), None)
        if found is None:
            if name not in tied:
                missing.append(name)
        elif found.shape != shape:
            raise CheckpointError(
                f"{found.file}: {found.name} has shape {found.shape}, the configuration wants {shape}"
            )
        elif name not in tied:
            stored[name] = found
    if missing:
        raise ForeignNamesError(
            f"{folder}: {len(missing)} parameters are not stored under their names ({missing[0]}, …)"
        )
    for name, original in tied.items():
        twice = headers.get(name)
        if twice is not None and original in stored and not torch.equal(_read(twice), _read(stored[original])):
            raise CheckpointError(
                f"{folder}: {name} differs from {original}, to which the configuration ties it; set "
                "tie_word_embeddings to false in config.json, or remove the one that is not meant"
            )
    placed = {s.name for s in stored.values()} | {c for name in tied for c in (name, name.removeprefix(prefix))}
    known = [*(skeleton._keys_to_ignore_on_load_unexpected or ()), *COMPUTED]
    ignored = tuple(n for n in headers if n not in placed and not any(re.search(pattern, n) for pattern in known))
    return Source(folder, config, stored, _dtype_of(config, stored, dtype), ignored)


def outline(folder: Path, *, dtype: str | None = None, trust_remote_code: bool = False) -> Source:
    """A source that knows what its configuration says: names and shapes, but no file to read a number from."""
    config = read_config(folder, trust_remote_code=trust_remote_code)
    manifest = read_manifest(config.quantization_config) if getattr(config, "quantization_config", None) else {}
    skeleton = skeleton_of(config, manifest)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    held = _dtype_of(config, {}, dtype)
    return Source(folder, config, {n: Stored(folder, n, shapes[n], held) for n in untied(skeleton)}, held)


class ForeignNamesError(CheckpointError):
    """The weights are not stored under the names of the modules they load into."""


def read_headers(folder: Path) -> dict[str, Stored]:
    """Name → header of every tensor in the folder's safetensors.  Raises CheckpointError for damaged files."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():  # as transformers prefers it, whatever else lies beside it
        files = [WEIGHTS]
    elif index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: damaged ({error}); fetch or write it again") from error
        absent = [file for file in files if not (folder / file).is_file()]
        if absent:
            raise CheckpointError(f"{folder}: the index names {', '.join(absent)}, which is not there; fetch it again")
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors") if path.name != "adapter_model.safetensors")
    headers: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():
                    piece = opened.get_slice(name)
                    headers[name] = Stored(folder / file, name, tuple(piece.get_shape()), _DTYPES[piece.get_dtype()])
        except (SafetensorError, KeyError, OSError) as error:
            raise CheckpointError(
                f"{folder / file}: truncated or damaged ({error}); fetch or write it again"
            ) from error
    return headers


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise CheckpointError(f"{folder}: no tokenizer (looked for {', '.join(TOKENIZER_FILES)}); add the model's own")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a dozen kinds, by tokenizer class
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded ({reason})") from error


def fill(module: nn.Module, state: Mapping[str, Tensor], device: str) -> None:
    """Give a module on the meta device its numbers."""
    module.load_state_dict({name: tensor.to(device) for name, tensor in state.items()}, strict=True, assign=True)


def write_shards(folder: Path, like: Mapping[str, Tensor], tensor: Callable[[str], Tensor], shard_bytes: int) -> None:
    """Write named tensors as transformers would: one file, or shards and an index; only one shard is held at a time.

    `like` gives names in order with the shape and dtype of each (meta tensors will do), `tensor` the numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(
        dict(like), filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    for file, names in split.filename_to_tensors.items():
        if not (folder / file).exists():  # a renamed shard is complete: a resumed run keeps it
            commit_tensors(folder / file, {name: tensor(name) for name in names})
    if split.is_sharded:
        content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        commit_text(folder / INDEX, json.dumps(content, indent=2, sort_keys=True) + "\n")


@dataclass(frozen=True)
class Edit:
    """What a step changed in a model; everything else is as it was."""

    replaced: Mapping[str, Made] = field(default_factory=dict)
    """Path → the module that stands there now."""
    plain: Mapping[str, State] = field(default_factory=dict)
    """Path → the numbers of the stock module that stands there now, whatever stood there before."""
    changed: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of a tensor → its new numbers; one that the configuration only now asks for is new."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the configuration."""

    @cached_property
    def parts(self) -> dict[str, Tensor]:
        """Every tensor that is not the source's, by its name in the model."""
        states = {name: made.state for name, made in self.replaced.items()} | dict(self.plain)
        inside = {f"{name}.{part}": tensor for name, state in states.items() for part, tensor in state.items()}
        return inside | dict(self.changed)

    def manifest(self, before: Mapping[str, Spec]) -> dict[str, Spec]:
        ours = {
            f"{name}.{path}" if path else name: spec
            for name, made in self.replaced.items()
            for path, spec in made.specs.items()
        }
        return _outside(before, [*self.replaced, *self.plain]) | ours


def write_model(folder: Path, source: Source, edit: Edit, shard_bytes: int) -> dict[str, Spec]:
    """Write the source as edited; returns the manifest of the result.

    The config comes last: a folder with a config is a complete one.
    """
    manifest = edit.manifest(source.manifest)
    config = copy.deepcopy(source.config)
    for name, value in edit.settings.items():
        setattr(config, name, value)
    skeleton = skeleton_of(config, manifest)
    parts = edit.parts
    like = {name: parts[name] if name in parts else _like(source, name) for name in untied(skeleton)}
    write_shards(folder, like, lambda name: parts[name] if name in parts else source.tensor(name), shard_bytes)
    carry(source.carried_from, folder)
    write_config(folder, skeleton, source.dtype, manifest_config(manifest) if manifest else None)
    return manifest


def write_config(folder: Path, model: "PreTrainedModel", dtype: torch.dtype, quantized: dict[str, Any] | None) -> None:
    """The configuration of a model as it lies in `folder`; `quantized` says how to read what is not stock."""
    config = model.config
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if quantized:
        config.quantization_config = quantized
    commit(folder / "config.json", lambda temporary: config.to_json_file(temporary, use_diff=True))


def carry(source: Path, destination: Path) -> None:
    """Copy what a model is used with: tokenizer, generation settings, templates, licence."""
    for path in carried_files(source):
        commit(destination / path.name, partial(shutil.copyfile, path))


def carried_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        carried = path.is_file() and not any(fnmatch(path.name, pattern) for pattern in NOT_CARRIED)
        if carried and path.stat().st_size <= LARGEST_CARRIED:
            yield path


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def skeleton_of(config: "PreTrainedConfig", manifest: Mapping[str, Spec]) -> "PreTrainedModel":
    """The model of a configuration, with parameters on the meta device; buffers that are computed are real."""
    config = copy.deepcopy(config)
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = model_class(config)(config)
    model.tie_weights()
    # kinds are built on the meta device whole: their buffers are stored, not computed
    with torch.device("meta"):
        replace_modules(model, manifest)
    return model.eval()


def untied(model: "PreTrainedModel") -> list[str]:
    """Names of the state dict in order, each tied parameter once."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    return [name for name in model.state_dict() if name not in tied]


def _read(stored: Stored) -> Tensor:
    with safe_open(stored.file, framework="pt") as file:
        return file.get_tensor(stored.name)


def _like(source: Source, name: str) -> Tensor:
    stored = source.stored[name]
    return torch.empty(stored.shape, dtype=_cast(stored.dtype, source.dtype), device="meta")


def _cast(stored: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    return wanted if stored.is_floating_point else stored


def _outside(manifest: Mapping[str, Spec], replaced: Collection[str]) -> dict[str, Spec]:
    """The entries of a manifest that do not lie inside a replaced module."""
    return {n: s for n, s in manifest.items() if not any(n == r or n.startswith(f"{r}.") for r in replaced)}


def _dtype_of(config: "PreTrainedConfig", stored: Mapping[str, Stored], asked: str | None) -> torch.dtype:
    if asked is not None:
        return getattr(torch, asked)
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next((s.dtype for s in stored.values() if s.dtype.is_floating_point), torch.float32)

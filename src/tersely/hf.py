"""Teaches transformers to open our folders.

`config.json` carries ``quantization_config = {"quant_method": "tersely", "version": 1, "modules": {name: spec}}``.
While `from_pretrained` holds the model's skeleton on the meta device, each named module is replaced by its kind, and
the weights are then loaded by name: no modelling file, no remote code.  Afterwards the model is an ordinary one, which
may be moved, cast, trained and saved; only its config still carries the manifest.

`register_lazily` costs nothing: it registers at once if transformers has been loaded, else at the moment it is.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tersely.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "tersely"
VERSION = 1
_TABLES = "transformers.quantizers.auto"


def manifest_config(modules: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The value of ``quantization_config`` for a manifest."""
    return {"quant_method": METHOD, "version": VERSION, "modules": modules}


def read_manifest(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """name → spec from a ``quantization_config``.  Raises CheckpointError for one that is newer than this release."""
    version = config.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"the manifest has version {version!r}, this tersely reads up to {VERSION}; upgrade tersely"
        )
    return config["modules"]


def register_lazily() -> None:
    """Register with transformers now, or when it is imported."""
    if _TABLES in sys.modules:
        _register(sys.modules[_TABLES])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Sees the import of transformers' table of quantizers, lets it happen as usual, and registers right after."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, usual: importlib.abc.Loader) -> None:
        self._usual = usual

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._usual.exec_module(module)
        _register(module)


def _renamed(manifest: dict[str, dict[str, Any]], model: "PreTrainedModel") -> dict[str, dict[str, Any]]:
    """The manifest of a model with a head, for the bare model or one with another head, and the other way round.  What
    stands in a head that the model does not have is left out; a head that the model ties to a table of ours reads it.
    """
    prefix = f"{model.base_model_prefix}."
    if model.base_model is model:
        bare = {name.removeprefix(prefix): spec for name, spec in manifest.items()}
        return {name: spec for name, spec in bare.items() if hasattr(model, name.partition(".")[0])}
    here = {name: name if hasattr(model, name.partition(".")[0]) else prefix + name for name in manifest}
    base = model.base_model
    found = {
        here[name]: spec
        for name, spec in manifest.items()
        if here[name] == name or hasattr(base, name.partition(".")[0])
    }
    return _tied_heads(found, model) | found


def _tied_heads(manifest: dict[str, dict[str, Any]], model: "PreTrainedModel") -> dict[str, dict[str, Any]]:
    """The heads that a model ties to tables of the manifest: of a bare model's folder the manifest has none."""
    from tersely.kinds import QuantizedEmbedding, TiedHead

    heads = {}
    for name, original in model.all_tied_weights_keys.items():
        table = manifest.get(original.removesuffix(".weight"))
        if table is not None and table["kind"] == QuantizedEmbedding.name:
            path = name.removesuffix(".weight")
            shape = {"in_features": table["embedding_dim"], "out_features": table["num_embeddings"]}
            bias = getattr(model.get_submodule(path), "bias", None) is not None
            heads[path] = {"kind": TiedHead.name, **shape, "group": table["group"], "bias": bias}
    return heads


def _refuse_incomplete(model: "PreTrainedModel", manifest: dict[str, dict[str, Any]]) -> None:
    """Have an incomplete folder refused: transformers fills what is missing with random numbers and only logs it.

    It tells nobody but this method of the model which names these are, when those that are tied, or borrowed from the
    base of a delta, are off the list.  A release that has none by that name opens such a folder; `verify` refuses it.
    """
    usual = getattr(model, "_adjust_missing_and_unexpected_keys", None)
    if usual is None:
        return

    def adjust(report: Any) -> None:
        from tersely.opening import refuse_incomplete

        del model._adjust_missing_and_unexpected_keys  # the class's again, so that the model may be copied and pickled
        usual(report)
        refuse_incomplete(model, manifest, report.missing_keys)

    model._adjust_missing_and_unexpected_keys = adjust  # type: ignore[method-assign, assignment]


def _register(tables: ModuleType) -> None:
    if METHOD in tables.AUTO_QUANTIZER_MAPPING:
        return
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class TerselyConfig(QuantizationConfigMixin):
        def __init__(
            self,
            version: int,
            modules: dict[str, Any],
            quant_method: str = METHOD,
            base: dict[str, str] | None = None,
        ) -> None:
            self.quant_method = quant_method  # type: ignore[assignment]
            self.version = version
            self.modules = modules
            self.base = base  # of a delta folder: where the tensors are that it does not hold

    class TerselyQuantizer(HfQuantizer):
        """Replaces modules before the weights are loaded, and steps back once they are."""

        requires_calibration = True  # folders are made by `tersely compress`, not while loading

        def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
            from tersely.kinds import replace_modules

            config = self.quantization_config.to_dict()
            manifest = read_manifest(config)
            replace_modules(model, _renamed(manifest, model))
            _refuse_incomplete(model, manifest)
            self._borrowed = None
            if config["base"] is not None:
                from tersely.deltas import Borrowed

                self._borrowed = Borrowed(model, kwargs["checkpoint_files"], config)

        def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
            if self._borrowed is not None:
                self._borrowed.fill(model)
            # an ordinary model of ordinary modules: without this .float(), .half() and trainers would refuse it
            self.remove_quantization_config(model)
            from tersely.kinds import manifest_of

            model.config.quantization_config = manifest_config(manifest_of(model))
            return model

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

        @property
        def is_compileable(self) -> bool:
            return True

    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = TerselyConfig
    tables.AUTO_QUANTIZER_MAPPING[METHOD] = TerselyQuantizer

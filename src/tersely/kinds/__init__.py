"""The kinds, by the name that manifests use."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersely.errors import CheckpointError, unknown
from tersely.kinds.attention import Attention
from tersely.kinds.base import Kind, LinearKind, Spec, dense_weight
from tersely.kinds.codebook import CodebookLinear
from tersely.kinds.columns import ColumnsLinear
from tersely.kinds.dense import DenseLinear
from tersely.kinds.low_rank import LowRankLinear
from tersely.kinds.pivoted import PivotedLinear
from tersely.kinds.quantized import QuantizedLinear
from tersely.kinds.quantized_embedding import QuantizedEmbedding, TiedHead, link_tables
from tersely.kinds.remapped import RemappedLinear
from tersely.kinds.shared import SharedLinear, link, orphans, owner_of, shared_bytes, shared_from_factors
from tersely.kinds.sparse import SparseLinear
from tersely.kinds.sum import SumLinear

KINDS: dict[str, type[Kind]] = {
    "attention": Attention,
    "codebook": CodebookLinear,
    "columns": ColumnsLinear,
    "dense": DenseLinear,
    "low_rank": LowRankLinear,
    "pivoted": PivotedLinear,
    "quantized": QuantizedLinear,
    "quantized_embedding": QuantizedEmbedding,
    "remapped": RemappedLinear,
    "shared": SharedLinear,
    "sparse": SparseLinear,
    "sum": SumLinear,
    "tied_head": TiedHead,
}

FACTORS = ("low_rank", "pivoted", "remapped", "shared")
"""Those that are a product of two factors, whose rank says how much of a spectrum is kept."""


@dataclass(frozen=True)
class Made:
    """A module in plain values: what to build, and its numbers."""

    specs: dict[str, Spec]
    """Path inside the module → spec, for it ("") and for every kind below it."""
    state: dict[str, Tensor]

    @classmethod
    def of(cls, module: Kind) -> "Made":
        return cls(manifest_of(module), {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()})

    def below(self, path: str) -> "Made":
        """A kind inside, at this path."""
        specs = {
            p.removeprefix(path).removeprefix("."): s for p, s in self.specs.items() if f"{p}.".startswith(f"{path}.")
        }
        inside = {p.removeprefix(f"{path}."): t for p, t in self.state.items() if p.startswith(f"{path}.")}
        return Made(specs, inside)

    def build(self) -> Kind:
        """The module on the meta device, waiting for its numbers; members of a shared factor wait for `link` too."""
        with torch.device("meta"):
            module = build(self.specs[""])
            _place(module, {path: spec for path, spec in self.specs.items() if path})
        return module


def build(spec: Spec) -> Kind:
    """The module that `spec` describes, its numbers uninitialised."""
    if spec.get("kind") not in KINDS:
        raise CheckpointError(unknown("kind", str(spec.get("kind")), KINDS))
    try:
        return KINDS[spec["kind"]].from_spec(spec)
    except KeyError as error:
        raise CheckpointError(f"the description of a {spec['kind']} module lacks {error}: {spec}") from error


def replace_modules(model: nn.Module, manifest: Mapping[str, Spec]) -> None:
    """Put the modules of a manifest in their places, and link them."""
    _place(model, manifest)
    link(model)
    link_tables(model)


def _place(model: nn.Module, manifest: Mapping[str, Spec]) -> None:
    """Outer names come first, since kinds nest."""
    for name in sorted(manifest, key=lambda name: name.count(".")):
        try:
            model.set_submodule(name, build(manifest[name]))
        except (AttributeError, CheckpointError) as error:
            raise CheckpointError(f"{name} of the manifest cannot be built: {error}") from error


def manifest_of(model: nn.Module) -> dict[str, Spec]:
    """name → spec of every kind in a model, in order of the modules."""
    return {name: module.spec() for name, module in model.named_modules() if isinstance(module, Kind)}


__all__ = [
    "KINDS",
    "Attention",
    "CodebookLinear",
    "ColumnsLinear",
    "DenseLinear",
    "Kind",
    "LinearKind",
    "LowRankLinear",
    "Made",
    "PivotedLinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RemappedLinear",
    "SharedLinear",
    "SparseLinear",
    "Spec",
    "SumLinear",
    "TiedHead",
    "build",
    "dense_weight",
    "link",
    "link_tables",
    "manifest_of",
    "orphans",
    "owner_of",
    "replace_modules",
    "shared_bytes",
    "shared_from_factors",
]

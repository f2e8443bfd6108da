"""The kinds, by the name that manifests use."""

from collections.abc import Mapping

from torch import nn

from tersely.errors import CheckpointError, unknown
from tersely.kinds.base import LinearKind, Spec
from tersely.kinds.low_rank import LowRankLinear

KINDS: dict[str, type[LinearKind]] = {
    "low_rank": LowRankLinear,
}


def build(spec: Spec) -> LinearKind:
    """The module that `spec` describes, its numbers uninitialised."""
    if spec.get("kind") not in KINDS:
        raise CheckpointError(unknown("kind", str(spec.get("kind")), KINDS))
    try:
        return KINDS[spec["kind"]].from_spec(spec)
    except KeyError as error:
        raise CheckpointError(f"the description of a {spec['kind']} module lacks {error}: {spec}") from error


def replace_modules(model: nn.Module, manifest: Mapping[str, Spec]) -> None:
    """Put the modules of a manifest in their places.  Outer names come first, since kinds nest."""
    for name in sorted(manifest, key=lambda name: name.count(".")):
        try:
            model.set_submodule(name, build(manifest[name]))
        except (AttributeError, CheckpointError) as error:
            raise CheckpointError(f"{name} of the manifest cannot be built: {error}") from error


def manifest_of(model: nn.Module) -> dict[str, Spec]:
    """name → spec of every kind in a model, in order of the modules."""
    return {name: module.spec() for name, module in model.named_modules() if isinstance(module, LinearKind)}


__all__ = ["KINDS", "LinearKind", "LowRankLinear", "Spec", "build", "manifest_of", "replace_modules"]

"""The modules of a folder of ours, one by one."""

from torch import nn

from tersely.checkpoint import Source
from tersely.kinds import Made


def module_of(source: Source, name: str) -> nn.Module:
    """A kind of the folder with its numbers."""
    inside = {n.removeprefix(name).removeprefix("."): spec for n, spec in source.manifest.items() if _below(n, name)}
    module = Made(inside, {}).build()
    tied = {n.removeprefix(f"{name}."): source.tensor(n) for n in source.ties if n.startswith(f"{name}.")}
    module.load_state_dict(source.state(f"{name}.") | tied, assign=True)
    return module


def _below(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")

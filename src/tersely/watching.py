"""Hooks on a block as it is replayed: statistics of what its linears read, and of the residual stream beside it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tersely.stats import Stats


@dataclass(frozen=True)
class Beside:
    """What the dense model reads of the present batch; empty where there is no second stream."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Key → ``[tokens, width]``."""
    streams: dict[str, Tensor] = field(default_factory=dict)
    """Path of a norm → ``[tokens, stream]``."""


class _Enough(Exception):
    """All that was to be seen of a batch has been seen."""


class Reads:
    """When everything has been read.  The first batch runs to its end; if it read each input once, so will others, and
    they are stopped at the last of these reads: what comes behind it is computed for nobody."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = sorted(keys)
        self._read: list[str] = []
        self._once = self._stops = False

    @contextmanager
    def of_batch(self, *, whole: bool) -> Iterator[None]:
        """Around the run of a batch, which may be stopped unless all of it is wanted."""
        self._read, self._stops = [], self._once and not whole
        try:
            yield
        except _Enough:
            return
        self._once = sorted(self._read) == self._keys

    def note(self, key: str) -> None:
        """Told by whoever watches, when it is done with an input."""
        self._read.append(key)
        if self._stops and len(self._read) == len(self._keys):
            raise _Enough


@contextmanager
def watching(
    block: nn.Module,
    inputs: Mapping[str, tuple[str, Stats]],
    dense: Beside,
    streams: Mapping[str, str],
    shape: Sequence[int],
    reads: Reads,
) -> Iterator[None]:
    """Statistics are updated as the block runs; `dense` holds the dense version of the present batch, if there is
    one, `streams` names the norms that read the stream, `shape` says how many windows of how many tokens a batch has,
    and `reads` is told."""
    shifted: dict[str, Tensor] = {}

    def watch(key: str, stats: Stats) -> Any:
        def update(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            # OPT's MLP reads the tokens of all windows as the rows of one matrix
            x = x.unflatten(0, tuple(shape)) if x.ndim == 2 and len(x) == math.prod(shape) else x
            norm = streams.get(key)
            drift = dense.streams[norm] - shifted[norm] if norm in dense.streams else None
            stats.update(x, dense.inputs.get(key), drift)
            reads.note(key)

        return update

    hooks = [
        block.get_submodule(path).register_forward_pre_hook(watch(key, stats)) for key, (path, stats) in inputs.items()
    ]
    hooks += holding(block, streams.values(), shifted)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def holding(block: nn.Module, norms: Iterable[str], into: dict[str, Tensor]) -> list[RemovableHandle]:
    """Hooks that put what each norm reads, ``[tokens, stream]``, under its path."""

    def hold(path: str) -> Any:
        def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            into[path] = arguments[0].flatten(0, -2)

        return note

    return [block.get_submodule(path).register_forward_pre_hook(hold(path)) for path in norms]

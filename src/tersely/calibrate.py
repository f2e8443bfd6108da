"""What inputs look like: replay of a model block by block, one block in memory at a time.

Once per batch the model runs with every block's forward replaced by a stub that notes its arguments and returns its
input; then the real blocks are called in turn, each with the arguments noted for it and the hidden state that the
former returned.  The arguments of every block are noted, since hybrid models hand different masks and positions to
different blocks.  Stubs need no weights, so the blocks stay on the meta device until their turn.

`use_cache=False` is vital: with a cache a block that is replayed would attend to keys that an earlier replay left
there.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tersely.anatomy import Anatomy, Site
from tersely.checkpoint import Source, State, fill
from tersely.errors import NumericalError
from tersely.journal import commit_tensors, read_tensors, reading
from tersely.kernels import Quicker
from tersely.kinds import Made, SharedLinear, link, orphans, owner_of
from tersely.side_by_side import Part, ranges, side_by_side
from tersely.stats import STATISTICS, Statistic, Stats, keyed_by
from tersely.watching import Beside, Reads, holding, watching

TOKENS_AT_ONCE = 2048
"""Tokens in a batch: enough to keep the processor busy, few enough for the widest intermediate of a block."""

NARROW, COPIES = 1024, 2**28
"""Width of the stream up to which threads have batches of their own; bytes of statistics for all of them but one."""
FORM = 2
"""What the states of statistics mean on disk: those that meant something else are measured anew."""


@dataclass(frozen=True)
class _Call:
    """What a block was called with, its hidden state aside."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Replay:
    """A stream of hidden states that is moved through the blocks one by one.

    Stands before block `at`.  Recorded inputs live on the host; only one block and one batch are on the device.
    """

    def __init__(
        self, source: Source, anatomy: Anatomy, windows: Tensor, device: str, batch: int | None = None
    ) -> None:
        """`batch`: windows that run together; by default as many as keep the processor busy."""
        self.at = 0
        self._device = device
        self._anatomy = anatomy
        self._hidden: list[Tensor] = []
        self._calls: list[list[_Call]] = []
        batch = batch or max(1, TOKENS_AT_ONCE // windows.shape[1])
        model = _without_blocks(source, anatomy, device)
        for rows in windows.split(batch):
            hidden, calls = _note(model, anatomy, rows.to(device))
            self._hidden.append(hidden)
            self._calls.append(_shared(calls, self._calls[-1]) if self._calls else calls)

    def __len__(self) -> int:
        """Batches."""
        return len(self._hidden)

    def fork(self) -> "Replay":
        """A second stream that stands where this one does and goes its own way."""
        other = copy.copy(self)
        other._hidden = list(self._hidden)
        return other

    @torch.no_grad()
    def observe(
        self,
        block: nn.Module,
        inputs: Mapping[str, tuple[str, Stats]],
        *,
        advance: bool,
        beside: "tuple[Replay, nn.Module] | None" = None,
        streams: Mapping[str, str] | None = None,
    ) -> None:
        """Run `block`, the one at `at`, over the stream.

        `inputs`: key → (path inside the block of a linear that reads this input, statistics to update).  With `advance`
        the outputs become the stream before the next block; without, a batch ends with the last input to be seen.
        `beside`: the dense stream at the same block and that block as it was; statistics then see both versions of
        every input.  `streams`: key → path inside the block of the norm that reads the residual stream as it is where
        readers of this input write to it; statistics then see how far that has drifted.  Raises NumericalError where
        outputs are not finite.
        """
        streams, parts = streams or {}, self._parts(block, inputs)
        if beside is not None or len(parts) == 1:
            self._observe(block, inputs, advance, range(len(self)), beside, streams)
        else:
            side_by_side([self._part(block, inputs, advance, part, streams) for part in parts])
        self.at += advance

    def _parts(self, block: nn.Module, inputs: Mapping[str, tuple[str, Stats]]) -> list[range]:
        """Batches that run one after the other.  Narrow models keep several threads busy only if each has batches of
        its own: their products are too small to be divided.  Whoever watches a block by hooks sees all in its order."""
        copied = max(1, sum(stats.nbytes for _, stats in inputs.values()))
        threads = min(torch.get_num_threads(), len(self) // 2, 1 + COPIES // copied)
        narrow = self._device == "cpu" and self._hidden[0].shape[-1] <= NARROW
        watched = any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
        divisible = narrow and not watched and all(stats.divisible for _, stats in inputs.values())
        return ranges(len(self), threads if divisible else 1)

    def _part(
        self,
        block: nn.Module,
        inputs: Mapping[str, tuple[str, Stats]],
        advance: bool,
        batches: range,
        streams: Mapping[str, str],
    ) -> "Part":
        """A part of what `observe` does; all but the first have their own block, with its numbers, and statistics."""
        own, apart = block, inputs
        if batches.start:
            own = copy.deepcopy(block, {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())})
            apart = {key: (path, copy.deepcopy(stats)) for key, (path, stats) in inputs.items()}

        def run(goes_on: Callable[[], bool]) -> None:
            self._observe(own, apart, advance, batches, None, streams, goes_on)

        def done() -> None:
            for key, (_, stats) in inputs.items() if batches.start else ():
                stats.merge(apart[key][1])

        return Part(run, done)

    def _observe(
        self,
        block: nn.Module,
        inputs: Mapping[str, tuple[str, Stats]],
        advance: bool,
        batches: range,
        beside: "tuple[Replay, nn.Module] | None",
        streams: Mapping[str, str],
        goes_on: Callable[[], bool] = lambda: True,
    ) -> None:
        dense, shape = Beside(), [0, 0]
        here, there = Reads(inputs), Reads(inputs)
        with Quicker(), watching(block, inputs, dense, streams, shape, here):
            for i in takewhile(lambda _: goes_on(), batches):
                shape[:] = self._hidden[i].shape[:2]
                if beside is not None:
                    beside[0]._read_beside(beside[1], i, inputs, streams, there, dense)
                out = None
                with here.of_batch(whole=advance):
                    out = self._run(block, i)
                if out is None:
                    continue
                if not all(math.isfinite(extreme) for extreme in out.aminmax()):
                    where = (*self._anatomy.blocks, "the final norm")[self.at]
                    raise NumericalError(
                        f"{where}: the hidden state is not finite for calibration batch {i}; "
                        "calibrate in bfloat16 or float32"
                    )
                if advance:
                    self._hidden[i] = out.cpu()

    def advance(self, block: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Run `block`, the one at `at`; what it read and what it gave, batch by batch, on the host."""
        before = self._hidden.copy()
        self.observe(block, {}, advance=True)
        return list(zip(before, self._hidden, strict=True))

    def hidden(self, batch: int) -> Tensor:
        """What the block at `at` reads of one batch: ``[windows, length, width]``, on the host."""
        return self._hidden[batch]

    def arguments(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the block at `at` is called with for one batch, behind its hidden state."""
        call = self._calls[batch][self.at]
        return call.arguments, call.keywords

    def _run(self, block: nn.Module, batch: int) -> Tensor:
        arguments, keywords = self.arguments(batch)
        out: Tensor = block(self._hidden[batch].to(self._device), *arguments, **keywords)
        return out

    def _read_beside(
        self,
        block: nn.Module,
        batch: int,
        inputs: Mapping[str, tuple[str, Stats]],
        streams: Mapping[str, str],
        reads: Reads,
        into: Beside,
    ) -> None:
        """Put what the watched linears of `block`, and the norms before them, read of one batch."""

        def watch(key: str) -> Any:
            def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                into.inputs[key] = arguments[0].flatten(0, -2)
                reads.note(key)

            return note

        hooks = [block.get_submodule(path).register_forward_pre_hook(watch(key)) for key, (path, _) in inputs.items()]
        hooks += holding(block, streams.values(), into.streams)
        try:
            with Quicker(), reads.of_batch(whole=False):
                self._run(block, batch)
        finally:
            for hook in hooks:
                hook.remove()


class Blocks:
    """The blocks of a source, one at a time with their numbers."""

    def __init__(self, source: Source, anatomy: Anatomy, device: str) -> None:
        self._source = source
        self._anatomy = anatomy
        self._device = device
        self._skeleton = source.skeleton()

    def dense(self, index: int) -> nn.Module:
        """A block as the source has it; behind the last one, `Tail`."""
        return self.cut(index, {})

    def cut(self, index: int, replaced: Mapping[str, Made]) -> nn.Module:
        """A block with some modules replaced, by their full names.

        Those outside of it matter where it reads a factor that another block owns.
        """
        if index == len(self._anatomy.blocks):
            return Tail(self._source, self._anatomy, self._device).eval()
        prefix = f"{self._anatomy.blocks[index]}."
        block = copy.deepcopy(self._skeleton.get_submodule(prefix[:-1]))
        state = self._source.state(prefix)
        for name, made in replaced.items():
            if not name.startswith(prefix):
                continue
            inside = name.removeprefix(prefix)
            block.set_submodule(inside, made.build())
            state = {n: t for n, t in state.items() if not n.startswith(f"{inside}.")}
            state |= {f"{inside}.{part}": tensor for part, tensor in made.state.items()}
        fill(block, state, self._device)
        _buffers_to(block, self._device)
        link(block, [self._owner(group, replaced) for group in sorted(orphans(block))])
        return block.eval()

    def _owner(self, group: str, replaced: Mapping[str, Made]) -> SharedLinear:
        """One that stands for the owner of a shared factor in another block, with what was replaced inside of it."""
        name, module = owner_of(self._skeleton, group)
        owner, prefix = copy.deepcopy(module), f"{name}."
        state = self._source.state(prefix)
        for place, made in replaced.items():
            if place.startswith(prefix):
                inside = place.removeprefix(prefix)
                owner.set_submodule(inside, made.build())
                state = {n: t for n, t in state.items() if not n.startswith(f"{inside}.")}
                state |= {f"{inside}.{part}": tensor for part, tensor in made.state.items()}
        fill(owner, state, self._device)
        return owner.eval()


class Tail(nn.Module):
    """What turns the hidden state behind the last block into the input of the head: the final norm, and whatever else
    the base model does there.  `head` stands where the head reads."""

    def __init__(self, source: Source, anatomy: Anatomy, device: str) -> None:
        super().__init__()
        self._base = _without_blocks(source, anatomy, device)
        self._anatomy = anatomy
        self.head = nn.Identity()

    def forward(self, hidden: Float[Tensor, "batch length width"], tokens: Int[Tensor, "batch length"]) -> Tensor:
        """The model's base is run with `hidden` in the place of whatever the blocks would make."""
        with _stubbed(self._base, self._anatomy, lambda *arguments, **keywords: hidden):
            returned: Tensor = self._base(tokens, use_cache=False)[0]
        read: Tensor = self.head(returned)
        return read


class StatisticsStore:
    """Statistics of the dense model on disk, block by block, for every later method and size.

    The key says what they were measured on; another model, text or dtype is another folder.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], *, shared: bool = True) -> None:
        self.shared = shared
        """Whether other runs will read it."""
        digest = hashlib.sha256(repr((FORM, sorted(key.items()))).encode()).hexdigest()
        self.folder = folder / digest[:16]

    def has(self, block: int, needs: Iterable[type[Statistic]]) -> bool:
        return all(self._file(block, kind).exists() for kind in needs)

    def write(self, block: int, stats: Mapping[str, Stats]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        kinds = {kind for of_input in stats.values() for kind in of_input.kinds()}
        for kind in kinds:
            flat = {f"{key}|{part}": t for key, s in stats.items() for part, t in s[kind].state().items()}
            commit_tensors(self._file(block, kind), flat)

    def read(self, block: int, needs: Iterable[type[Statistic]], device: str) -> dict[str, Stats]:
        found: dict[str, dict[type[Statistic], Statistic]] = {}
        for kind in needs:
            states: dict[str, State] = {}
            with reading(self._file(block, kind), shared=self.shared):
                stored = read_tensors(self._file(block, kind))
            for name, tensor in stored.items():
                key, _, part = name.rpartition("|")
                states.setdefault(key, {})[part] = tensor.to(device)
            for key, state in states.items():
                found.setdefault(key, {})[kind] = kind.restore(state)
        return {key: Stats(of_input) for key, of_input in found.items()}

    def _file(self, block: int, kind: type[Statistic]) -> Path:
        (name,) = [name for name, known in STATISTICS.items() if known is kind]
        return self.folder / f"{block:04}.{name}.safetensors"


def stream_list(anatomy: Anatomy, block: int, wanted: Iterable[Site]) -> dict[str, str]:
    """For the inputs of those wanted sites of a block that write to the residual stream: the argument `streams` of
    `Replay.observe`."""
    prefix = "" if block == len(anatomy.blocks) else f"{anatomy.blocks[block]}."
    return {
        site.reads: anatomy.streams[site.name].removeprefix(prefix) for site in wanted if site.name in anatomy.streams
    }


def watch_list(
    anatomy: Anatomy, block: int, wanted: Iterable[Site], needs: Iterable[type[Statistic]], device: str
) -> dict[str, tuple[str, Stats]]:
    """The inputs that the wanted sites of a block read, with empty statistics: the argument of `Replay.observe`.

    Raises ValueError for statistics of gradients, which no replay shows; see `gradients`.
    """
    needs = tuple(needs)
    foreign = [kind.__name__ for kind in needs if keyed_by(kind) != "input"]
    if foreign:
        raise ValueError(f"{', '.join(foreign)}: no statistic of inputs; gradients are gathered by `gradients.gather`")
    outside = block == len(anatomy.blocks)
    prefix = "" if outside else f"{anatomy.blocks[block]}."
    chosen = {site.reads for site in wanted}
    watched = {}
    for key, sites in anatomy.inputs(block):
        if key in chosen:
            stats = Stats({kind: kind(sites[0].in_features, device) for kind in needs})
            watched[key] = ("head" if outside else sites[0].name.removeprefix(prefix), stats)
    return watched


def _without_blocks(source: Source, anatomy: Anatomy, device: str) -> nn.Module:
    """The base model with numbers in everything that is outside the blocks; output heads are not needed."""
    model = source.skeleton()
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    inside = tuple(f"{block}." for block in anatomy.blocks)
    wanted = [name for name in source.stored if name.startswith(prefix) and not name.startswith(inside)]
    state = {name.removeprefix(prefix): source.tensor(name).to(device) for name in wanted}
    base.load_state_dict(state, strict=False, assign=True)  # what stays on meta are the blocks
    _buffers_to(base, device)
    return base


def _buffers_to(module: nn.Module, device: str) -> None:
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if not buffer.is_meta:
                setattr(part, name, buffer.to(device))


@torch.no_grad()
def _note(base: nn.Module, anatomy: Anatomy, rows: Tensor) -> tuple[Tensor, list[_Call]]:
    """Hidden state before the first block, and the arguments of every block and of what comes behind the last."""
    calls: list[_Call] = []
    first: list[Tensor] = []

    def stub(hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if not calls:
            first.append(hidden.cpu())
        calls.append(_Call(arguments, keywords))
        return hidden

    with _stubbed(base, anatomy, stub):
        base(rows, use_cache=False)
    return first[0], [*calls, _Call((rows,), {})]  # the last one is that of `Tail`


@contextmanager
def _stubbed(base: nn.Module, anatomy: Anatomy, stub: Any) -> Iterator[None]:
    """Within, every block does what `stub` does."""
    blocks = list(base.get_submodule(_common_path(anatomy, base)).children())
    for block in blocks:
        block.forward = stub
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _common_path(anatomy: Anatomy, base: nn.Module) -> str:
    """Path of the list of blocks inside the base model."""
    path = anatomy.blocks[0].rpartition(".")[0]
    while path and not _has(base, path):
        path = path.partition(".")[2]
    return path


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _shared(calls: list[_Call], former: list[_Call]) -> list[_Call]:
    """The same calls, with arguments that equal the former batch's replaced by those: masks and rotary tables are the
    same for every batch of full windows, and would otherwise be kept once per batch."""
    memo: dict[int, Any] = {}

    def share(new: Any, old: Any) -> Any:
        if isinstance(new, Tensor):
            if id(new) not in memo:
                same = isinstance(old, Tensor) and new.shape == old.shape and torch.equal(new, old)
                memo[id(new)] = old if same else new
            return memo[id(new)]
        if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
            return tuple(share(n, o) for n, o in zip(new, old, strict=True))
        return new

    return [
        _Call(share(c.arguments, f.arguments), {k: share(v, f.keywords.get(k)) for k, v in c.keywords.items()})
        for c, f in zip(calls, former, strict=True)
    ]

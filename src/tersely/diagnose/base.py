"""What a diagnosis looks at, and how it says what it saw.

A diagnosis changes nothing: it takes a model folder with windows of text and returns rows, each one number with its
unit.  `Subject.blocks` replays the model block by block, one block in memory at a time, and gathers what linears read,
what they return, and what the blocks themselves return.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tersely.anatomy import Anatomy, Site
from tersely.calibrate import Blocks, Replay, watch_list
from tersely.checkpoint import Source
from tersely.stats import Statistic, Stats

Row = dict[str, Any]
"""One number, plain JSON: `name` of what was looked at, `measure`, `value` (a number, a word, or None where the measure
does not apply), `unit` (empty for a pure number)."""


def row(name: str, measure: str, value: float | int | str | None, unit: str = "") -> Row:
    return {"name": name, "measure": measure, "value": value, "unit": unit}


@dataclass(frozen=True)
class Seen:
    """One block, and what went through it."""

    index: int
    name: str
    sites: tuple[Site, ...]
    inputs: dict[str, Stats]
    """`Site.reads` → statistics of that input."""
    outputs: dict[str, Stats]
    """Name of a site, and of the block → statistics of what it returned."""


@dataclass(frozen=True)
class Subject:
    source: Source
    anatomy: Anatomy
    windows: Tensor
    """Token numbers, ``[samples, length]``."""
    device: str

    def weight(self, site: Site) -> Tensor:
        """[out, in], in the model's dtype."""
        stored = self.source.tensor(f"{site.name}.weight").to(self.device)
        return stored.T.contiguous() if site.transposed else stored

    def token(self, number: int) -> tuple[int, int]:
        """(position in its window, token number) of the token that a replay saw as the `number`-th, from 0."""
        return number % self.windows.shape[1], int(self.windows.flatten()[number])

    def blocks(self, needs: Sequence[type[Statistic]], outputs: Sequence[type[Statistic]] = ()) -> Iterator[Seen]:
        """Replay the model and yield block by block what its sites read, and for `outputs` what they return.

        Raises NumericalError where a block returns numbers that are not finite.
        """
        blocks = Blocks(self.source, self.anatomy, self.device)
        replay = Replay(self.source, self.anatomy, self.windows, self.device)
        for index, name in enumerate(self.anatomy.blocks):
            sites = tuple(site for site in self.anatomy.sites if site.block == index)
            block = blocks.dense(index)
            returned = {site.name: (site.name.removeprefix(f"{name}."), site.out_features) for site in sites}
            returned[name] = ("", self.source.config.get_text_config().hidden_size)
            watched = watch_list(self.anatomy, index, sites, needs, self.device)
            gathered = {
                place: Stats({kind: kind(width, self.device) for kind in outputs})
                for place, (_, width) in returned.items()
            }
            with ExitStack() as hooks:
                for place, (path, _) in returned.items() if outputs else ():
                    handle = block.get_submodule(path).register_forward_hook(_keep(gathered[place]))
                    hooks.callback(handle.remove)
                replay.observe(block, watched, advance=True)
            yield Seen(index, name, sites, {key: stats for key, (_, stats) in watched.items()}, gathered)


def _keep(stats: Stats) -> Any:
    return lambda module, arguments, out: stats.update(out.detach().flatten(0, -2))

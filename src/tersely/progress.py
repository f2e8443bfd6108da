"""Progress of long work: bars on a terminal, plain lines elsewhere.

Work comes in stages, which a call names; a stage is so many units, one after the other, of which so many are done.  A
stage that begins while another one goes on is part of it: the training of a block, for example.

*What is left.*  Units to come × mean seconds of those that were finished while somebody watched; what a former run had
finished took no time here and does not count.  Of a unit that is going on, the time it took already is taken off, until
it takes longer than the mean.  No estimate before a unit is finished.

*Lines.*  One for every block (of several, where blocks take less than `SECONDS_BETWEEN_BLOCKS`), with the sites that
were done since the line before and the worst of them; of other units one every `SECONDS_BETWEEN_LINES`, less often the
longer a stage lasts.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from tersely.memory import resident_memory
from tersely.report.rows import format_value

SECONDS_BETWEEN_BLOCKS, SECONDS_BETWEEN_LINES = 1.0, 5.0

GROWTH = 0.05
"""Of the time that a stage has lasted: as much lies at least between two of its lines."""


@dataclass
class Stage:
    """One stage as it was told."""

    what: str
    done: int
    total: int
    begun: float
    """When it was first heard of, on the clock that all times here are of."""
    first: int = 0
    """Units that were done then."""
    changed: float = 0.0
    """When a unit was last finished."""
    said: float = 0.0
    """When the last line about it was written."""
    sites: list[tuple[str, float | None]] = field(default_factory=list)
    """With errors, since the last line."""

    @property
    def is_over(self) -> bool:
        return self.done >= self.total

    def remaining(self, now: float) -> float | None:
        """Seconds, as far as can be told."""
        finished, to_come = self.done - self.first, self.total - self.done
        if finished <= 0:
            return None
        mean = (self.changed - self.begun) / finished
        return max(mean * to_come - (now - self.changed), mean * (to_come - 1), 0.0)


class Reporter:
    """Called with what is being done, how many units are done, and of how many; writes to standard error.

    `site` tells it of the sites inside of a unit.
    """

    def __init__(self, console: Console | None = None, is_to_end: Callable[[], bool] = bool) -> None:
        """`is_to_end`: whether work is to end here; it then does with KeyboardInterrupt."""
        self._console = console or Console(stderr=True)
        self._is_to_end = is_to_end
        self._bars: _Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._stages: dict[str, Stage] = {}

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bars = _Bars(self._console, self._stages)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        stage = self._stages.get(what)
        if stage is None or done < stage.done:
            self._stages.pop(what, None)  # begun anew, it stands last
            stage = self._stages[what] = Stage(what, done, total, now, first=done, changed=now, said=now)
            is_news = done > 0 and done >= total
        else:
            is_news = done > stage.done or total != stage.total
            if done > stage.done:
                stage.changed = now
            stage.done, stage.total = done, total
        self._heed()
        if self._bars is not None:
            self._show(stage)
        elif is_news and self._is_due(stage, now):
            self._say(stage, now)

    def site(self, name: str, error: float | None) -> None:
        """A site of the outermost stage is done."""
        self._heed()
        stage = self._outermost()
        if stage is not None:
            stage.sites.append((name, error))
            if self._bars is not None:
                del stage.sites[:-1]
                self._bars.site = stage.sites[-1]

    def reached(self) -> str:
        """How far it has come, for people; empty where nothing was begun."""
        stage = self._outermost() or next(reversed(self._stages.values()), None)
        return "" if stage is None else f"{stage.what}, {stage.done} of {stage.total} done"

    def _heed(self) -> None:
        if self._is_to_end():
            raise KeyboardInterrupt

    def _outermost(self) -> Stage | None:
        return next((stage for stage in self._stages.values() if not stage.is_over), None)

    def _is_due(self, stage: Stage, now: float) -> bool:
        outermost = self._outermost()
        if stage.is_over and outermost is None:
            return True
        if stage.sites and outermost in (stage, None):
            return now - stage.said >= SECONDS_BETWEEN_BLOCKS
        return now - stage.said >= max(SECONDS_BETWEEN_LINES, GROWTH * (now - stage.begun))

    def _say(self, stage: Stage, now: float) -> None:
        sys.stderr.write(f"{stage.what}: {stage.done} of {stage.total}, {', '.join(_figures(stage, now))}\n")
        stage.said = now
        stage.sites.clear()

    def _show(self, stage: Stage) -> None:
        assert self._bars is not None  # asked before
        task = self._tasks.get(stage.what)
        if task is None:
            task = self._tasks[stage.what] = self._bars.add_task(stage.what, total=stage.total)
        self._bars.update(task, completed=stage.done, total=stage.total)


def _figures(stage: Stage, now: float) -> Iterator[str]:
    """What a line says beside how far it is."""
    if stage.sites:
        yield f"{len(stage.sites)} {'site' if len(stage.sites) == 1 else 'sites'}"
        known = [(error, name) for name, error in stage.sites if error is not None]
        if known:
            error, name = max(known)
            yield f"worst {name} with error {error:.3g}"
        yield duration(now - stage.said)
    yield from _memory()
    left = stage.remaining(now)
    if stage.is_over and stage.first == 0 and left is not None:
        yield f"all in {duration(now - stage.begun)}"
    elif left is not None and not stage.is_over:
        yield f"about {duration(left)} left"


def _memory() -> Iterator[str]:
    """What the process holds now, and what tensors hold on the GPU if there is one in use."""
    held = resident_memory()
    if held is not None:
        yield format_value(held, "bytes")
    if torch.cuda.is_initialized():
        yield f"{format_value(resident_memory(torch.device('cuda')), 'bytes')} on the GPU"


def duration(seconds: float) -> str:
    """For people: 0.3 s, 42 s, 5 min, 3 h 20 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


# --- on a terminal ----------------------------------------------------------------------------------------------------


class _Bars(Progress):
    """A bar for each stage, and below them the site that was done last."""

    def __init__(self, console: Console, stages: dict[str, Stage]) -> None:
        self.site: tuple[str, float | None] | None = None
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            MofNCompleteColumn(),
            _FiguresColumn(stages),
        )
        super().__init__(*columns, console=console, transient=True)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.site is not None:
            name, error = self.site
            said = name if error is None else f"{name}, relative error {error:.3g}"
            yield Text(said, style="dim", no_wrap=True, overflow="ellipsis")


class _FiguresColumn(ProgressColumn):
    """Seconds, memory, and how long it will take yet."""

    max_refresh = 0.5

    def __init__(self, stages: dict[str, Stage]) -> None:
        super().__init__()
        self._stages = stages

    def render(self, task: Task) -> Text:
        stage, now = self._stages.get(task.description), time.monotonic()
        if stage is None:
            return Text("")
        if stage.is_over:
            return Text(duration(stage.changed - stage.begun), style="dim")
        left = stage.remaining(now)
        said = [duration(now - stage.begun), *_memory()]
        if left is not None:
            said.append(f"about {duration(left)} left")
        return Text(", ".join(said), no_wrap=True, overflow="ellipsis")

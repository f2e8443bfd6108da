"""What every step works with, and what it hands back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tersely.anatomy import Anatomy
from tersely.checkpoint import Edit, Source
from tersely.job import Progress
from tersely.journal import Journal
from tersely.report.rows import Row, SiteRow


@dataclass(frozen=True)
class Scene:
    number: int
    """Of the step, from 0."""
    source: Source
    """The model as the steps before left it."""
    anatomy: Anatomy
    dense: Source
    """The model that the recipe began with: the teacher."""
    windows: Tensor | None
    """Calibration windows, token numbers ``[samples, length]``."""
    text: Tensor | None
    """Windows to train on."""
    unseen: Tensor | None
    """Windows to find a temperature on."""
    seed: int
    device: str
    journal: Journal
    """Of this step alone."""
    statistics: Path | None
    """Where statistics of dense models are kept between runs; None to keep them for this run at most."""
    measured_on: Callable[[], dict[str, Any]]
    """What statistics of this model depend on: the key of a store."""
    progress: Progress


@dataclass
class Done:
    """What a step did.  Everything in it is on disk already: a step that is run again hands back the same."""

    edit: Edit
    touched: tuple[str, ...]
    """Paths of the linears whose bytes it was to change."""
    rows: list[SiteRow] = field(default_factory=list)
    plan: dict[str, Any] | None = None
    degraded: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    """Stage → the most bytes that were held in it."""
    sizes: list[Row] = field(default_factory=list)
    """Sizes that are not of weights."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What else is worth a line in the report."""
    base: Source | None = None
    """The checkpoint to which the result is stored as a difference."""

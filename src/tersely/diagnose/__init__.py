"""Looking at a model without changing it: spectra, outliers, redundancy, sensitivity, attention.

Every diagnosis takes a `Subject` (a model folder with windows of text) and returns rows of plain values; see
`tersely.diagnose.base.Row`.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersely.anatomy import anatomy_of
from tersely.checkpoint import ForeignNamesError, locate, open_source, read_tokenizer
from tersely.diagnose import joma, outliers, redundancy, sensitivity, spectra
from tersely.diagnose.base import Row, Subject
from tersely.errors import RecipeError, unknown
from tersely.opening import rewrite_names
from tersely.recipe import Calibration
from tersely.windows import read_windows


@dataclass(frozen=True)
class Diagnosis:
    look: Callable[[Subject], list[Row]]
    summary: str
    paper: str
    predicts: bool = False
    """Whether the model has to predict the next token; of one that does not, it is asked for by name or not at all."""


DIAGNOSES: dict[str, Diagnosis] = {
    "joma": Diagnosis(
        joma.look,
        "where heads look: entropy, sink and peaks of attention, with the stable rank of the MLP",
        "Tian et al., 2024, JoMA: Joint Dynamics of MLP and Attention (arXiv 2310.00535)",
    ),
    "outliers": Diagnosis(
        outliers.look,
        "channels, tokens and projections with far larger numbers than the others",
        "Sun et al., 2024, Massive Activations in Large Language Models (arXiv 2402.17762)",
    ),
    "redundancy": Diagnosis(
        redundancy.look,
        "how little every block changes what it is given, and which blocks in a row change it least",
        "Men et al., 2024, ShortGPT: Layers in Large Language Models are More Redundant Than You Expect "
        "(arXiv 2403.03853)",
    ),
    "sensitivity": Diagnosis(
        sensitivity.look,
        "what the loss would rise by if one linear alone were made smaller, foretold from one backward pass",
        "Martens and Grosse, 2015, Optimizing Neural Networks with Kronecker-factored Approximate Curvature "
        "(arXiv 1503.05671)",
        predicts=True,
    ),
    "spectra": Diagnosis(
        spectra.look,
        "stable and effective ranks of every weight, alone and as its inputs see it",
        "Roy and Vetterli, 2007, The effective rank: a measure of effective dimensionality",
    ),
}


def diagnose(
    model: str,
    what: Sequence[str] | None = None,
    texts: Sequence[str] = ("stdlib",),
    *,
    samples: int = 32,
    length: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    revision: str | None = None,
    dtype: str | None = None,
) -> dict[str, list[Row]]:
    """Look at a model: name of the diagnosis → its rows.

    `what` names diagnoses; by default all that the model allows.  `model` is a folder or a hub name, `texts` are
    sources as `tersely.text.read_text` takes them, `samples` windows of `length` tokens are drawn by the seed.
    `joma` and `sensitivity` hold the whole model in memory, the others one block at a time.

    Raises RecipeError for an unknown diagnosis or a text that cannot be used, NumericalError for numbers that are not
    finite, CheckpointError for weights that are not, CheckpointError and AnatomyError for a folder that cannot be
    opened.
    """
    for name in what or ():
        if name not in DIAGNOSES:
            raise RecipeError(unknown("diagnosis", name, DIAGNOSES))
    folder = locate(model, revision)
    with tempfile.TemporaryDirectory() as renamed:
        try:
            source = open_source(folder, dtype=dtype)
        except ForeignNamesError:
            rewrite_names(folder, Path(renamed))
            source = open_source(Path(renamed), dtype=dtype)
        skeleton: Any = source.skeleton()
        anatomy = anatomy_of(skeleton)
        inside = tuple(f"{block}." for block in anatomy.blocks)
        for name in source.stored:
            if not name.startswith(inside):  # blocks are checked as they are read; the last norm is read by no one
                source.tensor(name)
        tokenizer = read_tokenizer(folder)
        first_token = tokenizer.bos_token_id if anatomy.needs_first_token else None
        if anatomy.needs_first_token and first_token is None:
            raise RecipeError(f"{folder}: {anatomy.family} needs a first token and the tokenizer has no bos_token")
        asked = Calibration(source=list(texts), samples=samples, length=length)
        windows = read_windows(asked, tokenizer, source.config, seed, first_token)
        subject = Subject(source, anatomy, windows.tokens, device)
        chosen = what or [name for name, one in DIAGNOSES.items() if skeleton.can_generate() or not one.predicts]
        return {name: DIAGNOSES[name].look(subject) for name in chosen}


@dataclass(frozen=True)
class Table:
    """Rows side by side: a heading for every measure, and a line for every name."""

    headings: tuple[str, ...]
    lines: tuple[tuple[object, ...], ...]


def tables(rows: Iterable[Row]) -> list[Table]:
    """Rows as they are printed.  Names with the same measures (sites, inputs, heads, …) share a table."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    found: dict[tuple[str, ...], list[tuple[object, ...]]] = {}
    for name, of_name in by_name.items():
        measures = (f"{row['measure']} ({row['unit']})" if row["unit"] else row["measure"] for row in of_name)
        found.setdefault(("name", *measures), []).append((name, *(row["value"] for row in of_name)))
    return [Table(headings, tuple(lines)) for headings, lines in found.items()]


__all__ = ["DIAGNOSES", "Diagnosis", "Row", "Subject", "Table", "diagnose", "tables"]

"""What a page is made of: folders of ours, results of benches, and evaluations, as they lie on disk.

Everything is read as plain JSON and nothing is computed from the weights, so that the page of a model that fills a
cluster is made on a laptop, and the page of an older release still opens.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tersely.errors import CheckpointError, RecipeError
from tersely.report.naming import named
from tersely.report.rows import Report

Json = Mapping[str, Any]

AGAIN = "it is not as tersely wrote it: fetch it, or write it again"

VERBS = ("method", "rewrite", "cache", "convert", "relax", "train")
"""Keys under which a step has its name."""


@dataclass(frozen=True)
class Run:
    """One compressed model and what is known of it."""

    name: str
    """What to call it among others."""
    report: Json
    """As in ``report.json``."""
    folder: Path | None = None
    nbytes: int | None = None
    """Of all files in the folder."""
    recipe: str | None = None
    """As TOML."""
    plan: Json | None = None
    checksums: Json = field(default_factory=dict)
    """File → sha256."""
    kinds: Json = field(default_factory=dict)
    """Kind of module → how many stand in the model."""

    @property
    def model(self) -> str:
        """The dense model's name; where its folder lay is nobody's business."""
        return named(str(self.report["model"]))[0]

    @property
    def evaluation(self) -> Json:
        return self.report.get("evaluation") or {}

    @property
    def methods(self) -> str:
        done = self.report.get("steps") or []
        if done:
            return " → ".join(str(step.get("name", "")) for step in done)
        # a run that is still going, or of a release that did not list its steps
        asked = (self.report.get("recipe") or {}).get("step") or []
        names = [next((step[verb] for verb in VERBS if step.get(verb)), "") for step in asked]
        return " → ".join(" + ".join(map(str, name)) if isinstance(name, list) else str(name) for name in names)


@dataclass(frozen=True)
class Benched:
    """The rows of a bench, and what produced them."""

    name: str
    rows: Sequence[Json]
    content: Json
    """All that the file holds beside its rows: command, machine, versions."""


@dataclass(frozen=True)
class Given:
    """All that one page shows."""

    runs: tuple[Run, ...] = ()
    benches: tuple[Benched, ...] = ()


@dataclass(frozen=True)
class _Text:
    perplexity: float
    dense_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class _Evaluation:
    """What must be so of an evaluation; there may be more."""

    texts: list[_Text] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    speed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Manifest:
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Config:
    quantization_config: _Manifest | None = None


def read_given(paths: Sequence[Path]) -> Given:
    """Folders of ours, JSON of ``tersely bench``, and JSON of ``tersely eval``, which joins the folder it was made of;
    that of a dense model joins all runs that were made from it, as what their speed and tasks are compared with.

    Raises CheckpointError for a folder that tersely did not write or did not finish, RecipeError for a file that is
    none of these or that belongs to no folder given.
    """
    folders = [path for path in paths if path.is_dir()]
    runs = {folder.resolve(): _read_run(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)}
    benches, evaluations = [], []
    for path in paths:
        if path.is_dir():
            continue
        content = read_json(path)
        if isinstance(content.get("rows"), list):
            rest = {key: value for key, value in content.items() if key != "rows"}
            benches.append(Benched(path.stem, content["rows"], rest))
        elif "parameters" in content:
            _check(path, content, _Evaluation)
            evaluations.append((path, content))
        else:
            raise RecipeError(f"{path} holds neither the rows of a bench nor an evaluation")
    of_dense = []
    for path, content in evaluations:
        made_from = [run for run in runs.values() if _is_model(content.get("model"), run.report["model"])]
        if made_from:
            of_dense.append(content)  # after the others, which it is compared with
            continue
        place = _place_of(Path(str(content.get("model", ""))), path, list(runs))
        runs[place] = _joined(runs[place], content)
    for content in of_dense:
        for place, run in runs.items():
            if _is_model(content.get("model"), run.report["model"]):
                runs[place] = _beside_dense(run, content)
    return Given(tuple(runs.values()), tuple(benches))


def run_of(report: Json) -> Run:
    """A run whose folder is still being written."""
    name = named(str(report["model"]))[0]
    return Run(name, report)


def _read_run(folder: Path, label: str) -> Run:
    report = read_report(folder)
    recipe, plan, sums = folder / "recipe.toml", folder / "plan.json", folder / "checksums.json"
    return Run(
        name=label,
        report=report,
        folder=folder,
        nbytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        plan=read_json(plan) if plan.is_file() else None,
        checksums=read_json(sums) if sums.is_file() else {},
        kinds=_kinds(folder),
    )


def read_report(folder: Path) -> dict[str, Any]:
    """The content of ``report.json``.  Raises CheckpointError where there is none, or it is not one."""
    path = folder / "report.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no report.json; give a folder that tersely wrote and finished")
    content = read_json(path)
    _check(path, content, Report)
    _check(path, content.get("evaluation") or {}, _Evaluation)
    return content


def _check(path: Path, content: Json, wanted: type) -> None:
    """Raises CheckpointError where the content of a file of ours is not what its readers count on."""
    try:
        TypeAdapter(wanted).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {place}: {first['msg']}; {AGAIN}") from error


def read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise RecipeError(f"{path}: no such file or folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read as JSON ({error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: wanted an object, came {type(content).__name__}; {AGAIN}")
    return content


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for parts in range(1, 10):
        labels = ["/".join(folder.resolve().parts[-parts:]) for folder in folders]
        if len(set(labels)) == len(labels):
            return labels
    return [str(folder) for folder in folders]


def _kinds(folder: Path) -> dict[str, int]:
    config = folder / "config.json"
    plain = read_json(config) if config.is_file() else {}
    _check(config, plain, _Config)
    modules = (plain.get("quantization_config") or {}).get("modules") or {}
    return dict(Counter(str(spec.get("kind")) for spec in modules.values()))


def _is_model(first: Any, second: Any) -> bool:
    """Whether two names, or two paths, are of one model."""
    return first == second or (Path(str(first)).exists() and Path(str(first)).resolve() == Path(str(second)).resolve())


def _beside_dense(run: Run, evaluation: Json) -> Run:
    """With what was measured of the dense model: its speed, its tasks, its perplexities under equal protocols."""
    own = dict(run.evaluation)
    if evaluation.get("speed"):
        own["dense_speed"] = evaluation["speed"]
    tasks = {_asked(task): task.get("value") for task in evaluation.get("tasks") or []}
    if own.get("tasks"):
        own["tasks"] = [{"dense_value": tasks.get(_asked(task)), **task} for task in own["tasks"]]
    texts = {protocol_of(text): text.get("perplexity") for text in evaluation.get("texts") or []}
    if own.get("texts"):
        own["texts"] = [{"dense_perplexity": texts.get(protocol_of(text)), **text} for text in own["texts"]]
    return replace(run, report={**run.report, "evaluation": own})


def _asked(task: Json) -> tuple[Any, ...]:
    return task.get("task"), task.get("metric"), task.get("n")


def _place_of(model: Path, evaluation: Path, given: Sequence[Path]) -> Path:
    """The given folder that was evaluated: the path may have been relative to another place than this one."""
    for place in (model.resolve(), (evaluation.parent / model).resolve()):
        if place in given:
            return place
    alike = [place for place in given if place.name == model.name]
    if len(alike) == 1:
        return alike[0]
    raise RecipeError(
        f"{evaluation} is an evaluation of {model}, and a page is of folders that tersely wrote: give `tersely report "
        f"{model} {evaluation}`, or, if that is a dense model, the folders that were made from it"
    )


def _joined(run: Run, evaluation: Json) -> Run:
    """What the run itself measured stays; of a text under the same protocol, only what it did not measure is added."""
    own = dict(run.evaluation)
    found = {protocol_of(text): text for text in evaluation.get("texts") or []}
    texts = [found.pop(protocol_of(text), {}) | text for text in own.get("texts") or []] + list(found.values())
    joined = {**evaluation, **own} | ({"texts": texts} if texts else {})
    return replace(run, report={**run.report, "evaluation": joined})


PROTOCOL = (
    "sha256", "protocol", "length", "stride", "first_token", "dtype", "windows", "tokens", "definition", "departures",
)  # fmt: skip
"""What must be equal for two perplexities to be compared."""


OURS = "tersely"
"""The protocol of whatever names none."""


def protocol_of(text: Json) -> tuple[Any, ...]:
    """Of a measured text, or of a row of a bench, which holds it one level down."""
    inner = text.get("protocol")
    said = inner if isinstance(inner, Mapping) else text
    return tuple(json.dumps(said.get(key, OURS if key == "protocol" else None), sort_keys=True) for key in PROTOCOL)

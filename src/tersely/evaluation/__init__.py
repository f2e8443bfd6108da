"""Does it still work, and what has it become?  Perplexity, agreement with the dense model, speed, memory, size.

`evaluate` returns plain JSON.  A field that was not measured is absent: a zero or a null would be read as a result.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tersely.errors import RecipeError
from tersely.evaluation.agreement import Agreement, measure_agreement, measure_windows, require_comparable
from tersely.evaluation.comparison import recorded_perplexity, recorded_rows, require_same_protocol
from tersely.evaluation.drift import Drift, measure_drift
from tersely.evaluation.harness import measure_named_tasks, require_harness
from tersely.evaluation.memory import folder_bytes, parameter_count, weight_bytes
from tersely.evaluation.paired import Paired, paired, paired_over
from tersely.evaluation.passages import Passages, passages
from tersely.evaluation.perplexity import (
    Progress,
    Protocol,
    Recalled,
    Windows,
    cut,
    measure_perplexity,
    perplexity_of,
    require_causal,
    window_losses,
)
from tersely.evaluation.protocols import PROTOCOLS, NamedProtocol, protocol_named
from tersely.evaluation.samples import Sample, continue_prompts
from tersely.evaluation.speed import BatchSpeed, Rate, Speed, Throughput, measure_batches, measure_speed
from tersely.evaluation.task_formats import Task, is_task_file, read_task
from tersely.evaluation.tasks import measure_task
from tersely.evaluation.texts import measure_text
from tersely.memory import Peak, peak_memory, peak_within, resident_memory
from tersely.text import read_rows, read_text

__all__ = [
    "PROTOCOLS",
    "Agreement",
    "BatchSpeed",
    "Drift",
    "NamedProtocol",
    "Paired",
    "Passages",
    "Peak",
    "Protocol",
    "Rate",
    "Recalled",
    "Sample",
    "Speed",
    "Task",
    "Throughput",
    "Windows",
    "continue_prompts",
    "cut",
    "evaluate",
    "folder_bytes",
    "is_task_file",
    "measure_agreement",
    "measure_batches",
    "measure_drift",
    "measure_named_tasks",
    "measure_perplexity",
    "measure_speed",
    "measure_task",
    "measure_text",
    "measure_windows",
    "paired",
    "paired_over",
    "parameter_count",
    "passages",
    "peak_memory",
    "peak_within",
    "perplexity_of",
    "protocol_named",
    "read_task",
    "recorded_perplexity",
    "recorded_rows",
    "require_same_protocol",
    "resident_memory",
    "weight_bytes",
    "window_losses",
]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    length: int | None = None,
    stride: int | None = None,
    first_token: bool = False,
    windows: int | None = None,
    protocol: str | None = None,
    against: PreTrainedModel | None = None,
    recorded: Path | None = None,
    tasks: Sequence[str] = (),
    questions: int | None = None,
    drift: bool = False,
    prompts: Sequence[str] = (),
    speed: bool = False,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Measure a model; the keys of the result are those of ``tersely eval --json``.

    `texts` are sources as `tersely.text.read_text` takes them.  `length` and `stride` are in tokens, `windows` keeps
    the first so many of each text.  `protocol` names one of `PROTOCOLS`, by which the perplexities of a paper's code
    are computed, instead of our own; it has its own stride and first token.

    `against` is the dense model: with it come `dense_perplexity`, `kl` and `top1`, with `drift` the `drift` of the
    hidden states by depth.  `recorded`, instead of it, is the JSON of an evaluation of the dense model: with it comes
    `dense_perplexity`, if that was measured by the same protocol.

    `tasks` are files of questions (see `task_formats`) or names of lm-eval, `questions` keeps the first so many of
    each.  `prompts` are continued, by both models.  `folder` is where the model lies: with it come its `bytes`.
    `progress` is called with one line after every batch.

    Everything that can be refused is refused before anything is measured.  The model is left as it was.

    Raises RecipeError for a text, a length, a task or a model that cannot be used, and for a comparison of numbers of
    different protocols; NumericalError for numbers that are not finite.
    """
    require_causal(model)
    if against is not None:
        require_comparable(model, against)
    if drift and against is None:
        raise RecipeError("drift by depth is drift from the dense model; say which that is")
    if against is not None and recorded is not None:
        raise RecipeError("the dense model is given and a recorded evaluation, too; give one of them")
    named = None if protocol is None else _named_protocol(protocol, model, stride)
    ours, theirs = [task for task in tasks if is_task_file(task)], [task for task in tasks if not is_task_file(task)]
    if theirs:
        require_harness()
    opened = [read_task(task, questions) for task in ours]
    result: dict[str, object] = {}
    if name := str(folder) if folder is not None else model.name_or_path:
        result["model"] = name
    if folder is not None:
        result["bytes"] = folder_bytes(folder)
    result["parameters"] = parameter_count(model)
    cuts: Sequence[Windows | Passages]
    if named is not None:
        cuts = [
            passages(
                read_rows(source, splits=named.splits), named, tokenizer, model.config, length=length, limit=windows
            )
            for source in texts
        ]
    else:
        cuts = [
            cut(
                read_text(source, "evaluation"),
                tokenizer,
                model.config,
                length=length,
                stride=stride,
                first_token=first_token,
                limit=windows,
            )
            for source in texts
        ]
    rows = [_described(one, model) for one in cuts]
    if recorded is not None:
        known = recorded_rows(recorded)
        for row in rows:
            row["dense_perplexity"] = recorded_perplexity(row, known, str(recorded))
            row["dense_recorded_in"] = str(recorded)
    # before the texts, since the logits of an evaluation would be the peak of memory, and serving has none of them
    measured_speed = _speed(model) if speed else None
    for row, one in zip(rows, cuts, strict=True):
        row |= measure_text(model, against, one, progress)
        if drift and against is not None:
            row["drift"] = [asdict(behind) for behind in measure_drift(model, against, one, progress)]
    if rows:
        result["texts"] = rows
    answered = [row for task in opened for row in measure_task(model, tokenizer, task, progress)]
    if theirs:
        answered += measure_named_tasks(model, tokenizer, theirs, limit=questions, progress=progress)
    if answered:
        result["tasks"] = answered
    if measured_speed is not None:
        result["speed"] = measured_speed
    if prompts:
        said = [asdict(one) for one in continue_prompts(model, against, tokenizer, prompts)]
        result["samples"] = [{key: value for key, value in one.items() if value is not None} for one in said]
    return result


def _named_protocol(name: str, model: PreTrainedModel, stride: int | None) -> NamedProtocol:
    named = protocol_named(name)
    if stride is not None:
        raise RecipeError(f"protocol {name} has a stride of its own; give --stride without a protocol")
    dtype = str(model.dtype).removeprefix("torch.")
    if named.dtype is not None and named.dtype != dtype:
        raise RecipeError(f"protocol {name} casts the model to {named.dtype}, it is in {dtype}; open it in that dtype")
    return named


def _described(one: Windows | Passages, model: PreTrainedModel) -> dict[str, Any]:
    if isinstance(one, Passages):
        return one.describe(model)
    revision = {} if one.text.revision is None else {"revision": one.text.revision}
    return asdict(one.protocol(model)) | revision


def _speed(model: PreTrainedModel) -> dict[str, Any]:
    """The short account first, whose peak of memory the longer one would change."""
    short, long = measure_speed(model), measure_batches(model)
    figures = {
        "prefill_tokens_per_second": short.prefill.tokens_per_second,
        "decode_tokens_per_second": short.decode.tokens_per_second,
        "peak_bytes": short.peak_bytes,
        "batches": [asdict(one) for one in long.batches],
        "weight_bytes": long.weight_bytes,
    }
    return figures if long.resident_bytes is None else figures | {"resident_bytes": long.resident_bytes}

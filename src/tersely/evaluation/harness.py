"""Tasks by name: the definitions and data of lm-eval, asked of a model that tersely has opened.

What is measured is lm-eval's own; this file hands over the model, which opens like any other once it is in memory, and
turns the answer into our rows.  The harness is an extra, and its data sets come from the hub.

Source: Gao et al., The Language Model Evaluation Harness, 2024 (10.5281/zenodo.12608602).
"""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tersely.errors import RecipeError
from tersely.evaluation.paired import NORMAL_QUANTILE
from tersely.evaluation.perplexity import Progress, require_causal, undisturbed

BATCH = 8
"""Sequences at once; scores do not depend on it beyond rounding."""


def require_harness() -> Any:
    """The library, or RecipeError with the command that installs it."""
    try:
        import lm_eval
        from lm_eval.models import huggingface  # noqa: F401  its own dependencies, too
    except ImportError as error:
        raise RecipeError(
            f"tasks by name are those of lm-eval, which is not here ({error}); install the extra: "
            "pip install 'tersely[lm-eval]', or give a file of questions"
        ) from error
    return lm_eval


def measure_named_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """One row for each metric of each task, groups included.  `limit` keeps the first so many questions of each.

    Raises RecipeError where lm-eval is absent, does not know a task, or cannot load its data.
    """
    harness = require_harness()
    require_causal(model)
    known = harness.tasks.TaskManager()
    if missing := [name for name in names if not known.match_tasks([name])]:
        raise RecipeError(f"no file and no task of lm-eval: {', '.join(missing)}; `lm-eval ls tasks` shows them")
    if progress is not None:
        progress(f"lm-eval on {', '.join(names)}", 0, 1)
    with undisturbed(model):
        wrapped = harness.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
        try:
            found = harness.simple_evaluate(
                model=wrapped, tasks=list(names), limit=limit, task_manager=known, log_samples=False
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise RecipeError(f"lm-eval cannot measure {', '.join(names)}: {reason}") from error
    if progress is not None:
        progress(f"lm-eval on {', '.join(names)}", 1, 1)
    return rows_of(found)


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows out of lm-eval's result: its keys are ``metric,filter`` and ``metric_stderr,filter``."""
    version = importlib.metadata.version("lm-eval")
    rows = []
    for task, figures in found["results"].items():
        counted = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in figures.items():
            metric, is_metric, filtered = key.partition(",")
            if not is_metric or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            row: dict[str, Any] = {"task": task, "metric": metric, "value": float(value)}
            error = figures.get(f"{metric}_stderr,{filtered}")
            if isinstance(error, int | float):
                reach = NORMAL_QUANTILE * error
                row |= {"stderr": float(error), "interval": [value - reach, value + reach]}
            if counted is not None:
                row["n"] = counted
            if filtered != "none":
                row["filter"] = filtered
            rows.append(row | {"source": f"lm-eval {version}"})
    return rows

"""Does it still work, and what has it become?  Perplexity, agreement with the dense model, speed, memory, size.

`evaluate` returns plain JSON.  A field that was not measured is absent: a zero or a null would be read as a result.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tersely.evaluation.agreement import Agreement, measure_agreement, require_comparable
from tersely.evaluation.memory import Peak, folder_bytes, parameter_count, peak_memory, peak_within
from tersely.evaluation.paired import Paired, paired, paired_over
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
from tersely.evaluation.speed import Rate, Speed, measure_speed
from tersely.text import read_text

__all__ = [
    "Agreement",
    "Paired",
    "Peak",
    "Protocol",
    "Rate",
    "Recalled",
    "Speed",
    "Windows",
    "cut",
    "evaluate",
    "folder_bytes",
    "measure_agreement",
    "measure_perplexity",
    "measure_speed",
    "paired",
    "paired_over",
    "parameter_count",
    "peak_memory",
    "peak_within",
    "perplexity_of",
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
    against: PreTrainedModel | None = None,
    speed: bool = False,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Measure a model; the keys of the result are those of ``tersely eval --json``.

    `texts` are sources as `tersely.text.read_text` takes them.  `length` and `stride` are in tokens, `windows` keeps
    the first so many of each text.  `against` is the dense model: with it come `dense_perplexity`, `kl` and `top1`.
    `folder` is where the model lies: with it come its `bytes`.  `progress` is called with one line after every batch.

    Everything that can be refused is refused before anything is measured.  The model is left as it was.

    Raises RecipeError for a text, a length or a model that cannot be used, NumericalError for numbers that are not
    finite.
    """
    require_causal(model)
    if against is not None:
        require_comparable(model, against)
    result: dict[str, object] = {}
    if name := str(folder) if folder is not None else model.name_or_path:
        result["model"] = name
    if folder is not None:
        result["bytes"] = folder_bytes(folder)
    result["parameters"] = parameter_count(model)
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
    # before the texts, since the logits of an evaluation would be the peak of memory, and serving has none of them
    measured_speed = measure_speed(model) if speed else None
    if cuts:
        result["texts"] = [asdict(one.protocol(model)) | _figures(model, against, one, progress) for one in cuts]
    if measured_speed is not None:
        result["speed"] = {
            "prefill_tokens_per_second": measured_speed.prefill.tokens_per_second,
            "decode_tokens_per_second": measured_speed.decode.tokens_per_second,
            "peak_bytes": measured_speed.peak_bytes,
        }
    return result


def _figures(
    model: PreTrainedModel, against: PreTrainedModel | None, windows: Windows, progress: Progress | None
) -> dict[str, float]:
    if against is None:
        return {"perplexity": measure_perplexity(model, windows, progress)}
    return asdict(measure_agreement(model, against, windows, progress))

"""Calibration windows that a model writes itself.

What is cut by what a calibration text excites is cut for that text, and a text has one domain.  What a model was
trained on is mostly not to be had; but the model remembers it, and whoever draws one token after the other

    x_1 ~ p(. | start),   x_{t+1} ~ p(. | start, x_1, …, x_t)

from its own predictions, at temperature 1 and with nothing cut off, has a sample of what the model takes language to
be: of all its domains, each as often as the model met it.  It needs no data, and knows none that the model does not.
A share of the windows is enough (`own_text` of `[calibration]`); the others show what real text is like, which few
models write without fault.

Windows hold no special token, as those of a text do not, so that none is ever drawn; `start` is the token that texts
begin with, or the one that they end with.  Numbers depend on the seed alone; since a draw may fall on the other side of
a rounding with other threads or another device, they are a unit of the journal, and lie beside shared statistics.

Sources: Liu et al., LLM-QAT, 2023 (arXiv 2305.17888), who train on such text; Williams, Chrysostomou and Aletras,
Self-calibration for Language Model Quantization and Pruning, 2024 (arXiv 2410.17170), who calibrate on nothing else.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tersely.checkpoint import Source
from tersely.errors import RecipeError
from tersely.generate import draw
from tersely.gradients import whole_model
from tersely.journal import Journal, commit_tensors, read_tensors, reading

ROWS = 16
"""Windows that are written side by side.  Always as many, so that the first ones of more are the same."""

UNIT = "own_text.safetensors"
FORM = 1
"""How windows are written: those that were written otherwise are written anew."""


def start_token(tokenizer: Any) -> int:
    """What a model writes behind.  Raises RecipeError for a tokenizer without such a token."""
    found: int | None = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise RecipeError(
            "own_text: a model writes behind the token that texts begin or end with, and this tokenizer has neither "
            "bos_token nor eos_token; set own_text = 0"
        )
    return found


def write(
    source: Source,
    tokenizer: Any,
    shape: tuple[int, int],
    seed: int,
    first_token: int | None,
    device: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Int[Tensor, "windows length"]:
    """Token numbers of windows of this shape, ``(windows, length)``.

    `first_token`: the one that the model needs at the start of every text, which then begins each window as in those of
    a text.  The whole model is in memory meanwhile, and the keys and values of `ROWS` windows.  Raises NumericalError
    for predictions that are not finite, RecipeError as `start_token` does.
    """
    windows, length = shape
    start = start_token(tokenizer) if first_token is None else first_token
    model = whole_model(source, device).eval()
    never = {*tokenizer.all_special_ids, *range(len(tokenizer), model.config.get_text_config().vocab_size)}
    begins = [] if first_token is None else [first_token]
    written = [torch.empty(0, length, dtype=torch.long)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for done in range(0, windows, ROWS):
            progress(done, windows)
            drawn = draw(model, start, ROWS, length - len(begins), never).cpu()
            written.append(torch.cat([drawn.new_tensor(begins).expand(ROWS, -1), drawn], dim=1))
    progress(windows, windows)
    return torch.cat(written)[:windows]


def kept(place: Path | None, journal: Journal, writes: Callable[[], Tensor]) -> Tensor:
    """Windows of a run: from its journal, else from a file beside shared statistics, else written (and kept in
    both)."""
    if not journal.has(UNIT):
        if place is None:
            tokens = writes()
        else:
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                commit_tensors(place, {"tokens": writes()})
            with reading(place, shared=True):
                tokens = read_tensors(place)["tokens"]
        journal.write_tensors(UNIT, {"tokens": tokens})
    return journal.read_tensors(UNIT)["tokens"]


def file_name(*depends: object) -> str:
    """Of windows beside shared statistics, from all that they depend on."""
    return f"own_text-{hashlib.sha256(repr((FORM, depends)).encode()).hexdigest()[:16]}.safetensors"

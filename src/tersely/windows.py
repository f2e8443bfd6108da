"""Calibration windows: which pieces of which texts a model is shown."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tersely.errors import RecipeError
from tersely.recipe import Calibration
from tersely.text import SEPARATOR, Text, check_vocabulary, read_text, tokenise, window_length

ENOUGH = 8
"""Tokens per channel of the widest input below which a Gram matrix is a poor estimate, and a warning is given."""


@dataclass(frozen=True)
class Windows:
    """Calibration windows and where they came from."""

    tokens: Tensor  # [samples, length]
    sources: tuple[str, ...]
    sha256: str
    available: int
    own: int = 0
    """Windows that the model itself writes, which stand last once it has; the checksum is that of the text."""

    def describe(self) -> dict[str, Any]:
        """For reports, once the model has written its own."""
        samples, length = self.tokens.shape
        plain = {k: v for k, v in asdict(self).items() if k != "tokens"}
        if self.own:
            own = self.tokens[-self.own :].contiguous().numpy().tobytes()
            plain["own_sha256"] = hashlib.sha256(own).hexdigest()
        return plain | {"samples": samples, "length": length, "tokens": samples * length}

    def shortage(self, width: int) -> str | None:
        """The warning for too few tokens, those counted that the model is to write, or None."""
        tokens = (len(self.tokens) + self.own) * self.tokens.shape[1]
        if tokens >= ENOUGH * width:
            return None
        return (
            f"{tokens} calibration tokens for inputs of width {width}: {tokens / width:.1f} per channel, where "
            f"{ENOUGH} or more are wanted; give more text or more samples"
        )


def read_windows(asked: Calibration, tokenizer: Any, config: Any, seed: int, first_token: int | None) -> Windows:
    """Cut the calibration text into windows of token numbers, without those that the model is to write.

    `first_token`: number of the token that the model needs at the start of every text, or None; it takes the place of
    the first token of each window.  Raises RecipeError for a text with less than one window.
    """
    length = window_length(config, asked.length)
    texts = [read_text(source, "calibration") for source in asked.source]
    text = Text(" ".join(asked.source), SEPARATOR.join(text.content for text in texts))
    tokens = tokenise(text.content, tokenizer)
    check_vocabulary(tokens, config)
    count = len(tokens) // length
    if count == 0:
        raise RecipeError(
            f"calibration text {text.source} has {len(tokens)} tokens, a window takes {length}; give more text, or a "
            "shorter --length"
        )
    windows = tokens[: count * length].view(count, length)
    drawn = asked.samples - asked.written()
    if asked.order == "random":
        generator = torch.Generator().manual_seed(seed)
        # sorted: neighbours in the text stay neighbours on disk and in batches; the sum over windows does not care
        windows = windows[torch.randperm(count, generator=generator)[:drawn].sort().values]
    else:
        windows = windows[:drawn]
    if first_token is not None:
        windows = torch.cat([windows.new_full((len(windows), 1), first_token), windows[:, 1:]], dim=1)
    own = asked.written(len(windows))
    return Windows(windows.contiguous(), tuple(asked.source), text.sha256, count, own)

"""Which blocks do little: what comes out of them is nearly what went in.

Let h_l be the hidden state of a token before block l, and the angle of two states arccos(cos(a, b)) / π, between 0 for
the same direction and 1 for opposite ones.

    influence   1 - E cos(h_l, h_{l+1})     of a block; 0 where it changes nothing but lengths
    growth      E ‖h_{l+1}‖ / ‖h_l‖         of the lengths
    distance    E angle(h_l, h_{l+n})       of n blocks in a row; of all places where they could begin, the one where it
                                            is least: the n blocks that could go first

An angle is a metric, so that a row of blocks turns a state no further than its blocks do one by one; it may turn it
less, where one block undoes what another did.

The first blocks often look idle for all tokens but the first, or busy since embeddings are short; neither figure knows
what later blocks make of a small difference.  The allocator `block_influence` goes by the first one, measured on at
most 32 windows.

Source: Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2024
(arXiv 2403.03853), for the influence; Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, 2024
(arXiv 2403.17887), for the distance, there of the last token of each text.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tersely.calibrate import Blocks, Replay
from tersely.diagnose.base import Row, Subject, row

KEPT = 1024
"""Tokens, spread evenly over all, whose states are kept for the distances: before every block one set."""


def look(subject: Subject) -> list[Row]:
    """Every block, and every number of blocks in a row.  One block and two hidden states of every token at a time."""
    blocks = Blocks(subject.source, subject.anatomy, subject.device)
    replay = Replay(subject.source, subject.anatomy, subject.windows, subject.device)
    rows: list[Row] = []
    states: list[Tensor] = []
    for index, name in enumerate(subject.anatomy.blocks):
        through = replay.advance(blocks.dense(index))
        rows += _of_block(name, through)
        states += [_some([read for read, _ in through])] if not states else []
        states.append(_some([given for _, given in through]))
    return rows + _of_rows(states)


def angle(first: Float[Tensor, "tokens width"], second: Float[Tensor, "tokens width"]) -> Float[Tensor, " tokens"]:
    """In half turns."""
    return cosine_similarity(first.double(), second.double(), dim=-1).clamp(-1, 1).arccos() / math.pi


def _some(stream: Sequence[Tensor]) -> Float[Tensor, "kept width"]:
    tokens = torch.cat([states.flatten(0, -2) for states in stream])
    return tokens[torch.linspace(0, len(tokens) - 1, min(KEPT, len(tokens))).round().long()]


def _of_block(name: str, through: Sequence[tuple[Tensor, Tensor]]) -> list[Row]:
    cosines, growths = [], []
    for read, given in through:
        cosines.append(cosine_similarity(read.double(), given.double(), dim=-1).flatten())
        growths.append((given.double().norm(dim=-1) / read.double().norm(dim=-1)).flatten())
    growth = torch.cat(growths).mean().item()
    return [
        row(name, "influence", 1 - torch.cat(cosines).mean().item()),
        row(name, "growth", growth if math.isfinite(growth) else None),  # a state of length zero grows beyond measure
    ]


def _of_rows(states: Sequence[Tensor]) -> list[Row]:
    rows = []
    for count in range(1, len(states) - 1):
        distances = [angle(a, b).mean().item() for a, b in zip(states, states[count:], strict=False)]
        name, least = f"{count} in a row", min(distances)
        rows += [row(name, "least distance", least, "half turns"), row(name, "from block", distances.index(least))]
    return rows

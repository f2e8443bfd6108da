"""Where in the depth of a model does what it computes leave the dense model's path?

Every block adds to the stream of hidden states.  With h_l the stream behind block l of the dense model and h'_l that of
the compressed one, over the tokens t of some text,

    relative error_l = √( Σ_t ‖h'_lt - h_lt‖² / Σ_t ‖h_lt‖² )        cosine_l = mean over t of cos(h'_lt, h_lt)

The error grows with depth, since every block hands on what it was given and adds its own; a jump points at the block
that did it.  A few tokens (often the first of a window) have states a hundred times as long as the others and decide
the first figure; the second counts all tokens alike.

The streams have to be in one basis: a model that was rotated or whose width was cut has drifted by neither figure.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tersely.anatomy import anatomy_of
from tersely.errors import NumericalError, RecipeError
from tersely.evaluation.agreement import require_comparable
from tersely.evaluation.perplexity import Fed, Progress, undisturbed

TOKENS = 2**14
"""Of the text, at most; the figures are means over so many numbers that more tell no more."""

Hidden = Float[Tensor, "windows positions width"]


@dataclass(frozen=True)
class Drift:
    """Behind one block, counted from 0."""

    block: int
    relative_error: float
    cosine: float


def measure_drift(
    model: PreTrainedModel, dense: PreTrainedModel, fed: Fed, progress: Progress | None = None
) -> list[Drift]:
    """Drift behind every block, on the first `TOKENS` tokens of a text.

    Raises RecipeError where blocks or the width of the stream are not the dense model's, NumericalError for a state
    that is not finite, and for a stream of zeros, which has no relative error.
    """
    require_comparable(model, dense)
    paths = anatomy_of(dense).blocks
    pairs = [_block(one, path) for path in paths for one in (model, dense)]
    sums = torch.zeros(len(paths), 3, dtype=torch.float64)  # ‖h' - h‖², ‖h‖², cosine
    seen = 0
    with undisturbed(model), undisturbed(dense), _noting(pairs) as noted:
        for numbers, _ in fed.batches():
            tokens = fed.tokens(numbers)
            for one in (model, dense):
                one(input_ids=tokens.to(one.device), use_cache=False, logits_to_keep=1)
            for depth in range(len(paths)):
                sums[depth] += _sums(noted[2 * depth], noted[2 * depth + 1], depth)
            seen += tokens.numel()
            if progress is not None:
                progress(f"drift on {fed.text.source}", min(seen, TOKENS), TOKENS)
            if seen >= TOKENS:
                break
    if progress is not None and seen < TOKENS:
        progress(f"drift on {fed.text.source}", seen, seen)  # all there is
    if not sums[:, 1].all():
        raise NumericalError(f"block {int((sums[:, 1] == 0).nonzero()[0])}: the dense model's stream is zero")
    errors, cosines = (sums[:, 0] / sums[:, 1]).sqrt(), sums[:, 2] / seen
    return [Drift(depth, float(errors[depth]), float(cosines[depth])) for depth in range(len(paths))]


def _block(model: PreTrainedModel, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise RecipeError(f"drift by depth: the model has no block {path}, which the dense one has") from error


@contextmanager
def _noting(blocks: list[nn.Module]) -> Iterator[dict[int, Hidden]]:
    """The latest output of every block, by its number."""
    noted: dict[int, Hidden] = {}

    def note(number: int, output: object) -> None:
        state = output[0] if isinstance(output, tuple) else output
        assert isinstance(state, Tensor)
        noted[number] = state

    handles = [
        block.register_forward_hook(lambda module, given, output, number=number: note(number, output))
        for number, block in enumerate(blocks)
    ]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


def _sums(state: Hidden, dense: Hidden, depth: int) -> Float[Tensor, " figures"]:
    if state.shape != dense.shape:
        raise RecipeError(
            f"drift by depth: the stream behind block {depth} is {state.shape[-1]} wide, the dense one "
            f"{dense.shape[-1]}; there is nothing to compare"
        )
    first, second = state.to(dense.device).double(), dense.double()
    sums = torch.stack(
        [
            (first - second).square().sum(),
            second.square().sum(),
            nn.functional.cosine_similarity(first, second, dim=-1).sum(),
        ]
    )
    if not sums.isfinite().all():
        raise NumericalError(f"block {depth}: a hidden state is not finite")
    return sums.cpu()

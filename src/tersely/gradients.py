"""How the loss feels the linears of a model: one backward pass over the calibration windows.

Inputs can be observed block by block.  Gradients cannot: what an output of the first block does to the loss is known
only after the last one.  So the whole dense model is in memory once, with its weights as they are, and each batch of
windows goes through it forward and backward.  The loss of a window is the cross entropy of every next token in it,
added up (nats); windows do not see each other, so that the gradient of the sum over a batch is each one's own.

Weights are frozen.  The first hidden state is what gradients are asked of; on the way to it they pass the output of
every linear, where a hook shows them to the statistics and lets them go.  The gradient in a weight is formed there,
window by window, as Σ g xᵀ over tokens.

Gradients of outputs (K-FAC's, `stats.OutputGram`) are taken as the authors of KFAC-SVD take them: the first and last
eighth of every window is left out (early tokens know too little, the last ones have hardly anything after them to
matter for), and the norm of a token's gradient is brought between a tenth and ten times the mean over its window, since
second moments would otherwise be those of a few tokens.  Ours are clipped within a window, which makes batches of any
size give the same numbers.  Gradients of weights are left as they are.

Source: Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, 2015
(arXiv 1503.05671); margins and clipping after Thoma et al., Advancing SVD-based LLM Compression via Layer-Wise Error
Model Search, 2026 (ICML), and their code.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from tersely.anatomy import Anatomy, Site
from tersely.calibrate import StatisticsStore
from tersely.checkpoint import Source
from tersely.errors import AnatomyError, NumericalError
from tersely.stats import Statistic, Stats, keyed_by

TOKENS_AT_ONCE = 2048
"""Tokens in a batch, at least one window: all activations of the model are held for them."""

MARGIN = 8
"""One part in so many of a window is left out at either end of the gradients in outputs."""

CLIP = (0.1, 10.0)
"""Least and largest norm of a token's gradient, as multiples of the mean norm in its window."""

Progress = Callable[[str, int, int], None]

Shown = Callable[[str, Tensor, Tensor, bool], None]
"""Told of every use of a linear: its name, what it read ``[windows, length, in]``, the gradient in its output
``[windows, length, out]``, and whether this is the last use in this batch."""


class GradientStatistics:
    """Statistics of gradients of the dense model, on disk: gathered for all blocks at once, when the first is asked for
    that is not there."""

    def __init__(
        self,
        source: Source,
        anatomy: Anatomy,
        sites: Sequence[Site],
        kinds: Sequence[type[Statistic]],
        windows: Tensor,
        store: StatisticsStore,
        device: str,
        progress: Progress,
    ) -> None:
        """`sites`: those that will be asked for; a shared store is given all of the model."""
        self._source = source
        self._anatomy = anatomy
        self._sites = tuple(anatomy.sites if store.shared else sites)
        self._kinds = tuple(kinds)
        self._windows = windows
        self._store = store
        self._device = device
        self._progress = progress

    def of_block(self, index: int) -> dict[str, Stats]:
        """Name of a site → its statistics."""
        if not any(site.block == index for site in self._sites):
            return {}
        if not self._store.has(index, self._kinds):
            self._gather()
        return self._store.read(index, self._kinds, self._device)

    def _gather(self) -> None:
        found = gather(
            self._source, self._anatomy, self._sites, self._kinds, self._windows, self._device, self._progress
        )
        for index in sorted({site.block for site in self._sites}):
            self._store.write(index, {site.name: found[site.name] for site in self._sites if site.block == index})


def gather(
    source: Source,
    anatomy: Anatomy,
    sites: Sequence[Site],
    kinds: Sequence[type[Statistic]],
    windows: Tensor,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Stats]:
    """Name of each site → statistics of the gradients in its output and in its weight, over `windows`
    ``[samples, length]`` of token numbers.

    Raises AnatomyError for a model that predicts no next token, and for a site that no gradient reaches; NumericalError
    where the loss or a gradient is not finite.
    """
    stats = {site.name: Stats({kind: kind(_width(kind, site), device) for kind in kinds}) for site in sites}
    so_far: dict[str, list[Tensor]] = {}

    def show(name: str, x: Tensor, gradient: Tensor, last: bool) -> None:
        so_far[name] = _show(stats[name], x, gradient, so_far.pop(name, []), last=last)

    go_back(whole_model(source, device), anatomy, list(stats), windows, show, progress)
    return stats


def go_back(
    model: Any,
    anatomy: Anatomy,
    names: Sequence[str],
    windows: Tensor,
    show: Shown,
    progress: Progress | None = None,
) -> None:
    """Take `windows` ``[samples, length]`` of token numbers forward and backward through a `whole_model`, and show what
    every linear of these names read and what its output does to the loss.  Raises as `gather` does."""
    device = model.device
    _require_causal(model, windows[:1].to(device))
    batches = windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1]))
    if progress is not None:
        progress("gradients of batches", 0, len(batches))
    for number, rows in enumerate(batches):
        _go_back(model, anatomy, names, rows.to(device), number, show)
        if progress is not None:
            progress("gradients of batches", number + 1, len(batches))


def _width(kind: type[Statistic], site: Site) -> int:
    whole = site.out_features * site.in_features
    return {"output": site.out_features, "weight": site.in_features, "flat": whole}[keyed_by(kind)]


def _go_back(model: Any, anatomy: Anatomy, names: Sequence[str], rows: Tensor, number: int, show: Shown) -> None:
    """One batch of windows, forward and backward."""
    reached: set[str] = set()
    to_come: Counter[str] = Counter()  # outputs of a linear whose gradients are still to come

    def feel(name: str, x: Tensor, gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all():
            raise NumericalError(
                f"{name}: the gradient in its output is not finite for calibration batch {number}; calibrate in "
                "bfloat16 or float32"
            )
        reached.add(name)
        of_windows = gradient.reshape(len(rows), -1, gradient.shape[-1])
        to_come[name] -= 1
        x = x.reshape(len(rows), -1, x.shape[-1])
        show(name, x, of_windows, not to_come[name])

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
            if out.requires_grad:  # else it is missed, and named below
                to_come[name] += 1
                out.register_hook(lambda gradient: feel(name, arguments[0].detach(), gradient))

        return hook

    def begin(module: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
        out.requires_grad_()

    hooks = [model.get_submodule(anatomy.embeddings[0]).register_forward_hook(begin)]
    try:
        with torch.enable_grad():
            hooks += [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
            loss = _loss(model(rows, use_cache=False).logits, rows)
            if not torch.isfinite(loss):
                raise NumericalError(
                    f"the loss of calibration batch {number} is not finite; calibrate in bfloat16 or float32"
                )
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    missed = [name for name in names if name not in reached]
    if missed:
        raise AnatomyError(f"no gradient of the loss reaches {missed[0]}: what stands there has no backward pass")


def _loss(logits: Tensor, rows: Tensor) -> Tensor:
    """Cross entropy of token t + 1 under the logits at t, added up; the one place where labels are shifted."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")


def _show(stats: Stats, x: Tensor, gradient: Tensor, so_far: list[Tensor], *, last: bool) -> list[Tensor]:
    """Give every statistic of a site its rows.  x: ``[windows, length, in]``, gradient: ``[windows, length, out]``.

    A weight that is used several times, as a factor that blocks share, has one gradient, the sum over its uses.
    `so_far` is that of the uses before, window by window; what comes back is it with this use, unless it is the last.
    """
    x, gradient = (t if t.dtype == torch.float64 else t.float() for t in (x, gradient))
    in_weight = [kind for kind in stats.kinds() if keyed_by(kind) != "output"]
    for kind in stats.kinds():
        if keyed_by(kind) == "output":
            stats[kind].update(clipped(gradient).flatten(0, 1))
    kept: list[Tensor] = []
    for number, (read, felt) in enumerate(zip(x, gradient, strict=True)) if in_weight else ():
        of_window = felt.T @ read
        if so_far:
            of_window += so_far[number]
        if not last:
            kept.append(of_window)
            continue
        for kind in in_weight:
            if keyed_by(kind) == "flat":  # of the mean loss, since it is the loss of no window that drifts
                stats[kind].update(of_window.flatten()[None] / (x.shape[1] - 1))
            else:
                stats[kind].update(of_window)
    return kept


def within_margins(tokens: Float[Tensor, "windows length width"]) -> Float[Tensor, "windows kept width"]:
    """Without the first and last eighth of every window."""
    length = tokens.shape[1]
    # the very last output moves no loss at all
    return tokens[:, length // MARGIN : length - max(1, length // MARGIN)]


def clipped(gradient: Float[Tensor, "windows length width"]) -> Float[Tensor, "windows kept width"]:
    """Gradients in outputs within the margins of their windows, clipped; see the head of this file."""
    kept = within_margins(gradient)
    norm = kept.norm(dim=-1, keepdim=True)
    mean = norm.mean(dim=1, keepdim=True)
    wanted = torch.minimum(torch.maximum(norm, CLIP[0] * mean), CLIP[1] * mean)
    return kept * torch.where(norm > 0, wanted / norm, torch.ones_like(norm))


def whole_model(source: Source, device: str) -> Any:
    """The model with all its numbers, frozen, as for use."""
    model: Any = source.skeleton()
    model.load_state_dict({name: source.tensor(name) for name in source.stored}, strict=False, assign=True)
    model.tie_weights()
    return model.requires_grad_(False).to(device)


def require_head(model: Any) -> None:
    """Raise AnatomyError for a model that predicts no next token; needs no numbers."""
    if not model.can_generate():
        raise AnatomyError(
            f"{type(model).__name__} predicts no next token, and its gradients would be those of another loss; choose "
            "a method that needs no gradients"
        )


@torch.no_grad()
def _require_causal(model: Any, rows: Tensor) -> None:
    """Raise AnatomyError unless the model predicts each token from those before it."""
    name = type(model).__name__
    require_head(model)
    other = rows.clone()
    other[:, -1] = (other[:, -1] + 1) % model.get_input_embeddings().num_embeddings
    before, after = (model(tokens, use_cache=False).logits[:, :-1].float() for tokens in (rows, other))
    if not torch.allclose(before, after, rtol=1e-2, atol=1e-2):
        raise AnatomyError(
            f"{name} sees the tokens that it would have to predict; choose a method that needs no gradients, or make "
            "it a decoder in config.json"
        )

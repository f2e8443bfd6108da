"""Whole modules by the kernels: meant for the forward pass of calibration, where nothing is recorded for gradients."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tersely.kernels.attention import causal_attention
from tersely.kernels.products import linear

OURS: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.linear: linear,
    functional.scaled_dot_product_attention: causal_attention,
}


class Quicker(TorchFunctionMode):
    """Within, whatever calls these functions of PyTorch, modules of any kind among them, gets ours."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return OURS.get(func, func)(*args, **(kwargs or {}))

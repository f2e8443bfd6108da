"""SINQ by the package of its authors: rows and columns of every tile are scaled to equal deviations, then rounded.

`algorithm` is the package's own word for it: sinq (the default: scales and zero points in 8 bits), asinq (calibrated),
sinq_nf4 and sinq_nf3 (normal-float levels of that width).  Of asinq the package collects inputs on a GPU alone, from
prompts of its own; here its function for any device does, on the windows of the request.  Of a weight with a kurtosis
above 5 the package rounds to the integers, and with sinq_nf4 and sinq_nf3 then reads these codes as normal floats,
which ruins such a weight.

What is counted: a scale of 8 bits with an offset and a step of 16 for every 32 of them, a zero point of 8 bits, and
column scales of 16; where the algorithm does not quantize them, scales and zero points of 16 bits.

Source: Müller, Sinkhorn-Normalized Quantization for Calibration-Free Low-Precision LLM Weights, 2025 (package sinq).
"""

from typing import Any

import torch
from request import Request, counted, leave, measured, read
from sinq.awq import collect_activations
from sinq.sinqlinear import SINQLinear, sinq_base_quant_config
from torch import nn

SCALES_TOGETHER = 32


def quantized(linear: nn.Linear, request: Request, inputs: torch.Tensor | None) -> SINQLinear:
    config = sinq_base_quant_config(
        nbits=request.bits, group_size=request.group, tiling_mode="1D", method=algorithm(request)
    )
    return SINQLinear(
        linear, config, del_orig=False, compute_dtype=torch.float32, device="cpu", layer_activations=inputs
    )


def algorithm(request: Request) -> str:
    return str(request.settings.get("algorithm", "sinq"))


def calibrated(request: Request) -> bool:
    return algorithm(request) == "asinq"


def of_model(model: nn.Module, request: Request, windows: torch.Tensor) -> dict[str, SINQLinear]:
    inputs: dict[str, torch.Tensor] = {}
    if calibrated(request):
        inputs = collect_activations(model, list(windows[:, None]), num_samples=len(windows))
    return {
        f"{name}.weight": quantized(model.get_submodule(name), request, inputs.get(name)) for name in request.linears
    }


def wide(meta: Any) -> Any:
    """Stored numbers in float32, so that nothing but their storage rounds them."""
    if isinstance(meta, torch.Tensor):
        return meta.float() if meta.is_floating_point() else meta
    if isinstance(meta, dict):
        return {key: wide(value) for key, value in meta.items()}
    return type(meta)(map(wide, meta)) if type(meta) in (tuple, list) else meta


def stored(shapes: dict[str, tuple[int, ...]], request: Request, in_bytes: bool) -> dict[str, float]:
    if not in_bytes:
        return counted(shapes, request, scale=16, zero=16, columns=16)
    sizes = counted(shapes, request, scale=8, zero=8, columns=16)
    return sizes | {"scales of scales": sizes["scales"] / SCALES_TOGETHER * 4, "scales of zero points": 4 * len(shapes)}


def main() -> None:
    request = read()
    if request.matrix is not None:
        inputs = request.weight_and_inputs()[1][None] if calibrated(request) else None
        found, cost = measured(request.one_linear, lambda linear: {"weight": quantized(linear, request, inputs)})
    else:
        windows = request.tokens()
        found, cost = measured(request.open, lambda model: of_model(model, request, windows))
    for module in found.values():
        module.meta = wide(module.meta)
    dense = {name: module.dequantize() for name, module in found.items()}
    shapes = {name: tuple(weight.shape) for name, weight in dense.items()}
    in_bytes = any("quantAux" in module.meta["method"] for module in found.values())
    leave(request, dense, stored(shapes, request, in_bytes), cost, "sinq")


if __name__ == "__main__":
    main()

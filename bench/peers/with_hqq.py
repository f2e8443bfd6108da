"""HQQ by the package of its authors: no data, zero points that minimise the l_0.7 norm of the error of the weights.

Groups along the input (`axis=1`), solver and schedule as the package has them.  It computes in float32 here; its format
keeps a scale and a zero point of 16 bits for each group, which is what is counted.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023 (package hqq).
"""

import torch
from hqq.core.quantize import HQQLinear, Quantizer, hqq_base_quant_config
from request import Request, counted, leave, measured, read
from torch import nn


def quantized(linear: nn.Linear, request: Request) -> HQQLinear:
    config = hqq_base_quant_config(nbits=request.bits, group_size=request.group, axis=1)
    return HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False)


def of_model(model: nn.Module, request: Request) -> dict[str, HQQLinear]:
    return {f"{name}.weight": quantized(model.get_submodule(name), request) for name in request.linears}


def main() -> None:
    request = read()
    if request.matrix is not None:
        found, cost = measured(request.one_linear, lambda linear: {"weight": quantized(linear, request)})
    else:
        found, cost = measured(request.open, lambda model: of_model(model, request))
    dense = {name: Quantizer.dequantize(module.W_q.data, module.meta) for name, module in found.items()}
    shapes = {name: tuple(weight.shape) for name, weight in dense.items()}
    leave(request, dense, counted(shapes, request, scale=16, zero=16), cost, "hqq")


if __name__ == "__main__":
    main()

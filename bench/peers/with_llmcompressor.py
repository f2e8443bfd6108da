"""GPTQ, AWQ and rounding to nearest by llmcompressor, all as it sets them up by itself.

`algorithm`: gptq (static activation order, damping 0.01, blocks of 128; the model in sequence, block after block), awq
(20 exponents, duo scaling, then rounding), rtn.  `batches`: "large", as many windows together as have `AT_ONCE` tokens,
which is quicker, or "its own", the windows as a data set and whatever the package makes of that: one by one.

Of AWQ the gains of the norms change too: they take up the scales.  Its modifier pins memory for a graphics card even
where there is none, which fails; pinning changes no number and is left out then.

What is counted is the format of compressed-tensors in a model of 16 bits: a scale of 16 bits and a zero point of as
many as a code.  Scales are in float32 here.

Source: Frantar et al., GPTQ, 2022 (arXiv 2210.17323); Lin et al., AWQ, 2023 (arXiv 2306.00978); package llmcompressor.
"""

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, initialize_module_for_quantization
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, forward_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian, prepare_batch
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from request import Request, counted, leave, measured, read
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

AT_ONCE = 4096


def scheme(request: Request, targets: list[str]) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=request.bits, type="int", symmetric=False, strategy="group", group_size=request.group
    )
    return QuantizationScheme(targets=targets, weights=weights)


def recipe(request: Request) -> list[object]:
    groups = {"group_0": scheme(request, request.linears)}
    match request.settings["algorithm"]:
        case "gptq":
            return [GPTQModifier(config_groups=groups)]
        case "awq":
            if not torch.accelerator.is_available():
                IntermediatesCache.pin_memory = lambda cache, batch: None
            return [AWQModifier(), QuantizationModifier(config_groups=groups)]
        case "rtn":
            return [QuantizationModifier(config_groups=groups)]
    raise SystemExit(f"algorithm {request.settings['algorithm']}; wanted gptq, awq or rtn")


def calibration(request: Request, windows: torch.Tensor) -> Dataset | DataLoader | None:
    if request.settings["algorithm"] == "rtn":
        return None
    match request.settings.get("batches", "large"):
        case "its own":
            tokens = windows.tolist()
            return Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(row) for row in tokens]})
        case "large":
            at_once = max(1, AT_ONCE // windows.shape[1])
            return DataLoader(list(windows), batch_size=at_once, collate_fn=batch)
    raise SystemExit(f"batches {request.settings['batches']}; wanted large, its own")


def batch(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    tokens = torch.stack(rows)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def of_model(
    model: nn.Module, request: Request, windows: torch.Tensor, batches: Dataset | DataLoader | None
) -> nn.Module:
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(request.model),
        dataset=batches,
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        recipe=recipe(request),
    )
    return model


@torch.no_grad()
def dense_of(model: nn.Module, request: Request) -> dict[str, torch.Tensor]:
    weights = {}
    for name in request.linears:
        module = model.get_submodule(name)
        weights[f"{name}.weight"] = forward_quantize(
            module, module.weight.data, "weight", module.quantization_scheme.weights
        )
    return weights


def gains(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.data for name, value in model.named_parameters() if value.ndim == 1 and name.endswith("weight")}


@torch.no_grad()
def of_matrix(linear: nn.Linear, request: Request, inputs: torch.Tensor) -> torch.Tensor:
    """The same functions that the modifier calls, for one module."""
    chosen = scheme(request, ["Linear"])
    initialize_module_for_quantization(linear, chosen)
    initialize_observer(linear, "weight")
    observe(linear, "weight")
    found = linear.weight_observer.get_qparams()
    if request.settings["algorithm"] == "rtn":
        return fake_quantize(linear.weight.data, found["scale"], found["zero_point"], chosen.weights)
    if request.settings["algorithm"] != "gptq":
        raise SystemExit("a single matrix: wanted gptq or rtn")
    chosen.weights.actorder = "static"
    hessian, samples = make_empty_hessian(linear), torch.zeros(())
    for rows in inputs.split(AT_ONCE):
        hessian, samples = accumulate_hessian(rows, linear, hessian, samples)
    weights, hessians, scales, zeros, whole = prepare_batch([linear], [found], {linear: hessian}, {linear: samples})
    quantized, _, _ = quantize_weight(weights, hessians, scales, zeros, whole, chosen.weights)
    return quantized[0]


def main() -> None:
    request = read()
    if request.matrix is not None:
        inputs = request.weight_and_inputs()[1]
        weight, cost = measured(request.one_linear, lambda linear: of_matrix(linear, request, inputs))
        dense = {"weight": weight}
    else:
        windows = request.tokens()
        batches = calibration(request, windows)
        model, cost = measured(request.open, lambda model: of_model(model, request, windows, batches))
        dense = dense_of(model, request)
    shapes = {name: tuple(weight.shape) for name, weight in dense.items()}
    sizes = counted(shapes, request, scale=16, zero=request.bits)
    if request.settings["algorithm"] == "awq":
        dense |= gains(model)
    leave(request, dense, sizes, cost, "llmcompressor", "compressed-tensors")


if __name__ == "__main__":
    main()

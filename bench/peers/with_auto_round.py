"""AutoRound by the package of its authors: rounding and ranges learned by signed gradients, block after block.

`steps` of batches of 8 windows for every block, learning rates as the package sets them, asymmetric, in float32 all
through (its mixed precision is turned off: the model is in float32, and so is everybody else here).  Of every window
the package leaves out the last token.

What is counted is its format: a scale of 16 bits, which it rounds to as it learns, and a zero point of as many bits as
a code.

Source: Cheng et al., Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs, 2023
(arXiv 2309.05516; package auto-round).
"""

import torch
from auto_round import AutoRound
from request import Request, counted, leave, measured, read
from torch import nn
from transformers import AutoTokenizer

BATCH = 8


def of_model(model: nn.Module, request: Request, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    learner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(request.model),
        bits=request.bits,
        group_size=request.group,
        sym=False,
        dataset=list(windows.split(BATCH)),
        iters=request.settings["steps"],
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=BATCH,
        seed=request.seed,
        amp=False,
        device_map="cpu",
        low_cpu_mem_usage=False,
    )
    learned, _ = learner.quantize()
    return {f"{name}.weight": learned.get_submodule(name).weight.data for name in request.linears}


def main() -> None:
    request = read()
    if request.matrix is not None:
        raise SystemExit("a single matrix: auto-round learns blocks of a model")
    windows = request.tokens()
    dense, cost = measured(request.open, lambda model: of_model(model, request, windows))
    shapes = {name: tuple(weight.shape) for name, weight in dense.items()}
    leave(request, dense, counted(shapes, request, scale=16, zero=request.bits), cost, "auto-round")


if __name__ == "__main__":
    main()

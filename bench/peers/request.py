"""What the scripts here share: the request that they read, what they measure, and what they leave.

A script runs in the environment of one package, and knows nothing of tersely:

    python with_NAME.py REQUEST.json

The request names a model folder, the linears to quantize, a file of calibration windows (token numbers, int64
``[samples, length]``), the bits of a code and the columns that share a scale.  What is left in the folder `out` is the
model with those linears replaced by what their codes stand for, dense and in float32, and `measured.json`: seconds and
memory of quantizing, and bytes of what the package's format stores.

A request with a `matrix` instead, a file with a `weight` ``[out, in]`` and `inputs` ``[tokens, in]``, asks for that
single weight; the folder then holds `weight.safetensors`.

Seconds are those of the package's own call on a model that is open, windows and all in memory: no start, no import, no
reading, no writing.  A call of less than `SHORT` seconds is made three times, each on a model opened anew, and the
fastest counts; the memory is that of the call which needed least.  Both favour the package.
"""

import ctypes
import gc
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

SHORT = 30.0
REPEATS = 3

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Request:
    out: str
    bits: int
    group: int
    threads: int
    seed: int
    model: str | None = None
    linears: list[str] = field(default_factory=list)
    windows: str | None = None
    matrix: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """What else distinguishes the row: the algorithm, steps of training."""

    def open(self) -> nn.Module:
        """The model in float32, on the processor."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()

    def tokens(self) -> torch.Tensor:
        """Calibration windows, ``[samples, length]``."""
        return load_file(self.windows)["tokens"]

    def weight_and_inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a request for a matrix."""
        held = load_file(self.matrix)
        return held["weight"], held["inputs"]

    def one_linear(self) -> nn.Linear:
        """The matrix of the request as a module."""
        weight, _ = self.weight_and_inputs()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear


@dataclass(frozen=True)
class Cost:
    seconds: float
    resident_bytes: int | None
    """Held when the call began: interpreter, libraries, the open model."""
    peak_bytes: int | None
    """The most that was held while it ran; both are None where the system does not tell."""


def read() -> Request:
    """The request that the command line names; threads and seed are set as it says."""
    request = Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    torch.set_num_threads(request.threads)
    torch.manual_seed(request.seed)
    return request


def measured(opened: Callable[[], T], quantize: Callable[[T], R]) -> tuple[R, Cost]:
    """What `quantize` makes of what `opened` opens, and what it costs."""
    result, cost = _once(opened(), quantize)
    costs = [cost]
    while costs[0].seconds < SHORT and len(costs) < REPEATS:
        result, cost = _once(opened(), quantize)
        costs.append(cost)
    least = min(costs, key=lambda cost: (cost.peak_bytes or 0) - (cost.resident_bytes or 0))
    return result, Cost(min(cost.seconds for cost in costs), least.resident_bytes, least.peak_bytes)


def leave(
    request: Request, weights: Mapping[str, torch.Tensor], stored: Mapping[str, float], cost: Cost, *packages: str
) -> None:
    """Write the folder.

    `weights`: tensors of the model that are others now, by their names in the checkpoint, `weight` for a matrix.
    `stored`: bytes of codes, scales and whatever else the format needs to make the quantized linears of it.
    """
    out = Path(request.out)
    out.mkdir(parents=True)
    dense = {name: weight.detach().float().contiguous() for name, weight in weights.items()}
    if request.matrix is not None:
        save_file(dense, out / "weight.safetensors")
    else:
        _write_model(Path(str(request.model)), out, dense)
    said = {
        "seconds": cost.seconds,
        "resident_bytes": cost.resident_bytes,
        "peak_bytes": cost.peak_bytes,
        "stored": {what: math.ceil(size) for what, size in stored.items()},
        "versions": {name: version(name) for name in ("torch", "transformers", *packages)},
    }
    (out / "measured.json").write_text(json.dumps(said, indent=1), encoding="utf-8")


def counted(
    shapes: Mapping[str, tuple[int, ...]], request: Request, *, scale: int, zero: int, columns: int = 0
) -> dict[str, float]:
    """Bytes of codes, scales and zero points in groups along the rows, and of scales of the columns.

    Codes are counted at their bits, whatever padding the package's own packing has; `scale`, `zero` and `columns` are
    bits of one number.
    """
    groups = sum(rows * math.ceil(width / request.group) for rows, width in shapes.values())
    return {
        "codes": sum(rows * width for rows, width in shapes.values()) * request.bits / 8,
        "scales": groups * scale / 8,
        "zero points": groups * zero / 8,
        "column scales": sum(width for _, width in shapes.values()) * columns / 8,
    }


def _write_model(model: Path, out: Path, changed: dict[str, torch.Tensor]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
    if unknown := changed.keys() - tensors.keys():
        raise SystemExit(f"the checkpoint has no tensors {', '.join(sorted(unknown)[:3])}")
    tensors = {name: changed.get(name, tensor.float()) for name, tensor in tensors.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    for file in model.glob("*token*"):
        shutil.copy(file, out)


def _once(opened: T, quantize: Callable[[T], R]) -> tuple[R, Cost]:
    _hand_back()
    before = _resident("VmRSS") if _forget_peak() else None
    begun = time.perf_counter()
    result = quantize(opened)
    seconds = time.perf_counter() - begun
    return result, Cost(seconds, before, None if before is None else _resident("VmHWM"))


def _hand_back() -> None:
    """What was freed, but not given back to the system, would hide what comes."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{what}:")]
    return int(line.split()[1]) * 1024

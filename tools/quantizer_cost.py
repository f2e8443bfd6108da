r"""Seconds, memory and error of quantizing one matrix: our methods and other people's packages, in the same run.

    python tools/quantizer_cost.py --peers bench/peers [--width 4096] [--bits 4] [--threads 1] \
        [--method sinq gptq:shrink=True aqlm:codebooks=2,width=8,group=8 …] [--out docs/results/quantizer_cost.md]

A method may be followed by its options; unless these say otherwise it has codes of --bits bits in groups of --group.

The weight is a sum of random directions whose size falls as k^-0.3, with rows and columns of different size
(log-normal, σ = 0.2: its kurtosis of 4 stays below the 5 beyond which the sinq package falls back to plain rounding);
of the inputs half of the power lies in 64 directions that all channels share, and the root mean square of channels is
log-normal (σ = 1).  Errors are those of outputs for inputs that no method has seen.
Calibrated methods pay for their statistics of the inputs.  Ours are measured in this process, a package by its script
in its own environment (see `tersely.bench.peers`); both without import, start and reading, and a call of less than
three seconds is made three times, of which the best counts.  Memory is what was held beyond what was held before.
"""

import argparse
import ast
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tersely.bench import way
from tersely.bench.peers import Peer, asked, peers_in, run_script
from tersely.evaluation import peak_within
from tersely.journal import commit_text
from tersely.kinds import dense_weight
from tersely.methods import METHODS
from tersely.stats import Stats

SHORT, REPEATS = 3.0, 3
DIRECTIONS = 64
DECAY = 0.3
HELD_OUT = 1024
SINGLE = ("hqq", "sinq", "llmcompressor")
"""Packages that quantize a matrix without a model around it."""
NOT_SINGLE = ("awq", "asinq")
"""Their algorithms that need one, or take minutes."""


def matrices(width: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weight ``[width, width]``, inputs ``[tokens, width]``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    falling = torch.arange(1, width + 1).pow(-DECAY)
    weight = (normal(width, width) * (falling / falling.norm())) @ normal(width, width)
    weight *= (0.2 * normal(width, 1)).exp() * (0.2 * normal(width)).exp() * 0.02
    shared = normal(tokens, DIRECTIONS) @ normal(DIRECTIONS, width) / DIRECTIONS**0.5
    return weight, (normal(tokens, width) + shared) * normal(width).exp()


def measured(work: Callable[[], Any]) -> tuple[Any, float, int | None]:
    """Result, seconds, bytes held beyond what was held before."""
    seconds: list[float] = []
    extra: list[int] = []
    while not seconds or (seconds[0] < SHORT and len(seconds) < REPEATS):
        with peak_within() as peak:
            begun = time.perf_counter()
            result = work()
            seconds.append(time.perf_counter() - begun)
        if peak.before is not None and peak.highest is not None:
            extra.append(peak.highest - peak.before)
    return result, min(seconds), min(extra, default=None)


def ours(asked_for: str, weight: Tensor, inputs: Tensor, fresh: Tensor, bits: int, group: int) -> Iterator[str]:
    name, _, said = asked_for.partition(":")
    options = dict(pair.split("=", 1) for pair in said.split(",") if pair)
    method = METHODS[name](**({"group": group, "width": bits} | {key: value_of(v) for key, v in options.items()}))
    amount = method.sizes((weight.shape[0], weight.shape[1]), weight.element_size())[-1].amount

    def work() -> Any:
        stats = Stats({kind: kind(weight.shape[1]) for kind in method.needs})
        for rows in inputs.split(4096):
            stats.update(rows)
        return method.compress(weight, stats, amount)

    module, seconds, extra = measured(work)
    yield from (
        way(name, {key: value_of(v) for key, v in options.items()}),
        f"{seconds:.2f}",
        megabytes(extra),
        f"{8 * module.nbytes() / weight.numel():.3f}",
    )
    yield error(weight, dense_weight(module), fresh)


def theirs(peer: Peer, weight: Tensor, fresh: Tensor, folder: Path) -> Iterator[str]:
    out = folder / peer.folder(None)
    said = run_script(peer, {"matrix": str(folder / "matrix.safetensors"), **asked(peer.options, 0)}, out)
    yield way(peer.method, {key: value for key, value in peer.options.items() if key not in ("width", "group")})
    if isinstance(said, str):
        yield from ("–", "–", "–", f"failed: {said}")
        return
    extra = None if said["peak_bytes"] is None else said["peak_bytes"] - said["resident_bytes"]
    stored = 8 * sum(said["stored"].values()) / weight.numel()
    yield from (f"{said['seconds']:.2f}", megabytes(extra), f"{stored:.3f}")
    yield error(weight, load_file(out / "weight.safetensors")["weight"], fresh)
    shutil.rmtree(out)


def value_of(said: str) -> Any:
    """A number or a truth value where it reads like one."""
    try:
        return ast.literal_eval(said)
    except ValueError:
        return said


def megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:.0f}"


def error(weight: Tensor, quantized: Tensor, inputs: Tensor) -> str:
    """‖(W - W') Xᵀ‖ / ‖W Xᵀ‖."""
    return f"{float((inputs @ (weight - quantized).T).norm() / (inputs @ weight.T).norm()):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--method", nargs="*", default=["rtn", "hqq", "sinq", "gptq"])
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--package", nargs="*", default=list(SINGLE))
    parser.add_argument("--out", type=Path, help="a Markdown file that gets the table, too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lines = [f"Regenerate with `{shlex.join(['python', 'tools/quantizer_cost.py', *sys.argv[1:]])}`.", ""]
    for line in rows(given):
        print(line, flush=True)
        lines.append(line)
    if given.out is not None:
        commit_text(given.out, "\n".join(lines) + "\n")


def rows(given: argparse.Namespace) -> Iterator[str]:
    weight, inputs = matrices(given.width, given.tokens + HELD_OUT, seed=0)
    inputs, fresh = inputs[:-HELD_OUT], inputs[-HELD_OUT:]
    yield (
        f"{given.width} × {given.width}, {given.tokens} inputs, {given.bits} bits, groups of {given.group}; "
        f"{given.threads} threads, torch {torch.__version__}"
    )
    yield from (
        "",
        "| method | seconds | memory, MB | bits per weight | relative output error |",
        "|---|--:|--:|--:|--:|",
    )
    for name in given.method:
        yield "| " + " | ".join(ours(name, weight, inputs, fresh, given.bits, given.group)) + " |"
    if given.peers is None:
        return
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"weight": weight, "inputs": inputs}, Path(scratch, "matrix.safetensors"))
        for peer in peers_in(given.peers):
            wanted = (peer.options["width"], peer.options["group"]) == (given.bits, given.group)
            single = peer.package in given.package and peer.options.get("algorithm") not in NOT_SINGLE
            if wanted and single:
                yield "| " + " | ".join(theirs(peer, weight, fresh, Path(scratch))) + " |"


if __name__ == "__main__":
    main()

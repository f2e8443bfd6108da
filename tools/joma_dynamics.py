"""Attention entropy and stable rank while a small model learns, for several learning rates.

    python tools/joma_dynamics.py --text TRAIN.txt --tokenizer MODEL --out docs/results/joma_dynamics

JoMA predicts that attention first gets sparse and then, with a nonlinear MLP, dense again ("bounce-back"), the more
visibly the smaller the rate, mostly in upper layers.  A Llama with one head a layer is trained from nothing with the
project's loop at a constant rate; at steps that grow geometrically the entropy of every layer's attention and the
stable rank of its first MLP matrix are measured on windows that are not trained on.  Writes OUT.json and OUT.md.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tersely.anatomy import anatomy_of
from tersely.diagnose.joma import stable_rank_of_mlp, watch
from tersely.text import read_text, tokenise
from tersely.train import Training, train
from tersely.train.objectives import Tokens

MEASURED = 32
"""Windows on which attention is measured."""


def build(vocabulary: int, width: int, layers: int, length: int, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=1,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def moments(steps: int, count: int) -> set[int]:
    """0, the last step, and steps between that grow geometrically."""
    return {0, steps} | {round(steps ** (place / count)) for place in range(count)}


def course(model: LlamaForCausalLM, windows: Tensor, training: Training, checkpoints: int, seed: int) -> dict:
    """Train, and look at the model meanwhile."""
    held, rest = windows[:MEASURED], windows[MEASURED:]
    wanted = moments(training.steps(windows.shape[1]), checkpoints)
    anatomy = anatomy_of(model)
    rows = []

    def note(step: int, _: torch.nn.Module) -> None:
        if step in wanted:
            entropies = [heads[0].entropy for heads in watch(model, held)]
            ranks = [stable_rank_of_mlp(model, anatomy, block) for block in range(len(anatomy.blocks))]
            rows.append({"step": step, "entropy": entropies, "stable_rank": ranks})

    begun = time.perf_counter()
    outcome = train(
        model,
        training,
        objectives={"tokens": Tokens()},
        windows=rest,
        generator=torch.Generator().manual_seed(seed),
        parameters=("*",),
        callback=note,
    )
    losses = {measured.step: measured.loss for measured in outcome.held_out}
    return {
        "rate": training.rate,
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "seconds": round(time.perf_counter() - begun, 1),
        "held_out_loss": [losses[0], losses[outcome.steps]],
        "course": rows,
        "layers": [summary(rows, layer) for layer in range(len(anatomy.blocks))],
    }


def summary(rows: list[dict], layer: int) -> dict:
    """How a layer went.  The largest rise of the entropy is that over an earlier measurement, for good or not; the
    share of the fall that is recovered counts what is left of it at the end."""
    entropy = [row["entropy"][layer] for row in rows]
    ranks = [row["stable_rank"][layer] for row in rows]
    least = min(range(len(entropy)), key=entropy.__getitem__)
    fell = entropy[0] - entropy[least]
    return {
        "start": entropy[0],
        "minimum": entropy[least],
        "minimum_step": rows[least]["step"],
        "end": entropy[-1],
        "recovered": (entropy[-1] - entropy[least]) / fell if fell > 0 else 0.0,
        "largest_rise": max(later - min(entropy[: at + 1]) for at, later in enumerate(entropy)),
        "stable_rank": [ranks[0], min(ranks), ranks[-1]],
    }


def markdown(result: dict) -> str:
    lines = [
        "| rate | layer | entropy at the start | least (step) | at the end | of the fall recovered | largest rise |"
        " stable rank: start, least, end | held-out loss |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for run in result["runs"]:
        before, after = run["held_out_loss"]
        for layer, found in enumerate(run["layers"]):
            ranks = ", ".join(f"{rank:.1f}" for rank in found["stable_rank"])
            lines.append(
                f"| {run['rate']:g} | {layer} | {found['start']:.3f} | {found['minimum']:.3f} "
                f"({found['minimum_step']}) | {found['end']:.3f} | {100 * found['recovered']:.0f} % | "
                f"{found['largest_rise']:.3f} | {ranks} | {before:.2f} → {after:.2f} |"
            )
    return f"`{result['command']}`\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", required=True, help="a text as the commands of tersely take it")
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="where to write, without .json and .md")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 1e-2])
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--checkpoints", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.tokenizer)
    tokens = tokenise(read_text(asked.text, "calibration").content, tokenizer)
    windows = tokens[: len(tokens) // asked.length * asked.length].view(-1, asked.length)
    runs = []
    for rate in asked.rates:
        training = Training(tokens=asked.tokens, batch=asked.batch, rate=rate, schedule="constant", warmup=0.0)
        model = build(len(tokenizer), asked.width, asked.layers, asked.length, asked.seed)
        runs.append(course(model, windows, training, asked.checkpoints, asked.seed))
        print(json.dumps({key: value for key, value in runs[-1].items() if key != "course"}), flush=True)
    settings = {name: value for name, value in vars(asked).items() if name not in ("text", "tokenizer", "out")}
    named = " ".join(f"--{name} {' '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in settings.items())
    command = f"python tools/joma_dynamics.py --text {Path(asked.text).name} {named}"
    result = {"command": command, "settings": settings, "windows": len(windows), "runs": runs}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    asked.out.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()

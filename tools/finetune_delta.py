"""A fine-tuned twin of a base, and what its difference loses at which real size.

    python tools/finetune_delta.py BASE TRAIN TEST OUT [--minutes 2] [--rate 5e-4] [--seed 0]

Trains BASE on the text TRAIN for so many minutes and leaves in OUT the base and the twin (both in bfloat16, as they
would be shipped), one delta folder for each method and size, and `figures.json`.  Prints Markdown: perplexity on TEST
of base, twin and base + delta, with the bytes of the delta's safetensors.

Every method gets the same bytes for every linear: a fraction α of its matrix in 16 bits, scales and zero points
included.  Low rank spends them on 16-bit factors.  One bit keeps the sign of every entry and one mean magnitude a
matrix (as BitDelta before its scales are trained), which is 1/16 by itself; its bytes are computed, as no kind of ours
stores it.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tersely.anatomy import Site, anatomy_of
from tersely.checkpoint import Source, open_source, read_tokenizer
from tersely.deltas import choose, load_deltas, write_delta
from tersely.evaluation.perplexity import Windows, cut, measure_perplexity
from tersely.kinds import Made
from tersely.methods import Method
from tersely.methods.delta.delta_come import DeltaCoMe
from tersely.methods.low_rank.svd import PlainSVD
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.stats import Gram, Stats
from tersely.text import read_text

METHODS: dict[str, Method] = {
    "low rank (plain SVD, 16 bits)": PlainSVD(),
    "low rank (whitened, 16 bits)": WhitenedSVD(),
    "delta_come 8+3+2, ranks 1+4": DeltaCoMe(ranks="1+4"),
    "delta_come 3": DeltaCoMe(widths="3", ranks=""),
    "delta_come 2": DeltaCoMe(widths="2", ranks=""),
    "delta_come 8+3+2, refit": DeltaCoMe(ranks="1+4", refit=True),
    "delta_come 8+3+2, refit, gram": DeltaCoMe(ranks="1+4", refit=True, metric="gram"),
}
PARTS = {"1/8": 1 / 8, "1/16": 1 / 16}


def train(model: PreTrainedModel, windows: Windows, minutes: float, rate: float, generator: torch.Generator) -> int:
    """AdamW on random windows, the rate falling linearly to zero over the time; the number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    started = time.monotonic()
    model.train()
    for step in itertools.count():
        spent = (time.monotonic() - started) / (60 * minutes)
        if spent >= 1:
            model.eval()
            return step
        optimizer.param_groups[0]["lr"] = rate * (1 - spent)
        chosen = torch.randint(len(windows), (8,), generator=generator)
        batch = windows.content[chosen]
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError("time does not end")


@torch.no_grad()
def observe(model: PreTrainedModel, windows: Windows, sites: tuple[Site, ...], batches: int) -> dict[str, Stats]:
    """Input of a site → its Gram matrix over the first windows."""
    stats = {site.reads: Stats({Gram: Gram(site.in_features)}) for site in sites}
    first = {site.reads: site.name for site in reversed(sites)}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, of=stats[reads]: of.update(arguments[0].flatten(0, -2))
        )
        for reads, name in first.items()
    ]
    for batch in windows.content[: 8 * batches].split(8):
        model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return stats


def differences(tuned: Source, base: Source, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    names = {site.name: f"{site.name}.weight" for site in sites}
    return {path: tuned.tensor(name).float() - base.tensor(name).float() for path, name in names.items()}


def updates(method: Method, deltas: dict[str, Tensor], stats: dict[str, Stats], part: float) -> dict[str, Made]:
    """For every linear the largest amount within its bytes, made in float32 and stored in bfloat16."""
    made = {}
    for path, delta in deltas.items():
        budget = part * 2 * delta.numel()
        fitting = [size.amount for size in method.sizes((delta.shape[0], delta.shape[1]), 2) if size.nbytes <= budget]
        if not fitting[-1]:
            raise SystemExit(f"{path}: not even one component fits into {budget:.0f} bytes; give a larger part")
        made[path] = Made.of(method.compress(delta, stats[path], fitting[-1]).to(torch.bfloat16))
    return made


def perplexity(folder: Path, windows: Windows) -> float:
    return measure_perplexity(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), windows)


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@torch.no_grad()
def one_bit(base: Path, tuned: Source, deltas: dict[str, Tensor], windows: Windows) -> tuple[float, int]:
    """Perplexity and bytes with sign times mean magnitude for every linear, all else from the twin."""
    model = AutoModelForCausalLM.from_pretrained(tuned.folder, dtype=torch.float32)
    of_base = open_source(base, dtype="float32")
    others = {name for name in tuned.stored if not torch.equal(tuned.tensor(name).float(), of_base.tensor(name))}
    size = sum(tuned.stored_bytes(name) for name in others if name.removesuffix(".weight") not in deltas)
    for path, delta in deltas.items():
        weight = of_base.tensor(f"{path}.weight") + delta.abs().mean() * torch.where(delta < 0, -1.0, 1.0)
        model.get_submodule(path).weight.copy_(weight)
        size += -(-delta.numel() // 8) + 2
    return measure_perplexity(model, windows), size


@torch.no_grad()
def serving(base: Path, delta: Path, windows: Windows) -> str:
    """A mixed batch of eight windows over one base, against both models apart."""
    model = load_deltas(base, {"tuned": delta, "twice": delta})
    batch = windows.content[:8]
    alone = {None: base, "tuned": delta, "twice": delta}
    names = [None, "tuned", "twice", "tuned"] * 2
    whole = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in alone.items()}
    separate = torch.stack([whole[name](row[None]).logits[0] for name, row in zip(names, batch, strict=True)])
    seconds = {}
    for what, chosen in (("base alone", [None]), ("mixed", names)):
        with choose(model, chosen):
            together = model(batch).logits
            begun = time.perf_counter()
            for _ in range(3):
                model(batch)
            seconds[what] = (time.perf_counter() - begun) / 3
    state = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    off = ((together - separate).norm() / separate.norm()).item()
    rates = ", ".join(f"{what} {batch.numel() / value:.0f} tokens/s" for what, value in seconds.items())
    return (
        f"served together: {sum(state.values())} bytes in memory, relative difference to each alone {off:.1e}; {rates}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    tokenizer = read_tokenizer(asked.base)
    model = AutoModelForCausalLM.from_pretrained(asked.base, dtype=torch.float32)
    learned, tested = (
        cut(read_text(text, purpose), tokenizer, model.config, length=256)
        for text, purpose in ((asked.train, "calibration"), (asked.test, "evaluation"))
    )
    base, twin = asked.out / "base", asked.out / "tuned"
    if not twin.exists():
        model.to(torch.bfloat16).save_pretrained(base)
        model.float()
        steps = train(model, learned, asked.minutes, asked.rate, torch.Generator().manual_seed(asked.seed))
        model.to(torch.bfloat16).save_pretrained(twin)
        for folder in (base, twin):
            tokenizer.save_pretrained(folder)
        print(f"{steps} steps of 8 windows in {asked.minutes} minutes\n")
    tuned, origin = open_source(twin), open_source(base)
    model = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)
    sites = anatomy_of(model).sites
    by_input = observe(model, learned, sites, batches=8)
    stats = {site.name: by_input[site.reads] for site in sites}
    deltas = differences(tuned, origin, sites)
    rows = [("base", "", perplexity(base, tested), 0), ("tuned", "", perplexity(twin, tested), stored(twin))]
    rows.append(("one bit", "1/16", *one_bit(base, tuned, deltas, tested)))
    for part, share in PARTS.items():
        for name, method in METHODS.items():
            folder = asked.out / f"{name}-{part}".translate(str.maketrans(" /(),+", "------"))
            if not folder.exists():
                write_delta(folder, tuned, origin, updates(method, deltas, stats, share), base_name="../base")
            rows.append((name, part, perplexity(folder, tested), stored(folder)))
    whole = sum(2 * delta.numel() for delta in deltas.values())
    print(f"{len(tested)} windows of {tested.length}; the linears take {whole} bytes in 16 bits\n")
    print("| delta | part of the linears | perplexity | bytes of its safetensors |\n|---|--:|--:|--:|")
    for name, part, value, size in rows:
        print(f"| {name} | {part} | {value:.3f} | {size} |")
    print(f"\n{serving(base, folder, tested)}")
    named = [dict(zip(("delta", "part", "perplexity", "bytes"), row, strict=True)) for row in rows]
    (asked.out / "figures.json").write_text(json.dumps(named, indent=1) + "\n")


if __name__ == "__main__":
    main()

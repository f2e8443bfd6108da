"""Trains the bundled model of `tersely demo` on the standard library of this Python, from nothing.

    python tools/train_demo_model.py --out src/tersely/assets/demo

Stages, each kept in the work folder so that a stopped run goes on where it was: a byte-level BPE tokenizer of the train
split, the tokens, the model (checkpoint every 200 steps), then the card with the held-out loss beside the loss of an
interpolated Kneser-Ney trigram model of the same tokens.  The splits are those of `tersely.text`.

The recipe is an ordinary one for a small model: AdamW, warm-up, constant rate, linear decay over the last third, no
dropout, windows drawn at random.  It sees every training token many times, on purpose: a model that is trained short
for its size loses little under any compression, and then all methods look alike.
"""

import argparse
import json
import math
import platform
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tersely.text import SEPARATOR, stdlib_documents, tokenise

VOCABULARY = 1024
WINDOW = 256
BATCH = 32


def train_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<s>", "</s>"]
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=special)
        tokenizer.train_from_iterator((text for _, text in stdlib_documents("train")), trainer)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def split_tokens(split: str, tokenizer: PreTrainedTokenizerFast, work: Path) -> torch.Tensor:
    kept = work / f"{split}.npy"
    if not kept.exists():
        text = SEPARATOR.join(text for _, text in stdlib_documents(split))
        np.save(kept, tokenise(text, tokenizer).numpy().astype(np.int16))
    return torch.from_numpy(np.load(kept).astype(np.int64))


def build(width: int, blocks: int, intermediate: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=intermediate, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4, max_position_embeddings=1024,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, dtype="float32",
    )  # fmt: skip
    config.train_window = WINDOW
    config.architectures = ["LlamaForCausalLM"]
    return LlamaForCausalLM(config)


def rate(step: int, steps: int, peak: float) -> float:
    warm, decay = 200, steps // 3
    return peak * min(step / warm, 1.0, (steps - step) / decay)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor, windows: int) -> float:
    rows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)[:windows]
    losses = [model(row, labels=row).loss.item() for row in rows.split(32) if len(row) == 32]
    return sum(losses) / len(losses)


def train(model: LlamaForCausalLM, tokens: torch.Tensor, held_out: torch.Tensor, steps: int, work: Path) -> None:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    saved, first = work / "state.pt", 0
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    forward = torch.compile(model)
    begun = time.perf_counter()
    for step in range(first, steps):
        # the batch depends on the step alone, so that a resumed run sees what an unbroken one would have seen
        starts = torch.randint(len(tokens) - WINDOW, (BATCH,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([tokens[s : s + WINDOW] for s in starts])
        for group in optimizer.param_groups:
            group["lr"] = rate(step + 1, steps, 4e-3)
        loss = forward(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, work / "state.tmp")
            (work / "state.tmp").replace(saved)
            speed = (step + 1 - first) * BATCH * WINDOW / (time.perf_counter() - begun)
            seen = held_out_loss(model, held_out, 128)
            print(
                f"step {step + 1}/{steps} train {loss.item():.4f} held-out {seen:.4f} {speed:.0f} tokens/s", flush=True
            )


def kneser_ney_loss(train_tokens: list[int], held_out: list[int]) -> float:
    """Nats per token of an interpolated Kneser-Ney trigram model, absolute discount n1 / (n1 + 2 n2) at every order."""
    trigrams = Counter(zip(train_tokens, train_tokens[1:], train_tokens[2:], strict=False))
    bigrams = Counter((b, c) for _, b, c in trigrams)  # continuation counts: distinct words before
    unigrams = Counter(c for _, c in bigrams)
    contexts3, distinct3, contexts2, distinct2 = Counter(), Counter(), Counter(), Counter()
    for (a, b, _), count in trigrams.items():
        contexts3[a, b] += count
        distinct3[a, b] += 1
    for (b, _), count in bigrams.items():
        contexts2[b] += count
        distinct2[b] += 1
    total = sum(unigrams.values())
    discounts = []
    for counts in (trigrams, bigrams, unigrams):
        of = Counter(counts.values())
        discounts.append(of[1] / (of[1] + 2 * of[2]) if of[1] else 0.0)
    d3, d2, d1 = discounts
    loss = 0.0
    for a, b, c in zip(held_out, held_out[1:], held_out[2:], strict=False):
        p = max(unigrams[c] - d1, 0) / total + d1 * len(unigrams) / total / VOCABULARY
        if contexts2[b]:
            p = max(bigrams[b, c] - d2, 0) / contexts2[b] + d2 * distinct2[b] / contexts2[b] * p
        if contexts3[a, b]:
            p = max(trigrams[a, b, c] - d3, 0) / contexts3[a, b] + d3 * distinct3[a, b] / contexts3[a, b] * p
        loss -= math.log(p)
    return loss / (len(held_out) - 2)


def card(figures: dict[str, float], command: str, python: str) -> str:
    return f"""---
license: apache-2.0
library_name: transformers
language: en
tags:
- tersely
---

# The bundled model of tersely

A Llama with {figures["parameters"]:,} parameters, for demonstrations and tests: small enough to ship, trained hard
enough that compression hurts it as it hurts large models.

| | |
|---|--:|
| trained on | standard library of Python {python}, `stdlib:train`: {figures["training_tokens"]:,} tokens |
| tokens seen | {figures["tokens_seen"]:,} |
| held-out loss (`stdlib:evaluation`, {figures["held_out_tokens"]:,} tokens, windows of {WINDOW}) \
| **{figures["held_out_loss"]:.3f}** nats per token |
| interpolated Kneser-Ney trigram model of the same tokens | {figures["trigram_loss"]:.3f} nats per token |

Training, calibration and evaluation text are disjoint modules of the standard library, divided by the hash of their
names (`tersely.text.stdlib_split`).
The text is the Python Software Foundation's, under its licence; none is in here.

Made by `{command}`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/demo-model"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=256)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(asked.out)
    tokens = split_tokens("train", tokenizer, asked.work)
    held_out = split_tokens("evaluation", tokenizer, asked.work)
    torch.manual_seed(0)
    model = build(asked.width, asked.blocks, asked.intermediate)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size} parameters, {len(tokens)} training tokens, {len(held_out)} held out", flush=True)
    train(model, tokens, held_out, asked.steps, asked.work)
    model.save_pretrained(asked.out)
    figures = {
        "parameters": size,
        "steps": asked.steps,
        "tokens_seen": asked.steps * BATCH * WINDOW,
        "training_tokens": len(tokens),
        "held_out_tokens": len(held_out),
        "held_out_loss": held_out_loss(model, held_out, len(held_out) // WINDOW),
        "trigram_loss": kneser_ney_loss(tokens.tolist(), held_out.tolist()),
    }
    command = "python tools/train_demo_model.py --out src/tersely/assets/demo"
    (asked.out / "README.md").write_text(card(figures, command, platform.python_version()))
    for file in asked.out.iterdir():
        file.chmod(0o644)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

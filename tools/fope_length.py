"""What FoPE does beyond the length that a model was trained on: two measurements, each against RoPE treated alike.

    python tools/fope_length.py perplexity MODEL TRAIN_TEXT TEST_TEXT [--tokens 500000]
    python tools/fope_length.py passkey [--steps 400 --seeds 3]

`perplexity`: a trained model as it is, converted, and both tuned equally long on windows of its training length, all
weights, same windows and rate; then perplexity on windows of four times that length, quarter by quarter.  A quarter is
what the model says at these positions, with all the text before them in view.  Tuned beside FoPE are its two halves: the
clip without the series, and the series without the clip.

`passkey`: small models from nothing.  Four digits are told once in a sentence that repeats for ever, and asked for
later, in windows of 128 tokens of which the question comes in the second half; then asked in texts of one, two and four
times that length, told anywhere in the first half and asked at the end.  A row is right if all four digits are.  The
digits a question is answered with are the only ones that can be known; chance is 1 in 10 000.

Prints Markdown.  Everything is drawn from seeds; floating point makes the digits after the second depend on the machine.
"""

import argparse
import copy
import time
from dataclasses import replace

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tersely.anatomy import anatomy_of
from tersely.convert import FoPE, attention_settings, norm_tensors
from tersely.text import read_text, tokenise
from tersely.train.loop import train
from tersely.train.objectives import Tokens
from tersely.train.settings import Training

TIMES = 4
DIGITS, TELL, ASK, FIRST_WORD, WORDS = 10, 10, 11, 12, 12
KEY = 4
WINDOW = 128


def converted(model: PreTrainedModel, fope: FoPE | None) -> PreTrainedModel:
    """A copy, with other positions if there are any."""
    model = copy.deepcopy(model)
    if fope is None:
        return model
    for unit in anatomy_of(model).units:
        if unit.role == "attention":
            attention = attention_settings(model, unit)
            linears = {role: model.get_submodule(site.name) for role, site in unit.sites.items()}
            weights = {role: linear.weight for role, linear in linears.items()}
            weights |= {name: model.get_parameter(path) for name, path in norm_tensors(unit, attention).items()}
            biases = {role: linear.bias for role, linear in linears.items() if linear.bias is not None}
            model.set_submodule(unit.module, fope.convert(unit, weights, biases, attention)[""])
    return model.eval()


def tuned(model: PreTrainedModel, windows: Tensor, training: Training, seed: int) -> tuple[PreTrainedModel, float]:
    """The model itself, all weights trained, and the seconds that took."""
    begun = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    train(model, training, objectives={"tokens": Tokens()}, windows=windows, generator=generator, parameters=("*",))
    return model.eval(), time.perf_counter() - begun


# --- perplexity -------------------------------------------------------------------------------------------------------


def windows_of(source: str, tokenizer: object, length: int, count: int | None) -> Tensor:
    tokens = tokenise(read_text(source, "calibration").content, tokenizer)
    whole = len(tokens) // length
    return tokens[: whole * length].view(whole, length)[:count]


@torch.no_grad()
def by_quarter(model: PreTrainedModel, windows: Tensor) -> list[float]:
    """Perplexity in each of `TIMES` equal parts of the windows; the first token of a window is not predicted."""
    losses = []
    for rows in windows.split(8):
        logits = model(rows, use_cache=False).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none"))
    by_position = torch.cat(losses).double().mean(0)
    edge = windows.shape[1] // TIMES
    return [by_position[max(0, i * edge - 1) : (i + 1) * edge - 1].mean().exp().item() for i in range(TIMES)]


def perplexity(asked: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(asked.model)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    length = getattr(model.config, "train_window", None) or model.config.max_position_embeddings
    training_windows = windows_of(asked.train, tokenizer, length, None)
    test_windows = windows_of(asked.test, tokenizer, TIMES * length, asked.windows)
    training = Training(tokens=asked.tokens, batch=asked.batch, rate=asked.rate, held_out=0)
    full = FoPE(gain=asked.gain)
    variants = {
        "RoPE": None,
        f"FoPE, gain {asked.gain}": full,
        "clip alone, sine 1": replace(full, series=False),
        "clip alone, sine 0": replace(full, series=False, rest_sine=0),
        "series alone": replace(full, clip=False),
    }
    quarters = " | ".join(f"{i * length}–{(i + 1) * length}" for i in range(TIMES))
    print(
        f"Trained on {length} tokens; {len(test_windows)} windows of {TIMES * length}; tuned on {asked.tokens} tokens.\n"
    )
    print(f"| positions | tuned | {quarters} | seconds |\n|---|---|{'--:|' * TIMES}--:|")
    for name, fope in variants.items():
        exchanged = converted(model, fope)
        row(name, "no", by_quarter(exchanged, test_windows), None)
        exchanged, seconds = tuned(exchanged, training_windows, training, seed=0)
        row(name, "yes", by_quarter(exchanged, test_windows), seconds)


def row(name: str, state: str, figures: list[float], seconds: float | None) -> None:
    shown = " | ".join(f"{figure:.2f}" for figure in figures)
    print(f"| {name} | {state} | {shown} | {'' if seconds is None else f'{seconds:.0f}'} |", flush=True)


# --- passkey ----------------------------------------------------------------------------------------------------------


def texts(count: int, length: int, generator: torch.Generator, *, asked_at_end: bool) -> tuple[Tensor, Tensor]:
    """Texts [count, length] and where in each the question stands."""

    def below(bound: int) -> Tensor:
        return torch.randint(bound, (count, 1), generator=generator)

    tokens = FIRST_WORD + (below(WORDS) + torch.arange(length)) % WORDS
    key = torch.randint(DIGITS, (count, KEY), generator=generator)
    told = below(length // 2 - KEY - 1)
    question = torch.full_like(told, length - KEY - 1) if asked_at_end else length // 2 + below(length // 2 - KEY)
    for place, sign in ((told, TELL), (question, ASK)):
        tokens.scatter_(1, place, sign)
        tokens.scatter_(1, place + 1 + torch.arange(KEY), key)
    return tokens, question


@torch.no_grad()
def accuracy(model: PreTrainedModel, length: int, count: int = 200) -> float:
    """Share of texts whose question is answered right, each digit read off with the right ones before it."""
    tokens, question = texts(count, length, torch.Generator().manual_seed(1_000_003), asked_at_end=True)
    right = 0
    for rows, places in zip(tokens.split(20), question.split(20), strict=True):
        guesses = model(rows, use_cache=False).logits.argmax(-1)
        at = places + torch.arange(KEY)
        right += int((guesses.gather(1, at) == rows.gather(1, at + 1)).all(1).sum())
    return right / count


def fresh(seed: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=FIRST_WORD + WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=WINDOW, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def passkey(asked: argparse.Namespace) -> None:
    variants = {
        "RoPE": None,
        "FoPE, gain 0.3": FoPE(gain=0.3),
        "clip alone": FoPE(series=False),
    }
    training = Training(
        tokens=asked.steps * asked.batch * WINDOW, batch=asked.batch, rate=asked.rate, decay=0.1, held_out=0, warmup=0.1
    )
    lengths = [WINDOW * times for times in (1, 2, TIMES)]
    heads = " | ".join(f"{length} tokens" for length in lengths)
    print(f"Passkey of {KEY} digits, {asked.steps} steps of {asked.batch} windows of {WINDOW} tokens.\n")
    print(f"| positions | seed | {heads} | seconds |\n|---|---|{'--:|' * len(lengths)}--:|")
    for seed in range(asked.seeds):
        windows, _ = texts(asked.steps * asked.batch, WINDOW, torch.Generator().manual_seed(seed), asked_at_end=False)
        for name, fope in variants.items():
            model, seconds = tuned(converted(fresh(seed), fope), windows, training, seed)
            row(name, str(seed), [accuracy(model, length) for length in lengths], seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("perplexity")
    first.add_argument("model")
    first.add_argument("train")
    first.add_argument("test")
    first.add_argument("--tokens", type=int, default=500_000)
    first.add_argument("--batch", type=int, default=16)
    first.add_argument("--rate", type=float, default=5e-4)
    first.add_argument("--gain", type=float, default=0.1)
    first.add_argument("--windows", type=int, default=48)
    first.set_defaults(run=perplexity)
    second = commands.add_parser("passkey")
    second.add_argument("--steps", type=int, default=400)
    second.add_argument("--batch", type=int, default=32)
    second.add_argument("--rate", type=float, default=3e-3)
    second.add_argument("--seeds", type=int, default=3)
    second.set_defaults(run=passkey)
    asked = parser.parse_args()
    asked.run(asked)


if __name__ == "__main__":
    main()

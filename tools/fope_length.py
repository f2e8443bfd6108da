"""What FoPE does beyond the length that a model was trained on: two measurements, each against RoPE treated alike.

    python tools/fope_length.py perplexity MODEL TRAIN_TEXT TEST_TEXT [--tokens 500000]
    python tools/fope_length.py passkey [--steps 600] [--seeds 3]

`perplexity`: a trained model as it is, converted, and both tuned equally long on windows of its training length, all
weights, same windows and rate; then perplexity on windows of four times that length, quarter by quarter.  A quarter is
what the model says at these positions, with all the text before them in view.  Tuned beside FoPE are its two halves:
the clip without the series, and the series without the clip.

`passkey`: small models from nothing.  Two digits are told once in a sentence that repeats for ever.  In windows of 64
tokens they are asked for three times, anywhere after; then, in texts of one to eight times that length, they are told
anywhere in the first half and asked for at the end.  A text is right if both digits are; chance is 1 in 100.

Prints Markdown.  Everything is drawn from seeds; floating point makes the last digits depend on the machine.
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
KEY, ASKS = 2, 3
WINDOW = 64


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
    print(f"Trained on {length} tokens, tuned on {asked.tokens}; {len(test_windows)} windows of {TIMES * length}.\n")
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


def training_texts(count: int, generator: torch.Generator) -> Tensor:
    """Windows in which a key is told, and asked for `ASKS` times at places after that."""
    tokens, key = _sentences(count, WINDOW, generator)
    places = WINDOW // (KEY + 1)
    told = torch.randint(places - ASKS, (count, 1), generator=generator)
    order = torch.rand(count, places, generator=generator)
    order[torch.arange(places) <= told] = 2.0
    _write(tokens, key, told * (KEY + 1), TELL)
    for asked in order.argsort(dim=1)[:, :ASKS].split(1, dim=1):
        _write(tokens, key, asked * (KEY + 1), ASK)
    return tokens


def test_texts(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Texts in which a key is told in the first half and asked for at the end."""
    tokens, key = _sentences(count, length, generator)
    _write(tokens, key, torch.randint(length // 2 - KEY - 1, (count, 1), generator=generator), TELL)
    _write(tokens, key, torch.full((count, 1), length - KEY - 1), ASK)
    return tokens


def _sentences(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The sentence from any word on, and a key for each text."""
    tokens = FIRST_WORD + (torch.randint(WORDS, (count, 1), generator=generator) + torch.arange(length)) % WORDS
    return tokens, torch.randint(DIGITS, (count, KEY), generator=generator)


def _write(tokens: Tensor, key: Tensor, place: Tensor, sign: int) -> None:
    tokens.scatter_(1, place, sign)
    tokens.scatter_(1, place + 1 + torch.arange(KEY), key)


@torch.no_grad()
def accuracy(model: PreTrainedModel, length: int, count: int = 200) -> float:
    """Share of texts whose question is answered right, each digit read off with the right ones before it."""
    tokens = test_texts(count, length, torch.Generator().manual_seed(1_000_003))
    right = 0
    for rows in tokens.split(20):
        guesses = model(rows, use_cache=False).logits.argmax(-1)
        right += int((guesses[:, -KEY - 1 : -1] == rows[:, -KEY:]).all(1).sum())
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
    lengths = [WINDOW * times for times in (1, 2, 4, 8)]
    heads = " | ".join(f"{length} tokens" for length in lengths)
    print(f"Passkey of {KEY} digits, {asked.steps} steps of {asked.batch} windows of {WINDOW} tokens.\n")
    print(f"| positions | seed | {heads} | seconds |\n|---|---|{'--:|' * len(lengths)}--:|")
    for seed in range(asked.seeds):
        windows = training_texts(asked.steps * asked.batch, torch.Generator().manual_seed(seed))
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
    second.add_argument("--steps", type=int, default=600)
    second.add_argument("--batch", type=int, default=32)
    second.add_argument("--rate", type=float, default=3e-3)
    second.add_argument("--seeds", type=int, default=3)
    second.set_defaults(run=passkey)
    asked = parser.parse_args()
    asked.run(asked)


if __name__ == "__main__":
    main()

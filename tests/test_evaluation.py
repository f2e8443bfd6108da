"""Perplexity against an independent implementation, KL by hand, and that measuring leaves a model as it was."""

import hashlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import tersely
from tersely.errors import NumericalError, RecipeError
from tersely.evaluation import (
    Protocol,
    Recalled,
    cut,
    evaluate,
    folder_bytes,
    measure_agreement,
    measure_batches,
    measure_drift,
    measure_perplexity,
    measure_speed,
    measure_text,
    paired,
    parameter_count,
    window_losses,
)
from tersely.methods.quantize.rtn import RoundToNearest
from tersely.stats import Stats
from tersely.text import Text, read_text, window_length

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
DEMO = Path(tersely.__file__).parent / "assets" / "demo"
SPEED = {
    "prefill_tokens_per_second", "decode_tokens_per_second", "peak_bytes", "batches", "weight_bytes", "resident_bytes",
}  # fmt: skip
VOCABULARY, CONTEXT, LENGTH = 61, 48, 16
SHAPE = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "pad_token_id": None, "eos_token_id": 1}
GATED = SHAPE | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    # far from the usual 0.02, so that a random model has opinions
    "initializer_range": 0.5,
}


def llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**GATED | changes)).double()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    # dropout as published: a model left in training mode must not show it
    settings = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(**settings, **tokens, initializer_range=0.5)).double()


def gemma2() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**GATED, head_dim=4, final_logit_softcapping=2.0)).double()


FAMILIES = {"llama": llama, "gpt2": gpt2}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words are the numbers of their tokens, from 1; 0 is the first token."""
    words = Tokenizer(WordLevel({"<s>": 0} | {str(number): number for number in range(1, VOCABULARY)}))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")


@pytest.fixture(scope="module")
def text() -> Text:
    numbers = torch.randint(1, VOCABULARY, (203,), generator=torch.Generator().manual_seed(1))
    return Text("numbers.txt", " ".join(map(str, numbers.tolist())))


def by_hand(model: PreTrainedModel, tokens: list[int], length: int, stride: int, first: list[int]) -> tuple[float, int]:
    """Perplexity and number of predictions, one window and one token at a time."""
    losses, read, start = [], 0, 0
    while start + length - len(first) <= len(tokens):
        window = tokens[start : start + length - len(first)]
        logits = model(torch.tensor([first + window])).logits[0].detach()
        for offset, token in enumerate(window):
            has_past = offset + len(first) > 0
            if has_past and start + offset >= read:
                scores = logits[offset + len(first) - 1]
                losses.append(float(scores.exp().sum().log() - scores[token]))
        read = start + len(window)
        start += min(stride, len(window))
    return math.exp(sum(losses) / len(losses)), len(losses)


def state_of(model: PreTrainedModel) -> dict[str, object]:
    """All that a measurement could leave behind."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "configuration": model.config.to_dict(),
        "random": torch.get_rng_state(),
    }


def equal(first: object, second: object) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return first == second


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first_token", [False, True])
@pytest.mark.parametrize("stride", [LENGTH, LENGTH - 1, LENGTH - 2, 5, 1])
def test_perplexity_equals_that_of_a_plain_loop(family, first_token, stride, text, tokenizer):
    model = FAMILIES[family]().eval()
    windows = cut(text, tokenizer, model.config, length=LENGTH, stride=stride, first_token=first_token)
    wanted, predictions = by_hand(model, list(map(int, text.content.split())), LENGTH, stride, [0] * first_token)
    assert measure_perplexity(model, windows) == pytest.approx(wanted, rel=1e-6)
    assert windows.protocol(model).tokens == predictions


def test_a_float32_model_is_measured_in_float32(text, tokenizer):
    double = llama()
    windows = cut(text, tokenizer, double.config, length=LENGTH)
    wanted = measure_perplexity(double, windows)
    single = double.float()
    assert windows.protocol(single).dtype == "float32"
    assert measure_perplexity(single, windows) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("build", [llama, gpt2, gemma2])
@pytest.mark.parametrize("stride", [LENGTH, 5])
def test_neither_batch_nor_pieces_of_logits_matter(build, stride, text, tokenizer, monkeypatch):
    model, other = build(), build()
    other.get_input_embeddings().weight.data *= 1.1
    windows = cut(text, tokenizer, model.config, length=LENGTH, stride=stride)
    plain = measure_agreement(model, other, windows)
    monkeypatch.setattr(sys.modules[cut.__module__], "ROWS_AT_LEAST", 1)
    for tokens_per_batch, logits_at_once in [(1, 2**25), (3 * LENGTH, 2**25), (4096, 1), (2 * LENGTH, 20 * VOCABULARY)]:
        monkeypatch.setattr(sys.modules[cut.__module__], "TOKENS_PER_BATCH", tokens_per_batch)
        monkeypatch.setattr(sys.modules[cut.__module__], "LOGITS_AT_ONCE", logits_at_once)
        again = measure_agreement(model, other, windows)
        assert again.perplexity == pytest.approx(plain.perplexity, rel=1e-10)
        assert again.dense_perplexity == pytest.approx(plain.dense_perplexity, rel=1e-10)
        assert again.kl == pytest.approx(plain.kl, rel=1e-8)
        assert again.top1 == plain.top1


def test_logits_stay_bounded_and_the_body_runs_once_for_a_batch(text, tokenizer, monkeypatch):
    model = llama()
    windows = cut(text, tokenizer, model.config, length=LENGTH)
    monkeypatch.setattr(sys.modules[cut.__module__], "LOGITS_AT_ONCE", 30 * VOCABULARY)
    monkeypatch.setattr(sys.modules[cut.__module__], "ROWS_AT_LEAST", 1)
    sizes: list[int] = []
    blocks: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: sizes.append(logits.numel()))
    model.model.layers[0].register_forward_hook(lambda module, inputs, hidden: blocks.append(1))
    measure_perplexity(model, windows)
    assert max(sizes) <= 30 * VOCABULARY
    assert sum(sizes) == windows.predicted * VOCABULARY
    assert len(blocks) == len(list(windows.batches()))
    sizes.clear()
    measure_agreement(model, llama(1), windows)  # the bound holds for both models together
    assert max(sizes) <= 15 * VOCABULARY


def test_a_uniform_model_hesitates_between_all_tokens(text, tokenizer):
    model = llama()
    model.lm_head.weight.data.zero_()
    windows = cut(text, tokenizer, model.config, length=LENGTH)
    assert measure_perplexity(model, windows) == pytest.approx(VOCABULARY, rel=1e-12)


@pytest.mark.parametrize(("stride", "tokens"), [(LENGTH, 12 * 15), (15, 15 + 12 * 15), (8, 15 + 23 * 8)])
def test_the_protocol_says_all_that_the_number_depends_on(stride, tokens, text, tokenizer):
    model = llama()
    windows = cut(text, tokenizer, model.config, length=LENGTH, stride=stride)
    assert windows.protocol(model) == Protocol(
        text="numbers.txt",
        sha256=hashlib.sha256(text.content.encode()).hexdigest(),
        length=LENGTH,
        stride=stride,
        first_token=None,
        dtype="float64",
        windows=len(windows),
        tokens=tokens,
    )


def test_with_a_first_token_nothing_is_skipped_and_no_position_is_added(text, tokenizer):
    model = llama()
    windows = cut(text, tokenizer, model.config, length=LENGTH, first_token=True, limit=3)
    fed = torch.cat([windows.tokens(numbers) for numbers, _ in windows.batches()])
    assert fed.shape == (3, LENGTH)
    assert fed[:, 0].tolist() == [0, 0, 0]
    assert fed[:, 1:].flatten().tolist() == list(map(int, text.content.split()))[: 3 * (LENGTH - 1)]
    protocol = windows.protocol(model)
    assert (protocol.first_token, protocol.windows, protocol.tokens) == ("<s>", 3, 3 * (LENGTH - 1))


def test_default_length():
    assert window_length(LlamaConfig(**GATED)) == CONTEXT
    assert window_length(LlamaConfig(**GATED, train_window=32)) == 32
    assert window_length(LlamaConfig(**GATED | {"max_position_embeddings": 8192})) == 2048
    assert window_length(GPT2Config(n_positions=24)) == 24


def test_a_weight_that_is_no_number_names_the_first_window_it_reaches(text, tokenizer):
    model = llama().train()
    tokens = list(map(int, text.content.split()))
    # the embedding of a token that comes late for the first time poisons its window and none before
    late = next(token for token in tokens[3 * LENGTH :] if token not in tokens[: 3 * LENGTH])
    number = tokens.index(late) // LENGTH
    model.get_input_embeddings().weight.data[late] = float("nan")
    windows = cut(text, tokenizer, model.config, length=LENGTH)
    before = [module.training for module in model.modules()]
    with pytest.raises(NumericalError, match=rf"window {number} of numbers.txt \(tokens {number * LENGTH} to"):
        measure_perplexity(model, windows)
    assert [module.training for module in model.modules()] == before
    assert "forward" not in vars(model.model)
    measure_perplexity(model, cut(text, tokenizer, model.config, length=LENGTH, limit=number))


def test_logits_beyond_float32_and_losses_beyond_float64_raise(text, tokenizer):
    model = llama()
    windows = cut(text, tokenizer, model.config, length=LENGTH)
    model.lm_head.weight.data *= 1e6
    with pytest.raises(NumericalError, match="nats has no perplexity"):
        measure_perplexity(model, windows)
    model.lm_head.weight.data *= 1e36
    with pytest.raises(NumericalError, match="a logit of LlamaForCausalLM is not finite"):
        measure_perplexity(model.float(), windows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_agrees_with_itself_exactly(family, dtype, text, tokenizer):
    model, twin = FAMILIES[family]().to(dtype), FAMILIES[family]().to(dtype)
    windows = cut(text, tokenizer, model.config, length=LENGTH)
    for other in (model, twin):
        result = measure_agreement(model, other, windows)
        assert (result.kl, result.top1) == (0.0, 1.0)
        assert result.perplexity == result.dense_perplexity == measure_perplexity(model, windows)


@pytest.mark.parametrize("first_token", [False, True])
def test_agreement_by_hand(first_token, text, tokenizer):
    model, dense = llama(0).eval(), llama(1).eval()
    windows = cut(text, tokenizer, model.config, length=LENGTH, first_token=first_token)
    fed = torch.cat([windows.tokens(numbers) for numbers, _ in windows.batches()])
    with torch.no_grad():
        p, q = (one(fed).logits[:, :-1].softmax(-1) for one in (dense, model))
    result = measure_agreement(model, dense, windows)
    assert result.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-9)
    assert result.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), rel=1e-12)
    assert result.perplexity == pytest.approx(measure_perplexity(model, windows), rel=1e-12)
    assert result.dense_perplexity == pytest.approx(measure_perplexity(dense, windows), rel=1e-12)
    assert measure_agreement(dense, model, windows).kl != pytest.approx(result.kl, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_measuring_leaves_the_model_as_it_was(family, text, tokenizer):
    model, dense = FAMILIES[family]().train(), FAMILIES[family]()
    model.base_model.eval()  # modes that differ within a model come back as they were, one by one
    windows = cut(text, tokenizer, model.config, length=LENGTH)
    before = state_of(model), state_of(dense)
    measure_agreement(model, dense, windows)
    measure_speed(model, prompt_tokens=8, new_tokens=4, repeats=2)
    assert equal(before[0], state_of(model))
    assert equal(before[1], state_of(dense))


@pytest.mark.parametrize("family", FAMILIES)
def test_speed(family):
    result = measure_speed(FAMILIES[family](), prompt_tokens=8, new_tokens=4, repeats=3)
    assert result.prefill.tokens_per_second > 0
    assert result.decode.tokens_per_second > 0
    assert result.prefill.spread >= 0
    # a process with torch in it holds more than 50 MB and, here, less than 50 GB
    assert 50e6 < result.peak_bytes < 50e9


def test_sizes(tmp_path):
    model = llama(tie_word_embeddings=True)
    untied = llama(tie_word_embeddings=False)
    assert parameter_count(untied) - parameter_count(model) == VOCABULARY * 16
    dense = parameter_count(model)
    linear = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = RoundToNearest(group=8).compress(linear.weight.detach(), Stats(), 4)
    assert parameter_count(model) == dense  # codes count as the weights that they stand for
    (tmp_path / "below").mkdir()
    (tmp_path / "config.json").write_bytes(b"12345")
    (tmp_path / "below" / "shard").write_bytes(b"123")
    assert folder_bytes(tmp_path) == 8
    with pytest.raises(RecipeError, match="no folder"):
        folder_bytes(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": CONTEXT + 1}, "length 49 is beyond the model's context of 48"),
        ({"length": 1}, "length 1; wanted 2 or more tokens"),
        ({"length": 16, "stride": 17}, "stride 17 is not within 1 and the length 16"),
        ({"length": 16, "stride": 0}, "stride 0 is not within"),
        ({"length": 16, "limit": 0}, "0 windows were asked for"),
    ],
)
def test_geometry_that_makes_no_sense_is_refused(options, message, text, tokenizer):
    with pytest.raises(RecipeError, match=message):
        cut(text, tokenizer, LlamaConfig(**GATED), **options)


def test_texts_and_tokenizers_that_do_not_fit_are_refused(text, tokenizer):
    short = Text("short.txt", "5 6 7")
    with pytest.raises(RecipeError, match=r"short.txt has 3 tokens, one window takes 4"):
        cut(short, tokenizer, LlamaConfig(**GATED), length=4)
    assert len(cut(short, tokenizer, LlamaConfig(**GATED), length=4, first_token=True)) == 1
    with pytest.raises(RecipeError, match="the model knows 3 tokens; use the model's own tokenizer"):
        cut(text, tokenizer, LlamaConfig(**GATED | {"vocab_size": 3}), length=4)
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(RecipeError, match="the tokenizer has none"):
        cut(text, without, LlamaConfig(**GATED), length=4, first_token=True)


def bert(model_class: type[PreTrainedModel], **changes: object) -> PreTrainedModel:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return model_class(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **shape, **changes))


def t5() -> PreTrainedModel:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **shape))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: bert(BertForMaskedLM), "BertForMaskedLM is an encoder"),
        (lambda: bert(BertLMHeadModel), "BertLMHeadModel is an encoder"),
        (t5, "T5ForConditionalGeneration is an encoder and a decoder"),
        (lambda: LlamaModel(LlamaConfig(**GATED)), "LlamaModel has no head"),
    ],
)
def test_models_that_predict_no_next_token_are_refused(build, message, text, tokenizer):
    model, causal = build(), llama().float()
    windows = cut(text, tokenizer, causal.config, length=LENGTH)
    for refused in (
        lambda: measure_perplexity(model, windows),
        lambda: measure_agreement(causal, model, windows),
        lambda: measure_speed(model),
        lambda: evaluate(model, tokenizer, []),
    ):
        with pytest.raises(RecipeError, match=message):
            refused()


def test_an_encoder_asked_to_be_a_decoder_is_measured(text, tokenizer):
    model = bert(BertLMHeadModel, is_decoder=True)
    assert measure_perplexity(model, cut(text, tokenizer, model.config, length=LENGTH)) > 1


def test_models_that_cannot_be_compared_are_refused(text, tokenizer):
    model = llama()
    windows = cut(text, tokenizer, model.config, length=LENGTH)
    with pytest.raises(RecipeError, match="the model knows 61 tokens, the dense one 64"):
        measure_agreement(model, llama(vocab_size=64), windows)
    with pytest.raises(RecipeError, match=r"float64, the dense one in torch.float32"):
        measure_agreement(model, llama().float(), windows)


def test_speed_beyond_the_context_is_refused():
    with pytest.raises(RecipeError, match="beyond the model's context of 48"):
        measure_speed(llama(), prompt_tokens=40, new_tokens=9)
    with pytest.raises(RecipeError, match="at least 1"):
        measure_speed(llama(), prompt_tokens=4, new_tokens=0)


def test_speed_of_several_sequences():
    model = llama(num_hidden_layers=3).float()
    measured = measure_batches(model, [1, 4])
    assert [one.batch for one in measured.batches] == [1, 4]
    assert measured.weight_bytes == 4 * parameter_count(model) + 4 * 2 * model.model.rotary_emb.inv_freq.numel()
    assert measured.resident_bytes is None or 50e6 < measured.resident_bytes < 50e9
    # keys and values of two heads of four numbers, in three blocks, four bytes each
    cache = 2 * 2 * 4 * 3 * 4
    table = 4 * VOCABULARY * 16
    for one in measured.batches:
        assert (one.prefill_tokens, one.prompt_tokens, one.new_tokens) == (CONTEXT, CONTEXT // 2, CONTEXT // 2)
        for figure in (one.prefill_tokens_per_second, one.first_token_seconds, one.decode_tokens_per_second):
            assert 0 < figure.lower <= figure.median <= figure.upper
        assert one.cache_bytes_per_token == cache
        # every weight once a step, of the table of tokens the rows that are looked up; the cache at 3/4 of the context
        weights = measured.weight_bytes - table + one.batch * table // VOCABULARY
        assert one.bytes_read_per_token == weights / one.batch + cache * 3 * CONTEXT / 4


def test_a_tied_table_is_read_whole():
    model = llama(tie_word_embeddings=True).float()
    (one,) = measure_batches(model, [1]).batches
    cache = 2 * 2 * 4 * 2 * 4
    assert one.bytes_read_per_token == measure_batches(model, [1]).weight_bytes + cache * 3 * CONTEXT / 4


def test_several_sequences_need_room_and_leave_the_model_as_it_was():
    model = llama().train()
    before = state_of(model)
    measure_batches(model, [2])
    assert equal(before, state_of(model))
    with pytest.raises(RecipeError, match="give 1 or more sequences"):
        measure_batches(model, [])
    with pytest.raises(RecipeError, match="context 7"):
        measure_batches(llama(max_position_embeddings=7))


@pytest.fixture
def source(text, tmp_path) -> str:
    path = tmp_path / "numbers.txt"
    path.write_text(text.content)
    return str(path)


def test_what_was_not_measured_is_absent(source, tokenizer):
    model = llama()
    result = evaluate(model, tokenizer, [source], length=LENGTH)
    assert result.keys() == {"parameters", "texts"}
    (row,) = result["texts"]
    protocol = {"text", "sha256", "length", "stride", "first_token", "dtype", "windows", "tokens"}
    assert row.keys() == protocol | {"perplexity", "perplexity_interval"}
    assert row["first_token"] is None
    assert evaluate(model, tokenizer, []).keys() == {"parameters"}


def test_everything_measured(source, tokenizer, tmp_path):
    model, dense = llama(0, max_position_embeddings=256), llama(1)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    lines: list[tuple] = []
    result = evaluate(
        model,
        tokenizer,
        [source, source],
        length=LENGTH,
        stride=8,
        first_token=True,
        windows=6,
        against=dense,
        speed=True,
        folder=folder,
        progress=lambda *said: lines.append(said),
    )
    assert list(result) == ["model", "bytes", "parameters", "texts", "speed"]
    assert result["model"] == str(folder)
    assert result["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert result["speed"].keys() == SPEED
    first, second = result["texts"]
    assert first == second
    assert (first["windows"], first["tokens"], first["stride"], first["first_token"]) == (6, 15 + 5 * 8, 8, "<s>")
    assert first["kl"] > 0
    assert 0 <= first["top1"] <= 1
    assert first["perplexity"] != first["dense_perplexity"]
    assert lines == [(f"windows of {source}", done, 6) for done in (1, 6)] * 2
    assert json.loads(json.dumps(result)) == result


def test_a_name_is_given_as_the_model_was_opened(source, tokenizer, tmp_path):
    llama().save_pretrained(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert evaluate(model, tokenizer, [source], length=LENGTH, windows=1)["model"] == str(tmp_path / "model")


def test_every_refusal_comes_before_the_first_window(source, tokenizer):
    lines: list[tuple] = []
    with pytest.raises(RecipeError, match="no such file"):
        evaluate(llama(), tokenizer, [source, "absent.txt"], length=LENGTH, progress=lambda *said: lines.append(said))
    with pytest.raises(RecipeError, match="the dense one 64"):
        evaluate(
            llama(),
            tokenizer,
            [source],
            length=LENGTH,
            against=llama(vocab_size=64),
            progress=lambda *said: lines.append(said),
        )
    assert lines == []


def test_the_reference_model_reads_wikitext_as_others_measured_it():
    folder, raw = SHARED / "models" / "reference", SHARED / "data" / "wikitext-2" / "wiki.test.raw"
    if not (folder.is_dir() and raw.is_file()):
        pytest.skip(f"the reference model or WikiText-2 is not under {SHARED}")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    (row,) = evaluate(model, tokenizer, [str(raw)], windows=400)["texts"]
    assert (row["length"], row["windows"], row["tokens"]) == (256, 400, 400 * 255)
    assert row["perplexity"] == pytest.approx(38.63, abs=0.01)


def test_what_the_dense_body_said_is_not_computed_again(text, tokenizer, monkeypatch):
    model, dense = llama(1), llama(2)
    windows = cut(text, tokenizer, model.config, length=LENGTH, stride=5)
    recalled: Recalled = {}
    first = measure_agreement(model, dense, windows, recalled=recalled)
    assert len(recalled) == len(list(windows.batches()))
    monkeypatch.setattr(dense.get_decoder(), "forward", lambda *arguments, **named: pytest.fail("computed again"))
    assert measure_agreement(model, dense, windows, recalled=recalled) == first


# --- an independent implementation ------------------------------------------------------------------------------------


def independent(model: PreTrainedModel, numbers: list[int], length: int) -> float:
    """Perplexity in the fewest lines: its own windows, its own softmax, no batch."""
    total, count = 0.0, 0
    for start in range(0, len(numbers) - length + 1, length):
        window = numbers[start : start + length]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double()
        for position in range(1, length):
            scores = logits[position - 1]
            largest = scores.max()
            total += float(largest + (scores - largest).exp().sum().log() - scores[window[position]])
            count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("folder", [DEMO, SHARED / "models" / "reference", SHARED / "models" / "stories260k"])
def test_trained_models_are_measured_as_an_independent_implementation_measures_them(folder):
    if not folder.is_dir():
        pytest.skip(f"no model under {folder}")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    some = Text("stdlib", read_text("stdlib", "evaluation").content[5000:17000])
    length = 96
    windows = cut(some, tokenizer, model.config, length=length, limit=12)
    numbers = tokenizer(some.content, add_special_tokens=False)["input_ids"][: 12 * length]
    assert measure_perplexity(model, windows) == pytest.approx(independent(model, numbers, length), rel=1e-6)


@pytest.mark.parametrize("build", [llama, gpt2, gemma2])
def test_random_models_are_measured_as_an_independent_implementation_measures_them(build, text, tokenizer):
    model = build()
    numbers = list(map(int, text.content.split()))
    found = measure_perplexity(model, cut(text, tokenizer, model.config, length=LENGTH))
    assert found == pytest.approx(independent(model.eval(), numbers, LENGTH), rel=1e-10)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_the_windows(text, tokenizer):
    model, dense = llama(0), llama(1)
    windows = cut(text, tokenizer, model.config, length=LENGTH)
    said = measure_text(model, dense, windows)
    losses, dense_losses = window_losses(model, windows), window_losses(dense, windows)
    reach = 1.959963984540054 * float(losses.std()) / math.sqrt(len(windows))
    wanted = [math.exp(float(losses.mean()) - reach), math.exp(float(losses.mean()) + reach)]
    assert said["perplexity_interval"] == pytest.approx(wanted, rel=1e-9)
    assert said["perplexity_ratio_interval"] == list(paired(losses, dense_losses).ratio_interval)
    low, high = said["kl_interval"]
    assert low < said["kl"] < high
    agreement = measure_agreement(model, dense, windows)
    assert (said["perplexity"], said["dense_perplexity"]) == (agreement.perplexity, agreement.dense_perplexity)
    assert (said["kl"], said["top1"]) == (agreement.kl, agreement.top1)


def test_one_window_has_no_interval_and_overlapping_ones_no_ratio(text, tokenizer):
    model, dense = llama(0), llama(1)
    one = measure_text(model, dense, cut(text, tokenizer, model.config, length=LENGTH, limit=1))
    assert one.keys() == {"perplexity", "dense_perplexity", "kl", "top1"}
    overlapping = measure_text(model, dense, cut(text, tokenizer, model.config, length=LENGTH, stride=5))
    assert "perplexity_interval" in overlapping
    assert "perplexity_ratio_interval" not in overlapping  # the first window predicts more than the others


def test_an_interval_covers_what_other_texts_give():
    """Of many texts from one source, about 95 in 100 intervals hold the loss on a very long one."""
    from tersely.evaluation.texts import _interval

    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([15.0, *[5.0] * 39], dtype=torch.float64)
    weights, shares, hits = torch.full((40,), 1 / float(counts.sum()), dtype=torch.float64), counts / counts.sum(), 0
    for _ in range(400):
        sums = counts * (3 + torch.randn(40, generator=generator, dtype=torch.float64))
        low, high = _interval(sums, weights, shares)
        hits += low < 3 < high
    assert 0.9 < hits / 400 < 0.98


# --- drift ------------------------------------------------------------------------------------------------------------


def test_drift_by_hand(text, tokenizer):
    dense = llama(num_hidden_layers=3).eval()
    model = llama(num_hidden_layers=3).eval()
    model.model.layers[1].mlp.down_proj.weight.data *= 0.5
    windows = cut(text, tokenizer, model.config, length=LENGTH)
    fed = torch.cat([windows.tokens(numbers) for numbers, _ in windows.batches()])
    with torch.no_grad():
        ours, theirs = (one(fed, output_hidden_states=True).hidden_states[1:-1] for one in (model, dense))
    found = measure_drift(model, dense, windows)
    assert [one.block for one in found] == [0, 1, 2]
    assert (found[0].relative_error, found[0].cosine) == (0, pytest.approx(1, abs=1e-12))
    assert found[1].relative_error == pytest.approx(float((ours[1] - theirs[1]).norm() / theirs[1].norm()), rel=1e-9)
    cosines = torch.nn.functional.cosine_similarity(ours[1], theirs[1], dim=-1)
    assert found[1].cosine == pytest.approx(float(cosines.mean()), rel=1e-9)
    assert found[2].relative_error > 0


def test_drift_leaves_the_models_as_they_were_and_refuses_other_shapes(text, tokenizer):
    model, dense = llama().train(), llama(1)
    windows = cut(text, tokenizer, model.config, length=LENGTH)
    before = state_of(model), state_of(dense)
    measure_drift(model, dense, windows)
    assert equal(before[0], state_of(model))
    assert equal(before[1], state_of(dense))
    with pytest.raises(RecipeError, match=r"the model has no block model\.layers\.2"):
        measure_drift(model, llama(num_hidden_layers=3), windows)
    with pytest.raises(RecipeError, match="8 wide, the dense one 16"):
        measure_drift(llama(hidden_size=8), dense, windows)
    with pytest.raises(RecipeError, match="drift from the dense model"):
        evaluate(model, tokenizer, [], drift=True)
    dense.model.layers[1].mlp.down_proj.weight.data[0] = float("nan")
    with pytest.raises(NumericalError, match="block 1: a hidden state is not finite"):
        measure_drift(model, dense, windows)


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_stand_side_by_side(source, tokenizer):
    model, dense = llama(0), llama(1)
    figures = evaluate(model, tokenizer, [source], length=LENGTH, against=dense, drift=True, prompts=["5 6 7"])
    (sample,) = figures["samples"]
    assert sample.keys() == {"prompt", "text", "dense", "agreeing"}
    fed = torch.tensor([[5, 6, 7]])
    said = [one.eval().generate(fed, max_new_tokens=45, do_sample=False)[0, 3:].tolist() for one in (model, dense)]
    same = [a == b for a, b in zip(*said, strict=False)]
    assert sample["agreeing"] == (same.index(False) if False in same else len(same))
    assert sample["text"].split() == [str(number) for number in said[0] if number > 0]
    assert len(figures["texts"][0]["drift"]) == 2
    (alone,) = evaluate(model, tokenizer, [], prompts=["5 6 7"])["samples"]
    assert alone == {"prompt": "5 6 7", "text": sample["text"]}
    with pytest.raises(RecipeError, match="leaves no room in the model's context of 48"):
        evaluate(model, tokenizer, [], prompts=["5 " * 48])

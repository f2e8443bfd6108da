"""Every named protocol against a straight re-statement of its code, on three models; and what is refused."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tersely import text as text_module
from tersely.cli import main
from tersely.errors import NumericalError, RecipeError
from tersely.evaluation import PROTOCOLS, evaluate, measure_text, passages, protocol_named, require_same_protocol
from tersely.evaluation.passages import cleaned
from tersely.evaluation.protocols import CROPS
from tersely.text import Rows, read_rows, read_text, tokenise

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
BOS, EOS, FIRST = 0, 1, 2
VOCABULARY, CONTEXT, W = 64, 32, 12
MARKS = ["=", ",", ".", "@-@", "(", ")"]
WORDS = [*MARKS, *(f"w{number}" for number in range(FIRST + len(MARKS), VOCABULARY))]


def llama(seed: int = 0, **changes: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "bos_token_id": BOS, "eos_token_id": EOS}
    return LlamaForCausalLM(LlamaConfig(**shape, **settings | changes, initializer_range=0.5)).double().eval()


def wide_llama() -> PreTrainedModel:
    return llama(3, num_key_value_heads=2, tie_word_embeddings=True)


def gpt2() -> PreTrainedModel:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2, bos_token_id=BOS, eos_token_id=EOS
    )
    return GPT2LMHeadModel(config).double().eval()


MODELS = {"llama": llama, "wide llama": wide_llama, "gpt2": gpt2}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token; BOS in front of every text."""
    numbers = {"<s>": BOS, "</s>": EOS} | {word: number for number, word in enumerate(WORDS, start=FIRST)}
    words = Tokenizer(WordLevel(numbers, unk_token="</s>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


def sentence(generator: random.Random, words: int) -> str:
    return " ".join(generator.choice(WORDS[len(MARKS) :]) for _ in range(words))


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pages as WikiText's raw files have them, from a blank line to the next heading."""
    generator = random.Random(5)
    lines = [" "]
    for page in range(4):
        lines += [
            f" = {sentence(generator, 2)} = ",
            " ",
            f" {sentence(generator, 20 + 9 * page)} , ( w9 ) w8 @-@ w7 . ",
        ]
        lines += [" = = w9 = = ", " ", f" {sentence(generator, 14)} "]
    path = tmp_path_factory.mktemp("wiki") / "wiki.raw"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    generator = random.Random(6)
    path = tmp_path_factory.mktemp("web") / "web.jsonl"
    lines = [json.dumps({"text": sentence(generator, words)}) for words in (5, 40, 3, 25, W - 1, 31)]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def treebank(tmp_path_factory: pytest.TempPathFactory) -> str:
    generator = random.Random(7)
    path = tmp_path_factory.mktemp("ptb") / "ptb.txt"
    path.write_text("".join(f" {sentence(generator, 9)} \n" for _ in range(13)))
    return str(path)


def perplexity(model: PreTrainedModel, tokenizer, source: str, name: str, length: int | None = W, **options) -> float:
    protocol = protocol_named(name)
    fed = passages(
        read_rows(source, splits=protocol.splits), protocol, tokenizer, model.config, length=length, **options
    )
    return measure_text(model, None, fed)["perplexity"]


# --- the codes, said again as they say it -----------------------------------------------------------------------------


def losses(model: PreTrainedModel, window: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(window[None]).logits[0]
    return cross_entropy(logits[:-1], window[1:], reduction="none")


def joined(rows: list[str], by: str, tokenizer) -> Tensor:
    return torch.tensor(tokenizer(by.join(rows))["input_ids"])


def of_windows(model: PreTrainedModel, tokens: Tensor) -> float:
    """GPTQ, SparseGPT, Wanda: Σ mean·W / (n·W)."""
    count = len(tokens) // W
    sums = [losses(model, tokens[i * W : (i + 1) * W]).mean() * W for i in range(count)]
    return torch.exp(torch.stack(sums).sum() / (count * W)).item()


def concatenated(model: PreTrainedModel, tokens: Tensor) -> float:
    """LLM-Pruner, SVD-LLM: all losses in one row, averaged."""
    windows = tokens[: len(tokens) // W * W].view(-1, W)
    return math.exp(torch.cat([losses(model, window) for window in windows]).mean().item())


def sliced(model: PreTrainedModel, tokens: Tensor) -> float:
    """SliceGPT: a mean for each window, without padding tokens, then the mean of them."""
    means = []
    for window in tokens[: len(tokens) // W * W].view(-1, W):
        mask = window[1:] != EOS
        means.append((losses(model, window) * mask).sum() / mask.sum())
    return torch.exp(torch.stack(means).mean()).item()


def shared(model: PreTrainedModel, tokens: Tensor) -> float:
    """Basis Sharing: the rest is a window."""
    return torch.exp(torch.stack([losses(model, window).mean() for window in tokens.split(W)]).mean()).item()


def dobi_of(model: PreTrainedModel, crops: list[Tensor]) -> float:
    """The last token is cut off, then the shift; and all is divided by W."""
    sums = [losses(model, crop[:-1]) for crop in crops]
    return torch.exp(torch.stack(sums).sum() / (len(sums) * W)).item()


def crops_of_text(text: str, tokenizer) -> list[Tensor]:
    random.seed(0)
    crops = []
    for _ in range(CROPS):
        i = random.randint(0, len(text) - W - 1)
        found = torch.tensor(tokenizer(text[i : i + W * 10])["input_ids"])
        if len(found) < W:
            continue
        i = 0 if len(found) - W - 1 < 0 else random.randint(0, len(found) - W - 1)
        crops.append(found[i : i + W])
    return crops


def crops_of_documents(rows: list[str], tokenizer) -> list[Tensor]:
    random.seed(0)
    crops = []
    for _ in range(CROPS):
        while True:
            i = random.randint(0, len(rows) - 1)
            found = torch.tensor(tokenizer(rows[i])["input_ids"])
            if len(found) >= W:
                break
        i = 0 if len(found) - W - 1 < 0 else random.randint(0, len(found) - W - 1)
        crops.append(found[i : i + W])
    return crops


def rolling(model: PreTrainedModel, pages: list[str], tokenizer) -> float:
    """lm-eval: windows as `get_rolling_token_windows` makes them, one token at a time."""
    total = words = 0
    for page in pages:
        tokens = tokenizer(cleaned(page))["input_ids"]
        predicted = 0
        while predicted < len(tokens):
            end = min(predicted + W, len(tokens))
            given = [BOS, *tokens[: end - 1]] if predicted == 0 else tokens[end - W - 1 : end - 1]
            with torch.no_grad():
                said = model(torch.tensor([given])).logits[0].log_softmax(-1)
            for back, token in enumerate(reversed(tokens[predicted:end])):
                total -= float(said[len(given) - 1 - back, token])
            predicted = end
        words += len(re.split(r"\s+", page))
    return math.exp(total / words)


def lines_of(path: str) -> list[str]:
    """Rows of the hub's wikitext: a line with its end, or nothing."""
    with Path(path).open(encoding="utf-8") as file:
        return [line if line.strip() else "" for line in file]


def pages_of(path: str) -> list[str]:
    """As the hub's document-level data set cuts the file."""
    pages, page = [], []
    for line in Path(path).read_text(encoding="utf-8").split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            if "\n".join(page).strip():
                pages.append("\n".join(page))
            page = []
        page.append(line)
    return [*pages, "\n".join(page)]


def texts_of(path: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_every_code_on_wikitext(build, tokenizer, wikitext):
    model, rows = build(), lines_of(wikitext)
    tokens = joined(rows, "\n\n", tokenizer)
    assert tokens[0] == BOS and (tokens[1:] != BOS).all()
    assert len(tokens) % W > 1  # there is a rest
    crops = crops_of_text("\n\n".join(rows), tokenizer)
    assert 0 < len(crops) < CROPS  # some are short and lost
    wanted = {
        "gptq": of_windows(model, tokens),
        "gptq-new": of_windows(model, tokens),
        "wanda": of_windows(model, tokens),
        "llm-pruner": concatenated(model, tokens),
        "slicegpt": sliced(model, tokens),
        "basis-sharing": shared(model, tokens),
        "dobi": dobi_of(model, crops),
        "lm-eval-word": rolling(model, pages_of(wikitext), tokenizer),
    }
    assert wanted.keys() == PROTOCOLS.keys() - {"svd-llm"}
    for name, value in wanted.items():
        assert perplexity(model, tokenizer, wikitext, name) == pytest.approx(value, rel=1e-6), name
    assert wanted["gptq"] == pytest.approx(wanted["llm-pruner"], rel=1e-9)  # equal windows: the two means are one
    assert wanted["gptq"] != pytest.approx(wanted["basis-sharing"], rel=1e-6)
    single = build().float()
    assert perplexity(single, tokenizer, wikitext, "svd-llm") == pytest.approx(concatenated(single, tokens), rel=1e-5)


def test_every_code_on_the_treebank_and_on_documents(tokenizer, treebank, documents):
    model = llama()
    lines, rows = [line.strip() for line in Path(treebank).read_text().splitlines()], texts_of(documents)
    two, blank = joined(lines, "\n\n", tokenizer), joined(lines, " ", tokenizer)
    wanted = {
        ("gptq", treebank): of_windows(model, two),
        ("gptq-new", treebank): of_windows(model, blank),
        ("llm-pruner", treebank): concatenated(model, two),
        ("basis-sharing", treebank): shared(model, two),
        ("dobi", treebank): dobi_of(model, crops_of_text("\n\n".join(lines), tokenizer)),
        ("gptq", documents): of_windows(model, torch.cat(crops_of_documents(rows, tokenizer))),
        ("gptq-new", documents): of_windows(model, joined(rows[:1100], " ", tokenizer)[: 256 * W]),
        ("wanda", documents): of_windows(model, joined(rows[:1100], " ", tokenizer)[: 256 * W]),
        ("basis-sharing", documents): shared(model, joined(rows[:2000], "\n\n", tokenizer)),
        ("dobi", documents): dobi_of(model, crops_of_documents(rows, tokenizer)),
        ("lm-eval-word", documents): rolling(model, rows, tokenizer),
    }
    for (name, source), value in wanted.items():
        assert perplexity(model, tokenizer, source, name) == pytest.approx(value, rel=1e-6), (name, source)


def test_dobi_flatters_by_a_known_power(tokenizer, wikitext):
    """PPL^((W-2)/W) of the honest value on the same windows."""
    model, protocol = llama(), protocol_named("dobi")
    fed = passages(read_rows(wikitext), protocol, tokenizer, model.config, length=W)
    said = measure_text(model, None, fed)["perplexity"]
    honest = math.exp(torch.cat([losses(model, window) for window in fed.windows]).mean().item())
    assert said == pytest.approx(honest ** ((W - 2) / W), rel=1e-9)


def test_words_bytes_and_bits_are_one_loss(tokenizer, wikitext):
    model = llama()
    fed = passages(read_rows(wikitext), protocol_named("lm-eval-word"), tokenizer, model.config, length=W)
    said = measure_text(model, None, fed)
    total = math.log(said["perplexity"]) * fed.words
    assert math.log(said["byte_perplexity"]) * fed.content_bytes == pytest.approx(total, rel=1e-12)
    assert said["bits_per_byte"] == pytest.approx(math.log2(said["byte_perplexity"]), rel=1e-12)


def test_a_file_that_ends_within_a_line_has_no_further_line(tokenizer, wikitext, tmp_path):
    cut_off = tmp_path / "cut.raw"
    cut_off.write_text(Path(wikitext).read_text().rstrip()[:-4])
    wanted = rolling(llama(), pages_of(str(cut_off)), tokenizer)
    assert perplexity(llama(), tokenizer, str(cut_off), "lm-eval-word") == pytest.approx(wanted, rel=1e-6)


def test_padding_does_not_count_for_slicegpt(tokenizer, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text(" ".join([*WORDS[6:], "unknown", *WORDS[8:40], "unknown", *WORDS[9:20]]))
    model = llama()
    tokens = joined([path.read_text()], "", tokenizer)
    assert (tokens == EOS).sum() == 2
    assert perplexity(model, tokenizer, str(path), "slicegpt") == pytest.approx(sliced(model, tokens), rel=1e-9)


def test_a_context_is_filled_to_the_last_position(tokenizer, wikitext):
    """The predicted last token of a rolling window is not fed: learned positions would end before it."""
    model = gpt2()
    assert perplexity(model, tokenizer, wikitext, "lm-eval-word", None) > 1
    assert perplexity(model, tokenizer, wikitext, "wanda", None) > 1


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_logit_that_is_not_finite_raises_in_all_of_them(name, tokenizer, wikitext):
    model = llama().float() if name == "svd-llm" else llama()
    model.get_input_embeddings().weight.data[WORDS.index("w9") + FIRST] = float("nan")
    with pytest.raises(NumericalError, match=f"protocol {name}"):
        perplexity(model, tokenizer, wikitext, name)


@pytest.mark.parametrize("name", sorted(PROTOCOLS.keys() - {"wanda", "lm-eval-word"}))
def test_a_window_beyond_the_context_is_refused(name, tokenizer, wikitext):
    with pytest.raises(RecipeError, match=rf"windows of \d+ tokens, beyond the model's context of {CONTEXT}"):
        perplexity(llama(), tokenizer, wikitext, name, None)


def test_what_no_code_says_is_refused(tokenizer, wikitext, treebank, documents, tmp_path):
    model = llama()
    with pytest.raises(RecipeError, match=r"locuslab/wanda measures wikitext, c4, and nothing says"):
        perplexity(model, tokenizer, treebank, "wanda")
    with pytest.raises(RecipeError, match="did you mean 'wanda'"):
        protocol_named("wandb")
    with pytest.raises(RecipeError, match="no document has 45 tokens"):
        perplexity(llama(max_position_embeddings=64), tokenizer, documents, "gptq", 45)
    lone = tmp_path / "lone.txt"
    lone.write_text(" ".join(WORDS[6 : 6 + 2 * W]))  # and BOS: a rest of one token, which predicts nothing
    with pytest.raises(RecipeError, match="its code's number is none"):
        perplexity(model, tokenizer, str(lone), "basis-sharing")
    with pytest.raises(RecipeError, match="does not fill one window"):
        perplexity(model, tokenizer, str(lone), "gptq", 30)


def test_a_limit_on_rolling_windows_keeps_whole_documents(tokenizer, wikitext):
    model, protocol = llama(), protocol_named("lm-eval-word")
    whole = passages(read_rows(wikitext), protocol, tokenizer, model.config, length=W)
    some = passages(read_rows(wikitext), protocol, tokenizer, model.config, length=W, limit=len(whole) - 1)
    assert perplexity(model, tokenizer, wikitext, "lm-eval-word", limit=len(whole) - 1) == pytest.approx(
        rolling(model, pages_of(wikitext)[:-1], tokenizer), rel=1e-6
    )
    assert some.words < whole.words
    assert "only the first" in some.departures[-1]


# --- rows of sources --------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_data_sets(wikitext, treebank, documents, tmp_path):
    assert read_rows(wikitext).corpus == "wikitext"
    assert list(read_rows(wikitext).rows) == lines_of(wikitext)
    assert read_rows(treebank).corpus == "ptb"
    assert read_rows(treebank).rows[0] == Path(treebank).read_text().splitlines()[0].strip()
    assert (read_rows(documents).corpus, read_rows(documents).rows) == ("documents", tuple(texts_of(documents)))
    own = tmp_path / "own.txt"
    own.write_text("one\ntwo\n\nthree")
    assert read_rows(str(own)) == Rows(read_rows(str(own)).text, "text", ("one\ntwo\n\nthree",))
    assert read_rows(f"ptb={own}").rows == ("one", "two", "", "three")
    assert read_rows(f"wikitext={own}").rows == ("one\n", "two\n", "", "three")
    assert read_rows(f"{own}[:6]").rows == ("one\ntw",)
    with pytest.raises(RecipeError, match="a range of bytes is no rows"):
        read_rows(f"{documents}[:6]")


def test_the_checksum_is_that_of_the_text_however_it_is_read(wikitext, documents):
    for source in (wikitext, documents):
        assert read_rows(source).text == read_text(source, "evaluation")


# --- through the front door -------------------------------------------------------------------------------------------


def test_a_row_says_its_protocol_and_a_comparison_across_is_refused(tokenizer, wikitext, tmp_path):
    model, dense = llama(0), llama(1)
    (row,) = evaluate(model, tokenizer, [wikitext], length=W, protocol="gptq", against=dense)["texts"]
    assert (row["protocol"], row["code"], row["corpus"], row["length"]) == ("gptq", "IST-DASLab/gptq", "wikitext", W)
    assert row["departures"] == [f"windows of {W} tokens; the code takes 2048"]
    assert row["definition"]["join"] == "\n\n"
    assert row["kl"] > 0
    low, high = row["perplexity_interval"]
    assert low < row["perplexity"] < high
    low, high = row["perplexity_ratio_interval"]
    assert low < row["perplexity"] / row["dense_perplexity"] < high

    written = tmp_path / "dense.json"
    written.write_text(json.dumps(evaluate(dense, tokenizer, [wikitext], length=W, protocol="gptq")))
    (again,) = evaluate(model, tokenizer, [wikitext], length=W, protocol="gptq", recorded=written)["texts"]
    assert again["dense_perplexity"] == pytest.approx(row["dense_perplexity"], rel=1e-9)
    asked = {"length": W, "recorded": written}
    with pytest.raises(RecipeError, match=r"protocol wanda and protocol gptq: .* are not compared"):
        evaluate(model, tokenizer, [wikitext], protocol="wanda", **asked)
    with pytest.raises(RecipeError, match="protocol tersely and protocol gptq"):
        evaluate(model, tokenizer, [wikitext], **asked)
    with pytest.raises(RecipeError, match="length is 8 in one and 12 in the other"):
        evaluate(model, tokenizer, [wikitext], protocol="gptq", length=8, recorded=written)
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"evaluation": json.loads(written.read_text())}))
    with pytest.raises(RecipeError, match="protocol wanda and protocol gptq"):
        evaluate(model, tokenizer, [wikitext], protocol="wanda", length=W, recorded=report)
    require_same_protocol(row, again)


def test_a_protocol_has_its_own_stride_and_dtype(tokenizer, wikitext):
    with pytest.raises(RecipeError, match="has a stride of its own"):
        evaluate(llama(), tokenizer, [wikitext], length=W, stride=4, protocol="gptq")
    with pytest.raises(RecipeError, match="casts the model to float32, it is in float64"):
        evaluate(llama(), tokenizer, [wikitext], length=W, protocol="svd-llm")


def test_wikitext_has_the_windows_that_logs_show():
    """62 pages, 4358 rows; and the reference model by each protocol that fits, against the re-statements above."""
    folder, raw = SHARED / "models" / "reference", SHARED / "data" / "wikitext-2" / "wiki.test.raw"
    if not (folder.is_dir() and raw.is_file()):
        pytest.skip(f"the reference model or WikiText-2 is not under {SHARED}")
    rows = read_rows(str(raw))
    assert (rows.corpus, len(rows.rows)) == ("wikitext", 4358)
    assert len(pages_of(str(raw))) == 62
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor(tokenizer("\n\n".join(lines_of(str(raw))))["input_ids"])
    wanted = [losses(model, tokens[i * 128 : (i + 1) * 128]) for i in range(40)]
    found = perplexity(model, tokenizer, str(raw), "llm-pruner", None, limit=40)
    assert found == pytest.approx(math.exp(torch.cat(wanted).mean().item()), rel=1e-5)


# --- tokens are kept --------------------------------------------------------------------------------------------------


def test_tokens_of_a_long_text_are_kept_and_a_damaged_entry_is_made_again(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(text_module, "KEPT_FROM", 10)
    content = " ".join(WORDS * 3)
    plain = torch.tensor(tokenizer(content, add_special_tokens=False)["input_ids"])
    assert torch.equal(tokenise(content, tokenizer), plain)
    assert tokenise(content, tokenizer, special=True).tolist() == [BOS, *plain.tolist()]
    kept = sorted((tmp_path / "tersely" / "tokens").iterdir())
    assert len(kept) == 2  # with special tokens and without are two entries

    calls: list[str] = []
    patched = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    monkeypatch.setattr(
        type(patched), "__call__", lambda self, text, **named: calls.append(text) or {"input_ids": [BOS]}, raising=False
    )
    found = tokenise(content, patched)
    assert torch.equal(found, plain) and found.dtype == torch.long
    assert calls == []
    for file in kept:
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert tokenise(content, patched).tolist() == [BOS]
    assert calls == [content]
    tokenise(content + "!", patched)
    assert len(calls) == 2  # another text is another entry


def test_another_tokenizer_is_another_entry(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(text_module, "KEPT_FROM", 10)
    content = " ".join(WORDS * 3)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_tokens(["w9 w10"])
    other = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert len(tokenise(content, tokenizer)) - len(tokenise(content, other)) == 3


def test_a_cache_that_cannot_be_written_changes_nothing(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(text_module, "KEPT_FROM", 10)
    assert len(tokenise(" ".join(WORDS), tokenizer)) == len(WORDS)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_measures_by_protocol_and_refuses_to_compare_across(tokenizer, wikitext, tmp_path, capsys):
    def tersely_(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    model = tmp_path / "model"
    llama().float().save_pretrained(model)
    tokenizer.save_pretrained(model)
    asked = ["eval", model, "--text", wikitext, "--length", W, "--windows", "4"]
    status, said = tersely_(*asked, "--protocol", "gptq", "--json", tmp_path / "gptq.json")
    assert status == 0, said
    (row,) = json.loads((tmp_path / "gptq.json").read_text())["texts"]
    assert row["protocol"] == "gptq"
    assert row["departures"][0] in said
    status, said = tersely_(*asked, "--protocol", "gptq", "--against", tmp_path / "gptq.json")
    assert status == 0, said
    status, said = tersely_(*asked, "--protocol", "wanda", "--against", tmp_path / "gptq.json")
    assert (status, "protocol wanda and protocol gptq" in " ".join(said.split())) == (2, True)
    status, said = tersely_("eval", model, "--text", wikitext, "--protocol", "gptq")
    assert (status, "beyond the model's context" in said) == (2, True)
    questions = tmp_path / "arc_easy.jsonl"
    record = {"question": "w14", "choices": {"text": ["w15", "w16 w17"], "label": ["A", "B"]}, "answerKey": "A"}
    questions.write_text("\n".join([json.dumps(record)] * 3))
    status, said = tersely_(
        "eval", model, "--tasks", questions, "--prompt", "w15 w16", "--json", tmp_path / "tasks.json", "--questions", 2
    )
    assert status == 0, said
    figures = json.loads((tmp_path / "tasks.json").read_text())
    assert [row["n"] for row in figures["tasks"]] == [2, 2]
    assert figures["samples"][0]["prompt"] == "w15 w16"
    assert "acc_norm" in said
    status, said = tersely_(*asked, "--against", model, "--drift", "--json", tmp_path / "drift.json")
    assert status == 0, said
    (row,) = json.loads((tmp_path / "drift.json").read_text())["texts"]
    assert [one["relative_error"] for one in row["drift"]] == [0.0] * len(row["drift"])

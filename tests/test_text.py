"""A text is the same string wherever it comes from, and a source that holds none says so."""

import ast
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import HfApi, constants
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, LlamaConfig, MambaConfig, PreTrainedTokenizerFast

from families import tiny_config
from tersely.errors import RecipeError
from tersely.text import (
    SEPARATOR,
    STDLIB_SPLITS,
    Text,
    context_length,
    read_text,
    stdlib_documents,
    stdlib_split,
    tokenise,
    window_length,
)

# --- the standard library ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents() -> dict[str, list[tuple[str, str]]]:
    return {split: list(stdlib_documents(split)) for split in STDLIB_SPLITS}


def unit_of(document: str) -> str:
    """The top-level module of a file, or the topic itself."""
    return document if document.startswith("topic ") else document.partition("/")[0].removesuffix(".py")


def test_no_module_is_in_two_splits(documents):
    units = {split: {unit_of(name) for name, _ in found} for split, found in documents.items()}
    assert all(units.values())
    for unit in set.union(*units.values()):
        assert [split for split in STDLIB_SPLITS if unit in units[split]] == [stdlib_split(unit)]


def test_the_split_of_a_module_follows_from_its_name_alone():
    """By the last decimal digit of the name's sha256: 0 to 7 train, 8 calibration, 9 evaluation."""
    for unit in [*sys.stdlib_module_names, "topic assert", "a module of the future"]:
        digit = int(hashlib.sha256(unit.encode()).hexdigest(), 16) % 10
        assert stdlib_split(unit) == ("calibration" if digit == 8 else "evaluation" if digit == 9 else "train")
    known = {"asyncio": "calibration", "random": "evaluation", "json": "train"}
    assert {unit: stdlib_split(unit) for unit in known} == known


def test_every_split_has_modules_of_its_own(documents):
    for found in documents.values():
        assert sum(len(text) for _, text in found) > 200_000
        assert len({name for name, _ in found}) == len(found)


def test_documents_come_in_a_fixed_mixed_order(documents):
    for split, found in documents.items():
        names = [name for name, _ in stdlib_documents(split)]
        assert names == [name for name, _ in found]
        assert names == sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def test_documents_are_what_lies_on_disk(documents):
    root = Path(ast.__file__).parent
    files = [(name, text) for found in documents.values() for name, text in found if not name.startswith("topic ")]
    assert {"json/decoder.py", "ast.py"} <= {name for name, _ in files}
    assert not {name for name, _ in files if {"test", "tests", "idlelib"} & set(Path(name).parts)}
    for name, text in files[::20]:
        assert (root / name).read_text(encoding="utf-8", errors="ignore") == text


def test_the_purpose_chooses_the_split_unless_it_is_named(documents):
    joined = {split: SEPARATOR.join(text for _, text in found) for split, found in documents.items()}
    for purpose in ("calibration", "evaluation"):
        assert read_text("stdlib", purpose).content == joined[purpose]
        assert read_text("stdlib:train", purpose).content == joined["train"]
    with pytest.raises(RecipeError, match=r"no split 'test'; known: train, calibration, evaluation"):
        read_text("stdlib:test", "evaluation")


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_read_byte_for_byte(tmp_path):
    path = tmp_path / "a text"
    content = "\n one\r\n\r\ntwo \u2028 drei € 𝄞\n"
    path.write_bytes(content.encode())
    text = read_text(str(path), "evaluation")
    assert text == Text(str(path), content)
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_documents_of_a_jsonl_file_are_joined_by_two_newlines(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "one\\n", "id": 1}\n\n  \n{"text": ""}\r\n{"id": 3, "text": "three"}', encoding="utf-8")
    assert read_text(str(path), "calibration").content == "one\n\n\n\n\nthree"


@settings(max_examples=100, deadline=None, database=None)
@given(
    documents=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4),
    ensure_ascii=st.booleans(),
)
def test_any_document_survives_jsonl(documents, ensure_ascii, tmp_path_factory):
    """Also one that holds what Python takes for the end of a line, and JSON does not: U+2028, U+0085, form feeds."""
    path = tmp_path_factory.mktemp("jsonl") / "documents.jsonl"
    lines = [json.dumps({"text": document}, ensure_ascii=ensure_ascii) for document in documents]
    path.write_bytes("\n".join(lines).encode())
    joined = SEPARATOR.join(documents)
    if joined.strip():
        assert read_text(str(path), "calibration").content == joined
    else:
        with pytest.raises(RecipeError, match="is empty"):
            read_text(str(path), "calibration")


def test_a_line_separator_inside_a_record_ends_no_line(tmp_path):
    path = tmp_path / "web.jsonl"
    path.write_text('{"text": "one\u2028two\u0085three"}\n{"text": "four"}\n', encoding="utf-8")
    assert read_text(str(path), "calibration").content == "one\u2028two\u0085three\n\nfour"


@settings(max_examples=100, deadline=None, database=None)
@given(
    content=st.text(st.sampled_from("ab é€𝄞"), min_size=1, max_size=12),
    start=st.none() | st.integers(-15, 15),
    stop=st.none() | st.integers(-15, 15),
)
def test_a_range_takes_the_bytes_that_python_would(content, start, stop, tmp_path_factory):
    path = tmp_path_factory.mktemp("range") / "text.txt"
    path.write_text(content, encoding="utf-8")
    source = f"{path}[{'' if start is None else start}:{'' if stop is None else stop}]"
    # a character that is cut in two is dropped
    wanted = content.encode()[start:stop].decode(errors="ignore")
    if wanted.strip():
        assert read_text(source, "evaluation") == Text(source, wanted)
    else:
        with pytest.raises(RecipeError, match="is empty"):
            read_text(source, "evaluation")


def test_ranges_of_one_file_are_disjoint_texts(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "abc"}\n{"text": "def"}\n')
    parts = [read_text(f"{path}{part}", "evaluation").content for part in ("[:4]", "[4:6]", "[6:]")]
    assert "".join(parts) == "abc\n\ndef"  # of the text, not of the file
    assert parts == ["abc\n", "\nd", "ef"]


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "caf\u00e9".encode("latin-1"), r"latin\.txt: not UTF-8 at byte 3"),
        ("latin.jsonl", b'{"text": "\xff"}', r"latin\.jsonl: not UTF-8 at byte 10"),
        ("empty.txt", b"", r"is empty; name a source with some text in it"),
        ("blank.txt", b" \n\t\n", r"is empty"),
        ("empty.jsonl", b"\n\n", r"is empty"),
        (
            "broken.jsonl",
            b'{"text": "a"}\n\n{"text": \n',
            r"broken\.jsonl, line 3: not JSON \(.+\); one JSON record a line",
        ),
        ("bare.jsonl", b'{"text": "a"}\n"b"\n', r"bare\.jsonl, line 2: no string field 'text'"),
        ("other.jsonl", b'{"content": "a"}\n', r"other\.jsonl, line 1: no string field 'text'"),
        ("number.jsonl", b'{"text": 3}\n', r"number\.jsonl, line 1: no string field 'text'"),
        ("surrogate.jsonl", b'{"text": "\\ud800"}\n', r"surrogate\.jsonl, line 1"),
    ],
)
def test_a_file_without_a_text_says_where_and_why(tmp_path, name, content, message):
    with pytest.raises(RecipeError, match=message):
        read_text(write(tmp_path / name, content), "calibration")


@pytest.mark.parametrize(
    "name", ["nowhere.txt", "./nowhere", "/nowhere/at/all", "nowhere.jsonl", "wiki.raw", "a.tokens"]
)
def test_a_file_that_does_not_exist_is_not_looked_up_on_the_hub(name):
    with pytest.raises(
        RecipeError, match=r"no such file; give a text file, a \.jsonl file, a datasets name, or stdlib"
    ):
        read_text(name, "evaluation")


# --- datasets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A function that writes split → texts as a local dataset, in JSON lines or parquet, and gives its path."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def make(name: str = "dataset", column: str = "text", parquet: bool = False, **splits: list[str | None]) -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for split, texts in splits.items():
            if parquet:
                pyarrow.parquet.write_table(pyarrow.table({column: texts}), folder / f"{split}.parquet")
            else:
                lines = [json.dumps({column: text}) for text in texts]
                (folder / f"{split}.jsonl").write_text("\n".join(lines))
        return str(folder)

    return make


@pytest.mark.parametrize("parquet", [False, True])
def test_a_dataset_is_calibrated_on_its_train_and_evaluated_on_its_test_split(dataset, parquet):
    name = dataset(parquet=parquet, train=["one", "two"], test=["three", "", "four"], validation=["five"])
    assert read_text(name, "calibration") == Text(name, "one\n\ntwo")
    assert read_text(name, "evaluation") == Text(name, "three\n\n\n\nfour")
    assert read_text(f"{name}::validation", "calibration").content == "five"
    assert read_text(f"{name}:default:train", "evaluation").content == "one\n\ntwo"
    assert read_text(f"{name}:default", "evaluation").content == "three\n\n\n\nfour"
    assert read_text(f"{name}::train[1:5]", "evaluation").content == "ne\n\n"


def test_a_configuration_is_named_after_the_first_colon(dataset, tmp_path):
    name = dataset("many/a", train=["from a"]).removesuffix("/a")
    dataset("many/b", train=["from b"])
    card = "---\nconfigs:\n" + "".join(f"- config_name: {c}\n  data_files: {c}/train.jsonl\n" for c in "ab") + "---\n"
    (tmp_path / "many" / "README.md").write_text(card)
    assert read_text(f"{name}:a", "calibration").content == "from a"
    assert read_text(f"{name}:b:train", "evaluation").content == "from b"
    with pytest.raises(RecipeError, match=r"neither a file nor a dataset that can be loaded \(.*'c' not found"):
        read_text(f"{name}:c", "calibration")


def test_a_dataset_that_does_not_fit_is_an_error_that_says_what_there_is(dataset):
    name = dataset(column="sentence", train=["one"])
    with pytest.raises(RecipeError, match=r"no column 'text'; its columns: sentence"):
        read_text(name, "calibration")
    with pytest.raises(RecipeError, match=r"Bad split: test"):
        read_text(name, "evaluation")


def test_a_dataset_with_gaps_is_an_error_of_ours(dataset):
    with pytest.raises(RecipeError, match="text"):
        read_text(dataset(train=["one", None]), "calibration")


@pytest.mark.parametrize("answer", [None, 404], ids=["out of reach", "answers"])
def test_a_hub_that_cannot_be_reached_is_asked_once(answer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    switched_off = []

    def silent(self, path, **keywords):
        error = OSError("no route to host")
        if answer is not None:
            error.response = answer
        raise error

    def load(*arguments, **keywords):
        switched_off.append((datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE))
        raise OSError("gone")

    monkeypatch.setattr(HfApi, "dataset_info", silent)
    monkeypatch.setattr(datasets, "load_dataset", load)
    reach = r"out of reach \(no route to host\); connect, or give a file, or stdlib" if answer is None else r"\(gone\)"
    with pytest.raises(RecipeError, match=reach):
        read_text("owner/texts", "calibration")
    assert switched_off == [(answer is None,) * 2]
    assert (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE) == (False, False)


def test_copies_of_a_dataset_are_read_without_the_hub(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **keywords: [{"text": "one"}, {"text": "two"}])
    assert read_text("owner/copied", "calibration") == Text("owner/copied", "one\n\ntwo")


# --- tokens and windows -----------------------------------------------------------------------------------------------


def test_a_text_is_tokenised_once_without_special_tokens(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 1)])
    adding = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=64)
    assert adding("w3 w9")["input_ids"] == [2, 3, 9, 1]
    tokens = tokenise(" ".join(["w3", "w9", "<s>", "w5"] * 500), adding)  # far beyond what the tokenizer thinks is long
    assert tokens.tolist() == [3, 9, 2, 5] * 500
    assert tokens.dtype == torch.long


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (LlamaConfig(max_position_embeddings=4096), 4096),
        (GPT2Config(n_positions=1024), 1024),
        (tiny_config("gemma3"), 64),  # inside its text_config
        (MambaConfig(), None),
    ],
    ids=["llama", "gpt2", "gemma3", "mamba"],
)
def test_the_context_is_what_the_configuration_says(config, context):
    assert context_length(config) == context


@pytest.mark.parametrize(
    ("settings", "asked", "length"),
    [
        ({"max_position_embeddings": 512}, None, 512),
        ({"max_position_embeddings": 2048}, None, 2048),
        ({"max_position_embeddings": 131072}, None, 2048),
        ({"max_position_embeddings": 131072}, 4096, 4096),
        ({"max_position_embeddings": 512}, 2, 2),
        ({"max_position_embeddings": 512, "train_window": 128}, None, 128),
        ({"max_position_embeddings": 8192, "train_window": 4096}, None, 4096),
        ({"max_position_embeddings": 512, "train_window": 128}, 256, 256),
    ],
)
def test_the_window_is_what_was_asked_else_what_was_trained_else_the_usual(settings, asked, length):
    assert window_length(LlamaConfig(**settings), asked) == length


def test_without_a_limit_the_usual_window_holds():
    assert window_length(MambaConfig()) == 2048
    assert window_length(MambaConfig(), 10**6) == 10**6


@pytest.mark.parametrize("asked", [-1, 0, 1])
def test_a_window_of_less_than_two_tokens_predicts_nothing(asked):
    with pytest.raises(RecipeError, match=rf"length {asked}; wanted 2 or more tokens"):
        window_length(LlamaConfig(), asked)


def test_a_window_beyond_the_context_was_never_trained():
    with pytest.raises(RecipeError, match=r"length 65 is beyond the model's context of 64; give --length 64 or less"):
        window_length(LlamaConfig(max_position_embeddings=64), 65)
    with pytest.raises(RecipeError, match=r"length 128 is beyond the model's context of 64"):
        window_length(LlamaConfig(max_position_embeddings=64, train_window=128))

"""Where texts come from: files, JSON lines, `datasets` names, and the standard library of this Python.

A text is one string, its documents joined by two newlines, with a checksum that travels with every number measured on
it.  It is tokenised once, as a whole, without special tokens, and cut into windows.

The source ``stdlib`` needs no network: sources and documentation topics of the running Python.  Its modules are divided
by the hash of their names into three disjoint splits, so that a module never moves between training, calibration and
evaluation, whatever the version of Python.

Published protocols join the *rows* of a data set in manners of their own, so that a source also hands out rows
(`read_rows`).  What the rows of a plain file are depends on what it is a file of:

    WikiText   every line with its end, blank ones as empty strings: what the hub's wikitext-2-raw-v1 holds
    PTB        every line, stripped: what the hub's ptb_text_only holds
    any other  one row, the file itself

The first two are told by their form (all lines begin and end with a blank; WikiText has headings, `` = Title = ``), or
named: ``wikitext=FILE``, ``ptb=FILE``, ``c4=FILE``.  Records of JSON lines and of datasets are rows as they are.

Tokens of a long text are kept in the user's cache folder under the checksum of the text and of all that its tokenizer
says of itself; a damaged entry is made again.
"""

import ast
import hashlib
import json
import logging
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tersely.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Purpose = Literal["calibration", "evaluation"]
Corpus = Literal["wikitext", "ptb", "c4", "documents", "text"]
"""What the rows of a source are rows of; a corpus that protocols name, documents of anything else, or one text."""

SEPARATOR = "\n\n"
LONGEST_NAME = 1024  # longer ones are texts given by mistake, which no file system is asked about

STDLIB_SPLITS = ("train", "calibration", "evaluation")
# Tables, vendored code, and packages that some distributions leave out: no text that every installation shares.
STDLIB_EXCLUDED = {"encodings", "distutils", "idlelib", "lib2to3", "tkinter", "turtledemo", "pydoc_data", "ensurepip"}
STDLIB_TEST_FOLDERS = {"test", "tests"}

# Short names of the texts that the literature uses: hub path, configuration, column, split to evaluate on.
DATASETS = {
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "test"),
    "c4": ("allenai/c4", "en", "text", "validation"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "sentence", "test"),
}
PATIENCE = 10.0
"""Seconds in which the hub has to answer."""
MOST_OF_A_DATASET = 64 * 10**6
"""Characters after which a dataset is read no further: C4 alone would be 300 GB."""
FIRST_SHARD = {"c4": "en/c4-validation.00000-of-00008.json.gz"}
"""The one file that protocols read of a corpus, whatever its split."""

NAMED_CORPORA: tuple[Corpus, ...] = ("wikitext", "ptb", "c4")
KEPT_FROM = 2**19
"""Characters from which on tokens are kept: below, making them is faster than finding them."""


@dataclass(frozen=True)
class Text:
    """A text and where it came from.  `sha256` is taken over the UTF-8 bytes of `content`."""

    source: str
    content: str
    revision: str | None = None
    """The commit of the hub that a dataset was read at; None where there is none or the hub cannot be asked."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Rows:
    """A text in the records that its source holds.

    `text.content` is the file itself where there is one, else the rows joined by two newlines: its checksum is the one
    that `read_text` gives.  `split` is the one that was read of a dataset.
    """

    text: Text
    corpus: Corpus
    rows: tuple[str, ...]
    split: str | None = None


def read_text(source: str, purpose: Purpose) -> Text:
    """Read a text.

    `source` is a text file, a ``.jsonl`` file whose records have a ``text`` field, ``stdlib``, or a `datasets` name
    written ``name[:configuration[:split]][@revision]`` (a hub path, a local folder, or one of `DATASETS`).  A trailing
    ``[start:stop]`` takes that range of UTF-8 bytes.  `purpose` chooses the split where the source leaves it open.

    Raises RecipeError for a source that does not exist, cannot be decoded, or holds no text.
    """
    if not source.strip():
        raise RecipeError("a text without a name; give a file, a datasets name, or stdlib")
    name, start, stop = _byte_range(source)
    revision = None
    if name == "stdlib" or name.startswith("stdlib:"):
        content = SEPARATOR.join(_stdlib(name.partition(":")[2] or purpose))
    elif _is_file(name):
        path = Path(name)
        content = SEPARATOR.join(_jsonl(path)) if path.suffix == ".jsonl" else _decoded(path)
    else:
        documents, _, revision = _dataset(name, purpose)
        content = SEPARATOR.join(documents)
    return _text(source, _sliced(content, start, stop), revision)


def read_rows(source: str, purpose: Purpose = "evaluation", splits: Mapping[str, str] | None = None) -> Rows:
    """Read a text as the rows of its source; see the head of this file.

    `source` is as for `read_text`, and may begin with the name of a corpus, ``ptb=FILE``.  A range of bytes is taken of
    plain files only.  `splits`: corpus → split to read of it where the source names none.

    Raises RecipeError as `read_text` does.
    """
    if not source.strip():
        raise RecipeError("a text without a name; give a file, a datasets name, or stdlib")
    named, rest = _named_corpus(source)
    name, start, stop = _byte_range(rest)
    revision, split = None, None
    corpus: Corpus = "documents"
    if _is_file(name) and Path(name).suffix != ".jsonl":
        content = _text(source, _sliced(_decoded(Path(name)), start, stop)).content
        corpus = named or _corpus_of(content)
        return Rows(Text(source, content), corpus, tuple(_rows_of(content, corpus)))
    if start is not None or stop is not None:
        raise RecipeError(f"text {source!r}: a range of bytes is no rows; give the source whole, or a plain file")
    if name == "stdlib" or name.startswith("stdlib:"):
        documents: Sequence[str] = _stdlib(name.partition(":")[2] or purpose)
    elif _is_file(name):
        documents = _jsonl(Path(name))
    else:
        if (first := re.split("[:@]", name)[0]) in DATASETS:
            corpus = next(one for one in NAMED_CORPORA if one == first)
        documents, split, revision = _dataset(name, purpose, (splits or {}).get(corpus), corpus != "documents")
    return Rows(_text(source, SEPARATOR.join(documents), revision), named or corpus, tuple(documents), split)


def size_of(source: str, purpose: Purpose) -> int | None:
    """Bytes of a text, as far as they are known before it is read; None of a data set, and of what is not there."""
    name, start, stop = _byte_range(source)
    if name == "stdlib" or name.startswith("stdlib:"):
        size = _stdlib_size(name.partition(":")[2] or purpose)
    elif _is_file(name):
        size = Path(name).stat().st_size
    else:
        return None
    return len(range(size)[start:stop])


def tokenise(content: str, tokenizer: "PreTrainedTokenizerBase", *, special: bool = False) -> "Tensor":
    """Token numbers of the whole text, shape ``[tokens]``.

    No special tokens are added, unless `special` asks for those that the tokenizer adds to a text on its own.
    """
    import torch

    kept = _kept_tokens(content, tokenizer, special) if len(content) >= KEPT_FROM else None
    if kept is not None and (found := _read_tokens(kept)) is not None:
        return torch.frombuffer(found, dtype=torch.int32).long()
    # verbose=False: the warning about a sequence beyond the context does not apply, windows are cut from it
    numbers = tokenizer(content, add_special_tokens=special, verbose=False)["input_ids"]
    tokens = torch.tensor(numbers, dtype=torch.long)
    if kept is not None:
        _keep_tokens(kept, tokens.int().numpy().tobytes())
    return tokens


def _kept_tokens(content: str, tokenizer: "PreTrainedTokenizerBase", special: bool) -> Path | None:
    """Where tokens are kept; None for a tokenizer that cannot be told from others by what it says of itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    import tokenizers

    said = (type(tokenizer).__name__, tokenizers.__version__, special, backend.to_str(), content)
    digest = hashlib.sha256()
    for part in said:
        digest.update(hashlib.sha256(str(part).encode()).digest())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "tersely" / "tokens" / digest.hexdigest()


def _read_tokens(path: Path) -> bytearray | None:
    """32-bit numbers behind their checksum; None where there are none, or others than were written."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    return bytearray(stored[32:]) if stored[:32] == hashlib.sha256(stored[32:]).digest() else None


def _keep_tokens(path: Path, tokens: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
        temporary.write_bytes(hashlib.sha256(tokens).digest() + tokens)
        temporary.replace(path)
    except OSError as error:  # a full or read-only disk costs time, and no number
        logger.info("tokens are not kept in %s: %s", path.parent, error)


def check_vocabulary(tokens: "Tensor", config: "PreTrainedConfig") -> None:
    """Raises RecipeError for token numbers that the model does not have."""
    vocabulary = config.get_text_config().vocab_size
    if len(tokens) and (largest := int(tokens.max())) >= vocabulary:
        raise RecipeError(
            f"the tokenizer made token {largest}, the model knows {vocabulary} tokens; use the model's own tokenizer"
        )


def context_length(config: "PreTrainedConfig") -> int | None:
    """The most positions the model can be fed, None where its configuration knows no such limit."""
    settings = config.get_text_config()
    return getattr(settings, "max_position_embeddings", None) or getattr(settings, "n_positions", None)


def window_length(config: "PreTrainedConfig", asked: int | None = None) -> int:
    """Tokens in a window: what was asked, else the model's `train_window`, else min(2048, its context).

    Raises RecipeError below 2 tokens, and beyond the context, where positions were never trained.
    """
    context = context_length(config)
    usual = getattr(config, "train_window", None) or min(2048, context or 2048)
    length = usual if asked is None else asked
    if length < 2:
        raise RecipeError(f"length {length}; wanted 2 or more tokens, since the first of a window is not predicted")
    if context is not None and length > context:
        raise RecipeError(
            f"length {length} is beyond the model's context of {context}; give --length {context} or less"
        )
    return length


def stdlib_documents(split: str) -> Iterator[tuple[str, str]]:
    """(name, text) of every standard-library source file and documentation topic of a split, in a mixed, fixed
    order."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = [*_stdlib_sources(root), *_stdlib_topics(root)]
    if not documents:
        raise RecipeError(f"no sources of the standard library under {root}; give --text or --calibrate a file instead")
    chosen = [(name, text) for unit, name, text in documents if stdlib_split(unit) == split]
    yield from sorted(chosen, key=lambda document: _digest(document[0]))


def stdlib_split(unit: str) -> str:
    """The split that a top-level module or documentation topic belongs to: 80 % train, 10 % each of the others."""
    return {8: "calibration", 9: "evaluation"}.get(_digest(unit) % 10, "train")


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest())


def _stdlib(split: str) -> list[str]:
    if split not in STDLIB_SPLITS:
        raise RecipeError(f"the standard library has no split {split!r}; known: {', '.join(STDLIB_SPLITS)}")
    return [text for _, text in stdlib_documents(split)]


@lru_cache
def _stdlib_size(split: str) -> int:
    return len(SEPARATOR.join(_stdlib(split)).encode())


def _stdlib_sources(root: Path) -> Iterator[tuple[str, str, str]]:
    for unit in sorted(sys.stdlib_module_names - STDLIB_EXCLUDED):
        single, package = root / f"{unit}.py", root / unit
        for file in [single] if single.is_file() else sorted(package.rglob("*.py")):
            relative = file.relative_to(root)
            if not STDLIB_TEST_FOLDERS & set(relative.parts):
                yield unit, relative.as_posix(), file.read_text(encoding="utf-8", errors="ignore")


def _stdlib_topics(root: Path) -> Iterator[tuple[str, str, str]]:
    file = root / "pydoc_data" / "topics.py"
    if not file.is_file():
        return
    # parsed, not imported: the module is one literal dictionary
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in ast.literal_eval(node.value).items():
                yield f"topic {topic}", f"topic {topic}", text


def _byte_range(source: str) -> tuple[str, int | None, int | None]:
    found = re.fullmatch(r"(.+)\[(-?\d*):(-?\d*)\]", source, flags=re.DOTALL)
    if found is None:
        return source, None, None
    name, start, stop = found.groups()
    return name, int(start) if start else None, int(stop) if stop else None


def _is_file(name: str) -> bool:
    return len(name) < LONGEST_NAME and Path(name).is_file()


def _text(source: str, content: str, revision: str | None = None) -> Text:
    if not content.strip():
        raise RecipeError(f"text {source!r} is empty; name a source with some text in it")
    return Text(source, content, revision)


def _sliced(content: str, start: int | None, stop: int | None) -> str:
    if start is None and stop is None:
        return content
    return content.encode()[start:stop].decode(errors="ignore")


def _named_corpus(source: str) -> tuple[Corpus | None, str]:
    """``ptb=FILE`` as its two parts; a file of such a name is a file."""
    name, is_named, rest = source.partition("=")
    for corpus in NAMED_CORPORA if is_named and not _is_file(source) else ():
        if name == corpus:
            return corpus, rest
    return None, source


def _corpus_of(content: str) -> Corpus:
    """By the form of the lines; a range of bytes may have cut the first and the last."""
    lines = [line for line in content.split("\n")[1:-1] if line]
    if not lines or not all(line[0] == line[-1] == " " for line in lines):
        return "text"
    return "wikitext" if any(re.fullmatch(" = [^=]+ = ", line) for line in lines) else "ptb"


def _rows_of(content: str, corpus: Corpus) -> list[str]:
    lines = re.findall(r"[^\n]*\n|[^\n]+", content)
    match corpus:
        case "wikitext":
            return [line if line.strip() else "" for line in lines]
        case "ptb":
            return [line.strip() for line in lines]
        case "c4":
            return [line.removesuffix("\n") for line in lines if line.strip()]
    return [content]


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"text {path}: not UTF-8 at byte {error.start}; convert it, or name a text file") from error


def _jsonl(path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(_decoded(path).split("\n"), start=1):  # records may hold other line separators
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecipeError(f"text {path}, line {number}: not JSON ({error.msg}); one JSON record a line") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise RecipeError(f"text {path}, line {number}: no string field 'text' in the record")
        if not _encodable(record["text"]):
            raise RecipeError(f"text {path}, line {number}: half a surrogate pair, which is no text; repair the record")
        documents.append(record["text"])
    return documents


@lru_cache(maxsize=8)  # a stream is read once a process, not once a use
def _dataset(
    name: str, purpose: Purpose, usual: str | None = None, whole: bool = False
) -> tuple[tuple[str, ...], str, str | None]:
    """Documents, split and revision of a dataset.  `usual` is the split to read where the name has none; `whole`: all
    of it, or of its `FIRST_SHARD`."""
    looks_like_file = name.startswith((".", "/", "~")) or Path(name).suffix in {".txt", ".jsonl", ".raw", ".tokens"}
    if looks_like_file and not Path(name.partition(":")[0]).is_dir():
        raise RecipeError(f"text {name!r}: no such file; give a text file, a .jsonl file, a datasets name, or stdlib")
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(
            f"text {name!r} is no file; to read it as a dataset install the extra: pip install 'tersely[datasets]'"
        ) from error
    name_alone, _, pinned = (name, "", "") if Path(name.partition(":")[0]).exists() else name.partition("@")
    first, *rest = name_alone.split(":")
    path, configuration, column, evaluated = DATASETS.get(first, (first, None, "text", "test"))
    configuration = rest[0] or configuration if rest else configuration
    split = rest[1] if len(rest) > 1 else "train" if purpose == "calibration" else usual or evaluated
    documents, characters = [], 0
    revision, out_of_reach = _revision(path, pinned or None)
    asked: dict[str, object] = {} if revision is None else {"revision": revision}
    if whole and split == "validation" and first in FIRST_SHARD:
        configuration, asked["data_files"] = None, {split: FIRST_SHARD[first]}
    try:
        with nullcontext() if out_of_reach is None else _without_the_hub():
            for record in datasets.load_dataset(path, configuration, split=split, streaming=True, **asked):
                if column not in record:
                    raise RecipeError(f"dataset {name!r} has no column {column!r}; its columns: {', '.join(record)}")
                if not isinstance(record[column], str):
                    raise RecipeError(f"dataset {name!r}: a record without text in {column!r}; filter such records out")
                documents.append(record[column])
                characters += len(record[column])
                if characters > MOST_OF_A_DATASET and not whole:
                    break
    except RecipeError:
        raise
    except Exception as error:  # the library raises a dozen kinds, network failures among them
        if out_of_reach is not None:
            raise RecipeError(
                f"text {name!r}: no file, and as a dataset it lies nowhere here, while the hub is out of reach "
                f"({out_of_reach}); connect, or give a file, or stdlib, which needs no network"
            ) from error
        reason = str(error).strip().partition("\n")[0]
        raise RecipeError(f"text {name!r}: neither a file nor a dataset that can be loaded ({reason})") from error
    return tuple(documents), split, revision


def _revision(path: str, pinned: str | None) -> tuple[str | None, str | None]:
    """The commit of a dataset on the hub, or what was asked for where the hub does not say it or `path` is a folder;
    and why the hub cannot be reached, None where it can or is not needed."""
    if Path(path).exists():
        return pinned, None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(path, revision=pinned, timeout=PATIENCE).sha, None
    except Exception as error:  # as above, and whether the dataset itself can be had is found out by reading it
        logger.info("no revision of dataset %s: %s", path, error)
        answered = isinstance(error, ValueError) or getattr(error, "response", None) is not None
        return pinned, None if answered else str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def _without_the_hub() -> Iterator[None]:
    """What HF_HUB_OFFLINE does: copies that lie here are read, and nobody is asked six times, with pauses, for more."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

"""Where texts come from: files, JSON lines, `datasets` names, and the standard library of this Python.

A text is one string, its documents joined by two newlines, with a checksum that travels with every number measured on
it.  It is tokenised once, as a whole, without special tokens, and cut into windows.

The source ``stdlib`` needs no network: sources and documentation topics of the running Python.  Its modules are divided
by the hash of their names into three disjoint splits, so that a module never moves between training, calibration and
evaluation, whatever the version of Python.
"""

import ast
import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tersely.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Purpose = Literal["calibration", "evaluation"]

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
MOST_OF_A_DATASET = 64 * 10**6
"""Characters after which a dataset is read no further: C4 alone would be 300 GB."""


@dataclass(frozen=True)
class Text:
    """A text and where it came from.  `sha256` is taken over the UTF-8 bytes of `content`."""

    source: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_text(source: str, purpose: Purpose) -> Text:
    """Read a text.

    `source` is a text file, a ``.jsonl`` file whose records have a ``text`` field, ``stdlib``, or a `datasets` name
    written ``name[:configuration[:split]]`` (a hub path, a local folder, or one of `DATASETS`).  A trailing
    ``[start:stop]`` takes that range of UTF-8 bytes.  `purpose` chooses the split where the source leaves it open.

    Raises RecipeError for a source that does not exist, cannot be decoded, or holds no text.
    """
    if not source.strip():
        raise RecipeError("a text without a name; give a file, a datasets name, or stdlib")
    name, start, stop = _byte_range(source)
    path = Path(name)
    if name == "stdlib" or name.startswith("stdlib:"):
        content = _stdlib(name.partition(":")[2] or purpose)
    elif len(name) < LONGEST_NAME and path.is_file():
        content = _jsonl(path) if path.suffix == ".jsonl" else _decoded(path)
    else:
        content = _dataset(name, purpose)
    if start is not None or stop is not None:
        content = content.encode()[start:stop].decode(errors="ignore")
    if not content.strip():
        raise RecipeError(f"text {source!r} is empty; name a source with some text in it")
    return Text(source, content)


def tokenise(content: str, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
    """Token numbers of the whole text, shape ``[tokens]``, without added special tokens."""
    import torch

    # verbose=False: the warning about a sequence beyond the context does not apply, windows are cut from it
    numbers = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(numbers, dtype=torch.long)


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


def _stdlib(split: str) -> str:
    if split not in STDLIB_SPLITS:
        raise RecipeError(f"the standard library has no split {split!r}; known: {', '.join(STDLIB_SPLITS)}")
    return SEPARATOR.join(text for _, text in stdlib_documents(split))


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


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"text {path}: not UTF-8 at byte {error.start}; convert it, or name a text file") from error


def _jsonl(path: Path) -> str:
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
    return SEPARATOR.join(documents)


@lru_cache(maxsize=8)  # a stream is read once a process, not once a use
def _dataset(name: str, purpose: Purpose) -> str:
    looks_like_file = name.startswith((".", "/", "~")) or Path(name).suffix in {".txt", ".jsonl", ".raw", ".tokens"}
    if looks_like_file and not Path(name.partition(":")[0]).is_dir():
        raise RecipeError(f"text {name!r}: no such file; give a text file, a .jsonl file, a datasets name, or stdlib")
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(
            f"text {name!r} is no file; to read it as a dataset install the extra: pip install 'tersely[datasets]'"
        ) from error
    first, *rest = name.split(":")
    path, configuration, column, evaluated = DATASETS.get(first, (first, None, "text", "test"))
    configuration = rest[0] or configuration if rest else configuration
    split = rest[1] if len(rest) > 1 else "train" if purpose == "calibration" else evaluated
    documents, characters = [], 0
    try:
        for record in datasets.load_dataset(path, configuration, split=split, streaming=True):
            if column not in record:
                raise RecipeError(f"dataset {name!r} has no column {column!r}; its columns: {', '.join(record)}")
            if not isinstance(record[column], str):
                raise RecipeError(f"dataset {name!r}: a record without text in {column!r}; filter such records out")
            documents.append(record[column])
            characters += len(record[column])
            if characters > MOST_OF_A_DATASET:
                break
    except RecipeError:
        raise
    except Exception as error:  # the library raises a dozen kinds, network failures among them
        reason = str(error).strip().partition("\n")[0]
        raise RecipeError(f"text {name!r}: neither a file nor a dataset that can be loaded ({reason})") from error
    return SEPARATOR.join(documents)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

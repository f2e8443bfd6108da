"""The windows of a named protocol: what is fed, what is predicted in it, and what each loss weighs.

See `protocols` for what the codes do; here it is done.  Three kinds of windows need words.

**Random crops.**  ``random.Random(0)`` draws what the codes' ``random.seed(0)`` draws.  A crop of the *text* starts at
a random character, tokenises the next 10 W of them (special tokens included) and takes W of the tokens at random; one
that has fewer is lost, not drawn again.  A crop of *documents* draws documents until one holds W tokens.  Of exactly W
tokens, gptq's code fails in the second draw; dobi's, and ours, takes them all.

**Rolling windows.**  The tokens of a document, in pieces of W: the first piece is predicted behind the prefix (BOS, or
EOS of a tokenizer without one), every other one behind the token before it; the last one, which is shorter, sees as
many tokens before it as make W.

**Pages.**  WikiText's documents begin at headings of the first level, `` = Title = ``.

Source: Gao et al., The Language Model Evaluation Harness, 2024 (10.5281/zenodo.12608602); the codes that `protocols`
names.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tersely.errors import RecipeError
from tersely.evaluation import perplexity
from tersely.evaluation.protocols import CROPS, NamedProtocol, Rule
from tersely.text import Corpus, Rows, Text, check_vocabulary, context_length, tokenise

Tokens = Int[Tensor, " tokens"]

# What lm-eval undoes of WikiText's spacing, in its order: (pattern, replacement); a plain string stands for itself.
PLAIN_REPLACEMENTS = (
    (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."),
    (" : ", ": "), (" ; ", "; "), (" . ", ". "), (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
)  # fmt: skip
PAIRED_MARKS = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
)  # fmt: skip
LAST_REPLACEMENTS = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"),
    (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Passages:
    """A text as a named protocol feeds it.  Made by `passages`; `len` is the number of windows."""

    text: Text
    protocol: NamedProtocol
    corpus: Corpus
    split: str | None
    length: int
    departures: tuple[str, ...]
    windows: tuple[Tokens, ...]
    """What is fed, and one token more where the last is only predicted."""
    new: tuple[int, ...]
    """Predicted tokens in each window, which are its last."""
    weights: Float[Tensor, " windows"]
    """Of the sum of losses in each window; float64."""
    last_is_fed: bool
    ignored: int | None
    """The token that does not count as a target."""
    words: int | None = None
    content_bytes: int | None = None
    prefix: str | None = None

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def predicted(self) -> int:
        return int(self.predictions().sum())

    def predictions(self) -> Float[Tensor, " windows"]:
        """Targets that count, in each window."""
        return torch.tensor(
            [_counted(window, new, self.ignored) for window, new in zip(self.windows, self.new, strict=True)],
            dtype=torch.float64,
        )

    def batches(self) -> Iterator[tuple[range, range]]:
        """As those of `perplexity.Windows`: neighbours of one shape together."""
        start = 0
        while start < len(self):
            length, new = len(self.windows[start]), self.new[start]
            stop, most = start + 1, max(1, perplexity.TOKENS_PER_BATCH // length)
            while stop < min(len(self), start + most) and (len(self.windows[stop]), self.new[stop]) == (length, new):
                stop += 1
            yield range(start, stop), range(length - new, length)
            start = stop

    def tokens(self, numbers: range) -> Int[Tensor, "windows length"]:
        return torch.stack([self.windows[number] for number in numbers])

    def name(self, number: int) -> str:
        return f"window {number} of {self.text.source} (protocol {self.protocol.name})"

    def describe(self, model: PreTrainedModel) -> dict[str, Any]:
        """All that the number depends on besides the weights, as plain values."""
        definition = asdict(self.protocol.rule(self.corpus)[0]) | {
            "window": self.protocol.window,
            "reduction": self.protocol.reduction,
            "special_tokens": "as the tokenizer adds them to a text",
            "quirks": list(self.protocol.quirks),
        }
        row = {
            "text": self.text.source,
            "sha256": self.text.sha256,
            "protocol": self.protocol.name,
            "code": self.protocol.code,
            "corpus": self.corpus,
            "length": self.length,
            "stride": self.length,
            "first_token": self.prefix,
            "dtype": str(model.dtype).removeprefix("torch."),
            "windows": len(self),
            "tokens": self.predicted,
            "definition": definition,
            "departures": list(self.departures),
        }
        known = {"split": self.split, "revision": self.text.revision, "words": self.words, "bytes": self.content_bytes}
        return row | {key: value for key, value in known.items() if value is not None}


def passages(
    rows: Rows,
    protocol: NamedProtocol,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    *,
    length: int | None = None,
    limit: int | None = None,
) -> Passages:
    """Cut rows of text as a protocol does.  `length` is another window than its own, `limit` the first so many windows;
    both are departures that the number will state.

    Raises RecipeError for a corpus that the code does not know, a window beyond the context, a text that fills none,
    tokens that the model does not know, and where the code's own number would be none.
    """
    rule, departures = protocol.rule(rows.corpus)
    length, other = protocol.length(context_length(config), length)
    departures += other
    if rows.split is not None and rows.split != rule.split:
        departures += (f"split {rows.split}; the code takes {rule.split}",)
    if limit is not None:
        if limit < 1:
            raise RecipeError(f"{limit} windows were asked for; give at least 1, or nothing for all of them")
        departures += (f"only the first {limit} windows",)
    words = content_bytes = prefix = None
    if rule.cut == "rolling":
        documents = _pages(rows)
        number, prefix = _prefix(tokenizer)
        found = [
            (window, new, which)
            for which, document in enumerate(documents)
            for window, new in _rolling(tokenise(cleaned(document), tokenizer, special=True), number, length)
        ][:limit]
        measured = sorted({which for *_, which in found})
        if limit is not None:  # words of a document that is measured in part are not known: whole documents only
            found, measured = _whole_documents(found, tokenizer, documents, length)
        words = sum(len(re.split(r"\s+", documents[which])) for which in measured)
        content_bytes = sum(len(documents[which].encode()) for which in measured)
        windows, new = [one[0] for one in found], [one[1] for one in found]
    else:
        windows = _windows(rows, rule, tokenizer, length)[:limit]
        if "divided" in protocol.reduction:
            windows = [window[:-1] for window in windows]
        new = [len(window) - 1 for window in windows]
    if not windows:
        raise RecipeError(
            f"text {rows.text.source} does not fill one window of {length} tokens as protocol {protocol.name} cuts it; "
            "give a longer text or a smaller length"
        )
    check_vocabulary(torch.cat(windows), config)
    ignored = _padding(tokenizer, config) if protocol.ignores_padding else None
    weights = _weights(protocol, windows, new, ignored, length, words, rows.text.source)
    return Passages(
        rows.text, protocol, rows.corpus, rows.split, length, departures, tuple(windows), tuple(new), weights,
        rule.cut != "rolling", ignored, words, content_bytes, prefix,
    )  # fmt: skip


def cleaned(document: str) -> str:
    """A document of WikiText without the blanks around its marks, as lm-eval cleans any document."""
    text = document.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)  # as it stands there; it matches next to nothing
    for old, new in PLAIN_REPLACEMENTS:
        text = text.replace(old, new)
    for pattern, new in PAIRED_MARKS:
        text = re.sub(pattern, new, text)
    for old, new in LAST_REPLACEMENTS:
        text = text.replace(old, new)
    return text


def _pages(rows: Rows) -> list[str]:
    """Documents: WikiText's pages, which begin at a heading of the first level; rows of anything else."""
    if rows.corpus != "wikitext":
        return [row for row in rows.rows if row.strip()]
    # a blank line is one blank in the files, and an empty string in the rows
    lines = [row.removesuffix("\n") or " " for row in rows.rows]
    if not rows.rows[-1] or rows.rows[-1].endswith("\n"):  # else the file was cut within a line
        lines.append("")
    pages: list[list[str]] = [[]]
    for line in lines:
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


def _windows(rows: Rows, rule: Rule, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Tokens]:
    chosen = rows.rows[: rule.documents]
    if rule.cut == "crops of documents":
        return _crops_of_documents(chosen, tokenizer, length, rows.text.source)
    joined = rule.join.join(chosen)
    if rule.cut == "crops of the text":
        return _crops_of_text(joined, tokenizer, length)
    tokens = tokenise(joined, tokenizer, special=True)
    if rule.windows is not None:
        tokens = tokens[: rule.windows * length]
    pieces = list(tokens.split(length)) if len(tokens) else []
    if pieces and len(pieces[-1]) < length and rule.cut == "windows":
        pieces.pop()
    return pieces


def _crops_of_text(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Tokens]:
    drawing, crops = random.Random(0), []
    if len(text) - length - 1 < 0:
        return []
    for _ in range(CROPS):
        start = drawing.randint(0, len(text) - length - 1)
        tokens = tokenise(text[start : start + 10 * length], tokenizer, special=True)
        if len(tokens) >= length:
            crops.append(_crop(tokens, length, drawing))
    return crops


def _crops_of_documents(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, source: str
) -> list[Tokens]:
    known: dict[int, Tokens] = {}

    def tokens_of(number: int) -> Tokens:
        if number not in known:
            known[number] = tokenise(documents[number], tokenizer, special=True)
        return known[number]

    drawing, crops = random.Random(0), []
    for _ in range(CROPS):
        # the codes would draw for ever where no document is long enough
        while len(tokens := tokens_of(drawing.randint(0, len(documents) - 1))) < length:
            if len(known) == len(documents) and max(map(len, known.values())) < length:
                raise RecipeError(f"text {source}: no document has {length} tokens; give a smaller length")
        crops.append(_crop(tokens, length, drawing))
    return crops


def _crop(tokens: Tokens, length: int, drawing: random.Random) -> Tokens:
    spare = len(tokens) - length - 1
    start = drawing.randint(0, spare) if spare >= 0 else 0
    return tokens[start : start + length]


def _rolling(tokens: Tokens, prefix: int, length: int) -> Iterator[tuple[Tokens, int]]:
    """Windows of a document, and how many of their last tokens are predicted."""
    behind = torch.cat([tokens.new_tensor([prefix]), tokens])
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        # the last piece sees what makes its input as long as the others
        yield behind[max(0, stop - length) : stop + 1], stop - start


def _whole_documents(
    found: list[tuple[Tokens, int, int]], tokenizer: PreTrainedTokenizerBase, documents: list[str], length: int
) -> tuple[list[tuple[Tokens, int, int]], list[int]]:
    """Without the last document, if the limit on windows has cut it; the first one has to be whole."""
    last = found[-1][2]
    tokens = len(tokenise(cleaned(documents[last]), tokenizer, special=True))
    if sum(which == last for *_, which in found) < -(-tokens // length):
        found = [one for one in found if one[2] != last]
    if not found:
        raise RecipeError("the windows asked for hold no whole document, and words are counted by documents; give more")
    return found, sorted({which for *_, which in found})


def _prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    for token, number in (
        (tokenizer.bos_token, tokenizer.bos_token_id),
        (tokenizer.eos_token, tokenizer.eos_token_id),
    ):
        if number is not None:
            return number, str(token)
    raise RecipeError("the tokenizer has neither BOS nor EOS, behind one of which a document is predicted")


def _padding(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int | None:
    """0 counts as none, as it does in the code."""
    configured = getattr(config.get_text_config(), "pad_token_id", None)
    return (tokenizer.eos_token_id if configured is None else configured) or None


def _counted(window: Tokens, new: int, ignored: int | None) -> int:
    return new if ignored is None else int((window[-new:] != ignored).sum()) if new else 0


def _weights(
    protocol: NamedProtocol,
    windows: list[Tokens],
    new: list[int],
    ignored: int | None,
    length: int,
    words: int | None,
    source: str,
) -> Float[Tensor, " windows"]:
    counts = torch.tensor([_counted(*pair, ignored) for pair in zip(windows, new, strict=True)], dtype=torch.float64)
    if protocol.reduction == "words":
        assert words is not None
        return torch.full_like(counts, 1 / words)
    if not counts.all():
        raise RecipeError(
            f"text {source}: window {int((counts == 0).nonzero()[0])} predicts nothing, and protocol {protocol.name} "
            "divides by what it predicts: its code's number is none; take a little more or less of the text"
        )
    match protocol.reduction:
        case "tokens":
            return torch.full_like(counts, 1 / float(counts.sum()))
        case "windows":
            return 1 / (len(counts) * counts)
    return torch.full_like(counts, 1 / (len(counts) * length))

"""Perplexity as the papers' own codes compute it: "WikiText-2 perplexity" is at least nine different numbers.

Dense LLaMA-7B is 5.68 by one convention and 12.62 by another.  Our own definition (see `perplexity`) is none of these.
To set a number beside a published one, compute it as that paper's code did; `PROTOCOLS` holds the codes.  What they
share is a skeleton:

    join the rows of a split into one string; tokenise it once, with the special tokens that the tokenizer adds to any
    text (a BOS, if it adds one, hence stands once, at the very beginning); cut windows of W tokens that do not overlap;
    show the model one at a time; predict W - 1 tokens in each, the first never; average; exponentiate.

They differ in the split, in what joins the rows, in W, in the weights of the average, in what becomes of a last window
that is not full, and some draw windows at random:

    gptq            PTB is its validation split; C4 is 256 random crops of documents that hold W tokens
    gptq-new        PTB is its test split joined by blanks; C4 the first 256 W tokens of 1100 documents joined by blanks
    wanda           W is the model's whole context (4096 for Llama 2, 8192 for Llama 3); C4 as in gptq-new
    llm-pruner      W = 128: its perplexities are twice those of the others
    svd-llm         PTB is its test split; the model is cast to float32; C4 is the first 2000 documents
    slicegpt        mean over windows of their means; tokens equal to the padding token do not count
    basis-sharing   mean over windows of their means, and the rest at the end is a window like the others, so that a few
                    tokens there may weigh as much as W elsewhere
    dobi            256 random crops; the last token of each is cut off before the shift, which leaves W - 2 losses, and
                    their sum is divided by W: the logarithm of what it reports is (W - 2) / W of the honest one
    lm-eval-word    documents one by one, cleaned of WikiText's spacing, all tokens predicted, in windows of the whole
                    context that begin with the token before; exp of the loss per *word* of the text before cleaning

**A weighted sum is all of them.**  With s_w the sum of the losses in window w, each reports exp(Σ c_w s_w): c = 1/N for
the mean over tokens, 1/(n m_w) for the mean over n windows of m_w predictions, 1/(n W) for dobi, 1/words for lm-eval.

Where we depart from the codes, always: logits that are not finite raise (svd-llm and dobi skip such windows, and their
numbers then are of an easier text); softmax is taken in float32; the tokenizer is the fast one; the model has the dtype
it was opened in, except where the code casts it.  Where a run departs (another W, a text that the code does not know,
only the first windows), its `departures` say so.  Numbers of different protocols are not compared, see
`comparison`.

Source: the evaluation code of IST-DASLab/gptq, locuslab/wanda, horseee/LLM-Pruner, AIoT-MLSys-Lab/SVD-LLM,
microsoft/TransformerCompression, TUDa-HWAI/Basis_Sharing, wangqinsi1/Dobi-SVD, EleutherAI/lm-evaluation-harness.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tersely.errors import RecipeError, unknown
from tersely.text import Corpus

Cut = Literal["windows", "windows and rest", "crops of the text", "crops of documents", "rolling"]
Reduction = Literal["tokens", "windows", "tokens, divided by the window", "words"]
Usual = Literal["context"]

OWN = "tersely"
"""How rows without a protocol of someone else's are called."""
CROPS = 256
"""Windows that gptq and dobi draw."""


@dataclass(frozen=True)
class Rule:
    """What a protocol does with one corpus."""

    split: str
    """Of the dataset, where the source names none."""
    join: str
    """Between rows; of no effect where documents stay apart."""
    cut: Cut = "windows"
    documents: int | None = None
    """Only the first so many rows."""
    windows: int | None = None
    """Only the tokens of the first so many windows."""


@dataclass(frozen=True)
class NamedProtocol:
    """How one code turns rows of text into a number."""

    name: str
    code: str
    """Repository whose evaluation this is."""
    rules: Mapping[Corpus, Rule]
    """By corpus.  Plain text follows the rule of WikiText, other documents that of C4 or, without one, WikiText's."""
    window: int | Usual = 2048
    """Tokens; "context" for all that the model can take."""
    reduction: Reduction = "tokens"
    dtype: str | None = None
    """The dtype that the code casts the model to; None: it does not."""
    ignores_padding: bool = False
    """Targets equal to the padding token do not count."""
    quirks: tuple[str, ...] = field(default=())
    """What a reader of the number should know."""

    def rule(self, corpus: Corpus) -> tuple[Rule, tuple[str, ...]]:
        """The rule for a corpus, and how that departs from the code.  Raises RecipeError for one the code cannot do."""
        if corpus in self.rules:
            return self.rules[corpus], ()
        if corpus == "text":
            return self.rules["wikitext"], ("a text of one's own, which the code does not know, as one row",)
        if corpus == "documents":
            known: Corpus = "c4" if "c4" in self.rules else "wikitext"
            return self.rules[known], (f"documents of one's own, which the code does not know, treated as {known}",)
        raise RecipeError(
            f"protocol {self.name}: {self.code} measures {', '.join(self.rules)}, and nothing says how it would treat "
            f"{corpus}; choose another protocol or text"
        )

    @property
    def splits(self) -> dict[str, str]:
        """Corpus → split to read."""
        return {corpus: rule.split for corpus, rule in self.rules.items()}

    def length(self, context: int | None, asked: int | None) -> tuple[int, tuple[str, ...]]:
        """Tokens in a window, and how that departs from the code.  `context` is the model's, None without a limit.

        Raises RecipeError below 2 tokens (3 where a token is cut off), and beyond the context.
        """
        usual = self.window if self.window != "context" else context or 2048
        assert isinstance(usual, int)
        length, least = usual if asked is None else asked, 3 if "divided" in self.reduction else 2
        if length < least:
            raise RecipeError(f"length {length}; protocol {self.name} wants {least} or more, to predict anything")
        if context is not None and length > context:
            raise RecipeError(
                f"protocol {self.name} takes windows of {length} tokens, beyond the model's context of {context}; give "
                f"--length {context} or less, which the number will then say"
            )
        return length, () if length == usual else (f"windows of {length} tokens; the code takes {usual}",)


WIKITEXT = Rule("test", "\n\n")
C4_FIRST = Rule("validation", " ", documents=1100, windows=CROPS)
C4_2000 = Rule("validation", "\n\n", documents=2000)
C4_CROPS = Rule("validation", "", "crops of documents")
SKIPS = "the code skips windows whose logits are not finite; here they are an error"

PROTOCOLS: dict[str, NamedProtocol] = {
    "gptq": NamedProtocol(
        "gptq",
        "IST-DASLab/gptq",
        {"wikitext": WIKITEXT, "ptb": Rule("validation", "\n\n"), "c4": C4_CROPS},
        quirks=("the code tokenises with the slow tokenizer",),
    ),
    "gptq-new": NamedProtocol(
        "gptq-new",
        "IST-DASLab/gptq",
        {"wikitext": WIKITEXT, "ptb": Rule("test", " "), "c4": C4_FIRST},
        quirks=("the code tokenises with the slow tokenizer",),
    ),
    "wanda": NamedProtocol("wanda", "locuslab/wanda", {"wikitext": WIKITEXT, "c4": C4_FIRST}, window="context"),
    "llm-pruner": NamedProtocol(
        "llm-pruner", "horseee/LLM-Pruner", {"wikitext": WIKITEXT, "ptb": Rule("validation", "\n\n")}, window=128
    ),
    "svd-llm": NamedProtocol(
        "svd-llm",
        "AIoT-MLSys-Lab/SVD-LLM",
        {"wikitext": WIKITEXT, "ptb": WIKITEXT, "c4": C4_2000},
        dtype="float32",
        quirks=(SKIPS,),
    ),
    "slicegpt": NamedProtocol(
        "slicegpt",
        "microsoft/TransformerCompression",
        {"wikitext": WIKITEXT},
        reduction="windows",
        ignores_padding=True,
        quirks=("the padding token is the configuration's or, without one, EOS, and does not count as a target",),
    ),
    "basis-sharing": NamedProtocol(
        "basis-sharing",
        "TUDa-HWAI/Basis_Sharing",
        {
            "wikitext": Rule("test", "\n\n", "windows and rest"),
            "ptb": Rule("test", "\n\n", "windows and rest"),
            "c4": Rule("validation", "\n\n", "windows and rest", documents=2000),
        },
        reduction="windows",
        quirks=("the rest at the end is a window, and weighs as much as a full one",),
    ),
    "dobi": NamedProtocol(
        "dobi",
        "wangqinsi1/Dobi-SVD",
        {
            "wikitext": Rule("test", "\n\n", "crops of the text"),
            "ptb": Rule("validation", "\n\n", "crops of the text"),
            "c4": C4_CROPS,
        },
        reduction="tokens, divided by the window",
        quirks=("W - 2 losses of a window are divided by W, which flatters the number", SKIPS),
    ),
    "lm-eval-word": NamedProtocol(
        "lm-eval-word",
        "EleutherAI/lm-evaluation-harness",
        {"wikitext": Rule("test", "", "rolling"), "c4": Rule("validation", "", "rolling")},
        window="context",
        reduction="words",
        quirks=("per word of the text before it is cleaned, not per token",),
    ),
}


def protocol_named(name: str) -> NamedProtocol:
    """Raises RecipeError, which names the nearest, for a name that is not there."""
    if name not in PROTOCOLS:
        raise RecipeError(unknown("protocol", name, PROTOCOLS))
    return PROTOCOLS[name]

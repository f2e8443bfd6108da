"""Questions with known answers, from the files that their data sets are handed round in.

A task asks which of several continuations a model finds the likeliest, or whether it would have gone on with the very
word that came.  Prompts are those of the harness that publishes them (its 2026 state), character by character:

    arc, piqa       Question: {question}\\nAnswer:                     → each choice
    openbookqa      {the bare stem}                                   → each choice
    siqa            Q: {context} {question}\\nA:                       → each choice
    boolq           {passage}\\nQuestion: {question}?\\nAnswer:         → no, yes
    hellaswag       {activity}: {context}, cleaned of WikiHow's marks → each ending, cleaned alike
    winogrande      the sentence up to the blank, filled with either  → the rest of the sentence, in both cases
    blimp           nothing                                           → the good sentence, the bad one
    lambada         the text without its last word                    → that word
    mmlu            a line about the subject, question, four choices  → A, B, C, D

and every continuation begins with a blank.  A format is told by the fields of its records; a collection of instructions
(fields ``instruction``, ``answer``) by the name of the task, which is that of the file or given as ``NAME=FILE``: its
questions and choices are taken out of the instructions and asked as above.

Source: Gao et al., The Language Model Evaluation Harness, 2024 (10.5281/zenodo.12608602), its task definitions.
"""

import bz2
import csv
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersely.errors import RecipeError

Pair = tuple[str, str]
"""What is given, and what it may go on with."""


@dataclass(frozen=True)
class Question:
    """Continuations of which one is right: number `gold` of `pairs`.  With a single one it is that or nothing."""

    pairs: tuple[Pair, ...]
    gold: int
    lengths: tuple[int, ...] = ()
    """Characters of the choices, for accuracies by length; none where the choices stand in what is given."""


@dataclass(frozen=True)
class Task:
    """Questions of one kind, and the checksum of the file they come from."""

    name: str
    source: str
    sha256: str
    questions: tuple[Question, ...]
    metrics: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def floor(self) -> float | None:
        """What guessing scores: the commonest answer where all questions have the same ones, else one of the choices at
        random.  None where there are no choices."""
        if any(len(question.pairs) < 2 for question in self.questions):
            return None
        count = len(self.questions)
        if len({tuple(end for _, end in question.pairs) for question in self.questions}) == 1 and count > 1:
            golds = [question.gold for question in self.questions]
            return max(golds.count(gold) for gold in set(golds)) / count
        return sum(1 / len(question.pairs) for question in self.questions) / count


Record = dict[str, Any]


def read_task(source: str, limit: int | None = None) -> Task:
    """Read a task from a file: JSON lines, a JSON array, HellaSwag's text form (also in bz2), LAMBADA's plain text, or
    a zip of BLiMP or MMLU, of which ``FILE.zip:SET`` takes one set.  ``NAME=FILE`` names the task.

    `limit` keeps the first so many questions.  Raises RecipeError for a file of no known format, or a broken one.
    """
    name, file, member = _parts(source)
    if limit is not None and limit < 1:
        raise RecipeError(f"{limit} questions were asked for; give at least 1, or nothing for all of them")
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    try:
        if file.suffix == ".zip":
            kind, questions = _zipped(content, member, source)
        elif file.suffix == ".bz2":
            kind, questions = _plain(bz2.decompress(content).decode(), name or file.name, source)
        elif file.suffix == ".txt":
            kind, questions = _plain(content.decode(), name or file.name, source)
        else:
            kind, questions = _records(_parsed(content.decode(), source), file, name)
        found = [question for question, _ in zip(questions, range(limit), strict=False)] if limit else list(questions)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, OSError, zipfile.BadZipFile) as error:
        raise RecipeError(f"task {source}: a broken record ({type(error).__name__}: {error})") from error
    if not found:
        raise RecipeError(f"task {source}: holds no questions")
    notes = NOTES.get(kind, ())
    return Task(name or _named(kind, file, member), source, digest, tuple(found), METRICS[kind], notes)


SUFFIXES = {".bz2", ".csv", ".gz", ".json", ".jsonl", ".parquet", ".tsv", ".txt", ".xz", ".zip"}
"""By which a file of questions is told from the name of a task."""


def is_task_file(source: str) -> bool:
    """Whether a task is a file of ours to read, and not a name.  Raises RecipeError for the path of no file."""
    name, file, _ = _parts(source)
    if (name is not None or file.is_absolute() or file.suffix.lower() in SUFFIXES) and not file.is_file():
        raise RecipeError(f"task {source!r}: no such file; give a file of questions, or the name of a task of lm-eval")
    return file.is_file()


def _parts(source: str) -> tuple[str | None, Path, str | None]:
    """Name of the task, file, set in it."""
    if Path(source).is_file():
        return None, Path(source), None
    name, is_named, rest = source.rpartition("=")
    file, is_zip, member = rest.partition(".zip:")
    return name if is_named else None, Path(f"{file}.zip" if is_zip else rest), member or None


def _named(kind: str, file: Path, member: str | None) -> str:
    stem = file.name.partition(".")[0].lower()
    named = stem if kind in ("arc", "instructions") or stem.startswith(kind) else kind
    return f"{named}_{member}" if member else named


def _parsed(content: str, source: str) -> list[Record]:
    if content.lstrip().startswith("["):
        records = json.loads(content)
    else:
        records = [json.loads(line) for line in content.split("\n") if line.strip()]
    if not records or not all(isinstance(record, dict) for record in records):
        raise RecipeError(f"task {source}: no records; one JSON object a line, or an array of them")
    return list(records)


def _records(records: list[Record], file: Path, name: str | None) -> tuple[str, Iterator[Question]]:
    known = records[0].keys()
    kind = next((kind for kind, (fields, _) in FORMATS.items() if fields <= known), None)
    if kind is None:
        shown = ", ".join(sorted(known))
        raise RecipeError(f"task {file}: fields {shown} are of no known format; known: {', '.join(METRICS)}")
    build = FORMATS[kind][1]
    if kind == "piqa" and "label" not in known:
        labels = file.with_name(f"{file.stem}-labels.lst")
        if not labels.is_file():
            raise RecipeError(f"task {file}: records without a label, and no {labels.name} beside the file")
        numbers = labels.read_text(encoding="utf-8").split()
        records = [record | {"label": number} for record, number in zip(records, numbers, strict=True)]
    called = (name or file.name.partition(".")[0]).lower()
    if kind == "arc" and "openbook" in called:
        kind, build = "openbookqa", FORMATS["openbookqa"][1]
    if kind == "instructions":
        kind = _kind_of(called, file)
        return BARE.get(kind, kind), (_instructed(record, called) for record in records)
    return kind, (build(record) for record in records)


def _choices(given: str, choices: Sequence[str], gold: int) -> Question:
    if not 0 <= gold < len(choices):
        raise ValueError(f"answer {gold} of {len(choices)} choices")
    return Question(tuple((given, f" {choice}") for choice in choices), gold, tuple(map(len, choices)))


def _blimp(record: Record) -> Question:
    return _choices("", [record["sentence_good"], record["sentence_bad"]], 0)


def _piqa(record: Record) -> Question:
    return _choices(f"Question: {record['goal']}\nAnswer:", [record["sol1"], record["sol2"]], int(record["label"]))


def _hellaswag(record: Record) -> Question:
    context = record["ctx_a"] + " " + record["ctx_b"].capitalize()
    endings = [_without_marks(ending) for ending in record["endings"]]
    return _choices(_without_marks(record["activity_label"] + ": " + context), endings, int(record["label"]))


def _without_marks(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub("\\[.*?\\]", "", text).replace("  ", " ")


def _labelled(record: Record) -> tuple[list[str], int]:
    """Choices and the right one, as the hub or the original files have them."""
    choices = record["choices"] if "choices" in record else record["question"]["choices"]
    if isinstance(choices, dict):
        texts, labels = choices["text"], choices["label"]
    else:
        texts, labels = [one["text"] for one in choices], [one["label"] for one in choices]
    return texts, labels.index(record["answerKey"].strip())


def _arc(record: Record) -> Question:
    question = record["question"]
    stem = question["stem"] if isinstance(question, dict) else question
    return _choices(f"Question: {stem}\nAnswer:", *_labelled(record))


def _openbookqa(record: Record) -> Question:
    stem = record["question_stem"] if "question_stem" in record else record["question"]["stem"]
    return _choices(stem, *_labelled(record))


def _winogrande(record: Record) -> Question:
    before, _, after = record["sentence"].partition("_")
    pairs = tuple((before + record[option], f" {after.strip()}") for option in ("option1", "option2"))
    return Question(pairs, {"1": 0, "2": 1}[str(record["answer"])])


def _boolq(record: Record) -> Question:
    label = record["label"] if "label" in record else record["answer"]
    return _choices(f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:", ["no", "yes"], int(label))


def _siqa(record: Record) -> Question:
    choices = [record[f"answer{letter}"] for letter in "ABC"]
    return _choices(f"Q: {record['context']} {record['question']}\nA:", choices, int(record["label"]) - 1)


def _lambada(record: Record) -> Question:
    before, _, word = record["text"].rpartition(" ")
    return Question(((before, f" {word}"),), 0)


def _kind_of(name: str, file: Path) -> str:
    for kind, starts in NAMES.items():
        if name.startswith(starts):
            return kind
    raise RecipeError(
        f"task {file}: instructions, and {name!r} does not say of what; name it, such as arc_easy={file.name} (known: "
        f"{', '.join(NAMES)})"
    )


def _instructed(record: Record, name: str) -> Question:
    """Question and choices out of an instruction such as "Please choose … question: Q Answer1: A Answer2: B"."""
    said = record["instruction"].partition("Answer format:")[0]
    head, *choices = re.split(r"\s*\b(?:Solution|Answer|Option|Ending)[1-9]: ", said)
    question = re.split(r"(?:question|sentence): ", head, maxsplit=1)[1].strip()
    choices = [choice.strip() for choice in choices]
    answer = str(record["answer"])
    if name.startswith(NAMES["boolq"]):
        bare = question.removesuffix("?")
        return _choices(f"Question: {bare}?\nAnswer:", ["no", "yes"], ("false", "true").index(answer))
    gold = int(answer[-1]) - 1
    if name.startswith(NAMES["winogrande"]):
        return _winogrande({"sentence": question, "option1": choices[0], "option2": choices[1], "answer": answer[-1]})
    if name.startswith(NAMES["openbookqa"]):
        return _choices(question, choices, gold)
    return _choices(f"Q: {question}\nA:" if name.startswith(NAMES["siqa"]) else f"Question: {question}\nAnswer:",
                    choices, gold)  # fmt: skip


def _plain(content: str, name: str, source: str) -> tuple[str, Iterator[Question]]:
    lines = content.removesuffix("\n").split("\n")
    if "lambada" in name:
        return "lambada", (_lambada({"text": line.strip()}) for line in lines if line.strip())
    if len(lines) % 6 or not all(label in ("0", "1", "2", "3") for label in lines[1::6]):
        raise RecipeError(f"task {source}: neither six lines a question, as HellaSwag's text form has, nor LAMBADA")
    groups = (lines[start : start + 6] for start in range(0, len(lines), 6))
    return "hellaswag", (_choices(six[0], six[2:], int(six[1])) for six in groups)


def _zipped(content: bytes, member: str | None, source: str) -> tuple[str, Iterator[Question]]:
    archive = zipfile.ZipFile(io.BytesIO(content))
    # some systems put a shadow beside every file
    names = sorted(name for name in archive.namelist() if not Path(name).name.startswith("."))
    tests = [name for name in names if re.search(r"test/.+_test\.csv$", name)]
    sets = {Path(name).stem.removesuffix("_test"): name for name in tests or names if name.endswith((".jsonl", ".csv"))}
    if member is not None and member not in sets:
        raise RecipeError(f"task {source}: no set {member!r}; there are {', '.join(sets)}")
    chosen = sets if member is None else {member: sets[member]}
    if tests:
        return "mmlu", (one for subject, path in chosen.items() for one in _exam(subject, archive.read(path).decode()))
    records = (
        json.loads(line) for path in chosen.values() for line in archive.read(path).decode().split("\n") if line.strip()
    )
    return "blimp", (_blimp(record) for record in records)


def _exam(subject: str, content: str) -> Iterator[Question]:
    about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    for question, *choices, answer in csv.reader(io.StringIO(content)):
        lines = [question.strip(), *(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))]
        yield _choices(about + "\n".join([*lines, "Answer:"]), list("ABCD"), "ABCD".index(answer))


FORMATS: dict[str, tuple[set[str], Callable[[Record], Question]]] = {
    "blimp": ({"sentence_good", "sentence_bad"}, _blimp),
    "piqa": ({"goal", "sol1", "sol2"}, _piqa),
    "hellaswag": ({"activity_label", "ctx_a", "ctx_b", "endings", "label"}, _hellaswag),
    "openbookqa": ({"question_stem", "answerKey"}, _openbookqa),
    "arc": ({"question", "answerKey"}, _arc),
    "winogrande": ({"sentence", "option1", "option2", "answer"}, _winogrande),
    "boolq": ({"passage", "question"}, _boolq),
    "siqa": ({"context", "question", "answerA", "answerB", "answerC", "label"}, _siqa),
    "instructions": ({"instruction", "answer"}, _lambada),
    "lambada": ({"text"}, _lambada),
}
"""Fields that tell a format, and what makes a question of a record; the first that fits."""

NAMES: dict[str, str | tuple[str, ...]] = {
    "arc": "arc", "piqa": "piqa", "openbookqa": ("openbook", "obqa"), "siqa": ("social", "siqa"),
    "winogrande": "winogrande", "boolq": "boolq",
}  # fmt: skip
"""How the names of tasks begin that collections of instructions are asked for."""

BOTH = ("acc", "acc_norm")
METRICS: dict[str, tuple[str, ...]] = {
    "blimp": ("acc",), "piqa": BOTH, "hellaswag": BOTH, "openbookqa": BOTH, "arc": BOTH, "winogrande": ("acc",),
    "boolq": ("acc",), "siqa": ("acc",), "lambada": ("acc", "perplexity"), "mmlu": ("acc",),
    "boolq_bare": ("acc",),
}  # fmt: skip
BARE = {"boolq": "boolq_bare"}
"""What instructions leave out of a task."""
NOTES = {
    "mmlu": ("no examples are shown; published scores mostly show five",),
    "boolq_bare": ("questions without their passages, which published scores show",),
}

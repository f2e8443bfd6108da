"""Zero-shot scores: by hand, by their invariances, and, where lm-eval is installed, by lm-eval itself."""

import bz2
import json
import math
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tersely.errors import NumericalError, RecipeError
from tersely.evaluation import evaluate, measure_task, measure_text, passages, protocol_named, read_task
from tersely.evaluation import tasks as scoring
from tersely.evaluation.harness import rows_of
from tersely.evaluation.task_formats import Question, Task, is_task_file
from tersely.evaluation.tasks import Request, encode, score, wilson
from tersely.text import read_rows

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
CONTEXT, COUNT = 48, 24
NOUNS = "cat dog tree stone river house letter lamp".split()
VERBS = "sees takes finds loses breaks paints".split()


def phrase(drawing: random.Random, words: int = 4) -> str:
    return " ".join(drawing.choice(NOUNS if number % 2 else VERBS) for number in range(words))


@pytest.fixture(scope="module", params=[False, True], ids=["without BOS", "with BOS"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Byte-level pieces that cross the blanks, as those of real models."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    words = [f"Question: {noun} {verb}?\nAnswer: {noun}" for noun in NOUNS for verb in VERBS]
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(words, trainer)
    if request.param:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **shape,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).double().eval()


def records_of(kind: str, count: int = COUNT) -> list[dict[str, Any]]:
    """Questions as the hub's data sets hold them."""
    drawing = random.Random(kind)

    def choices(number: int) -> list[str]:
        return [phrase(drawing, drawing.randint(1, 6)) for _ in range(number)]

    made: dict[str, Callable[[], dict[str, Any]]] = {
        "piqa": lambda: dict(zip(("goal", "sol1", "sol2"), choices(3), strict=True)) | {"label": drawing.randint(0, 1)},
        "arc_easy": lambda: {
            "question": phrase(drawing),
            "choices": {"text": choices(4), "label": list("ABCD")},
            "answerKey": drawing.choice("ABCD"),
        },
        "openbookqa": lambda: {
            "question_stem": phrase(drawing),
            "choices": {"text": choices(4), "label": list("ABCD")},
            "answerKey": drawing.choice("ABCD"),
        },
        "hellaswag": lambda: {
            "activity_label": phrase(drawing, 1),
            "ctx_a": phrase(drawing) + " [title] x  y",
            "ctx_b": phrase(drawing, 2),
            "endings": [one + " [step] on." for one in choices(4)],
            "label": str(drawing.randint(0, 3)),
        },
        "winogrande": lambda: {
            "sentence": f"The {phrase(drawing)} so _ {phrase(drawing, 3)}.",
            "option1": drawing.choice(NOUNS),
            "option2": drawing.choice(VERBS),
            "answer": drawing.choice("12"),
        },
        "boolq": lambda: {
            "passage": phrase(drawing, 30),  # beyond the context, with the question
            "question": phrase(drawing),
            "label": drawing.randint(0, 1),
        },
        "social_iqa": lambda: {
            "context": phrase(drawing),
            "question": phrase(drawing),
            **{f"answer{letter}": one for letter, one in zip("ABC", choices(3), strict=True)},
            "label": drawing.choice("123"),
        },
        "blimp": lambda: {"sentence_good": phrase(drawing, 5), "sentence_bad": phrase(drawing, 5)},
        "lambada_openai": lambda: {"text": phrase(drawing, 9)},
    }
    return [made[kind]() for _ in range(count)]


KINDS = {
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "blimp": "blimp/_template_yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
}
"""Task → lm-eval's definition of it."""


def written(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return str(path)


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_a_plain_loop(kind, model, tokenizer, tmp_path):
    """Given and choice as one string; one sequence at a time; no padding."""
    task = read_task(written(tmp_path / f"{kind}.jsonl", records_of(kind, 8)))
    hits, normed, scores = [], [], []
    for question in task.questions:
        values = []
        for given, choice in question.pairs:
            kept = given.rstrip()
            if given:
                whole, before = tokenizer(given + choice)["input_ids"], tokenizer(kept)["input_ids"]
            else:
                whole, before = [0, *tokenizer(choice, add_special_tokens=False)["input_ids"]], [0]
            fed = torch.tensor([whole[-(CONTEXT + 1) :]])
            said = model(fed[:, :-1]).logits[0].detach().log_softmax(-1)
            scored = len(whole) - len(before)
            values.append(sum(float(said[-back, fed[0, -back]]) for back in range(1, scored + 1)))
        scores.append(values)
        hits.append(values.index(max(values)) == question.gold)
        if question.lengths:
            by_length = [value / length for value, length in zip(values, question.lengths, strict=True)]
            normed.append(by_length.index(max(by_length)) == question.gold)
    rows = {row["metric"]: row for row in measure_task(model, tokenizer, task)}
    if kind == "lambada_openai":
        assert rows["perplexity"]["value"] == pytest.approx(math.exp(-sum(v for (v,) in scores) / 8), rel=1e-9)
        return
    assert rows["acc"]["value"] == sum(hits) / 8
    assert rows["acc"]["n"] == 8
    if "acc_norm" in rows:
        assert rows["acc_norm"]["value"] == sum(normed) / 8


def test_neither_batch_nor_pieces_of_logits_matter(model, tokenizer, monkeypatch):
    drawing = random.Random(3)
    requests = [encode((phrase(drawing, drawing.randint(1, 9)), f" {phrase(drawing)}"), tokenizer) for _ in range(30)]
    plain = [one.log_likelihood for one in score(model, requests)]
    for tokens, logits in [(1, 2**25), (100, 1), (4096, 3 * len(tokenizer))]:
        monkeypatch.setattr(scoring, "TOKENS_PER_BATCH", tokens)
        monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", logits)
        monkeypatch.setattr(scoring, "ROWS_AT_LEAST", 1)
        again = [one.log_likelihood for one in score(model, requests)]
        assert again == pytest.approx(plain, rel=1e-10)


def test_a_permutation_of_the_choices_permutes_the_answers(model, tokenizer):
    drawing = random.Random(4)
    pairs = [tuple((phrase(drawing), f" {phrase(drawing)}") for _ in range(4)) for _ in range(12)]
    turned = [(*one[1:], one[0]) for one in pairs]
    first = Task("t", "s", "0", tuple(Question(one, 2) for one in pairs), ("acc",))
    second = Task("t", "s", "0", tuple(Question(one, 1) for one in turned), ("acc",))
    assert measure_task(model, tokenizer, first)[0]["value"] == measure_task(model, tokenizer, second)[0]["value"]


def test_of_choices_of_one_length_the_norm_changes_nothing_and_ties_go_to_the_first(model, tokenizer):
    pairs = tuple((("cat"), end) for end in (" dog", " dog", " dog"))
    tied = Task("t", "s", "0", (Question(pairs, 0, (3, 3, 3)), Question(pairs, 1, (3, 3, 3))), ("acc", "acc_norm"))
    assert [row["value"] for row in measure_task(model, tokenizer, tied)] == [0.5, 0.5]


def test_a_model_that_knows_nothing_scores_the_floor(tokenizer, model):
    """Four choices of one length, drawn alike: a quarter, within three errors."""
    drawing = random.Random(5)
    questions = tuple(
        Question(tuple((phrase(drawing, 2), f" {drawing.choice(NOUNS)}") for _ in range(4)), drawing.randint(0, 3))
        for _ in range(300)
    )
    (row,) = measure_task(model, tokenizer, Task("t", "s", "0", questions, ("acc",)))
    assert abs(row["value"] - 0.25) < 3 * row["stderr"]
    assert row["floor"] == 0.25
    assert row["stderr"] == pytest.approx(math.sqrt(row["value"] * (1 - row["value"]) / 299), rel=1e-9)


def test_what_is_too_long_loses_tokens_on_the_left(tokenizer):
    """Learned positions would not reach further."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0)
    model = GPT2LMHeadModel(config).double().eval()
    scored = (5, 6, 7)
    long = score(model, [Request(tuple(range(20)), scored)])[0]
    cut = score(model, [Request((14, 15, 16, 17, 18, 19), scored)])[0]
    assert long.log_likelihood == pytest.approx(cut.log_likelihood, rel=1e-12)
    with pytest.raises(RecipeError, match="a choice of 9 tokens is beyond the model's context of 8"):
        score(model, [Request((1,), tuple(range(9)))])


def test_measuring_leaves_the_model_as_it_was_and_broken_logits_raise(model, tokenizer, tmp_path):
    task = read_task(written(tmp_path / "piqa.jsonl", records_of("piqa", 3)))
    model.train()
    measure_task(model, tokenizer, task)
    assert model.training
    model.eval()
    kept = model.lm_head.weight.data.clone()
    model.lm_head.weight.data[3] = float("inf")
    with pytest.raises(NumericalError, match="not finite"):
        measure_task(model, tokenizer, task)
    model.lm_head.weight.data.copy_(kept)


def test_wilson_by_the_formula_and_at_the_ends():
    low, high = wilson(7, 10)
    for bound in (low, high):  # where the share is z errors of the bound away from it
        assert abs(0.7 - bound) == pytest.approx(1.959963984540054 * math.sqrt(bound * (1 - bound) / 10), rel=1e-9)
    assert wilson(0, 20)[0] == 0
    assert wilson(20, 20)[1] == pytest.approx(1)


# --- files ------------------------------------------------------------------------------------------------------------


def test_one_task_in_all_its_forms_is_one_task(tmp_path):
    records = records_of("piqa", 5)
    lines = read_task(written(tmp_path / "piqa.jsonl", records))
    (tmp_path / "piqa.json").write_text(json.dumps(records))
    bare = [{key: value for key, value in record.items() if key != "label"} for record in records]
    written(tmp_path / "piqa.valid.jsonl", bare)
    (tmp_path / "piqa.valid-labels.lst").write_text("\n".join(str(record["label"]) for record in records))
    told = [
        {
            "instruction": f"Please choose the correct solution to the question: {one['goal']}\n\nSolution1: "
            f"{one['sol1']}\n\nSolution2: {one['sol2']}\n\nAnswer format: solution1/solution2",
            "answer": f"solution{one['label'] + 1}",
        }
        for one in records
    ]
    (tmp_path / "told.json").write_text(json.dumps(told))
    for source in ("piqa.json", "piqa.valid.jsonl"):
        assert read_task(str(tmp_path / source)).questions == lines.questions
    assert read_task(f"piqa={tmp_path / 'told.json'}").questions == lines.questions
    assert read_task(f"mine={tmp_path / 'piqa.json'}", 2).name == "mine"
    assert len(read_task(str(tmp_path / "piqa.json"), 2).questions) == 2
    with pytest.raises(RecipeError, match=r"name it, such as arc_easy=told\.json"):
        read_task(str(tmp_path / "told.json"))


def test_prompts_are_those_of_lm_eval(tmp_path):
    def first(kind: str, record: dict[str, Any]) -> Question:
        return read_task(written(tmp_path / f"{kind}.jsonl", [record])).questions[0]

    choices = {"text": ["b", "cd"], "label": ["1", "2"]}
    arc = first("arc_easy", {"question": "Why?", "choices": choices, "answerKey": "2"})
    assert arc == Question((("Question: Why?\nAnswer:", " b"), ("Question: Why?\nAnswer:", " cd")), 1, (1, 2))
    nested = {"stem": "Why?", "choices": [{"text": "b", "label": "A"}, {"text": "cd", "label": "B"}]}
    assert first("ARC-Easy", {"question": nested, "answerKey": "B"}) == arc
    assert first("openbookqa", {"question_stem": "It is", "choices": choices, "answerKey": "1"}).pairs[0] == (
        "It is",
        " b",
    )
    filled = first("winogrande", {"sentence": "A met B as _ was out .", "option1": "A", "option2": "B", "answer": "2"})
    assert filled == Question((("A met B as A", " was out ."), ("A met B as B", " was out .")), 1)
    wiki = {
        "activity_label": "Work",
        "ctx_a": "[header] He digs.",
        "ctx_b": "the MAN",
        "label": 1,
        "endings": ["a", "b"],
    }
    assert first("hellaswag", wiki).pairs[1] == ("Work:  He digs. The man".replace("  ", " "), " b")
    asked = first("boolq", {"passage": "P.", "question": "is it", "answer": True})
    assert (asked.pairs[1], asked.gold) == (("P.\nQuestion: is it?\nAnswer:", " yes"), 1)
    assert first("lambada", {"text": "to the door"}) == Question((("to the", " door"),), 0)


def test_archives_and_the_text_form_of_hellaswag(tmp_path):
    with zipfile.ZipFile(tmp_path / "BLiMP.zip", "w") as archive:
        for name in ("one", "two"):
            lines = [json.dumps(record) for record in records_of("blimp", 3)]
            archive.writestr(f"data/{name}.jsonl", "\n".join(lines) + "\n")
    assert len(read_task(str(tmp_path / "BLiMP.zip")).questions) == 6
    part = read_task(f"{tmp_path / 'BLiMP.zip'}:two")
    assert (part.name, len(part.questions), part.floor) == ("blimp_two", 3, 0.5)
    with pytest.raises(RecipeError, match="no set 'three'; there are one, two"):
        read_task(f"{tmp_path / 'BLiMP.zip'}:three")

    six = "Mowing: A man mows. he\n2\nsits.\nflies.\nmows on.\nsinks.\n"
    (tmp_path / "val.txt.bz2").write_bytes(bz2.compress(six.encode()))
    (question,) = read_task(str(tmp_path / "val.txt.bz2")).questions
    assert question.pairs[2] == ("Mowing: A man mows. he", " mows on.")
    assert (question.gold, question.lengths) == (2, (5, 6, 8, 6))

    with zipfile.ZipFile(tmp_path / "mmlu.zip", "w") as archive:
        archive.writestr("data/test/high_school_art_test.csv", 'What?,a,"b, c",d,e,B\n')
        archive.writestr("data/dev/high_school_art_dev.csv", "Not this?,a,b,c,d,A\n")
    (question,) = read_task(str(tmp_path / "mmlu.zip")).questions
    about = "The following are multiple choice questions (with answers) about high school art.\n\n"
    assert question.pairs[1] == (f"{about}What?\nA. a\nB. b, c\nC. d\nD. e\nAnswer:", " B")
    assert question.gold == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"goal": "a"}', "fields goal are of no known format"),
        ("piqa.jsonl", '{"goal": "a", "sol1": "b", "sol2": "c"}', "no piqa-labels.lst beside the file"),
        ("piqa.jsonl", '{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}', "answer 2 of 2 choices"),
        ("piqa.jsonl", "{", "a broken record"),
        ("piqa.json", "[]", "no records"),
        ("odd.txt", "one\ntwo\n", "neither six lines a question"),
        ("no.zip", "no zip", "a broken record"),
    ],
)
def test_a_file_that_is_no_task_says_why(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=message):
        read_task(str(tmp_path / name))


def test_the_evaluation_holds_the_rows_that_others_read(model, tokenizer, tmp_path):
    source = written(tmp_path / "arc_easy.jsonl", records_of("arc_easy"))
    figures = evaluate(model, tokenizer, [], tasks=[source], questions=10)
    assert figures.keys() == {"parameters", "tasks"}
    acc, normed = figures["tasks"]
    assert (acc["task"], acc["metric"], normed["metric"], acc["n"]) == ("arc_easy", "acc", "acc_norm", 10)
    assert acc.keys() >= {"task", "metric", "value", "stderr", "n", "interval", "floor", "sha256"}
    assert acc["interval"][0] <= acc["value"] <= acc["interval"][1]
    assert json.loads(json.dumps(figures)) == figures
    assert is_task_file(source) and is_task_file(f"mine={source}")
    assert not any(is_task_file(name) for name in ("arc_easy", "bbh/cot", "race.high", "drop_v1.1"))


def test_a_name_without_lm_eval_says_what_to_install(model, tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(RecipeError, match=r"pip install 'tersely\[lm-eval\]'"):
        evaluate(model, tokenizer, [], tasks=["arc_easy"])


def test_the_files_that_lie_beside_the_project_are_understood():
    sizes = {
        "zeroshot/piqa.valid.jsonl": 1838, "zeroshot/piqa.json": 1838, "zeroshot/arc_easy.json": 2376,
        "zeroshot/openbookqa.json": 500, "zeroshot/winogrande.json": 1267, "zeroshot/social_i_qa.json": 1954,
        "zeroshot/hellaswag_val_full.txt.bz2": 10042, "zeroshot/lambada_test.jsonl": 5153, "blimp/BLiMP.zip": 67000,
        "mmlu/mmlu.zip": 14042,
    }  # fmt: skip
    if not SHARED.is_dir():
        pytest.skip(f"no reference data under {SHARED}")
    for file, count in sizes.items():
        assert len(read_task(str(SHARED / file)).questions) == count, file
    # one data set from two collections
    first, second = (read_task(str(SHARED / "zeroshot" / name)) for name in ("piqa.valid.jsonl", "piqa.json"))
    same = [a.gold == b.gold for a, b in zip(first.questions, second.questions, strict=True)]
    assert all(same)


# --- the harness itself -----------------------------------------------------------------------------------------------


def harness(model, tokenizer, task: str, include: str, records: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """lm-eval's result for its own definition of a task, on our records."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    definition = Path(lm_eval.__file__).parent / "tasks" / include
    data = written(folder / "data.jsonl", records)
    split = {"validation_split": "data", "test_split": None, "training_split": None}
    asked = {"task": f"own_{task}", "include": str(definition), "dataset_path": "json", "dataset_name": None,
             "dataset_kwargs": {"data_files": {"data": data}}, **split}  # fmt: skip
    (folder / "tasks").mkdir()
    (folder / "tasks" / "own.yaml").write_text(json.dumps(asked))  # JSON is YAML
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, dtype=None)
    found = lm_eval.simple_evaluate(
        model=wrapped, tasks=[f"own_{task}"], task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    return {key.partition(",")[0]: value for key, value in found["results"][f"own_{task}"].items()}


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_lm_eval(kind, model, tokenizer, tmp_path):
    records = records_of(kind)
    theirs = harness(model, tokenizer, kind, KINDS[kind], records, tmp_path)
    rows = measure_task(model, tokenizer, read_task(written(tmp_path / f"{kind}.jsonl", records)))
    assert rows
    for row in rows:
        assert row["value"] == pytest.approx(theirs[row["metric"]], rel=1e-9), row["metric"]
        error = theirs.get(f"{row['metric']}_stderr")
        if row["metric"] != "perplexity" and isinstance(error, float):
            assert row["stderr"] == pytest.approx(error, rel=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_names_go_to_lm_eval(model, tokenizer):
    """Without a network: a name it does not know, and one whose data it cannot have."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    with pytest.raises(RecipeError, match="no task of lm-eval: no_such_task"):
        evaluate(model, tokenizer, [], tasks=["no_such_task"])
    with pytest.raises(RecipeError, match="lm-eval cannot measure piqa"):
        evaluate(model, tokenizer, [], tasks=["piqa"], questions=2)


def test_a_result_of_lm_eval_becomes_our_rows(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.4.13")
    found = {
        "results": {"piqa": {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25}},
        "n-samples": {"piqa": {"original": 40, "effective": 20}},
    }
    first, second = rows_of(found)
    reach = 1.959963984540054 * 0.1
    wanted = {"task": "piqa", "metric": "acc", "value": 0.5, "stderr": 0.1, "interval": [0.5 - reach, 0.5 + reach]}
    assert first == wanted | {"n": 20, "source": "lm-eval 0.4.13"}
    assert second == {"task": "piqa", "metric": "acc_norm", "value": 0.25, "n": 20, "source": "lm-eval 0.4.13"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_own_cache")
def test_word_perplexity_is_that_of_lm_eval(model, tokenizer, tmp_path):
    drawing = random.Random(8)
    pages = [f" = {phrase(drawing, 2)} = \n \n {phrase(drawing, 20 + 30 * n)} , ( so ) @-@ on . \n" for n in range(4)]
    path = tmp_path / "wiki.raw"
    path.write_text(" \n" + "".join(pages))
    records = [{"page": page} for page in [*pages[:-1], pages[-1]]]
    # the data set's pages end where the next heading begins, the last with the end of the file
    records = [{"page": one["page"].removesuffix("\n")} for one in records[:-1]] + records[-1:]
    theirs = harness(model, tokenizer, "wikitext", "wikitext/wikitext.yaml", records, tmp_path)
    fed = passages(read_rows(str(path)), protocol_named("lm-eval-word"), tokenizer, model.config)
    said = measure_text(model, None, fed)
    assert said["perplexity"] == pytest.approx(theirs["word_perplexity"], rel=1e-9)
    assert said["byte_perplexity"] == pytest.approx(theirs["byte_perplexity"], rel=1e-9)
    assert said["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-9)

"""The model card: what the hub reads of it, what people read, and figures that come into it after the run."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from tersely import journal
from tersely.checkpoint import carried_files
from tersely.cli import main
from tersely.errors import CheckpointError
from tersely.kinds import KINDS, LinearKind
from tersely.record import CARD, RECORDED, check_recordable, joined, record
from tersely.report.card import IN_CODES, TAGS, escaped, model_card
from tersely.report.naming import is_hub_name, named, place_of
from tersely.report.reading import read_given
from tersely.report.rows import Report, Row, SiteRow
from tersely.report.verdict import verdict
from tersely.verify import CHECKSUMS, checksums, verify

HOSTILE = "x`|<script>alert(1)</script> *b* _i_ [l](http://e.org) $$a$$ \\(b\\) @you &amp; # \n---\nlicense: mit"
PROTOCOL = {"length": 256, "stride": 256, "first_token": None, "dtype": "float32", "windows": 8, "tokens": 2040}
TEXT: dict[str, Any] = {"text": "/mnt/disk/wiki.raw", "sha256": "0" * 64, **PROTOCOL, "perplexity": 23.5625}
BESIDE = {"dense_perplexity": 11.25, "kl": 0.9219, "top1": 0.5, "perplexity_interval": [22.5, 24.75]}
LLAMA = {"architectures": ["LlamaForCausalLM"]}


def report(model: str = "base/model", **changed: Any) -> Report:
    plain: dict[str, Any] = {
        "model": model,
        "recipe": {"model": model, "seed": 0, "step": [{"method": "svd_llm", "keep": 0.8, "bits": None}]},
        "versions": {"tersely": "0.1.0"},
        "coverage": "20 of 22 linears touched",
        "base_sha256": "a" * 64,
        "rows": [Row("checkpoint", 1_700_920, "bytes", "files on disk", 2_022_664)],
        "sites": [
            SiteRow(f"layers.{n}.q_proj", "attention.q", 8, 8, 0, "svd_llm", None if n == 2 else 4, 1, 2, 0.2, 0.1 * n)
            for n in range(3)
        ],
        "kept": [{"name": "lm_head", "shape": [9, 8], "reason": "output head tied to the embedding"}],
        "steps": [{"step": 0, "verb": "method", "name": "svd_llm", "bytes": 1_700_920, "seconds": {}}],
    }  # fmt: skip
    return Report(**plain | changed)


def settings(*kinds: str, **changed: Any) -> dict[str, Any]:
    modules = {f"m{number}": {"kind": kind} for number, kind in enumerate(kinds)}
    return LLAMA | {"quantization_config": {"modules": modules, **changed}}


def front(card: str) -> dict[str, Any]:
    """What the hub reads."""
    return ModelCard(card).data.to_dict()


# --- what the hub reads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "relation"),
    [
        (settings("quantized"), "quantized"),
        (settings("low_rank", "codebook"), "quantized"),
        (settings("low_rank"), "finetune"),
        (LLAMA, "finetune"),
        (settings("sum", "quantized", base={"model": "owner/base", "sha256": ""}), "adapter"),
    ],
)
def test_the_relation_to_the_base_is_one_that_the_hub_knows(made, relation):
    data = front(model_card(report(), {"license": "mit"}, made))
    assert data["base_model_relation"] == relation
    assert data["base_model"] == ("owner/base" if relation == "adapter" else "base/model")


def test_codes_and_tags_are_those_of_the_kinds():
    packed = {name for name, kind in KINDS.items() if issubclass(kind, LinearKind) and kind.packed}
    assert packed == IN_CODES
    assert TAGS.keys() <= KINDS.keys()


def test_a_local_base_is_named_and_not_linked(tmp_path):
    (tmp_path / "secret" / "llama").mkdir(parents=True)
    card = model_card(report(str(tmp_path / "secret" / "llama")), {"license": "mit"}, LLAMA)
    assert not {"base_model", "base_model_relation"} & front(card).keys()
    assert "# llama, compressed" in card
    assert str(tmp_path) not in card and "secret" not in card


@pytest.mark.parametrize(
    ("model", "name", "hub"),
    [
        ("owner/name", "owner/name", "owner/name"),
        ("gpt2", "gpt2", "gpt2"),
        ("/gone/away/llama", "llama", None),
        ("./llama", "llama", None),
        ("a/b/c", "c", None),
        ("owner/a<b", "a<b", None),
    ],
)
def test_what_is_no_name_of_the_hub_is_a_folder(model, name, hub):
    assert named(model) == (name, hub)
    assert is_hub_name(model) == (hub is not None)


def test_the_licence_goes_with_the_weights():
    own = {"license": "other", "license_name": "ours: 'all'", "license_link": "LICENSE", "tags": ["no"]}
    data = front(model_card(report(), own))
    assert {key: data[key] for key in ("license", "license_name", "license_link")} == {
        key: own[key] for key in ("license", "license_name", "license_link")
    }
    assert front(model_card(report(), {"license": "mit"}))["license"] == "mit"
    assert "license" not in front(model_card(report(), {}))
    assert "license" not in front(model_card(report(), {"license": ["mit", "apache-2.0"]}))  # the hub takes one word


@pytest.mark.parametrize(
    ("architecture", "task", "opener"),
    [
        ("LlamaForCausalLM", "text-generation", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "text-generation", "AutoModelForCausalLM"),
        ("BertForMaskedLM", "fill-mask", "AutoModelForMaskedLM"),
        ("BertModel", None, "BertModel"),
    ],
)
def test_task_and_opener_follow_the_architecture(architecture, task, opener):
    card = model_card(report(), {}, {"architectures": [architecture]})
    assert front(card).get("pipeline_tag") == task
    assert f"from transformers import {opener}\n" in card


def test_figures_stand_in_the_model_index_each_with_its_protocol():
    other = TEXT | BESIDE | {"length": 512, "stride": 512, "windows": 4, "perplexity": 20.0, "kl": 0.5}
    task = {"task": "blimp", "metric": "accuracy", "value": 0.625, "stderr": 0.05, "n": 80}
    card = ModelCard(model_card(report(evaluation={"texts": [TEXT | BESIDE, other], "tasks": [task]}), {}))
    found = [
        (one.metric_type, one.metric_value, (one.metric_args or {}).get("length")) for one in card.data.eval_results
    ]
    assert found == [
        ("perplexity", 23.5625, 256),
        ("kl_divergence", 0.9219, 256),
        ("perplexity", 20.0, 512),
        ("kl_divergence", 0.5, 512),
        ("accuracy", 0.625, None),
    ]
    assert {"sha256", "stride", "first_token", "dtype", "windows", "tokens"} <= card.data.eval_results[
        0
    ].metric_args.keys()
    assert card.data.eval_results[0].dataset_name == "wiki.raw"


# --- what people read -------------------------------------------------------------------------------------------------


def test_every_figure_of_quality_has_its_protocol_and_the_dense_number():
    card = model_card(report(evaluation={"texts": [TEXT | BESIDE]}), {})
    (row,) = re.findall(r"^\| 1 \| wiki\.raw \|.*$", card, flags=re.MULTILINE)
    assert row == "| 1 | wiki.raw | 23.562 (22.500–24.750) | 11.250 | 2.094 | 0.9219 | 0.5000 |"
    (protocol,) = re.findall(r"^1\. .*$", card, flags=re.MULTILINE)
    for said in (
        "8 windows of 256 tokens",
        "stride 256",
        "first token none",
        "float32",
        "2,040",
        "sha256 000000000000",
    ):
        assert said in protocol


def test_what_was_not_measured_has_no_row_and_no_zero():
    card = model_card(report(), {})
    assert "model-index" not in front(card)
    assert "## Quality\n\nNot measured." in card
    alone = model_card(report(evaluation={"texts": [TEXT]}), {})
    assert "| 1 | wiki.raw | 23.562 |" in alone
    assert "KL" not in alone.partition("## Quality")[2] and "dense model |" not in alone
    assert [one["type"] for one in front(alone)["model-index"][0]["results"][0]["metrics"]] == ["perplexity"]
    assert "## Errors" not in model_card(report(sites=[]), {})


def test_errors_are_said_by_role_with_the_worst_site():
    card = model_card(report(), {})
    assert "| svd&#95;llm" not in card
    assert "| svd_llm | attention.q | 3 | measured | 0.1 | 0.2 | layers.2.q_proj |" in card
    sites = [SiteRow("a", "mlp.up", 8, 8, 0, "rtn", 4, 1, 2, 0.25, None)]
    assert "| svd_llm | mlp.up | 1 | predicted | 0.25 | 0.25 | a |" in model_card(report(sites=sites), {})
    spoiled = [SiteRow("a", "mlp.up", 8, 8, 0, "rtn", 4, 1, 2, float("nan"), None)]
    assert "## Errors" not in model_card(report(sites=spoiled), {})


def test_what_was_left_dense_is_said_with_its_reason():
    card = model_card(report(degraded={"layers.1.q_proj": "Gram matrix is singular"}), {})
    assert "- Degraded, left dense against the plan: `layers.1.q_proj` (Gram matrix is singular)" in card
    assert "- Dense by the plan: `layers.2.q_proj`" in card
    assert "- Kept, output head tied to the embedding: `lm_head`" in card


def test_a_hostile_name_is_characters_everywhere():
    """Nothing of it is left that Markdown, HTML, a table, mathematics or the front matter would act on."""
    folder = HOSTILE.replace("/", "∕")  # a folder's name may hold all but this
    site = SiteRow(HOSTILE, HOSTILE, 8, 8, 0, HOSTILE, None, 1, 2, 0.2, 0.1)
    texts = [TEXT | BESIDE | {"text": HOSTILE}]
    step = {"method": HOSTILE, "target": [HOSTILE], "options": {HOSTILE: HOSTILE}}
    card = model_card(
        report(
            folder,
            recipe={"step": [step]},
            coverage=HOSTILE,
            sites=[site],
            kept=[{"name": HOSTILE, "reason": HOSTILE}],
            degraded={HOSTILE + "2": HOSTILE},
            warnings=[HOSTILE],
            calibration={"sources": [HOSTILE]},
            evaluation={"texts": texts, "tasks": [{"task": HOSTILE, "metric": HOSTILE, "value": 0.5}]},
        ),
        {"license": "mit"},
        settings("low_rank"),
    )
    data, body = front(card), card.split("\n---\n", 1)[1]
    assert data["license"] == "mit"
    assert data["model-index"][0]["name"].endswith("compressed")
    for acting in ("$$", "\\(", "@you", "\n---"):  # of the hub's own
        assert acting not in body, acting
    seen = Rendered(body)
    assert seen.tags <= {"h1", "h2", "p", "ul", "ol", "li", "pre", "code", "table", "thead", "tbody", "tr", "th", "td"}
    visible = " ".join(HOSTILE.split())
    assert seen.text.count(visible) >= 12
    heads, cells = (seen.rows(tag) for tag in ("th", "td"))
    assert set(cells) <= set(heads)  # no cell was split


class Rendered(HTMLParser):
    """What is seen of Markdown, and the tags it is made with."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self._lines: list[list[str]] = []
        self.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self._lines.append([])
        elif tag in ("th", "td"):
            self._lines[-1].append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data

    def rows(self, tag: str) -> list[int]:
        """Cells in each line of a table."""
        return [len(line) for line in self._lines if tag in line]


@pytest.mark.parametrize("text", [HOSTILE, "k_proj", "\u202eevil\x00\x1b[31m", "a  b\tc\nd"])
def test_escaping_keeps_one_line_of_what_can_be_seen(text):
    line = escaped(text)
    assert "\n" not in line
    assert html.unescape(line) == "".join(c for c in " ".join(text.split()) if c.isprintable())
    assert escaped("k_proj, mlp.up: 4-bit (a/b)") == "k_proj, mlp.up: 4-bit (a/b)"  # usual names stay legible


def test_of_a_path_only_the_last_part_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.txt").write_text("a")
    assert place_of("/mnt/disk/t.txt[0:9]") == "t.txt[0:9]"
    assert place_of("../shared/t.txt") == "t.txt"
    assert place_of("here/a.txt") == "a.txt"
    assert place_of("C:\\Users\\me\\t.txt") == "t.txt"
    assert place_of("owner/dataset") == "owner/dataset"  # a name of the hub is not one of this machine
    assert place_of("stdlib") == "stdlib"


# --- figures that come later ------------------------------------------------------------------------------------------


def test_later_figures_join_those_that_are_there():
    first = joined({}, {"model": "/x", "bytes": 5, "texts": [TEXT | BESIDE]})
    assert first == {"texts": [TEXT | BESIDE | {"text": "wiki.raw"}]}
    again = joined(first, {"texts": [TEXT | {"perplexity": 23.5}]})
    assert again == {"texts": [TEXT | BESIDE | {"text": "wiki.raw", "perplexity": 23.5}]}
    other = joined(
        again, {"texts": [TEXT | {"length": 512}], "tasks": [{"task": "t", "metric": "m", "n": 1, "value": 0.5}]}
    )
    assert [text["length"] for text in other["texts"]] == [256, 512]
    assert joined(other, {"tasks": [{"task": "t", "metric": "m", "n": 1, "value": 0.7}]})["tasks"] == [
        {"task": "t", "metric": "m", "n": 1, "value": 0.7}
    ]


FIGURES = {"model": "/mnt/disk/out", "bytes": 1, "parameters": 2, "texts": [TEXT | BESIDE]}


def test_recorded_figures_are_in_report_page_and_card(compressed, copy_of):
    folder = copy_of(compressed())
    before = front((folder / CARD).read_text())
    record(folder, FIGURES)
    after = front((folder / CARD).read_text())
    assert after.pop("model-index")[0]["results"]
    assert after == before
    assert "23.562" in (folder / CARD).read_text() and "23.562" in (folder / "report.html").read_text()
    measured = json.loads((folder / "report.json").read_text())["evaluation"]
    assert measured == {"parameters": 2, "texts": [TEXT | BESIDE | {"text": "wiki.raw"}]}
    assert not any("/mnt/disk" in (folder / name).read_text() for name in RECORDED)
    assert json.loads((folder / CHECKSUMS).read_text()) == checksums(folder)
    assert all(check.passed for check in verify(folder))
    (run,) = read_given([folder]).runs
    assert {figure.label: figure.value for figure in verdict(run).figures}["perplexity"] == 23.5625
    once = {name: (folder / name).read_bytes() for name in (*RECORDED, CHECKSUMS)}
    record(folder, FIGURES)
    assert {name: (folder / name).read_bytes() for name in once} == once


def test_a_folder_that_has_moved_does_not_become_a_model_of_the_hub(compressed, copy_of):
    folder = copy_of(compressed())
    plain = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(plain | {"model": "gone/llama"}))
    record(folder, FIGURES)
    card = (folder / CARD).read_text()
    assert "base_model" not in front(card)
    assert "# llama, compressed" in card and "gone" not in card


def test_a_folder_that_was_changed_or_is_not_ours_is_not_recorded_in(compressed, model_folder, copy_of):
    with pytest.raises(CheckpointError, match=r"no checksums\.json"):
        check_recordable(model_folder())
    folder = copy_of(compressed())
    check_recordable(folder)
    (folder / CARD).write_text("my own words")
    with pytest.raises(CheckpointError, match=r"README\.md; what is measured of it is not recorded"):
        check_recordable(folder)
    (folder / CHECKSUMS).write_text(json.dumps(checksums(folder)))
    report = json.loads((folder / "report.json").read_text())
    for content, message in (({}, "model: Field required"), (report | {"later": 1}, "not the report of this release")):
        (folder / "report.json").write_text(json.dumps(content))
        (folder / CHECKSUMS).write_text(json.dumps(checksums(folder)))
        with pytest.raises(CheckpointError, match=rf"report\.json: {message}"):
            check_recordable(folder)


def test_what_is_recorded_is_not_carried_into_the_next_model(compressed, copy_of):
    folder = copy_of(compressed())
    record(folder, FIGURES)
    assert not {path.name for path in carried_files(folder)} & set(RECORDED)


class Killed(BaseException):
    pass


def killed_at(moment: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Record, and stop before (even) or after (odd) one of the renames; whether there was such a moment."""
    count = iter(range(100))
    rename = Path.replace

    def replace(self: Path, target: Path) -> Any:
        if next(count) == moment:
            raise Killed
        done = rename(self, target)
        if next(count) == moment:
            raise Killed
        return done

    with monkeypatch.context() as patch:
        patch.setattr(journal.Path, "replace", replace)
        try:
            record(folder, FIGURES)
        except Killed:
            return True
    return False


def test_a_recording_that_is_killed_leaves_what_is_listed_and_is_made_good(compressed, copy_of, tmp_path, monkeypatch):
    whole = copy_of(compressed())
    record(whole, FIGURES)
    wanted = {name: (whole / name).read_bytes() for name in (*RECORDED, CHECKSUMS)}
    moments = 0
    while True:
        folder = Path(shutil.copytree(compressed(), tmp_path / f"moment-{moments}"))
        if not killed_at(moments, folder, monkeypatch):
            break
        listed = json.loads((folder / CHECKSUMS).read_text())
        found = checksums(folder)
        assert {name: found.get(name) for name in listed} == listed, moments
        json.loads((folder / "report.json").read_text())  # whole, be it the old one or the new
        assert next(verify(folder)).passed, moments
        record(folder, FIGURES)
        assert {name: (folder / name).read_bytes() for name in wanted} == wanted
        assert not [path for path in folder.iterdir() if path.name.endswith(".writing")]
        moments += 1
    assert moments == 10  # two lists and three files, before and after each


def test_the_command_measures_and_records(compressed, copy_of, text_file, capsys, monkeypatch):
    folder = copy_of(compressed())

    def call(*arguments: object) -> int:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return int(ended.value.code or 0)

    asked = ["--text", text_file, "--length", 32, "--windows", 4]
    assert call("eval", "--card", folder, *asked) == 0
    printed = capsys.readouterr().out
    assert f"recorded in {folder}: README.md, report.html, report.json" in printed
    (text,) = json.loads((folder / "report.json").read_text())["evaluation"]["texts"]
    assert f"{text['perplexity']:.3f}" in (folder / CARD).read_text()
    assert f"{text['dense_perplexity']:.3f}" in (folder / CARD).read_text()
    assert str(text_file.parent) not in (folder / CARD).read_text()
    assert all(check.passed for check in verify(folder))

    def never(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("measured, though it could not be recorded")

    monkeypatch.setattr("tersely.pipeline.evaluate", never)
    (folder / "recipe.toml").write_text("# changed\n")
    assert call("eval", folder, *asked, "--card") == 2
    assert "recipe.toml" in capsys.readouterr().err

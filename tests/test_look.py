"""What a user looks at: the catalogue, estimates, pages, the demo on the bundled model."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tersely import demo
from tersely.anatomy import Site, anatomy_of
from tersely.catalogue import PLAIN_SECTIONS, SECTIONS, catalogue, catalogue_text, field_docstrings
from tersely.checkpoint import open_source
from tersely.cli import main
from tersely.errors import CheckpointError
from tersely.estimate import estimate, estimate_table
from tersely.pipeline import compress, load
from tersely.pipeline import run as run_recipe
from tersely.prepare import prepare, statistic_bytes
from tersely.recipe import MethodStep, recipe_from
from tersely.report.comparison import comparison_page
from tersely.report.page import page
from tersely.report.rows import Report, format_value
from tersely.stats import STATISTICS, Stats, keyed_by
from tersely.stats.windows import KEPT
from tersely.tables import TABLES
from tersely.text import window_length

DEMO = Path(demo.__file__).parent / "assets" / "demo"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


class Text(HTMLParser):
    """The text of a page, and its tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.said, self.tags, self.links = "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.said += data


# --- the catalogue ----------------------------------------------------------------------------------------------------


def test_the_catalogue_names_every_method_with_paper_needs_and_documented_options():
    for verb, (key, _) in SECTIONS.items():
        for entry in catalogue()[key]:
            assert entry["paper"] and entry["summary"]
            for option in entry["options"]:
                assert option["help"], f"{entry['name']}.{option['name']} is not documented"
                assert getattr(TABLES[verb][entry["name"]](), option["name"]) == option["default"]
        assert {entry["name"] for entry in catalogue()[key]} == TABLES[verb].keys()


def test_the_text_holds_what_the_data_hold():
    text = catalogue_text()
    flat = " ".join(text.split())
    for table in [key for key, _ in SECTIONS.values()] + list(PLAIN_SECTIONS):
        for entry in catalogue()[table]:
            assert entry["name"] in flat and " ".join(entry["summary"].split()) in flat
    assert all(family in text for family in catalogue()["families"])
    assert max(map(len, text.splitlines())) <= 120


def test_list_prints_json_that_reads_back(capsys):
    assert run("list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(catalogue()))
    assert run("list") == 0
    assert capsys.readouterr().out == catalogue_text() + "\n"


def test_field_docstrings_belong_to_the_field_before_them():
    said = field_docstrings(TABLES["method"]["svd_llm"])
    assert said["damping"].startswith("Added to the diagonal of the Gram matrix")


# --- estimates --------------------------------------------------------------------------------------------------------


def asked(**step):
    return recipe_from({"model": str(DEMO), "step": [{"method": "svd_llm", "keep": 0.5} | step]})


def briefly(**step):
    """On a text so short that reading it is not what takes the most memory."""
    recipe = asked(**step)
    return replace(recipe, calibration=replace(recipe.calibration, source=["stdlib[:2000]"]))


def test_an_estimate_counts_what_headers_say():
    figures = estimate(asked())
    model = load(DEMO)
    assert figures.model_bytes == 4 * model.num_parameters()
    blocks = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    assert figures.touched_bytes == sum(4 * m.weight.numel() for m in blocks) == 2 * figures.budget
    assert sum(count for count, _ in figures.roles.values()) == len(blocks)
    assert figures.seconds > 0


def test_an_estimate_grows_with_what_is_asked(monkeypatch):
    monkeypatch.setattr(
        "tersely.estimate._rate", lambda work, operations: 1e10
    )  # the probes are as noisy as the machine
    none, block = estimate(asked(propagate="none")), estimate(asked(propagate="input"))
    assert block.seconds > none.seconds
    assert none.disk_bytes > block.disk_bytes  # statistics are spilled
    assert estimate(asked(method="svd")).memory_bytes < block.memory_bytes  # no stream, no statistics


def test_statistics_are_forecast_as_large_as_they_are():
    site, x = Site("site", "mlp.up", 0, "in", 10, 24, bias=False, transposed=False), torch.rand(40, 2, 6, 240)
    for kind in STATISTICS.values():
        width = {"output": 10, "flat": 240}.get(keyed_by(kind), 24)
        seen = Stats({kind: kind(width)})
        seen.update(x[..., :width], x[..., :width], x[..., :10])
        largest = sum(tensor.nbytes for tensor in seen[kind].state().values())
        assert statistic_bytes(kind, site, 6) == pytest.approx(largest, abs=800), kind  # a few counts


def test_disk_holds_what_is_spilled_and_every_gradient():
    greedy, streamed = {"propagate": "none", "allocate": "greedy"}, {"propagate": "block"}
    reads = {site.reads: site.in_features for site in anatomy_of(open_source(DEMO).skeleton()).sites}
    plain, windows = (estimate(briefly(method=method, **greedy)).disk_bytes for method in ("svd_llm", "dobi"))
    assert windows - plain == sum(4 * KEPT * min(256, width) * width for width in reads.values())
    plain, gradients = (estimate(briefly(method=method, **streamed)) for method in ("svd_llm", "zs_svd"))
    # float64 beside float32, and counts
    assert gradients.disk_bytes - plain.disk_bytes == pytest.approx(2 * plain.touched_bytes, abs=1000)
    refined = estimate(briefly(**streamed, refine={}))
    assert refined.disk_bytes - plain.disk_bytes == plain.model_bytes
    assert refined.memory_bytes > plain.memory_bytes


def test_memory_holds_the_model_on_which_ranks_are_learned():
    plain = estimate(briefly(propagate="none", allocate="greedy"))
    model, weights = plain.memory_bytes + plain.model_bytes, plain.touched_bytes
    assert estimate(briefly(propagate="none", allocate="dobi")).memory_bytes > model
    # factors of full rank are twice as large as a square weight, and always larger than the weight
    assert estimate(briefly(propagate="none", allocate="gates")).memory_bytes > model + weights


def test_what_later_steps_do_on_the_whole_model_counts(monkeypatch):
    monkeypatch.setattr("tersely.estimate._rate", lambda work, operations: 1e10)
    first = briefly(method="svd", propagate="none")
    second = MethodStep("rtn", target=["*.down", "*.up"], propagate="none", options={"width": 8})
    plain, tempered, measured = (
        estimate(replace(first, step=[first.step[0], step]))
        for step in (second, replace(second, temper=True), replace(second, method="kfac_svd", options={}, keep=0.5))
    )
    for other in (tempered, measured):  # a temperature, and gradients
        assert other.memory_bytes > plain.memory_bytes + plain.model_bytes
        assert other.seconds > plain.seconds


def test_a_second_stream_is_held_beside_the_shifted_one():
    plain, paired = (estimate(briefly(method=method, propagate="input")) for method in ("svd_llm", "aa_svd"))
    drawn, hidden = briefly().calibration, open_source(DEMO).config.hidden_size
    length = window_length(open_source(DEMO).config, drawn.length)
    assert paired.memory_bytes - plain.memory_bytes > 4 * hidden * drawn.samples * length


def test_what_is_outside_of_the_blocks_is_forecast_where_nothing_else_is_left(tmp_path):
    first = asked(method="rtn", keep=None, options={"width": 4})
    run_recipe(prepare(first, tmp_path / "out"))
    rest = replace(first.step[0], target=["embeddings"])
    assert estimate(replace(first, model=str(tmp_path / "out"), step=[rest])).memory_bytes > 0


def test_memory_holds_the_model_whose_temperature_is_found(monkeypatch):
    monkeypatch.setattr("tersely.estimate._rate", lambda work, operations: 1e10)
    plain, tempered = (estimate(briefly(propagate="none", temper=temper)) for temper in (False, True))
    assert tempered.memory_bytes > plain.memory_bytes + plain.model_bytes
    assert tempered.seconds > plain.seconds


def test_the_measured_peak_of_disk_stays_below_the_estimate(tmp_path):
    figures = estimate(asked())
    out = compress(DEMO, tmp_path / "out", method="svd_llm", keep=0.5, samples=4).out
    assert sum(file.stat().st_size for file in out.rglob("*")) < figures.disk_bytes


def test_plan_says_it_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("plan", DEMO, "--method", "svd_llm", "--keep", 0.5) == 0
    said = capsys.readouterr().out
    assert "28 of 29 linears touched, 1 kept: 1 output head tied to the embedding" in said
    assert "peak memory" in said and "disk" in said and "time" in said
    assert list(tmp_path.iterdir()) == []
    assert estimate_table(estimate(asked())).row_count >= 10


# --- pages ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("look") / "out"
    return compress(DEMO, out, method="svd_llm", keep=0.6, samples=8)


def test_the_page_holds_every_site_and_loads_nothing(result):
    seen = Text((result.out / "report.html").read_text(encoding="utf-8"))
    assert all(site.name in seen.said for site in result.report.sites)
    assert result.report.coverage in seen.said
    assert "script" not in seen.tags and all(link.startswith("#") for link in seen.links)


def test_a_hostile_model_name_is_text():
    name = "<i>alert(1)</i>"
    report = Report(name, {"step": [{"method": name}]}, {"tersely": "0"}, name, warnings=[name], degraded={name: name})
    seen = Text(page(report))
    assert "i" not in seen.tags
    assert seen.said.count(name) >= 5
    row = {"text": name, "method": name, "options": {"allocate": name, "propagate": name}, "keep": 0.5, "bytes": 1}
    row |= {"perplexity": 2.0, "dense_perplexity": 1.0, "kl": 0.1, "top1": 0.5, "left_dense": 0, "seconds": 1.0}
    protocol = {"windows": 1, "length": 2, "stride": 2, "first_token": None, "dtype": "float32", "tokens": 1}
    seen = Text(comparison_page(name, [row | {"protocol": protocol | {"sha256": "0" * 64}}]))
    assert "i" not in seen.tags and name in seen.said


def test_degraded_sites_are_said_before_any_table(result):
    html = page(Report("m", {"step": []}, {"tersely": "0"}, "", degraded={"layers.3.q_proj": "why"}))
    assert html.index("layers.3.q_proj") < html.index("<table")


def test_report_and_card_agree_with_the_files(result):
    rows = {row.name: row for row in result.report.rows}
    assert rows["checkpoint"].value == (result.out / "model.safetensors").stat().st_size
    assert rows["checkpoint"].before == (DEMO / "model.safetensors").stat().st_size
    assert rows["touched weights"].value == sum(site.nbytes for site in result.report.sites)
    assert rows["touched weights"].value <= 0.6 * rows["touched weights"].before
    assert rows["parameters"].value == load(result.out).num_parameters()
    card = (result.out / "README.md").read_text(encoding="utf-8")
    assert f"{rows['parameters'].value:,.0f}" in card
    assert "license: apache-2.0" in card
    assert str(DEMO) not in card  # where a folder lay is nobody else's business


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [(None, "bytes", "–"), (999, "bytes", "999 B"), (1500, "bytes", "1.50 kB"), (2.5e9, "bytes", "2.50 GB"),
     (1234567, "parameters", "1,234,567"), (0.123456, "share", "0.1235")],
)  # fmt: skip
def test_numbers_for_people(value, unit, said):
    assert format_value(value, unit) == said


# --- the demo ---------------------------------------------------------------------------------------------------------


def test_the_bundled_model_is_one_that_compression_hurts(tmp_path):
    """Plain SVD at keep 0.8 raises its perplexity by far more than the 15 % that tell methods apart."""
    size = sum(file.stat().st_size for file in DEMO.iterdir())
    assert size < 4_000_000
    config = json.loads((DEMO / "config.json").read_text())
    assert config["hidden_size"] <= 128
    card = (DEMO / "README.md").read_text()
    ours = float(re.search(r"\*\*([\d.]+)\*\* nats", card)[1])
    trigram = float(re.search(r"\| ([\d.]+) nats", card)[1])
    assert ours < trigram - 0.5


def test_the_demo_ends_in_a_table_and_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "WINDOWS", 8)
    monkeypatch.setattr(demo, "KEEPS", (0.8,))
    out = tmp_path / "demo"
    assert run("demo", out) == 0
    rows = json.loads((out / "demo.json").read_text())["rows"]
    assert len(rows) == len(demo.ENTRIES)
    plain = next(row for row in rows if row["method"] == "svd")
    assert plain["perplexity"] > 1.15 * plain["dense_perplexity"]
    assert min(rows, key=lambda row: row["kl"])["method"] == "svd_llm"
    seen = Text((out / "report.html").read_text(encoding="utf-8"))
    assert f"{plain['perplexity']:.2f}" in seen.said
    assert "report:" in capsys.readouterr().out
    folder = next(path for path in out.iterdir() if path.name.startswith("svd_llm"))
    assert run("verify", folder) == 0


def test_a_demo_does_not_remove_what_is_not_its_own(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert run("demo", tmp_path) == 2
    assert "exists and is no demo" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_plan_of_foreign_names_reads_the_configuration_and_rewrites_nothing(tmp_path, monkeypatch):
    """A pickled checkpoint: sizes are those of its own safetensors, and no weight is loaded to say so."""
    model = tmp_path / "model"
    load(DEMO).save_pretrained(model)
    torch.save({}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    before = {path.name for path in model.iterdir()}
    monkeypatch.setattr("tersely.prepare.rewrite_names", None)
    plain = {"model": str(model), "step": [{"method": "svd_llm", "keep": 0.5}]}
    figures, known = estimate(recipe_from(plain)), estimate(asked())
    assert figures.from_configuration and not known.from_configuration
    assert (figures.model_bytes, figures.touched_bytes) == (known.model_bytes, known.touched_bytes)
    assert figures.disk_bytes == known.disk_bytes + known.model_bytes
    assert {path.name for path in model.iterdir()} == before
    (model / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no weights \(looked for \*\.safetensors"):
        estimate(recipe_from(plain))

"""Every verb of a recipe, from the command to a folder that opens by itself; steps after steps; stopped and taken up
again; and what is wrong with a recipe said before any work."""

import json
import math
import re
import shutil
import struct
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch import Tensor

import tersely
from families import tiny_batch
from tersely import checkpoint, cli, journal
from tersely.anatomy import Anatomy, anatomy_of, model_class
from tersely.catalogue import methods_page
from tersely.checkpoint import read_config
from tersely.deltas import folder as deltas
from tersely.kinds import manifest_of
from tersely.methods import METHODS
from tersely.pipeline import run
from tersely.prepare import prepare
from tersely.recipe import STEPS, recipe_from
from tersely.stats import Gram, Stats
from tersely.steps import training
from tersely.tables import TABLES
from tersely.train.settings import Training
from test_delta import tune

ROOT = Path(__file__).resolve().parents[1]
CALIBRATION = {"samples": 6, "length": 16}
TRAIN = {"tokens": 96, "batch": 2, "held_out": 2}  # three steps of the optimiser
COARSE = {"ranks": "1+2", "group": 0, "keep": 0.3, "allocate": "uniform"}
OBJECTIVES = {"adapter": ["tokens"], "kasa": ["logits"], "nipq": ["tokens", "logits"], "full": ["logits"]}

Folder = Callable[..., Path]
Step = dict[str, Any]


def train(relax: str, **more: Any) -> Step:
    return {"train": OBJECTIVES[relax], "relax": relax, **TRAIN, **more}


def command(*arguments: object) -> int:
    """The exit status of the command line."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def recipe(text: Path, *steps: Step, **more: Any) -> dict[str, Any]:
    return {"calibration": CALIBRATION | {"source": [str(text)]}, "step": list(steps)} | more


def compress(model: Path, out: Path, plain: Mapping[str, Any]) -> int:
    """The command with a recipe in a file."""
    file = out.with_name(f"{out.name}.toml")
    file.write_text(tomli_w.dumps(plain), encoding="utf-8")
    return command("compress", model, out, "--recipe", file)


def headers(folder: Path) -> dict[str, tuple[int, int]]:
    """Name of every stored tensor → its numbers and bytes, as the files themselves say."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            for name, said in json.loads(opened.read(length)).items():
                if name != "__metadata__":
                    first, last = said["data_offsets"]
                    found[name] = math.prod(said["shape"]), last - first
    return found


def opened(folder: Path) -> Any:
    """With plain transformers."""
    return model_class(read_config(folder)).from_pretrained(folder)


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    return opened(folder)(**tiny_batch()).logits


@torch.no_grad()
def bytes_per_token(folder: Path) -> float:
    """Of what lies in the library's cache after three tokens."""
    tokens = tiny_batch()["input_ids"][:1, :3]
    cache = opened(folder)(input_ids=tokens, use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / tokens.numel()


# --- one step of every verb -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    families: tuple[str, ...]
    step: Step
    target: str | None = ""
    """The roles of the linears whose bytes are to change begin with it; None: those of none."""
    causal: bool = True


CASES = {
    "smooth": Case(("llama", "gpt2"), {"rewrite": "smooth"}, None),
    "rotate": Case(("qwen3", "gpt2"), {"rewrite": "rotate"}, None),
    "gptq": Case(("llama", "gpt2", "bert"), {"method": "gptq", "width": 4, "group": 16}),
    "stat": Case(("qwen2", "bert"), {"method": "stat", "target": ["mlp"], "keep": 0.5}, "mlp"),
    "latent": Case(("llama", "qwen2", "qwen3"), {"cache": "latent", "keep": 0.5}, "attention"),
    "fope": Case(("llama", "qwen3"), {"convert": "fope"}, "attention"),
    "adapter": Case(("llama", "gpt2"), train("adapter", rank=2)),
    "beside": Case(("qwen2",), train("adapter", rank=2, merge=False)),
    "kasa": Case(("qwen2", "gpt2"), train("kasa", rank=2)),
    "nipq": Case(("llama", "gpt2"), train("nipq", bits=4.0)),
    "full": Case(("qwen3", "gpt2"), train("full", target=["mlp"]), "mlp"),
    "delta_come": Case(("llama", "gpt2"), {"method": "delta_come", **COARSE}),
    "mixed": Case(("llama",), {"method": "mixed", "ranks": 2, "widths": [3, 4], "bits": 4.5, "allocate": "knapsack"}),
}
SITES = {"method": 7, "cache": 1}  # a block of a gated family

every_case = pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name, case in CASES.items() for family in case.families]
)


@dataclass(frozen=True)
class Result:
    model: Path
    out: Path
    dense: Anatomy

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.out / "report.json").read_text())

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.report["rows"]}


@pytest.fixture(scope="module")
def made(model_folder: Folder, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """A function: name of a case, family → what the command makes of it."""
    known: dict[tuple[str, str], Result] = {}

    def make(name: str, family: str) -> Result:
        if (name, family) not in known:
            room, step = tmp_path_factory.mktemp(f"{name}-{family}-"), dict(CASES[name].step)
            model = model_folder(family)
            if name == "delta_come":
                model, step["base"] = tune(model, room / "tuned", 3), str(model)
            assert compress(model, room / "out", recipe(text_file, step)) == 0
            known[name, family] = Result(model, room / "out", anatomy_of(opened(model)))
        return known[name, family]

    return make


@every_case
def test_it_opens_by_itself_always_alike_and_passes_verification(name, family, made):
    result = made(name, family)
    assert command("verify", result.out) == 0
    first = logits(result.out)
    assert torch.equal(first, logits(result.out))
    assert type(opened(result.out)) is type(opened(result.model))
    dense = logits(result.model)
    assert first.shape == dense.shape and torch.isfinite(first).all()
    if CASES[name].step.get("rewrite"):
        torch.testing.assert_close(first, dense, atol=1e-4, rtol=1e-4)  # other weights, the same function
        assert "quantization_config" not in json.loads((result.out / "config.json").read_text())
    else:
        assert 0 < (first - dense).square().mean() < dense.square().mean()


@pytest.mark.parametrize(
    ("name", "family"), [(n, f) for n, case in CASES.items() for f in case.families if f != "bert"]
)
def test_plain_generation_works_with_its_cache_as_without(name, family, made):
    model, prompt = opened(made(name, family).out), tiny_batch()["input_ids"][:1]
    with_cache, without = (
        model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False)
    )
    assert with_cache.shape[1] > prompt.shape[1]
    assert torch.equal(with_cache, without)


@every_case
def test_the_report_says_what_lies_on_the_disk(name, family, made):
    case, result = CASES[name], made(name, family)
    rows, report = result.rows, result.report
    verb = next(verb for verb in ("method", "rewrite", "cache", "convert", "train") if verb in case.step)
    files = {
        folder: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for folder in (result.model, result.out)
    }
    assert (rows["checkpoint"]["value"], rows["checkpoint"]["before"]) == (files[result.out], files[result.model])
    (step,) = report["steps"]
    assert (step["step"], step["verb"], step["bytes"]) == (0, verb, files[result.out])
    assert step["name"] == case.step.get("relax", case.step[verb])
    assert all(spent >= 0 for spent in step["seconds"].values()) and step["seconds"]
    assert rows["parameters"]["before"] == sum(numbers for numbers, _ in headers(result.model).values())

    chosen = [site for site in result.dense.sites if case.target is not None and site.role.startswith(case.target)]
    inside = tuple(f"{site.name}." for site in chosen)
    touched = {
        folder: sum(b for n, (_, b) in headers(folder).items() if n.startswith(inside) and not n.endswith(".bias"))
        for folder in (result.model, result.out)
    }
    if chosen:
        weights = sum(site.out_features * site.in_features for site in chosen)
        before, after = touched[result.model], touched[result.out]
        assert (rows["touched weights"]["before"], rows["touched weights"]["value"]) == (before, after)
        bits = rows["bits per touched weight"]
        assert bits["value"] == pytest.approx(8 * after / weights) and bits["before"] == 8 * before / weights
    else:
        assert "touched weights" not in rows

    sites = report["sites"]
    if verb == "method":
        assert [s["name"] for s in sites] == (
            [u.name for u in result.dense.units if u.role == "mlp"] if name == "stat" else [s.name for s in chosen]
        )
        assert sum(site["nbytes"] for site in sites) == touched[result.out]
    elif verb == "cache":
        row = rows["cache per token"]
        assert [site["role"] for site in sites] == ["cache"] * len(result.dense.blocks)
        assert row["value"] == sum(site["nbytes"] for site in sites) == bytes_per_token(result.out)
        assert row["before"] == sum(site["dense_bytes"] for site in sites) == bytes_per_token(result.model)
        assert 0.4 * row["before"] < row["value"] <= 0.5 * row["before"]
    else:
        assert sites == []
    if verb == "rewrite":
        assert step["left_alone"] == {}
    if verb == "train":
        figures = step["training"]
        assert (figures["steps"], figures["tokens"], figures["kept_step"]) == (3, TRAIN["tokens"], 3)
        assert [measured["step"] for measured in figures["held_out"]] == [0, 3]
        assert all(measured["losses"].keys() == set(case.step["train"]) for measured in figures["held_out"])


@every_case
def test_what_was_done_is_written_for_people(name, family, made):
    result = made(name, family)
    files = {path.name for path in result.out.iterdir()}
    assert {"README.md", "report.html", "report.json", "plan.json", "recipe.toml", "checksums.json"} <= files
    assert ".tersely" not in files
    (step,) = result.report["steps"]
    for page in ("README.md", "report.html"):
        content = (result.out / page).read_text()
        assert step["name"] in content and "checkpoint" in content


@pytest.mark.parametrize(
    ("name", "family"),
    [(n, f) for n, case in CASES.items() for f in case.families],
)
def test_what_took_effect_is_a_recipe_that_does_it_again(name, family, made, tmp_path):
    result = made(name, family)
    (written,) = tomllib.loads((result.out / "recipe.toml").read_text())["step"]
    assert CASES[name].step.items() <= written.items()
    assert command("compress", result.model, tmp_path / "again", "--recipe", result.out / "recipe.toml") == 0
    for path in result.out.iterdir():
        if path.suffix in (".safetensors", ".toml") or path.name in ("config.json", "plan.json"):
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_no_option_bears_the_name_of_a_key_of_its_step():
    for verb, table in TABLES.items():
        keys = {field.name for field in fields(STEPS[verb])}
        for name, entry in table.items():
            assert not keys & {field.name for field in fields(entry)}, f"{verb} {name}"


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_checks_and_writes_nothing(name, made, tmp_path, capsys):
    result = made(name, CASES[name].families[0])
    file = result.out / "recipe.toml" if name != "delta_come" else result.out.with_name("out.toml")
    assert command("compress", result.model, tmp_path / "out", "--recipe", file, "--dry-run") == 0
    assert "linears touched" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("latent", "gptq", "stat", "smooth", "fope", "adapter"),
    ],
)
def test_every_verb_can_be_planned(name, model_folder, capsys):
    assert command("plan", model_folder(), "--method", name) == 0
    assert "linears touched" in capsys.readouterr().out


def test_what_a_rewrite_leaves_alone_is_told(model_folder, text_file, tmp_path):
    model = model_folder("qwen3_moe")
    assert compress(model, tmp_path / "out", recipe(text_file, {"rewrite": "smooth"})) == 0
    (step,) = json.loads((tmp_path / "out" / "report.json").read_text())["steps"]
    assert step["left_alone"] == {"model.layers.1.post_attention_layernorm": "it also feeds a mixture of experts"}
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "family", "said"),
    [
        ("adapter", "llama", "14 of 15 linears touched, 1 kept: 1 output head"),
        ("full", "qwen3", "6 of 15 linears touched, 9 kept: 1 output head, 8 not among the targets"),
        ("fope", "llama", "8 of 15 linears touched, 7 kept: 1 output head, 6 not among the targets"),
    ],
)
def test_no_plan_left_dense_what_training_and_conversion_changed(name, family, said, made):
    assert made(name, family).report["coverage"] == said


def test_a_folder_that_came_out_goes_in_again(made, text_file, tmp_path):
    """The healing of a compressed model may be another run than its compression."""
    compressed, others = made("latent", "llama"), ["mlp", "attention.q", "attention.o"]
    assert compress(compressed.out, tmp_path / "out", recipe(text_file, train("adapter", target=others))) == 0
    assert command("verify", tmp_path / "out") == 0
    assert bytes_per_token(tmp_path / "out") == compressed.rows["cache per token"]["value"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = report["steps"][0]["training"]["held_out"]
    assert before["losses"] != after["losses"]


def test_a_folder_that_is_quantized_whole_is_healed(made, text_file, tmp_path):
    assert compress(made("gptq", "llama").out, tmp_path / "out", recipe(text_file, train("adapter", rank=2))) == 0


def test_the_page_of_methods_is_up_to_date():
    said = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert said == methods_page(), "docs/methods.md is not what the tables say: run make docs"


def test_the_command_prints_the_page_of_methods(capsys):
    assert command("list", "--markdown") == 0
    assert capsys.readouterr().out == methods_page()


# --- steps after steps ------------------------------------------------------------------------------------------------

FOUR = (
    {"rewrite": "smooth"},
    {"method": "svd_llm", "keep": 0.6},
    {"method": "gptq", "target": ["*.down", "*.up"], "width": 4, "group": 0},
    {**train("adapter", rank=2), "train": ["logits"], "rate": 1e-2, "tokens": 640},
)


def test_four_steps_each_on_what_the_one_before_left(model_folder, text_file, tmp_path):
    model, out = model_folder(), tmp_path / "out"
    asked = recipe(text_file, *FOUR, evaluation={"text": [str(text_file)], "length": 16, "windows": 8})
    assert compress(model, out, asked) == 0
    assert command("verify", out) == 0
    report = json.loads((out / "report.json").read_text())
    steps = report["steps"]
    assert [(s["verb"], s["name"]) for s in steps] == [
        ("rewrite", "smooth"), ("method", "svd_llm"), ("method", "gptq"), ("train", "adapter")
    ]  # fmt: skip
    dense, smoothed, factorised, quantized, healed = (
        report["rows"][-1]["before"], *(step["bytes"] for step in steps)
    )  # fmt: skip
    assert dense == smoothed > factorised > quantized < healed < smoothed
    assert healed == report["rows"][-1]["value"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    texts = [step["evaluation"]["texts"][0] for step in steps]
    assert texts[0]["perplexity"] == pytest.approx(texts[0]["dense_perplexity"], rel=1e-5)
    assert texts[0]["kl"] < 1e-6 < texts[1]["kl"] < texts[2]["kl"]
    assert texts[3]["kl"] < texts[2]["kl"]
    again = tersely.evaluate(out, str(text_file), length=16, windows=8)["texts"][0]["perplexity"]
    assert again == report["evaluation"]["texts"][0]["perplexity"] == texts[3]["perplexity"]
    assert {site["method"] for site in report["sites"]} == {"svd_llm", "gptq"}

    manifest = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    factors = {site["name"] for site in report["sites"] if site["method"] == "svd_llm" and site["amount"] is not None}
    assert len(factors) > 7
    nested = {"": "sum", ".terms.0": "low_rank", ".terms.0.down": "quantized", ".terms.0.up": "quantized"}
    nested |= {".terms.1": "low_rank"}
    for name in factors:
        below = {n.removeprefix(name): s["kind"] for n, s in manifest.items() if f"{n}.".startswith(f"{name}.")}
        assert below == nested
    assert manifest_of(opened(out)) == manifest
    assert report["coverage"].startswith("14 of 15 linears touched")  # what was left dense took an adapter, too


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Weight and mean Gram matrix of whatever GPTQ is handed, in order."""
    found: list[tuple[Tensor, Tensor]] = []
    usual = METHODS["gptq"].compress

    def compress(method: Any, weight: Tensor, stats: Stats, amount: int) -> Any:
        found.append((weight.double(), stats[Gram].mean()))
        return usual(method, weight, stats, amount)

    monkeypatch.setattr(METHODS["gptq"], "compress", compress)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_second_factor_sees_what_the_first_hands_on(family, seen, model_folder, text_file, tmp_path):
    """With y = B x second moments are E[y yᵀ] = B E[x xᵀ] Bᵀ: the second factor is rounded in the right metric."""
    factorise = {"method": "svd", "keep": 0.5, "allocate": "uniform", "propagate": "none"}
    quantize = {"method": "gptq", "width": 8, "group": 0, "target": ["*.down", "*.up"], "propagate": "none"}
    assert compress(model_folder(family), tmp_path / "out", recipe(text_file, factorise, quantize)) == 0
    assert len(seen) == 2 * len(anatomy_of(opened(model_folder(family))).sites)
    for (down, read), (up, passed) in zip(seen[::2], seen[1::2], strict=True):
        assert down.shape[0] == up.shape[1]
        wanted = down @ read @ down.T
        torch.testing.assert_close(passed, wanted, rtol=0, atol=1e-5 * wanted.diagonal().max().item())


def test_with_errors_handed_on_the_second_factor_sees_the_rounded_first(seen, model_folder, text_file, tmp_path):
    factorise = {"method": "svd", "keep": 0.5, "allocate": "uniform", "target": ["mlp.down"]}
    quantize = {"method": "gptq", "width": 2, "group": 0, "target": ["*.down", "*.up"], "propagate": "input"}
    assert compress(model_folder(), tmp_path / "out", recipe(text_file, factorise, quantize)) == 0
    down, read = seen[0]
    rounded = opened(tmp_path / "out").get_submodule("model.layers.0.mlp.down_proj").down.to_dense().double()
    passed = seen[1][1]
    scale = 1e-5 * passed.diagonal().max().item()
    torch.testing.assert_close(passed, rounded @ read @ rounded.T, rtol=0, atol=scale)
    assert not torch.allclose(passed, down @ read @ down.T, rtol=0, atol=100 * scale)


# --- stopped and taken up again ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eager(Training):
    """Every step of training is kept."""

    save_every: int = 1


@contextmanager
def stopping(patch: pytest.MonkeyPatch, count: int) -> Iterator[list[Path]]:
    """Runs are stopped when so many files are in their places; 0: never.  Gives the files."""
    placed: list[Path] = []
    usual = journal.commit

    def commit(path: Path, write: Callable[[Path], object]) -> None:
        usual(path, write)
        placed.append(path)
        if len(placed) == count:
            raise KeyboardInterrupt

    with patch.context() as inner:
        for module in (journal, checkpoint, deltas):
            inner.setattr(module, "commit", commit)
        yield placed


RUNS: dict[str, tuple[Step, ...]] = {
    "rewrite, gptq, train": (
        {"rewrite": "smooth"},
        {"method": "gptq", "width": 4, "group": 0, "target": ["mlp.up"]},
        train("adapter", target=["mlp"]),
    ),
    "delta": ({"method": "delta_come", **COARSE, "target": ["*.layers.1.mlp.up_proj"]},),
    "cache": ({"cache": "latent", "keep": 0.5},),
    "convert, train": ({"convert": "fope"}, train("nipq", bits=5.0, target=["*.layers.1.mlp.up_proj"])),
}


@pytest.mark.parametrize("name", RUNS)
def test_stopped_anywhere_it_ends_with_the_same_bytes(name, model_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "Training", Eager)
    model, steps = model_folder(), [dict(step) for step in RUNS[name]]
    if name == "delta":
        model, steps[0]["base"] = tune(model, tmp_path / "tuned", 3), str(model)
    asked = recipe_from(recipe(text_file, *steps, model=str(model)))
    whole, out = tmp_path / "whole", tmp_path / "out"
    with stopping(monkeypatch, 0) as placed:
        run(prepare(asked, whole))
    files = len(placed)
    if "train" in steps[-1]:  # the optimiser is stopped too, not only what is around it
        assert sum(path.name == "training.safetensors" for path in placed) == 3
    same = [
        p.name
        for p in whole.iterdir()
        if p.suffix in (".safetensors", ".toml") or p.name in ("config.json", "plan.json")
    ]
    assert "model.safetensors" in same
    for count in sorted({*range(1, files + 1, 3), files}):
        with stopping(monkeypatch, count), pytest.raises(KeyboardInterrupt):
            run(prepare(asked, out))
        run(prepare(asked, out))
        for file in same:
            assert (out / file).read_bytes() == (whole / file).read_bytes(), f"{file}, stopped at file {count}"
        assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
        shutil.rmtree(out)


# --- what is refused --------------------------------------------------------------------------------------------------

GPTQ = {"method": "gptq", "width": 4}
SVD = {"method": "svd", "keep": 0.5}
LATENT = {"cache": "latent", "keep": 0.5}
FOPE = {"convert": "fope"}
SMOOTH = {"rewrite": "smooth"}
PRE_SINQ = {"rewrite": "pre_sinq"}
DELTA = {"method": "delta_come", **COARSE, "base": "{base}"}

WRONG: list[tuple[str, list[Step], str]] = [
    # keys
    ("llama", [GPTQ | {"wdth": 4}], r"method gptq: unknown option 'wdth'; did you mean 'width'"),
    ("llama", [SMOOTH | {"strenth": 0.5}], r"rewrite smooth: unknown option 'strenth'; did you mean 'strength'"),
    ("llama", [LATENT | {"alhpa": 0.5}], r"cache latent: unknown option 'alhpa'; did you mean 'alpha'"),
    ("llama", [FOPE | {"gian": 0.5}], r"conversion fope: unknown option 'gian'; did you mean 'gain'"),
    ("llama", [train("adapter", rnak=2)], r"relaxation adapter: unknown option 'rnak'; did you mean 'rank'"),
    ("llama", [SMOOTH | {"method": "gptq"}], "step 1: wanted exactly one of method, rewrite, cache, convert, train"),
    ("llama", [SMOOTH, {"method": "smooth"}], "write rewrite = 'smooth'"),
    # budgets
    ("llama", [{"method": "gptq"}], "could become one of 4 sizes; give one of keep, bits, size and perplexity"),
    ("llama", [SVD, {"method": "rtn", "target": ["*.down"]}], "could become one of 4 sizes; give one of keep"),
    ("llama", [GPTQ | {"keep": 0.5, "bits": 4.0}], "give only one of keep, bits, size"),
    ("llama", [{"cache": "latent"}], r"step\.1\.keep: Field required"),
    ("llama", [LATENT | {"keep": 1.5}], r"keep = 1\.5; wanted above 0 and at most 1"),
    ("llama", [SMOOTH, LATENT | {"keep": 0.001}], "smallest option takes 8 bytes"),
    # targets
    ("llama", [GPTQ, GPTQ], r"step 2 \(gptq\): target 'all': no linear is left .*earlier step \(gptq\) leaves nothing"),
    ("llama", [SMOOTH, GPTQ | {"target": ["*.down"]}], r"step 2 \(gptq\): unknown target '\*\.down'"),
    ("llama", [GPTQ, GPTQ | {"target": ["*.down"]}], r"step 2 \(gptq\): unknown target '\*\.down'"),
    ("llama", [SVD | {"target": ["mlp"]}, {"method": "stat", "target": ["mlp"], "keep": 0.5}], "holds no whole unit"),
    ("llama", [LATENT, LATENT], r"step 2 \(latent\): .*holds no whole unit of attention that is still as the model"),
    ("llama", [FOPE, FOPE], r"step 2 \(fope\): .*holds no whole unit of attention"),
    ("llama", [FOPE, LATENT], r"step 2 \(latent\): .*holds no whole unit of attention"),
    ("llama", [FOPE, {"rewrite": "rotate"}], "a linear in the attention of .* has been replaced; rotate before other"),
    ("llama", [train("adapter", target=["mlp.midle"])], r"unknown target 'mlp\.midle'"),
    # models that do not fit
    ("gemma2", [{"rewrite": "rotate"}], "cannot be turned: it norms what attention and MLP add to the residual stream"),
    ("bert", [{"rewrite": "rotate"}], "cannot be turned: its norms, gains and all, stand in the residual stream"),
    ("bert", [SMOOTH], "nothing to do in a model of family bert: its norms"),
    ("gpt2", [{"method": "stat", "target": ["attention"], "keep": 0.5}], "holds q, k and v in one matrix"),
    ("gpt2", [LATENT], "a latent cache needs separate linears for q, k, v and o"),
    ("phi3", [LATENT], "a latent cache needs separate linears for q, k, v and o"),
    ("bert", [LATENT], "wanted a linear .*q_proj"),
    ("gemma2", [SMOOTH, LATENT], r"step 2 \(latent\): .*caps its scores"),
    ("gpt2", [FOPE], "wanted a linear .*q_proj"),
    ("gemma2", [SMOOTH, FOPE], r"step 2 \(fope\): .*caps its scores"),
    ("gptq", [GPTQ], r"no linear is left to compress \(14 already QuantizedLinear"),
    ("gptq", [SMOOTH], "columns cannot be scaled any more; smooth before quantizing"),
    ("gptq", [FOPE], "no linear is left to compress"),
    ("llama", [GPTQ, SMOOTH], r"step 2 \(smooth\): .*q_proj \(compressed by an earlier step, gptq\).*smooth before"),
    ("llama", [{"method": "rtn", "width": 4, "target": ["mlp.gate"]}, PRE_SINQ], r"step 2 \(pre_sinq\): .*rewrite b"),
    ("llama", [{"method": "svd_llm", "keep": 0.5, "remap": True}, SMOOTH], r"step 2 \(smooth\): .*smooth before"),
    # training
    ("llama", [train("adapter") | {"train": ["tokns"]}], "unknown objective 'tokns'; did you mean 'tokens'"),
    ("llama", [train("adapter") | {"train": []}], "an empty list of objectives"),
    ("bert", [train("adapter")], "BertForMaskedLM is an encoder"),
    ("llama", [train("adapter") | {"relax": "lora"}], "unknown relaxation 'lora'"),
    ("llama", [LATENT, train("adapter")], r"step 2 \(adapter\): .*k_proj is read as two factors"),
    ("latent", [train("adapter", target=["attention.v"])], "v_proj is read as two factors by the cache"),
    ("llama", [SVD, train("adapter", patience=-1)], "patience = -1; wanted 0 or more"),
    ("llama", [SVD, train("adapter", held_out=-1)], "held_out = -1; wanted 0 or more"),
    ("llama", [SVD, train("adapter", quantizer_rate=0.0)], r"quantizer_rate = 0\.0; wanted above 0"),
    # differences
    ("llama", [DELTA | {"base": "{wider}"}], r"was not made from .*shapes differ in .*\(64, 32\) and \(64, 48\)"),
    ("llama", [SMOOTH, DELTA | {"base": "{wordier}"}], r"shapes differ in .*\(64, 32\) and \(80, 32\)"),
    ("llama", [DELTA | {"base": "{other}"}], "is a LlamaForCausalLM, .* a Qwen2ForCausalLM; wanted one architecture"),
    ("llama", [{"method": "delta_come", "keep": 0.1}], "the difference to another checkpoint; name it as base"),
    ("llama", [{"method": "stat", "keep": 0.5, "base": "{base}"}], "a base goes with methods on single linears"),
    ("llama", [DELTA, SMOOTH], "a step with a base writes a folder of differences; it has to be the last one"),
    ("llama", [SVD | {"target": ["mlp"]}, DELTA], "needs the fine-tuned model as it was trained, and an earlier step"),
    ("llama", [DELTA | {"base": "{missing}"}], "no such folder"),
    ("gptq", [SVD | {"base": "{base}"}], "no linear is left to compress"),
    # adapters
    ("llama", [{"rewrite": "merge_adapter"}], "no adapter is named; give adapter = FOLDER"),
    ("llama", [{"rewrite": "merge_adapter", "adapter": "{missing}"}], "adapter_config.json cannot be read"),
    ("llama", [{"rewrite": "merge_adapter", "adapter": "{base}"}], "adapter_config.json cannot be read"),
]  # fmt: skip

LATER: list[tuple[list[Step], str]] = [
    ([train("nipq", bits=4.0), GPTQ], "no linear is left"),
    ([train("nipq", bits=4.0), SMOOTH], r"q_proj \(compressed by an earlier step, nipq\).*smooth before quantizing"),
    ([train("nipq", bits=4.0), train("full")], "are packed; train an adapter beside them"),
    ([train("adapter", merge=False), {"method": "stat", "target": ["mlp"], "keep": 0.5}], "holds no whole unit"),
    ([SVD, train("kasa", rank=2)], "is compressed already and cannot be truncated"),
    ([train("kasa", rank=32)], "leaves nothing; choose a smaller rank"),
    ([SVD, train("nipq", bits=4.0)], "has no weight of its own that could be rounded"),
    ([SVD | {"target": ["mlp"]}, train("nipq", target=["attention"])], "say bits, the average"),
    ([train("nipq", bits=1.0)], "bits = 1.0, but widths of 2 take"),
    ([train("adapter", bits=4.0)], "bits"),
    ([train("adapter", rank=17)], r"adapter: rank = 17, and a target has the shape \(16, 32\); wanted at most 16"),
    ([SVD, train("adapter", rank=17)], "rank = 17, .* wanted at most 16"),
    ([SVD, train("kasa", rank=17, truncate=False)], "kasa: rank = 17, .* wanted at most 16"),
    ([train("adapter", held_out=500)], "are to be held out, more than half"),
    (
        [SVD | {"pivot": True}, train("adapter", factors=["up"])],
        "no target will have a factor 'up' to train; .* down, rest",
    ),
    ([{"method": "svd_llm", "keep": 0.5, "remap": True}, train("adapter", factors=["down"])], "there will be none"),
    ([FOPE | {"train_length": 1}], "none of the 4 rotary frequencies completes a turn"),
]


@pytest.mark.parametrize("rewrite", [SMOOTH, PRE_SINQ], ids=lambda step: step["rewrite"])
@pytest.mark.parametrize("step", [SVD, GPTQ | {"target": ["mlp.down"]}], ids=lambda step: step["method"])
def test_what_still_can_be_rewritten_is(step, rewrite, model_folder, text_file, tmp_path):
    assert compress(model_folder(), tmp_path / "out", recipe(text_file, step, rewrite)) == 0


@pytest.fixture
def refused(
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    made: Callable[..., Result],
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., None]:
    """A function: the command with these steps ends with status 2 and one line, before anything is written."""

    def refused(family: str, steps: list[Step], message: str) -> None:
        places = {
            "{base}": model_folder(),
            "{wider}": model_folder(hidden_size=48),
            "{wordier}": model_folder(vocab_size=80),
            "{other}": model_folder("qwen2"),
            "{missing}": tmp_path / "missing",
        }
        named = [{k: str(places[v]) if v in places else v for k, v in s.items() if isinstance(v, str)} for s in steps]
        model = made(family, "llama").out if family in CASES else model_folder(family)
        capsys.readouterr()
        status = compress(
            model, tmp_path / "out", recipe(text_file, *(s | n for s, n in zip(steps, named, strict=True)))
        )
        printed = capsys.readouterr()
        assert (status, printed.out) == (2, ""), printed.err
        assert len(printed.err.splitlines()) == 1, printed.err
        assert re.search(rf"^error: .*{message}", printed.err), printed.err
        assert [path.name for path in tmp_path.iterdir()] == ["out.toml"]

    return refused


@pytest.mark.parametrize(("family", "steps", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_said_before_any_work(family, steps, message, refused):
    refused(family, steps, message)


@pytest.mark.parametrize(("steps", "message"), LATER, ids=lambda value: str(value)[:60])
def test_what_is_wrong_with_a_relaxation_is_said_before_any_work(steps, message, refused):
    refused("llama", steps, message)

"""Estimates beside what runs really take: memory of whole processes, time of every step, bytes of files; and `plan`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tersely import demo
from tersely.checkpoint import read_headers
from tersely.cli import main
from tersely.estimate import PARTS, PROCESS, estimate, estimate_table
from tersely.estimate.memory import READING
from tersely.estimate.relaxed import share_of
from tersely.pipeline import run as run_recipe
from tersely.prepare import prepare
from tersely.recipe import recipe_from
from tersely.text import read_text, size_of
from tersely.train import RELAXATIONS

DEMO = Path(demo.__file__).parent / "assets" / "demo"
VOCABULARY, WIDTH = 16_000, 128

RUN = """
import json, sys
from pathlib import Path
from tersely.pipeline import run
from tersely.prepare import prepare
from tersely.recipe import recipe_from
print(run(prepare(recipe_from(json.loads(sys.argv[1])), Path(sys.argv[2]))).report.peak_bytes)
"""


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random, of two blocks, and with a vocabulary so wide that its logits outweigh all else."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


def recipe(model, *steps, text="stdlib[:60000]", **more):
    calibration = {"source": [text], "samples": 8, "length": 128}
    return {"model": str(model), "calibration": calibration, "step": list(steps)} | more


def training(relax="full", **more):
    return {"train": ["logits"], "relax": relax, "tokens": 2048, "batch": 8, "held_out": 4} | more


def figures(plain):
    return estimate(recipe_from(plain))


def peak_of(plain, out):
    """Of a process of its own, in which no tokens are kept from before."""
    environment = os.environ | {"XDG_CACHE_HOME": str(out / "cache"), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", RUN, json.dumps(plain), str(out / "made")]
    return int(subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.fixture
def same_speed(monkeypatch):
    """The probes are as noisy as the machine."""
    monkeypatch.setattr("tersely.estimate._rate", lambda work, operations: 1e10)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read where Linux has them")
@pytest.mark.parametrize("step", [training(), training("rounding")], ids=["full", "rounding"])
def test_the_measured_peak_of_memory_is_near_the_estimate(step, model, tmp_path):
    plain = recipe(model, step)
    said, measured = figures(plain).memory_bytes, peak_of(plain, tmp_path)
    assert measured / 1.1 < said < 2 * measured


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read where Linux has them")
def test_libraries_and_reading_a_text_count_on_a_small_model(tmp_path):
    plain = recipe(DEMO, {"method": "svd_llm", "keep": 0.8}, text="stdlib")
    said, measured = figures(plain).memory_bytes, peak_of(plain, tmp_path)
    assert measured / 1.1 < said < 2 * measured


def test_a_text_is_as_long_as_it_is_read_and_one_of_the_hub_is_said_to_be_left_out(tmp_path):
    (tmp_path / "text").write_text("é" * 1000)
    for source in ("stdlib", "stdlib:train", "stdlib[100:-100]", str(tmp_path / "text"), f"{tmp_path / 'text'}[4:]"):
        assert size_of(source, "calibration") == len(read_text(source, "calibration").content.encode())
    read, hub = (figures(recipe(DEMO, {"method": "svd_llm", "keep": 0.8}, text=t)) for t in ("stdlib", "wikitext"))
    assert read.memory_bytes >= PROCESS + READING * size_of("stdlib", "calibration") > hub.memory_bytes
    assert (read.unread, hub.unread) == ((), ("wikitext",))
    assert "how long wikitext is" in estimate_table(hub).caption


def test_memory_of_training_holds_teacher_moments_and_logits(model):
    dense = figures(recipe(model, {"method": "rtn", "width": 4}))
    alone, taught = (figures(recipe(model, training(train=[name]))) for name in ("tokens", "logits"))
    logits = 4 * 8 * 128 * VOCABULARY
    assert alone.memory_bytes > PROCESS + dense.model_bytes + 4 * logits + 3 * dense.touched_bytes
    assert taught.memory_bytes > alone.memory_bytes + dense.model_bytes + 2 * logits
    smaller = figures(recipe(model, training(batch=4)))
    assert taught.memory_bytes - smaller.memory_bytes > 4 * logits / 2
    best = figures(recipe(model, training(patience=2)))
    assert best.memory_bytes - taught.memory_bytes >= dense.touched_bytes
    later = figures(recipe(model, {"method": "svd", "keep": 0.8}, training()))
    assert later.memory_bytes >= taught.memory_bytes


def test_what_is_measured_afterwards_is_held_twice(model):
    step = {"method": "rtn", "width": 4}
    asked = {"text": ["stdlib[:2000]"], "length": 128}
    plain, measured = figures(recipe(model, step)), figures(recipe(model, step, evaluation=asked))
    assert measured.memory_bytes > PROCESS + 2 * plain.model_bytes


@pytest.mark.parametrize("name", RELAXATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_linear_tells_what_a_relaxation_holds(name, dtype):
    drawn = torch.random.get_rng_state()
    share = share_of(RELAXATIONS[name](), dtype)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    if name in ("adapter", "kasa"):
        assert share.own == 0 and share.update >= 8 and share.frozen >= dtype.itemsize
    else:
        assert share.update == 0 and 1 <= share.own < 1.1 and share.frozen < dtype.itemsize
    if name in ("nipq", "rounding"):
        assert share.graph > 4  # weights made anew from what trains


# --- time -------------------------------------------------------------------------------------------------------------


def test_time_counts_every_step(same_speed, model):
    steps = {
        "factors": {"method": "svd_llm", "keep": 0.5},
        "codes": {"method": "gptq", "width": 4, "target": ["*.down", "*.up"]},
        "training": training("adapter"),
    }
    first = figures(recipe(model, steps["factors"])).seconds
    second = figures(recipe(model, steps["factors"], steps["codes"])).seconds
    third = figures(recipe(model, *steps.values())).seconds
    assert first > 0 and second > 1.5 * first and third > second
    assert third - second == pytest.approx(figures(recipe(model, steps["training"])).seconds)
    refined = figures(recipe(model, steps["factors"] | {"refine": {"epochs": 3}})).seconds
    assert refined > first
    assert figures(recipe(model, {"rewrite": "rotate"})).seconds > 0


def test_time_counts_every_option_of_a_method_that_rounds(same_speed, model):
    single, mixed = (
        figures(recipe(model, step)).seconds
        for step in ({"method": "gptq", "width": 4}, {"method": "mixed", "bits": 4, "propagate": "block"})
    )
    assert mixed > 10 * single


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [{"method": "rtn", "width": 4}, {"method": "svd", "keep": 0.9}])
def test_what_is_written_is_no_larger_than_said_headers_included(step, tmp_path):
    plain = recipe(DEMO, step)
    out = run_recipe(prepare(recipe_from(plain), tmp_path / "out")).out
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert 0.9 * figures(plain).after_bytes < written <= figures(plain).after_bytes


def test_headers_leave_room_for_all_that_a_linear_can_become(tmp_path):
    """Integers, and beside them a branch of two factors in integers."""
    step = {"method": "qera", "width": 4, "rank": 4, "target": ["mlp.up"]}
    plain = recipe(DEMO, step)
    out = run_recipe(prepare(recipe_from(plain), tmp_path / "out")).out
    headers = read_headers(out)
    of_linear = [name for name in headers if ".layers.0.mlp.up_proj." in name]
    assert any(name.endswith("terms.1.down.codes") for name in of_linear) and len(of_linear) <= PARTS
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) <= figures(plain).after_bytes


# --- plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "touched"),
    [
        ('[[step]]\nmethod = "svd_llm"\nkeep = 0.6\n[[step]]\ntrain = ["logits"]\nrelax = "adapter"\nrank = 4', 28),
        ('[[step]]\ntrain = ["tokens"]\nrelax = "full"\ntarget = ["mlp"]', 12),
        ('[[step]]\nconvert = "fope"', 16),
        ('[[step]]\ncache = "latent"\nkeep = 0.5', 16),
    ],
    ids=["two steps", "train", "convert", "cache"],
)
def test_plan_takes_recipes_of_every_verb(steps, touched, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(f'model = "elsewhere"\n{steps}\n')
    assert run("plan", DEMO, "--recipe", tmp_path / "recipe.toml") == 0
    said = capsys.readouterr().out
    assert f"{touched} of 29 linears touched" in said
    assert re.search(r"time, about +│ +\d", said)
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.toml"]


def test_plan_refuses_what_compress_refuses(tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(f'model = "{DEMO}"\n[[step]]\nmethod = "svd"\nkeep = 0.5\n')
    assert run("plan", DEMO, "--recipe", tmp_path / "recipe.toml", "--keep", 0.6) == 2
    assert "--keep and --recipe: what a step does stands in the recipe" in capsys.readouterr().err
    assert run("plan", DEMO, "--recipe", tmp_path / "nothing.toml") == 2
    assert "no such file" in capsys.readouterr().err


def test_plan_takes_a_base(capsys, model, tmp_path):
    delta = ("plan", DEMO, "--method", "delta_come")
    for base in (DEMO, "owner/base"):  # the hub is not asked
        assert run(*delta, "--base", base) == 0
        assert "28 of 29 linears touched" in capsys.readouterr().out
    for arguments, wanted in (
        ((), "name it as base"),
        (("--base", tmp_path / "nothing"), "no such folder"),
        (("--base", model), "their shapes differ"),
    ):
        assert run(*delta, *arguments) == 2
        assert wanted in " ".join(capsys.readouterr().err.split())

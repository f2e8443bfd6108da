"""Whatever a run leaves on disk opens again, bit for bit, and never opens as something else.

One real run for every entry that can be a step, on a tiny Llama; and one folder for every example of a kind, saved from
memory.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_every_kind import CASES, placed
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import tersely
from contract.material import asked_of, normal, nothing_changes
from families import tiny_batch, tiny_model
from tersely.allocate import ALLOCATORS
from tersely.anatomy import anatomy_of
from tersely.errors import RecipeError
from tersely.hf import manifest_config
from tersely.kinds import Kind, manifest_of
from tersely.methods import METHODS
from tersely.pipeline import Result, prepare, run
from tersely.recipe import recipe_from
from tersely.stats import Stats
from tersely.tables import TABLES
from tersely.train.relax import RELAXATIONS
from tersely.verify import verify

STEPS = [(verb, name) for verb, table in TABLES.items() for name in table]
every_step = pytest.mark.parametrize(("verb", "name"), STEPS, ids=[name for _, name in STEPS])
every_budgeted = pytest.mark.parametrize(
    ("verb", "name"),
    [pytest.param(verb, name, id=name) for verb, name in STEPS if verb in ("method", "cache")],
)
every_kind = pytest.mark.parametrize("example", CASES)

KEEP = 0.6


def step_of(verb: str, name: str, folder: Path) -> dict[str, Any]:
    match verb:
        case "method" if getattr(TABLES[verb][name], "needs_base", False):
            return {verb: name, "keep": KEEP, "base": str(other_checkpoint(folder))}
        case "method" if "depth" in getattr(TABLES[verb][name], "roles", ()):
            return {verb: name, "keep": KEEP, "propagate": "none"}  # blocks cannot be cut one after the other
        case "method" | "cache":
            return {verb: name, "keep": KEEP}
        case "rewrite":
            fields, _ = asked_of(name, tiny_model("llama"), folder)
            return {verb: name, **fields}
        case "train":
            length = {"tokens": 256, "batch": 4, "held_out": 0}
            return {verb: ["tokens"], "relax": name, **length, **({"bits": 6.0} if learns_a_size(name) else {})}
        case _:
            return {verb: name}


def other_checkpoint(folder: Path) -> Path:
    """The tiny Llama with all numbers a little off: what it may have been tuned from."""
    model = tiny_model("llama")
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(normal(*parameter.shape, seed=number, dtype=parameter.dtype), alpha=0.01)
    model.save_pretrained(folder)
    return folder


def learns_a_size(name: str) -> bool:
    """Whether a relaxation asks for the bits that it has to reach."""
    relaxation = RELAXATIONS[name]()
    with torch.random.fork_rng(devices=[]):
        linear = torch.nn.Linear(16, 16)
    stats = Stats({kind: kind(16) for kind in relaxation.needs})
    stats.update(torch.ones(2, 16))
    try:
        relaxation.budget([relaxation.relax(linear, stats, torch.Generator())], None)
    except RecipeError:
        return True
    return False


@pytest.fixture(scope="module")
def result(tmp_path_factory, model_folder, text_file) -> Callable[[str, str], Result]:
    """A function: verb and name → what a run with such a step left."""
    found: dict[tuple[str, str], Result] = {}

    def make(verb: str, name: str) -> Result:
        if (verb, name) not in found:
            folder = tmp_path_factory.mktemp(f"{name}-")
            recipe = {
                "model": str(model_folder("llama")),
                "step": [step_of(verb, name, folder / "ingredients")],
                "calibration": {"source": [str(text_file)], "length": 32, "samples": 8},
            }
            with nothing_changes():
                found[verb, name] = run(prepare(recipe_from(recipe), folder / "out"))
        return found[verb, name]

    return make


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], tuple[PreTrainedModel, Path]]:
    """A function: example of a kind → a model with it in memory, and the folder that it was saved to."""
    found: dict[str, tuple[PreTrainedModel, Path]] = {}

    def make(example: str) -> tuple[PreTrainedModel, Path]:
        if example not in found:
            model, folder = placed(example), tmp_path_factory.mktemp("kind-") / "out"
            model.config.quantization_config = manifest_config(manifest_of(model))
            model.save_pretrained(folder)
            found[example] = model, folder
        return found[example]

    return make


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(**tiny_batch()).logits


# --- opened again -----------------------------------------------------------------------------------------------------


@every_step
def test_what_a_run_leaves_verifies_and_reopens_bit_for_bit(verb, name, result, tmp_path):
    done = result(verb, name)
    assert done.report.degraded == {}
    checks = list(verify(done.out))
    assert len(checks) == 4
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    opened = tersely.load(done.out)
    wanted = logits(opened)
    assert wanted.isfinite().all()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(done.out)), wanted)
    opened.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), wanted)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached, plain = (opened.generate(torch.tensor([[2, 5, 6]]), use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)


@every_budgeted
def test_the_folder_holds_what_was_promised(verb, name, result):
    done = result(verb, name)
    (plan,) = json.loads((done.out / "plan.json").read_text())["steps"]
    assert 0 < plan["nbytes"] <= plan["budget"] <= KEEP * plan["dense_bytes"]
    rows = {row.name: row for row in done.report.rows}
    row = rows["touched weights" if verb == "method" else "cache per token"]
    assert (row.value, row.before) == (plan["nbytes"], plan["dense_bytes"])
    kinds = [module for module in tersely.load(done.out).modules() if isinstance(module, Kind)]
    assert kinds, "nothing was compressed"
    if name in METHODS:
        names = {site.name for site in anatomy_of(tersely.load(done.out)).sites}
        for site, choice in plan["sites"].items():
            if choice["amount"] is not None:
                left = {path for path in names if path == site or path.startswith(f"{site}.")}
                assert left >= {f"{site}.{leaf}" for leaf in METHODS[name].leaves}
                assert site not in left


@pytest.mark.parametrize("name", ALLOCATORS)
def test_an_allocator_divides_the_budget_of_a_run(name, tmp_path, model_folder, text_file):
    method = "zs_svd" if ALLOCATORS[name].needs_drift else "svd_llm"
    asked = {"method": method, "allocate": name, "propagate": "none"}
    done = tersely.compress(
        model_folder("llama"), tmp_path / "out", keep=KEEP, **asked, calibrate=[str(text_file)], length=32, samples=4
    )
    (plan,) = json.loads((done.out / "plan.json").read_text())["steps"]
    assert 0 < plan["nbytes"] <= plan["budget"]
    assert logits(tersely.load(done.out)).isfinite().all()


@pytest.mark.parametrize("name", TABLES["rewrite"])
def test_a_rewrite_keeps_the_function(name, result, tmp_path):
    _, same = asked_of(name, tiny_model("llama"), tmp_path)
    torch.testing.assert_close(logits(tersely.load(result("rewrite", name).out)), logits(same), rtol=0, atol=1e-4)


@every_kind
def test_a_kind_reopens_as_it_stood_in_memory(example, saved):
    model, folder = saved(example)
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert manifest_of(opened) == manifest_of(model)
    assert torch.equal(logits(opened), logits(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name


# --- without tersely --------------------------------------------------------------------------------------------------

OUTSIDE = """
import json, sys
import torch, transformers
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
batch = {name: torch.tensor(values) for name, values in json.loads(sys.argv[2]).items()}
outcomes = []
for folder in json.loads(sys.argv[1]):
    for name in ("AutoModelForCausalLM", "LlamaForCausalLM"):
        try:
            with torch.no_grad():
                outcomes.append(getattr(transformers, name).from_pretrained(folder)(**batch).logits.flatten().tolist())
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
assert "tersely" not in sys.modules
json.dump(outcomes, sys.stdout)
"""


def test_without_tersely_a_folder_is_refused_unless_it_is_an_ordinary_model(result, saved):
    """All folders in one process, by the automatic and by the concrete class."""
    folders = {name: result(verb, name).out for verb, name in STEPS}
    folders |= {example: saved(example)[1] for example in CASES}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            OUTSIDE,
            json.dumps([str(folder) for folder in folders.values()]),
            json.dumps({name: tensor.tolist() for name, tensor in tiny_batch().items()}),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    outcomes = iter(json.loads(done.stdout))
    for name, folder in folders.items():
        for outcome in (next(outcomes), next(outcomes)):
            if "quantization_config" in json.loads((folder / "config.json").read_text()):
                assert isinstance(outcome, str), f"{name}: opened, though nothing knows how to"
            else:
                assert outcome == logits(tersely.load(folder)).flatten().tolist(), name

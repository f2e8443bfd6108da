"""A recipe says exactly one thing: what is written is read back, and what cannot be meant is refused with what can."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersely.allocate import ALLOCATORS
from tersely.errors import RecipeError
from tersely.pipeline import compress
from tersely.recipe import (
    STEPS,
    CacheStep,
    Calibration,
    ConvertStep,
    Evaluation,
    MethodStep,
    Recipe,
    Refinement,
    RewriteStep,
    TrainStep,
    parse_size,
    read_recipe,
    recipe_from,
    verb_of,
)
from tersely.tables import build, build_allocator, build_entry

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
STEP = {"method": "svd", "keep": 0.5}


def recipe(*, step: dict[str, Any] | None = None, **top: Any) -> Recipe:
    return recipe_from({"model": "m", "step": [STEP | (step or {})]} | top)


# --- there and back ---------------------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
values = st.recursive(
    st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
own_names = {field.name for field in dataclasses.fields(MethodStep)} | STEPS.keys()
sizes = st.integers(1, 10**15) | st.sampled_from(["300MB", "1.5 GB", "7k", "123"])
budgets = st.one_of(
    st.fixed_dictionaries({"keep": st.floats(0, 1, exclude_min=True)}),
    st.fixed_dictionaries({"bits": st.floats(0.001, 64)}),
    st.fixed_dictionaries({"size": sizes}),
)
steps = st.builds(
    lambda budget, fields, options: MethodStep(**budget, **fields, options=options),
    budgets,
    st.fixed_dictionaries(
        {"method": words},
        optional={
            "target": st.lists(words, min_size=1, max_size=3),
            "allocate": words,
            "propagate": st.sampled_from([None, "none", "block", "input"]),
            "on_failure": st.sampled_from(["raise", "dense"]),
        },
    ),
    st.dictionaries(words.filter(lambda word: word not in own_names), values, max_size=3),
)
recipes = st.builds(
    Recipe,
    model=words,
    step=st.lists(steps, min_size=1, max_size=3),
    calibration=st.builds(
        Calibration,
        source=st.lists(words, min_size=1, max_size=3),
        samples=st.integers(1, 10**6),
        length=st.none() | st.integers(2, 10**6),
        order=st.sampled_from(["random", "first"]),
        own_text=st.floats(0, 1, exclude_max=True),
    ),
    evaluation=st.builds(
        Evaluation,
        text=st.lists(words, max_size=3),
        length=st.none() | st.integers(2, 10**6),
        windows=st.none() | st.integers(1, 10**6),
    ),
    seed=st.integers(0, 2**63 - 1),
    revision=st.none() | words,
    dtype=st.none() | st.sampled_from(["float32", "float16", "bfloat16"]),
    device=words,
    trust_remote_code=st.booleans(),
    shard_size=sizes,
)


@settings(max_examples=120, deadline=None, database=None)
@given(recipes)
def test_what_is_written_reads_back(written):
    read = recipe_from(tomllib.loads(written.to_toml()))
    assert read == written
    assert read.to_toml() == written.to_toml()
    assert read.fingerprint() == written.fingerprint()


def test_a_file_reads_as_the_text_in_it(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        """
        model = "owner/näme"
        seed = 3
        [calibration]
        source = ["wikitext", "stdlib"]
        [[step]]
        method = "asvd"
        keep = 0.8
        alpha = 0.25
        [[step]]
        method = "svd"
        target = ["*.down", "mlp"]
        size = "300MB"
        """,
        encoding="utf-8",
    )
    assert read_recipe(path) == Recipe(
        model="owner/näme",
        seed=3,
        calibration=Calibration(source=["wikitext", "stdlib"]),
        step=[
            MethodStep("asvd", keep=0.8, options={"alpha": 0.25}),
            MethodStep("svd", target=["*.down", "mlp"], size="300MB"),
        ],
    )


def test_what_is_no_key_of_a_step_is_the_methods_own():
    (step,) = recipe(step={"alpha": 0.25, "scale": "max", "allocate": "uniform"}).step
    assert step.options == {"alpha": 0.25, "scale": "max"}
    assert step.allocate == "uniform"
    # as the resolved recipe hands them over, in one table
    assert recipe(step={"options": {"alpha": 0.25}, "scale": "max"}).step[0].options == step.options


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_names_what_exists(path):
    for step in read_recipe(path).step:
        build(step)
        if hasattr(step, "allocate"):
            build_allocator(step.allocate)


# --- identity ---------------------------------------------------------------------------------------------------------

OTHER = {
    Recipe: {
        "model": "n",
        "step": [MethodStep("svd", keep=0.5), MethodStep("svd", keep=0.5)],
        "calibration": Calibration(samples=7),
        "evaluation": Evaluation(["stdlib"]),
        "seed": 1,
        "revision": "main",
        "dtype": "bfloat16",
        "device": "cuda",
        "trust_remote_code": True,
        "shard_size": "1GB",
    },
    Calibration: {"source": ["wikitext"], "samples": 64, "length": 256, "order": "first", "own_text": 0.25},
    Evaluation: {"text": ["wikitext"], "length": 256, "windows": 3},
    MethodStep: {
        "method": "asvd",
        "target": ["mlp"],
        "keep": 0.6,
        "bits": 8.0,
        "size": "1GB",
        "perplexity": 9.0,
        "refine": Refinement(),
        "temper": True,
        "base": "n",
        "allocate": "uniform",
        "propagate": "none",
        "on_failure": "dense",
        "options": {"alpha": 0.25},
    },
    Refinement: {
        "epochs": 7,
        "rate": 0.5,
        "code_rate": 0.5,
        "optimiser": "sign",
        "batch": 3,
        "decay": 0.5,
        "held_out": 0.5,
        "patience": 7,
        "text": ["wikitext"],
        "samples": 7,
    },
    RewriteStep: {"rewrite": "smooth", "options": {"strength": 0.25}},
    CacheStep: {
        "cache": "quantized",
        "keep": 0.25,
        "allocate": "greedy",
        "propagate": "none",
        "on_failure": "dense",
        "options": {"alpha": 0.25},
    },
    ConvertStep: {"convert": "spectral", "options": {"gain": 0.25}},
    TrainStep: {
        "train": ["logits"],
        "relax": "kasa",
        "target": ["mlp"],
        "tokens": 7,
        "batch": 3,
        "rate": 0.5,
        "quantizer_rate": 0.5,
        "warmup": 0.5,
        "schedule": "linear",
        "decay": 0.5,
        "held_out": 3,
        "patience": 3,
        "text": ["wikitext"],
        "bits": 3.0,
        "options": {"rank": 2},
    },
}

STEP_OF = {
    MethodStep: MethodStep("svd", keep=0.5),
    RewriteStep: RewriteStep("rotate"),
    CacheStep: CacheStep("latent", keep=0.5),
    ConvertStep: ConvertStep("fope"),
    TrainStep: TrainStep(["tokens"]),
}


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, others in OTHER.items() for name in others])
def test_every_field_changes_the_identity(part, name):
    base = recipe()
    value = {name: OTHER[part][name]}
    if part is Recipe:
        other = dataclasses.replace(base, **value)
    elif part is Refinement:
        base = dataclasses.replace(base, step=[MethodStep("svd", keep=0.5, refine=Refinement())])
        other = dataclasses.replace(base.step[0], refine=dataclasses.replace(base.step[0].refine, **value))
        other = dataclasses.replace(base, step=[other])
    elif part in STEP_OF:
        base = dataclasses.replace(base, step=[STEP_OF[part]])
        budget = {"keep": None} if name in ("bits", "size", "perplexity") and part is MethodStep else {}
        other = dataclasses.replace(base, step=[dataclasses.replace(base.step[0], **budget, **value)])
    else:
        inner = part.__name__.lower()
        other = dataclasses.replace(base, **{inner: dataclasses.replace(getattr(base, inner), **value)})
    measured_only = part is Evaluation or name == "evaluation"  # changes no weight
    assert (other.fingerprint() == base.fingerprint()) == measured_only


@pytest.mark.parametrize("part", OTHER, ids=lambda part: part.__name__)
def test_no_field_is_forgotten_above(part):
    assert OTHER[part].keys() == {field.name for field in dataclasses.fields(part)}


@pytest.mark.parametrize("step", STEP_OF.values(), ids=verb_of)
def test_a_step_of_every_verb_survives_the_file(step, tmp_path):
    said = Recipe("m", [step])
    (tmp_path / "recipe.toml").write_text(said.to_toml(), encoding="utf-8")
    assert read_recipe(tmp_path / "recipe.toml") == said
    assert STEP_OF.keys() == set(STEPS.values())


def test_equal_recipes_have_one_identity():
    fingerprints = {
        recipe(step={"alpha": 1, "scale": "max"}).fingerprint(),
        recipe(step={"scale": "max", "alpha": 1}).fingerprint(),  # keys of a table have no order
        recipe(step={"scale": "max", "alpha": 1.0}).fingerprint(),
        recipe(step={"options": {"scale": "max"}, "alpha": 1.0, "target": ["all"], "allocate": "greedy"}).fingerprint(),
        recipe(step={"scale": "max", "alpha": 1.0}, seed=0, calibration={}).fingerprint(),
    }
    assert len(fingerprints) == 1
    assert Recipe("m", [MethodStep("svd", keep=1)]).fingerprint() == recipe(step={"keep": 1.0}).fingerprint()


def test_the_order_of_steps_and_sources_is_part_of_the_identity():
    first, second = MethodStep("svd", keep=0.5), MethodStep("svd", target=["mlp"], keep=0.5)
    assert Recipe("m", [first, second]).fingerprint() != Recipe("m", [second, first]).fingerprint()
    one, other = ({"source": source} for source in (["a", "b"], ["b", "a"]))
    assert recipe(calibration=one).fingerprint() != recipe(calibration=other).fingerprint()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ({"revison": "main"}, "revision"),
        ({"calibraton": {}}, "calibration"),
        ({"calibration": {"sampels": 3}}, "samples"),
        ({"evaluation": {"windws": 3}}, "windows"),
    ],
)
def test_an_unknown_key_names_the_nearest_known(wrong, nearest):
    with pytest.raises(RecipeError, match=rf"unknown key .*did you mean '{nearest}'\? known: .*{nearest}"):
        recipe(**wrong)


@pytest.mark.parametrize(
    ("method", "key", "nearest"),
    [("asvd", "aplha", "alpha"), ("svd_llm", "daming", "damping"), ("svd", "kep", "keep"), ("svd", "tagret", "target")],
)
def test_an_unknown_key_of_a_step_names_the_nearest_of_step_and_method(method, key, nearest):
    (step,) = recipe(step={"method": method, key: 1}).step
    with pytest.raises(RecipeError, match=rf"method {method}: unknown option '{key}'; did you mean '{nearest}'\?"):
        build(step)


@pytest.mark.parametrize(
    ("verb", "name", "meant"),
    [("method", "smooth", "rewrite"), ("convert", "latent", "cache"), ("train", "rtn", "method")],
)
def test_a_name_under_a_wrong_verb_is_told_the_right_one(verb, name, meant):
    with pytest.raises(RecipeError, match=rf"write {meant} = '{name}'"):
        build_entry(verb, name, {})


def test_an_unknown_objective_names_the_nearest():
    with pytest.raises(RecipeError, match=r"unknown objective 'logit'; did you mean 'logits'\?"):
        build(TrainStep(["logit"]))


def test_differences_to_a_base_come_last():
    steps = [MethodStep("svd", keep=0.5, base="n"), MethodStep("svd", keep=0.5)]
    with pytest.raises(RecipeError, match="last"):
        Recipe("m", steps)


def test_an_unknown_method_or_allocator_names_the_nearest():
    with pytest.raises(RecipeError, match=r"unknown method 'svdllm'; did you mean 'svd_llm'\?"):
        build_entry("method", "svdllm", {})
    with pytest.raises(RecipeError, match=rf"unknown allocator 'gredy'; .*known: {', '.join(sorted(ALLOCATORS))}"):
        build_allocator("gredy")


@pytest.mark.parametrize(
    ("budget", "came"),
    [
        ({"keep": 0.5, "bits": 4}, "keep = 0.5 and bits = 4.0"),
        ({"keep": None, "bits": 4, "size": "1GB"}, "bits = 4.0 and size = 1GB"),
    ],
)
def test_a_step_has_one_budget_at_most(budget, came):
    with pytest.raises(RecipeError, match=rf"'svd': give only one of keep, bits, size, perplexity \(came: {came}\)"):
        recipe(step=budget)


@pytest.mark.parametrize("missing", ["model", "step"])
def test_what_a_recipe_cannot_do_without_is_named(missing):
    with pytest.raises(RecipeError, match=missing):
        recipe_from({key: value for key, value in {"model": "m", "step": [STEP]}.items() if key != missing})


def test_a_step_without_a_verb_is_told_its_number_and_keys():
    with pytest.raises(
        RecipeError,
        match=r"step 2: wanted exactly one of method, rewrite, cache, convert, train; its keys: metod, keep",
    ):
        recipe_from({"model": "m", "step": [STEP, {"metod": "svd", "keep": 0.5}]})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"step": {"keep": 0}}, r"keep = 0"),
        ({"step": {"keep": -0.5}}, r"keep = -0\.5"),
        ({"step": {"keep": 1.01}}, r"keep = 1\.01; wanted above 0 and at most 1"),
        ({"step": {"keep": float("nan")}}, r"keep = nan"),
        ({"step": {"keep": None, "bits": 0}}, r"bits = 0"),
        ({"step": {"keep": None, "bits": -1}}, r"bits = -1"),
        ({"step": {"keep": None, "bits": float("inf")}}, r"bits = inf"),
        ({"step": {"keep": None, "size": 0}}, r"size = 0; wanted above 0 bytes"),
        ({"step": {"keep": None, "size": "-3MB"}}, r"size = '-3MB'"),
        ({"step": {"keep": None, "size": "many"}}, r"size 'many'; wanted bytes such as 300MB"),
        ({"step": {"target": []}}, r"target"),
        ({"calibration": {"samples": 0}}, r"samples = 0; wanted 1 or more"),
        ({"calibration": {"length": 1}}, r"length = 1; wanted 2 or more"),
        ({"calibration": {"source": []}}, r"an empty list of sources"),
        ({"evaluation": {"windows": 0}}, r"windows = 0"),
        ({"evaluation": {"length": 1}}, r"length = 1"),
        ({"shard_size": 0}, r"shard_size"),
        ({"shard_size": "-1GB"}, r"shard_size"),
        ({"shard_size": "big"}, r"size 'big'"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_with_the_range(wrong, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**wrong)


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ({"model": 3}, "model"),
        ({"seed": "many"}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"dtype": "float64"}, r"dtype: .*'bfloat16'"),
        ({"trust_remote_code": "perhaps"}, "trust_remote_code"),
        ({"calibration": 3}, "calibration"),
        ({"calibration": {"source": "stdlib"}}, r"calibration\.source"),
        ({"calibration": {"samples": "all"}}, r"calibration\.samples"),
        ({"calibration": {"order": "last"}}, r"calibration\.order: .*'first'"),
        ({"evaluation": {"text": "stdlib"}}, r"evaluation\.text"),
        ({"step": {"method": 3}}, "method"),
        ({"step": {"keep": "half"}}, r"keep: .*\(came: 'half'\)"),
        ({"step": {"target": "mlp"}}, r"target: .*\(came: 'mlp'\)"),
        ({"step": {"propagate": "blok"}}, r"propagate: .*'block'"),
        ({"step": {"on_failure": "ignore"}}, r"on_failure: .*'raise'"),
        ({"step": {"keep": None, "size": 0.5}}, "size"),
        ({"step": {"options": 3}}, "options"),
    ],
    ids=str,
)
def test_a_value_of_a_wrong_type_is_refused_with_its_place(wrong, place):
    with pytest.raises(RecipeError, match=place):
        recipe(**wrong)


@pytest.mark.parametrize("step", [3, "svd", {"method": "svd"}, [3], ["svd"]], ids=str)
def test_steps_that_are_no_list_of_tables_are_told_how_to_write_them(step):
    with pytest.raises(RecipeError, match=r"write each step under its own \[\[step\]\]"):
        recipe_from({"model": "m", "step": step})


@pytest.mark.parametrize(
    ("wrong", "place"),
    [({"propagate": "blok"}, "propagate"), ({"keep": "half"}, "keep"), ({"dtype": "float64"}, "dtype")],
    ids=str,
)
def test_python_is_held_to_the_same_words_as_toml(wrong, place, tmp_path):
    """A misspelt word must not turn into some default on the way round the file."""
    with pytest.raises(RecipeError, match=place):
        compress(tmp_path / "no-model", tmp_path / "out", **{"method": "svd", "keep": 0.5} | wrong)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_recipes_say_what_they_are(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.toml: no such file"):
        read_recipe(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("model = ")
    with pytest.raises(RecipeError, match=r"broken\.toml: not TOML"):
        read_recipe(tmp_path / "broken.toml")
    (tmp_path / "latin.toml").write_bytes('model = "é"'.encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.toml: not TOML"):
        read_recipe(tmp_path / "latin.toml")
    with pytest.raises(RecipeError, match=tmp_path.name):
        read_recipe(tmp_path)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (4000, 4000),
        ("4000", 4000),
        ("4000B", 4000),
        ("300MB", 300 * 10**6),
        ("300mb", 300 * 10**6),
        ("1.5 GB", 1_500_000_000),
        (" 2 G ", 2 * 10**9),
        ("7k", 7000),
        ("0.001KB", 1),
    ],
)
def test_sizes_are_decimal(size, nbytes):
    assert parse_size(size) == nbytes
    assert isinstance(parse_size(size), int)


@pytest.mark.parametrize(
    "size", ["", "B", "MB", "many", "300MiB", "1KM", "3GGG", "1,5GB", "nan", "inf", "infMB", "3 TB"]
)
def test_what_is_no_size_is_refused_with_examples(size):
    with pytest.raises(RecipeError, match=r"wanted bytes such as 300MB, 1\.5GB or 4000000"):
        parse_size(size)


@given(st.integers(0, 10**15))
def test_a_number_of_bytes_is_itself(nbytes):
    assert parse_size(nbytes) == parse_size(str(nbytes)) == nbytes

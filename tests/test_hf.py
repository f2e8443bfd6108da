"""Compressed folders, as people who use transformers meet them: opened, moved, trained, saved; or refused loudly."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
    pipeline,
)

import tersely
from families import tiny_batch
from tersely.errors import CheckpointError
from tersely.kinds import LowRankLinear

# Name → the arguments of the fixtures, the automatic class, the concrete class.
MODELS: dict[str, tuple[tuple[str, ...], dict[str, object], str, str]] = {
    "untied": (("llama",), {}, "AutoModelForCausalLM", "LlamaForCausalLM"),
    "tied": (("llama",), {"tie_word_embeddings": True}, "AutoModelForCausalLM", "LlamaForCausalLM"),
    "conv1d": (("gpt2",), {}, "AutoModelForCausalLM", "GPT2LMHeadModel"),
    "classifier": (
        ("bert", "BertForSequenceClassification"),
        {},
        "AutoModelForSequenceClassification",
        "BertForSequenceClassification",
    ),
}
every_model = pytest.mark.parametrize("model", MODELS)

Folder = Callable[..., Path]


def folder_of(model: str, make: Folder) -> Path:
    arguments, settings, _, _ = MODELS[model]
    return make(*arguments, **settings)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**tiny_batch()).logits


def by_hand(folder: Path, dense: Path) -> PreTrainedModel:
    """The compressed model without any code of ours: the dense one, its linears replaced by pairs of linears."""
    config = json.loads((folder / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(dense)
    tensors = load_file(folder / "model.safetensors")
    for name, spec in config["quantization_config"]["modules"].items():
        down = nn.Linear(spec["in_features"], spec["rank"], bias=False)
        up = nn.Linear(spec["rank"], spec["out_features"], bias=spec["bias"])
        for part, linear in {"down": down, "up": up}.items():
            linear.load_state_dict({key: tensors[f"{name}.{part}.{key}"] for key in linear.state_dict()})
        model.set_submodule(name, nn.Sequential(down, up))
    return model.eval()


def with_manifest(folder: Path, **changes: object) -> Path:
    """Change the manifest of a folder."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- opening ----------------------------------------------------------------------------------------------------------


@every_model
def test_automatic_and_concrete_class_give_the_logits_of_the_stored_factors(model, model_folder, compressed):
    out = folder_of(model, compressed)
    _, _, automatic, concrete = MODELS[model]
    wanted = logits(by_hand(out, folder_of(model, model_folder)))
    assert not torch.equal(wanted, logits(tersely.load(folder_of(model, model_folder))))
    for name in (automatic, concrete):
        opened = getattr(transformers, name).from_pretrained(out)
        assert type(opened).__name__ == concrete
        assert not opened.training
        assert any(isinstance(module, LowRankLinear) for module in opened.modules())
        assert torch.equal(logits(opened), wanted)
    assert torch.equal(logits(tersely.load(out)), wanted)


OUTSIDE = """
import json, os, sys
{imports}
import torch, transformers
{after}
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
tokens = torch.tensor([[5, 6, 7, 8]])
outcomes = []
for folder, *classes in json.loads(sys.argv[1]):
    for name in classes:
        try:
            with torch.no_grad():
                outcomes.append(getattr(transformers, name).from_pretrained(folder)(tokens).logits.flatten().tolist())
        except Exception as error:
            outcomes.append(f"{{type(error).__name__}}: {{error}}")
{last}
json.dump(outcomes, sys.stdout)
"""


def in_a_process_of_its_own(compressed: Folder, imports: str = "", after: str = "", last: str = "") -> list[object]:
    """Open every model with both classes in a new Python; logits of one text each, or what was raised."""
    asked = [[str(folder_of(model, compressed)), *MODELS[model][2:]] for model in MODELS]
    script = OUTSIDE.format(imports=imports, after=after, last=last)
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(asked)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@torch.no_grad()
def expected_outside(compressed: Folder) -> list[object]:
    opened = [tersely.load(folder_of(model, compressed)) for model in MODELS for _ in range(2)]
    return [model(torch.tensor([[5, 6, 7, 8]])).logits.flatten().tolist() for model in opened]


def test_without_tersely_every_folder_is_refused(compressed):
    outcomes = in_a_process_of_its_own(compressed, last="assert 'tersely' not in sys.modules")
    assert len(outcomes) == 2 * len(MODELS)
    for outcome in outcomes:
        assert isinstance(outcome, str), "opened, though nothing knows how to"


def test_imported_before_transformers_it_costs_nothing_and_is_enough(compressed):
    imports = """
import tersely
assert not {"torch", "transformers", "numpy"} & sys.modules.keys(), "import tersely is not free"
"""
    assert in_a_process_of_its_own(compressed, imports=imports) == expected_outside(compressed)


# The class is compiled as it ships: in this process jaxtyping checks its shapes, which Dynamo cannot trace.
COMPILE = """
import tersely
from tersely.kinds import LowRankLinear
linear = LowRankLinear(8, 6, 3, bias=True)
x = torch.randn(2, 5, 8)
assert torch.equal(torch.compile(linear, backend="eager", fullgraph=True)(x), linear(x))
for folder, automatic, _ in json.loads(sys.argv[1])[1:3]:
    model = getattr(transformers, automatic).from_pretrained(folder)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(whole(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
"""


def test_imported_after_transformers_it_is_enough_and_models_compile(compressed):
    after = "transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM\nimport transformers.quantizers.auto\n"
    outcomes = in_a_process_of_its_own(compressed, after=after + "import tersely", last=COMPILE)
    assert outcomes == expected_outside(compressed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dtype_may_be_asked_for(dtype, compressed):
    out = compressed("llama")
    opened = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
    assert opened.dtype == logits(opened).dtype == dtype
    stored = load_file(out / "model.safetensors")
    for name, tensor in opened.state_dict().items():
        assert tensor.dtype == dtype, name
        assert torch.equal(tensor, stored[name].to(dtype)), name


def test_a_device_map_may_be_asked_for(compressed):
    out = compressed("llama")
    for device_map in ("cpu", "auto", {"": "cpu"}):
        opened = AutoModelForCausalLM.from_pretrained(out, device_map=device_map)
        assert torch.equal(logits(opened), logits(AutoModelForCausalLM.from_pretrained(out)))


@pytest.mark.parametrize("model", ["untied", "conv1d", "classifier"])
@torch.no_grad()
def test_the_bare_model_opens_and_saves_as_well(model, compressed, tmp_path):
    out = folder_of(model, compressed)
    whole, bare = tersely.load(out), AutoModel.from_pretrained(out)
    assert type(bare) is type(whole.base_model)
    bare.save_pretrained(tmp_path)
    batch = tiny_batch()
    wanted = whole.base_model(**batch).last_hidden_state
    for opened in (bare, AutoModel.from_pretrained(tmp_path)):
        assert torch.equal(opened(**batch).last_hidden_state, wanted)


@pytest.mark.filterwarnings("ignore:Some weights")
def test_another_head_may_be_put_on_top(compressed):
    out = compressed("llama")
    opened = LlamaForSequenceClassification.from_pretrained(out)
    assert torch.equal(opened.model(**tiny_batch())[0], tersely.load(out).model(**tiny_batch())[0])


def test_pipelines_open_folders(compressed):
    continues = pipeline("text-generation", model=str(compressed("llama")), device="cpu")
    text = continues("w5 w6 w7", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("w5 w6 w7")
    assert text.count("w") == 7


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_manifest_of_a_later_release_is_refused_with_both_numbers(compressed, copy_of):
    out = with_manifest(copy_of(compressed("llama")), version=7)
    with pytest.raises(CheckpointError, match=r"version 7.*reads up to 1.*upgrade"):
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(CheckpointError, match=r"version 7.*reads up to 1.*upgrade"):
        tersely.load(out)


@pytest.mark.parametrize("version", [0, "1", 1.5, None, True])
def test_a_manifest_without_a_proper_version_is_refused(version, compressed, copy_of):
    out = with_manifest(copy_of(compressed("llama")), version=version)
    with pytest.raises(CheckpointError, match=f"version {version!r}"):
        AutoModelForCausalLM.from_pretrained(out)


def test_an_unknown_kind_is_refused(compressed, copy_of):
    name = "model.layers.0.mlp.up_proj"
    out = copy_of(compressed("llama"))
    for spec, message in (
        ({"kind": "low_rnak"}, r"unknown kind 'low_rnak'; did you mean 'low_rank'\?"),
        ({}, "unknown kind"),
    ):
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(with_manifest(out, modules={name: spec}))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"model.layers.7.mlp.up_proj": {"kind": "low_rank"}}, r"model\.layers\.7\.mlp\.up_proj"),
        ({"model.layers.0.mlp.up_proj": {"kind": "low_rank", "rank": 3}}, r"model\.layers\.0\.mlp\.up_proj"),
    ],
    ids=["a place that the model does not have", "an incomplete description"],
)
def test_a_manifest_that_does_not_fit_is_refused_by_name(modules, message, compressed, copy_of):
    out = with_manifest(copy_of(compressed("llama")), modules=modules)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(out)


def without(folder: Path, *names: str) -> Path:
    """Take tensors out of a folder."""
    state = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if name not in names}
    assert len(kept) == len(state) - len(names)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("model", "gone"),
    [
        ("untied", ("model.norm.weight",)),
        ("untied", ("lm_head.weight",)),
        ("untied", ("model.layers.0.mlp.up_proj.down.weight", "model.layers.1.input_layernorm.weight")),
        ("tied", ("model.embed_tokens.weight",)),
        ("conv1d", ("transformer.h.0.mlp.c_fc.up.bias",)),
        ("classifier", ("classifier.weight",)),
    ],
)
def test_weights_that_are_missing_are_no_random_numbers(model, gone, compressed, copy_of):
    """Whoever opens the folder: transformers logs it, and goes on with numbers that it draws."""
    out = without(copy_of(folder_of(model, compressed)), *gone)
    _, _, automatic, concrete = MODELS[model]
    for name in (automatic, concrete):
        with pytest.raises(CheckpointError, match=f"weights are missing for .*{re.escape(sorted(gone)[0])}"):
            getattr(transformers, name).from_pretrained(out)


def test_packed_numbers_that_are_missing_are_no_random_numbers(model_folder, tmp_path):
    out = tersely.compress(model_folder(), tmp_path / "out", method="rtn", options={"width": 4, "group": 16}).out
    gone = next(name for name in load_file(out / "model.safetensors") if name.endswith("mlp.up_proj.codes"))
    with pytest.raises(CheckpointError, match=f"weights are missing for {re.escape(gone)}"):
        AutoModelForCausalLM.from_pretrained(without(out, gone))


@pytest.mark.filterwarnings("ignore:Some weights")
def test_what_lies_in_the_body_is_missed_under_any_head(compressed, copy_of):
    out = without(copy_of(compressed("llama")), "model.norm.weight")
    for cls in (AutoModel, LlamaForSequenceClassification):
        with pytest.raises(CheckpointError, match=r"weights are missing for (model\.)?norm\.weight;"):
            cls.from_pretrained(out)


def test_a_head_that_is_not_asked_for_may_be_missing(compressed, copy_of):
    out = without(copy_of(compressed("llama")), "lm_head.weight")
    assert torch.equal(
        AutoModel.from_pretrained(out)(**tiny_batch())[0], tersely.load(compressed("llama")).model(**tiny_batch())[0]
    )


# --- an ordinary model ------------------------------------------------------------------------------------------------


@every_model
def test_saved_again_it_is_the_same_folder(model, compressed, tmp_path):
    out = folder_of(model, compressed)
    opened = getattr(transformers, MODELS[model][2]).from_pretrained(out)
    opened.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name
    reopened = getattr(transformers, MODELS[model][2]).from_pretrained(tmp_path / "again")
    assert torch.equal(logits(reopened), logits(opened))


def test_saved_in_shards_it_reopens(compressed, tmp_path):
    opened = tersely.load(compressed("llama"))
    opened.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(opened))


@every_model
def test_it_moves_copies_and_pickles(model, compressed):
    opened = tersely.load(folder_of(model, compressed))
    wanted = logits(opened)
    for twin in (copy.deepcopy(opened), pickle.loads(pickle.dumps(opened)), opened.to("cpu"), opened.to(torch.float32)):
        assert torch.equal(logits(twin), wanted)
    for name in ("half", "bfloat16", "double", "float"):
        opened = getattr(opened, name)()
        assert {tensor.dtype for tensor in opened.state_dict().values()} == {logits(opened).dtype}
    torch.testing.assert_close(logits(opened), wanted, rtol=0, atol=0.05)  # came back through bfloat16
    assert {tensor.device.type for tensor in opened.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize("model", ["untied", "tied", "conv1d"])
def test_generation_with_a_cache_is_generation_without(model, compressed):
    opened = tersely.load(folder_of(model, compressed))
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    prompt = torch.tensor([[2, 5, 6, 7]])
    cached, plain = (opened.generate(prompt, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert cached.shape == (1, 16)
    assert torch.equal(cached, plain)


@every_model
def test_training_reaches_the_factors_and_lowers_the_loss(model, compressed):
    opened = tersely.load(folder_of(model, compressed)).train()
    for module in opened.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    labels = torch.tensor([0, 1]) if model == "classifier" else tiny_batch()["input_ids"]
    optimizer = torch.optim.AdamW(opened.parameters(), lr=1e-3)
    before = opened(**tiny_batch(), labels=labels).loss
    before.backward()
    factors = [module for module in opened.modules() if isinstance(module, LowRankLinear)]
    assert factors
    for factor in factors:
        assert all(parameter.grad.abs().sum() > 0 for parameter in factor.parameters())
    optimizer.step()
    assert opened(**tiny_batch(), labels=labels).loss < before


def test_a_trained_model_saves_what_it_learned(compressed, tmp_path):
    opened = tersely.load(compressed("llama"))
    with torch.no_grad():
        for parameter in opened.parameters():
            parameter.mul_(1.01)
    opened.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(opened))


def test_the_classifier_opens_by_its_automatic_class_only_with_its_own_head(compressed):
    out = folder_of("classifier", compressed)
    opened, report = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert opened.classifier.weight.abs().sum() > 0

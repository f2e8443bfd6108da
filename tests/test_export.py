"""Folders of ours as others read them: dense, packed, as an adapter, exact or refused; and an adapter merged again."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CompressedTensorsConfig, LlamaForCausalLM, Qwen2ForCausalLM

import tersely
from families import tiny_batch
from tersely.anatomy import model_class
from tersely.checkpoint import read_config
from tersely.deltas.folder import outermost
from tersely.kinds import Kind, manifest_of
from tersely.pipeline import run
from tersely.prepare import prepare
from tersely.recipe import recipe_from
from test_delta import tune
from test_steps import command

Folder = Callable[..., Path]
Step = dict[str, Any]

SVD_LLM = {"method": "svd_llm", "keep": 0.6}
ADAPTER = {"train": ["tokens"], "relax": "adapter", "rank": 2, "merge": False}
ADAPTER |= {"tokens": 128, "batch": 2, "held_out": 2, "rate": 0.02}

CASES: dict[str, list[Step]] = {
    "svd_llm": [SVD_LLM],
    "gptq": [{"method": "gptq", "width": 4, "group": 16}],
    "zeros": [{"method": "gptq", "width": 4, "group": 4}],
    "symmetric": [{"method": "rtn", "width": 4, "group": 4, "grid": "symmetric"}],
    "rows": [{"method": "rtn", "width": 8, "group": 0}],
    "bytes": [{"method": "rtn", "width": 2, "group": 4, "scale": "log8"}],
    "two widths": [
        {"method": "rtn", "width": 4, "group": 4, "grid": "symmetric", "target": ["mlp"]},
        {"method": "rtn", "width": 8, "group": 0, "grid": "symmetric", "target": ["attention"]},
    ],
    "three bits": [{"method": "rtn", "width": 3, "group": 4}],
    "short group": [{"method": "rtn", "width": 4, "group": 24, "target": ["mlp.up"]}],
    "floats": [{"method": "hqq", "width": 4, "group": 4}],
    "levels": [{"method": "nf4", "group": 4}],
    "columns": [{"method": "sinq", "width": 4, "group": 4}],
    "embeddings": [{"method": "rtn", "width": 4, "group": 4, "target": ["all", "embeddings"]}],
    "mixed": [{"method": "mixed", "ranks": 2, "widths": [3], "bits": 4.0}],
    "factors": [SVD_LLM, {"method": "rtn", "width": 8, "target": ["*.down"]}],
    "heads": [{"method": "stat", "target": ["mlp"], "keep": 0.5}],
    "latent": [{"cache": "latent", "keep": 0.5}],
    "fope": [{"convert": "fope"}],
    "smooth": [{"rewrite": "smooth"}],
    "adapter": [ADAPTER],
    "two adapters": [ADAPTER, ADAPTER | {"target": ["mlp"]}],
    "mlp adapter": [ADAPTER | {"target": ["mlp"]}],
    "adapter on factors": [SVD_LLM, ADAPTER],
    "adapter after full": [ADAPTER | {"relax": "full", "rank": None, "merge": None, "target": ["mlp.up"]}, ADAPTER],
    "kasa": [ADAPTER | {"relax": "kasa"}],
}


@pytest.fixture(scope="module")
def made(model_folder: Folder, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function: name of a case, and as `model_folder` → the folder that its steps make."""
    known: dict[Any, Path] = {}

    def make(name: str, family: str = "llama", **keywords: Any) -> Path:
        key = (name, family, *keywords.items())
        if key not in known:
            known[key] = tmp_path_factory.mktemp("made-") / "out"
            compress(model_folder(family, **keywords), known[key], text_file, CASES[name])
        return known[key]

    return make


def compress(model: Path, out: Path, text: Path, steps: list[Step]) -> Path:
    said = [{key: value for key, value in step.items() if value is not None} for step in steps]
    calibration = {"source": [str(text)], "samples": 6, "length": 16}
    run(prepare(recipe_from({"model": str(model), "step": said, "calibration": calibration}), out))
    return out


def opened(folder: Path) -> Any:
    return model_class(read_config(folder)).from_pretrained(folder)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return (opened(model) if isinstance(model, Path) else model)(**tiny_batch()).logits


def tree(folder: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- dense ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("name", ["svd_llm", "gptq", "mixed", "factors"])
def test_dense_is_the_stock_model_with_the_same_function(name, family, made, model_folder, tmp_path):
    """Inside a factor's product no more than rounding may differ; what was unpacked is the very same weight."""
    out, dense = made(name, family), tmp_path / "dense"
    assert command("export", out, dense, "--to", "dense") == 0
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    model = opened(dense)
    assert not any(isinstance(module, Kind) for module in model.modules())
    shapes = {name: tensor.shape for name, tensor in load_file(dense / "model.safetensors").items()}
    stock = {name: tensor.shape for name, tensor in load_file(model_folder(family) / "model.safetensors").items()}
    assert shapes == stock
    wanted = logits(out)
    assert not torch.allclose(wanted, logits(model_folder(family)), atol=1e-3)
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
    carried = {"tokenizer.json", "tokenizer_config.json", "LICENSE"}
    for file in carried:
        assert (dense / file).read_bytes() == (out / file).read_bytes()
    left_behind = {"README.md", "recipe.toml", "plan.json", "report.json", "report.html", "checksums.json"}
    assert not left_behind & {path.name for path in dense.iterdir()}
    # the model is an ordinary one: it may be compressed again
    tersely.compress(dense, tmp_path / "again", method="rtn", options={"width": 8})


@pytest.mark.parametrize("name", ["svd_llm", "gptq", "adapter"])
def test_dense_keeps_the_dtype(name, made, tmp_path):
    out, dense = made(name, dtype=torch.bfloat16), tmp_path / "dense"
    assert command("export", out, dense, "--to", "dense") == 0
    assert {tensor.dtype for tensor in load_file(dense / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((dense / "config.json").read_text())["dtype"] == "bfloat16"
    model, ours = opened(dense), opened(out)
    for path in outermost(manifest_of(ours)):
        wanted = ours.get_submodule(path).to_dense().to(torch.bfloat16)
        assert torch.equal(model.get_submodule(path).weight, wanted), path
    torch.testing.assert_close(logits(model), logits(ours), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_an_adapter_beside_its_weights_becomes_one_weight(family, made, tmp_path):
    assert command("export", made("adapter", family), tmp_path / "dense", "--to", "dense") == 0
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(made("adapter", family)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_difference_becomes_a_model_of_its_own(family, model_folder, text_file, tmp_path):
    base = model_folder(family)
    tuned = tune(base, tmp_path / "tuned", 3)
    compress(tuned, tmp_path / "delta", text_file, [{"method": "svd", "keep": 0.3, "base": str(base)}])
    assert command("export", tmp_path / "delta", tmp_path / "dense", "--to", "dense") == 0
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(tmp_path / "delta"), atol=1e-5, rtol=1e-5)


# --- adapters ---------------------------------------------------------------------------------------------------------

# the libraries' own quarrel: peft asks transformers by an old name
peft_tests = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@peft_tests
@pytest.mark.parametrize("name", ["adapter", "mlp adapter"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_an_adapter_opens_with_peft_and_merges_again(name, family, made, model_folder, text_file, tmp_path):
    """Trained beside its weights, taken out, put on the base by peft, and merged into it by ours: one function."""
    peft = pytest.importorskip("peft")
    out, base = made(name, family), model_folder(family)
    assert command("export", out, tmp_path / "adapter", "--to", "peft") == 0
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    wanted = logits(out)
    assert not torch.allclose(wanted, logits(base), atol=1e-3)
    theirs = peft.PeftModel.from_pretrained(opened(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), wanted, atol=1e-5, rtol=1e-5)
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(base)

    merge = {"rewrite": "merge_adapter", "adapter": str(tmp_path / "adapter")}
    merged = compress(base, tmp_path / "merged", text_file, [merge])
    assert command("verify", merged) == 0
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, Kind) for module in opened(merged).modules())
    merged_too = theirs.merge_and_unload()
    torch.testing.assert_close(logits(merged_too), logits(merged), atol=1e-5, rtol=1e-5)


def test_steps_may_follow_a_merged_adapter(made, model_folder, text_file, tmp_path):
    assert command("export", made("adapter"), tmp_path / "adapter", "--to", "peft") == 0
    steps = [
        {"rewrite": "merge_adapter", "adapter": str(tmp_path / "adapter")},
        {"method": "rtn", "width": 8, "group": 0},
    ]
    out = compress(model_folder(), tmp_path / "out", text_file, steps)
    near, far = (logits(made("adapter")) - logits(out)).abs().max(), (logits(model_folder()) - logits(out)).abs().max()
    assert near < far / 4


# --- packed integers --------------------------------------------------------------------------------------------------

PACKED = ("zeros", "symmetric", "rows", "bytes", "two widths")


def codes_of(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row, read bit by bit."""
    row = words.long() & 0xFFFFFFFF
    at = torch.arange(count * bits)
    lone = row[:, at // 32] >> (at % 32) & 1
    return (lone.unflatten(1, (count, bits)) << torch.arange(bits)).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", PACKED)
def test_packed_integers_stand_for_the_same_weights(name, dtype, made, tmp_path):
    """As the head of the format says, without the package that reads it."""
    out, packed = made(name, dtype=dtype), tmp_path / "packed"
    assert command("export", out, packed, "--to", "compressed-tensors") == 0
    stored, said = load_file(packed / "model.safetensors"), json.loads((packed / "config.json").read_text())
    groups = said["quantization_config"]["config_groups"].values()
    ours = opened(out)
    places = outermost(manifest_of(ours))
    assert len(places) == 14
    for path in places:
        (scheme,) = [g["weights"] for g in groups if path in g["targets"] or g["targets"] == ["Linear"]]
        shape = stored[f"{path}.weight_shape"].tolist()
        codes = codes_of(stored[f"{path}.weight_packed"], scheme["num_bits"], shape[1])
        scale = stored[f"{path}.weight_scale"]
        zero = torch.full_like(scale, 2 ** (scheme["num_bits"] - 1), dtype=torch.long)
        if not scheme["symmetric"]:
            zero = codes_of(stored[f"{path}.weight_zero_point"].T, scheme["num_bits"], shape[0]).T
        width = scheme["group_size"] or shape[1]
        spread = [x.repeat_interleave(width, 1) for x in (zero, scale)]
        assert scale.dtype == dtype
        assert torch.equal((codes - spread[0]).to(dtype) * spread[1], ours.get_submodule(path).to_dense().to(dtype))
    assert said["quantization_config"]["ignore"] == ["lm_head"]
    assert {"tokenizer.json", "LICENSE"} <= {path.name for path in packed.iterdir()}
    assert not {"report.json", "recipe.toml"} & {path.name for path in packed.iterdir()}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_packed_integers_open_in_transformers_without_us(name, family, made, tmp_path):
    """With biases (Qwen2) too.  Zero points are read only where weights are unpacked at once."""
    pytest.importorskip("compressed_tensors")
    out, packed = made(name, family), tmp_path / "packed"
    assert command("export", out, packed, "--to", "compressed-tensors") == 0
    plain = CompressedTensorsConfig(dequantize=True) if name in ("zeros", "rows", "bytes") else None
    theirs = LlamaForCausalLM if family == "llama" else Qwen2ForCausalLM
    model = theirs.from_pretrained(packed, **({} if plain is None else {"quantization_config": plain}))
    assert not any(isinstance(module, Kind) for module in model.modules())
    assert torch.equal(logits(model), logits(out))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("fope", "dense", r"no dense counterpart .* for model\.layers\.0\.self_attn, model\.layers\.1\.self_attn"),
        ("latent", "dense", r"no dense counterpart in the stock architecture for model\.layers\.0\.self_attn"),
        ("heads", "dense", r"no dense counterpart .* for .*down_proj.* and 1 more"),
        ("svd_llm", "peft", "is no sum of a dense weight and one low-rank update; train an adapter with merge = false"),
        ("gptq", "peft", "is no sum of a dense weight and one low-rank update"),
        ("fope", "peft", "is no sum of a dense weight and one low-rank update"),
        ("adapter on factors", "peft", "is no sum of a dense weight and one low-rank update"),
        ("two adapters", "peft", "is no sum of a dense weight and one low-rank update"),
        (
            "adapter after full",
            "peft",
            r"mlp\.up_proj\.weight is not that of the base .*an adapter alone cannot carry it",
        ),
        ("kasa", "peft", r"q_proj\.weight is not that of the base"),
        ("smooth", "dense", "holds no compressed module; it is an ordinary model already"),
        ("smooth", "peft", "holds no compressed module; it is an ordinary model already"),
        ("gptq", "gguf", "unknown format 'gguf'; known: compressed-tensors, dense, peft"),
        (
            "svd_llm",
            "compressed-tensors",
            r"of kind low_rank; wanted quantized linears alone \(9 more have none\)",
        ),
        ("factors", "compressed-tensors", "it is of kind low_rank"),
        ("embeddings", "compressed-tensors", r"embed_tokens .* it is of kind quantized_embedding"),
        ("three bits", "compressed-tensors", "3 bits; wanted 2, 4, 8"),
        ("short group", "compressed-tensors", "groups of 24 do not divide its 32 columns"),
        ("floats", "compressed-tensors", "its zero points are floats"),
        ("levels", "compressed-tensors", "its levels are those of the table nf4"),
        ("columns", "compressed-tensors", "its columns have scales"),
        ("fope", "compressed-tensors", "has no counterpart in compressed-tensors"),
        ("gptq", "dens", r"unknown format 'dens'; did you mean 'dense'\?"),
    ],
)
def test_what_has_no_counterpart_is_refused(name, to, message, made, tmp_path, capsys):
    refused([made(name), tmp_path / "new", "--to", to], message, tmp_path, capsys)


def refused(arguments: list[object], message: str, room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2, one line, and everything below `room` is as it was."""
    before = tree(room), sorted(room.rglob("*"))
    capsys.readouterr()
    assert command("export", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    assert re.search(rf"^error: .*{message}", printed.err), printed.err
    assert (tree(room), sorted(room.rglob("*"))) == before


def test_places_that_are_wrong_are_refused(made, model_folder, copy_of, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("today")
    (tmp_path / "file").write_text("a file")
    ours = copy_of(made("gptq"))
    for arguments, message in (
        ([ours, tmp_path / "full", "--to", "dense"], "full exists; choose another folder or remove it"),
        ([ours, tmp_path / "file", "--to", "dense"], "file is a file; choose another place"),
        ([ours, ours, "--to", "dense"], "exists; choose another folder"),
        ([model_folder(), tmp_path / "new", "--to", "dense"], "it is an ordinary model already"),
        ([tmp_path / "missing", tmp_path / "new", "--to", "dense"], "missing"),
        ([tmp_path / "full", tmp_path / "new", "--to", "peft"], r"no config\.json"),
    ):
        refused(arguments, message, tmp_path, capsys)
    (tmp_path / "empty").mkdir()
    assert command("export", ours, tmp_path / "empty", "--to", "dense") == 0  # as good as none


@pytest.mark.parametrize(
    ("name", "to", "ending"),
    [
        ("svd_llm", "dense", "up_proj.up.weight"),
        ("svd_llm", "dense", "input_layernorm.weight"),
        ("gptq", "dense", "model.norm.weight"),
        ("adapter", "dense", "up_proj.terms.1.up.weight"),
        ("adapter", "peft", "up_proj.terms.1.up.weight"),
        ("adapter", "peft", "model.norm.weight"),
    ],
)
def test_numbers_that_are_not_finite_are_not_exported(name, to, ending, made, copy_of, tmp_path, capsys):
    out = copy_of(made(name))
    state = load_file(out / "model.safetensors")
    spoiled = max(tensor for tensor in state if tensor.endswith(ending))
    state[spoiled].view(-1)[0] = torch.inf
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    message = f"NaN or infinite weights in {re.escape(spoiled)};"
    refused([out, tmp_path / "new", "--to", to], message, tmp_path, capsys)


def test_packed_scales_that_are_not_finite_are_not_exported(made, copy_of, tmp_path, capsys):
    """They are stored as whole numbers: what is seen is the weight that they make."""
    out = copy_of(made("gptq"))
    state = load_file(out / "model.safetensors")
    spoiled = max(tensor for tensor in state if tensor.endswith("up_proj.scales"))
    state[spoiled].view(-1)[0] = torch.tensor(torch.inf, dtype=torch.float16).view(torch.int16)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    message = f"NaN or infinite weights in {re.escape(spoiled.replace('scales', 'weight'))};"
    refused([out, tmp_path / "new", "--to", "dense"], message, tmp_path, capsys)


def test_a_product_that_is_too_large_for_the_dtype_is_not_exported(made, copy_of, tmp_path, capsys):
    out = copy_of(made("svd_llm", dtype=torch.float16))
    state = load_file(out / "model.safetensors")
    place = "model.layers.1.mlp.up_proj"
    for part in ("down", "up"):
        state[f"{place}.{part}.weight"] = torch.full_like(state[f"{place}.{part}.weight"], 30_000)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "empty").mkdir()
    for place_to_write in ("new", "empty"):
        message = rf"NaN or infinite weights in {re.escape(place)}\.weight"
        refused([out, tmp_path / place_to_write, "--to", "dense"], message, tmp_path, capsys)


def test_an_adapter_needs_the_base_that_its_recipe_names(made, copy_of, model_folder, tmp_path, capsys):
    nameless = copy_of(made("adapter"))
    (nameless / "recipe.toml").unlink()
    refused([nameless, tmp_path / "new", "--to", "peft"], r"has no recipe\.toml", tmp_path, capsys)
    moved = nameless.rename(tmp_path / "moved")
    said = (made("adapter") / "recipe.toml").read_text()
    (moved / "recipe.toml").write_text(said.replace(str(model_folder()), str(tmp_path / "nowhere")))
    refused([moved, tmp_path / "new", "--to", "peft"], "nowhere: no such folder", tmp_path, capsys)
    other = copy_of(model_folder())
    state = load_file(other / "model.safetensors")
    state["model.norm.weight"] *= 2
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    (moved / "recipe.toml").write_text(said.replace(str(model_folder()), str(other)))
    refused([moved, tmp_path / "new", "--to", "peft"], r"model\.norm\.weight is not that of the base", tmp_path, capsys)


def test_an_adapter_of_another_base_is_not_merged(made, model_folder, text_file, tmp_path, capsys):
    assert command("export", made("adapter"), tmp_path / "adapter", "--to", "peft") == 0
    for model, message in (
        (model_folder("gpt2"), "which is no plain linear of a block of this model"),
        (model_folder(intermediate_size=40), r"the update of .* is \(32, 44\), the weight \(32, 40\); another base\?"),
        (made("gptq"), "which is no plain linear of a block of this model; merge before steps that replace linears"),
    ):
        capsys.readouterr()
        asked = ["--method", "merge_adapter", "--set", f"adapter={tmp_path / 'adapter'}"]
        assert command("compress", model, tmp_path / "out", *asked) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not (tmp_path / "out").exists()

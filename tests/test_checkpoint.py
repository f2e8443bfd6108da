"""Folders: what is read, what is refused and why, what is written, and what `verify` makes of it."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import tersely
from conftest import CHAT_TEMPLATE, LICENCE
from families import tiny_batch, tiny_model
from tersely.checkpoint import locate
from tersely.errors import AnatomyError, CheckpointError, RecipeError, TerselyError
from tersely.export import export
from tersely.pipeline import compress, run
from tersely.prepare import prepare
from tersely.push import pack
from tersely.recipe import Calibration, MethodStep, Recipe
from tersely.verify import CHECKSUMS, checksum, verify

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of the linears in the blocks of the tiny Llama: q, o; k, v; gate, up, down; twice.
LLAMA_WEIGHTS = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 44 * 32)

Folder = Callable[..., Path]


@torch.no_grad()
def logits(folder: Path, **settings: object) -> Tensor:
    return tersely.load(folder, **settings)(**tiny_batch()).logits  # type: ignore[arg-type]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whatever files they are in."""
    parts = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    everything = {name: tensor for part in parts for name, tensor in part.items()}
    assert len(everything) == sum(map(len, parts)), "a tensor is stored in two files"
    return everything


def store(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def with_entries(folder: Path, name: str, **entries: object) -> Path:
    """Set entries of a JSON file in a folder."""
    plain = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(plain | entries))
    return folder


def failed(folder: Path) -> dict[str, str]:
    """The checks that a folder does not pass, and why."""
    return {check.name: check.detail for check in verify(folder) if not check.passed}


@pytest.fixture
def squeeze(text_file: Path, tmp_path: Path) -> Folder:
    """A function: compress a folder with some settings of the recipe into a new one."""

    def squeeze(model: Path, name: str = "out", keep: float = 0.6, **settings: object) -> Path:
        calibration = Calibration([str(text_file)], samples=8, length=16)
        recipe = Recipe(str(model), [MethodStep("svd_llm", keep=keep)], calibration, **settings)  # type: ignore[arg-type]
        return run(prepare(recipe, tmp_path / name)).out

    return squeeze


@pytest.fixture
def refused(squeeze: Folder, tmp_path: Path) -> Callable[..., None]:
    """A function: a folder is refused with a message, and nothing is written."""

    def refused(model: Path, message: str, kind: type[TerselyError] = CheckpointError) -> None:
        with pytest.raises(kind, match=message):
            squeeze(model)
        assert not (tmp_path / "out").exists()

    return refused


# --- dtypes and shards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_of_the_input_is_kept(dtype, model_folder, compressed):
    dense, out = model_folder(dtype=dtype), compressed(dtype=dtype)
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {dtype}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(out).dtype == dtype
    before, after = logits(dense).float(), logits(out).float()
    assert 0 < (after - before).square().mean() < before.square().mean()
    touched, *_ = json.loads((out / "report.json").read_text())["rows"]
    assert touched["before"] == LLAMA_WEIGHTS * dtype.itemsize
    assert 0.55 < touched["value"] / touched["before"] <= 0.6


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_dtype_that_is_asked_for_converts(dtype, model_folder, squeeze):
    out = squeeze(model_folder(dtype=torch.bfloat16), dtype=dtype)
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {getattr(torch, dtype)}
    assert AutoModelForCausalLM.from_pretrained(out).dtype == getattr(torch, dtype)
    assert failed(out) == {}


def test_shards_are_read_as_one_file_is(model_folder, squeeze):
    sharded, whole = model_folder(shard="20KB"), model_folder()
    assert (sharded / INDEX).is_file()
    assert not (sharded / WEIGHTS).exists()
    one, two = squeeze(sharded, "from-shards"), squeeze(whole, "from-one")
    for name in (WEIGHTS, "config.json", "plan.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_shards_are_written_with_an_index(model_folder, squeeze):
    whole, sharded = squeeze(model_folder(), "whole"), squeeze(model_folder(), "sharded", shard_size="20KB")
    assert not (sharded / WEIGHTS).exists()
    files = {file.name: load_file(file) for file in sharded.glob("*.safetensors")}
    assert len(files) > 1
    for name, tensors in files.items():
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 20_000, name
    index = json.loads((sharded / INDEX).read_text())
    assert index["weight_map"] == {tensor: name for name, tensors in files.items() for tensor in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in files.values() for t in tensors.values())
    wanted, found = tensors_of(whole), tensors_of(sharded)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert torch.equal(logits(sharded), logits(whole))
    assert failed(sharded) == {}


# --- tied embeddings --------------------------------------------------------------------------------------------------


def test_tied_embeddings_are_stored_once(compressed):
    names = tensors_of(compressed(tie_word_embeddings=True)).keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= tensors_of(compressed()).keys()
    opened = tersely.load(compressed(tie_word_embeddings=True))
    assert opened.lm_head.weight is opened.model.embed_tokens.weight


def test_tied_embeddings_that_came_twice_are_stored_once(model_folder, copy_of, squeeze):
    dense = copy_of(model_folder(tie_word_embeddings=True))
    tensors = tensors_of(dense)
    twice = store(dense, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    out = squeeze(twice, keep=1.0)
    assert "lm_head.weight" not in tensors_of(out)
    assert torch.equal(logits(out), logits(twice))


def test_a_head_that_differs_from_the_embedding_it_should_be_tied_to_is_not_lost(model_folder, copy_of, squeeze):
    """Whatever transformers makes of such a folder, the result computes the same, or the folder is refused."""
    dense = copy_of(model_folder(tie_word_embeddings=True))
    tensors = tensors_of(dense)
    store(dense, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].flip(0)})
    try:
        out = squeeze(dense, keep=1.0)
    except CheckpointError as error:
        assert "lm_head.weight" in str(error)
    else:
        assert torch.equal(logits(out), logits(dense))


# --- names of other times and tools -----------------------------------------------------------------------------------


def test_names_without_the_prefix_of_the_head_are_read(model_folder, copy_of, squeeze):
    """As GPT-2 is on the hub: the names of the bare model, and causal masks stored among the weights."""
    wanted = logits(model_folder("gpt2"))
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(model_folder("gpt2")).items()}
    assert "h.0.attn.c_attn.weight" in old
    masks = {f"h.{block}.attn.bias": torch.ones(1, 1, 64, 64).tril() for block in range(2)}
    dense = store(copy_of(model_folder("gpt2")), old | masks)
    exact = squeeze(dense, "exact", keep=1.0)
    assert torch.equal(logits(exact), wanted)
    assert not [name for name in tensors_of(exact) if name.endswith(".attn.bias")]
    assert failed(squeeze(dense)) == {}


def pickled(folder: Path) -> Path:
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def with_gammas(folder: Path) -> Path:
    """As BERT is on the hub: gains and shifts of the norms under their names in TensorFlow."""
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def old(name: str) -> str:
        for new, before in names.items():
            name = name.removesuffix(new) + before if name.endswith(new) else name
        return name

    return store(folder, {old(name): tensor for name, tensor in tensors_of(folder).items()})


def as_saved(folder: Path) -> Path:
    """Mixtral holds its experts stacked, and saves them one by one."""
    assert any(".experts.3." in name for name in tensors_of(folder))
    assert not any("gate_up_proj" in name for name in tensors_of(folder))
    return folder


@pytest.mark.parametrize(("family", "older"), [("llama", pickled), ("bert", with_gammas), ("mixtral", as_saved)])
def test_names_that_are_not_the_modules_are_read(family, older, model_folder, copy_of, squeeze):
    wanted = logits(model_folder(family))
    dense = older(copy_of(model_folder(family)))
    exact = squeeze(dense, "exact", keep=1.0)
    assert torch.equal(logits(exact), wanted)
    out = squeeze(dense)
    assert failed(out) == {}
    assert 0 < (logits(out) - wanted).square().mean() < wanted.square().mean()
    assert (out / "LICENSE").read_text() == LICENCE
    assert "license: mit" in (out / "README.md").read_text()
    assert not list(out.glob("*.bin"))


def test_other_safetensors_beside_the_model_are_not_read(model_folder, copy_of, squeeze):
    """Some folders on the hub hold the weights twice, in another tool's layout; transformers reads one file."""
    dense = copy_of(model_folder())
    others = {name: -tensor for name, tensor in tensors_of(dense).items()}
    for name in ("consolidated.safetensors", "original.safetensors"):
        save_file(others, dense / name)
    out = squeeze(dense, keep=1.0)
    assert torch.equal(logits(out), logits(dense))
    *_, whole = json.loads((out / "report.json").read_text())["rows"]
    assert whole["before"] == (dense / WEIGHTS).stat().st_size


def test_an_index_that_was_left_behind_is_not_followed(model_folder, copy_of, squeeze):
    """`save_pretrained` leaves it there when shards give way to one file; transformers prefers the one file."""
    dense = copy_of(model_folder(shard="20KB"))
    tersely.load(dense).save_pretrained(dense)
    assert (dense / INDEX).is_file()
    assert [file.name for file in dense.glob("*.safetensors")] == [WEIGHTS]
    assert torch.equal(logits(squeeze(dense, keep=1.0)), logits(dense))


def test_files_that_are_links_are_read_and_not_linked(model_folder, squeeze, tmp_path):
    """The cache of the hub holds links to files that are named by their content."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in model_folder().iterdir():
        (linked / path.name).symlink_to(path)
    out = squeeze(linked)
    assert not [path for path in out.iterdir() if path.is_symlink()]
    assert failed(out) == {}


def test_what_is_compressed_already_may_be_compressed_further(compressed, text_file, tmp_path):
    """The factors of the first run are the targets of the second; a factor becomes a product itself."""
    once = compressed()
    text = [str(text_file)]
    twice = compress(
        once, tmp_path / "twice", method="svd_llm", keep=0.6, target=["*.up"], calibrate=text, length=16
    ).out
    modules = json.loads((twice / "config.json").read_text())["quantization_config"]["modules"]
    nested = [name for name in modules if name.rpartition(".")[0] in modules]
    assert nested
    assert {name.rpartition(".")[2] for name in nested} == {"up"}
    assert failed(twice) == {}
    before, after = logits(once), logits(twice)
    assert 0 < (after - before).square().mean() < before.square().mean()
    opened = AutoModelForCausalLM.from_pretrained(twice)
    for name in nested:
        outer = opened.get_submodule(name.rpartition(".")[0])
        torch.testing.assert_close(outer.to_dense(), outer(torch.eye(outer.in_features)).T.detach())
    opened.save_pretrained(tmp_path / "again")
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (twice / name).read_bytes(), name


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_missing_shard_is_named(model_folder, copy_of, refused):
    dense = copy_of(model_folder(shard="20KB"))
    gone = sorted(dense.glob("*.safetensors"))[1]
    gone.unlink()
    refused(dense, rf"{gone.name}.*not there")


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": 3}', "[]"])
def test_a_damaged_index_is_named(index, model_folder, copy_of, refused):
    dense = copy_of(model_folder(shard="20KB"))
    (dense / INDEX).write_text(index)
    refused(dense, INDEX)


@pytest.mark.parametrize("left", [0, 4, 100, 5000, -1])
def test_a_truncated_file_is_named(left, model_folder, copy_of, refused):
    dense = copy_of(model_folder())
    (dense / WEIGHTS).write_bytes((dense / WEIGHTS).read_bytes()[:left])
    refused(dense, rf"{WEIGHTS}: truncated or damaged")


def test_a_pointer_in_place_of_the_weights_is_named(model_folder, copy_of, refused):
    dense = copy_of(model_folder())
    (dense / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 137\n")
    refused(dense, rf"{WEIGHTS}: truncated or damaged")


def test_a_missing_tensor_is_named(model_folder, copy_of, refused):
    name = "model.layers.1.mlp.up_proj.weight"
    dense = copy_of(model_folder())
    refused(store(dense, {key: tensor for key, tensor in tensors_of(dense).items() if key != name}), name)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_wrong_shape_is_named_with_both(name, model_folder, copy_of, refused):
    dense = copy_of(model_folder())
    tensors = tensors_of(dense)
    shape = tuple(tensors[name].shape)
    wrong = tensors[name][1:].contiguous()
    refused(store(dense, tensors | {name: wrong}), rf"{name}.*\({wrong.shape[0]},.*\({shape[0]},")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value, model_folder, copy_of, refused):
    name = "model.layers.1.mlp.up_proj.weight"
    dense = copy_of(model_folder())
    tensors = tensors_of(dense)
    tensors[name][3, 4] = value
    refused(store(dense, tensors), rf"NaN or infinite weights in {name};", TerselyError)


def test_a_folder_without_weights_is_refused(model_folder, copy_of, refused):
    dense = copy_of(model_folder())
    (dense / WEIGHTS).unlink()
    refused(dense, "model.safetensors|no safetensors|weights")


def test_a_folder_without_a_config_or_with_a_damaged_one_is_refused(model_folder, copy_of, refused):
    dense = copy_of(model_folder())
    (dense / "config.json").write_text("{")
    refused(dense, r"config\.json: not JSON")
    (dense / "config.json").write_text("[]")
    refused(dense, r"config\.json")
    (dense / "config.json").unlink()
    refused(dense, r"no config\.json")


def test_a_family_that_nobody_knows_is_refused(model_folder, copy_of, refused):
    dense = with_entries(copy_of(model_folder()), "config.json", model_type="lama")
    refused(dense, r"config\.json: .*lama")


def test_a_class_that_transformers_does_not_have_is_refused(model_folder, copy_of, refused):
    dense = with_entries(copy_of(model_folder()), "config.json", architectures=["LlamaForEverything"])
    refused(dense, "LlamaForEverything", AnatomyError)


def test_weights_that_somebody_else_quantized_are_refused(model_folder, copy_of, refused):
    dense = with_entries(
        copy_of(model_folder()), "config.json", quantization_config={"quant_method": "gptq", "bits": 4}
    )
    refused(dense, "already quantized by gptq")


def test_a_later_manifest_is_refused_with_both_numbers(compressed, copy_of, refused):
    out = copy_of(compressed())
    manifest = json.loads((out / "config.json").read_text())["quantization_config"] | {"version": 7}
    refused(with_entries(out, "config.json", quantization_config=manifest), r"version 7.*up to 1")


REMOTE = """
from transformers import LlamaConfig
from pathlib import Path

Path({witness!r}).touch()

class Configuration(LlamaConfig):
    pass
"""


def test_remote_code_is_not_run_unless_allowed(model_folder, copy_of, refused, squeeze, tmp_path, monkeypatch):
    dense, witness = copy_of(model_folder()), tmp_path / "witness"
    (dense / "configuration.py").write_text(REMOTE.format(witness=str(witness)))
    with_entries(dense, "config.json", auto_map={"AutoConfig": "configuration.Configuration"})
    refused(dense, r"own Python code \(configuration\.Configuration\).*--trust-remote-code")
    assert not witness.exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    out = squeeze(dense, trust_remote_code=True)
    assert witness.exists()
    assert torch.isfinite(LlamaForCausalLM.from_pretrained(out)(**tiny_batch()).logits).all()
    # who opens the result is asked again
    with pytest.raises(CheckpointError, match="own Python code"):
        tersely.load(out)
    assert [check.passed for check in verify(out)] == [True, False, False]
    assert all(check.passed for check in verify(out, trust_remote_code=True))
    assert pack(out, "owner/name", trust_remote_code=True).files
    export(out, tmp_path / "dense", "dense", trust_remote_code=True)
    assert tersely.load(tmp_path / "dense", trust_remote_code=True).config.hidden_size


def test_remote_code_is_refused_however_it_is_named(model_folder, copy_of, refused):
    dense = with_entries(copy_of(model_folder()), "config.json", auto_map={"AutoTokenizer": ["slow.A", None]})
    refused(dense, r"own Python code \(.*slow\.A")


def test_remote_code_of_a_tokenizer_is_refused(model_folder, copy_of, refused):
    dense = copy_of(model_folder())
    with_entries(dense, "tokenizer_config.json", auto_map={"AutoTokenizer": ["a.A", None]}, tokenizer_class="A")
    (dense / "a.py").write_text("raise SystemExit('it was run')")
    refused(dense, "tokenizer")


def test_a_folder_without_a_tokenizer_is_refused(model_folder, copy_of, refused):
    dense = copy_of(model_folder())
    for path in dense.glob("tokenizer*"):
        path.unlink()
    refused(dense, r"no tokenizer \(looked for tokenizer\.json,")


def test_a_damaged_tokenizer_is_refused(model_folder, copy_of, refused):
    dense = copy_of(model_folder())
    (dense / "tokenizer.json").write_text("{")
    refused(dense, "tokenizer cannot be loaded")


def test_places_that_are_no_models_are_refused(model_folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder; give a folder"):
        locate(str(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="no such folder"):
        locate(str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="neither a folder nor a model"):
        locate("nobody-there/no-such-model")
    with pytest.raises(RecipeError, match="--revision main was given with the local folder"):
        locate(str(model_folder()), "main")


# --- what is written --------------------------------------------------------------------------------------------------


def test_what_a_model_is_used_with_is_carried_and_other_weights_are_not(model_folder, copy_of, squeeze):
    dense = copy_of(model_folder())
    others = ("pytorch_model.bin", "model.gguf", "flax_model.msgpack", "tf_model.h5", "model.onnx", "training.pt")
    for name in (*others, ".gitattributes", "checksums.json", "report.json"):
        (dense / name).write_text("of the base model")
    (dense / "onnx").mkdir()
    (dense / "NOTICE").write_text("a notice")
    out = squeeze(dense)
    assert (out / "LICENSE").read_text() == LICENCE
    assert (out / "NOTICE").read_text() == "a notice"
    assert (out / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (dense / name).read_bytes(), name
    ours = {"config.json", "recipe.toml", "plan.json", "report.json", "report.html", CHECKSUMS, "README.md", WEIGHTS}
    carried = {"LICENSE", "NOTICE", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == ours | carried | {"chat_template.jinja"}
    for name in (*ours, *carried):
        assert (out / name).read_bytes() != b"of the base model"
    card = (out / "README.md").read_text()
    assert "The card of the base model" not in card
    assert "license: mit" in card
    assert AutoTokenizer.from_pretrained(out).chat_template == CHAT_TEMPLATE


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_as_readable_as_the_umask_says(mask, mode, umask, model_folder, squeeze):
    umask(mask)
    out = squeeze(model_folder(), shard_size="20KB")
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in out.iterdir()} == {
        path.name: oct(mode) for path in out.iterdir()
    }


def test_a_model_that_was_not_made_smaller_opens_anywhere(model_folder, squeeze):
    out = squeeze(model_folder(), keep=1.0)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert (out / WEIGHTS).read_bytes() == (model_folder() / WEIGHTS).read_bytes()
    assert failed(out) == {}


# --- verify -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "distilbert"])
def test_a_good_folder_passes_every_check(family, compressed):
    checks = list(verify(compressed(family)))
    assert [check.name for check in checks] == ["checksums", "manifest", "weights", "reopens"]
    assert [check for check in checks if not check.passed] == []


def test_every_changed_byte_is_found_and_its_file_named(compressed, copy_of):
    out = copy_of(compressed())
    listed = json.loads((out / CHECKSUMS).read_text())
    assert listed.keys() == {path.name for path in out.iterdir()} - {CHECKSUMS}
    for name in listed:
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        check = next(verify(out))
        assert (check.name, check.passed) == ("checksums", False)
        assert check.detail.endswith(f": {name}")
        (out / name).write_bytes(content)
    assert failed(out) == {}


def test_every_missing_file_is_named(compressed, copy_of):
    out = copy_of(compressed())
    for name in json.loads((out / CHECKSUMS).read_text()):
        shutil.move(out / name, out.parent / name)
        check = next(verify(out))
        assert (check.name, check.passed, check.detail) == ("checksums", False, f"missing: {name}")
        shutil.move(out.parent / name, out / name)
    (out / WEIGHTS).unlink()
    assert failed(out).keys() == {"checksums", "manifest", "weights"}  # what cannot be read is not reopened


def resigned(folder: Path) -> Path:
    """With checksums that agree with what the files hold now."""
    listed = json.loads((folder / CHECKSUMS).read_text())
    (folder / CHECKSUMS).write_text(json.dumps({name: checksum(folder / name) for name in listed}))
    return folder


def test_a_weight_that_is_not_finite_is_found_though_the_checksums_agree(compressed, copy_of):
    out = copy_of(compressed())
    tensors = tensors_of(out)
    name = next(name for name in tensors if name.endswith("down.weight"))
    tensors[name][0, 0] = float("nan")
    (failure,) = failed(resigned(store(out, tensors))).items()
    assert failure[0] == "weights"
    assert name in failure[1]


def test_a_manifest_that_does_not_fit_the_weights_is_found_though_the_checksums_agree(compressed, copy_of):
    out = copy_of(compressed())
    manifest = json.loads((out / "config.json").read_text())["quantization_config"]
    name = next(iter(manifest["modules"]))
    manifest["modules"][name]["rank"] += 1
    failures = failed(resigned(with_entries(out, "config.json", quantization_config=manifest)))
    assert "checksums" not in failures
    assert name in failures["weights"]


@pytest.mark.parametrize("content", ["{", "[]", '{"config.json": 3}'])
def test_a_damaged_list_of_checksums_fails_its_check(content, compressed, copy_of):
    out = copy_of(compressed())
    (out / CHECKSUMS).write_text(content)
    assert failed(out).keys() == {"checksums"}


def test_folders_that_are_not_ours_or_not_finished_are_not_verified(model_folder, compressed, copy_of, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        list(verify(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=rf"no {CHECKSUMS}; tersely did not write it"):
        list(verify(model_folder()))
    out = copy_of(compressed())
    (out / ".tersely").mkdir()
    with pytest.raises(CheckpointError, match="unfinished run"):
        list(verify(out))


def test_the_tiny_model_is_what_its_folder_holds(model_folder):
    """The tests above compare folders with folders; this one ties them to a model."""
    assert torch.equal(logits(model_folder()), tiny_model("llama")(**tiny_batch()).logits)


@pytest.mark.parametrize("made", [False, True], ids=["a checkpoint", "what tersely wrote"])
def test_weights_that_are_missing_are_no_random_numbers(made, model_folder, compressed, tmp_path):
    folder = tmp_path / "incomplete"
    shutil.copytree(compressed() if made else model_folder(), folder)
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("input_layernorm.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"weights are missing for .*{re.escape(gone)}"):
        tersely.load(folder)


def test_one_text_and_one_target_may_be_said_without_a_list(model_folder, text_file, tmp_path):
    said = {"method": "svd_llm", "keep": 0.6, "samples": 4, "length": 16}
    listed, plain = tmp_path / "listed", tmp_path / "plain"
    compress(model_folder(), listed, calibrate=[str(text_file)], target=["mlp"], **said)
    compress(model_folder(), plain, calibrate=str(text_file), target="mlp", **said)
    assert (listed / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()

"""Deltas: many fine-tuned models over one base, in folders of differences and side by side in memory."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from families import tiny_batch
from tersely.anatomy import anatomy_of
from tersely.checkpoint import Source, open_source
from tersely.deltas import check_pair, choose, digest, load_deltas, open_any, open_delta, write_delta
from tersely.errors import CheckpointError, RecipeError
from tersely.hf import manifest_config
from tersely.kinds import LowRankLinear, Made, manifest_of
from tersely.kinds.sum import SumLinear
from tersely.methods.low_rank.svd import PlainSVD
from tersely.stats import Stats

Folder = Callable[..., Path]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


# --- folders ----------------------------------------------------------------------------------------------------------


def tune(base: Path, folder: Path, seed: int, *, others: bool = True, rank: int = 2) -> Path:
    """A fine-tuned twin: all linears moved by low rank; with `others` biases, a norm and the embedding too."""
    shutil.copytree(base, folder)
    model = opened(folder)
    with torch.no_grad():
        for site in anatomy_of(model).sites:
            linear = model.get_submodule(site.name)
            change = normal(site.out_features, rank, seed=seed) @ normal(rank, site.in_features, seed=seed + 1)
            linear.weight.add_((0.05 * (change.T if site.transposed else change)).to(linear.weight.dtype))
            if others and site.bias:
                linear.bias.add_(0.1)
        if others:
            norm = next(p for name, p in model.named_parameters() if "norm" in name or "ln_" in name)
            norm.mul_(1.1)
            model.get_input_embeddings().weight.mul_(1.2)
    model.save_pretrained(folder)
    return folder


def updates(tuned: Source, base: Source, rank: int | None = None) -> dict[str, Made]:
    """Rank `rank` (all of it if None) of W_tuned - W_base, for every linear."""
    made = {}
    for site in anatomy_of(base.skeleton()).sites:
        name = f"{site.name}.weight"
        delta = tuned.tensor(name).float() - base.tensor(name).float()
        delta = delta.T.contiguous() if site.transposed else delta
        made[site.name] = Made.of(PlainSVD().compress(delta, Stats(), rank or min(delta.shape)))
    return made


@pytest.fixture(scope="module")
def delta(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path, Path]]:
    """A function: family, seed, settings → folders of a base, its fine-tuned twin, and their delta.  Read-only."""
    made: dict[object, tuple[Path, Path, Path]] = {}

    def make(family: str = "llama", seed: int = 10, *, others: bool = True, rank: int | None = 2, **settings: object):
        key = (family, seed, others, rank, *sorted(settings.items()))
        if key not in made:
            base = model_folder(family, **settings)
            room = tmp_path_factory.mktemp(f"delta-{family}-")
            tuned = tune(base, room / "tuned", seed, others=others)
            sources = open_any(tuned), open_any(base)
            write_delta(room / "delta", *sources, updates(*sources, rank))
            made[key] = base, tuned, room / "delta"
        return made[key]

    return make


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**tiny_batch()).logits


CASES = {
    "untied": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "tied-alike": ("llama", {"tie_word_embeddings": True, "others": False}),
    "conv1d": ("gpt2", {}),
    "scaled": ("gemma3_text", {"others": False}),
    "renamed": ("gpt_neox", {}),
}
every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_base_and_delta_open_as_the_tuned_model(case, delta):
    family, settings = CASES[case]
    base, tuned, folder = delta(family, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(folder)
    wanted = logits(opened(tuned))
    assert not torch.allclose(logits(opened(base)), wanted, atol=1e-2)
    torch.testing.assert_close(logits(model), wanted, atol=2e-4, rtol=1e-4)
    assert type(model).__name__ == type(opened(tuned)).__name__
    assert any(isinstance(module, SumLinear) for module in model.modules())


@every_case
def test_nothing_is_missing_and_nothing_is_drawn(case, delta, caplog):
    family, settings = CASES[case]
    _, _, folder = delta(family, **settings)
    transformers.utils.logging.get_logger("transformers").propagate = True
    try:
        _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    finally:
        transformers.utils.logging.get_logger("transformers").propagate = False
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not caplog.records


@every_case
def test_a_source_reads_both_folders_as_one(case, delta):
    family, settings = CASES[case]
    _, _, folder = delta(family, **settings)
    source, model = open_delta(folder), AutoModelForCausalLM.from_pretrained(folder)
    state = model.state_dict()
    tied = model.all_tied_weights_keys
    assert set(source.stored) == set(state) - set(tied)
    for name in source.stored:
        assert torch.equal(source.tensor(name), state[name]), name
        assert source.stored[name].shape == tuple(state[name].shape)
    assert manifest_of(source.skeleton()) == manifest_of(model) == source.manifest
    source.check_weights()


def test_only_differences_are_stored(delta):
    base, tuned, folder = delta("llama", others=False, rank=1)
    stored = load_file(folder / "model.safetensors")
    for name, tensor in stored.items():
        assert tensor.numel() == 0 or ".terms.1." in name, name
    assert sum(t.nbytes for t in stored.values()) == sum(
        made.build().nbytes() for made in updates(open_source(tuned), open_source(base), 1).values()
    )
    _, _, more = delta("llama")
    extra = {
        name
        for name, tensor in load_file(more / "model.safetensors").items()
        if ".terms." not in name and tensor.numel()
    }
    assert extra == {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"}


def test_a_linear_without_an_update_keeps_the_tuned_weight(delta, tmp_path):
    base, tuned, _ = delta("llama")
    sources = open_source(tuned), open_source(base)
    some = {name: made for name, made in updates(*sources, 2).items() if ".mlp." in name}
    write_delta(tmp_path / "out", *sources, some)
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(opened(tuned)), atol=2e-4, rtol=1e-4)
    assert "model.layers.0.self_attn.q_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_an_opened_delta_is_an_ordinary_model_and_saves_whole(delta, tmp_path):
    _, _, folder = delta("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert "base" not in config["quantization_config"]
    assert torch.equal(logits(opened(tmp_path / "whole")), logits(model))
    assert logits(model.to(torch.float64)).dtype == torch.float64


def test_the_bare_model_opens_too(delta):
    _, _, folder = delta("gpt2")
    whole, bare = opened(folder), AutoModel.from_pretrained(folder)
    batch = tiny_batch()
    with torch.no_grad():
        assert torch.equal(bare(**batch).last_hidden_state, whole.base_model(**batch).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dtype_may_be_asked_for(dtype, delta):
    _, _, folder = delta("llama")
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).parameters()} == {dtype}


def test_an_update_may_be_a_sum_and_its_terms_lie_side_by_side(delta, tmp_path):
    base, tuned, _ = delta("llama", others=False)
    sources = open_source(tuned), open_source(base)
    name = "model.layers.1.mlp.up_proj"
    made = updates(*sources, 2)[name].build()
    made.load_state_dict(updates(*sources, 2)[name].state, assign=True)
    halves = [
        LowRankLinear.from_factors(made.up.weight[:, i : i + 1], made.down.weight[i : i + 1].contiguous())
        for i in (0, 1)
    ]
    manifest = write_delta(tmp_path / "out", *sources, {name: Made.of(SumLinear.of(halves))})
    assert manifest[name]["terms"] == 3
    assert set(manifest) == {name, f"{name}.terms.1", f"{name}.terms.2"}
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(opened(tuned)), atol=2e-4, rtol=1e-4)


def compressed(base: Path, folder: Path) -> Path:
    """The base with its linears cut to a third of their ranks."""
    model = opened(base)
    for site in anatomy_of(model).sites:
        weight = model.get_submodule(site.name).weight.detach()
        model.set_submodule(site.name, PlainSVD().compress(weight, Stats(), min(weight.shape) // 3))
    model.config.quantization_config = manifest_config(manifest_of(model))
    model.save_pretrained(folder)
    return folder


def test_a_base_may_be_compressed_itself(delta, tmp_path):
    """Then the delta is taken against what the base really computes, and absorbs its error."""
    base = open_source(compressed(delta("llama")[0], tmp_path / "base"))
    tuned = open_source(delta("llama")[1])
    made = {}
    for name in base.manifest:
        weight = base.tensor(f"{name}.up.weight") @ base.tensor(f"{name}.down.weight")
        change = tuned.tensor(f"{name}.weight") - weight
        made[name] = Made.of(PlainSVD().compress(change, Stats(), min(change.shape)))
    manifest = write_delta(tmp_path / "out", tuned, base, made)
    assert manifest["model.layers.0.mlp.up_proj.terms.0"]["kind"] == "low_rank"
    model = opened(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(opened(tuned.folder)), atol=2e-4, rtol=1e-4)
    assert open_delta(tmp_path / "out").manifest == manifest


# --- loud failures ----------------------------------------------------------------------------------------------------

OUTSIDE = """
import json, sys
import transformers
transformers.logging.set_verbosity_error()
outcomes = []
for folder in sys.argv[1:]:
    for name in ("AutoModelForCausalLM", "AutoModel"):
        try:
            getattr(transformers, name).from_pretrained(folder)
            outcomes.append("opened")
        except Exception as error:
            outcomes.append(type(error).__name__)
assert "tersely" not in sys.modules
json.dump(outcomes, sys.stdout)
"""


def test_without_tersely_a_delta_is_refused(delta):
    folders = [str(delta("llama")[2]), str(delta("gpt2")[2])]
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, *folders],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) and "opened" not in json.loads(done.stdout)


def recorded(folder: Path, **changes: str) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["base"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("opening", [AutoModelForCausalLM.from_pretrained, open_delta])
def test_an_absent_base_is_an_error_that_says_what_to_do(opening, delta, copy_of):
    folder = recorded(copy_of(delta("llama")[2]), model="/no/such/base")
    with pytest.raises(CheckpointError, match=r"delta over /no/such/base.*set quantization_config\.base\.model"):
        opening(folder)


@pytest.mark.parametrize("opening", [AutoModelForCausalLM.from_pretrained, open_delta])
def test_another_base_is_refused(opening, delta, copy_of):
    _, tuned, folder = delta("llama")
    with pytest.raises(CheckpointError, match="other weights than those of"):
        opening(recorded(copy_of(folder), model=str(tuned)))


def test_a_base_may_be_recorded_beside_the_folder(delta, tmp_path):
    base, _, folder = delta("llama")
    shutil.copytree(base, tmp_path / "base")
    moved = recorded(Path(shutil.copytree(folder, tmp_path / "delta")), model="../base")
    assert torch.equal(logits(opened(moved)), logits(opened(folder)))


def test_the_digest_is_that_of_the_numbers(delta, copy_of):
    base, tuned, _ = delta("llama")
    assert digest(open_source(base)) == digest(open_source(copy_of(base)))
    assert digest(open_source(base)) != digest(open_source(tuned))
    assert digest(open_source(base)) == digest(open_source(base, dtype="bfloat16"))


def test_a_delta_may_be_taken_and_served_in_another_dtype_than_its_base(delta, tmp_path):
    base, tuned, _ = delta("llama", others=False)
    model = opened(tuned).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "tuned")
    sources = open_source(tmp_path / "tuned"), open_source(base, dtype="bfloat16")
    made = {
        path: Made(one.specs, {name: tensor.bfloat16() for name, tensor in one.state.items()})
        for path, one in updates(*sources, 4).items()
    }
    write_delta(tmp_path / "delta", *sources, made)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "delta", dtype="auto")
    assert again.dtype == torch.bfloat16
    torch.testing.assert_close(logits(again), logits(model), atol=0.1, rtol=0.1)
    served = load_deltas(base, {"one": tmp_path / "delta"})
    with choose(served, ["one"]):
        torch.testing.assert_close(logits(served), logits(model).float(), atol=0.1, rtol=0.1)


def test_a_delta_may_be_the_base_of_another(delta, tmp_path):
    _, tuned, folder = delta("llama")
    further = tune(tuned, tmp_path / "further", 50)
    sources = open_source(further), open_any(folder)
    made = {}
    skeleton = opened(folder)
    for path in sources[1].manifest:
        if path.count(".terms.") == 0:
            change = sources[0].tensor(f"{path}.weight") - skeleton.get_submodule(path).to_dense()
            made[path] = Made.of(PlainSVD().compress(change, Stats(), min(change.shape)))
    write_delta(tmp_path / "out", *sources, made)
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(opened(further)), atol=2e-4, rtol=1e-4)


def test_models_that_are_no_pair_are_refused_by_name(model_folder, delta, tmp_path):
    base, tuned, _ = delta("llama")
    sources = open_source(tuned), open_source(base)
    check_pair(*sources)
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM.*GPT2LMHeadModel"):
        check_pair(sources[0], open_source(model_folder("gpt2")))
    with pytest.raises(CheckpointError, match=r"shapes differ in lm_head\.weight \(\(64, 32\) and \(60, 32\)\)"):
        check_pair(sources[0], open_source(model_folder("llama", vocab_size=60)))
    with pytest.raises(CheckpointError, match="open both with one dtype"):
        check_pair(sources[0], open_source(base, dtype="bfloat16"))
    with pytest.raises(CheckpointError, match="is compressed"):
        check_pair(open_source(compressed(base, tmp_path / "less")), sources[1])


def test_an_update_that_does_not_fit_is_refused_before_anything_is_written(delta, tmp_path):
    base, tuned, _ = delta("llama")
    sources = open_source(tuned), open_source(base)
    good = updates(*sources, 1)
    name = "model.layers.0.mlp.up_proj"
    biased = LowRankLinear.from_factors(normal(44, 1), normal(1, 32))
    biased.set_bias(normal(44))
    for wrong, message in (
        ({"model.layers.9.nothing": good[name]}, "does not have"),
        ({name: good["model.layers.0.self_attn.q_proj"]}, "wanted"),
        ({name: Made.of(biased)}, "with a bias"),
        ({}, "at least one"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write_delta(tmp_path / "out", *sources, wrong)
    assert not (tmp_path / "out").exists()


# --- serving ----------------------------------------------------------------------------------------------------------


def batch_of(rows: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 60, (rows, 7), generator=torch.Generator().manual_seed(1))}


@pytest.fixture(scope="module")
def served(delta) -> Callable[..., tuple[PreTrainedModel, dict[str | None, PreTrainedModel]]]:
    """A function: family, settings → the base with two deltas, and each of the three opened alone."""

    def make(family: str, **settings: object):
        base, _, first = delta(family, 10, **settings)
        _, _, second = delta(family, 30, **settings | {"others": False})
        model = load_deltas(base, {"math": first, "code": second})
        alone = {None: base, "math": first, "code": second}
        return model, {name: opened(folder) for name, folder in alone.items()}

    return make


@every_case
@torch.no_grad()
def test_a_mixed_batch_is_the_same_as_each_delta_alone(case, served):
    family, settings = CASES[case]
    model, alone = served(family, **settings)
    names, batch = ["math", None, "code", "math"], batch_of(4)
    with choose(model, names):
        together = model(**batch).logits
    for row, name in enumerate(names):
        separate = alone[name](input_ids=batch["input_ids"][row : row + 1]).logits[0]
        torch.testing.assert_close(together[row], separate, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], alone[None](**batch).logits[0], atol=1e-2)


@torch.no_grad()
def test_generation_follows_the_choice_also_with_beams(served):
    model, alone = served("llama")
    names, batch = ["code", "math", None], batch_of(3)
    for settings in ({"num_beams": 1}, {"num_beams": 2}):
        settings |= {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        with choose(model, names):
            tokens = model.generate(**batch, **settings)
        for row, name in enumerate(names):
            separate = alone[name].generate(input_ids=batch["input_ids"][row : row + 1], **settings)[0]
            assert torch.equal(tokens[row, : len(separate)], separate)


@torch.no_grad()
def test_one_name_may_stand_for_the_whole_batch_and_the_choice_ends(served):
    model, alone = served("llama")
    with choose(model, ["math"]):
        torch.testing.assert_close(
            model(**batch_of(3)).logits, alone["math"](**batch_of(3)).logits, atol=1e-4, rtol=1e-4
        )
        with choose(model, [None]):
            assert torch.equal(model(**batch_of(3)).logits, alone[None](**batch_of(3)).logits)
        torch.testing.assert_close(
            model(**batch_of(3)).logits, alone["math"](**batch_of(3)).logits, atol=1e-4, rtol=1e-4
        )
    with pytest.raises(RecipeError, match="no delta was chosen"):
        model(**batch_of(3))


def test_a_wrong_choice_is_refused(served):
    model, alone = served("llama")
    with pytest.raises(RecipeError, match="did you mean 'math'"), choose(model, ["mth"]):
        pass
    with pytest.raises(RecipeError, match="empty choice"), choose(model, []):
        pass
    with pytest.raises(RecipeError, match="2 deltas were chosen for a batch of 3 rows"), choose(model, ["math", None]):
        model(**batch_of(3))
    with pytest.raises(RecipeError, match="no deltas to choose from"), choose(alone[None], [None]):
        pass


def test_the_base_is_in_memory_once(served, delta):
    model, alone = served("llama", others=False)
    held = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    base = sum(p.nbytes for p in alone[None].parameters())
    small = [
        sum(t.nbytes for t in load_file(delta("llama", seed, others=False)[2] / "model.safetensors").values())
        for seed in (10, 30)
    ]
    assert held == base + sum(small)


def test_two_models_have_choices_of_their_own(served):
    first, second = served("llama")[0], served("llama")[0]
    with choose(first, ["math"]), torch.no_grad():
        first(**batch_of(2))
        with pytest.raises(RecipeError, match="no delta was chosen"):
            second(**batch_of(2))


def test_deltas_of_another_base_or_another_function_are_not_served(delta, copy_of):
    base, tuned, folder = delta("llama")
    with pytest.raises(CheckpointError, match="other weights"):
        load_deltas(tuned, {"math": folder})
    with pytest.raises(CheckpointError, match="names no base"):
        load_deltas(base, {"math": tuned})
    with pytest.raises(CheckpointError, match="is itself a delta"):
        load_deltas(folder, {"math": folder})
    changed = copy_of(folder)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))
    with pytest.raises(CheckpointError, match=r"rms_norm_eps \(0\.01 and 1e-06\)"):
        load_deltas(base, {"math": changed})

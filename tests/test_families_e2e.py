"""Every family from a folder to a folder: compressed, reopened with its own class, and still computing."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import tersely
from families import TINY, tiny_batch, tiny_config
from tersely.anatomy import FAMILIES, anatomy_of
from tersely.kinds import LowRankLinear
from tersely.pipeline import Result
from tersely.verify import verify

every_family = pytest.mark.parametrize("family", FAMILIES)
EXPERTS = ("mixtral", "qwen3_moe")
CLASSIFIERS = {"bert": "BertForSequenceClassification", "distilbert": "DistilBertForSequenceClassification"}


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    return tersely.load(folder)(**tiny_batch()).logits


def shrink(
    model: Path, out: Path, text: Path, keep: float = 0.7, method: str = "svd_llm", **settings: object
) -> Result:
    calibration = {"calibrate": [str(text)], "length": 24, "samples": 16}
    return tersely.compress(model, out, method=method, keep=keep, **calibration, **settings)  # type: ignore[arg-type]


def test_no_family_is_left_out():
    assert TINY.keys() == FAMILIES.keys()


@every_family
def test_compressed_it_opens_with_its_class_and_computes(family, model_folder, text_file, tmp_path):
    dense = model_folder(family)
    report = shrink(dense, tmp_path / "out", text_file).report
    opened = tersely.load(tmp_path / "out")
    assert type(opened).__name__ == tiny_config(family).architectures[0]
    before, after = logits(dense), logits(tmp_path / "out")
    assert after.shape == before.shape
    assert torch.isfinite(after).all()
    assert 0 < (after - before).square().mean() < before.square().mean()

    # What was replaced is counted, and so is what was not.
    anatomy = anatomy_of(tersely.load(dense))
    factors = {name for name, module in opened.named_modules() if isinstance(module, LowRankLinear)}
    assert factors == {site.name for site in report.sites if site.amount is not None}
    assert len(factors) > len(anatomy.sites) // 2
    assert [site.name for site in report.sites] == [site.name for site in anatomy.sites]
    assert report.kept == [{"name": k.name, "shape": k.shape, "reason": k.reason} for k in anatomy.kept]
    total = len(anatomy.sites) + len(anatomy.kept)
    left = len(anatomy.sites) - len(factors)
    assert report.coverage.startswith(f"{len(factors)} of {total} linears touched, {left + len(anatomy.kept)} kept: ")
    assert report.coverage.endswith(f"{left} left dense by the plan") == (left > 0)
    assert report.degraded == {}

    # The budget is kept, by what is stored as well as by what is reported.
    touched = next(row for row in report.rows if row.name == "touched weights")
    assert 0.6 < touched.value / touched.before <= 0.7
    stored = sum(module.nbytes() for module in opened.modules() if isinstance(module, LowRankLinear))
    biases = sum(m.up.bias.nbytes for m in opened.modules() if isinstance(m, LowRankLinear) if m.up.bias is not None)
    dense_left = sum(site.nbytes for site in report.sites if site.amount is None)
    assert touched.value == stored - biases + dense_left

    # Errors are told for every site.
    for site in report.sites:
        assert (site.amount is None) == (site.measured_error == 0)
        assert 0 <= site.measured_error < 1
    assert [check for check in verify(tmp_path / "out") if not check.passed] == []


@every_family
def test_with_everything_kept_nothing_changes(family, model_folder, text_file, tmp_path):
    """A product that takes as many bytes as the weight does not pay: every site is left dense, bit by bit."""
    dense = model_folder(family)
    report = shrink(dense, tmp_path / "out", text_file, keep=1.0, method="svd").report
    assert torch.equal(logits(tmp_path / "out"), logits(dense))
    assert {site.amount for site in report.sites} == {None}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_classifiers_keep_their_heads(family, model_folder, text_file, tmp_path):
    dense = model_folder(family, CLASSIFIERS[family], num_labels=3)
    shrink(dense, tmp_path / "out", text_file)
    opened, before = tersely.load(tmp_path / "out"), tersely.load(dense)
    assert type(opened).__name__ == CLASSIFIERS[family]
    assert torch.equal(opened.classifier.weight, before.classifier.weight)
    assert logits(tmp_path / "out").shape == (2, 3)
    assert torch.isfinite(logits(tmp_path / "out")).all()


@pytest.mark.parametrize("architecture", ["LlamaModel", "LlamaForSequenceClassification"])
def test_bodies_without_the_usual_head(architecture, model_folder, text_file, tmp_path):
    dense = model_folder("llama", architecture)
    shrink(dense, tmp_path / "out", text_file)
    opened = tersely.load(tmp_path / "out")
    assert type(opened).__name__ == architecture
    with torch.no_grad():
        after, before = opened(**tiny_batch())[0], tersely.load(dense)(**tiny_batch())[0]
    assert 0 < (after - before).square().mean() < before.square().mean()
    assert [check for check in verify(tmp_path / "out") if not check.passed] == []


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("allocate", ["greedy", "uniform"])
@pytest.mark.parametrize("propagate", ["none", "block", "input"])
def test_every_way_through_the_blocks(family, allocate, propagate, model_folder, text_file, tmp_path):
    dense = model_folder(family)
    settings = {"allocate": allocate, "propagate": propagate}
    report = shrink(dense, tmp_path / "out", text_file, **settings).report
    before, after = logits(dense), logits(tmp_path / "out")
    assert 0 < (after - before).square().mean() < before.square().mean()
    for site in report.sites:
        share = site.nbytes / site.dense_bytes
        assert allocate == "greedy" or share <= 0.7
        if allocate == "greedy" and propagate == "none" and site.amount is not None:
            # predicted and made on the same inputs; what is left is the rounding of the factors
            assert site.measured_error == pytest.approx(site.predicted_error, rel=1e-3, abs=1e-6)
    assert (report.sites[0].predicted_error is None) == (allocate == "uniform")


@pytest.mark.parametrize("propagate", ["block", "input"])
def test_the_first_block_sees_the_same_inputs_however_errors_propagate(propagate, model_folder, text_file, tmp_path):
    """And the first group of sites in it; later ones are fitted to other inputs, hence have other factors."""
    dense = model_folder("llama")
    outs = {}
    for name in ("none", propagate):
        shrink(dense, tmp_path / name, text_file, allocate="uniform", propagate=name)
        outs[name] = tersely.load(tmp_path / name).state_dict()
    differing = {name for name in outs["none"] if not torch.equal(outs["none"][name], outs[propagate][name])}
    same = "model.layers.0." if propagate == "block" else "model.layers.0.self_attn.q"
    assert not [name for name in differing if name.startswith(same)]
    assert any(name.startswith("model.layers.1.self_attn.q_proj") for name in differing)
    assert any(name.startswith("model.layers.0.mlp.down_proj") for name in differing) == (propagate == "input")


@pytest.mark.parametrize("family", EXPERTS)
def test_what_mixes_experts_is_kept_and_said(family, model_folder, text_file, tmp_path):
    dense = model_folder(family)
    report = shrink(dense, tmp_path / "out", text_file).report
    experts = 2 if family == "mixtral" else 1
    assert f"{experts} routing among experts" in report.coverage
    assert f"{2 * experts} fused over all experts" in report.coverage
    fused = [kept["name"] for kept in report.kept if kept["reason"] == "fused over all experts"]
    before, after = tersely.load(dense).state_dict(), tersely.load(tmp_path / "out").state_dict()
    assert len(fused) == 2 * experts
    for name in fused:
        assert torch.equal(before[name], after[name])


@pytest.mark.parametrize("method", ["svd", "asvd", "svd_llm"])
def test_every_method_runs_on_weights_stored_either_way(method, model_folder, text_file, tmp_path):
    """Conv1D stores its weight transposed: the factors of one that is stored the usual way would have other shapes."""
    for family in ("gpt2", "llama"):
        dense = model_folder(family)
        shrink(dense, tmp_path / family, text_file, keep=0.9, method=method, allocate="uniform")
        opened, before = tersely.load(tmp_path / family), tersely.load(dense)
        for name, module in opened.named_modules():
            if isinstance(module, LowRankLinear):
                linear = before.get_submodule(name)
                weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
                assert (module.to_dense() - weight).norm() < 0.6 * weight.norm(), name
                if linear.bias is not None:
                    assert torch.equal(module.up.bias, linear.bias)


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_other_ones(model_folder, text_file, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        shrink(model_folder(), tmp_path / name, text_file, seed=seed)
    one, two, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_a_family_that_is_not_known_is_refused_by_name(model_folder, copy_of, text_file, tmp_path):
    dense = copy_of(model_folder())
    config = transformers.OlmoConfig(vocab_size=64, hidden_size=32, intermediate_size=44, num_hidden_layers=1)
    config.num_attention_heads = config.num_key_value_heads = 4
    transformers.OlmoForCausalLM(config).save_pretrained(dense)
    with pytest.raises(tersely.errors.AnatomyError, match="unknown model family 'olmo'"):
        shrink(dense, tmp_path / "out", text_file)
    assert not (tmp_path / "out").exists()

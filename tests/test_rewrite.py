"""Rewrites change weights and not the function, and do to outliers what their papers promise."""

import copy
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from families import TINY, tiny_batch, tiny_config, tiny_model
from tersely.anatomy import Anatomy, anatomy_of
from tersely.errors import AnatomyError, NumericalError, RecipeError
from tersely.kinds import LowRankLinear
from tersely.linalg.hadamard import flat_factors, has_hadamard, kronecker_apply, random_rotation
from tersely.rewrite import Rewrite, Rotate, Smooth
from tersely.rewrite.pre_sinq import FoldedSinkhorn
from tersely.rewrite.smooth import smoothing_scale
from tersely.stats import AbsMax, Stats

POST_NORM = {"bert": "residual stream itself", "distilbert": "residual stream itself"}
REFUSED = {
    "pre_sinq": POST_NORM,
    "smooth": POST_NORM,
    "rotate": POST_NORM
    | dict.fromkeys(("gemma2", "gemma3_text", "gemma3"), "it norms what attention and MLP add")
    | {"opt": r"model\.decoder\.project_out \(outside the blocks\)"},
}
SAME = {"pre_sinq": FoldedSinkhorn, "rotate": Rotate, "smooth": Smooth}  # merging an adapter has tests of its own
APPLIES = [(name, family) for name in SAME for family in TINY if family not in REFUSED[name]]


# --- applying a rewrite in memory -------------------------------------------------------------------------------------


def observed(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, Stats]:
    """Largest |x| of the input of every site, by hooks."""
    stats = {site.reads: Stats({AbsMax: AbsMax(site.in_features)}) for site in anatomy.sites}
    for reads, inputs in recorded(model, anatomy).items():
        stats[reads].update(inputs)
    return stats


def recorded(model: PreTrainedModel, anatomy: Anatomy, **batch: Tensor) -> dict[str, Tensor]:
    """Key of an input → its rows on the test batch."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda module, arguments, reads=site.reads: found.update({reads: arguments[0].detach().flatten(0, -2)})
        )
        for site in anatomy.sites
    ]
    logits(model, **batch)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def logits(model: PreTrainedModel, **batch: Tensor) -> Tensor:
    return model(**(batch or tiny_batch())).logits


def changes(rewrite: Rewrite, model: PreTrainedModel, **batch: Tensor) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Settings and tensors that a rewrite changes, as the runner would gather them."""
    anatomy = anatomy_of(model)
    rewrite.check(anatomy, model.config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in anatomy.tied}
    before = {name: tensor.clone() for name, tensor in state.items()}
    stats = observed(model, anatomy) if rewrite.needs else {}
    outside = {name: t for name, t in state.items() if not name.startswith(tuple(f"{b}." for b in anatomy.blocks))}
    changed = rewrite.outside(anatomy, outside)
    for index, block in enumerate(anatomy.blocks):
        inside = {name: tensor for name, tensor in state.items() if name.startswith(f"{block}.")}
        new = rewrite.block(anatomy, index, inside, stats)
        assert new.keys() <= inside.keys()
        changed |= new
    settings = rewrite.settings(anatomy)
    assert changed.keys() - state.keys() == (set(anatomy.tied) if settings else set())
    for name, tensor in changed.items():
        old = state.get(name, state[f"{anatomy.embeddings[0]}.weight"])
        assert (tensor.dtype, tensor.shape) == (old.dtype, old.shape)
        assert tensor.is_contiguous()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())  # nothing was written into
    return settings, changed


def rewritten(rewrite: Rewrite, model: PreTrainedModel) -> PreTrainedModel:
    settings, changed = changes(rewrite, model)
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        result = type(model)(config).to(model.dtype).eval()
    result.load_state_dict(model.state_dict() | changed, strict=True)
    return exact(result) if model.dtype == torch.float64 else result


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64 throughout; transformers computes an RMSNorm in float32 whatever the model's dtype."""
    model = model.double()
    model.set_experts_implementation("eager")  # the fast one knows no float64
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            epsilon = getattr(module, "variance_epsilon", None) or module.eps
            offset = float("Gemma" in type(module).__name__)
            module.forward = lambda x, module=module, epsilon=epsilon, offset=offset: (
                (module.weight + offset) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
            )
    return model


def assert_same_function(rewrite: Rewrite, config: PreTrainedConfig) -> PreTrainedModel:
    """In both precisions; returns the rewritten model in float64."""
    model = tiny_model(config.model_type, config=config)
    torch.testing.assert_close(logits(rewritten(rewrite, model)), logits(model), rtol=0, atol=1e-4)
    model = exact(model)
    result = rewritten(rewrite, model)
    torch.testing.assert_close(logits(result), logits(model), rtol=0, atol=1e-9)
    return result


# --- Hadamard matrices ------------------------------------------------------------------------------------------------


def multiplied_out(order: int) -> Tensor:
    return kronecker_apply(torch.eye(order, dtype=torch.float64), flat_factors(order))


def test_hadamard_matrices_of_all_orders_that_the_constructions_reach():
    reached = [order for order in range(1, 201) if has_hadamard(order)]
    assert {1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 48, 60, 68, 72, 76, 80, 84, 104, 108, 124, 128, 132, 140, 148} <= {
        *reached
    }
    assert all(order <= 2 or order % 4 == 0 for order in reached)
    for order in reached:
        matrix = multiplied_out(order)
        assert (matrix @ matrix.T - torch.eye(order, dtype=torch.float64)).abs().max() < 1e-10
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5))


@pytest.mark.parametrize("order", [896, 1536, 3584, 4096, 4864, 8960, 14336, 18944])
def test_widths_of_real_models_have_a_hadamard_matrix(order):
    assert has_hadamard(order)
    assert math.prod(factor.shape[0] for factor in flat_factors(order)) == order


@pytest.mark.parametrize("order", range(1, 70))
def test_every_order_has_a_flat_orthogonal_matrix_that_begins_with_a_constant_column(order):
    matrix = multiplied_out(order)
    assert (matrix @ matrix.T - torch.eye(order, dtype=torch.float64)).abs().max() < 1e-10
    assert matrix.abs().max() <= math.sqrt(2 / order) * (1 + 1e-12)
    torch.testing.assert_close(matrix[:, 0], torch.full((order,), order**-0.5, dtype=torch.float64))


def test_the_kronecker_product_is_the_one_of_the_factors():
    factors = flat_factors(12 * 128)
    assert [factor.shape[0] for factor in factors] == [12, 64, 2]
    product = torch.kron(torch.kron(factors[0], factors[1]), factors[2])
    x = torch.randn(3, 2, 1536, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kronecker_apply(x, factors), x @ product)


@pytest.mark.parametrize("hadamard", [True, False])
@pytest.mark.parametrize("order", [1, 2, 5, 24, 44, 64])
def test_rotations_are_orthogonal_and_keep_the_mean_where_asked(order, hadamard):
    identity = torch.eye(order, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for keep_mean in (False, True):
        matrix = random_rotation(order, generator, keep_mean=keep_mean, hadamard=hadamard).apply(identity)
        torch.testing.assert_close(matrix @ matrix.T, identity)
    ones = torch.ones(order, dtype=torch.float64)
    torch.testing.assert_close(matrix @ ones, ones)
    torch.testing.assert_close(matrix.T @ ones, ones)


def test_signs_come_first_so_that_a_constant_row_does_not_become_a_spike():
    rotation = random_rotation(1024, torch.Generator().manual_seed(0))
    assert rotation.apply(torch.ones(1, 1024)).abs().max() < 5.5  # √1024 = 32 without them
    spike = torch.zeros(1, 1024)
    spike[0, 7] = 32
    torch.testing.assert_close(rotation.apply(spike).abs(), torch.ones(1, 1024, dtype=torch.float64))


def test_no_rotation_of_order_zero():
    with pytest.raises(ValueError, match="1 or more"):
        flat_factors(0)


# --- the same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "family"), APPLIES)
def test_logits_stay_what_they_were(name, family):
    assert_same_function(SAME[name](), tiny_config(family))


@pytest.mark.parametrize(("name", "family"), [(name, family) for name in SAME for family in REFUSED[name]])
def test_a_refusal_says_why(name, family):
    model = tiny_model(family)
    with pytest.raises(AnatomyError, match=REFUSED[name][family]):
        SAME[name]().check(anatomy_of(model), model.config)


@pytest.mark.parametrize("name", SAME)
def test_the_one_opt_that_norms_after_its_sublayers_is_refused(name):
    model = tiny_model("opt", config=changed_config("opt", do_layer_norm_before=False))
    with pytest.raises(AnatomyError, match="residual stream itself"):
        SAME[name]().check(anatomy_of(model), model.config)


def changed_config(family: str, **settings: object) -> PreTrainedConfig:
    config = tiny_config(family)
    for name, value in settings.items():
        setattr(config, name, value)
    return config


ODDITIES = {
    "opt, plain": changed_config("opt", word_embed_proj_dim=32),
    "opt, no biases": changed_config("opt", word_embed_proj_dim=32, enable_bias=False),
    "opt, no last norm": changed_config("opt", word_embed_proj_dim=32, _remove_final_layer_norm=True),
    "llama, tied": changed_config("llama", tie_word_embeddings=True),
    "llama, biases": changed_config("llama", attention_bias=True, mlp_bias=True),
    "llama, odd width": changed_config("llama", hidden_size=28, head_dim=6, intermediate_size=10),
    "gpt2, untied": changed_config("gpt2", tie_word_embeddings=False),
    "gpt_neox, no biases": changed_config("gpt_neox", attention_bias=False),
    "gpt_neox, in sequence, tied": changed_config("gpt_neox", use_parallel_residual=False, tie_word_embeddings=True),
    "mixtral, tied": changed_config("mixtral", tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("oddity", ODDITIES)
def test_logits_stay_what_they_were_in_odd_members_of_a_family(name, oddity):
    assert_same_function(SAME[name](), copy.deepcopy(ODDITIES[oddity]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rotate", [Rotate(values=False), Rotate(seed=3), Rotate(basis="orthogonal")])
def test_every_field_of_rotate_leaves_the_logits(rotate, family):
    assert_same_function(rotate, tiny_config(family))


def test_rotations_without_gains_anywhere_are_exact_too():
    """Without a gain nothing tells a LayerNorm from an RMSNorm; a rotation that keeps the mean suits both."""
    config = changed_config("opt", word_embed_proj_dim=32, layer_norm_elementwise_affine=False)
    assert_same_function(Rotate(), config)
    with pytest.raises(AnatomyError, match="no norm with a gain"):
        Smooth().check(anatomy_of(tiny_model("opt", config=config)), config)


def test_a_sequence_of_rewrites_keeps_the_logits():
    model = exact(tiny_model("qwen2"))
    result = rewritten(Rotate(seed=1), rewritten(Smooth(), rewritten(Rotate(), model)))
    torch.testing.assert_close(logits(result), logits(model), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SAME)
def test_rewrites_are_deterministic(name):
    model = tiny_model("llama")
    _, first = changes(SAME[name](), model)
    _, second = changes(SAME[name](), model)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_loses_no_more_than_its_rounding(name, family):
    model = tiny_model(family).to(torch.bfloat16)
    result = rewritten(SAME[name](), model)
    difference = (logits(result) - logits(model)).float()
    assert difference.norm() < 0.03 * logits(model).float().norm()


@pytest.mark.parametrize("name", SAME)
def test_a_number_that_is_not_finite_is_an_error(name):
    model = tiny_model("llama")
    model.model.layers[0].self_attn.q_proj.weight.data[3, 5] = torch.inf
    with pytest.raises(NumericalError, match="not finite"):
        changes(SAME[name](), model)


@pytest.mark.parametrize("name", SAME)
def test_a_rewrite_names_its_paper(name):
    assert SAME[name].summary
    assert "arXiv" in SAME[name].paper


# --- smoothing --------------------------------------------------------------------------------------------------------


def test_with_half_strength_and_one_linear_inputs_and_weights_are_equally_large():
    """max_t |x_j / s_j| = max_i |W_ij s_j| = √(max|x_j| max|W_j|)."""
    model = exact(tiny_model("gpt2"))
    before, anatomy = observed(model, anatomy_of(model)), anatomy_of(model)
    weight = model.transformer.h[1].mlp.c_fc.weight.abs().amax(1)
    result = rewritten(Smooth(strength=0.5), model)
    after = observed(result, anatomy)["transformer.h.1:mlp.in"][AbsMax].mean()
    torch.testing.assert_close(after, result.transformer.h[1].mlp.c_fc.weight.abs().amax(1))
    torch.testing.assert_close(after, (before["transformer.h.1:mlp.in"][AbsMax].mean() * weight).sqrt())


def test_at_the_ends_one_side_becomes_even():
    model = exact(tiny_model("llama"))
    result = rewritten(Smooth(strength=1.0), model)
    after = observed(result, anatomy_of(model))["model.layers.0:attention.in"][AbsMax].mean()
    torch.testing.assert_close(after, torch.ones_like(after))
    attention = rewritten(Smooth(strength=0.0), model).model.layers[0].self_attn
    largest = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).abs().amax(0)
    torch.testing.assert_close(largest, torch.ones_like(largest))


def test_what_is_silent_or_unread_is_left_alone():
    inputs = torch.tensor([0.0, 4.0, 9.0, 1e-12], dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.0, 1.0, -1.0]], dtype=torch.float64)
    expected = torch.tensor([1.0, 1.0, 3.0, 1e-5], dtype=torch.float64)  # the last one at its bound
    torch.testing.assert_close(smoothing_scale(inputs, [weights], 0.5), expected)


def test_a_dead_channel_keeps_the_function():
    model = exact(tiny_model("llama"))
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[[0, 5]] = 0
        for linear in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
            linear.weight[:, 7] = 0
    result = rewritten(Smooth(), model)
    torch.testing.assert_close(logits(result), logits(model), rtol=0, atol=1e-9)
    before, after = model.model.layers, result.model.layers
    assert after[0].input_layernorm.weight[[0, 5]].tolist() == [0, 0]
    assert torch.equal(after[0].self_attn.q_proj.weight[:, 5], before[0].self_attn.q_proj.weight[:, 5])
    assert after[1].post_attention_layernorm.weight[7] == before[1].post_attention_layernorm.weight[7]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_norms_before_experts_are_left_alone_and_named(family):
    model = tiny_model(family)
    anatomy = anatomy_of(model)
    alone = Smooth().left_alone(anatomy)
    moe = [
        block for block in anatomy.blocks if any(kept.name.startswith(f"{block}.mlp.experts") for kept in anatomy.kept)
    ]
    assert alone == {f"{block}.post_attention_layernorm": "it also feeds a mixture of experts" for block in moe}
    _, changed = changes(Smooth(), model)
    norms = {norm.name for norm in anatomy.norms if norm.feeds != "head"}
    assert {name.removesuffix(".weight") for name in changed if "norm" in name} == norms - alone.keys()
    assert not any(".experts." in name for name in changed)


def low_rank(linear: nn.Linear, rank: int) -> LowRankLinear:
    u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    return LowRankLinear.from_factors(u[:, :rank] * s[:rank], v[:rank])


def test_factors_of_a_linear_are_smoothed_by_the_one_that_reads():
    model = exact(tiny_model("llama"))
    attention = model.model.layers[0].self_attn
    attention.q_proj = low_rank(attention.q_proj, 5)
    _, changed = changes(Smooth(), model)
    names = {name for name in changed if ".0.self_attn." in name}
    assert names == {f"model.layers.0.self_attn.{part}.weight" for part in ("q_proj.down", "k_proj", "v_proj")}
    before = logits(model)
    model.load_state_dict(changed, strict=False)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-9)


class Sealed(nn.Module):
    """Something that works like a linear and shows no weight."""

    in_features, out_features = 32, 5

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Buffer(torch.zeros(3))


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.q_proj.down", "mlp.up_proj"])
def test_what_cannot_be_scaled_is_named(path):
    model = tiny_model("llama")
    block = model.model.layers[1]
    block.self_attn.q_proj = low_rank(block.self_attn.q_proj, 5)
    block.set_submodule(path, Sealed())
    with pytest.raises(AnatomyError, match=rf"feeds model\.layers\.1\.{path} \(already Sealed\)"):
        Smooth().check(anatomy_of(model), model.config)


def test_what_reads_elsewhere_may_be_sealed():
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.q_proj = low_rank(attention.q_proj, 5)
    attention.q_proj.up = Sealed()
    attention.o_proj = Sealed()
    Smooth().check(anatomy_of(model), model.config)


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan])
def test_strength_is_a_share(strength):
    with pytest.raises(RecipeError, match="wanted 0"):
        Smooth(strength=strength)


# --- rotation ---------------------------------------------------------------------------------------------------------


def test_what_a_rotation_needs_of_a_model():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = low_rank(model.model.layers[1].mlp.up_proj, 3)
    with pytest.raises(AnatomyError, match=r"mlp of model\.layers\.1 has been replaced; rotate before"):
        Rotate().check(anatomy_of(model), model.config)
    model.model.layers[0].self_attn.o_proj = Sealed()
    with pytest.raises(AnatomyError, match=r"layers\.0\.self_attn\.o_proj \(already Sealed\) may read or write it"):
        Rotate().check(anatomy_of(model), model.config)
    for architecture in ("LlamaModel", "LlamaForSequenceClassification"):
        model = tiny_model("llama", architecture)
        with pytest.raises(AnatomyError, match="cannot be turned"):
            Rotate().check(anatomy_of(model), model.config)
    config = changed_config("gpt2", add_cross_attention=True)
    with pytest.raises(AnatomyError, match="without a known role"):
        Rotate().check(anatomy_of(tiny_model("gpt2", config=config)), config)
    with pytest.raises(RecipeError, match="did you mean 'hadamard'"):
        Rotate(basis="hadamar")


def test_a_bias_without_a_gain_moves_into_the_readers_or_is_refused():
    """GPT-2's q, k, v have biases that can take it over; the head has none."""
    model = exact(tiny_model("gpt2"))
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight[3] = 0
        model.transformer.ln_f.weight[4] = 0
        model.transformer.ln_f.bias[4] = 0
    result = rewritten(Rotate(), model)
    torch.testing.assert_close(logits(result), logits(model), rtol=0, atol=1e-9)
    assert result.transformer.h[0].ln_1.bias.abs().max() == 0
    with torch.no_grad():
        model.transformer.ln_f.bias[4] = 0.1
    with pytest.raises(AnatomyError, match=r"transformer\.ln_f: channel 4 has a gain of 0 beside a bias of 0\.1"):
        changes(Rotate(), model)


def test_gains_are_one_and_untouched_parts_stay():
    model = tiny_model("qwen3")
    _, changed = changes(Rotate(), model)
    anatomy = anatomy_of(model)
    for norm in anatomy.norms:
        assert torch.equal(changed[f"{norm.name}.weight"], torch.ones(32))
    assert not any(".q_norm." in name or ".k_norm." in name for name in changed)
    assert {f"{site.name}.weight" for site in anatomy.sites} <= changed.keys()
    _, changed = changes(Rotate(values=False), tiny_model("qwen2"))
    assert not any(name.endswith("bias") for name in changed)  # q, k and v add theirs outside the stream


def planted(*, outliers: bool = True) -> PreTrainedModel:
    """A llama of width 64 with a loud channel in its residual stream, and one in every value head, which what reads
    them hardly listens to."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
    )
    model = tiny_model("llama", config=config)
    if outliers:
        loud, head = 17, [5, 21]
        with torch.no_grad():
            model.model.embed_tokens.weight[:, loud] *= 20
            for block in model.model.layers:
                attention, mlp = block.self_attn, block.mlp
                for writer in (attention.o_proj, mlp.down_proj):
                    writer.weight[loud] *= 20
                for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                    reader.weight[:, loud] /= 20
                attention.v_proj.weight[head] *= 20
                attention.o_proj.weight[:, [5, 21, 37, 53]] /= 20
    return model


def kurtosis(x: Tensor) -> float:
    """Mean fourth power over the squared mean square: 3 for a Gaussian."""
    return (x.pow(4).mean() / x.square().mean().square()).item()


def peak(x: Tensor) -> float:
    """Largest entry of a row over its root mean square, on average over rows."""
    return (x.abs().amax(1) / x.square().mean(1).sqrt()).mean().item()


def four_bit_error(model: PreTrainedModel, site: str, x: Tensor) -> float:
    """Relative squared error of a linear's output when its input is rounded per token to 4 bits."""
    weight = model.get_submodule(site).weight.detach()
    step = x.abs().amax(1, keepdim=True) / 7
    off = ((x / step).round() * step - x) @ weight.T
    return (off.square().sum() / (x @ weight.T).square().sum()).item()


def measured(model: PreTrainedModel, site: str) -> tuple[float, float, float]:
    anatomy = anatomy_of(model)
    (reads,) = {known.reads for known in anatomy.sites if known.name == site}
    x = recorded(model, anatomy)[reads]
    return kurtosis(x), peak(x), four_bit_error(model, site, x)


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"])
def test_planted_outlier_channels_vanish(path):
    model = planted()
    result = rewritten(Rotate(), model)
    torch.testing.assert_close(logits(result), logits(model), rtol=0, atol=1e-4 * logits(model).abs().max().item())
    for block in range(2):
        before, after = (measured(m, f"model.layers.{block}.{path}") for m in (model, result))
        assert after[0] < before[0] / 2  # kurtosis
        assert after[1] < before[1] / 1.5  # largest over root mean square
        assert after[2] < before[2] / 4  # rounded to 4 bits


def test_without_outliers_a_rotation_changes_little():
    model = planted(outliers=False)
    site = "model.layers.1.mlp.gate_proj"
    before, after = measured(model, site), measured(rewritten(Rotate(), model), site)
    assert 0.5 < after[2] / before[2] < 2


def test_smoothing_lowers_planted_outliers_as_well():
    """Loud channels of the residual stream pass a norm; α moves them into the weights."""
    model = planted()
    site = "model.layers.0.self_attn.q_proj"
    peaks = [measured(rewritten(Smooth(strength=strength), model), site)[1] for strength in (0.25, 0.5, 0.75)]
    assert measured(model, site)[1] > peaks[0] > peaks[1] > peaks[2]


def test_both_rewrites_only_name_what_they_were_given():
    """`block` works with the tensors of that block alone."""
    model = tiny_model("phi3")
    anatomy = anatomy_of(model)
    state: Mapping[str, Tensor] = {
        name: tensor for name, tensor in model.state_dict().items() if name.startswith("model.layers.1.")
    }
    new = Rotate().block(anatomy, 1, state, {})
    assert new.keys() <= state.keys()

"""The cache of latents: nothing lost at full rank, the promised bytes, ranks where they count."""

import itertools
import json

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, PreTrainedModel, StaticCache

from families import tiny_batch, tiny_model
from tersely.anatomy import Unit, anatomy_of
from tersely.cache import CACHES, LatentCache, dense_bytes_per_token
from tersely.convert import attention_settings
from tersely.errors import AnatomyError, NumericalError, RecipeError
from tersely.hf import manifest_config
from tersely.kinds import manifest_of
from tersely.stats import AbsMean, Gram, Stats
from test_attention import exchanged

CACHE = ["llama", "mistral", "qwen2", "qwen3"]
VARIANTS = {"channels": LatentCache(), "gram": LatentCache(metric="gram"), "plain": LatentCache(alpha=0.0)}

every_variant = pytest.mark.parametrize("method", VARIANTS.values(), ids=VARIANTS)
every_family = pytest.mark.parametrize("family", CACHE)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def observed(x: Tensor) -> dict[str, Stats]:
    stats = Stats({kind: kind(x.shape[1]) for kind in (Gram, AbsMean)})
    stats.update(x)
    return {"k": stats, "v": stats}


def inputs(width: int) -> Tensor:
    """Correlated, of channels that differ in size by 100."""
    return normal(60, width, seed=7) @ normal(width, width, seed=8) * torch.logspace(-1, 1, width, dtype=torch.float64)


def unit_of(model: PreTrainedModel) -> Unit:
    return next(unit for unit in anatomy_of(model).units if unit.role == "attention")


def latent(model: PreTrainedModel, rank: int | None = None, method: LatentCache = VARIANTS["gram"]) -> PreTrainedModel:
    """The model with a cache of latents, at full rank by default."""
    stats = observed(inputs(model.config.hidden_size))

    def make(unit, weights, biases, settings):
        amount = {role: rank or min(weights[role].shape) for role in ("k", "v")}
        return method.compress(unit, weights, biases, stats, amount, settings)

    return exchanged(model, make)


def error(weight: Tensor, instead: Tensor, x: Tensor) -> float:
    return ((weight - instead.double()) @ x.T).square().sum().item() / len(x)


# --- the model that it leaves behind ----------------------------------------------------------------------------------


@every_family
def test_full_rank_gives_the_same_logits(family):
    model, batch = tiny_model(family), tiny_batch()
    with torch.no_grad():
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            torch.testing.assert_close(latent(model)(**batch).logits, model(**batch).logits, atol=5e-6, rtol=0)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "static-beams": {"cache_implementation": "static", "num_beams": 2},
}


@every_family
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_full_rank_generates_the_same_tokens_from_rows_padded_on_the_left(family, mode):
    model, batch = tiny_model(family), tiny_batch()
    turned = {name: tensor.flip(1) for name, tensor in batch.items()}
    assert turned["attention_mask"][1, 0] == 0
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | mode
    assert torch.equal(latent(model).generate(**turned, **settings), model.generate(**turned, **settings))


def test_a_guessed_continuation_is_taken_back_without_a_trace():
    """Tokens looked up in the prompt are tried several at once, and cropped off the cache where they are wrong."""
    model = tiny_model("llama")
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cut = latent(model, 5)
    assert torch.equal(
        cut.generate(prompt, prompt_lookup_num_tokens=3, **settings), cut.generate(prompt, use_cache=False, **settings)
    )


@every_family
def test_with_a_cache_it_answers_as_without_at_any_rank(family):
    cut, tokens = latent(tiny_model(family), 3), tiny_batch()["input_ids"]
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(cut.generate(tokens[:1], **settings), cut.generate(tokens[:1], use_cache=False, **settings))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_the_cache_holds_the_promised_bytes(static):
    model = tiny_model("llama")
    cut, unit = latent(model, 3), unit_of(model)
    cache = StaticCache(cut.config, max_cache_len=12) if static else DynamicCache()
    with torch.no_grad():
        cut(tiny_batch()["input_ids"], past_key_values=cache)
    for layer in cache.layers:
        held = sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
        assert held == 2 * 12 * (3 + 3) * 4
    promised = next(o for o in LatentCache().sizes(unit, 4) if o.amount == 6)
    assert promised.nbytes == (3 + 3) * 4
    assert dense_bytes_per_token(unit, 4) == 2 * 2 * 8 * 4  # keys and values of two heads of width 8


@every_family
def test_a_folder_opens_to_the_same_model_and_only_with_the_manifest(family, tmp_path):
    cut, batch = latent(tiny_model(family), 5), {name: tensor.flip(1) for name, tensor in tiny_batch().items()}
    cut.config.quantization_config = manifest_config(manifest_of(cut))
    cut.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, cut(**batch).logits)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(**batch, **settings), cut.generate(**batch, **settings))
    halved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before, after = cut.model.layers[1].self_attn, halved.model.layers[1].self_attn
    assert torch.equal(after.positions.frequencies, before.positions.frequencies)
    assert after.k_proj.down.weight.dtype == torch.bfloat16
    # a reader that knows nothing of tersely
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_guard_stops_the_concrete_class_too(tmp_path):
    latent(tiny_model("llama"), 5).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        LlamaForCausalLM.from_pretrained(tmp_path)


# --- the method -------------------------------------------------------------------------------------------------------


def case(family: str = "qwen2") -> tuple[PreTrainedModel, Unit, dict[str, Tensor], Tensor]:
    """Weights of the shapes that the family has, in float64."""
    model = tiny_model(family)
    unit = unit_of(model)
    sites = {role: unit.sites[role] for role in "qkvo"}
    weights = {role: normal(s.out_features, s.in_features, seed=ord(role)) for role, s in sites.items()}
    weights["k"][3:] *= 0.1  # keys that are nearly of rank 3
    return model, unit, weights, inputs(model.config.hidden_size)


@every_variant
def test_predicted_errors_are_those_of_the_result(method):
    model, unit, weights, x = case()
    stats, settings = observed(x), attention_settings(model, unit)
    options = method.options(unit, weights, stats)
    energy = {role: error(weights[role], torch.zeros(()), x) for role in "kv"}
    assert options[0].amount == 0 and options[0].error == pytest.approx(sum(energy.values()), rel=1e-9)
    for option in options[1::5]:
        made = method.compress(unit, weights, {}, stats, option.amount, settings)[""]
        dense = {role: made.get_submodule(f"{role}_proj").to_dense() for role in "kv"}
        lost = sum(error(weights[role], dense[role], x) / energy[role] for role in "kv") / 2
        assert option.error / options[0].error == pytest.approx(lost, abs=1e-10)
        assert option.nbytes == (made.k_proj.rank + made.v_proj.rank) * 8
    assert options[-1].error < 1e-10 * options[0].error


@every_variant
def test_of_all_divisions_the_best_is_taken(method):
    model, unit, weights, x = case()
    stats, settings = observed(x), attention_settings(model, unit)
    options = method.options(unit, weights, stats)
    left = method._left_over(weights, stats)
    pairs = list(itertools.product(range(1, 17), range(1, 17)))
    for option in options[1:]:
        total = option.amount["k"] + option.amount["v"]
        shares = [
            (left["k"][k] / left["k"][0] + left["v"][v] / left["v"][0]).item() for k, v in pairs if k + v == total
        ]
        assert option.error / options[0].error == pytest.approx(min(shares) / 2, abs=1e-14)
    assert options[6].amount["v"] > options[6].amount["k"]  # the keys need little
    # a total is divided the same way once the inputs are known
    made = method.compress(unit, weights, {}, stats, 7, settings)[""]
    assert {"k": made.k_proj.rank, "v": made.v_proj.rank} == options[6].amount


@every_variant
def test_more_bytes_never_promise_more_error(method):
    _, unit, weights, x = case("qwen3")
    options = method.options(unit, weights, observed(x))
    assert all(after.error <= before.error for before, after in itertools.pairwise(options))
    assert all(after.nbytes > before.nbytes for before, after in itertools.pairwise(options))


def test_the_metric_of_the_error_is_the_better_one():
    _, unit, weights, x = case()
    best, papers = (VARIANTS[name].options(unit, weights, observed(x)) for name in ("gram", "channels"))
    # its damping of 1e-6 is all that could make a difference the other way
    assert all(ours.error <= theirs.error * (1 + 1e-5) for ours, theirs in zip(best, papers, strict=True))
    assert best[8].error < 0.9 * papers[8].error


@every_family
def test_sizes_are_those_of_the_options(family):
    _, unit, weights, x = case(family)
    sizes, options = LatentCache().sizes(unit, 8), LatentCache().options(unit, weights, observed(x))
    assert [size.nbytes for size in sizes] == [option.nbytes for option in options]
    assert all(size.error is None and size.amount * 8 == size.nbytes for size in sizes)
    assert options[-1].amount == {role: min(weights[role].shape) for role in "kv"}


def test_biases_come_after_the_cache():
    model = tiny_model("qwen2")
    cut = latent(model).model.layers[0].self_attn
    stock = model.model.layers[0].self_attn
    assert cut.k_proj.down.bias is None and torch.equal(cut.k_proj.up.bias, stock.k_proj.bias)
    assert torch.equal(cut.q_proj.bias, stock.q_proj.bias) and cut.o_proj.bias is None


def test_numbers_are_its_own_and_keep_their_dtype():
    model = tiny_model("qwen3").bfloat16()
    cut = latent(model, 4)
    attention = cut.model.layers[0].self_attn
    assert {p.dtype for p in attention.parameters()} == {torch.bfloat16}
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not pointers & {p.data_ptr() for p in attention.parameters()}
    with torch.no_grad():
        assert cut(**tiny_batch()).logits.isfinite().all()


@every_variant
def test_silent_inputs_and_dead_weights_are_no_trouble(method):
    model, unit, weights, x = case()
    weights["v"].zero_()
    settings = attention_settings(model, unit)
    for quiet in (observed(torch.zeros(9, x.shape[1])), observed(x[:2])):
        options = method.options(unit, weights, quiet)
        assert all(option.error >= 0 for option in options)
        made = method.compress(unit, weights, {}, quiet, options[9].amount, settings)[""]
        assert all(p.isfinite().all() for p in made.parameters())
    with pytest.raises(NumericalError):
        method.options(unit, weights | {"k": weights["k"] * torch.nan}, observed(x))


@pytest.mark.parametrize("amount", [1, 33, "4", {"k": 4}, {"k": 0, "v": 4}, {"k": 99, "v": 4}])
def test_a_wrong_amount_is_refused(amount):
    model, unit, weights, x = case()
    with pytest.raises(RecipeError, match="wanted"):
        LatentCache().compress(unit, weights, {}, observed(x), amount, attention_settings(model, unit))


@pytest.mark.parametrize("fields", [{"metric": "hessian"}, {"alpha": 1.5}, {"alpha": float("nan")}])
def test_wrong_fields_are_refused(fields):
    with pytest.raises(RecipeError, match="wanted"):
        LatentCache(**fields)


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_fused_attention_is_refused(family):
    with pytest.raises(AnatomyError, match="separate"):
        LatentCache().check(unit_of(tiny_model(family)))
    LatentCache().check(unit_of(tiny_model("llama")))


def test_the_table_is_complete():
    assert CACHES["latent"]() == LatentCache()
    assert set(LatentCache().needs) == {AbsMean, Gram} and LatentCache(metric="gram").needs == (Gram,)

"""The attention kind: against sums written out by hand, against the stock attention, and what it refuses."""

import copy
from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from families import tiny_batch, tiny_config, tiny_model
from tersely.anatomy import Unit, anatomy_of
from tersely.convert import AttentionSettings, FoPE, attention_settings, norm_tensors
from tersely.errors import AnatomyError, CheckpointError, RecipeError
from tersely.kinds import Kind, LowRankLinear, Made
from tersely.kinds.attention import Attention, AttentionShape, PositionTables, linear_of

Make = Callable[[Unit, Mapping[str, Tensor], Mapping[str, Tensor], AttentionSettings], dict[str, Kind]]

# two queries to a key head, three widths that all differ, scores not scaled by a width
SHAPE = AttentionShape(
    layer=0,
    hidden=12,
    query_heads=4,
    key_value_heads=2,
    key_width=6,
    value_width=5,
    scaling=0.3,
    sliding_window=None,
    dropout=0.0,
    norm_eps=None,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exchanged(model: PreTrainedModel, make: Make) -> PreTrainedModel:
    """A copy of the model whose attention was made by a conversion or a cache, as a run does it."""
    model = copy.deepcopy(model)
    for unit in anatomy_of(model).units:
        if unit.role == "attention":
            settings = attention_settings(model, unit)
            linears = {role: model.get_submodule(site.name) for role, site in unit.sites.items()}
            weights = {role: linear.weight for role, linear in linears.items()}
            weights |= {name: model.get_parameter(path) for name, path in norm_tensors(unit, settings).items()}
            biases = {role: linear.bias for role, linear in linears.items() if linear.bias is not None}
            model.set_submodule(unit.module, make(unit, weights, biases, settings)[""].eval())
    return model


def odd_attention(*, latent: bool = False, **changes: object) -> Attention:
    """Tables per key head, of two frequencies where there are three pairs; float64."""
    shape = AttentionShape(**vars(SHAPE) | changes)  # type: ignore[arg-type]
    tables = PositionTables.of(
        torch.tensor([[1.0, 0.1], [0.7, 0.3]]),
        pairs=3,
        series=(normal(2, 2, 2, seed=1), normal(2, 2, 2, seed=2)),
        rest_sine=1.0,
        scaling=1.1,
    )
    rows = {"q": 24, "k": 12, "v": 10}
    linears: dict[str, nn.Module] = {
        role: linear_of(normal(count, 12, seed=count), normal(count, seed=count + 1)) for role, count in rows.items()
    }
    linears["o"] = linear_of(normal(12, 20), None)
    if latent:
        for role, rank in {"k": 3, "v": 4}.items():
            factors = LowRankLinear.from_factors(normal(rows[role], rank, seed=3), normal(rank, 12, seed=4))
            factors.set_bias(normal(rows[role], seed=5))
            linears[role] = factors
    return Attention.of(shape, tables, linears, {}, latent=latent).eval()


def by_hand(module: Attention, x: Tensor, position: Tensor) -> Tensor:
    """One text, one head and one query at a time."""
    shape, tables = module.shape, module.positions
    frequencies = tables.frequencies.view(torch.float32)
    of_cosine, of_sine = (bits.view(torch.float32).double() for bits in (tables.cosine, tables.sine))
    query, key, value = module.q_proj(x), module.k_proj(x), module.v_proj(x)

    def turned(vector: Tensor, head: int, t: int) -> Tensor:
        angle = (t * frequencies[head]).double()  # the product is rounded to float32, as in every model
        cosine = torch.cat([angle.cos() @ of_cosine[head], torch.ones(1)]) * 1.1
        sine = torch.cat([angle.sin() @ of_sine[head], torch.ones(1)]) * 1.1
        first, second = vector[:3], vector[3:]
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine])

    rows = []
    for t in range(len(x)):
        heads = []
        for head in range(shape.query_heads):
            of = head // 2
            asks = turned(query[t, head * 6 : head * 6 + 6], of, int(position[t]))
            begin = 0 if shape.sliding_window is None else max(0, t + 1 - shape.sliding_window)
            seen = range(begin, t + 1)
            keys = [turned(key[s, of * 6 : of * 6 + 6], of, int(position[s])) for s in seen]
            weights = torch.softmax(torch.stack([asks @ k for k in keys]) * shape.scaling, 0)
            heads.append(sum(w * value[s, of * 5 : of * 5 + 5] for w, s in zip(weights, seen, strict=True)))
        rows.append(torch.cat(heads))
    return module.o_proj(torch.stack(rows))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Tables are of float32, whatever the model is."""
    return (a - b).abs().max().item() <= tolerance * b.abs().max().item()


both = pytest.mark.parametrize("latent", [False, True], ids=["plain", "latent"])
windows = pytest.mark.parametrize("window", [None, 3], ids=["all", "window"])


# --- the sum it stands for --------------------------------------------------------------------------------------------


@both
@windows
def test_it_is_the_sum_written_out(latent, window):
    module, x = odd_attention(latent=latent, sliding_window=window), normal(7, 12)
    position = torch.arange(7) + 300
    out, weights = module(x[None], position_ids=position[None])
    assert weights is None and out.dtype == torch.float64
    assert close(out[0], by_hand(module, x, position))


@both
@windows
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_cache_changes_nothing(latent, window, static):
    """A prompt of four tokens, then two at once, then one: with and without masks from outside."""
    module, x = odd_attention(latent=latent, sliding_window=window), normal(2, 7, 12)
    position = torch.arange(7)[None]
    whole, _ = module(x, position_ids=position)
    config = tiny_config("llama")
    cache = StaticCache(config, max_cache_len=10) if static else DynamicCache()
    parts = [
        module(x[:, a:b], position_ids=position[:, a:b], past_key_values=cache)[0] for a, b in pairwise((0, 4, 6, 7))
    ]
    assert close(torch.cat(parts, 1), whole)
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert keys.shape[1:] == ((1, keys.shape[2], 3) if latent else (2, keys.shape[2], 6))
    assert values.shape[1:] == ((1, keys.shape[2], 4) if latent else (2, keys.shape[2], 5))


@both
def test_masks_are_followed(latent):
    module, x, position = odd_attention(latent=latent), normal(2, 5, 12), torch.arange(5)[None]
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    allowed[:, 1] = False
    allowed[1, 1] = True
    added = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    out, _ = module(x, None, allowed[None, None], position_ids=position)
    assert close(module(x, None, added[None, None], position_ids=position)[0], out)
    without = torch.tensor([0, 2, 3, 4])
    assert close(module(x[:, without], position_ids=without[None])[0], out[:, without])


def test_a_cropped_and_reordered_cache_of_latents_goes_on():
    module, x, position = odd_attention(latent=True), normal(2, 7, 12), torch.arange(7)[None]
    cache = DynamicCache()
    module(x[:, :6], position_ids=position[:, :6], past_key_values=cache)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    out, _ = module(x[[1, 0], 4:], position_ids=position[:, 4:], past_key_values=cache)
    assert close(out, module(x[[1, 0]], position_ids=position)[0][:, 4:])


# --- a module that describes itself -----------------------------------------------------------------------------------


@both
def test_a_module_is_rebuilt_from_plain_values_and_its_numbers(latent):
    module, x = odd_attention(latent=latent), normal(1, 5, 12)
    made = Made.of(module)
    again = made.build()
    again.load_state_dict(made.state, assign=True)
    position = torch.arange(5)[None]
    assert torch.equal(again.eval()(x, position_ids=position)[0], module(x, position_ids=position)[0])
    assert Made.of(again).specs == made.specs
    assert list(made.specs) == ([""] if not latent else ["", "k_proj", "v_proj"])
    assert module.nbytes() == sum(t.numel() * t.element_size() for t in made.state.values())


def test_children_come_in_order_of_execution():
    names = [name for name, _ in odd_attention(norm_eps=None).named_children()]
    assert [name for name in names if name.endswith("_proj")] == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_tables_survive_every_cast():
    module = odd_attention()
    before = module.positions(torch.tensor([[100_000]]), torch.float32)
    for cast in (module.half(), module.bfloat16(), module.to(torch.float64)):
        after = cast.positions(torch.tensor([[100_000]]), torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_tables_are_exact_far_out_where_16_bits_are_not():
    frequencies = 10_000.0 ** -(torch.arange(16) / 16)
    position = torch.arange(4096)
    cosine, _ = PositionTables.of(frequencies[None], pairs=16)(position[None], torch.float32)
    exact = torch.cos(position.double()[:, None] * frequencies.double())
    assert (cosine[0, 0, :, :16] - exact).abs().max() < 4e-4  # 4096 · 2⁻²⁴, the rounding of the largest angle
    halved = torch.cos(position[:, None].bfloat16() * frequencies.bfloat16()).double()
    assert (halved[257:] - exact[257:]).abs().max() > 0.5


def test_autocast_leaves_the_tables_alone():
    module, position = odd_attention().float(), torch.arange(600, 620)[None]
    cosine, sine = module.positions(position, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = module.positions(position, torch.float32)
    assert torch.equal(again[0], cosine) and torch.equal(again[1], sine)


def test_dropout_is_for_training():
    module, x, position = odd_attention(dropout=0.5), normal(1, 5, 12), torch.arange(5)[None]
    still = module(x, position_ids=position)[0]
    assert torch.equal(module(x, position_ids=position)[0], still)
    with torch.random.fork_rng(devices=[]):
        assert not torch.allclose(module.train()(x, position_ids=position)[0], still)


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"attention_mask": torch.ones(1, 5)}, RecipeError, "four axes, not 2-D"),
        ({"attention_mask": {"full": None}}, RecipeError, "four axes, not dict"),
        ({"output_attentions": True}, RecipeError, "output_attentions"),
        ({"position_ids": None}, AnatomyError, "position_ids"),
    ],
)
def test_what_it_cannot_do_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        odd_attention()(normal(1, 5, 12), **{"position_ids": torch.arange(5)[None]} | call)


def test_latents_of_rows_with_gaps_are_refused():
    """Positions of cached tokens are counted back; pads on the left are fine, pads in between or counted pads not."""
    module, x = odd_attention(latent=True), normal(1, 5, 12)

    def prompt(positions: list[int], visible: list[int]) -> None:
        mask = torch.ones(5, 5, dtype=torch.bool).tril() & torch.tensor(visible, dtype=torch.bool)
        for of in (mask, torch.where(mask, 0.0, torch.finfo(torch.float32).min)):
            cache = DynamicCache()
            module(x, None, of[None, None], past_key_values=cache, position_ids=torch.tensor([positions]))

    prompt([0, 0, 0, 1, 2], [0, 0, 1, 1, 1])
    prompt([0, 1, 2, 3, 4], [1, 1, 1, 0, 0])  # pads on the right that count: the next token counts on
    for positions, visible in (([0, 1, 0, 0, 2], [1, 1, 0, 0, 1]), ([0, 1, 2, 0, 0], [1, 1, 1, 0, 0])):
        with pytest.raises(RecipeError, match="without gaps"):
            prompt(positions, visible)
    module(x, position_ids=torch.tensor([[0, 1, 0, 1, 2]]))  # without a cache nothing has to be counted


def test_a_latent_cache_needs_factors():
    module = odd_attention(latent=True)
    module.k_proj = linear_of(normal(12, 12), None)
    with pytest.raises(CheckpointError, match="low rank, found Linear"):
        module(normal(1, 5, 12), position_ids=torch.arange(5)[None])


# --- reading the stock attention --------------------------------------------------------------------------------------


def same(unit, weights, biases, settings):
    return FoPE(gain=0, clip=False, series=False).convert(unit, weights, biases, settings)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
def test_with_stock_tables_it_is_the_stock_attention_bit_for_bit(family):
    model, batch = tiny_model(family), tiny_batch()
    with torch.no_grad():
        assert torch.equal(exchanged(model, same)(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_positions_are_taken_over(rope):
    config = tiny_config("llama")
    config.rope_parameters = {"rope_theta": 10_000.0} | rope
    model, batch = tiny_model("llama", config=config), tiny_batch()
    unit = next(unit for unit in anatomy_of(model).units if unit.role == "attention")
    settings = attention_settings(model, unit)
    assert settings.frequencies != attention_settings(tiny_model("llama"), unit).frequencies
    assert (settings.table_scaling != 1) == (rope["rope_type"] == "yarn")
    assert settings.shape.scaling == 8**-0.5 and settings.train_length == 64
    with torch.no_grad():
        assert torch.equal(exchanged(model, same)(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma2", "caps its scores"),
        ("gemma3_text", "no RMS norm of a kind known here"),
        ("opt", "wanted a linear model.decoder.layers.0.self_attn.o_proj"),
        ("gpt2", "wanted a linear transformer.h.0.attn.q_proj for q"),
        ("bert", "wanted a linear bert.encoder.layer.0.attention.self.q_proj"),
    ],
)
def test_other_attention_is_refused(family, message):
    model = tiny_model(family)
    unit = next(unit for unit in anatomy_of(model).units if unit.role == "attention")
    with pytest.raises(AnatomyError, match=message):
        attention_settings(model, unit)


def broken(change: Callable[[PreTrainedModel], None]) -> PreTrainedModel:
    model = tiny_model("llama")
    change(model)
    return model


def _grow(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))


def _dynamic(model: PreTrainedModel) -> None:
    model.model.rotary_emb.rope_type = "dynamic"


def _second(model: PreTrainedModel) -> None:
    model.model.local = LlamaRotaryEmbedding(model.config)


def _both_ways(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.is_causal = False


def _partly(model: PreTrainedModel) -> None:
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq[:2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_grow, "parameters that are not known here: sinks"),
        (_dynamic, "type 'dynamic'"),
        (_second, "2 rotary modules"),
        (_both_ways, "not causal"),
        (_partly, "2 rotary frequencies for heads of width 8"),
    ],
)
def test_a_difference_is_never_overlooked(change, message):
    model = broken(change)
    unit = next(unit for unit in anatomy_of(tiny_model("llama")).units if unit.role == "attention")
    with pytest.raises(AnatomyError, match=message):
        attention_settings(model, unit)

"""FoPE: RoPE in the limit, constants where frequencies are clipped, tables that a folder keeps."""

import json
import math

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import tiny_batch, tiny_config, tiny_model
from tersely.anatomy import anatomy_of
from tersely.convert import CONVERSIONS, AttentionSettings, FoPE
from tersely.errors import AnatomyError, RecipeError
from tersely.hf import manifest_config
from tersely.kinds import manifest_of
from tersely.kinds.attention import AttentionShape
from test_attention import exchanged

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
every_family = pytest.mark.parametrize("family", FAMILIES)


def settings(width: int = 64, theta: float = 1e4, length: int = 512, heads: int = 2) -> AttentionSettings:
    """Of a model with plain rotary positions."""
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float) / width)
    shape = AttentionShape(0, 8, heads, heads, width, width, width**-0.5, None, 0.0, None)
    return AttentionSettings(shape, tuple(frequencies.tolist()), 1.0, length)


def fope(model: PreTrainedModel, **fields: object) -> PreTrainedModel:
    conversion = FoPE(**fields)  # type: ignore[arg-type]
    return exchanged(model, conversion.convert)


def rotated(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = tables
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((-second, first), -1) * sine


def scores(fields: dict, lag: int, places: Tensor) -> Tensor:
    """Scores of one query and one key at a fixed distance, over many places: [places]."""
    model = settings()
    tables = FoPE(**fields).tables(model)
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, 1, 2, 1, 64, generator=generator)
    asked = rotated(query, tables(places[None], torch.float32))
    asks = rotated(key, tables(places[None] - lag, torch.float32))
    return (asked * asks).sum(-1)[0, 0]


# --- the limit --------------------------------------------------------------------------------------------------------


@every_family
def test_without_gain_and_clip_it_is_rope_bit_for_bit(family):
    model, batch = tiny_model(family), tiny_batch()
    with torch.no_grad():
        for series in (True, False):
            cut = fope(model, gain=0.0, clip=False, series=series)
            assert torch.equal(cut(**batch).logits, model(**batch).logits)


def test_without_gain_the_kept_frequencies_are_those_of_rope():
    model = settings()
    position = torch.tensor([[0, 1, 17, 400]])
    cosine, sine = FoPE(gain=0.0).tables(model)(position, torch.float32)
    angles = position[0, :, None].float() * torch.tensor(model.frequencies)[:16]
    assert torch.equal(cosine[0, 0, :, :16], angles.cos()) and torch.equal(sine[0, 1, :, :16], angles.sin())


@pytest.mark.parametrize(
    ("width", "theta", "length", "kept"),
    [
        (64, 1e4, 512, 16),
        (64, 1e4, 1024, 18),
        (64, 1e4, 2048, 21),
        (128, 1e4, 512, 31),
        (128, 1e4, 4096, 46),
        (128, 5e5, 8192, 35),
        (128, 1e6, 32768, 40),
        (128, 5e6, 262144, 45),
    ],
)
def test_as_many_frequencies_are_kept_as_complete_a_turn(width, theta, length, kept):
    tables = FoPE().tables(settings(width, theta, length))
    assert tables.shape.frequencies == kept and tables.shape.pairs == width // 2
    assert FoPE(train_length=length).tables(settings(width, theta, 7)).shape.frequencies == kept
    assert FoPE(clip=False).tables(settings(width, theta, length)).shape.frequencies == width // 2


@pytest.mark.parametrize(("rest_sine", "factor"), [(1, 2.0), (0, 1.0)])
def test_clipped_pairs_contribute_the_plain_product(rest_sine, factor):
    """Twice that with the constant (1, 1), whatever the positions are."""
    tables = FoPE(gain=0.0, rest_sine=rest_sine).tables(settings())
    clipped = torch.arange(64) % 32 >= 16
    query, key = torch.randn(2, 1, 2, 3, 64, generator=torch.Generator().manual_seed(0)) * clipped
    asked = rotated(query, tables(torch.tensor([[900, 3, 512]]), torch.float32))
    asks = rotated(key, tables(torch.tensor([[2, 4096, 77]]), torch.float32))
    torch.testing.assert_close((asked * asks).sum(-1), factor * (query * key).sum(-1))


def test_a_score_depends_on_the_distance_alone_only_without_gain():
    places = torch.arange(40, 1040)
    still = scores({"gain": 0.0}, 30, places).std()
    assert still < 1e-4
    # the other frequencies move it, more with more gain, and evenly: it is no drift
    small, large = (scores({"gain": gain}, 30, places) for gain in (0.1, 0.4))
    assert 0.1 < small.std() < large.std()
    assert abs(large[:500].mean() - large[500:].mean()) < large.std()


# --- the coefficients -------------------------------------------------------------------------------------------------


def test_coefficients_are_the_identity_and_noise_of_the_stated_size():
    tables = FoPE(gain=0.4, clip=False).tables(settings(256, heads=8))
    for bits in (tables.cosine, tables.sine):
        noise = bits.view(torch.float32) - torch.eye(128)
        assert noise.shape == (8, 128, 128)
        assert noise.std().item() == pytest.approx(0.4 / math.sqrt(128), rel=0.01)
        assert abs(noise.mean().item()) < 3 * 0.4 / math.sqrt(128) / math.sqrt(noise.numel())
    assert not torch.equal(tables.cosine, tables.sine)


def test_layers_share_their_coefficients_heads_do_not():
    model = fope(tiny_model("llama"), clip=False)
    first, second = (layer.self_attn.positions for layer in model.model.layers)
    assert torch.equal(first.cosine, second.cosine) and torch.equal(first.sine, second.sine)
    assert not torch.equal(first.cosine[0], first.cosine[1])
    other = fope(tiny_model("llama"), clip=False, seed=1).model.layers[0].self_attn.positions
    assert not torch.equal(other.cosine, first.cosine)


def test_no_global_random_numbers_are_drawn():
    before = torch.random.get_rng_state()
    FoPE().tables(settings())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_scaled_positions_are_scaled_first_and_then_mixed():
    """Interpolated frequencies are lower, so fewer complete a turn; the factor of the tables is kept."""
    config = tiny_config("llama")
    config.rope_parameters = {"rope_theta": 100.0, "rope_type": "yarn", "factor": 8.0}
    config.rope_parameters["original_max_position_embeddings"] = 16
    cut = fope(tiny_model("llama", config=config), gain=0.0)
    tables = cut.model.layers[0].self_attn.positions
    plain = tiny_config("llama")
    plain.rope_parameters = {"rope_theta": 100.0, "rope_type": "default"}
    stock = fope(tiny_model("llama", config=plain), gain=0.0).model.layers[0].self_attn.positions
    assert tables.shape.frequencies < stock.shape.frequencies
    cosine, _ = tables(torch.zeros(1, 1, dtype=torch.long), torch.float32)
    torch.testing.assert_close(cosine, torch.full_like(cosine, tables.shape.scaling))
    assert tables.shape.scaling > 1


# --- the model that it leaves behind ----------------------------------------------------------------------------------


@every_family
def test_with_a_cache_it_generates_as_without(family):
    model, batch = fope(tiny_model(family), gain=0.5), tiny_batch()
    turned = {name: tensor.flip(1) for name, tensor in batch.items()}
    plain = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**turned, **plain, use_cache=False)
    assert torch.equal(model.generate(**turned, **plain), expected)
    assert torch.equal(model.generate(**turned, **plain, cache_implementation="static"), expected)


def test_the_keys_in_the_cache_are_those_of_the_stock_shape():
    model = fope(tiny_model("llama"))
    with torch.no_grad():
        cache = model(tiny_batch()["input_ids"], use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == cache.layers[0].values.shape == (2, 2, 12, 8)


@every_family
def test_a_folder_keeps_the_tables_and_opens_only_with_the_manifest(family, tmp_path):
    model, batch = fope(tiny_model(family), gain=0.5), tiny_batch()
    model.config.quantization_config = manifest_config(manifest_of(model))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    halved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).model.layers[1].self_attn
    assert torch.equal(halved.positions.cosine, model.model.layers[1].self_attn.positions.cosine)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_it_can_be_trained():
    model = fope(tiny_model("llama"), gain=0.5)
    tokens = tiny_batch()["input_ids"][:1]
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{"gain": -0.1}, {"gain": math.inf}, {"gain": math.nan}, {"train_length": 0}, {"rest_sine": 2}]
)
def test_wrong_fields_are_refused(fields):
    with pytest.raises(RecipeError, match="wanted"):
        FoPE(**fields)


def test_a_training_length_in_which_nothing_turns_is_refused():
    with pytest.raises(AnatomyError, match="none of the 32 rotary frequencies completes a turn in 6 tokens"):
        FoPE(train_length=6).tables(settings())
    assert FoPE(train_length=7).tables(settings()).shape.frequencies == 1


def test_what_is_no_attention_is_refused():
    units = anatomy_of(tiny_model("llama")).units
    for unit in units:
        if unit.role == "attention":
            FoPE().check(unit, settings())
        else:
            with pytest.raises(AnatomyError, match="no attention"):
                FoPE().check(unit, settings())
    assert CONVERSIONS["fope"]() == FoPE()

"""Every cache and every conversion keeps its contract: another attention, in the place of a stock one.

Models are tiny ones whose attention ours can stand for; an entry may refuse all of them but the first.
"""

import copy
import json
from collections.abc import Callable, Mapping
from functools import cache as remembered

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from contract.material import (
    TOKENS,
    assert_more_is_never_worse,
    assert_same,
    assert_storable,
    cast,
    for_every,
    nothing_changes,
    observed,
    other_random_numbers,
    rebuilt,
    spread,
)
from families import tiny_model
from tersely.anatomy import Unit, anatomy_of
from tersely.cache import CACHES, CacheMethod, dense_bytes_per_token
from tersely.convert import CONVERSIONS, Conversion, attention_settings, norm_tensors
from tersely.errors import AnatomyError, TerselyError
from tersely.kinds import Kind
from tersely.kinds.attention import AttentionSettings
from tersely.option import Option
from tersely.stats import Stats

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "bert")
"""Grouped queries; with biases; with norms of heads; two that are built otherwise."""

every_family = pytest.mark.parametrize("family", FAMILIES)
every_cache = for_every("entry", CACHES)
every_entry = for_every("entry", {**CACHES, **CONVERSIONS})

Weights = Mapping[str, Tensor]


class Place:
    """The attention of one block, and all that may be known of it."""

    def __init__(self, model: PreTrainedModel, unit: Unit, inputs: Mapping[str, Tensor]) -> None:
        self.unit = unit
        self.settings: AttentionSettings = attention_settings(model, unit)
        linears = {role: model.get_submodule(site.name) for role, site in unit.sites.items()}
        self.weights: Weights = {role: linear.weight.detach() for role, linear in linears.items()}
        self.gains: Weights = {
            name: model.get_parameter(path).detach() for name, path in norm_tensors(unit, self.settings).items()
        }
        self.biases: Weights = {
            role: linear.bias.detach() for role, linear in linears.items() if linear.bias is not None
        }
        self.inputs = {role: inputs[site.reads] for role, site in unit.sites.items()}

    def stats(self, entry: CacheMethod) -> dict[str, Stats]:
        return {role: observed(entry.needs, x) for role, x in self.inputs.items()}


@remembered
def places(family: str) -> tuple[PreTrainedModel, list[Place]]:
    """Read-only.  Raises AnatomyError where ours cannot stand for this attention."""
    model = tiny_model(family)
    anatomy, inputs = anatomy_of(model), {}
    hooks = [
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda module, arguments, reads=site.reads: inputs.update({reads: arguments[0].detach().flatten(0, -2)})
        )
        for site in anatomy.sites
    ]
    with torch.no_grad():
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    return model, [Place(model, unit, inputs) for unit in anatomy.units if unit.role == "attention"]


def check(entry: type, model: PreTrainedModel, unit: Unit) -> None:
    """As the runner asks; a conversion also hears what the stock attention does."""
    if entry in CONVERSIONS.values():
        entry().check(unit, attention_settings(model, unit))
    else:
        entry().check(unit)


def treated(entry: type, family: str) -> tuple[PreTrainedModel, list[Place]]:
    """Skips where the entry, or the attention of ours, refuses the family."""
    try:
        model, found = places(family)
        for place in found:
            check(entry, model, place.unit)
    except AnatomyError as reason:
        if family == FAMILIES[0]:
            raise
        pytest.skip(f"refused: {reason}")
    return model, found


def exchanged(model: PreTrainedModel, found: list[Place], make: Callable[[Place], dict[str, Kind]]) -> PreTrainedModel:
    model = copy.deepcopy(model)
    for place in found:
        for path, kind in make(place).items():
            model.set_submodule(f"{place.unit.module}.{path}" if path else place.unit.module, kind.eval())
    return model


def cut(entry: type[CacheMethod], place: Place, amount: object, dtype: torch.dtype = torch.float32) -> dict[str, Kind]:
    weights = cast(place.weights, dtype) | cast(place.gains, dtype)
    return entry().compress(
        place.unit, weights, cast(place.biases, dtype), place.stats(entry()), amount, place.settings
    )


def converted(entry: type[Conversion], place: Place, dtype: torch.dtype = torch.float32) -> dict[str, Kind]:
    weights = cast(place.weights, dtype) | cast(place.gains, dtype)
    return entry().convert(place.unit, weights, cast(place.biases, dtype), place.settings)


def made(entry: type, place: Place, dtype: torch.dtype = torch.float32) -> dict[str, Kind]:
    """What a conversion makes, or a cache with half of its options' bytes."""
    if hasattr(entry, "convert"):
        return converted(entry, place, dtype)
    options = entry().options(place.unit, place.weights, place.stats(entry()))
    return cut(entry, place, options[len(options) // 2].amount, dtype)


def arguments_of(place: Place) -> tuple[object, ...]:
    return place.weights, place.gains, place.biases


@torch.no_grad()
def logits(model: PreTrainedModel, **keywords: object) -> Tensor:
    return model(TOKENS[:, :16], **keywords).logits


# --- both -------------------------------------------------------------------------------------------------------------


@every_entry
@every_family
def test_it_runs_generates_and_is_rebuilt_bit_for_bit(entry, family):
    model, found = treated(entry, family)
    changed = exchanged(model, found, lambda place: made(entry, place))
    with nothing_changes(changed):
        wanted = logits(changed)
        assert wanted.shape == logits(model).shape and wanted.isfinite().all()
    again = exchanged(model, found, lambda place: {path: rebuilt(k) for path, k in made(entry, place).items()})
    assert torch.equal(logits(again), wanted)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, plain = (changed.generate(TOKENS[:1, :9], use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)


@every_entry
@every_family
def test_nothing_is_written_into_and_the_same_twice_is_the_same(entry, family):
    _, found = treated(entry, family)
    for place in found:
        with nothing_changes(*arguments_of(place), place.stats(entry()) if hasattr(entry, "needs") else {}):
            first = made(entry, place)
        with other_random_numbers():
            assert_same(made(entry, place), first)
        for kind in first.values():
            assert json.loads(json.dumps(kind.spec())) == kind.spec()
            assert_storable(kind, *arguments_of(place))


@every_entry
def test_bfloat16_stays_bfloat16(entry):
    model, found = treated(entry, FAMILIES[0])
    changed = exchanged(
        copy.deepcopy(model).bfloat16(),
        found,
        lambda place: made(entry, place, torch.bfloat16),
    )
    floats = {t.dtype for t in changed.state_dict().values() if t.is_floating_point()}
    assert floats == {torch.bfloat16}
    said = logits(changed)
    assert said.dtype == torch.bfloat16 and said.isfinite().all()


@every_entry
def test_what_is_no_attention_is_refused(entry):
    model = tiny_model("llama")
    mlp = next(unit for unit in anatomy_of(model).units if unit.role == "mlp")
    if "mlp" not in entry.roles:
        with pytest.raises(AnatomyError):
            check(entry, model, mlp)


# --- caches -----------------------------------------------------------------------------------------------------------


@every_cache
@every_family
def test_options_of_a_cache_rise_in_bytes_per_token_and_fall_in_error(entry, family):
    _, found = treated(entry, family)
    for place in found:
        for itemsize, dtype in ((4, torch.float32), (2, torch.bfloat16)):
            options = entry().options(place.unit, cast(place.weights, dtype), place.stats(entry()))
            sizes = entry().sizes(place.unit, itemsize)
            assert [option.nbytes for option in options] == [size.nbytes for size in sizes]
            assert {size.error for size in sizes} == {None}
            assert [json.loads(json.dumps(o.amount)) for o in options] == [o.amount for o in options]
            whole, *rest = options
            assert (whole.amount, whole.nbytes) == (0, 0) and rest
            assert [o.nbytes for o in options] == sorted(o.nbytes for o in options)
            assert all(0 <= option.error < float("inf") for option in options)
            by_bytes = [Option(option.nbytes, option.nbytes, option.error) for option in options]
            assert_more_is_never_worse(by_bytes)


@every_cache
@every_family
def test_a_token_takes_the_promised_bytes_in_the_librarys_cache(entry, family):
    model, found = treated(entry, family)
    offered = [entry().options(place.unit, place.weights, place.stats(entry())) for place in found]
    for number in (0, len(spread(offered[0])) // 2, -1):
        chosen = {place.unit.module: spread(options)[number] for place, options in zip(found, offered, strict=True)}
        changed = exchanged(model, found, lambda place, of=chosen: cut(entry, place, of[place.unit.module].amount))
        held = DynamicCache()
        said = logits(changed, past_key_values=held)
        for layer, option in zip(held.layers, chosen.values(), strict=True):
            assert layer.keys.nbytes + layer.values.nbytes == said.shape[0] * said.shape[1] * option.nbytes
        if number == -1 and all(
            o.error <= 1e-9 * options[0].error for o, options in zip(chosen.values(), offered, strict=True)
        ):
            torch.testing.assert_close(said, logits(model), rtol=0, atol=1e-4)
    held = DynamicCache()
    said = logits(model, past_key_values=held)
    for layer, place in zip(held.layers, found, strict=True):
        promised = dense_bytes_per_token(place.unit, 4)
        assert layer.keys.nbytes + layer.values.nbytes == said.shape[0] * said.shape[1] * promised


@every_cache
def test_a_size_of_a_cache_can_be_asked_for_as_it_is(entry):
    """An allocator that knows only bytes chooses among `sizes`."""
    model, found = treated(entry, FAMILIES[0])
    for size in spread(entry().sizes(found[0].unit, 4), 3):
        changed = exchanged(model, found, lambda place, size=size: cut(entry, place, size.amount))
        held = DynamicCache()
        said = logits(changed, past_key_values=held)
        for layer in held.layers:
            assert layer.keys.nbytes + layer.values.nbytes == said.shape[0] * said.shape[1] * size.nbytes


POOR = {"one token": lambda x: x[:1], "zeros": torch.zeros_like}


@every_cache
@pytest.mark.parametrize("inputs", POOR)
def test_poor_statistics_still_give_a_cache(entry, inputs):
    _, found = treated(entry, FAMILIES[0])
    for place in found:
        stats = {role: observed(entry().needs, POOR[inputs](x)) for role, x in place.inputs.items()}
        options = entry().options(place.unit, place.weights, stats)
        assert all(0 <= option.error < float("inf") for option in options)
        for option in spread(options, 3):
            arguments = place.unit, place.weights, place.biases, stats, option.amount, place.settings
            for kind in entry().compress(*arguments).values():
                assert_storable(kind)


@every_cache
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_a_cache(entry, bad):
    _, (place, *_) = treated(entry, FAMILIES[0])
    for role in ("k", "v"):
        weights = {name: weight.clone() for name, weight in place.weights.items()}
        weights[role][1, 1] = bad
        assert_refused(entry, place, weights, place.stats(entry()))


@for_every("entry", CACHES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused_by_a_cache(entry, bad):
    """Each for itself: a bad Gram matrix comes with good means where both were made by merging."""
    _, (place, *_) = treated(entry, FAMILIES[0])
    for broken in entry().needs:
        stats = {}
        for role, x in place.inputs.items():
            spoilt = torch.where(torch.arange(x.shape[1]) == 1, bad, x)
            stats[role] = Stats({k: observed([k], spoilt if k is broken else x)[k] for k in entry().needs})
        assert_refused(entry, place, place.weights, stats)


def assert_refused(entry: type[CacheMethod], place: Place, weights: Weights, stats: Mapping[str, Stats]) -> None:
    """Or else the bad number was not read: nothing that comes back shows it."""
    amount = spread(entry().options(place.unit, place.weights, place.stats(entry())))[2].amount
    try:
        assert all(0 <= option.error < float("inf") for option in entry().options(place.unit, weights, stats))
        made = entry().compress(place.unit, weights, place.biases, stats, amount, place.settings)
    except TerselyError as error:
        assert "finite" in str(error)
    else:
        for kind in made.values():
            assert_storable(kind)


@every_cache
@pytest.mark.parametrize("amount", [0, -1, 10**6, None, {"unknown": 1}], ids=str)
def test_an_amount_that_is_not_offered_is_refused_by_a_cache(entry, amount):
    _, (place, *_) = treated(entry, FAMILIES[0])
    with pytest.raises(TerselyError):
        cut(entry, place, amount)

"""Every kind describes itself, is rebuilt from that, knows its bytes, and stands where a stock module stood.

The examples are the one thing a new kind adds here: each takes the stock module that it is to replace in a tiny Llama.
What a kind is called with is what the stock module was called with, so the suite knows nothing of signatures.
"""

import copy
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from contract.material import assert_same, normal, nothing_changes, rebuilt
from families import tiny_batch, tiny_model
from tersely.anatomy import anatomy_of
from tersely.convert import attention_settings
from tersely.errors import CheckpointError
from tersely.kinds import (
    KINDS,
    Attention,
    CodebookLinear,
    ColumnsLinear,
    DenseLinear,
    Kind,
    LinearKind,
    LowRankLinear,
    PivotedLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    RemappedLinear,
    SharedLinear,
    SparseLinear,
    SumLinear,
    TiedHead,
    build,
    link_tables,
    manifest_of,
    shared_from_factors,
)
from tersely.kinds.attention import PositionTables, linear_of
from tersely.linalg.grid import Grid, Scales, fit_grid, fit_table

Make = Callable[[PreTrainedModel, nn.Module], Kind]

ATTENTION, UP = "model.layers.1.self_attn", "model.layers.0.mlp.up_proj"
TABLE, HEAD = "model.embed_tokens", "lm_head"


def low_rank(model: PreTrainedModel, linear: nn.Module, rank: int = 5) -> LowRankLinear:
    rows, columns = linear.weight.shape
    return LowRankLinear.from_factors(normal(rows, rank).to(linear.weight), normal(rank, columns).to(linear.weight))


def quantized(linear: nn.Module, bits: int, group: int = 0, form: Any = "asymmetric") -> QuantizedLinear:
    grid: Grid = fit_grid(linear.weight.detach(), bits, group, form)
    return QuantizedLinear.from_codes(grid.nearest(linear.weight.detach()), grid, linear.weight.dtype)


def embedding(model: PreTrainedModel, table: nn.Module, multiplier: float | None = None) -> QuantizedEmbedding:
    return QuantizedEmbedding.of(quantized(table, 3, 7), TABLE, padding=0, multiplier=multiplier)


def tied_head(model: PreTrainedModel, linear: nn.Module) -> TiedHead:
    """Its table takes the place of the model's own."""
    owner = embedding(model, model.get_submodule(TABLE))
    model.set_submodule(TABLE, owner)
    return TiedHead.of(owner)


def normal_floats(model: PreTrainedModel, linear: nn.Module) -> QuantizedLinear:
    weight = linear.weight.detach()
    columns = Scales.of(normal(weight.shape[1]).exp())
    grid = fit_table(weight, "nf4", 7, shift=True, format="log8", columns=columns)
    return QuantizedLinear.from_codes(grid.nearest(weight), grid, weight.dtype)


def rounding_its_input(model: PreTrainedModel, linear: nn.Module) -> QuantizedLinear:
    made = quantized(linear, 4)
    made.round_input(8, 1.0)
    return made


def factors_of_integers(model: PreTrainedModel, linear: nn.Module) -> LowRankLinear:
    made = low_rank(model, linear)
    made.down, made.up = quantized(made.down, 3), quantized(made.up, 8)
    return made


def columns(linear: nn.Module, widths: tuple[int | None, ...], first: list[int]) -> ColumnsLinear:
    """The columns named are the first part, the others the second; a part without a width is a plain linear."""
    weight, everything = linear.weight.detach(), range(linear.in_features)
    chosen = [first, [column for column in everything if column not in first]] if len(widths) > 1 else [[*everything]]
    parts = [linear_of(weight[:, places].contiguous(), None) for places in chosen]
    made = [part if bits is None else quantized(part, bits) for part, bits in zip(parts, widths, strict=True)]
    return ColumnsLinear.of(made, torch.tensor([column for places in chosen for column in places]), weight.dtype)


def sparse(linear: nn.Module, every: int) -> SparseLinear:
    """Every so many-th entry."""
    weight = linear.weight.detach()
    places = torch.arange(weight.numel()).view_as(weight) % every == 0
    return SparseLinear.of(weight, places, weight.dtype)


def pivoted(model: PreTrainedModel, linear: nn.Module) -> PivotedLinear:
    factors = low_rank(model, linear)
    return PivotedLinear.from_factors(factors.up.weight.detach(), factors.down.weight.detach())


def pivoted_integers(model: PreTrainedModel, linear: nn.Module) -> PivotedLinear:
    made = pivoted(model, linear)
    made.down, made.rest = quantized(made.down, 3), quantized(made.rest, 8)
    return made


def remapped(model: PreTrainedModel, linear: nn.Module, rank: int = 5) -> RemappedLinear:
    return RemappedLinear.of(linear.weight.detach(), normal(linear.weight.shape[0], rank, dtype=linear.weight.dtype))


def shared(model: PreTrainedModel, linear: nn.Module, *, pivot: bool = False) -> SharedLinear:
    """The owner of a factor whose other member is not in the model."""
    rows, columns = linear.weight.shape
    ups = {UP: normal(rows, 5).to(linear.weight), "elsewhere": normal(7, 5, seed=1).to(linear.weight)}
    return shared_from_factors(ups, normal(5, columns, seed=2).to(linear.weight), pivot=pivot)[UP]


def shared_integers(model: PreTrainedModel, linear: nn.Module) -> SharedLinear:
    made = shared(model, linear, pivot=True)
    made.down, made.rest = quantized(made.down, 3), quantized(made.rest, 8)
    return made


def codebook(model: PreTrainedModel, linear: nn.Module, books: int = 2, bits: int = 3, group: int = 5) -> LinearKind:
    rows, columns = linear.weight.shape
    codes = normal(rows, -(-columns // group), books).abs().mul(1e4).long() % 2**bits
    books_of, scales = normal(books, 2**bits, group, seed=1), normal(rows, seed=2)
    return CodebookLinear.of(codes, books_of, scales, columns, exponent=-4, dtype=linear.weight.dtype)


def attention(model: PreTrainedModel, module: nn.Module, *, latent: bool = False, series: bool = False) -> Attention:
    unit = next(unit for unit in anatomy_of(model).units if unit.module == ATTENTION)
    settings = attention_settings(model, unit)
    linears: dict[str, nn.Module] = {
        role: linear_of(model.get_submodule(site.name).weight, None) for role, site in unit.sites.items()
    }
    linears["o"] = DenseLinear.from_weight(linears["o"].weight)  # what makes a stock reader refuse
    if latent:
        linears |= {role: low_rank(model, linears[role]) for role in "kv"}
    tables = settings.tables()
    if series:
        frequencies = torch.tensor([settings.frequencies] * settings.shape.key_value_heads)
        sets, count = frequencies.shape
        mixing = normal(2, sets, count, count, dtype=torch.float32)
        tables = PositionTables.of(frequencies, pairs=count, series=(mixing[0], mixing[1]), rest_sine=1.0)
    return Attention.of(settings.shape, tables, linears, {}, latent=latent)


EXAMPLES: dict[str, tuple[str, dict[str, Make]]] = {
    "attention": (
        ATTENTION,
        {
            "stock": attention,
            "latent": lambda model, module: attention(model, module, latent=True),
            "series": lambda model, module: attention(model, module, series=True),
        },
    ),
    "codebook": (
        UP,
        {
            "plain": codebook,
            "one of 4 bits": lambda model, linear: codebook(model, linear, books=1, bits=4, group=4),
        },
    ),
    "columns": (
        UP,
        {
            "of two widths": lambda model, linear: columns(linear, (3, 4), [0, 2]),
            "one part": lambda model, linear: columns(linear, (2,), [0]),
            "integers and floats": lambda model, linear: columns(linear, (3, None), [1, 5, 7]),
        },
    ),
    "dense": (UP, {"plain": lambda model, linear: DenseLinear.from_weight(linear.weight)}),
    "low_rank": (UP, {"plain": low_rank, "of integers": factors_of_integers}),
    "pivoted": (UP, {"plain": pivoted, "of integers": pivoted_integers}),
    "quantized": (
        UP,
        {
            "8 bits": lambda model, linear: quantized(linear, 8),
            "3 bits in groups": lambda model, linear: quantized(linear, 3, 7, "symmetric"),
            "rounded input": rounding_its_input,
            "a table under scales of columns": normal_floats,
        },
    ),
    "quantized_embedding": (
        TABLE,
        {
            "plain": embedding,
            "multiplied": lambda model, table: embedding(model, table, multiplier=2.5),
        },
    ),
    "remapped": (UP, {"plain": remapped, "full rank": lambda model, linear: remapped(model, linear, 24)}),
    "shared": (
        UP,
        {
            "owner": shared,
            "pivoted": lambda model, linear: shared(model, linear, pivot=True),
            "of integers": shared_integers,
        },
    ),
    "sparse": (
        UP,
        {
            "few": lambda model, linear: sparse(linear, 37),
            "rows without any": lambda model, linear: sparse(linear, 4 * linear.in_features),
            "all": lambda model, linear: sparse(linear, 1),
        },
    ),
    "sum": (
        UP,
        {
            "integers and outliers": lambda model, linear: SumLinear.of([quantized(linear, 3), sparse(linear, 11)]),
            "linear and update": lambda model, linear: SumLinear.of(
                [linear_of(linear.weight, None), low_rank(model, linear)]
            ),
            "of kinds": lambda model, linear: SumLinear.of([quantized(linear, 2), factors_of_integers(model, linear)]),
        },
    ),
    "tied_head": (HEAD, {"plain": tied_head}),
}
"""Kind → path of the stock module in a tiny Llama that it can replace, and name → how to make one in its place."""

CASES = {
    f"{kind}-{name}": (place, make)
    for kind, (place, makes) in EXAMPLES.items()
    for name, make in makes.items()
    if kind in KINDS
}
LINEAR = {name: case for name, case in CASES.items() if issubclass(KINDS[name.partition("-")[0]], LinearKind)}
every_example = pytest.mark.parametrize("example", CASES)
every_linear_example = pytest.mark.parametrize("example", LINEAR)


def test_every_kind_has_an_example():
    missing = KINDS.keys() - EXAMPLES.keys()
    assert not missing, f"add to EXAMPLES of {__file__}: how to make a kind {', '.join(sorted(missing))}"
    assert EXAMPLES.keys() <= KINDS.keys(), "an example of a kind that is not in KINDS"
    assert all(makes for _, makes in EXAMPLES.values())


@cache
def called_with(place: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the stock module at a place is called with."""
    model, seen = tiny_model("llama").to(dtype), []
    module = model.get_submodule(place)
    module.register_forward_pre_hook(lambda module, *arguments: seen.append(arguments), with_kwargs=True)
    with torch.no_grad():
        model(tiny_batch()["input_ids"], use_cache=False)
    return seen[0]


def made(example: str, dtype: torch.dtype = torch.float32) -> Kind:
    place, make = CASES[example]
    model = tiny_model("llama").to(dtype)
    return make(model, model.get_submodule(place)).eval()


def placed(example: str) -> PreTrainedModel:
    """A model with the kind in its place, and whatever it refers to."""
    model, kind = tiny_model("llama"), made(example)
    model.set_submodule(CASES[example][0], kind)
    if isinstance(kind, TiedHead):
        model.set_submodule(TABLE, kind.holder)
        link_tables(model)
    return model


@torch.no_grad()
def answer(kind: Kind, example: str, dtype: torch.dtype = torch.float32) -> Tensor:
    arguments, keywords = called_with(CASES[example][0], dtype)
    out = kind(*arguments, **keywords)
    return out[0] if isinstance(out, tuple) else out


def bias_of(kind: LinearKind) -> Tensor:
    return normal(kind.out_features, seed=3, dtype=kind.weight.dtype)


# --- descriptions -----------------------------------------------------------------------------------------------------


@every_example
def test_its_description_is_plain_and_names_it(example):
    kind = made(example)
    assert KINDS[kind.name] is type(kind)
    assert kind.name == example.partition("-")[0]
    for module in kind.modules():
        if isinstance(module, Kind):
            spec = module.spec()
            assert spec["kind"] == module.name
            assert json.loads(json.dumps(spec)) == spec


@every_example
def test_it_is_rebuilt_bit_for_bit(example):
    for dtype in (torch.float32, torch.bfloat16):
        kind = made(example, dtype)
        if isinstance(kind, LinearKind):
            kind.set_bias(bias_of(kind))
        again = rebuilt(kind)
        assert manifest_of(again) == manifest_of(kind)
        assert next(iter(manifest_of(kind))) == "", "an outer kind stands before those inside it"
        assert_same(again, kind)
        assert torch.equal(answer(again, example, dtype), answer(kind, example, dtype))
        assert_same(rebuilt(again), kind)


@every_example
def test_an_incomplete_description_is_refused(example):
    spec = made(example).spec()
    for missing in spec:
        with pytest.raises(CheckpointError):
            build({key: value for key, value in spec.items() if key != missing})


@every_example
def test_bytes_are_those_of_its_numbers(example):
    kind = made(example)
    assert kind.nbytes() == sum(tensor.nbytes for tensor in kind.state_dict().values())
    assert kind.nbytes() == sum(
        tensor.numel() * tensor.element_size() for tensor in rebuilt(kind).state_dict().values()
    )


# --- an ordinary module -----------------------------------------------------------------------------------------------


@every_example
def test_it_stands_in_a_model_of_any_dtype(example):
    place, _ = CASES[example]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = placed(example).to(dtype)
        with torch.no_grad(), nothing_changes(model):
            logits = model(**tiny_batch()).logits
        assert logits.dtype == dtype
        assert logits.isfinite().all()
        assert answer(model.get_submodule(place), example, dtype).dtype == dtype


@every_example
def test_it_is_copied_with_its_numbers(example):
    kind = made(example)
    wanted, twin = answer(kind, example), copy.deepcopy(kind)
    with torch.no_grad():
        for parameter in kind.parameters():
            parameter.add_(1)
    assert torch.equal(answer(twin, example), wanted)


@every_example
def test_gradients_pass_to_what_stands_before_it(example):
    """Healing trains the layers before as well."""
    place, _ = CASES[example]
    model = placed(example)
    model(**tiny_batch()).logits.float().square().mean().backward()
    first = model.get_submodule("model.layers.0.input_layernorm").weight.grad
    assert first.isfinite().all() and first.any()
    for name, parameter in model.get_submodule(place).named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


# --- linear kinds -----------------------------------------------------------------------------------------------------


@every_linear_example
def test_the_dense_weight_is_what_it_computes(example):
    for dtype in (torch.float32, torch.float64):
        kind = made(example, dtype)
        dense = kind.to_dense()
        assert dense.dtype in (torch.float32, torch.float64)
        assert dense.shape == (kind.out_features, kind.in_features)
        with torch.no_grad():
            columns = kind(torch.eye(kind.in_features, dtype=dtype))
            torch.testing.assert_close(columns.T, dense.to(dtype), rtol=1e-5, atol=1e-6)
            bias = bias_of(kind)
            kind.set_bias(bias)
            torch.testing.assert_close(kind(torch.eye(kind.in_features, dtype=dtype)), columns + bias)
            assert torch.equal(kind.to_dense(), dense)


@every_linear_example
def test_a_bias_is_copied_counted_and_described(example):
    kind = made(example)
    before, bias = kind.nbytes(), bias_of(kind)
    assert kind.spec()["bias"] is False
    kind.set_bias(bias)
    assert kind.spec()["bias"] is True
    assert kind.nbytes() == before + bias.nbytes
    wanted = answer(kind, example)
    bias.zero_()
    assert torch.equal(answer(kind, example), wanted)
    kind.set_bias(bias_of(kind).double())  # taken over in the module's dtype
    assert torch.equal(answer(kind, example), wanted)


@every_linear_example
def test_it_guards_the_stock_name(example):
    """A reader that knows nothing of tersely finds the name it expects, with a shape that cannot be."""
    kind = made(example)
    assert kind.state_dict()["weight"].numel() == 0
    assert kind.weight.dtype == torch.float32
    assert kind.nbytes() < kind.to_dense().nbytes or not kind.packed


@every_linear_example
@torch.no_grad()
def test_any_number_of_tokens_will_do(example):
    kind = made(example)
    x = normal(6, kind.in_features, dtype=torch.float32)
    y = kind(x)
    torch.testing.assert_close(kind(x.view(2, 3, -1)), y.view(2, 3, -1))
    torch.testing.assert_close(kind(x[0]), y[0], rtol=1e-5, atol=1e-5)
    assert kind(x[:0]).shape == (0, kind.out_features)

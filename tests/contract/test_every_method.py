"""Every method on single linears keeps the contract of `tersely.methods.base.Method`.

A method is tested on arrival: what is asserted follows from the contract and from what the method says of itself
(`needs`, `leaves`, the docstring of `options`), never from its name.

Errors are tr(Δ G Δᵀ).  Which G a method means is known in two cases: it reads the Gram matrix, then that is it; or the
inputs are white signs, then every metric is the same.
"""

import json
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from contract.material import (
    DTYPES,
    INPUTS,
    POOR,
    SHAPES,
    SLACK,
    TELLING,
    assert_more_is_never_worse,
    assert_predicted,
    assert_same,
    assert_storable,
    for_every,
    normal,
    nothing_changes,
    observed,
    other_random_numbers,
    rebuilt,
    seen_by,
    spread,
    variants,
    weight_bytes,
)
from tersely.errors import TerselyError
from tersely.kinds import DenseLinear, LinearKind, dense_weight
from tersely.kinds.quantized import QuantizedLinear, rounded
from tersely.methods import METHODS
from tersely.methods.base import Method
from tersely.option import Option
from tersely.stats import Gram, Stats, keyed_by

FEW = ("9x1", "5x3", "17x31")

every_method = for_every("method", METHODS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
few_shapes = pytest.mark.parametrize("shape", [SHAPES[name] for name in FEW], ids=FEW)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

LARGER = SHAPES["17x31"]


@cache
def case(
    method: type[Method],
    shape: tuple[int, int] = LARGER,
    inputs: str = "correlated",
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Stats, list[Option]]:
    """A weight, exactly what the method asked to know of its inputs, and what it offers.  Read-only."""
    weight, stats = normal(*shape, seed=5, dtype=dtype), seen_by(shape, method().needs, INPUTS[inputs])
    return weight, stats, list(method().options(weight, stats))


def measured(weight: Tensor, kind: LinearKind, inputs: str) -> float:
    gram = observed([Gram], INPUTS[inputs](weight.shape[1]))[Gram].mean()
    lost = weight.double() - kind.to_dense().double()
    return ((lost @ gram) * lost).sum().item()


def spoilt(x: Tensor, bad: float) -> Tensor:
    x[3, 4] = bad
    return x


def metric_is_known(method: Method, inputs: str) -> bool:
    of_inputs = all(keyed_by(kind) == "input" for kind in method.needs)
    return inputs == "white" or (Gram in method.needs and of_inputs and inputs != "zeros")


def as_read(kind: LinearKind, x: Tensor) -> Tensor:
    """What the weight is multiplied with: a kind may round its input."""
    if not isinstance(kind, QuantizedLinear) or kind.input_bits is None:
        return x
    return rounded(x, kind.input_bits, kind.bound.view(torch.float32))


def linears_in(kind: nn.Module) -> set[str]:
    return {name for name, module in kind.named_modules() if isinstance(module, nn.Linear)}


# --- what could be done -----------------------------------------------------------------------------------------------


@every_method
@every_shape
def test_options_are_plain_rise_in_bytes_and_begin_with_nothing(method, shape):
    _, _, options = case(method, shape)
    whole, *rest = options
    assert (whole.amount, whole.nbytes) == (0, 0)
    assert rest, "nothing is offered"
    assert [o.nbytes for o in options] == sorted(o.nbytes for o in options)
    said = [json.dumps(o.amount) for o in options]
    assert [json.loads(amount) for amount in said] == [o.amount for o in options]
    assert len(set(said)) == len(said)
    for option in options:
        assert type(option.nbytes) is int
        assert type(option.error) is float and 0 <= option.error <= whole.error * (1 + SLACK) < float("inf")


@every_method
@every_shape
@pytest.mark.parametrize("inputs", TELLING)
def test_more_is_never_predicted_to_be_worse(method, shape, inputs):
    assert_more_is_never_worse(case(method, shape, inputs)[2])


@pytest.mark.parametrize(
    ("method", "inputs"),
    [
        pytest.param(method, inputs, id=f"{name}-{inputs}")
        for name, method in METHODS.items()
        for inputs in INPUTS
        if metric_is_known(method(), inputs)  # else predictions are in a metric of the method's own
    ],
)
@few_shapes
def test_what_is_predicted_is_measured_and_more_is_never_worse(method, shape, inputs):
    weight, stats, options = case(method, shape, inputs)
    energy = measured(weight, DenseLinear.from_weight(torch.zeros_like(weight)), inputs)
    assert_predicted(method(), options[0].error, energy, energy)
    found = [Option(0, 0, energy)]
    for option in spread(options, 8):
        error = measured(weight, method().compress(weight, stats, option.amount), inputs)
        assert_predicted(method(), option.error, error, energy)
        found.append(Option(option.amount, option.nbytes, error))
    if inputs in TELLING:
        assert_more_is_never_worse(found)


# --- what is made -----------------------------------------------------------------------------------------------------


@every_method
@every_shape
@every_dtype
def test_the_result_is_a_linear_of_the_promised_bytes_and_dtype(method, shape, dtype):
    weight, stats, options = case(method, shape, dtype=dtype)
    sizes = method().sizes(shape, dtype.itemsize)
    assert {size.error for size in sizes} == {None}
    assert [(o.amount, o.nbytes) for o in options] == [(s.amount, s.nbytes) for s in sizes]
    for option in spread(options):
        kind = method().compress(weight, stats, json.loads(json.dumps(option.amount)))
        assert isinstance(kind, LinearKind)
        assert (kind.out_features, kind.in_features) == shape
        assert kind.nbytes() == weight_bytes(kind) == option.nbytes, f"amount {option.amount}"
        assert kind.weight.dtype == dtype and kind.weight.numel() == 0
        assert {p.dtype for p in kind.parameters()} <= {dtype}
        assert_storable(kind, weight)
        x = normal(4, shape[1], seed=6, dtype=dtype)
        y = kind(x)
        assert (y.dtype, y.shape) == (dtype, (4, shape[0]))
        wide = as_read(kind, x).double() @ kind.to_dense().double().T
        tolerance = 10 * torch.finfo(dtype).eps * (1 + wide.abs().max().item()) * max(shape) ** 0.5
        if dtype == torch.float64:
            tolerance = 1e-6 * (1 + wide.abs().max().item())  # `to_dense` may be float32
        torch.testing.assert_close(y.double(), wide, rtol=0, atol=tolerance)


@every_method
@every_shape
def test_the_result_takes_a_bias_and_is_rebuilt_from_its_description(method, shape):
    weight, stats, options = case(method, shape, dtype=torch.float32)
    x, bias = normal(4, shape[1], seed=6, dtype=torch.float32), normal(shape[0], seed=7, dtype=torch.float32)
    for option in spread(options, 3):
        kind = method().compress(weight, stats, option.amount)
        plain = kind(x)
        kind.set_bias(bias)
        torch.testing.assert_close(kind(x), plain + bias)
        assert kind.nbytes() == option.nbytes + bias.nbytes
        again = rebuilt(kind)
        assert torch.equal(again(x), kind(x))
        assert_same(again, kind)


@every_method
def test_leaves_are_the_linears_that_every_amount_leaves(method):
    """Steps that follow are planned by them before anything is done."""
    weight, stats, options = case(method)
    kinds = [method().compress(weight, stats, option.amount) for option in spread(options, 12)]
    assert set.intersection(*map(linears_in, kinds)) == set(method().leaves)


@for_every("method", variants(METHODS))
def test_every_choice_among_its_options_keeps_the_contract(method):
    weight = normal(*LARGER, seed=5, dtype=torch.float32)
    stats = seen_by(LARGER, method.needs, INPUTS["correlated"])
    with nothing_changes(weight, stats):
        options = list(method.options(weight, stats))
        kinds = [(option, method.compress(weight, stats, option.amount)) for option in spread(options, 4)]
    assert [(o.amount, o.nbytes) for o in options] == [(s.amount, s.nbytes) for s in method.sizes(LARGER, 4)]
    assert_more_is_never_worse(options)
    assert set.intersection(*(linears_in(kind) for _, kind in kinds)) == set(method.leaves)
    for option, kind in kinds:
        assert kind.nbytes() == option.nbytes
        assert_storable(kind, weight)
        assert_same(rebuilt(kind), kind)
        if metric_is_known(method, "correlated"):
            assert_predicted(method, option.error, measured(weight, kind, "correlated"), options[0].error)


# --- pure functions ---------------------------------------------------------------------------------------------------


@every_method
def test_nothing_is_written_into_and_no_random_number_drawn(method):
    for dtype in (torch.float64, torch.bfloat16):  # that of the mathematics, and one that has to be cast
        weight, stats, _ = case(method, dtype=dtype)
        with nothing_changes(weight, stats):
            for option in spread(method().options(weight, stats), 3):
                method().compress(weight, stats, option.amount)
            method().sizes(LARGER, dtype.itemsize)


@for_every("method", METHODS)
def test_the_same_request_gives_the_same_bytes_however_the_weight_lies(method):
    weight, stats, options = case(method, dtype=torch.float32)
    turned = weight.T.contiguous().T  # as of a Conv1D
    with other_random_numbers():
        assert method().options(weight, stats) == options
        for option, near in zip(spread(options, 3), spread(method().options(turned, stats), 3), strict=True):
            kind = method().compress(weight, stats, option.amount)
            assert_same(method().compress(weight, stats, option.amount), kind)
            assert near.error == pytest.approx(option.error, rel=1e-4, abs=1e-6 * options[0].error)
            assert_storable(method().compress(turned, stats, option.amount), turned)


# --- poor data --------------------------------------------------------------------------------------------------------


@every_method
@few_shapes
@pytest.mark.parametrize("inputs", POOR)
def test_poor_statistics_still_give_numbers(method, shape, inputs):
    weight, stats, options = case(method, shape, inputs, torch.bfloat16)
    assert torch.tensor([option.error for option in options]).isfinite().all()
    for option in spread(options, 3):
        kind = method().compress(weight, stats, option.amount)
        assert kind.nbytes() == option.nbytes
        assert_storable(kind, weight)
        assert dense_weight(kind).isfinite().all()


@every_method
def test_a_weight_of_zeros_stays_one(method):
    stats, weight = case(method)[1], torch.zeros(LARGER)
    for option in spread(method().options(weight, stats), 3):
        assert option.error == 0
        assert not method().compress(weight, stats, option.amount).to_dense().any()


@every_method
@pytest.mark.parametrize("power", [-40, 30])
def test_the_unit_of_a_weight_does_not_matter(method, power):
    """A power of two changes no digit."""
    weight, stats, options = case(method, dtype=torch.float32)
    last, scale = options[-1].amount, 2.0**power
    made = method().compress(weight, stats, last).to_dense()
    scaled = method().compress(weight * scale, stats, last).to_dense() / scale
    torch.testing.assert_close(scaled, made, rtol=0, atol=1e-5 * weight.abs().max().item())


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(method, bad):
    weight, stats, options = case(method, dtype=torch.float32)
    broken = weight.clone()
    broken[3, 4] = bad
    with pytest.raises(TerselyError, match="finite"):
        method().options(broken, stats)
    with pytest.raises(TerselyError, match="finite"):
        method().compress(broken, stats, spread(options, 3)[-1].amount)


@for_every("method", {name: method for name, method in METHODS.items() if method().needs})
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(method, bad):
    weight, _, options = case(method, dtype=torch.float32)
    stats = seen_by(LARGER, method().needs, lambda width: spoilt(INPUTS["correlated"](width), bad))
    with pytest.raises(TerselyError, match="finite"):
        method().options(weight, stats)
    with pytest.raises(TerselyError, match="finite"):
        method().compress(weight, stats, spread(options, 3)[-1].amount)


@every_method
@pytest.mark.parametrize("amount", [0, -1, 10**6])
def test_an_amount_that_is_not_offered_is_refused(method, amount):
    weight, stats, _ = case(method)
    with pytest.raises(TerselyError):
        method().compress(weight, stats, amount)


@every_method
@pytest.mark.parametrize("amount", [None, {"unknown": 1}, "8"], ids=str)
def test_an_amount_of_another_method_is_refused(method, amount):
    """As it may stand in a plan that was written for something else."""
    weight, stats, _ = case(method)
    with pytest.raises(TerselyError):
        method().compress(weight, stats, amount)

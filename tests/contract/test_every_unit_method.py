"""Every method on coupled linears keeps the contract of `tersely.methods.base.UnitMethod`.

Units are the attention and the MLP of tiny models, as their anatomy finds them; errors are measured in the model, on
the output of the last linear of the unit.
"""

import copy
import json
from collections.abc import Mapping
from functools import cache

import pytest
import torch
from torch import Tensor

from contract.material import (
    MODELS,
    SLACK,
    TOKENS,
    Scene,
    assert_more_is_never_worse,
    assert_predicted,
    assert_same,
    assert_storable,
    cast,
    for_every,
    nothing_changes,
    observed,
    other_random_numbers,
    rebuilt,
    scene,
    spread,
    weight_bytes,
)
from tersely.anatomy import Unit
from tersely.errors import AnatomyError, TerselyError
from tersely.kinds import Kind, LinearKind
from tersely.methods import UNIT_METHODS
from tersely.methods.base import UnitMethod
from tersely.option import Option
from tersely.stats import Gram, Stats

KNOWN = "llama"
"""What every unit method has to treat; of the others a unit may be refused."""

every_unit = pytest.mark.parametrize(
    ("method", "model", "role"),
    [
        pytest.param(method, model, role, id=f"{name}-{model}-{role}")
        for name, method in UNIT_METHODS.items()
        for model in MODELS
        for role in method.roles
    ],
)
every_role = pytest.mark.parametrize(
    ("method", "role"),
    [pytest.param(method, role, id=f"{name}-{role}") for name, method in UNIT_METHODS.items() for role in method.roles],
)


@cache
def case(method: type[UnitMethod], model: str, role: str) -> tuple[Scene, dict[str, Stats], list[Option]]:
    """A unit, exactly what the method asked to know of its inputs, and what it offers.  Read-only."""
    found = scene(model, role)
    stats = found.stats(method().needs)
    try:
        method().check(found.unit)
    except AnatomyError as reason:
        if model == KNOWN:
            raise
        pytest.skip(f"refused: {reason}")
    return found, stats, list(method().options(found.unit, found.weights, stats))


def outputs(found: Scene, made: Mapping[str, Kind]) -> Tensor:
    """What the last linear of the unit says, in the model with these kinds."""
    model, seen = copy.deepcopy(found.model), []
    for role, kind in made.items():
        model.set_submodule(found.unit.sites[role].name, kind)
    last = list(found.unit.sites.values())[-1]
    model.get_submodule(last.name).register_forward_hook(lambda module, arguments, out: seen.append(out))
    with torch.no_grad():
        model(TOKENS)
    return seen[0].flatten(0, -2)


def stored(found: Scene, made: Mapping[str, Kind], itemsize: int) -> int:
    """Bytes of the unit's weights afterwards."""
    left = [weight.numel() * itemsize for role, weight in found.weights.items() if role not in made]
    return sum(left) + sum(map(weight_bytes, made.values()))


def biasless(unit: Unit, biases: Mapping[str, Tensor]) -> Tensor | float:
    last = list(unit.sites)[-1]
    return biases.get(last, 0.0)


# --- what could be done -----------------------------------------------------------------------------------------------


@every_unit
def test_sizes_are_the_options_without_errors(method, model, role):
    found, _, options = case(method, model, role)
    sizes = method().sizes(found.unit, 8)
    assert {size.error for size in sizes} == {None}
    assert [(o.amount, o.nbytes) for o in options] == [(s.amount, s.nbytes) for s in sizes]


@every_unit
def test_options_are_plain_rise_in_bytes_and_begin_with_all_of_the_energy(method, model, role):
    _, _, options = case(method, model, role)
    whole, *rest = options
    assert (whole.amount, whole.nbytes) == (0, 0)
    assert rest, "nothing is offered"
    assert [o.nbytes for o in options] == sorted(o.nbytes for o in options)
    assert [json.loads(json.dumps(o.amount)) for o in options] == [o.amount for o in options]
    for option in options:
        assert type(option.nbytes) is int
        assert type(option.error) is float and 0 <= option.error <= whole.error * (1 + SLACK) < float("inf")
    assert_more_is_never_worse(options)


@every_unit
def test_what_is_predicted_is_measured_and_more_is_never_worse(method, model, role):
    found, stats, options = case(method, model, role)
    if Gram not in method().needs:
        pytest.skip("the predictions are in a metric of the method's own")
    dense = outputs(found, {})
    energy = (dense - biasless(found.unit, found.biases)).square().sum(-1).mean().item()
    assert_predicted(method(), options[0].error, energy, energy)
    seen = [Option(0, 0, energy)]
    for option in spread(options):
        made = method().compress(found.unit, found.weights, found.biases, stats, option.amount)
        error = (outputs(found, made) - dense).square().sum(-1).mean().item()
        assert_predicted(method(), option.error, error, energy)
        seen.append(Option(option.amount, option.nbytes, error))
    assert_more_is_never_worse(seen)


# --- what is made -----------------------------------------------------------------------------------------------------


@every_unit
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_unit_runs_in_its_model_with_the_promised_bytes(method, model, role, dtype):
    found, stats, options = case(method, model, role)
    weights, biases = cast(found.weights, dtype), cast(found.biases, dtype)
    sizes = {json.dumps(s.amount): s.nbytes for s in method().sizes(found.unit, dtype.itemsize)}
    for option in spread(options, 3):
        amount = json.loads(json.dumps(option.amount))
        made = method().compress(found.unit, weights, biases, stats, amount)
        assert made.keys() <= found.unit.sites.keys()
        assert stored(found, made, dtype.itemsize) == sizes[json.dumps(amount)]
        for part, kind in made.items():
            assert isinstance(kind, LinearKind), part
            assert kind.spec()["bias"] is (part in biases)
            assert {t.dtype for t in kind.state_dict().values() if t.is_floating_point()} == {dtype}
            assert_storable(kind, weights, biases)
            assert_same(rebuilt(kind), kind)
        changed = copy.deepcopy(found.model).to(dtype)
        for part, kind in made.items():
            changed.set_submodule(found.unit.sites[part].name, kind)
        with torch.no_grad():
            logits = changed(TOKENS[:1]).logits
        assert logits.dtype == dtype
        assert logits.isfinite().all()


# --- pure functions ---------------------------------------------------------------------------------------------------


@every_unit
def test_nothing_is_written_into_and_the_same_twice_is_the_same(method, model, role):
    found, stats, options = case(method, model, role)
    weights, biases = cast(found.weights, torch.float32), cast(found.biases, torch.float32)
    arguments = found.unit, weights, biases, stats
    with nothing_changes(weights, biases, stats):
        method().check(found.unit)
        method().sizes(found.unit, 4)
        first = method().options(found.unit, weights, stats)
        made = [method().compress(*arguments, option.amount) for option in spread(options, 3)]
    with other_random_numbers():
        assert method().options(found.unit, weights, stats) == first
        for option, kinds in zip(spread(options, 3), made, strict=True):
            assert_same(method().compress(*arguments, option.amount), kinds)


# --- poor data --------------------------------------------------------------------------------------------------------

POOR = {
    "one token": lambda x: x[:1],
    "fewer tokens than channels": lambda x: x[: max(1, x.shape[1] // 2)],
    "silent channels": lambda x: x * (torch.arange(x.shape[1]) % 3 < 2),
    "zeros": torch.zeros_like,
}


@every_unit
@pytest.mark.parametrize("inputs", POOR)
def test_poor_statistics_still_give_numbers(method, model, role, inputs):
    found, _, _ = case(method, model, role)
    stats = {part: observed(method().needs, POOR[inputs](x)) for part, x in found.inputs.items()}
    weights, biases = cast(found.weights, torch.bfloat16), cast(found.biases, torch.bfloat16)
    options = method().options(found.unit, weights, stats)
    assert torch.tensor([option.error for option in options]).isfinite().all()
    for option in spread(options, 3):
        made = method().compress(found.unit, weights, biases, stats, option.amount)
        assert stored(found, made, 2) == option.nbytes
        for kind in made.values():
            assert_storable(kind, weights, biases)


@for_every(
    "method",
    UNIT_METHODS,
    {"stat": "looks at the last weight alone; NaN in the others goes into the file that it makes"},
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(method, bad):
    for role in method.roles:
        found, stats, options = case(method, KNOWN, role)
        for part in found.weights:
            weights = {name: weight.clone() for name, weight in found.weights.items()}
            weights[part][1, 1] = bad
            assert_refused(method, found, weights, stats, options[-1].amount)


@every_role
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(method, role, bad):
    found, stats, options = case(method, KNOWN, role)
    for part, x in found.inputs.items():
        broken = x.clone()
        broken[1, 1] = bad
        assert_refused(
            method, found, found.weights, stats | {part: observed(method().needs, broken)}, options[-1].amount
        )


def assert_refused(
    method: type[UnitMethod], found: Scene, weights: Mapping[str, Tensor], stats: Mapping[str, Stats], amount: object
) -> None:
    """Or else the bad number was not read: nothing that comes back shows it."""
    try:
        errors = [option.error for option in method().options(found.unit, weights, stats)]
        assert torch.tensor(errors).isfinite().all()
        made = method().compress(found.unit, weights, found.biases, stats, amount)
    except TerselyError as error:
        assert "finite" in str(error)
    else:
        for kind in made.values():
            assert_storable(kind)


@every_role
@pytest.mark.parametrize("amount", [0, -1, 10**6, None, {"unknown": 1}, "8"], ids=str)
def test_an_amount_that_is_not_offered_is_refused(method, role, amount):
    found, stats, _ = case(method, KNOWN, role)
    with pytest.raises(TerselyError):
        method().compress(found.unit, found.weights, found.biases, stats, amount)

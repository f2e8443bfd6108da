"""Every method on coupled linears keeps the contract of `tersely.methods.base.UnitMethod`.

Units are the attention and the MLP of tiny models, as their anatomy finds them; errors are measured in the model, on
the output of the last linear of the unit.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

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
    other_random_numbers,
    rebuilt,
    scene,
    spread,
    variants,
    weight_bytes,
)
from tersely.anatomy import DEPTH, READING, Unit
from tersely.convert import attention_settings, norm_tensors
from tersely.errors import AnatomyError, TerselyError
from tersely.kinds import Kind, LinearKind, link
from tersely.kinds.attention import LINEARS
from tersely.methods import UNIT_METHODS, RebuildsAttention
from tersely.methods.base import UnitMethod
from tersely.option import Option
from tersely.stats import Gram, Stats, keyed_by

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


@dataclass(frozen=True)
class Case:
    """A unit, what treats it, exactly what that asked to know of its inputs, and what it offers."""

    found: Scene
    method: UnitMethod
    gains: Mapping[str, Tensor]
    """Of the norms of heads, where the attention is built anew."""
    stats: Mapping[str, Stats]
    options: list[Option]

    @property
    def unit(self) -> Unit:
        return self.found.unit

    def weights(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return cast(self.found.weights, dtype)

    def biases(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return cast(self.found.biases, dtype)

    def made(
        self,
        amount: object,
        dtype: torch.dtype = torch.float64,
        *,
        weights: Mapping[str, Tensor] | None = None,
        stats: Mapping[str, Stats] | None = None,
    ) -> dict[str, Kind]:
        whole = (weights or self.weights(dtype)) | cast(self.gains, dtype)
        return self.method.compress(self.unit, whole, self.biases(dtype), stats or self.stats, amount)


def treat(method: UnitMethod, model: str, role: str) -> Case:
    """Skips where the method refuses the unit, unless it is one that all have to treat."""
    found, gains = scene(model, role), {}
    try:
        if isinstance(method, RebuildsAttention) and role == "attention":
            settings = attention_settings(found.model, found.unit)
            gains = {
                name: found.model.get_parameter(path).detach()
                for name, path in norm_tensors(found.unit, settings).items()
            }
            method = method.for_attention(settings)
        method.check(found.unit)
    except AnatomyError as reason:
        if model == KNOWN:
            raise
        pytest.skip(f"refused: {reason}")
    stats = found.stats(method.needs)
    return Case(found, method, gains, stats, list(method.options(found.unit, found.weights, stats)))


@cache
def case(method: type[UnitMethod], model: str, role: str) -> Case:
    """Read-only."""
    return treat(method(), model, role)


def placed(found: Scene, made: Mapping[str, Kind], dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The model with these kinds; the key "" stands for the whole attention."""
    model = copy.deepcopy(found.model).to(dtype)
    for role, kind in made.items():
        model.set_submodule(found.unit.sites[role].name if role else found.unit.module, kind.eval())
    link(model)
    return model


@torch.no_grad()
def outputs(found: Scene, made: Mapping[str, Kind]) -> Tensor:
    """What the last linear of the unit says, in the model with these kinds; of linears that read alike, what all say
    of what they read in the model as it was."""
    if found.unit.role in (READING, DEPTH):
        linears = {role: made.get(role) or found.model.get_submodule(s.name) for role, s in found.unit.sites.items()}
        return torch.cat([linear(found.inputs[role]) for role, linear in linears.items()], dim=-1)
    model, seen = placed(found, made), []
    last = list(found.unit.sites.values())[-1]
    model.get_submodule(last.name).register_forward_hook(lambda module, arguments, out: seen.append(out))
    model(TOKENS)
    return seen[0].flatten(0, -2)


def stored(found: Scene, made: Mapping[str, Kind], itemsize: int) -> int:
    """Bytes of the unit's weights afterwards."""
    if "" in made:
        return sum(weight_bytes(made[""].get_submodule(name)) for name in LINEARS.values())
    left = [weight.numel() * itemsize for role, weight in found.weights.items() if role not in made]
    return sum(left) + sum(map(weight_bytes, made.values()))


def energy_of(found: Scene) -> float:
    """Of the output, without what the bias adds."""
    last = list(found.unit.sites)[-1:]
    roles = list(found.unit.sites) if found.unit.role in (READING, DEPTH) else last
    zeros = {role: torch.zeros(len(weight)).double() for role, weight in found.weights.items()}
    bias = torch.cat([found.biases.get(role, zeros[role]) for role in roles])
    return (outputs(found, {}) - bias).square().sum(-1).mean().item()


# --- what could be done -----------------------------------------------------------------------------------------------


@every_unit
def test_sizes_are_the_options_without_errors(method, model, role):
    asked = case(method, model, role)
    sizes = asked.method.sizes(asked.unit, 8)
    assert {size.error for size in sizes} == {None}
    assert [(o.amount, o.nbytes) for o in asked.options] == [(s.amount, s.nbytes) for s in sizes]


@every_unit
def test_options_are_plain_rise_in_bytes_and_begin_with_all_of_the_energy(method, model, role):
    options = case(method, model, role).options
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
    assert_foreseen(case(method, model, role))


def assert_foreseen(asked: Case) -> None:
    """Where the Gram matrix is what the method goes by.  What an attention of other scores will say, no matrix knows:
    there, nothing lost must mean nothing lost, and the most is better than the least."""
    if Gram not in asked.method.needs or any(keyed_by(kind) != "input" for kind in asked.method.needs):
        return  # the predictions are in a metric of the method's own
    dense, energy = outputs(asked.found, {}), energy_of(asked.found)
    assert_predicted(asked.method, asked.options[0].error, energy, energy)
    seen, other_scores = [Option(0, 0, energy)], False
    for option in spread(asked.options):
        made = asked.made(option.amount)
        other_scores |= "" in made
        error = (outputs(asked.found, made) - dense).square().sum(-1).mean().item()
        if "" not in made:
            assert_predicted(asked.method, option.error, error, energy)
        elif option.error <= SLACK * energy:
            assert error <= 1e-4 * energy
        seen.append(Option(option.amount, option.nbytes, error))
    if other_scores:
        assert seen[-1].error <= seen[1].error
    else:
        assert_more_is_never_worse(seen)


# --- what is made -----------------------------------------------------------------------------------------------------


@every_unit
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_unit_runs_in_its_model_with_the_promised_bytes(method, model, role, dtype):
    asked = case(method, model, role)
    sizes = {json.dumps(s.amount): s.nbytes for s in asked.method.sizes(asked.unit, dtype.itemsize)}
    for option in spread(asked.options, 3):
        said = json.dumps(option.amount)
        assert_sound(asked, asked.made(json.loads(said), dtype), sizes[said], dtype)


def assert_sound(asked: Case, made: Mapping[str, Kind], nbytes: int, dtype: torch.dtype) -> None:
    assert made.keys() <= {*asked.unit.sites, ""}
    assert stored(asked.found, made, dtype.itemsize) == nbytes
    for part, kind in made.items():
        if part:
            assert isinstance(kind, LinearKind), part
            assert kind.spec()["bias"] is (part in asked.found.biases)
        else:
            assert list(made) == [""] and asked.unit.role == "attention"
        assert {t.dtype for t in kind.state_dict().values() if t.is_floating_point()} == {dtype}
        assert_storable(kind)
        assert_same(rebuilt(kind), kind)
    with torch.no_grad():
        logits = placed(asked.found, made, dtype)(TOKENS[:1]).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()


@for_every("method", variants(UNIT_METHODS))
def test_every_choice_among_its_options_keeps_the_contract(method):
    for role in method.roles:
        asked = treat(method, KNOWN, role)
        weights, sizes = asked.weights(torch.float32), asked.method.sizes(asked.unit, 8)
        assert [(o.amount, o.nbytes) for o in asked.options] == [(s.amount, s.nbytes) for s in sizes]
        single = {json.dumps(size.amount): size.nbytes for size in asked.method.sizes(asked.unit, 4)}
        assert_more_is_never_worse(asked.options)
        assert_foreseen(asked)
        for option in spread(asked.options, 3):
            with nothing_changes(weights, asked.stats):
                made = asked.made(option.amount, torch.float32, weights=weights)
            assert_sound(asked, made, single[json.dumps(option.amount)], torch.float32)


# --- pure functions ---------------------------------------------------------------------------------------------------


@every_unit
def test_nothing_is_written_into_and_the_same_twice_is_the_same(method, model, role):
    asked = case(method, model, role)
    weights, biases, amounts = asked.weights(), asked.biases(), [o.amount for o in spread(asked.options, 3)]
    with nothing_changes(weights, biases, asked.stats):
        asked.method.check(asked.unit)
        asked.method.sizes(asked.unit, 4)
        first = asked.method.options(asked.unit, weights, asked.stats)
        made = [
            asked.method.compress(asked.unit, weights | asked.gains, biases, asked.stats, amount) for amount in amounts
        ]
    for kinds in made:
        for kind in kinds.values():
            assert_storable(kind, weights, biases, asked.gains)
    with other_random_numbers():
        assert asked.method.options(asked.unit, weights, asked.stats) == first
        for amount, kinds in zip(amounts, made, strict=True):
            assert_same(asked.made(amount), kinds)


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
    asked = case(method, model, role)
    stats = asked.found.stats(asked.method.needs, POOR[inputs])
    options = asked.method.options(asked.unit, asked.weights(torch.bfloat16), stats)
    assert torch.tensor([option.error for option in options]).isfinite().all()
    for option in spread(options, 3):
        made = asked.made(option.amount, torch.bfloat16, stats=stats)
        assert stored(asked.found, made, 2) == option.nbytes
        for kind in made.values():
            assert_storable(kind)


@for_every("method", UNIT_METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(method, bad):
    for role in method.roles:
        asked = case(method, KNOWN, role)
        for part in asked.unit.sites:
            weights = {name: weight.clone() for name, weight in asked.found.weights.items()}
            weights[part][1, 1] = bad
            assert_refused(asked, weights, asked.stats)


@for_every("method", UNIT_METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(method, bad):
    for role in method.roles:
        asked = case(method, KNOWN, role)
        for part in asked.unit.sites:
            stats = asked.found.stats(
                asked.method.needs, lambda x: torch.where(torch.arange(x.shape[1]) == 1, bad, x), only=part
            )
            assert_refused(asked, asked.weights(), stats)


def assert_refused(asked: Case, weights: Mapping[str, Tensor], stats: Mapping[str, Stats]) -> None:
    """Or else the bad number was not read: nothing that comes back shows it."""
    try:
        errors = [option.error for option in asked.method.options(asked.unit, weights, stats)]
        assert torch.tensor(errors).isfinite().all()
        made = asked.made(asked.options[-1].amount, weights=weights, stats=stats)
    except TerselyError as error:
        assert "finite" in str(error)
    else:
        for kind in made.values():
            assert_storable(kind)


@every_role
@pytest.mark.parametrize("amount", [0, -1, 10**6, None, {"unknown": 1}, "8"], ids=str)
def test_an_amount_that_is_not_offered_is_refused(method, role, amount):
    asked = case(method, KNOWN, role)
    with pytest.raises(TerselyError):
        asked.made(amount)

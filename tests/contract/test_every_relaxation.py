"""Every relaxation keeps the contract of `tersely.train.relax.base`: it trains what it says, and hardens into what it
computed."""

import copy
import json
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from contract.material import assert_same, assert_storable, normal, nothing_changes, observed, rebuilt, weight_bytes
from tersely.errors import RecipeError
from tersely.kinds import Kind, LowRankLinear
from tersely.train.relax import GROUPS, RELAXATIONS, Relaxation, Relaxed

SHAPE = (14, 20)


def plain(dtype: torch.dtype) -> nn.Module:
    made = nn.Linear(SHAPE[1], SHAPE[0], dtype=dtype)
    made.weight.data, made.bias.data = normal(*SHAPE, dtype=dtype), normal(SHAPE[0], seed=1, dtype=dtype)
    return made


def transposed(dtype: torch.dtype) -> nn.Module:
    made = Conv1D(*SHAPE).to(dtype)
    made.weight.data, made.bias.data = normal(*SHAPE[::-1], dtype=dtype), normal(SHAPE[0], seed=1, dtype=dtype)
    return made


def factors(dtype: torch.dtype) -> nn.Module:
    made = LowRankLinear.from_factors(normal(SHAPE[0], 5, dtype=dtype), normal(5, SHAPE[1], seed=2, dtype=dtype))
    made.set_bias(normal(SHAPE[0], seed=1, dtype=dtype))
    return made


LINEARS = {"linear": plain, "conv1d": transposed, "low_rank": factors}
EVERYWHERE = "linear"
"""What every relaxation has to treat; the others it may refuse."""

every_relaxation = pytest.mark.parametrize("relaxation", RELAXATIONS.values(), ids=RELAXATIONS)
every_linear = pytest.mark.parametrize("linear", LINEARS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(3, 4, SHAPE[1], seed=4, dtype=dtype)


def relaxed(
    relaxation: type[Relaxation], linear: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[nn.Module, Relaxed]:
    """A linear and what stands in for it; skips where the relaxation refuses such a linear."""
    base = LINEARS[linear](dtype)
    stats = observed(relaxation().needs, inputs(torch.float64).flatten(0, -2))
    try:
        return base, relaxation().relax(base, stats, generator(seed))
    except RecipeError as reason:
        if linear == EVERYWHERE:
            raise
        pytest.skip(f"refused: {reason}")


def parameters(module: Relaxed) -> Iterator[nn.Parameter]:
    for of_group in module.groups().values():
        yield from of_group


def learn(module: Relaxed) -> Relaxed:
    """Other numbers everywhere, as after some steps; then the end of the training."""
    with torch.no_grad():
        for number, parameter in enumerate(parameters(module)):
            parameter.add_(normal(*parameter.shape, seed=number + 10).to(parameter), alpha=0.1)
    module.advance(1.0)
    return module.eval()


# --- while it trains --------------------------------------------------------------------------------------------------


@every_relaxation
@every_linear
def test_all_that_trains_gets_a_gradient_and_the_linear_keeps_its_numbers(relaxation, linear):
    base, module = relaxed(relaxation, linear)
    before = copy.deepcopy(base)
    assert module.groups().keys() <= set(GROUPS)
    inside = {id(parameter) for parameter in module.parameters()}
    trained = list(parameters(module))
    assert trained and all(id(parameter) in inside for parameter in trained)
    assert len({id(parameter) for parameter in trained}) == len(trained)
    learn(module).train()
    module.advance(0.0)
    x = inputs().requires_grad_()
    loss = module(x).square().mean() + module.penalty() + relaxation().budget([module], 6.0)
    assert loss.shape == () and loss.isfinite()
    loss.backward()
    for parameter in trained:
        assert parameter.dtype.itemsize >= 4, "steps of the optimizer are smaller than 16 bits can resolve"
        assert parameter.grad.isfinite().all() and parameter.grad.any()
    assert x.grad.any(), "what stands before it could not train"
    optimizer = torch.optim.SGD(trained, lr=0.01)
    optimizer.step()
    module.harden()
    assert_same(base, before)


@every_relaxation
def test_a_budget_is_a_price_and_where_none_is_given_it_is_nothing_or_asked_for(relaxation):
    _, module = relaxed(relaxation, EVERYWHERE)
    priced = relaxation().budget([module, module], 6.0)
    assert priced.shape == () and priced.isfinite() and priced >= 0
    try:
        free = relaxation().budget([module, module], None)
    except RecipeError as error:
        assert "bits" in str(error)
    else:
        assert free.shape == () and free == 0


@every_relaxation
@every_linear
def test_random_numbers_come_from_the_generator(relaxation, linear):
    base, first = relaxed(relaxation, linear)
    stats = observed(relaxation().needs, inputs(torch.float64).flatten(0, -2))
    with nothing_changes(base, stats):
        second = relaxation().relax(base, stats, generator())
        answers = [module.train()(inputs()) for module in (first, second)]
    assert_same(first, second)
    assert torch.equal(*answers)


@every_relaxation
@every_linear
def test_any_moment_may_be_the_first(relaxation, linear):
    """A resumed run begins in the middle."""
    _, module = relaxed(relaxation, linear)
    module.train()
    for done in (0.5, 1.0, 0.0, 0.99, 1.0):
        module.advance(done)
        assert module(inputs()).isfinite().all()
        assert module.bits().shape == () and module.bits() > 0


@every_relaxation
@every_linear
def test_its_state_is_all_that_a_resumed_run_needs(relaxation, linear):
    _, module = relaxed(relaxation, linear)
    _, other = relaxed(relaxation, linear, seed=1)
    learn(module)
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    other.advance(1.0)
    assert torch.equal(other.eval()(inputs()), module(inputs()))


# --- when it is over --------------------------------------------------------------------------------------------------


@every_relaxation
@every_linear
@torch.no_grad()
def test_it_hardens_into_what_it_computed(relaxation, linear):
    _, module = relaxed(relaxation, linear)
    for prepare in (partial(nn.Module.eval), learn):  # as it was handed over, and trained
        prepare(module).advance(1.0)
        with nothing_changes(module):
            hard = module.harden().eval()
            assert_same(module.harden(), hard)
        torch.testing.assert_close(hard(inputs()), module(inputs()), rtol=1e-4, atol=1e-4)


@every_relaxation
@every_linear
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_what_it_hardens_into_can_be_stored_in_the_promised_bits(relaxation, linear, dtype):
    base, module = relaxed(relaxation, linear, dtype)
    learn(module)
    assert module(inputs(dtype)).dtype == dtype
    hard = module.harden()
    assert isinstance(hard, Kind) or type(hard) is type(base)
    if not isinstance(hard, Kind):
        assert {name: t.shape for name, t in hard.state_dict().items()} == {
            name: t.shape for name, t in base.state_dict().items()
        }
    assert {t.dtype for t in hard.state_dict().values() if t.is_floating_point()} <= {dtype}
    assert_storable(hard)
    assert module.bits().item() == 8 * weight_bytes(hard)
    y = hard(inputs(dtype))
    assert y.dtype == dtype and y.shape == (3, 4, SHAPE[0]) and y.isfinite().all()
    if isinstance(hard, Kind):
        assert json.loads(json.dumps(hard.spec())) == hard.spec()
        assert torch.equal(rebuilt(hard)(inputs(dtype)), y)


@every_relaxation
def test_what_is_no_linear_is_refused(relaxation):
    stats = observed(relaxation().needs, inputs(torch.float64).flatten(0, -2))
    with pytest.raises(RecipeError):
        relaxation().relax(nn.LayerNorm(SHAPE[1]), stats, generator())

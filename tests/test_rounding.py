"""Learned rounding: it starts where it was put, computes what it will store, and its gradients are the ones it says."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from contract.material import correlated, normal, observed
from tersely.errors import RecipeError
from tersely.kinds import LowRankLinear, QuantizedLinear
from tersely.kinds.sum import SumLinear
from tersely.linalg.grid import SCALE_FORMATS, Grid, Scales, fit_grid, fit_table, float_zeros
from tersely.linalg.levels import LEVELS
from tersely.methods.quantize.gptq import GPTQ
from tersely.methods.quantize.rtn import RoundToNearest
from tersely.stats import Gram, Stats
from tersely.train.loop import SignDescent
from tersely.train.relax.rounding import RoundedLinear, RoundedParts, Rounding, _nearest_stored
from tersely.train.settings import Training

SHAPE = (6, 20)
GROUP = 8  # the last group of a row is smaller


def _columns() -> Scales:
    return Scales.of(normal(SHAPE[1], seed=8, dtype=torch.float32).abs() + 0.1)


GRIDS = {
    **{f"{bits} bits": lambda w, bits=bits: fit_grid(w, bits, GROUP) for bits in (1, 2, 3, 4, 8)},
    "symmetric": lambda w: fit_grid(w, 3, GROUP, "symmetric"),
    "symmetric_full": lambda w: fit_grid(w, 2, GROUP, "symmetric_full"),
    "rows": lambda w: fit_grid(w, 3, 0),
    **{format: lambda w, format=format: fit_grid(w, 3, GROUP, format=format) for format in SCALE_FORMATS},
    "columns": lambda w: fit_grid(w, 3, GROUP, columns=_columns()),
    **{table: lambda w, table=table: fit_table(w, table, GROUP) for table in LEVELS},
    "shifted table": lambda w: fit_table(w, "nf4", GROUP, shift=True, format="log8"),
    "table with columns": lambda w: fit_table(w, "nf3", GROUP, columns=_columns()),
    "float zeros": lambda w: with_float_zeros(fit_grid(w, 3, GROUP)),
}
"""Every format of levels, scales and zero points."""

every_grid = pytest.mark.parametrize("grid", GRIDS)


def with_float_zeros(grid: Grid) -> Grid:
    return replace(grid, zero=float_zeros(grid.zeros(torch.float32) + 0.3))


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*SHAPE, dtype=dtype)


def made(name: str, dtype: torch.dtype = torch.float32, *, shuffled: bool = False) -> tuple[QuantizedLinear, Tensor]:
    """A quantized linear and the weight it stands for; `shuffled`: codes that are not the nearest ones."""
    dense = weight(dtype)
    grid = GRIDS[name](dense)
    if shuffled or name == "float zeros":
        codes = torch.randint(0, grid.top + 1, SHAPE, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    else:
        codes = grid.nearest(dense)
    linear = QuantizedLinear.from_codes(codes, grid, dtype)
    linear.set_bias(normal(SHAPE[0], seed=2, dtype=dtype))
    return linear, dense


def moved(module: RoundedLinear, seed: int = 0, size: float = 0.4) -> RoundedLinear:
    """Other numbers, as after some training."""
    with torch.no_grad():
        for number, parameter in enumerate(p for group in module.groups().values() for p in group):
            parameter.add_(normal(*parameter.shape, seed=seed + number).to(parameter), alpha=size)
    return module


def same(first: QuantizedLinear, second: QuantizedLinear) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return first.spec() == second.spec() and all(torch.equal(one[name], other[name]) for name in one)


# --- the start --------------------------------------------------------------------------------------------------------


@every_grid
@pytest.mark.parametrize("shuffled", [False, True], ids=["nearest", "any"])
@pytest.mark.parametrize("known", [False, True], ids=["alone", "dense"])
def test_it_starts_at_the_very_module(grid, shuffled, known):
    linear, dense = made(grid, shuffled=shuffled)
    relaxed = RoundedLinear(linear, dense if known else None)
    x = normal(3, SHAPE[1], seed=4, dtype=torch.float32)
    assert torch.equal(relaxed(x), linear(x))
    hard = relaxed.harden()
    assert hard.spec() == linear.spec() and hard.nbytes() == linear.nbytes()
    assert torch.equal(hard.to_dense(), linear.to_dense())
    if not (grid == "e2m1" or (grid == "fp4")):  # these have two zeros
        assert same(hard, linear)


def test_it_starts_at_the_codes_of_error_feedback():
    dense, x = normal(12, 24, dtype=torch.float32), correlated(24)
    linear = GPTQ(group=8).compress(dense, observed((Gram,), x), 2)
    assert not torch.equal(linear.unpacked(), linear.grid().nearest(dense))
    assert same(RoundedLinear(linear, dense).harden(), linear)


def test_a_weight_begins_as_near_to_the_dense_one_as_its_cell_allows():
    dense = normal(12, 24, dtype=torch.float32)
    linear = GPTQ(group=8).compress(dense, observed((Gram,), correlated(24)), 3)
    grid = linear.grid()
    scale, zero = (t.repeat_interleave(8, 1) for t in (grid.scales.values(), grid.zeros(torch.float32)))
    place = RoundedLinear(linear, dense).place.detach()
    codes, wanted = linear.unpacked().float(), dense / scale + zero
    assert ((place - codes).abs() < 0.5).all()
    inside = (wanted - codes).abs() < 0.49
    assert inside.any() and not inside.all()
    torch.testing.assert_close(place[inside], wanted[inside])
    assert (((wanted - codes) * (place - codes))[~inside] > 0).all()
    assert torch.equal(RoundedLinear(linear).place.detach(), codes)


# --- while it trains --------------------------------------------------------------------------------------------------


@every_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_it_computes_is_what_it_stores(grid, dtype):
    linear, dense = made(grid, dtype)
    x = normal(3, SHAPE[1], seed=4, dtype=dtype)
    for seed in range(3):
        relaxed = moved(RoundedLinear(linear, dense), seed)
        hard = relaxed.harden()
        assert torch.equal(relaxed(x), hard(x)) and relaxed(x).isfinite().all()
        assert hard.nbytes() == linear.nbytes() and hard.spec() == linear.spec()
        assert torch.equal(relaxed.weight(), hard.to_dense())


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(GRIDS)),
    st.floats(1e-3, 1e3),
    st.sampled_from([2.0**-40, 1.0, 2.0**40]),
    st.integers(0, 99),
)
def test_nothing_that_training_does_leaves_the_numbers(grid, size, unit, seed):
    dense = weight() * unit
    levels = GRIDS[grid](dense)
    codes = torch.randint(0, levels.top + 1, SHAPE, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    relaxed = moved(RoundedLinear(QuantizedLinear.from_codes(codes, levels, torch.float32), dense), seed, size)
    hard = relaxed.harden()
    assert hard.to_dense().isfinite().all()
    assert torch.equal(relaxed.weight(), hard.to_dense())


def test_the_gradients_are_those_of_the_formulas():
    linear, dense = made("3 bits")
    relaxed = moved(RoundedLinear(linear, dense), size=0.2)
    grid, scale, zero = relaxed._trained_grid()
    scale, zero = scale.detach().requires_grad_(), zero.detach().requires_grad_()
    relaxed._trained_grid = lambda: (grid, scale, zero)  # type: ignore[method-assign]
    upstream = normal(*SHAPE, seed=3, dtype=torch.float32)
    (relaxed.weight() * upstream).sum().backward()

    def spread(of_group: Tensor) -> Tensor:
        return of_group.detach()[..., 0].repeat_interleave(GROUP, 1)[:, : SHAPE[1]]

    old = linear.grid()
    s, z = spread(scale), spread(zero)
    bare = (relaxed.place.detach() - spread(old.zeros(torch.float32)[..., None])) * spread(
        old.scales.values()[..., None]
    )
    real = bare / s + z
    level = real.round().clamp(0, 7)
    inside = (real >= -0.5) & (real <= 7.5)
    assert inside.any() and not inside.all()
    torch.testing.assert_close(relaxed.place.grad, upstream * torch.where(inside, spread(relaxed._scale), 0.0))
    of_scale = upstream * torch.where(inside, level - z - bare / s, level - z)
    of_zero = upstream * torch.where(inside, 0.0, -s)
    for gradient, wanted in ((scale.grad, of_scale), (zero.grad, of_zero)):
        summed = torch.stack([part.sum(1) for part in wanted.split(GROUP, 1)], 1)
        torch.testing.assert_close(gradient[..., 0], summed, rtol=1e-4, atol=1e-4)


def test_factors_on_the_ends_move_the_ends():
    linear, dense = made("4 bits")
    relaxed, grid = RoundedLinear(linear, dense), linear.grid()
    low, high = (0.75, 0.5)
    relaxed.ends.data[..., 0], relaxed.ends.data[..., 1] = high, low
    _, scale, zero = relaxed._trained_grid()
    with torch.no_grad():
        share = ((15 - relaxed._zero) * high + relaxed._zero * low) / 15
        torch.testing.assert_close(scale, relaxed._scale * share, rtol=1e-3, atol=0)
        exact = relaxed._zero * low / share
        assert torch.equal(zero, exact.round())
        torch.testing.assert_close((15 - exact) * share * relaxed._scale, high * (15 - relaxed._zero) * relaxed._scale)
        torch.testing.assert_close(-exact * share * relaxed._scale, -low * relaxed._zero * relaxed._scale)
    assert torch.equal(grid.scales.raw, linear.grid().scales.raw)  # of the module nothing has changed


@pytest.mark.parametrize("format", SCALE_FORMATS)
def test_stored_scales_are_the_nearest(format):
    like = fit_grid(normal(9, 64, dtype=torch.float32) * torch.logspace(-2, 2, 9)[:, None], 3, 8, format=format).scales
    assert torch.equal(_nearest_stored(like.values(), like).raw, like.raw)
    wanted = like.values() * (0.9 + 0.2 * torch.rand(like.raw.shape, generator=torch.Generator().manual_seed(0)))
    found = _nearest_stored(wanted, like)
    integers = like.raw.dtype
    for step in (-1, 1):
        other = replace(found, raw=(found.raw.int() + step).clamp(1 if step < 0 else 0, 254).to(integers))
        if integers != torch.uint8:
            other = replace(found, raw=found.raw + step)
        ratio, rival = ((s.values().double().log2() - wanted.double().log2()).abs() for s in (found, other))
        assert (ratio <= rival + 1e-3).all()
    extreme = _nearest_stored(torch.full_like(wanted, 1e38), like)
    assert extreme.values().isfinite().all() and (_nearest_stored(wanted * 0 + 1e-38, like).values() > 0).all()


def test_without_ranges_the_grid_stays():
    linear, dense = made("4 bits")
    relaxed = moved(RoundedLinear(linear, dense, ranges=False))
    assert relaxed.groups()["quantizers"] == [relaxed.place]
    hard = relaxed.harden()
    assert torch.equal(hard.scales, linear.scales) and torch.equal(hard.zeros, linear.zeros)
    assert not torch.equal(hard.codes, linear.codes)


def test_it_learns_what_rounding_to_nearest_does_not_know():
    """The output error of a linear in correlated inputs."""
    dense, x = normal(16, 32, dtype=torch.float32), correlated(32).float()
    grid = fit_grid(dense, 2, 16)
    linear = QuantizedLinear.from_codes(grid.nearest(dense), grid, dense.dtype)

    def error(linear: nn.Module) -> Tensor:
        return (linear(x) - x @ dense.T).square().mean()

    relaxed, steps = RoundedLinear(linear, dense), 100
    optimizer = SignDescent([{"params": relaxed.groups()["quantizers"]}])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = (1 - step / steps) / steps
        optimizer.zero_grad()
        error(relaxed).backward()
        optimizer.step()
    assert error(relaxed.harden()).item() < 0.6 * error(linear).item()


# --- what it stands for -----------------------------------------------------------------------------------------------


def test_parts_of_a_decomposition_train_and_the_rest_stays():
    down, up = made("4 bits")[0], normal(9, SHAPE[0], dtype=torch.float32)
    down.bias = None
    factorised = LowRankLinear.from_factors(up, weight())
    factorised.down = down
    rest = LowRankLinear.from_factors(normal(9, 2, dtype=torch.float32), normal(2, SHAPE[1], dtype=torch.float32))
    base = SumLinear.of([factorised, rest])
    relaxed = Rounding().relax(base, Stats(), torch.Generator())
    assert isinstance(relaxed, RoundedParts)
    x = normal(3, SHAPE[1], seed=4, dtype=torch.float32)
    assert torch.equal(relaxed(x), base(x))
    assert {p.shape for p in relaxed.groups()["quantizers"]} == {SHAPE, (6, 3, 2)}
    (part,) = relaxed._parts()
    moved(part)
    hard = relaxed.harden()
    assert torch.equal(hard(x), relaxed(x)) and not torch.equal(hard(x), base(x))
    assert torch.equal(hard.terms[0].up.weight, up) and hard.nbytes() == base.nbytes()
    assert relaxed.bits() == 8 * base.nbytes()
    with pytest.raises(RecipeError, match="no codes"):
        Rounding().relax(rest, Stats(), torch.Generator())


def test_inputs_stay_rounded():
    linear, dense = made("4 bits")
    linear.round_input(4, 2.0)
    relaxed = RoundedLinear(linear, dense)
    x = normal(3, SHAPE[1], seed=4, dtype=torch.float32)
    assert torch.equal(relaxed(x), linear(x))
    assert same(relaxed.harden(), linear)


def test_a_plain_linear_is_rounded_first():
    linear, stats = nn.Linear(*SHAPE[::-1]), observed((Gram,), correlated(SHAPE[1]))
    for start, method in (("nearest", RoundToNearest), ("gptq", GPTQ)):
        hard = Rounding(width=3, group=GROUP, start=start).relax(linear, stats, torch.Generator()).harden()
        made = method(group=GROUP).compress(linear.weight.detach(), stats, 3)
        made.set_bias(linear.bias)
        assert same(hard, made)


def test_a_dense_weight_that_is_no_relative_is_ignored():
    linear, dense = made("4 bits")
    for other in (dense.flip(0), dense * 4, torch.zeros_like(dense)):
        relaxed = RoundedLinear(linear, other)
        assert torch.equal(relaxed.place.detach(), linear.unpacked().float())


@pytest.mark.parametrize(
    ("said", "message"), [({"width": 9}, "rounding: width 9"), ({"group": -1}, "group -1"), ({"grid": "x"}, "grid")]
)
def test_what_cannot_be_is_refused(said, message):
    with pytest.raises(RecipeError, match=message):
        Rounding(**said)
    with pytest.raises(RecipeError, match="learns no size"):
        Rounding().check([], [], 0, 3.0)


# --- the optimiser ----------------------------------------------------------------------------------------------------


def test_signs_move_every_number_by_the_rate():
    numbers, still = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2))
    optimizer = SignDescent([{"params": [numbers, still], "lr": 0.25, "weight_decay": 0.0}])
    numbers.grad = torch.tensor([1e-20, -3.0, 0.0])
    optimizer.step()
    assert torch.equal(numbers.detach(), torch.tensor([-0.25, 0.25, 0.0]))
    assert torch.equal(still.detach(), torch.ones(2))


def test_an_optimiser_that_is_none_is_refused():
    with pytest.raises(RecipeError, match="optimiser = 'newton'"):
        Training(optimiser="newton")

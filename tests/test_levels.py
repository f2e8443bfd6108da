"""Tables of levels: the nearest one is found, levels come back exactly, Gaussian weights lose what is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersely.linalg.grid import Scales, fit_table, in_groups, wide
from tersely.linalg.levels import LEVELS, NF4, bits_of, levels_of, nearest_levels, reach_of

every_table = pytest.mark.parametrize("table", LEVELS)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lost(weight: Tensor, grid) -> float:
    return ((weight - grid.levels(grid.nearest(weight))).square().sum() / weight.square().sum()).item()


@every_table
def test_a_code_is_a_place_in_the_table(table):
    assert len(LEVELS[table]) == 2 ** bits_of(table)
    levels = levels_of(table, torch.float64)
    codes = nearest_levels(levels, table)
    assert torch.equal(levels[codes.int()], levels)
    assert reach_of(table) == levels.abs().max().item()


@every_table
@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-8, 8), min_size=1, max_size=30))
def test_the_midpoints_find_the_nearest_level(table, values):
    values = torch.tensor(values, dtype=torch.float64)
    levels = levels_of(table, torch.float64)
    found = levels[nearest_levels(values, table).int()]
    assert torch.equal((values - found).abs(), (values[:, None] - levels).abs().amin(1))


def test_nf4_is_made_of_normal_quantiles():
    def quantile(p: Tensor) -> Tensor:
        return math.sqrt(2) * torch.erfinv(2 * p - 1)

    offset = 0.9677083
    positive = quantile(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -quantile(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    made = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values / positive.max()
    torch.testing.assert_close(torch.tensor(NF4, dtype=torch.float64), made, rtol=0, atol=1e-6)


EXPECTED = {"nf4": (0.00763, 0.00844, 0.00913), "fp4": (0.0131, 0.0149, 0.0166), "e2m1": (0.0103, 0.0112, 0.0119)}


@pytest.mark.parametrize("table", EXPECTED)
def test_gaussian_weights_lose_what_they_are_known_to_lose(table):
    """In groups of 32, 64 and 128, with scales that are not rounded to speak of."""
    weight = normal(512, 1024, dtype=torch.float32)
    for group, expected in zip((32, 64, 128), EXPECTED[table], strict=True):
        assert lost(weight, fit_table(weight, table, group)) == pytest.approx(expected, rel=0.02)


@every_table
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("shape", [(6, 128), (5, 100), (4, 7), (3, 1)])
def test_no_weight_is_off_by_more_than_half_the_widest_gap(table, shift, shape):
    weight = normal(*shape) + 0.3
    gap = levels_of(table, torch.float64).sort().values.diff().max().item()
    for format in ("float16", "float32", "log8", "e8m0"):
        grid = fit_table(weight, table, 32, shift=shift, format=format)
        off = in_groups((weight - grid.levels(grid.nearest(weight))).abs(), 32).amax(-1)
        zeros = 0.0 if grid.zero is None else grid.zeros(torch.float64).abs() * 2.0**-11
        assert (off <= grid.scales.values().double() * (gap / 2 + zeros) * (1 + 1e-5)).all()


@every_table
def test_a_shift_puts_the_mean_at_zero_and_takes_sixteen_bits(table):
    weight = normal(6, 64, seed=3) + 2.0
    plain, shifted = fit_table(weight, table, 32), fit_table(weight, table, 32, shift=True)
    assert plain.zero is None and shifted.zero is not None and shifted.zero.dtype == torch.int16
    mean = -shifted.zeros(torch.float64) * shifted.scales.values()
    torch.testing.assert_close(mean, in_groups(weight, 32).mean(-1), rtol=1e-3, atol=0)
    if table != "sign":  # two levels around zero: a shift can only do so much
        assert lost(weight, shifted) < 0.5 * lost(weight, plain)


@every_table
def test_a_group_that_hardly_varies_keeps_its_value(table):
    """Its zero point would be larger than any float16."""
    weight = torch.full((2, 64), 0.3, dtype=torch.float64)
    weight[0] += 1e-9 * normal(64)
    grid = fit_table(weight, table, 32, shift=True)
    torch.testing.assert_close(grid.levels(grid.nearest(weight)).double(), weight, rtol=1e-3, atol=0)


@every_table
@pytest.mark.parametrize("power", [-90, -3, 5, 90])
def test_a_power_of_two_changes_no_code(table, power):
    weight = normal(6, 100, dtype=torch.float32)
    for format in ("float16", "log8", "e8m0"):
        grids = [fit_table(w, table, 32, shift=True, format=format) for w in (weight, weight * 2.0**power)]
        codes = [grids[0].nearest(weight), grids[1].nearest(weight * 2.0**power)]
        assert torch.equal(codes[0], codes[1]) and torch.equal(grids[0].zero, grids[1].zero)
        assert torch.equal(grids[1].levels(codes[1]), grids[0].levels(codes[0]) * 2.0**power)


def test_zeros_stay_zeros():
    for table in (name for name, levels in LEVELS.items() if 0.0 in levels):
        for shift in (False, True):
            grid = fit_table(torch.zeros(2, 40), table, 16, shift=shift)
            assert not grid.levels(grid.nearest(torch.zeros(2, 40))).any()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=9))
def test_a_scale_that_is_a_power_of_two_is_the_next_one_that_is_not_smaller(wanted):
    wanted = torch.tensor([wanted], dtype=torch.float64)
    stored = Scales.of(wanted, "e8m0")
    values = stored.values().double()
    assert torch.equal(values, 2.0 ** wanted.log2().ceil()) and stored.raw.dtype == torch.uint8
    assert (stored.exponent, stored.ladder) == (0, None)
    assert torch.equal(Scales.of(values, "e8m0").raw, stored.raw)


def test_powers_of_two_end_where_a_byte_ends():
    wanted = torch.tensor([[1e-45, 2.0**-127, 2.0**127]], dtype=torch.float32)
    assert Scales.of(wanted, "e8m0").raw.tolist() == [[0, 0, 254]]
    assert Scales.of(wide(wanted), "e8m0").values().tolist() == [[2.0**-127, 2.0**-127, 2.0**127]]

"""Pivoted storage: r² numbers fewer for the same product, and no entry that rounding could blow up.

W' = up · down is what the factors stand for, J the rows that are kept, `rest` what makes the other rows out of them.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersely.errors import AnatomyError, CheckpointError, RecipeError
from tersely.kinds import LowRankLinear, Made, PivotedLinear, QuantizedLinear, dense_weight
from tersely.kinds.pivoted import BOUND, pivot_rows, pivoted_bytes, place_dtype
from tersely.linalg.grid import fit_grid
from tersely.methods.base import Method
from tersely.methods.low_rank.adasvd import AdaSVD
from tersely.methods.low_rank.asvd import ChannelScaledSVD
from tersely.methods.low_rank.nsvd import NSVD
from tersely.methods.low_rank.svd import PlainSVD
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.pipeline import load, run
from tersely.prepare import prepare
from tersely.recipe import recipe_from
from tersely.stats import AbsMean, Gram, Stats

SHAPES = {"wide": (10, 24), "tall": (24, 10), "square": (16, 16), "two rows": (2, 5), "one column": (7, 1)}
TRUNCATING: dict[str, type[Method]] = {
    "adasvd": AdaSVD,
    "asvd": ChannelScaledSVD,
    "nsvd": NSVD,
    "svd": PlainSVD,
    "svd_llm": WhitenedSVD,
}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_method = pytest.mark.parametrize("method", TRUNCATING.values(), ids=TRUNCATING)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def case(shape: tuple[int, int]) -> tuple[Tensor, Stats]:
    stats = Stats({kind: kind(shape[1]) for kind in (Gram, AbsMean)})
    stats.update(normal(200, shape[1], seed=1) * torch.logspace(0.5, -1, shape[1], dtype=torch.float64))
    return normal(*shape), stats


def ranks(shape: tuple[int, int]) -> range:
    return range(1, min(shape[0] - 1, shape[1]) + 1)


def off(first: Tensor, second: Tensor) -> float:
    """‖first - second‖ / ‖second‖."""
    whole = second.norm().item()
    return (first - second).norm().item() / whole if whole else first.norm().item()


# --- the same weight in fewer numbers ---------------------------------------------------------------------------------


@every_shape
def test_nothing_is_lost(shape):
    for rank in ranks(shape):
        up, down = normal(shape[0], rank), normal(rank, shape[1], seed=1)
        module = PivotedLinear.from_factors(up, down)
        assert off(module.to_dense(), up @ down) <= 1e-13
        x = normal(3, 4, shape[1], seed=2)
        assert off(module(x), x @ (up @ down).T) <= 1e-13


@every_shape
def test_down_is_rows_of_the_weight_and_rest_combines_them(shape):
    for rank in ranks(shape):
        up, down = normal(shape[0], rank), normal(rank, shape[1], seed=1)
        module, weight = PivotedLinear.from_factors(up, down), up @ down
        chosen = (module.place < rank).nonzero().flatten()
        others = (module.place >= rank).nonzero().flatten()
        assert len(chosen) == rank
        torch.testing.assert_close(module.down.weight, weight[chosen], rtol=0, atol=1e-12)
        torch.testing.assert_close(module.rest.weight @ weight[chosen], weight[others], rtol=0, atol=1e-12)
        assert torch.equal(module.to_dense()[chosen], module.down.weight)  # the identity that is not stored


@every_shape
def test_how_the_factors_are_mixed_does_not_matter(shape):
    """Gauge freedom: (up T)(T⁻¹ down) is the same weight, and the same rows make the same numbers."""
    for rank in ranks(shape):
        up, down, mixing = normal(shape[0], rank), normal(rank, shape[1], seed=1), normal(rank, rank, seed=2)
        mixing = mixing + 3 * torch.eye(rank, dtype=torch.float64)
        first = PivotedLinear.from_factors(up, down)
        second = PivotedLinear.from_factors(up @ mixing, torch.linalg.solve(mixing, down))
        assert off(second.to_dense(), first.to_dense()) <= 1e-11
        if torch.equal(first.place, second.place):  # there may be several good choices of rows
            torch.testing.assert_close(first.down.weight, second.down.weight, rtol=0, atol=1e-9)
            torch.testing.assert_close(first.rest.weight, second.rest.weight, rtol=0, atol=1e-9)


@every_shape
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_bytes_are_those_of_the_formula(shape, dtype):
    for rank in ranks(shape):
        up, down = normal(shape[0], rank).to(dtype), normal(rank, shape[1], seed=1).to(dtype)
        module, factors = PivotedLinear.from_factors(up, down), LowRankLinear.from_factors(up, down)
        assert {tensor.dtype for tensor in module.parameters()} == {dtype}
        assert module.nbytes() == pivoted_bytes(shape, rank, dtype.itemsize)
        assert factors.nbytes() - module.nbytes() == rank**2 * dtype.itemsize - 2 * shape[0]


def test_the_index_takes_two_bytes_a_row_as_long_as_that_is_enough():
    assert (place_dtype(32767), place_dtype(32768)) == (torch.int16, torch.int32)
    up, down = normal(32768, 1), normal(1, 2)
    module = PivotedLinear.from_factors(up, down, torch.float32)
    assert module.nbytes() == pivoted_bytes((32768, 2), 1, 4) == (32768 + 2 - 1) * 4 + 4 * 32768
    assert off(module(torch.eye(2)).T.double(), up @ down) < 1e-6


def test_at_half_the_bytes_of_a_square_weight_a_sixth_more_rank_is_had():
    shape = (1024, 1024)
    most = {
        pivot: max(o.amount for o in WhitenedSVD(pivot=pivot).sizes(shape, 2) if o.nbytes <= 1024**2)
        for pivot in (False, True)
    }
    assert most[False] == 256
    assert most[True] / most[False] == pytest.approx(4 - 8**0.5, abs=0.01)


# --- rounding ---------------------------------------------------------------------------------------------------------


def entries(up: Tensor) -> Tensor:
    """What `rest` consists of."""
    basis = torch.linalg.qr(up).Q
    chosen, others = pivot_rows(basis)
    assert sorted([*chosen.tolist(), *others.tolist()]) == list(range(len(up)))
    return torch.linalg.solve(basis[chosen], basis[others], left=False)


@st.composite
def hard_factors(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Of any rank below what they could have, with rows of zeros and copies, at scales from 1e-70 to 1e70."""
    rows, columns = draw(st.integers(2, 12)), draw(st.integers(1, 9))
    rank = draw(st.integers(1, rows - 1))
    seed, live = draw(st.integers(0, 2**31)), draw(st.integers(0, rank))
    up = normal(rows, live, seed=seed) @ normal(live, rank, seed=seed + 1)
    up[draw(st.lists(st.integers(0, rows - 1), max_size=rows))] = 0
    up[draw(st.integers(0, rows - 1))] = up[draw(st.integers(0, rows - 1))]
    scales = st.sampled_from([1.0, 1e70, 1e-70])
    return up * draw(scales), normal(rank, columns, seed=seed + 2) * draw(scales)


@settings(max_examples=80, deadline=None, database=None)
@given(hard_factors())
def test_no_entry_of_rest_exceeds_its_bound_whatever_the_factors(factors):
    up, down = factors
    assert entries(up).abs().max() <= BOUND * (1 + 1e-9)
    module = PivotedLinear.from_factors(up, down)
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    assert (module.to_dense() - up @ down).norm() <= 1e-12 * up.norm() * down.norm()


@pytest.mark.parametrize("rank", [16, 32, 64])
def test_elimination_alone_would_exceed_the_bound(rank):
    """The textbook case: pivots that double from row to row, each as good as any other in its column."""
    up = torch.eye(128, rank, dtype=torch.float64) - torch.ones(128, rank, dtype=torch.float64).tril(-1)
    eliminated = torch.linalg.lu_factor(up).LU
    grown = torch.linalg.solve_triangular(
        eliminated[:rank], eliminated[rank:], upper=False, left=False, unitriangular=True
    )
    assert grown.abs().max() > 1e4
    assert entries(up).abs().max() <= BOUND * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 192)])
def test_rounding_costs_little_more_than_it_costs_factors(shape, dtype):
    weight, stats = case(shape)
    x = normal(50, shape[1], seed=3).to(dtype)
    for rank in (8, 24, 40):
        factors = WhitenedSVD().compress(weight, stats, rank)
        up, down = factors.up.weight.detach(), factors.down.weight.detach()
        found = [kind.from_factors(up, down, dtype) for kind in (LowRankLinear, PivotedLinear)]
        stored = [off(module.to_dense().double(), up @ down) for module in found]
        with torch.no_grad():
            computed = [off(module(x).double(), x.double() @ (up @ down).T) for module in found]
        assert stored[1] <= 4 * stored[0] and computed[1] <= 4 * computed[0]


# --- a kind -----------------------------------------------------------------------------------------------------------


def test_a_rank_that_leaves_no_row_to_combine_is_refused():
    for rank, rows in ((4, 4), (5, 4), (0, 4), (1, 1)):
        with pytest.raises(CheckpointError, match=rf"rank {rank} with {rows} rows; wanted rank 1 to {rows - 1}"):
            PivotedLinear(8, rows, rank)


def test_it_comes_back_from_plain_values_with_integers_inside():
    module = PivotedLinear.from_factors(normal(12, 5).float(), normal(5, 9, seed=1).float())
    grid = fit_grid(module.down.weight.detach(), 4, 3, "asymmetric")
    quantized = QuantizedLinear.from_codes(grid.nearest(module.down.weight.detach()), grid, torch.float32)
    module.down = quantized
    module.set_bias(normal(12, seed=2))
    made = Made.of(module)
    assert list(made.specs) == ["", "down"]
    again = made.build()
    again.load_state_dict(made.state, strict=True, assign=True)
    x = normal(6, 9, seed=3).float()
    assert torch.equal(again(x), module(x))
    rows = quantized.to_dense()
    torch.testing.assert_close(again.to_dense()[again.place < 5].sort(0).values, rows.sort(0).values, rtol=0, atol=0)
    assert again.nbytes() == quantized.nbytes() + (7 * 5 + 12) * 4 + 12 * 2


def test_it_owns_its_numbers_and_leaves_the_factors_alone():
    up, down = normal(8, 2).T.contiguous().T, normal(6, 2).T
    module = PivotedLinear.from_factors(up, down)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(up, normal(8, 2)) and torch.equal(down, normal(6, 2).T)
    assert all(tensor.is_contiguous() for tensor in module.state_dict().values())


def test_children_stand_in_order_of_execution_and_see_what_they_read():
    module = PivotedLinear.from_factors(normal(8, 2), normal(2, 6))
    assert [name for name, _ in module.named_children()] == ["down", "rest"]
    seen: list[Tensor] = []
    module.rest.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    x = normal(3, 6, seed=4)
    module(x)
    assert torch.equal(seen[0], module.down(x))


# --- methods that store it --------------------------------------------------------------------------------------------


@every_method
@every_shape
def test_a_method_stores_the_same_product_and_predicts_the_same_error(method, shape):
    weight, stats = case(shape)
    plain, pivoted = method(), method(pivot=True)
    errors = {option.amount: option.error for option in plain.options(weight, stats)}
    sizes, options = pivoted.sizes(shape, 8), pivoted.options(weight, stats)
    assert [(o.amount, o.nbytes) for o in sizes] == [(o.amount, o.nbytes) for o in options]
    assert [o.amount for o in options] == [0, *ranks(shape)]
    for option in options:
        assert option.error == errors[option.amount]
        if option.amount:
            module = pivoted.compress(weight, stats, option.amount)
            assert isinstance(module, PivotedLinear)
            assert module.nbytes() == option.nbytes
            assert off(module.to_dense(), plain.compress(weight, stats, option.amount).to_dense()) <= 1e-11


@every_method
def test_a_method_says_what_it_leaves(method):
    weight, stats = case((10, 24))
    for chosen in (method(), method(pivot=True)):
        module = chosen.compress(weight, stats, 4)
        linears = {name for name, child in module.named_modules() if isinstance(child, nn.Linear)}
        assert set(chosen.leaves) == linears
    assert method.leaves == ("down", "up")


@every_method
@pytest.mark.parametrize("shape", [(5, 5), (5, 9), (1, 9)])
def test_a_rank_that_cannot_be_stored_pivoted_is_refused(method, shape):
    weight, stats = case(shape)
    assert [o.amount for o in method(pivot=True).sizes(shape, 4)] == list(range(shape[0]))
    for rank in (0, shape[0], None):
        with pytest.raises(RecipeError, match=rf"stored pivoted; wanted 1 to {shape[0] - 1}"):
            method(pivot=True).compress(weight, stats, rank)


def test_few_ranks_are_spread_over_all_that_make_a_weight_smaller():
    _, *sizes = NSVD(pivot=True, ranks=8).sizes((257, 300), 2)
    assert [o.amount for o in sizes] == [32, 64, 96, 128, 160, 192, 224, 256]


def recipe(model: Path, text: Path, *steps: dict[str, object]):
    calibration = {"source": [str(text)], "length": 32, "samples": 16}
    return recipe_from({"model": str(model), "step": list(steps), "calibration": calibration})


CUT = {"method": "svd_llm", "keep": 0.7, "target": ["mlp"], "pivot": True, "allocate": "uniform"}


def test_a_later_step_quantizes_the_parts_and_the_folder_opens(model_folder, text_file, tmp_path):
    steps = CUT, {"method": "rtn", "target": ["*.down_proj.down", "*.rest"], "width": 4, "group": 0}
    run(prepare(recipe(model_folder(), text_file, *steps), tmp_path / "out"))
    model = load(tmp_path / "out")
    found = {name: module for name, module in model.named_modules() if isinstance(module, PivotedLinear)}
    assert found and all("mlp" in name for name in found)
    for name, module in found.items():
        assert isinstance(module.rest, QuantizedLinear)
        assert isinstance(module.down, QuantizedLinear) == name.endswith("down_proj")
        dense = module.to_dense()
        assert off(module(torch.eye(module.in_features)).T.detach(), dense) < 1e-5
        combined = dense_weight(module.rest) @ dense_weight(module.down)
        assert torch.equal(dense[module.place >= module.rank].sort(0).values, combined.sort(0).values)


def test_a_stock_model_does_not_take_its_tensors(model_folder, text_file, tmp_path):
    run(prepare(recipe(model_folder(), text_file, CUT), tmp_path / "out"))
    stock = load(model_folder())
    with pytest.raises(RuntimeError, match=r"size mismatch for model.layers.0.mlp.gate_proj.weight"):
        stock.load_state_dict(load(tmp_path / "out").state_dict(), strict=False)


def test_a_later_step_on_a_part_that_is_not_there_is_refused_before_anything_is_done(model_folder, text_file, tmp_path):
    steps = CUT, {"method": "rtn", "target": ["mlp.*.up"], "width": 4}
    with pytest.raises(AnatomyError):
        prepare(recipe(model_folder(), text_file, *steps), tmp_path / "out")

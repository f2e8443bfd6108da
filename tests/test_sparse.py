"""A few entries in their places: exact, counted to the byte, in one form, and untouched by casts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersely.errors import CheckpointError, NumericalError
from tersely.kinds import Made, SparseLinear, SumLinear, build
from tersely.kinds.quantized import QuantizedLinear
from tersely.kinds.sparse import sparse_bytes
from tersely.linalg.grid import fit_grid

quick = settings(max_examples=60, deadline=None, database=None)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some(shape: tuple[int, int], share: float, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@quick
@given(
    rows=st.integers(1, 9),
    columns=st.sampled_from([1, 7, 255, 256, 257, 300]),
    share=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 50),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_an_entry_of_16_bits_is_kept_to_the_last_digit(rows, columns, share, seed, dtype):
    weight, places = normal(rows, columns, seed=seed, dtype=dtype), some((rows, columns), share, seed)
    module = SparseLinear.of(weight, places, dtype)
    assert torch.equal(module.to_dense(), torch.where(places, weight, 0).float())
    assert module.nbytes() == sparse_bytes((rows, columns), int(places.sum()))
    assert module.counts.sum().item() == places.sum().item() == module.entries
    assert torch.equal(torch.bincount(module.rows(), minlength=rows), places.sum(1))


@pytest.mark.parametrize(
    ("shape", "count", "expected"),
    [
        ((10, 256), 30, 30 * 3 + 10),  # columns and counts of one byte
        ((10, 257), 30, 30 * 4 + 10),
        ((10, 256), 255, 255 * 3 + 10),
        ((10, 256), 256, 256 * 3 + 20),  # a row might hold all 256
        ((10, 65536), 300, 300 * 4 + 20),
        ((10, 65537), 300, 300 * 6 + 20),
        ((3, 70000), 66000, 66000 * 6 + 12),
        ((4, 5), 0, 4),
    ],
)
def test_bytes_follow_from_the_shape_and_the_count(shape, count, expected):
    assert sparse_bytes(shape, count) == expected
    places = torch.zeros(shape, dtype=torch.bool)
    places.view(-1)[torch.randperm(places.numel(), generator=torch.Generator().manual_seed(0))[:count]] = True
    module = SparseLinear.of(places.float(), places, torch.float32)
    assert module.nbytes() == expected
    assert torch.equal(module.to_dense(), places.float())


def test_places_beyond_signed_numbers_of_16_bits_are_found_again():
    weight = torch.zeros(2, 60000)
    weight[1] = 1.0
    weight[0, [0, 32767, 32768, 59999]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    module = SparseLinear.of(weight, weight != 0, torch.float32)
    assert module.columns.dtype == module.counts.dtype == torch.int16
    assert torch.equal(module.to_dense(), weight)
    x = normal(1, 60000, dtype=torch.float64)
    torch.testing.assert_close(module(x), x @ weight.double().T)


@quick
@given(seed=st.integers(0, 50), share=st.sampled_from([0.0, 0.05, 1.0]))
def test_the_product_is_that_of_the_dense_weight_and_so_is_its_gradient(seed, share):
    module = SparseLinear.of(normal(5, 40, seed=seed), some((5, 40), share, seed), torch.float64)
    x = normal(2, 3, 40, seed=seed + 1).requires_grad_()
    torch.testing.assert_close(module(x), x @ module.to_dense().double().T)
    if share:
        assert torch.autograd.gradcheck(module, x[:1])


def test_the_same_entries_have_one_form_however_the_weight_lies():
    weight, places = normal(6, 30, dtype=torch.float32), some((6, 30), 0.2)
    first = SparseLinear.of(weight, places, torch.float32)
    second = SparseLinear.of(weight.T.contiguous().T, places.T.contiguous().T, torch.float32)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    for row in range(6):
        columns = first.columns[first.rows() == row].tolist()
        assert columns == sorted(columns)


@pytest.mark.parametrize("power", [-80, -40, 40, 120])
def test_a_power_of_two_moves_nothing_but_the_exponent(power):
    weight, places = normal(6, 30, dtype=torch.float32), some((6, 30), 0.2)
    first = SparseLinear.of(weight, places, torch.float32)
    scaled = SparseLinear.of(weight * 2.0**power, places, torch.float32)
    assert torch.equal(first.values, scaled.values)
    assert scaled.exponent == first.exponent + power
    assert torch.equal(scaled.to_dense() / 2.0**power, first.to_dense())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_no_cast_changes_the_weight(dtype):
    weight, places = normal(6, 30, dtype=torch.float32), some((6, 30), 0.2)
    module = SparseLinear.of(weight, places, torch.float32)
    before = module.to_dense()
    assert torch.equal(module.to(dtype).to_dense(), before)
    assert module(normal(2, 30, dtype=dtype)).dtype == dtype


def test_integers_and_outliers_make_the_weight_between_them():
    weight, places = normal(7, 50, dtype=torch.bfloat16), some((7, 50), 0.1)
    rest = weight.masked_fill(places, 0.0)
    grid = fit_grid(rest, 3, 16)
    integers = QuantizedLinear.from_codes(grid.nearest(rest), grid, weight.dtype)
    module = SumLinear.of([integers, SparseLinear.of(weight, places, weight.dtype)])
    made = Made.of(module)
    again = made.build()
    again.load_state_dict(made.state, assign=True)
    dense = again.to_dense()
    assert torch.equal(dense[places], weight.float()[places])
    assert torch.equal(dense[~places], grid.levels(grid.nearest(rest))[~places])


def test_what_cannot_be_is_refused():
    spec = SparseLinear.of(normal(3, 4), some((3, 4), 1.0), torch.float64).spec()
    for entries in (-1, 13):
        with pytest.raises(CheckpointError, match="entries in a weight of 3 x 4"):
            build(spec | {"entries": entries})
    for bad in (float("nan"), float("inf"), 1e300):
        weight = normal(3, 4)
        weight[1, 2] = bad
        with pytest.raises(NumericalError, match="finite"):
            SparseLinear.of(weight, weight == bad if bad == bad else weight.isnan(), torch.float64)

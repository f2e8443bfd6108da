"""Linears side by side: each reads its own channels, and together they are the weight that they were cut from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersely.errors import CheckpointError
from tersely.kinds import ColumnsLinear, LowRankLinear, Made, QuantizedLinear, dense_weight, manifest_of
from tersely.kinds.columns import order_bytes
from tersely.kinds.quantized import quantized_bytes
from tersely.linalg.grid import fit_grid


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
        if bias is not None:
            module.bias.copy_(bias)
    return module.requires_grad_(False)


def quantized(weight: Tensor, bits: int, group: int = 0) -> QuantizedLinear:
    grid = fit_grid(weight, bits, group)
    return QuantizedLinear.from_codes(grid.nearest(weight), grid, weight.dtype)


def test_the_parts_are_the_columns_of_the_weight():
    weight, order = normal(5, 7), torch.tensor([6, 0, 3, 1, 2, 4, 5])
    parts = [linear(weight[:, order[:3]]), LowRankLinear.from_factors(normal(5, 2), normal(2, 3, seed=1))]
    parts.append(quantized(weight[:, order[6:]], 4))
    module = ColumnsLinear.of(parts, order, weight.dtype)
    dense = module.to_dense()
    for part, places in zip(parts, order.split([3, 3, 1]), strict=True):
        assert torch.equal(dense[:, places], dense_weight(part).to(dense))
    x = normal(2, 3, 7, seed=4)
    torch.testing.assert_close(module(x), nn.functional.linear(x, dense))
    apart = sum(part(x[..., places]) for part, places in zip(parts, order.split([3, 3, 1]), strict=True))
    torch.testing.assert_close(module(x), apart, rtol=0, atol=0)
    assert list(manifest_of(module)) == ["", "parts.1", "parts.2"]


@pytest.mark.parametrize("width", [1, 2, 256, 257, 32769, 65536, 65537])
def test_the_order_takes_the_least_integers_that_reach_the_last_column(width):
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    weight = normal(1, width, dtype=torch.float32)
    module = ColumnsLinear.of([linear(weight[:, order])], order, weight.dtype)
    assert module.order.nbytes == order_bytes(width) == width * (1 if width <= 256 else 2 if width <= 65536 else 4)
    assert torch.equal(module.places(), order)
    assert torch.equal(module.to_dense(), weight)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_split_survives_being_written_down_and_takes_the_bytes_of_its_parts(data):
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    bits = data.draw(st.lists(st.integers(1, 8), min_size=len(sizes), max_size=len(sizes)))
    rows, group = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([0, 3, 8]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(rows, sum(sizes), generator=generator)
    order = torch.randperm(sum(sizes), generator=generator)
    segments = weight[:, order].split(sizes, 1)
    parts = [quantized(part.contiguous(), width, group) for part, width in zip(segments, bits, strict=True)]
    wanted = torch.empty_like(weight)
    wanted[:, order] = torch.cat([part.to_dense() for part in parts], 1)
    module = ColumnsLinear.of(parts, order, weight.dtype)
    assert torch.equal(module.to_dense(), wanted)
    made = Made.of(module)
    again = made.build()
    again.load_state_dict(made.state, strict=True, assign=True)
    x = torch.randn(3, sum(sizes), generator=generator)
    assert torch.equal(again(x), module(x)) and torch.equal(again.to_dense(), wanted)
    of_parts = (
        quantized_bytes((rows, size), width, group, zeros=True) for size, width in zip(sizes, bits, strict=True)
    )
    assert module.nbytes() == sum(of_parts) + order_bytes(sum(sizes))


def test_integers_stay_what_they_are_in_any_dtype():
    weight = normal(4, 300, dtype=torch.float32)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    module = ColumnsLinear.of(
        [quantized(weight[:, order[:90]], 2), quantized(weight[:, order[90:]], 3)], order, weight.dtype
    )
    before = module.to_dense()
    assert torch.equal(module.to(torch.bfloat16).to_dense(), before)
    module.set_bias(normal(4))
    assert module.bias is not None and module.bias.dtype == torch.bfloat16
    assert module(normal(2, 300).to(torch.bfloat16)).dtype == torch.bfloat16


def test_what_does_not_fit_together_is_refused():
    two = [linear(normal(4, 3)), linear(normal(4, 2))]
    with pytest.raises(CheckpointError, match="each of 5 columns once"):
        ColumnsLinear.of(two, torch.tensor([0, 1, 2, 3, 3]), torch.float64)
    with pytest.raises(CheckpointError, match="each of 5 columns once"):
        ColumnsLinear.of(two, torch.arange(6), torch.float64)
    with pytest.raises(CheckpointError, match="same outputs"):
        ColumnsLinear.of([*two, linear(normal(3, 2))], torch.arange(7), torch.float64)
    with pytest.raises(CheckpointError, match="one or more"):
        ColumnsLinear.of([], torch.arange(0), torch.float64)
    with pytest.raises(CheckpointError, match="bias"):
        ColumnsLinear.of([linear(normal(4, 3), normal(4)), two[1]], torch.arange(5), torch.float64)
    with pytest.raises(CheckpointError, match="ReLU"):
        ColumnsLinear.of([nn.ReLU()], torch.arange(5), torch.float64)
    spec = ColumnsLinear.of(two, torch.arange(5), torch.float64).spec()
    with pytest.raises(CheckpointError, match="for 6 in all"):
        ColumnsLinear.from_spec(spec | {"in_features": 6})
    with pytest.raises(CheckpointError, match="a column or more"):
        ColumnsLinear.from_spec(spec | {"parts": [5, 0]})

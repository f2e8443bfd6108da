"""Products by the quickest library: the same numbers, whatever way they take."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tersely.kernels import Quicker, linear, quicker


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("batch", [(1,), (7,), (2, 5), (0,)])
def test_a_product_is_that_of_pytorch(dtype, biased, batch):
    x, weight = random(*batch, 24, dtype=dtype), random(10, 24, dtype=dtype, seed=1)
    bias = random(10, dtype=dtype, seed=2) if biased else None
    found = linear(x, weight, bias)
    assert found.dtype == dtype and found.shape == (*batch, 10)
    torch.testing.assert_close(found, functional.linear(x, weight, bias))


def test_what_is_transposed_or_cut_out_is_multiplied_as_it_stands():
    x, weight = random(40, 16), random(16, 30, seed=1)
    wanted = x[:, 3:].T.double() @ x[:, :9].double()
    torch.testing.assert_close(linear(x[:, 3:].T, x[:, :9].T).double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(x, weight.T), x @ weight)


def test_gradients_are_not_recorded():
    weight = nn.Parameter(random(3, 8))
    assert not linear(random(2, 8), weight).requires_grad


def test_within_quicker_every_linear_takes_the_product_and_nothing_else_changes(monkeypatch):
    seen = []

    def noted(input, weight, bias=None):
        seen.append(weight)
        return functional.linear(input, weight, bias)

    monkeypatch.setitem(quicker.OURS, functional.linear, noted)
    model = nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 4, bias=False))
    x = random(3, 6)
    wanted = model(x)
    assert not seen
    with Quicker():
        assert torch.equal(model(x), wanted)
        functional.linear(input=x, weight=model[0].weight, bias=None)
    assert len(seen) == 3
    functional.linear(x, model[0].weight)
    assert len(seen) == 3

"""A sum of linears: its output is the sum of theirs, whatever they are, and it survives being written down."""

import pytest
import torch
from torch import Tensor, nn

from tersely.errors import CheckpointError
from tersely.kinds import DenseLinear, LinearKind, LowRankLinear, Made, dense_weight, manifest_of
from tersely.kinds.sum import SumLinear


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(rows: int, columns: int, *, bias: bool = False, seed: int = 0) -> nn.Linear:
    module = nn.Linear(columns, rows, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(normal(rows, columns, seed=seed))
        if bias:
            module.bias.copy_(normal(rows, seed=seed + 1))
    return module.requires_grad_(False)


def low_rank(rows: int, columns: int, rank: int, seed: int = 3) -> LowRankLinear:
    return LowRankLinear.from_factors(normal(rows, rank, seed=seed), normal(rank, columns, seed=seed + 1))


@pytest.mark.parametrize("bias", [False, True])
def test_the_output_is_the_sum_of_the_outputs(bias):
    terms = [linear(5, 7, bias=bias), low_rank(5, 7, 2), DenseLinear.from_weight(normal(5, 7, seed=8))]
    module, x = SumLinear.of(terms), normal(2, 3, 7, seed=9)
    torch.testing.assert_close(module(x), terms[0](x) + terms[1](x) + terms[2](x), rtol=0, atol=0)
    dense = dense_weight(terms[0]) + terms[1].to_dense() + terms[2].to_dense()
    torch.testing.assert_close(module.to_dense(), dense)
    torch.testing.assert_close(module(x), nn.functional.linear(x, module.to_dense(), terms[0].bias))
    assert module.spec()["bias"] is bias


def test_one_term_is_a_sum_too():
    term, x = linear(4, 3), normal(2, 3)
    assert torch.equal(SumLinear.of([term])(x), term(x))


@pytest.mark.parametrize("plain", [True, False])
def test_a_bias_goes_to_the_first_term(plain):
    first = linear(5, 7) if plain else low_rank(5, 7, 3)
    module, bias, x = SumLinear.of([first, low_rank(5, 7, 2, seed=6)]), normal(5, seed=20), normal(4, 7, seed=21)
    before = module(x)
    module.set_bias(bias)
    torch.testing.assert_close(module(x), before + bias)
    assert module.spec()["bias"] and manifest_of(module)["terms.0" if not plain else ""]["bias"]
    assert not torch.equal(bias.zero_(), (module.terms[0].bias if plain else module.terms[0].up.bias))


def test_a_nested_sum_is_rebuilt_from_plain_values():
    inner = SumLinear.of([low_rank(5, 7, 1), low_rank(5, 7, 2, seed=5)])
    module = SumLinear.of([linear(5, 7, bias=True), inner, DenseLinear.from_weight(normal(5, 7, seed=8))])
    made = Made.of(module)
    assert set(made.specs) == {"", "terms.1", "terms.1.terms.0", "terms.1.terms.1", "terms.2"}
    assert {"terms.0.weight", "terms.0.bias", "weight", "terms.1.weight"} <= made.state.keys()
    again = made.build()
    again.load_state_dict(made.state, assign=True)
    x = normal(3, 7)
    assert torch.equal(again(x), module(x))
    assert manifest_of(again) == made.specs
    assert again.nbytes() == module.nbytes() == sum(term.nbytes() for term in module.terms[1:]) + 8 * (5 * 7 + 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_guard_has_the_dtype_of_the_terms_and_no_bytes(dtype):
    module = SumLinear.of([linear(4, 6).to(dtype)])
    assert module.weight.shape == (0,) and module.weight.dtype == dtype


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "no terms"),
        ([linear(4, 6), linear(4, 5)], "wanted one"),
        ([linear(4, 6), linear(4, 6, bias=True)], "bias in a later term"),
        ([nn.Embedding(4, 6)], "wanted nn.Linear"),
    ],
)
def test_what_cannot_be_added_is_refused(terms, message):
    with pytest.raises(CheckpointError, match=message):
        SumLinear.of(terms)


def test_it_is_a_linear_kind_that_a_manifest_can_name():
    module = SumLinear.of([linear(4, 6)])
    assert isinstance(module, LinearKind)
    assert module.spec() == {"kind": "sum", "in_features": 6, "out_features": 4, "terms": 1, "bias": False}

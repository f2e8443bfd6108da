"""Weights out of codebooks: codes without a spare bit, one product by two ways, numbers that can be trained."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersely.errors import CheckpointError
from tersely.kinds.codebook import CodebookLinear, codebook_bytes, group_count, packed, unpacked

LLAMA = {
    "7B": ((4096, 4096), (11008, 4096)),
    "13B": ((5120, 5120), (13824, 5120)),
}
"""Size → shapes [out, in] of the four attention linears, and of gate and up; that of down is the latter turned."""
ATTENTION_70B = [(8192, 8192), (8192, 8192), (1024, 8192), (1024, 8192)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Example:
    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    columns: int
    exponent: int

    def module(self, dtype: torch.dtype = torch.float64) -> CodebookLinear:
        return CodebookLinear.of(
            self.codes, self.codebooks, self.scales, self.columns, exponent=self.exponent, dtype=dtype
        )

    def entry(self, row: int, column: int) -> float:
        """By the definition."""
        j, place = divmod(column, self.codebooks.shape[2])
        total = sum(book[code, place] for book, code in zip(self.codebooks, self.codes[row, j], strict=True))
        return float(total * self.scales[row] * 2.0**self.exponent)


def example(rows: int = 40, columns: int = 21, books: int = 2, bits: int = 3, group: int = 4) -> Example:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2**bits, (rows, group_count(columns, group), books), generator=generator)
    return Example(codes, normal(books, 2**bits, group), normal(rows, seed=2), columns, -3)


# --- codes ------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_codes_of_any_width_survive_and_take_their_bits(data):
    bits, rows, count = (data.draw(st.integers(1, most)) for most in (16, 4, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    codes = torch.randint(0, 2**bits, (rows, count), generator=generator)
    codes[0, 0] = 2**bits - 1
    stored = packed(codes, bits)
    assert stored.dtype == torch.uint8 and stored.shape == (rows, math.ceil(count * bits / 8))
    assert torch.equal(unpacked(stored, bits, count), codes.int())


def test_an_entry_is_a_sum_of_codewords_times_two_scales():
    for settings_of in ({}, {"books": 1, "bits": 10}, {"columns": 3, "group": 8}, {"books": 3, "group": 1}):
        made = example(**settings_of)
        dense = made.module().to_dense()
        assert dense.shape == (40, made.columns) and dense.dtype == torch.float64
        for row, column in ((0, 0), (7, made.columns - 1), (39, made.columns // 2)):
            assert dense[row, column].item() == pytest.approx(made.entry(row, column), rel=1e-12)


# --- bytes ------------------------------------------------------------------------------------------------------------


def bits_per_weight(shapes: list[tuple[int, int]], books: int, bits: int, group: int) -> float:
    """The mean over the linears of a block, weighted with their parameters, in 16 bits."""
    taken = sum(codebook_bytes(shape, books, bits, group, itemsize=2) for shape in shapes)
    return 8 * taken / sum(rows * columns for rows, columns in shapes)


def linears_of(size: str) -> list[tuple[int, int]]:
    if size == "70B":
        return [*ATTENTION_70B, (28672, 8192), (28672, 8192), (8192, 28672)]
    square, up = LLAMA[size]
    return [square] * 4 + [up, up, up[::-1]]


@pytest.mark.parametrize(
    ("size", "books", "bits", "group", "published"),
    [
        ("7B", 1, 15, 8, 2.02),
        ("7B", 1, 16, 8, 2.29),
        ("7B", 2, 8, 8, 2.006),
        ("7B", 2, 12, 8, 3.04),
        ("7B", 2, 15, 8, 4.04),
        ("7B", 8, 8, 32, 2.04),
        ("7B", 1, 16, 16, 1.58),
        ("7B", 1, 8, 8, 1.004),
        ("13B", 1, 15, 8, 1.97),
        ("13B", 1, 16, 8, 2.19),
        ("13B", 2, 12, 8, 3.03),
        ("13B", 2, 15, 8, 3.94),
        ("70B", 1, 16, 8, 2.07),
        ("70B", 2, 12, 8, 3.01),
        ("70B", 2, 16, 8, 4.14),
    ],
)
def test_bits_per_weight_are_the_published_ones(size, books, bits, group, published):
    assert bits_per_weight(linears_of(size), books, bits, group) == pytest.approx(published, abs=0.0051)


def test_bytes_are_those_of_the_formula_for_any_shape():
    cases = [(40, 21, 2, 3, 4), (5, 9, 1, 16, 8), (3, 1, 4, 1, 7), (16, 64, 2, 8, 8)]
    for rows, columns, books, bits, group in cases:
        for dtype in (torch.float16, torch.float32):
            module = example(rows, columns, books, bits, group).module(dtype)
            promised = codebook_bytes((rows, columns), books, bits, group, dtype.itemsize)
            assert module.nbytes() == promised
            codes = rows * math.ceil(math.ceil(columns / group) * books * bits / 8)
            assert promised == codes + dtype.itemsize * (rows + books * 2**bits * group)


# --- the product ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [21, 24])
@pytest.mark.parametrize("bias", [False, True])
def test_the_table_gives_the_product_of_the_weight(columns, bias):
    module = example(columns=columns).module()
    if bias:
        module.set_bias(normal(40, seed=4))
    x = normal(5, columns, seed=3)
    many = torch.nn.functional.linear(x, module.to_dense(), module.bias)
    for few in (x[:1], x[:4], x[0], x[:2].view(2, 1, columns)):
        torch.testing.assert_close(module(few).view(-1, 40), many[: few.numel() // columns], rtol=1e-12, atol=1e-12)
    assert torch.equal(module(x), many), "five tokens go by the weight"
    single = example(columns=columns).module(torch.float32)
    torch.testing.assert_close(single(x[:1].float()), x[:1].float() @ single.to_dense().T, rtol=1e-5, atol=1e-5)


def test_both_ways_are_differentiable_and_add_up_over_all_uses():
    """∂⟨W', A⟩ / ∂C[m, k] is the sum of A, times the scale of the row, over the groups that use the codeword."""
    made, a = example(columns=20), normal(40, 20, seed=5)
    module = made.module()
    (module.decoded() * a).sum().backward()
    wanted = torch.zeros_like(made.codebooks)
    for row in range(40):
        for j in range(5):
            for m, code in enumerate(made.codes[row, j]):
                wanted[m, code] += a[row, 4 * j : 4 * j + 4] * made.scales[row] * 2.0**made.exponent
    torch.testing.assert_close(module.codebooks.grad, wanted)
    x, few, many = normal(3, 20, seed=6), made.module(), made.module()
    few(x).square().sum().backward()
    torch.nn.functional.linear(x, many.decoded()).square().sum().backward()
    torch.testing.assert_close(few.codebooks.grad, many.codebooks.grad)
    torch.testing.assert_close(few.scales.grad, many.scales.grad)


def test_sums_of_gradients_are_formed_in_float32():
    """A codeword of a large matrix is used more often than bfloat16 can count."""
    rows = 1024
    module = CodebookLinear.of(torch.zeros(rows, 1, 1).long(), torch.ones(1, 2, 1), torch.ones(rows), 1)
    module = module.to(torch.bfloat16)
    module.decoded().sum().backward()
    assert module.codebooks.grad[0, 0, 0] == rows


def test_tiny_weights_fit_into_half_precision():
    made = example()
    small = CodebookLinear.of(
        made.codes, made.codebooks, made.scales, made.columns, exponent=-60, dtype=torch.float16
    ).to_dense()
    torch.testing.assert_close(small * 2.0**57, made.module().to_dense().float(), rtol=2e-2, atol=2e-3)


def test_casting_leaves_the_codes():
    module = example().module(torch.float32)
    before = module.codes.clone()
    module.half()
    assert torch.equal(module.codes, before) and module.codebooks.dtype == torch.float16


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"bits": 17}, {"bits": 0}, {"codebooks": 0}, {"group": 0}])
def test_a_description_that_cannot_be_is_refused(wrong):
    with pytest.raises(CheckpointError, match="wanted"):
        CodebookLinear.from_spec(example().module().spec() | wrong)


def test_parts_that_do_not_fit_are_refused():
    made = example()
    with pytest.raises(ValueError, match="wanted"):
        CodebookLinear.of(made.codes, made.codebooks[:, :7], made.scales, made.columns)
    with pytest.raises(ValueError, match="wanted"):
        CodebookLinear.of(made.codes[:, :2], made.codebooks, made.scales, made.columns)

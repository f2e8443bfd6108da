"""HQQ, NF4 and MXFP4: zero points that lower the norm they are chosen for, tables and blocks as published.

W is a weight, W' what it becomes, p the norm of the errors.
"""

import pytest
import torch
from torch import Tensor

from tersely.errors import RecipeError
from tersely.kinds.quantized import QuantizedLinear
from tersely.linalg.grid import Scales, fit_grid, float_zeros, in_groups
from tersely.methods.quantize import hqq
from tersely.methods.quantize.hqq import HalfQuadratic, robust_zeros
from tersely.methods.quantize.mxfp4 import MXFP4
from tersely.methods.quantize.nf4 import NormalFloat
from tersely.methods.quantize.rtn import RoundToNearest
from tersely.stats import Stats


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heavy(*shape: int, seed: int = 0) -> Tensor:
    """Weights some of which lie far out."""
    return normal(*shape, seed=seed) * normal(*shape, seed=seed + 1).abs().exp()


def relative(weight: Tensor, module: QuantizedLinear) -> float:
    return ((weight - module.to_dense()).square().sum() / weight.square().sum()).item()


# --- HQQ --------------------------------------------------------------------------------------------------------------


def stored(zero: float) -> float:
    return torch.tensor(zero).half().item()


def by_hand(
    weight: list[float], scale: float, zero: float, top: int, p: float, beta: float, rounds: int
) -> list[float]:
    """Every zero point that one group passes through as it is stored, with nothing but the formulas."""
    zero = stored(zero)
    passed = [zero]
    for _ in range(rounds):
        codes = [min(max(round(w / scale + zero), 0), top) for w in weight]
        off = [w - (q - zero) * scale for w, q in zip(weight, codes, strict=True)]
        kept = [(1 if x > 0 else -1) * max(abs(x) - max(abs(x), 1e-5) ** (p - 1) / beta, 0.0) for x in off]
        steps = [q - (w - e) / scale for w, q, e in zip(weight, codes, kept, strict=True)]
        zero = stored(sum(steps) / len(steps))
        passed.append(zero)
    return passed


@pytest.mark.parametrize("beta", [0.1, 10.0])
def test_zero_points_are_those_of_the_splitting(beta):
    weight = heavy(1, 12)
    weight = weight / weight.square().mean().sqrt()
    start = fit_grid(weight, 3, 0, format="float32")
    scale = start.scales.values().item()
    first = -weight.min().item() / scale
    passed = [start.zeros(torch.float64).item(), *by_hand(weight[0].tolist(), scale, first, 7, 0.7, beta, 4)]

    def lost(zero: float) -> float:
        codes = (weight / scale + zero).round().clamp(0, 7)
        return (weight - (codes - zero) * scale).abs().pow(0.7).sum().item()

    found = robust_zeros(weight, start, beta=beta, rounds=5).zeros(torch.float64).item()
    best = min(passed, key=lost)
    assert found == best


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_no_row_is_worse_in_its_norm_and_all_together_are_better(bits, beta):
    weight = heavy(16, 100)
    start = fit_grid(weight, bits, 32)
    start = type(start)(bits, 32, start.scales, float_zeros(start.zeros(torch.float64)))
    chosen = robust_zeros(weight, start, beta=beta)
    off = [(weight - grid.levels(grid.nearest(weight))).abs() for grid in (start, chosen)]
    before, after = ((size**0.7).sum(-1) for size in off)
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < before.sum()
    assert off[1].sum() < off[0].sum(), "the first norm follows"
    assert torch.equal(chosen.scales.raw, start.scales.raw)


def test_with_norm_one_the_threshold_is_constant():
    """|x|^(p-1) = 1: plain soft thresholding; a β that never binds leaves every error, and the zero point, as it is:
    the given one, or that at which the range ends on levels."""
    weight = heavy(4, 64)
    start = fit_grid(weight, 3, 32)
    same = robust_zeros(weight, start, norm=1.0, beta=1e12).zeros(torch.float64)
    given, spanned = start.zeros(torch.float64), -in_groups(weight, 32).amin(-1) / start.scales.values()
    assert (torch.minimum((same - given).abs(), (same - spanned).abs()) < 5e-3).all()


def test_rows_know_nothing_of_each_other(monkeypatch):
    weight = heavy(9, 96)
    whole = robust_zeros(weight, fit_grid(weight, 2, 32))
    monkeypatch.setattr(hqq, "AT_ONCE", 200)
    assert torch.equal(robust_zeros(weight, fit_grid(weight, 2, 32)).zero, whole.zero)


def test_a_growing_beta_and_columns_and_ragged_groups_work():
    weight = heavy(5, 50)
    columns = Scales.of(normal(50, seed=7).exp())
    grid = fit_grid(weight, 3, 16, columns=columns)
    chosen = robust_zeros(weight, grid, growth=1.01)
    assert chosen.columns is grid.columns and chosen.zero is not None and chosen.zero.dtype == torch.int16
    alone = robust_zeros(weight[:, 48:], fit_grid(weight[:, 48:], 3, 16), rounds=0)
    assert torch.equal(alone.zeros(torch.float32), fit_grid(weight[:, 48:], 3, 16).zeros(torch.float32))


def test_zero_points_take_sixteen_bits():
    sizes = {o.amount: o.nbytes for o in HalfQuadratic().sizes((128, 128), 4)}
    assert sizes[4] == 128 * (64 + 4 + 4)
    assert sizes[4] * 8 / 128**2 == 4.5
    weight = heavy(6, 64)
    assert HalfQuadratic().compress(weight, Stats(), 4).nbytes() == 6 * (32 + 2 + 2)


@pytest.mark.parametrize("power", [-90, -3, 40])
def test_the_unit_of_a_weight_does_not_matter(power):
    weight = heavy(6, 64).float()
    for method in (HalfQuadratic(beta=3.0), NormalFloat(), MXFP4()):
        before, after = (method.compress(w, Stats(), 4) for w in (weight, weight * 2.0**power))
        assert torch.equal(before.codes, after.codes)
        assert torch.equal(after.to_dense(), before.to_dense() * 2.0**power)


# --- tables and blocks ------------------------------------------------------------------------------------------------


def test_formats_lose_what_they_are_known_to_lose():
    weight = normal(512, 1024, dtype=torch.float32)
    assert relative(weight, NormalFloat().compress(weight, Stats(), 4)) == pytest.approx(0.00844, rel=0.02)
    assert relative(weight, NormalFloat(levels="fp4").compress(weight, Stats(), 4)) == pytest.approx(0.0149, rel=0.02)
    for group, known in ((32, 0.0132), (64, 0.0128), (128, 0.0127)):
        assert relative(weight, MXFP4(group).compress(weight, Stats(), 4)) == pytest.approx(known, rel=0.02)


def test_mxfp4_is_the_published_rule():
    weight = heavy(3, 64)
    module = MXFP4().compress(weight, Stats(), 4)
    assert module.spec() | {"scale": "e8m0", "levels": "e2m1", "zeros": False, "exponent": 0} == module.spec()
    elements = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    elements = torch.cat([elements, -elements])
    for row in range(3):
        for start in (0, 32):
            block = weight[row, start : start + 32]
            scale = 2.0 ** (block.abs().max().log2().floor() - 2)
            nearest = elements[(block[:, None] / scale - elements).abs().argmin(1)] * scale
            torch.testing.assert_close(module.to_dense()[row, start : start + 32].double(), nearest, rtol=0, atol=0)
    assert module.nbytes() * 8 == 4.25 * weight.numel()


def test_what_lies_above_the_largest_element_saturates():
    weight = torch.zeros(1, 32, dtype=torch.float64)
    weight[0, :3] = torch.tensor([7.9, -7.0, 4.0])
    assert MXFP4().compress(weight, Stats(), 4).to_dense()[0, :3].tolist() == [6.0, -6.0, 4.0]


def test_what_is_on_the_grid_stays():
    weight = torch.tensor([0.5, -1.5, 3.0, 6.0, -4.0, 2.0, 0.0, 1.0]).repeat(2, 4)
    for method in (MXFP4(), NormalFloat(levels="e2m1")):
        assert torch.equal(method.compress(weight, Stats(), 4).to_dense(), weight)


def test_bytes_of_tables_by_hand():
    assert [o.nbytes for o in NormalFloat().sizes((128, 128), 4)] == [0, 128 * (64 + 4)]
    assert [o.nbytes for o in NormalFloat(levels="nf3", scale="log8").sizes((128, 128), 4)] == [0, 128 * (48 + 2)]
    assert [o.nbytes for o in NormalFloat(shift=True).sizes((128, 100), 4)] == [0, 128 * (50 + 4 + 4)]


@pytest.mark.parametrize("method", [HalfQuadratic(group=16), NormalFloat(16, shift=True, scale="log8"), MXFP4(16)])
def test_options_say_what_compress_makes(method):
    weight = heavy(7, 50)
    nothing, *options = method.options(weight, Stats())
    assert nothing.error == pytest.approx(weight.square().sum().item())
    for option in options:
        module = method.compress(weight, Stats(), option.amount)
        assert module.nbytes() == option.nbytes
        assert option.error == pytest.approx((weight - module.to_dense()).square().sum().item(), rel=1e-6)


def test_wrong_requests_are_refused():
    for method, wrong in (
        (HalfQuadratic, {"norm": 0.0}),
        (HalfQuadratic, {"norm": 1.5}),
        (HalfQuadratic, {"beta": 0.0}),
        (HalfQuadratic, {"growth": -1.0}),
        (HalfQuadratic, {"rounds": -1}),
        (HalfQuadratic, {"scale": "e8m0"}),
        (NormalFloat, {"levels": "nf5"}),
        (NormalFloat, {"group": -2}),
        (MXFP4, {"group": -1}),
    ):
        with pytest.raises(RecipeError, match=r"wanted|known"):
            method(**wrong)
    for method in (NormalFloat(), MXFP4()):
        with pytest.raises(RecipeError, match="wanted 4"):
            method.compress(normal(2, 8), Stats(), 3)


def test_without_rounds_hqq_is_rounding_to_nearest():
    weight = heavy(6, 64)
    ours = HalfQuadratic(rounds=0).compress(weight, Stats(), 3)
    assert torch.equal(ours.to_dense(), RoundToNearest().compress(weight, Stats(), 3).to_dense())

"""Outliers by gradient: exactly so many of them, exact themselves, absent from the grid and from the error feedback.

W is a weight, W' what it becomes, D the gradient of the loss in it, G the mean of x xᵀ over calibration.
"""

import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from families import tiny_batch
from tersely.errors import NumericalError, RecipeError
from tersely.kinds import SparseLinear, SumLinear
from tersely.kinds.sparse import sparse_bytes
from tersely.linalg.grid import fit_grid
from tersely.linalg.hessian import feedback
from tersely.methods.quantize.gptq import GPTQ
from tersely.methods.quantize.gwq import SCORES, GradientAware
from tersely.methods.quantize.outliers import largest, outlier_count, swept
from tersely.methods.quantize.rtn import RoundToNearest
from tersely.pipeline import compress
from tersely.stats import DiagonalFisher, Gram, Power, Stats

quick = settings(max_examples=40, deadline=None, database=None)
every_score = pytest.mark.parametrize("score", SCORES)
every_rounding = pytest.mark.parametrize("rounding", ["nearest", "gptq"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def correlated(width: int, tokens: int = 300) -> Tensor:
    loudness = torch.logspace(0.5, -1, width, dtype=torch.float64)
    return normal(tokens, width, seed=1) * loudness @ normal(width, width, seed=2) / width**0.5


def seen(weight: Tensor, x: Tensor | None = None, gradients: Tensor | None = None) -> Stats:
    """Of the input, and of gradients in the weight, one window a row."""
    gradients = normal(3, weight.numel(), seed=4) if gradients is None else gradients
    kinds = {kind: kind(weight.shape[1]) for kind in (Gram, Power)}
    for kind in kinds.values():
        kind.update(correlated(weight.shape[1]) if x is None else x)
    fisher = DiagonalFisher(weight.numel())
    fisher.update(gradients)
    return Stats(kinds | {DiagonalFisher: fisher})


# --- how many ---------------------------------------------------------------------------------------------------------


@quick
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.005, 0.01, 0.07, 0.1, 0.29, 1 / 3, 0.5, 0.999, 1.0]),
    ties=st.booleans(),
    seed=st.integers(0, 20),
)
def test_exactly_the_share_of_the_weights_is_held_rounded_up(rows, columns, share, ties, seed):
    count = outlier_count(share, (rows, columns))
    assert count == math.ceil(Fraction(str(share)) * rows * columns)
    score = normal(rows, columns, seed=seed)
    score = score.round() if ties else score
    chosen = largest(score, count)
    assert chosen.sum() == count
    if 0 < count < score.numel():
        assert score[chosen].min() >= score[~chosen].max()
    first = chosen.flatten().nonzero().flatten()
    tied = (score.flatten() == score[chosen].min()).nonzero().flatten() if count else first
    assert set(tied[: (chosen.flatten()[tied]).sum()].tolist()) <= set(first.tolist()), "of equals not the first"


@every_score
@every_rounding
@pytest.mark.parametrize(
    ("shape", "share"), [((1, 9), 1.0), ((9, 1), 0.1), ((17, 31), 0.01), ((6, 130), 0.07)], ids=str
)
def test_the_sparse_term_holds_that_many_and_bytes_say_so(score, rounding, shape, share):
    method = GradientAware(share=share, score=score, rounding=rounding, group=16, width=3)
    weight = normal(*shape)
    made = method.compress(weight, seen(weight), 3)
    count = outlier_count(share, shape)
    assert isinstance(made, SumLinear) and isinstance(made.terms[1], SparseLinear)
    assert made.terms[1].entries == count
    dense = RoundToNearest(group=16, width=3).sizes(shape, 8)[1].nbytes
    assert method.sizes(shape, 8)[1].nbytes == made.nbytes() == dense + sparse_bytes(shape, count)


# --- the ends of the share --------------------------------------------------------------------------------------------


@every_score
@pytest.mark.parametrize("form", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_outliers_it_is_rtn_or_gptq_bit_for_bit(score, form, dtype):
    weight = normal(12, 50, dtype=dtype)
    stats = seen(weight)
    for rounding, plain in (("nearest", RoundToNearest), ("gptq", GPTQ)):
        for bits in (2, 3, 4, 8):
            made = GradientAware(share=0.0, score=score, rounding=rounding, group=16, grid=form)
            ours, twin = made.compress(weight, stats, bits), plain(group=16, grid=form).compress(weight, stats, bits)
            assert ours.spec() == twin.spec()
            assert all(torch.equal(t, twin.state_dict()[n]) for n, t in ours.state_dict().items())


@every_score
@every_rounding
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_with_all_of_them_it_is_the_weight_of_16_bits(score, rounding, dtype):
    weight = normal(7, 30, dtype=dtype)
    x = correlated(30) * (torch.arange(30) % 5 > 0)  # silent inputs take nothing away
    made = GradientAware(share=1.0, score=score, rounding=rounding).compress(weight, seen(weight, x), 2)
    assert torch.equal(made.to_dense(), weight.float())


@every_rounding
def test_more_outliers_lose_less(rounding):
    weight, errors = normal(24, 64), []
    stats = seen(weight)
    for share in (0.0, 0.01, 0.05, 0.2, 0.5, 1.0):
        method = GradientAware(share=share, score="magnitude", rounding=rounding, width=3)
        errors.append(method.options(weight, stats)[1].error)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5 * errors[0]


# --- what is kept and what is not -------------------------------------------------------------------------------------


def test_outliers_stand_where_gradients_are_largest():
    weight, gradients = normal(6, 20), torch.zeros(2, 120, dtype=torch.float64)
    gradients[0, [3, 50]] = torch.tensor([5.0, -4.0], dtype=torch.float64)
    gradients[1, 50] = 4.0  # squares are added up, signs do not cancel
    gradients[1, 7] = 5.1
    outliers = GradientAware(share=2 / 120).outliers(weight, seen(weight, gradients=gradients), 3)
    assert outliers.flatten().nonzero().flatten().tolist() == [7, 50]


def test_fisher_weighs_the_gradient_with_what_rounding_takes():
    weight = normal(6, 20)
    stats = seen(weight)
    grid = fit_grid(weight, 3, 64)
    price = stats[DiagonalFisher].mean().view(6, 20) * (weight - grid.levels(grid.nearest(weight))).square()
    assert torch.equal(GradientAware(score="fisher", share=0.1).outliers(weight, stats, 3), largest(price, 12))


def test_a_grid_does_not_see_the_outliers():
    weight = normal(4, 32)
    planted = weight.clone()
    planted[1, 5], planted[2, 9] = 1000.0, -1000.0
    method = GradientAware(share=2 / 128, score="magnitude", group=16)
    made = method.compress(planted, seen(planted), 3)
    integers = made.terms[0]
    assert torch.equal(
        integers.grid().scales.raw, fit_grid(weight.masked_fill(planted.abs() > 999, 0), 3, 16).scales.raw
    )
    assert made.to_dense()[1, 5] == 1000.0 and made.to_dense()[2, 9] == -1000.0
    assert not integers.to_dense()[planted.abs() > 999].any()


@pytest.mark.parametrize("block", [1, 7, 128])
def test_the_feedback_skips_outliers_and_its_loss_is_known(block):
    """tr((W - W') H (W - W')ᵀ) = Σ ‖e‖² with e = 0 at outliers, H the damped Gram matrix."""
    weight, x = normal(10, 40), correlated(40)
    spread = feedback(seen(weight, x)[Gram].mean(), damping=0.01, loudest_first=True)
    outliers = torch.rand(10, 40, generator=torch.Generator().manual_seed(3)) < 0.1
    grid = fit_grid(weight.masked_fill(outliers, 0.0), 3, 16)
    codes, values, costs = swept(weight, spread, grid, outliers, block=block)
    made = torch.where(outliers, values, grid.levels(codes).double())
    damped = x.T @ x / len(x) + spread.added * torch.eye(40)
    off = weight - made
    lost = ((off @ damped) * off).sum().item()
    assert costs[~outliers].square().sum().item() == pytest.approx(lost, rel=1e-6)
    assert not torch.equal(values[outliers], weight[outliers]), "outliers make up for the columns before them"


def test_held_outliers_lose_less_than_rounded_ones():
    weight = normal(16, 64)
    weight.view(-1)[::97] *= 8
    stats = seen(weight)
    plain = GPTQ(width=3).options(weight, stats)[1].error
    held = GradientAware(score="magnitude", rounding="gptq", width=3, share=0.02).options(weight, stats)[1].error
    assert held < 0.6 * plain


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_a_small_change_moves_the_loss_by_its_product_with_the_gradient():
    """L(W') - L(W) ≈ ⟨D, W' - W⟩ at 8 bits, on the very text that D is of; D² is what the statistic has of it."""
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9)).double()
    x, y = normal(50, 12), torch.randint(0, 9, (50,), generator=torch.Generator().manual_seed(1))
    cross_entropy(model(x), y).backward()
    first = model[0]
    gradient, weight = first.weight.grad, first.weight.detach().clone()
    stats = seen(weight, x, gradient.flatten()[None])
    assert torch.allclose(stats[DiagonalFisher].mean(), gradient.flatten().square())
    before = cross_entropy(model(x), y).item()
    made = GradientAware(width=8).compress(weight, stats, 8).to_dense().double()
    with torch.no_grad():
        first.weight.copy_(made)
        moved = cross_entropy(model(x), y).item() - before
    predicted = (gradient * (made - weight)).sum().item()
    assert moved == pytest.approx(predicted, rel=0.02)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "bits"),
    [("gwq", {"width": 3}, None), ("gwq", {"score": "gain", "rounding": "gptq"}, 5.0), ("spqr", {"width": 3}, None)],
    ids=["gwq", "gwq with feedback", "spqr"],
)
def test_what_is_promised_lies_on_disk_and_opens_again(method, options, bits, model_folder, text_file, tmp_path):
    out = tmp_path / "out"
    compress(
        model_folder("llama"),
        out,
        method=method,
        options=options,
        bits=bits,
        calibrate=[str(text_file)],
        length=32,
        samples=8,
    )
    report = json.loads((out / "report.json").read_text())
    touched = next(row["value"] for row in report["rows"] if row["name"] == "touched weights")
    assert touched == sum(site["nbytes"] for site in report["sites"])
    model = AutoModelForCausalLM.from_pretrained(out)
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(sparse) == sum(site["amount"] is not None for site in report["sites"]) > 0
    first, second = (AutoModelForCausalLM.from_pretrained(out)(**tiny_batch()).logits for _ in range(2))
    assert torch.equal(first, second) and first.isfinite().all()
    halved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    for module, twin in zip(model.modules(), halved.modules(), strict=True):
        if isinstance(module, SumLinear):
            assert torch.equal(module.to_dense(), twin.to_dense()), "a cast changed the weight"


# --- what cannot be ---------------------------------------------------------------------------------------------------


@every_rounding
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_statistics_of_any_scale_are_survived(rounding, scale):
    weight = normal(6, 20, dtype=torch.float32)
    stats = seen(weight, scale * correlated(20), scale * normal(2, 120, seed=9))
    for score in SCORES:
        made = GradientAware(score=score, rounding=rounding, share=0.05).compress(weight, stats, 3)
        assert made.to_dense().isfinite().all()


def test_the_random_control_is_the_same_every_time_and_another_one_for_another_seed():
    weight = normal(20, 20)
    first, again, other = (
        GradientAware(score="random", share=0.1, seed=seed).outliers(weight, Stats(), 3) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "wrong",
    [{"share": -0.1}, {"share": 1.1}, {"share": float("nan")}, {"damping": -1.0}, {"group": -1}, {"width": 9}],
    ids=str,
)
def test_settings_that_do_not_exist_are_refused(wrong):
    with pytest.raises(RecipeError, match="wanted"):
        GradientAware(**wrong)


def test_what_is_not_finite_is_refused():
    weight = normal(4, 20)
    broken = weight.clone()
    broken[1, 2] = float("nan")
    with pytest.raises(NumericalError, match="finite"):
        GradientAware().compress(broken, seen(weight), 3)
    gradients = normal(2, 80)
    gradients[0, 3] = float("inf")
    with pytest.raises(NumericalError, match="finite"):
        GradientAware().compress(weight, seen(weight, gradients=gradients), 3)

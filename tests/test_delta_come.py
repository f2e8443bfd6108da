"""Delta-CoMe on differences with a long tail: what it stores, what it loses, and why the order of its steps matters.

W is a difference of weights, G the mean of x xᵀ over correlated inputs; errors are mean squared output errors per
token.
"""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from families import tiny_model
from tersely.checkpoint import open_source
from tersely.deltas import open_delta, write_delta
from tersely.errors import NumericalError, RecipeError
from tersely.kinds import LinearKind, LowRankLinear, Made, manifest_of
from tersely.kinds.quantized import QuantizedLinear, quantized_bytes
from tersely.kinds.sum import SumLinear
from tersely.linalg.grid import fit_grid
from tersely.methods.delta.delta_come import DeltaCoMe
from tersely.methods.low_rank.svd import PlainSVD
from tersely.methods.quantize.gptq import GPTQ
from tersely.stats import Gram, Stats

SHAPES = {"wide": (40, 72), "tall": (72, 40), "square": (64, 64)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)

MIXED = DeltaCoMe(widths="8+3+2", ranks="2+8", group=32)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def long_tailed(shape: tuple[int, int], power: float = 1.0) -> Tensor:
    """Singular values 1, 1/2, 1/3, … times 0.1."""
    u, _, vt = torch.linalg.svd(normal(*shape), full_matrices=False)
    return 0.1 * u * torch.arange(1, len(vt) + 1).double().pow(-power) @ vt


def correlated(width: int, tokens: int = 400) -> Tensor:
    loudness = torch.logspace(0.5, -1, width, dtype=torch.float64)
    return normal(tokens, width, seed=1) * loudness @ normal(width, width, seed=2) / width**0.5


def observed(x: Tensor) -> Stats:
    stats = Stats({Gram: Gram(x.shape[1])})
    stats.update(x)
    return stats


def case(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Stats]:
    x = correlated(shape[1])
    return long_tailed(shape), x, observed(x)


def lost(weight: Tensor, module: nn.Module, x: Tensor) -> float:
    return (x @ weight.T - module(x)).square().sum(-1).mean().item()


# --- what is stored ---------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize(
    "method", [MIXED, DeltaCoMe(), DeltaCoMe(widths="16+4", ranks="3"), DeltaCoMe(widths="2", ranks="")]
)
def test_sizes_are_the_bytes_of_the_module(shape, method):
    weight, _, stats = case(shape)
    sizes = method.sizes(shape, 4)
    assert [size.amount for size in sizes] == [*range(min(shape) + 1)]
    assert sizes[0].nbytes == 0
    assert all(less.nbytes < more.nbytes for less, more in pairwise(sizes))
    for size in sizes[1 :: min(shape) // 3]:
        made = Made.of(method.compress(weight.float(), stats, size.amount))
        assert sum(tensor.nbytes for tensor in made.state.values()) == size.nbytes


def test_the_budget_formula_of_the_paper_and_what_it_leaves_out():
    """8+3+2 with 2 + 32 + 968 components is a sixteenth of a 4096 x 4096 matrix in 16 bits, codes alone."""
    width, dense = 4096, 2 * 4096 * 4096
    codes = sum(bits * rank * 2 * width for bits, rank in ((8, 2), (3, 32), (2, 968))) // 8
    assert codes * 16 == dense
    groups = {8: 2, 3: 32, 2: 968}
    factors = [(bits, shape) for bits, rank in groups.items() for shape in ((rank, width), (width, rank))]
    whole = sum(quantized_bytes(shape, bits, 128, zeros=True) for bits, shape in factors)
    (real,) = [size.nbytes for size in DeltaCoMe().sizes((width, width), 2) if size.amount == sum(groups.values())]
    assert real == whole
    assert real / codes == pytest.approx(1.0814, abs=0.001)  # scales and zero points


def test_an_mlp_of_the_paper_takes_as_small_a_part():
    codes = sum(bits * rank for bits, rank in ((8, 2), (3, 32), (2, 1428))) * (4096 + 11008)
    assert codes / (16 * 4096 * 11008) == pytest.approx(1 / 16.1, rel=1e-3)


@every_shape
def test_each_group_is_a_pair_of_factors_in_its_own_bits(shape):
    weight, _, stats = case(shape)
    module = MIXED.compress(weight.float(), stats, 30)
    assert isinstance(module, SumLinear) and len(module.terms) == 3
    assert [term.rank for term in module.terms] == [2, 8, 20]
    assert [term.down.bits for term in module.terms] == [8, 3, 2]
    assert [term.up.bits for term in module.terms] == [8, 3, 2]
    assert isinstance(MIXED.compress(weight.float(), stats, 2), LowRankLinear)
    assert len(MIXED.compress(weight.float(), stats, 3).terms) == 2


def test_the_codes_are_those_of_the_singular_vectors():
    """σ lives in the scales of the rows: a row times a power of two has the same codes."""
    weight, _, stats = case((40, 72))
    method = DeltaCoMe(widths="3", ranks="", group=0)
    down = method.compress(weight.float(), stats, 12).down
    vectors = torch.linalg.svd(weight, full_matrices=False).Vh[:12]
    sizes = torch.linalg.svdvals(weight)[:12].log2().round()
    plain = GPTQ(group=0, width=3).compress((vectors * 2 ** sizes[:, None]).float(), stats, 3).unpacked()
    ours = down.unpacked()
    same = [min((a != b).sum(), (7 - a.int() != b.int()).sum()).item() for a, b in zip(ours, plain, strict=True)]
    # up to the sign of a vector, and codes that a scale rounded to 16 bits moved across a boundary
    assert sum(same) <= 0.1 * ours.numel()


# --- what is lost -----------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("metric", ["plain", "gram"])
@pytest.mark.parametrize("refit", [False, True])
def test_unrounded_and_of_full_rank_it_is_the_difference_itself(shape, metric, refit):
    weight, x, stats = case(shape)
    method = DeltaCoMe(widths="16+16", ranks="5", metric=metric, refit=refit)
    module = method.compress(weight, stats, min(shape))
    assert lost(weight, module, x) <= 1e-12 * (x @ weight.T).square().sum(-1).mean().item()
    assert (module.to_dense() - weight).norm() <= 1e-12 * weight.norm()


@every_shape
@pytest.mark.parametrize("metric", ["plain", "gram"])
def test_without_rounding_the_predicted_loss_is_the_measured_one(shape, metric):
    weight, x, stats = case(shape)
    method = DeltaCoMe(widths="16", ranks="", metric=metric)
    for option in method.options(weight, stats)[1::7]:
        assert lost(weight, method.compress(weight, stats, option.amount), x) == pytest.approx(option.error, abs=1e-9)


@every_shape
@pytest.mark.parametrize("metric", ["plain", "gram"])
def test_predictions_fall_and_bound_what_error_feedback_loses(shape, metric):
    weight, x, stats = case(shape)
    method = DeltaCoMe(widths="8+3", ranks="2", group=32, metric=metric)
    options = method.options(weight, stats)
    assert all(more.error <= less.error for less, more in pairwise(options))
    assert options[0].error == pytest.approx((x @ weight.T).square().sum(-1).mean().item())
    for option in options[5::9]:
        measured = lost(weight, method.compress(weight.float(), stats, option.amount), x)
        assert 0.1 * option.error < measured < 1.3 * option.error


def rounded(factor: Tensor, bits: int) -> Tensor:
    grid = fit_grid(factor, bits, 32)
    return grid.levels(grid.nearest(factor)).double()


def fed_back(factor: Tensor, gram: Tensor, bits: int) -> Tensor:
    stats = Stats({Gram: Gram.restore({"sum": gram, "tokens": torch.tensor(1)})})
    return GPTQ(group=32, width=bits).compress(factor, stats, bits).to_dense().double()


@every_shape
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_feedback_beats_rounding_and_up_can_answer_for_what_down_lost(shape, bits):
    """Rounding `down` first pays once `up` answers for it; as long as its target are the singular vectors, as in the
    paper, the other order loses about the same."""
    weight, x, stats = case(shape)
    gram, rank = stats[Gram].mean(), 24
    module = DeltaCoMe(widths=str(bits), ranks="", group=32).compress(weight, stats, rank)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    up, down = u[:, :rank], s[:rank, None] * vt[:rank]
    nearest = rounded(up, bits) @ rounded(down, bits)
    turned = fed_back(up, down @ gram @ down.T, bits) @ fed_back(down, gram, bits)

    def off(other: Tensor) -> float:
        return ((weight - other) @ gram * (weight - other)).sum().item()

    ours = lost(weight, module, x)
    refit = DeltaCoMe(widths=str(bits), ranks="", group=32, refit=True).compress(weight, stats, rank)
    assert max(ours, off(turned)) < off(nearest)
    assert ours == pytest.approx(off(turned), rel=0.25)
    assert lost(weight, refit, x) < min(ours, off(turned))


def one_bit(weight: Tensor) -> Tensor:
    """BitDelta: the sign of every entry, times the mean magnitude."""
    return weight.abs().mean() * weight.sign()


def of_codes(shape: tuple[int, int], groups: dict[int, int]) -> int:
    return sum(bits * rank * sum(shape) for bits, rank in groups.items())


@pytest.mark.parametrize("power", [0.8, 1.0])
def test_mixed_precision_loses_less_than_one_precision_than_plain_ranks_at_equal_bits(power):
    shape = (64, 64)
    weight, x, stats = long_tailed(shape, power), correlated(64), observed(correlated(64))
    budget = of_codes(shape, {8: 2, 3: 8, 2: 30})  # a tenth of the matrix in 16 bits
    mixed = lost(weight, MIXED.compress(weight, stats, 40), x)
    assert of_codes(shape, {2: 50}) == budget
    single = lost(weight, DeltaCoMe(widths="2", ranks="", group=32).compress(weight, stats, 50), x)
    assert of_codes(shape, {16: 6}) <= budget
    plain = lost(weight, PlainSVD().compress(weight, stats, 6), x)
    assert mixed < single and mixed < plain
    crude = (weight - one_bit(weight)) @ stats[Gram].mean()
    assert budget > 64 * 64 and mixed < (crude * (weight - one_bit(weight))).sum().item()


@every_shape
def test_our_two_options_lose_less(shape):
    weight, x, stats = case(shape)
    errors = {
        (metric, refit): lost(
            weight, DeltaCoMe("8+3+2", "2+8", 32, metric=metric, refit=refit).compress(weight, stats, 30), x
        )
        for metric in ("plain", "gram")
        for refit in (False, True)
    }
    assert errors["plain", True] < errors["plain", False]
    assert errors["gram", False] < errors["plain", False]
    assert errors["gram", True] < errors["plain", True]


# --- inputs and requests that are hard --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (13, 1), (7, 33), (33, 7)])
@pytest.mark.parametrize("refit", [False, True])
def test_any_shape_and_dtype(shape, dtype, refit):
    method = DeltaCoMe(widths="8+3+2", ranks="1+2", group=4, refit=refit)
    weight, x = long_tailed(shape).to(dtype), correlated(shape[1], 20)
    before = weight.clone()
    module = method.compress(weight, observed(x), min(shape))
    assert torch.equal(weight, before)
    assert module(x.to(dtype)).dtype == dtype and module(x.to(dtype)).shape == (20, shape[0])
    assert all(tensor.dtype == dtype for tensor in module.state_dict().values() if tensor.is_floating_point())
    again = method.compress(weight, observed(x), min(shape))
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("refit", [False, True])
def test_nothing_changed_nothing_observed_and_little_observed(refit):
    method = DeltaCoMe(widths="8+2", ranks="2", group=8, refit=refit, metric="gram")
    zero, silent, few = torch.zeros(12, 16), torch.zeros(30, 16, dtype=torch.float64), correlated(16, 3)
    assert not method.compress(zero, observed(few), 6)(normal(4, 16).float()).any()
    for x in (silent, few):
        module = method.compress(long_tailed((12, 16)).float(), observed(x), 12)
        assert torch.isfinite(module(normal(4, 16).float())).all()
    with pytest.raises(NumericalError):
        method.compress(torch.full((12, 16), math.nan), observed(few), 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": "9"}, "widths of 1 to 8, or 16"),
        ({"widths": "8,3"}, r"joined by \+"),
        ({"ranks": "2"}, "one positive number for each group"),
        ({"ranks": "2+0"}, "one positive number for each group"),
        ({"group": -1}, "wanted 0 for whole rows"),
        ({"damping": math.nan}, "wanted 0 or more"),
        ({"metric": "both"}, "wanted 'plain' or 'gram'"),
    ],
)
def test_a_field_out_of_range_is_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        DeltaCoMe(**fields)


@pytest.mark.parametrize("amount", [0, 41, 2.0, None, True])
def test_an_amount_that_is_no_rank_is_refused(amount):
    weight, _, stats = case((40, 72))
    with pytest.raises(RecipeError, match="wanted 1 to 40"):
        MIXED.compress(weight, stats, amount)


# --- through a folder -------------------------------------------------------------------------------------------------


def test_a_folder_of_quantized_updates_opens_as_base_plus_updates(tmp_path: Path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    paths = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    updates: dict[str, LinearKind] = {}
    for path in paths:
        linear = model.get_submodule(path)
        updates[path] = MIXED.compress(
            long_tailed(linear.weight.shape).float(), observed(correlated(linear.in_features)), 14
        )
        with torch.no_grad():
            linear.weight.add_(updates[path].to_dense())
    model.save_pretrained(tmp_path / "tuned")
    made = {path: Made.of(update) for path, update in updates.items()}
    write_delta(tmp_path / "delta", open_source(tmp_path / "tuned"), open_source(tmp_path / "base"), made)
    opened = type(model).from_pretrained(tmp_path / "delta")
    assert sum(isinstance(module, QuantizedLinear) for module in opened.modules()) == 6 * len(paths)
    assert manifest_of(opened) == open_delta(tmp_path / "delta").manifest
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(opened(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4)
        half = type(model).from_pretrained(tmp_path / "delta", dtype=torch.bfloat16)
        assert half(tokens).logits.dtype == torch.bfloat16
    for name, module in half.named_modules():
        if isinstance(module, QuantizedLinear):
            assert torch.equal(module.to_dense(), opened.get_submodule(name).to_dense())

"""Small integers: packing without loss, grids that cover what they were fitted to, error feedback as the theory has it.

W is a weight, W' what it becomes, G the mean of x xᵀ over calibration, s the scale of a group.
"""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersely.errors import CheckpointError, NumericalError, RecipeError
from tersely.kinds import Made
from tersely.kinds.quantized import QuantizedLinear, quantized_bytes
from tersely.linalg.grid import FORMS, Grid, Scales, fit_grid, in_groups
from tersely.linalg.hessian import feedback, sweep
from tersely.linalg.packing import pack, packed_bytes, unpack
from tersely.methods.quantize.gptq import GPTQ
from tersely.methods.quantize.rtn import RoundToNearest
from tersely.stats import Gram, Stats

WIDTHS = (2, 3, 4, 8)
SHAPES = {"even": (6, 128), "ragged": (5, 100), "narrow": (4, 7), "one column": (3, 1), "one row": (1, 40)}

every_form = pytest.mark.parametrize("form", FORMS)
every_width = pytest.mark.parametrize("bits", range(1, 9))
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_group = pytest.mark.parametrize("group", [0, 16, 64])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def correlated(width: int, tokens: int = 400) -> Tensor:
    """Inputs of which some channels are loud and all are mixed."""
    loudness = torch.logspace(0.5, -1, width, dtype=torch.float64)
    return normal(tokens, width, seed=1) * loudness @ normal(width, width, seed=2) * loudness.flip(0).sqrt()


def observed(x: Tensor) -> Stats:
    stats = Stats({Gram: Gram(x.shape[1])})
    stats.update(x)
    return stats


def of_gram(gram: Tensor) -> Stats:
    return Stats({Gram: Gram.restore({"sum": gram, "tokens": torch.tensor(1)})})


def output_error(weight: Tensor, module: QuantizedLinear, x: Tensor) -> float:
    return (x @ (weight - module.to_dense()).T).square().sum(-1).mean().item()


def state_of(module: QuantizedLinear) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def quantized(weight: Tensor, bits: int = 4, group: int = 16, form: str = "asymmetric") -> QuantizedLinear:
    return RoundToNearest(group=group, grid=form).compress(weight, Stats(), bits)


# --- packing ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_code_survives_packing(data):
    bits = data.draw(st.integers(1, 8))
    shape = (*data.draw(st.lists(st.integers(0, 4), max_size=2)), data.draw(st.integers(1, 40)))
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    packed = pack(codes.byte(), bits)
    assert packed.shape == (*shape[:-1], math.ceil(shape[-1] * bits / 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, shape[-1]), codes.byte())


@every_width
def test_codes_lie_lowest_bit_first_and_spare_bits_are_zero(bits):
    codes = torch.randint(0, 2**bits, (13,), generator=torch.Generator().manual_seed(bits)).byte()
    number = sum(int(code) << bits * place for place, code in enumerate(codes))
    assert pack(codes, bits).tolist() == list(number.to_bytes(packed_bytes(13, bits), "little"))


def test_rows_can_be_read_without_their_neighbours():
    codes = torch.arange(24).view(3, 8).byte()
    assert torch.equal(unpack(pack(codes, 5)[1:2], 5, 8), codes[1:2])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="8 does not fit into 3 bits"):
        pack(torch.tensor([8], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="take 2 bytes, not 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 4)
    with pytest.raises(ValueError, match="wanted 1 to 8"):
        pack(torch.tensor([1], dtype=torch.uint8), 9)


# --- grids ------------------------------------------------------------------------------------------------------------

EXPECTED = {  # relative squared error on Gaussian rows: form, group → at 2, 3, 4 bits
    ("asymmetric", 32): (0.165, 0.0299, 0.00653),
    ("asymmetric", 128): (0.253, 0.0465, 0.0101),
    ("symmetric", 64): (0.515, 0.0630, 0.0116),
    ("symmetric_full", 64): (0.261, 0.0484, 0.0106),
}


@pytest.mark.parametrize(("form", "group"), EXPECTED)
def test_gaussian_weights_lose_what_they_are_known_to_lose(form, group):
    weight = normal(512, 1024, dtype=torch.float32)
    for bits, expected in zip((2, 3, 4), EXPECTED[form, group], strict=True):
        grid = fit_grid(weight, bits, group, form)
        lost = (weight - grid.levels(grid.nearest(weight))).square().sum() / weight.square().sum()
        assert lost.item() == pytest.approx(expected, rel=0.02)


@every_form
@every_shape
@every_group
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_is_off_by_more_than_half_a_step(form, shape, group, dtype):
    weight = (0.02 * normal(*shape)).to(dtype)
    for bits in range(1 if form == "asymmetric" else 2, 9):
        for format in ("float16", "float32"):
            grid = fit_grid(weight, bits, group, form, format=format)
            off = in_groups((weight.double() - grid.levels(grid.nearest(weight))).abs(), group).amax(-1)
            assert (off <= grid.scales.values().double() / 2 * (1 + 1e-4)).all()


@every_form
@every_group
def test_rounding_what_is_rounded_changes_nothing(form, group):
    weight = normal(8, 100)
    for bits in WIDTHS:
        grid = fit_grid(weight, bits, group, form)
        codes = grid.nearest(weight)
        assert torch.equal(grid.nearest(grid.levels(codes)), codes)
        if form == "symmetric":  # the largest weight is a level, hence the grid is found again
            again = fit_grid(grid.levels(codes), bits, group, form)
            assert torch.equal(again.levels(again.nearest(grid.levels(codes))), grid.levels(codes))


@every_form
@pytest.mark.parametrize("power", [-110, -40, -3, 5, 90])
def test_a_power_of_two_moves_nothing_but_the_exponent(form, power):
    """Float16 scales alone would be zero or infinite at most of these."""
    weight = normal(6, 48, dtype=torch.float32)
    before, after = quantized(weight, form=form), quantized(weight * 2.0**power, form=form)
    assert after.exponent == max(before.exponent + power, -102)
    if before.exponent + power >= -102:
        assert torch.equal(after.codes, before.codes) and torch.equal(after.scales, before.scales)
    assert torch.equal(after.unpacked(), before.unpacked())
    assert torch.equal(after.to_dense(), before.to_dense() * 2.0**power)


def test_a_louder_group_keeps_its_codes():
    weight = normal(6, 48)
    louder = weight.clone()
    louder[2, 16:32] *= 2.0**-9
    assert torch.equal(quantized(louder).unpacked(), quantized(weight).unpacked())


def test_a_group_too_quiet_for_its_neighbours_errs_by_a_known_amount():
    weight = torch.cat([normal(1, 16), 1e-30 * normal(1, 16)])
    module = quantized(weight)
    loudest = module.grid().scales.values().max()
    assert (module.to_dense()[1] - weight[1]).abs().max() <= loudest * 2.0**-38
    assert torch.equal(module.to_dense()[0], quantized(weight[:1]).to_dense()[0])


@every_form
def test_groups_without_a_range(form):
    """Zeros stay zeros; a constant is met to the rounding of its scale."""
    weight = torch.zeros(3, 32, dtype=torch.float64)
    assert not quantized(weight, form=form).to_dense().any()
    weight[1] = 0.3
    weight[2] = -0.3
    dense = quantized(weight, bits=8, form=form).to_dense()
    assert not dense[0].any()
    torch.testing.assert_close(dense.double(), weight, rtol=0.004 if form == "symmetric_full" else 1e-3, atol=0)


@every_form
def test_the_search_for_a_range_never_rounds_worse(form):
    weight = normal(16, 100)
    for bits in (2, 3, 4):
        lost = []
        for shrink in (False, True):
            grid = fit_grid(weight, bits, 32, form, shrink=shrink)
            off = in_groups((weight - grid.levels(grid.nearest(weight))).abs().pow(2.4), 32).sum(-1)
            lost.append(off)
        assert (lost[1] <= lost[0]).all()
        assert lost[1].sum() < 0.95 * lost[0].sum()


def test_a_weight_that_is_not_finite_is_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(NumericalError, match="not finite"):
            fit_grid(torch.tensor([[1.0, bad]]), 4)


def test_a_symmetric_grid_needs_two_bits():
    with pytest.raises(ValueError, match="2 bits"):
        fit_grid(torch.ones(1, 2), 1, form="symmetric")


# --- the kind ---------------------------------------------------------------------------------------------------------


@every_width
@every_shape
def test_bytes_are_those_of_the_stored_tensors(bits, shape):
    for group in (0, 16, 64):
        assert quantized(normal(*shape), bits, group).nbytes() == quantized_bytes(shape, bits, group, zeros=True)
        if bits > 1:
            symmetric = quantized(normal(*shape), bits, group, "symmetric")
            assert symmetric.nbytes() == quantized_bytes(shape, bits, group, zeros=False)


def test_bytes_by_hand():
    """64 codes of 4 bits, one scale of 16 bits, one zero point in a byte: and the tail of 36 columns has its own."""
    assert quantized_bytes((1, 64), 4, 64, zeros=True) == 32 + 2 + 1
    assert quantized_bytes((3, 100), 3, 64, zeros=True) == 3 * (38 + 4 + 1)
    assert quantized_bytes((4096, 4096), 4, 128, zeros=True) * 8 / 4096**2 == 4.15625  # the 4.156 of the literature


@every_width
@every_shape
@pytest.mark.parametrize("input_bits", [None, 8])
def test_a_module_comes_back_from_its_description_and_numbers(bits, shape, input_bits):
    module = quantized(normal(*shape, dtype=torch.bfloat16), bits)
    module.set_bias(normal(shape[0], dtype=torch.float32))
    if input_bits:
        module.round_input(input_bits, 2.5)
    made = Made.of(module)
    assert json.loads(json.dumps(made.specs)) == made.specs
    again = made.build()
    assert all(tensor.is_meta for tensor in again.state_dict().values())
    again.load_state_dict(made.state, assign=True)
    x = normal(5, shape[1], dtype=torch.bfloat16)
    assert torch.equal(again(x), module(x))
    assert again.spec() == module.spec()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_the_model_changes_no_weight(dtype):
    module = quantized(0.02 * normal(5, 100, dtype=torch.float32))
    module.set_bias(normal(5))
    module.round_input(8, 1.7)
    before, numbers = module.to_dense(), state_of(module)
    nn.Sequential(module).to(dtype)
    assert torch.equal(module.to_dense(), before) and before.dtype == torch.float32
    assert module.weight.dtype == module.bias.dtype == dtype
    for name in ("codes", "scales", "zeros", "bound"):
        assert torch.equal(module.state_dict()[name], numbers[name])
    x = normal(2, 3, 100, dtype=dtype)
    assert module(x).dtype == dtype and module(x).shape == (2, 3, 5)


@every_form
def test_the_product_is_that_with_the_dense_weight(form):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        module, bias = quantized(normal(6, 100, dtype=dtype), form=form), normal(6, dtype=dtype)
        x = normal(3, 4, 100, seed=5, dtype=dtype)
        assert torch.equal(module(x), nn.functional.linear(x, module.to_dense().to(dtype)))
        module.set_bias(bias)
        assert torch.equal(module(x), nn.functional.linear(x, module.to_dense().to(dtype), bias))


@every_form
def test_what_is_dequantized_is_what_was_chosen(form):
    """The codes are the nearest on the stored grid, not on the one before its scales were rounded."""
    weight = normal(6, 100)
    for bits in WIDTHS:
        module = quantized(weight, bits, form=form)
        levels = [module.grid().levels(torch.full((6, 100), code, dtype=torch.uint8)) for code in range(2**bits)]
        nearest = torch.stack([(weight - level).abs() for level in levels]).amin(0)
        assert torch.equal((weight - module.to_dense()).abs(), nearest)


def test_scales_of_32_bits_are_kept_as_they_are():
    weight = normal(4, 32, dtype=torch.float32)
    grid = fit_grid(weight, 4, 16, format="float32")
    module = QuantizedLinear.from_codes(grid.nearest(weight), grid, weight.dtype)
    wanted = (in_groups(weight, 16).amax(-1).clamp(min=0) - in_groups(weight, 16).amin(-1).clamp(max=0)) / 15
    assert torch.equal(grid.scales.values(), wanted)
    assert module.spec()["scale"] == "float32" and module.nbytes() == quantized_bytes(
        (4, 32), 4, 16, zeros=True, scale="float32"
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9), st.sampled_from(["float16", "bfloat16", "float32"]))
def test_a_stored_scale_is_the_next_one_that_is_not_smaller(wanted, format):
    wanted = torch.tensor([wanted], dtype=torch.float64)
    stored = Scales.of(wanted, format)
    digits = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}[format]
    smallest = 2.0 ** (stored.exponent - 24)
    assert (stored.values() >= wanted).all()
    assert (stored.values() <= wanted * (1 + digits) + smallest).all()


def test_the_input_is_rounded_to_its_own_grid():
    """x' = round(clip(x / a, ±1) · n) · a / n with n = 2^(b-1) - 1; gradients pass where nothing was clipped."""
    module = quantized(normal(3, 32))
    x = normal(20, 32, dtype=torch.float32).requires_grad_()
    plain = nn.functional.linear(x, module.to_dense())
    module.round_input(4, 1.5)
    levels = (x.detach() / 1.5).clamp(-1, 1).mul(7).round().mul(1.5 / 7)
    torch.testing.assert_close(module(x), nn.functional.linear(levels, module.to_dense()))
    module(x).sum().backward()
    expected = torch.where(x.detach().abs() < 1.5, module.to_dense().sum(0), 0.0)
    torch.testing.assert_close(x.grad, expected)
    module.round_input(16, 10.0)
    torch.testing.assert_close(module(x), plain, atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match="positive bound"):
        module.round_input(8, 0.0)


def test_a_description_that_cannot_be_is_refused():
    spec = quantized(normal(3, 32)).spec()
    for key, value in {"bits": 9, "group": -1, "scale": "float8"}.items():
        with pytest.raises(CheckpointError, match=key):
            QuantizedLinear.from_spec(spec | {key: value})


def test_codes_must_suit_their_grid():
    grid = fit_grid(normal(3, 32), 4, 16)
    with pytest.raises(ValueError, match=r"\(3, 2\) for codes \(3, 64\)"):
        QuantizedLinear.from_codes(torch.zeros(3, 64, dtype=torch.uint8), grid, torch.float32)


# --- both methods -----------------------------------------------------------------------------------------------------


def cases():
    for form in FORMS:
        yield RoundToNearest(group=16, grid=form)
        yield GPTQ(group=16, grid=form, block=32)
    yield RoundToNearest(width=5, shrink=True)
    yield GPTQ(group=0, width=5, act_order=False, shrink=True)
    yield RoundToNearest(group=16, scale="log8")
    yield GPTQ(group=16, scale="log8")


def name_of(method):
    return f"{type(method).__name__}-{method.grid}-{method.width}-{method.scale}"


every_method = pytest.mark.parametrize("method", list(cases()), ids=name_of)


@every_method
@pytest.mark.parametrize("shape", [(6, 64), (5, 50)])
def test_options_say_what_compress_makes(method, shape):
    weight, x = normal(*shape), correlated(shape[1])
    stats = observed(x)
    nothing, *options = method.options(weight, stats)
    metric = stats[Gram].mean() if method.needs else torch.eye(shape[1], dtype=torch.float64)
    assert nothing.amount == nothing.nbytes == 0
    assert nothing.error == pytest.approx((weight @ metric @ weight.T).trace().item(), rel=1e-12)
    assert [option.amount for option in options] == ([method.width] if method.width else [2, 3, 4, 8])
    assert [replace(option, error=None) for option in (nothing, *options)] == list(method.sizes(shape, 4))
    for option in options:
        module = method.compress(weight, stats, option.amount)
        off = weight - module.to_dense()
        assert module.nbytes() == option.nbytes and module.bits == option.amount
        assert option.error == pytest.approx((off @ metric @ off.T).trace().item(), rel=1e-9)
    errors = [option.error for option in (nothing, *options)]
    assert all(more > less for more, less in itertools.pairwise(errors))


@every_method
def test_a_weight_in_half_precision_is_treated_as_its_exact_value(method):
    weight, stats = normal(6, 64, dtype=torch.bfloat16), observed(correlated(64).float())
    half, whole = (method.compress(w, stats, method.width or 3) for w in (weight, weight.float()))
    assert torch.equal(half.codes, whole.codes) and torch.equal(half.scales, whole.scales)
    assert half.weight.dtype == torch.bfloat16 and half.weight.numel() == 0


@every_method
@every_shape
def test_shapes_of_all_sorts(method, shape):
    weight = normal(*shape)
    module = method.compress(weight, observed(correlated(shape[1])), method.width or 4)
    assert module.to_dense().shape == shape and module.to_dense().isfinite().all()
    zero = method.compress(torch.zeros_like(weight), observed(correlated(shape[1])), method.width or 4)
    assert not zero.to_dense().any()


@pytest.mark.parametrize("method", [RoundToNearest, GPTQ])
def test_wrong_requests_are_refused(method):
    wrongs = ({"group": -1}, {"grid": "log"}, {"width": 9}, {"width": 1, "grid": "symmetric"}, {"scale": "float8"})
    for wrong in wrongs:
        with pytest.raises(RecipeError, match=r"wanted|known"):
            method(**wrong)
    for asked, amount in ((method(), 9), (method(), 0), (method(width=4), 3), (method(grid="symmetric"), 1)):
        with pytest.raises(RecipeError, match="wanted"):
            asked.compress(normal(4, 8), observed(correlated(8)), amount)


@pytest.mark.parametrize("method", [RoundToNearest, GPTQ])
def test_scales_in_a_byte_pay_for_groups_of_half_the_width(method):
    weight, stats = normal(64, 128), observed(correlated(128))
    coarse, fine = method(width=2), method(width=2, group=32, scale="log8")
    assert coarse.sizes((64, 128), 4)[1].nbytes == fine.sizes((64, 128), 4)[1].nbytes
    assert fine.options(weight, stats)[1].error < coarse.options(weight, stats)[1].error


def test_wrong_requests_of_gptq_alone_are_refused():
    for wrong in ({"damping": -0.1}, {"damping": math.nan}, {"block": 0}):
        with pytest.raises(RecipeError, match="wanted"):
            GPTQ(**wrong)


# --- error feedback ---------------------------------------------------------------------------------------------------


def brain_surgeon(weight: Tensor, hessian: Tensor, grid: Grid, order: list[int]) -> Tensor:
    """The textbook: before every column, the inverse of the Hessian of the columns that are left, and its update."""
    current, left = weight.clone(), list(order)
    for column in order:
        inverse = torch.linalg.inv(hessian[left][:, left])
        target = grid.levels(grid.nearest(current)).double()[:, column]
        error = (current[:, column] - target) / inverse[0, 0]
        current[:, left] -= error[:, None] * inverse[0]
        current[:, column] = target
        left.pop(0)
    return current


@pytest.mark.parametrize("act_order", [True, False])
def test_the_sweep_is_the_optimal_brain_surgeon_column_by_column(act_order):
    weight, x = normal(5, 40), correlated(40)
    gram = observed(x)[Gram].mean()
    power = gram.diagonal()
    damped = gram + 0.01 * power.mean() * torch.eye(40, dtype=torch.float64)
    order = power.argsort(descending=True).tolist() if act_order else list(range(40))
    grid = fit_grid(weight, 3, 16)
    expected = brain_surgeon(weight, damped, grid, order)
    ours = GPTQ(group=16, act_order=act_order, block=16).compress(weight, observed(x), 3)
    assert torch.equal(ours.to_dense().double(), expected)


def test_the_root_is_that_of_the_hessian_in_the_order_of_the_columns():
    gram = observed(correlated(30))[Gram].mean()
    spread = feedback(gram, damping=0.01, loudest_first=True)
    damped = gram + spread.added * torch.eye(30, dtype=torch.float64)
    factor = spread.inverse()
    torch.testing.assert_close(spread.root.T @ spread.root, damped[spread.order][:, spread.order])
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped)[spread.order][:, spread.order])
    assert torch.equal(spread.root, spread.root.tril()) and (spread.own > 0).all()
    assert torch.equal(factor, factor.triu()) and torch.allclose(
        factor.diagonal() * spread.own, torch.ones(()).double()
    )
    assert (gram.diagonal()[spread.order].diff() <= 0).all()


def test_the_squares_of_the_errors_add_up_to_the_whole():
    weight, gram = normal(7, 40), observed(correlated(40))[Gram].mean()
    spread = feedback(gram, damping=0.01, loudest_first=False)
    taken = torch.empty_like(weight)

    def decide(place: int, left: Tensor) -> Tensor:
        taken[:, place] = left[0].round()
        return taken[:, place]

    swept = sweep(weight, spread, decide, block=16)
    off = weight - taken
    assert torch.equal(swept.off, off.T)
    damped = gram + spread.added * torch.eye(40, dtype=torch.float64)
    assert swept.cost == pytest.approx((off @ damped @ off.T).trace().item(), rel=1e-12)
    assert swept.loss(spread) == pytest.approx((off @ gram @ off.T).trace().item(), rel=1e-10)


@every_form
def test_ranges_are_searched_for_row_by_row(form, monkeypatch):
    weight = normal(9, 100)
    whole = fit_grid(weight, 2, 32, form, shrink=True)
    monkeypatch.setattr("tersely.linalg.grid.GRIDS_AT_ONCE", 600)
    monkeypatch.setattr("tersely.kernels.ranges.AT_ONCE", 250)
    few = fit_grid(weight, 2, 32, form, shrink=True)
    assert torch.equal(few.levels(few.nearest(weight)), whole.levels(whole.nearest(weight)))


@pytest.mark.parametrize("act_order", [True, False])
def test_the_size_of_blocks_changes_nothing(act_order):
    weight, stats = normal(6, 100), observed(correlated(100))
    codes = [GPTQ(act_order=act_order, block=block).compress(weight, stats, 3).codes for block in (1, 7, 32, 100, 128)]
    assert all(torch.equal(codes[0], other) for other in codes)


@every_form
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inputs_without_correlation_leave_nothing_to_repair(form, group, dtype):
    weight, gram = normal(6, 48).to(dtype), normal(48).square().add(0.1).diag()
    ours = GPTQ(group=group, grid=form).compress(weight, of_gram(gram), 3)
    nearest = RoundToNearest(group=group, grid=form).compress(weight, Stats(), 3)
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in nearest.state_dict().items())


@pytest.mark.parametrize("group", [0, 32])
@every_form
def test_on_correlated_inputs_feedback_pays(form, group):
    weight, x = normal(32, 96), correlated(96)
    for bits in WIDTHS:
        nearest = RoundToNearest(group=group, grid=form).compress(weight, Stats(), bits)
        for act_order in (True, False):
            ours = GPTQ(group=group, grid=form, act_order=act_order).compress(weight, observed(x), bits)
            assert output_error(weight, ours, x) < 0.7 * output_error(weight, nearest, x)


def test_fewer_tokens_than_channels_are_enough_to_go_on():
    weight, x = normal(8, 64), correlated(64, tokens=10)
    ours = GPTQ().compress(weight, observed(x), 3)
    assert output_error(weight, ours, x) < 0.3 * output_error(weight, quantized(weight, 3, 64), x)
    (nothing, *options) = GPTQ().options(weight, observed(x))
    assert all(0 <= option.error < nothing.error for option in options)


@pytest.mark.parametrize("act_order", [True, False])
def test_silent_inputs_get_no_weight_and_disturb_nobody(act_order):
    weight, x = normal(6, 32), correlated(32)
    x[:, [3, 20]] = 0.0
    ours = GPTQ(group=0, act_order=act_order).compress(weight, observed(x), 4)
    assert not ours.to_dense()[:, [3, 20]].any()
    heard = [column for column in range(32) if column not in (3, 20)]
    alone = GPTQ(group=0, act_order=act_order).compress(weight[:, heard], observed(x[:, heard]), 4)
    assert torch.equal(ours.to_dense()[:, heard], alone.to_dense())


def test_the_unit_of_the_inputs_does_not_matter():
    weight, x = normal(6, 32), correlated(32)
    x[:, 5] = 0.0
    codes = [GPTQ().compress(weight, observed(x * unit), 3).codes for unit in (1.0, 2.0**-20, 2.0**20)]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])


def test_where_nothing_was_heard_all_directions_count_alike():
    weight = normal(6, 32)
    stats = Stats({Gram: Gram(32)})
    assert torch.equal(GPTQ().compress(weight, stats, 4).codes, quantized(weight, 4, 64).codes)
    errors = [option.error for option in GPTQ().options(weight, stats)]
    assert errors == pytest.approx([option.error for option in RoundToNearest().options(weight, stats)], rel=1e-9)


def test_a_matrix_that_is_not_positive_definite_takes_more_damping_and_says_so(caplog):
    weight, gram = normal(4, 8), torch.eye(8, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = 1.05  # least eigenvalue -0.05: 0.01 does not suffice, 0.1 does
    module = GPTQ().compress(weight, of_gram(gram), 4)
    assert module.to_dense().isfinite().all()
    assert "damping 0.01; took 0.1" in caplog.text
    assert feedback(gram, damping=0.0, loudest_first=True).damping == pytest.approx(0.1)
    gram[0, 1] = gram[1, 0] = 9.0
    with pytest.raises(NumericalError, match="not positive definite, even with 1 times"):
        GPTQ().compress(weight, of_gram(gram), 4)


def test_more_damping_than_the_mean_power_is_taken_as_asked(caplog):
    gram = observed(correlated(8))[Gram].mean()
    assert feedback(gram, damping=5.0, loudest_first=True).damping == 5.0
    assert not caplog.text


def test_statistics_that_are_not_finite_are_refused():
    gram = torch.eye(8, dtype=torch.float64)
    gram[2, 2] = math.nan
    with pytest.raises(NumericalError, match="not finite"):
        GPTQ().compress(normal(4, 8), of_gram(gram), 4)
    with pytest.raises(NumericalError, match="not finite"):
        GPTQ().compress(normal(4, 8) / 0, observed(correlated(8)), 4)


def test_nothing_that_was_given_is_changed():
    weight, stats = normal(6, 32), observed(correlated(32))
    copies = weight.clone(), stats[Gram].mean()
    for method in (GPTQ(), RoundToNearest(shrink=True)):
        method.options(weight, stats)
        method.compress(weight, stats, 4)
    assert torch.equal(weight, copies[0]) and torch.equal(stats[Gram].mean(), copies[1])

"""Three papers, one theorem: the best rank r under a quadratic metric, what it loses, and what it does not depend on.

In float64, against the SVD in the papers' own form: whitened with a root of the Gram matrix, or scaled per channel, and
mapped back by the inverse.  W is the weight, G the mean of x xᵀ, S a root of G.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersely.errors import NumericalError, RecipeError
from tersely.kinds import LowRankLinear
from tersely.methods import Method
from tersely.methods.low_rank.asvd import ChannelScaledSVD
from tersely.methods.low_rank.svd import PlainSVD
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.stats import AbsMax, AbsMean, Cross, Gram, Stats

WHITENED = WhitenedSVD(damping=0.0)
VARIANTS: dict[str, Method] = {
    "svd": PlainSVD(),
    "asvd": ChannelScaledSVD(),
    "asvd-max": ChannelScaledSVD(alpha=1.0, scale="max"),
    "svd_llm": WhitenedSVD(),
    "svd_llm-undamped": WHITENED,
    "svd_llm-updated": WhitenedSVD(update=True),
}
SHAPES = {"wide": (10, 24), "tall": (24, 10), "square": (16, 16)}

every_method = pytest.mark.parametrize("method", VARIANTS.values(), ids=VARIANTS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(width: int, tokens: int = 300) -> Tensor:
    """Inputs of which some channels are loud and all are mixed."""
    loudness = torch.logspace(0.5, -1.5, width, dtype=torch.float64)
    return normal(tokens, width, seed=1) * loudness @ normal(width, width, seed=2) * loudness.flip(0).sqrt()


def observed(x: Tensor) -> Stats:
    stats = Stats({kind: kind(x.shape[1]) for kind in (Gram, Cross, AbsMean, AbsMax)})
    stats.update(x)
    return stats


def case(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Stats]:
    x = correlated(shape[1])
    return normal(*shape), x, observed(x)


def output_error(weight: Tensor, other: Tensor, x: Tensor) -> float:
    """Mean over tokens of ‖(W - W')x‖²."""
    return (x @ (weight - other).T).square().sum(-1).mean().item()


def truncated(weight: Tensor, root: Tensor, rank: int) -> Tensor:
    """W' = U_r Σ_r V_rᵀ S⁻¹ of U Σ Vᵀ = W S, as the papers write it."""
    u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    return torch.linalg.solve(root, u[:, :rank] * s[:rank] @ vt[:rank], left=False)


def ranks(shape: tuple[int, int]) -> range:
    return range(1, min(shape) + 1)


def close(first: Tensor, second: Tensor, tolerance: float = 1e-9) -> bool:
    return torch.linalg.norm(first - second).item() <= tolerance * torch.linalg.norm(second).item()


# --- whitening --------------------------------------------------------------------------------------------------------


@every_shape
def test_the_predicted_loss_is_the_measured_output_error(shape):
    weight, x, stats = case(shape)
    nothing, *options = WHITENED.options(weight, stats)
    assert nothing.error == pytest.approx(output_error(weight, torch.zeros_like(weight), x), rel=1e-12)
    for option in options:
        module = WHITENED.compress(weight, stats, option.amount)
        assert (x @ weight.T - module(x)).square().sum(-1).mean().item() == pytest.approx(option.error, abs=1e-8)


@every_shape
def test_the_predicted_loss_is_the_sum_of_the_dropped_squared_singular_values(shape):
    weight, _, stats = case(shape)
    energies = torch.linalg.svdvals(weight @ torch.linalg.cholesky(stats[Gram].mean())).square()
    for option in WHITENED.options(weight, stats):
        assert option.error == pytest.approx(energies[option.amount :].sum().item(), abs=1e-9)


@every_shape
def test_without_an_inverse_it_is_the_whitened_form_whatever_the_root(shape):
    weight, _, stats = case(shape)
    gram = stats[Gram].mean()
    values, vectors = torch.linalg.eigh(gram)
    roots = {
        "Cholesky": torch.linalg.cholesky(gram),
        "eigenvectors": vectors * values.sqrt(),
        "symmetric": vectors * values.sqrt() @ vectors.T,
    }
    for rank in ranks(shape):
        ours = WHITENED.compress(weight, stats, rank).to_dense()
        for name, root in roots.items():
            torch.testing.assert_close(root @ root.T, gram)
            assert close(ours, truncated(weight, root, rank)), (name, rank)


@every_shape
def test_of_few_tokens_it_says_what_a_pseudo_inverse_of_the_root_would(shape):
    """SVD-LLM V2 takes Λ^-½ of the directions that were observed; elsewhere nobody looks."""
    weight, x = normal(*shape), correlated(shape[1], tokens=7)
    values, vectors = (part[..., -7:] for part in torch.linalg.eigh(x.T @ x / 7))
    u, s, vh = torch.linalg.svd(weight @ vectors * values.sqrt(), full_matrices=False)
    for rank in (1, 3, 6):
        theirs = u[:, :rank] * s[:rank] @ vh[:rank] / values.sqrt() @ vectors.T
        assert close(x @ WHITENED.compress(weight, observed(x), rank).to_dense().T, x @ theirs.T)


@every_shape
def test_no_method_of_the_same_rank_loses_less_than_whitening(shape):
    weight, x, stats = case(shape)
    others = [PlainSVD(), *(ChannelScaledSVD(alpha, scale) for alpha in (0.5, 1.0) for scale in ("mean", "max"))]
    for rank in ranks(shape)[:-1]:
        least = output_error(weight, WHITENED.compress(weight, stats, rank).to_dense(), x)
        for other in others:
            # strictly: these inputs are far from any diagonal metric
            assert least < 0.999 * output_error(weight, other.compress(weight, stats, rank).to_dense(), x)


@every_shape
def test_massive_activations_cost_no_accuracy_that_can_be_seen(shape):
    """The optimum from a QR of the inputs, whose condition number is the root of the Gram matrix's 1e14."""
    weight, x, _ = case(shape)
    x = x * torch.logspace(0, -7, shape[1], dtype=torch.float64)
    stats, root = observed(x), torch.linalg.qr(x).R.T / len(x) ** 0.5
    assert torch.linalg.cond(stats[Gram].mean()) > 1e14
    energies = torch.linalg.svdvals(weight @ root).square()
    for rank in ranks(shape):
        lost = output_error(weight, WHITENED.compress(weight, stats, rank).to_dense(), x)
        assert lost - energies[rank:].sum().item() <= 1e-14 * energies.sum().item()


@every_shape
def test_damping_bounds_the_error_from_above(shape):
    weight, x, stats = case(shape)
    damping, power = 0.01, stats[Gram].mean().diagonal().mean().item()
    for option in WhitenedSVD(damping).options(weight, stats)[1:]:
        other = WhitenedSVD(damping).compress(weight, stats, option.amount).to_dense()
        slack = damping * power * (weight - other).square().sum().item()
        assert output_error(weight, other, x) + slack == pytest.approx(option.error, abs=1e-8)


@every_shape
def test_alternating_least_squares_cannot_improve_on_whitening(shape):
    """From plain SVD the alternation falls to the whitened optimum; started there, it stays."""
    weight, x, stats = case(shape)
    gram, rank = stats[Gram].mean(), min(shape) // 2

    def alternate(module: LowRankLinear, times: int) -> list[float]:
        down, losses = module.down.weight.detach(), []
        losses.append(output_error(weight, module.to_dense(), x))
        for _ in range(times):
            # each factor in turn is the exact minimiser of E‖(W - up · down)x‖²; for `down` the inputs cancel
            up = torch.linalg.solve(down @ gram @ down.T, down @ gram @ weight.T).T
            losses.append(output_error(weight, up @ down, x))
            down = torch.linalg.lstsq(up, weight, driver="gelsd").solution
            losses.append(output_error(weight, up @ down, x))
        return losses

    optimum = WHITENED.options(weight, stats)[rank].error
    assert alternate(WHITENED.compress(weight, stats, rank), 5) == pytest.approx([optimum] * 11, rel=1e-10)
    losses = alternate(PlainSVD().compress(weight, stats, rank), 300)
    assert losses[0] > 1.01 * optimum
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(losses))
    assert losses[-1] == pytest.approx(optimum, rel=1e-6)


# --- plain and scaled -------------------------------------------------------------------------------------------------


@every_shape
def test_plain_svd_is_the_truncation_of_eckart_and_young(shape):
    weight, _, stats = case(shape)
    identity = torch.eye(shape[1], dtype=torch.float64)
    for option in PlainSVD().options(weight, Stats())[1:]:
        ours = PlainSVD().compress(weight, stats, option.amount).to_dense()
        assert close(ours, truncated(weight, identity, option.amount))
        assert (weight - ours).square().sum().item() == pytest.approx(option.error, abs=1e-9)


@every_shape
@pytest.mark.parametrize("scale", ["mean", "max"])
@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_scaled_svd_truncates_in_the_scaled_norm(shape, scale, alpha):
    weight, x, stats = case(shape)
    loudness = x.abs().mean(0) if scale == "mean" else x.abs().amax(0)
    root = torch.diag(loudness**alpha)
    energies = torch.linalg.svdvals(weight @ root).square()
    method = ChannelScaledSVD(alpha, scale)
    for option in method.options(weight, stats)[1:]:
        ours = method.compress(weight, stats, option.amount).to_dense()
        assert close(ours, truncated(weight, root, option.amount))
        lost = ((weight - ours) @ root).square().sum().item()
        assert lost == pytest.approx(energies[option.amount :].sum().item(), abs=1e-9)
        assert lost == pytest.approx(option.error, abs=1e-9)


@every_shape
@pytest.mark.parametrize("scale", ["mean", "max"])
def test_without_an_exponent_scaling_is_plain_svd_to_the_bit(shape, scale):
    weight, _, stats = case(shape)
    scaled, plain = ChannelScaledSVD(0.0, scale), PlainSVD()
    assert scaled.options(weight, stats) == plain.options(weight, stats)
    for rank in ranks(shape):
        ours, theirs = scaled.compress(weight, stats, rank), plain.compress(weight, stats, rank)
        assert torch.equal(ours.up.weight, theirs.up.weight)
        assert torch.equal(ours.down.weight, theirs.down.weight)


# --- what every one of them does --------------------------------------------------------------------------------------


@every_shape
@every_method
@pytest.mark.parametrize("factor", [1000.0, 1e-12])
def test_louder_activations_change_nothing(shape, method, factor):
    weight, x, stats = case(shape)
    louder = observed(factor * x)
    energy, energy_louder = (method.options(weight, s)[0].error for s in (stats, louder))
    for ours, theirs in zip(method.options(weight, stats)[1:], method.options(weight, louder)[1:], strict=True):
        assert theirs.error / energy_louder == pytest.approx(ours.error / energy, abs=1e-12)
        same = method.compress(weight, stats, ours.amount).to_dense()
        assert close(method.compress(weight, louder, ours.amount).to_dense(), same)


@every_shape
@every_method
def test_full_rank_returns_the_weight(shape, method):
    weight, _, stats = case(shape)
    last = method.options(weight, stats)[-1]
    assert last.amount == min(shape)
    assert last.error == 0.0
    assert close(method.compress(weight, stats, last.amount).to_dense(), weight, 1e-12)


@every_shape
@every_method
def test_more_rank_never_means_more_error(shape, method):
    """Neither predicted in the method's own metric nor measured in any other: U_r U_rᵀ grows by orthogonal parts."""
    weight, x, stats = case(shape)
    predicted = [option.error for option in method.options(weight, stats)]
    measured = [output_error(weight, method.compress(weight, stats, rank).to_dense(), x) for rank in ranks(shape)]
    assert all(after <= before for before, after in pairwise(predicted))
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(measured[:-1]))
    assert measured[-1] <= 1e-20 * predicted[0]


@every_shape
@every_method
def test_the_factors_share_the_range_of_their_product(shape, method):
    weight, _, stats = case(shape)
    for rank in ranks(shape):
        module = method.compress(weight, stats, rank)
        torch.testing.assert_close(module.up.weight.norm(dim=0), module.down.weight.norm(dim=1))


@every_shape
@every_method
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)], ids=str
)
def test_the_module_has_the_dtype_of_the_weight(shape, method, dtype, rounding):
    weight, _, stats = case(shape)
    weight, rank = weight.to(dtype), min(shape) // 2
    module = method.compress(weight, stats, rank)
    assert {tensor.dtype for tensor in module.state_dict().values()} == {dtype}
    assert module(torch.ones(3, shape[1], dtype=dtype)).dtype == dtype
    # factorised in float64, rounded once at the end
    assert close(module.to_dense().double(), method.compress(weight.double(), stats, rank).to_dense(), rounding)


@every_shape
@every_method
def test_arguments_stay_as_they_are_and_equal_calls_give_equal_bits(shape, method):
    weight, x, stats = case(shape)
    before, random = weight.clone(), torch.get_rng_state()
    untouched = observed(x)
    first = method.compress(weight, stats, 3)
    options = method.options(weight, stats)
    second = method.compress(weight, stats, 3)
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), random)
    for kind in stats.kinds():
        assert torch.equal(stats[kind].mean(), untouched[kind].mean())
        assert stats[kind].tokens == untouched[kind].tokens
    assert options == method.options(weight, stats)
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()


@every_shape
@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sizes_promise_the_bytes_that_the_module_takes(shape, method, dtype):
    weight, _, stats = case(shape)
    weight = weight.to(dtype)
    sizes, options = method.sizes(shape, dtype.itemsize), method.options(weight, stats)
    assert [(o.amount, o.nbytes) for o in sizes] == [(o.amount, o.nbytes) for o in options]
    assert {o.error for o in sizes} == {None}
    assert [o.amount for o in sizes] == [0, *ranks(shape)]
    assert sizes[0].nbytes == 0
    for option in sizes[1:]:
        assert method.compress(weight, stats, option.amount).nbytes() == option.nbytes


@every_shape
@every_method
def test_a_rank_that_does_not_exist_is_refused(shape, method):
    weight, _, stats = case(shape)
    for rank in (-1, 0, min(shape) + 1):
        with pytest.raises(RecipeError, match=rf"rank {rank} for a weight of .* wanted 1 to {min(shape)}"):
            method.compress(weight, stats, rank)


@every_method
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_a_weight_of_one_row_or_column_has_rank_one(shape, method):
    weight, _, stats = case(shape)
    nothing, everything = method.options(weight, stats)
    assert (nothing.amount, everything.amount, everything.error) == (0, 1, 0.0)
    assert close(method.compress(weight, stats, 1).to_dense(), weight, 1e-14)


@every_method
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_an_error(method, bad):
    weight, _, stats = case((6, 8))
    weight[2, 3] = bad
    for ask in (method.options, lambda *arguments: method.compress(*arguments, 2)):
        with pytest.raises(NumericalError, match="the weight has entries that are not finite"):
            ask(weight, stats)


@pytest.mark.parametrize("name", [name for name, method in VARIANTS.items() if method.needs])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_statistic_that_is_not_finite_is_an_error(name, bad):
    method = VARIANTS[name]
    weight, x, _ = case((6, 8))
    x[5, 3] = bad
    for ask in (method.options, lambda *arguments: method.compress(*arguments, 2)):
        with pytest.raises(NumericalError, match="the input statistic has entries that are not finite"):
            ask(weight, observed(x))


@every_method
def test_a_product_beyond_float64_is_an_error_of_ours(method):
    weight, _, stats = case((6, 8))
    for ask in (method.options, lambda *arguments: method.compress(*arguments, 2)):
        with pytest.raises(NumericalError):
            ask(1e200 * weight, stats)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (WhitenedSVD, {"damping": -1e-9}),
        (WhitenedSVD, {"damping": math.nan}),
        (WhitenedSVD, {"damping": math.inf}),
        (ChannelScaledSVD, {"alpha": -0.1}),
        (ChannelScaledSVD, {"alpha": 1.1}),
        (ChannelScaledSVD, {"alpha": math.nan}),
        (ChannelScaledSVD, {"scale": "median"}),
    ],
)
def test_a_field_out_of_range_is_refused_with_what_was_wanted(kind, fields):
    (field,) = fields
    with pytest.raises(RecipeError, match=rf"{field} .*; wanted"):
        kind(**fields)


# --- inputs that are hard ---------------------------------------------------------------------------------------------


@st.composite
def hard_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A weight and inputs of any rank, with dead channels, at scales from 1e-30 to 1e30."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**31))

    def of_rank(first: int, second: int, rank: int) -> Tensor:
        return normal(first, rank, seed=seed + rank) @ normal(rank, second, seed=seed + 1)

    weight = of_rank(rows, columns, draw(st.integers(0, min(rows, columns))))
    x = of_rank(draw(st.integers(0, 20)), columns, draw(st.integers(0, columns)))
    x[:, draw(st.lists(st.integers(0, columns - 1), max_size=columns))] = 0
    scales = st.sampled_from([1.0, 0.0, 1e15, 1e-15])  # 1e30 and 1e-30 in the Gram matrix
    return weight * draw(scales), x * draw(scales)


@settings(max_examples=150, deadline=None, database=None)
@given(hard_cases(), st.sampled_from(list(VARIANTS)))
def test_nothing_fails_and_no_promise_breaks_on_hard_inputs(hard, name):
    weight, x = hard
    method, stats = VARIANTS[name], observed(x)
    options = method.options(weight, stats)
    errors = [option.error for option in options]
    assert all(math.isfinite(error) and error >= 0 for error in errors)
    assert all(after <= before for before, after in pairwise(errors))
    assert errors[-1] == 0.0
    size = weight.norm().item()
    for option in options[1:]:
        module = method.compress(weight, stats, option.amount)
        dense = module.to_dense()
        assert all(torch.isfinite(factor).all() for factor in module.parameters())
        # W' = U_r U_rᵀ W: a projection never adds to a weight
        assert dense.norm().item() <= size * (1 + 1e-12)
        lost = output_error(weight, dense, x) if len(x) else 0.0
        if name == "svd_llm-undamped" and x.any():
            assert lost == pytest.approx(option.error, abs=1e-12 * errors[0])
    assert (dense - weight).norm().item() <= 1e-12 * size


@every_method
def test_an_input_that_was_silent_leaves_plain_svd(method):
    weight = normal(7, 5)
    for x in (torch.zeros(20, 5, dtype=torch.float64), torch.zeros(0, 5, dtype=torch.float64)):
        ours = method.compress(weight, observed(x), 3).to_dense()
        assert close(ours, PlainSVD().compress(weight, Stats(), 3).to_dense(), 1e-12)


def test_a_bias_stays_outside_until_the_runner_brings_it():
    weight, x, stats = case((6, 8))
    module, bias = WHITENED.compress(weight, stats, 6), normal(6, seed=3)
    assert module.up.bias is None and isinstance(module.down, nn.Linear)
    module.set_bias(bias)
    torch.testing.assert_close(module(x), x @ weight.T + bias)
    assert module.spec() == {"kind": "low_rank", "in_features": 8, "out_features": 6, "rank": 6, "bias": True}


def test_a_module_owns_its_numbers():
    up, down = normal(6, 2), normal(8, 2).T
    module = LowRankLinear.from_factors(up, down)
    with torch.no_grad():
        module.up.weight.zero_()
        module.down.weight.zero_()
    assert torch.equal(up, normal(6, 2)) and torch.equal(down, normal(8, 2).T)
    assert module.down.weight.is_contiguous()


# --- the update on shifted inputs -------------------------------------------------------------------------------------


def shifted_case(shape: tuple[int, int], shift: float = 0.5) -> tuple[Tensor, Tensor, Stats]:
    """A weight, the inputs that arrive, and statistics of these and of the dense ones."""
    dense = correlated(shape[1])
    arriving = dense + shift * dense.roll(3, 1) + shift * normal(*dense.shape, seed=7)
    stats = Stats({Gram: Gram(shape[1]), Cross: Cross(shape[1])})
    stats.update(arriving, dense)
    return normal(*shape), arriving, stats


def of_dense(stats: Stats) -> Stats:
    gram = Gram(1)
    gram._sum, gram.tokens = stats[Cross].dense() * stats.tokens, stats.tokens
    return Stats({Gram: gram})


@every_shape
@pytest.mark.parametrize("damping", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("storage", [{}, {"pivot": True}], ids=["factors", "pivoted"])
def test_the_update_changes_nothing_where_nothing_is_shifted(shape, damping, storage):
    weight, _, stats = case(shape)
    largest = min(shape[0] - bool(storage), shape[1])
    for rank in (1, 3, largest):
        plain = WhitenedSVD(damping, **storage).compress(weight, stats, rank)
        updated = WhitenedSVD(damping, **storage, update=True).compress(weight, stats, rank)
        assert type(updated) is type(plain) and updated.nbytes() == plain.nbytes()
        assert close(updated.to_dense(), plain.to_dense(), 1e-8 if damping else 1e-6)


@every_shape
@pytest.mark.parametrize("storage", [{}, {"pivot": True}], ids=["factors", "pivoted"])
@pytest.mark.parametrize("shift", [0.01, 0.5, 5.0])
def test_the_update_never_raises_the_error_on_the_inputs_that_arrive(shape, storage, shift):
    """Of all that could stand on the left of the dense rows it is the least-squares solution, over the tokens."""
    weight, arriving, stats = shifted_case(shape, shift)
    whole = (arriving @ weight.T).square().sum(-1).mean().item()
    for rank in (1, 3, 8):
        rows = WhitenedSVD(0.0).compress(weight, of_dense(stats), rank).to_dense()
        updated = WhitenedSVD(0.0, update=True, **storage).compress(weight, stats, rank).to_dense()
        error = output_error(weight, updated, arriving)
        assert error < output_error(weight, rows, arriving)
        assert torch.linalg.matrix_rank(updated, rtol=1e-9) == rank
        _, _, directions = torch.linalg.svd(rows, full_matrices=False)
        down = directions[:rank]
        left = torch.linalg.lstsq(arriving @ down.T, arriving @ weight.T).solution.T
        assert close(updated, left @ down, 1e-8)
        # and what is fitted to the arriving inputs alone is free to choose its rows too
        free = WhitenedSVD(0.0).compress(weight, Stats({Gram: stats[Gram]}), rank).to_dense()
        assert output_error(weight, free, arriving) <= error + 1e-12 * whole


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_the_update_survives_few_silent_and_hugely_scaled_inputs(size, tokens):
    weight, dense = normal(10, 24), normal(tokens, 24, seed=1) * size
    for arriving in (dense, torch.zeros_like(dense), dense.flip(1)):
        stats = Stats({Gram: Gram(24), Cross: Cross(24)})
        stats.update(arriving, dense)
        for method in (WhitenedSVD(update=True), WhitenedSVD(0.0, update=True)):
            made = method.compress(weight * size, stats, 3)
            assert made.rank == 3
            assert torch.isfinite(made.to_dense()).all()
            lost = output_error(weight * size, made.to_dense(), arriving) if tokens else 0.0
            assert lost <= (1 + 1e-9) * (output_error(weight * size, 0 * weight, arriving) if tokens else 0.0)


def test_the_update_may_be_stored_remapped():
    weight, _, stats = shifted_case((24, 16))
    exact = WhitenedSVD(update=True).compress(weight, stats, 6)
    stored = WhitenedSVD(update=True, remap=True).compress(weight, stats, 6)
    assert stored.nbytes() == WhitenedSVD(remap=True).compress(weight, stats, 6).nbytes()
    assert close(stored.to_dense().double(), exact.to_dense(), 0.02)


def test_the_update_compares_with_the_dense_inputs():
    assert WhitenedSVD().needs == (Gram,)
    assert WhitenedSVD(update=True).needs == (Gram, Cross)
    weight, _, stats = shifted_case((10, 24))
    # the plan is made of the dense inputs, whatever arrives later
    updated = WhitenedSVD(update=True).options(weight, stats)
    plain = WhitenedSVD().options(weight, of_dense(stats))
    assert [(o.amount, o.nbytes) for o in updated] == [(o.amount, o.nbytes) for o in plain]
    assert torch.allclose(*(torch.tensor([o.error for o in found], dtype=torch.float64) for found in (updated, plain)))

"""Interpolative decomposition and STAT: the identities that hold it, in float64.

Z are activations [tokens, n], G the mean of z zᵀ, J what is kept, T the coefficients, W the weight that reads Z.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from families import tiny_batch, tiny_model
from tersely.anatomy import Heads, Site, Unit, anatomy_of
from tersely.errors import AnatomyError, NumericalError, RecipeError
from tersely.kinds import DenseLinear, Made
from tersely.linalg.interpolative import (
    PANEL,
    cholesky_by_energy,
    cholesky_in_order,
    pivoted_cholesky,
)
from tersely.methods.prune import coupling_of
from tersely.methods.prune.stat import InterpolativePruning
from tersely.stats import Gram, Stats

STAT = InterpolativePruning()
PIVOT = InterpolativePruning(selection="pivot")
LAST = {"mlp": "down", "attention": "o"}
ROLE = {last: role for role, last in LAST.items()}
TOKENS = 300

selections = pytest.mark.parametrize("method", [STAT, PIVOT], ids=["energy", "pivot"])
families = pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "bert", "distilbert"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(width: int, tokens: int = TOKENS) -> Tensor:
    """Some channels are loud and all are mixed."""
    loudness = torch.logspace(0.5, -1.5, width, dtype=torch.float64)
    return normal(tokens, width, seed=1) * loudness @ normal(width, width, seed=2) * loudness.flip(0).sqrt()


def mean_gram(z: Tensor) -> Tensor:
    return z.T @ z / len(z)


def observed(z: Tensor) -> Stats:
    stats = Stats({Gram: Gram(z.shape[1])})
    stats.update(z)
    return stats


def site(role: str, rows: int, columns: int) -> Site:
    return Site(f"block.{role}", f"unit.{role}", 0, "block:in", rows, columns, False, False)


def mlp(neurons: int, width: int = 12, makers: tuple[str, ...] = ("gate", "up")) -> Unit:
    parts = {role: site(role, neurons * (2 if role == "gate_up" else 1), width) for role in makers}
    return Unit("block:mlp", "mlp", 0, parts | {"down": site("down", width, neurons)}, "", None, True)


def attention(query: int, key_value: int, width: int, hidden: int = 16, flexible: bool = True) -> Unit:
    q, kv = query * width, key_value * width
    sites = {"q": site("q", q, hidden), "k": site("k", kv, hidden), "v": site("v", kv, hidden)}
    sites["o"] = site("o", hidden, q)
    return Unit("block:attention", "attention", 0, sites, "block.attn", Heads(query, key_value, width), flexible)


def weights_of(unit: Unit) -> dict[str, Tensor]:
    return {
        role: normal(part.out_features, part.in_features, seed=seed)
        for seed, (role, part) in enumerate(unit.sites.items())
    }


def aligned_heads(count: int, width: int, rank: int = 6, noise: float = 0.01) -> Tensor:
    """Contexts of heads that look at the same few directions."""
    return normal(TOKENS, rank) @ normal(rank, count * width, seed=3) + noise * normal(TOKENS, count * width, seed=4)


def pivoted_qr(z: Tensor) -> tuple[list[int], Tensor]:
    """Greedy Gram-Schmidt, in six lines: order of the columns, |diag R|."""
    rest, order, heights = z.clone(), [], []
    for _ in range(z.shape[1]):
        norms = rest.norm(dim=0)
        norms[order] = -1
        order.append(int(norms.argmax()))
        heights.append(norms[order[-1]])
        direction = rest[:, order[-1]] / heights[-1]
        rest = rest - torch.outer(direction, direction @ rest)
    return order, torch.stack(heights)


def measured(z: Tensor, weight: Tensor, kept: Tensor, folded: Tensor) -> float:
    """Mean over tokens of the squared output error of W' z_J for W z."""
    return (z @ weight.T - z[:, kept] @ folded.T).square().sum(-1).mean().item()


# --- interpolative decomposition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 17, 40])
def test_pivots_and_r_are_those_of_pivoted_qr(width):
    z = correlated(width)
    found, (order, heights) = pivoted_cholesky(mean_gram(z)), pivoted_qr(z)
    assert found.order.tolist() == order
    diagonal = found.factor[torch.arange(width), found.order]
    torch.testing.assert_close(diagonal * TOKENS**0.5, heights, rtol=1e-8, atol=1e-9 * heights[0].item())
    assert all(first >= second for first, second in pairwise(diagonal.tolist()))
    torch.testing.assert_close(found.factor.T @ found.factor, mean_gram(z), rtol=1e-12, atol=1e-12)
    assert found.factor[:, found.order].tril(-1).abs().max() == 0


def test_panels_do_not_show():
    """More columns than are projected out at once, against LAPACK's own factorisation of the reordered matrix."""
    width = 2 * PANEL + 31
    z = normal(2 * width, width) @ normal(width, width, seed=1)
    gram = mean_gram(z)
    found = pivoted_cholesky(gram)
    assert sorted(found.order.tolist()) == list(range(width))
    expected = torch.linalg.cholesky(gram[found.order][:, found.order]).T
    torch.testing.assert_close(found.factor[:, found.order], expected, rtol=1e-8, atol=1e-8)
    left = found.factor[:, found.order].square().flip(0).cumsum(0).flip(0)  # remainder's diagonal before every pivot
    assert all(left[i, i] >= left[i, i:].max() * (1 - 1e-9) for i in range(width))


@pytest.mark.parametrize("kept", [1, 5, 16, 23, 24])
def test_t_is_least_squares_is_nystrom_is_qr(kept):
    z = correlated(24)
    gram, found = mean_gram(z), pivoted_cholesky(mean_gram(z))
    chosen, t = found.kept(kept), found.coefficients(kept)
    assert torch.equal(t[:, chosen], torch.eye(kept, dtype=t.dtype))
    torch.testing.assert_close(t, torch.linalg.lstsq(z[:, chosen], z).solution, rtol=1e-8, atol=1e-8)
    nystrom = torch.linalg.solve(gram[chosen][:, chosen], gram[chosen])
    torch.testing.assert_close(t, nystrom, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kept", [0, 1, 5, 16, 23])
def test_what_is_missed_is_the_lower_corner_of_r(kept):
    z = correlated(24)
    found = pivoted_cholesky(mean_gram(z))
    corner = found.factor[kept:].square().sum().sqrt() * TOKENS**0.5
    missed = torch.linalg.norm(z - z[:, found.kept(kept)] @ found.coefficients(kept))
    assert missed.item() == pytest.approx(corner.item(), rel=1e-9)
    assert corner >= torch.linalg.svdvals(z)[kept:].square().sum().sqrt() * (1 - 1e-9)
    left = found.left_over(torch.eye(24, dtype=torch.float64))[kept]
    assert left.item() == pytest.approx(missed.square().item() / TOKENS, rel=1e-9)


def test_weights_change_which_columns_are_chosen_and_nothing_else():
    z, weights = correlated(24), torch.logspace(-1, 1, 24, dtype=torch.float64)
    plain, weighted = pivoted_cholesky(mean_gram(z)), pivoted_cholesky(mean_gram(z), weights)
    assert weighted.order.tolist() == pivoted_qr(z * weights)[0] != plain.order.tolist()
    chosen, t = weighted.kept(9), weighted.coefficients(9)
    torch.testing.assert_close(t, torch.linalg.lstsq(z[:, chosen], z).solution, rtol=1e-8, atol=1e-8)
    # the same as undoing the scaling of what the scaled matrix gives
    scaled = pivoted_cholesky(mean_gram(z * weights)).coefficients(9)
    torch.testing.assert_close(t, weights[chosen][:, None] * scaled / weights, rtol=1e-8, atol=1e-8)


@given(
    width=st.integers(1, 20),
    rank=st.integers(0, 20),
    silent=st.integers(0, 5),
    seed=st.integers(0, 99),
    weighted=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_whatever_the_rank_every_column_is_chosen_once_and_nothing_diverges(width, rank, silent, seed, weighted):
    z = normal(50, rank, seed=seed) @ normal(rank, width, seed=seed + 1)
    z[:, :silent] = 0
    weights = normal(width, seed=seed + 2).clamp(min=0) if weighted else None  # half of them zero
    found = pivoted_cholesky(mean_gram(z), weights)
    assert sorted(found.order.tolist()) == list(range(width))
    torch.testing.assert_close(found.factor.T @ found.factor, mean_gram(z), rtol=1e-9, atol=1e-9)
    outgoing = torch.eye(width, dtype=torch.float64) if weights is None else torch.diag(weights)
    left = found.left_over(outgoing)
    assert left.isfinite().all()
    assert (left.diff() <= 0).all()
    full = min(rank, width)
    assert left[full:].max() <= 1e-9 * max(left[0].item(), 1e-30)
    for kept in {1, width // 2 + 1, width}:
        t = found.coefficients(kept)
        lost = ((z - z[:, found.kept(kept)] @ t) @ outgoing.T).square().sum(-1).mean()
        assert lost.item() == pytest.approx(left[kept].item(), abs=1e-9 * (1 + left[0].item()))


def test_exact_copies_vanish_without_any_error():
    half = correlated(12)
    found = pivoted_cholesky(mean_gram(torch.cat([half, half], dim=1)))
    assert sorted(column % 12 for column in found.kept(12).tolist()) == list(range(12))
    assert found.left_over(normal(7, 24))[12].item() == 0
    t = found.coefficients(12)
    assert torch.linalg.norm(t - t.round()).item() < 1e-6
    assert found.condition(24) < 1e6  # the copies have no height of their own


def test_dead_columns_come_last_and_get_no_coefficients():
    z = correlated(10)
    z[:, [2, 7]] = 0
    found = pivoted_cholesky(mean_gram(z))
    assert set(found.order[8:].tolist()) == {2, 7}
    assert found.coefficients(5)[:, [2, 7]].abs().max() == 0
    assert found.coefficients(9)[:, [2, 7]].abs().sum() == 1  # the one that is kept stands for itself


def test_a_scale_as_large_as_massive_activations_does_not_hide_the_small_columns():
    z = correlated(16) * torch.logspace(0, -9, 16, dtype=torch.float64)
    found = pivoted_cholesky(mean_gram(z))
    assert (found.factor[torch.arange(16), found.order] > 0).all()
    assert found.condition(16) > 1e6 > found.condition(2)


def test_a_statistic_that_is_not_finite_is_refused():
    gram = mean_gram(correlated(4))
    gram[1, 2] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        pivoted_cholesky(gram)
    with pytest.raises(ValueError, match="blocks of 3"):
        cholesky_in_order(mean_gram(correlated(4)), 3, torch.tensor([0]))


# --- blocks of columns ------------------------------------------------------------------------------------------------


def test_blocks_of_one_column_are_weighted_pivots():
    z, weight = correlated(15), normal(6, 15)
    energy = cholesky_by_energy(mean_gram(z), 1, weight)
    pivots = pivoted_cholesky(mean_gram(z), weight.norm(dim=0))
    assert torch.equal(energy.order, pivots.order)
    torch.testing.assert_close(energy.factor, pivots.factor)


def test_blocks_in_a_given_order_are_an_unpivoted_factorisation():
    z, weight = correlated(20), normal(6, 20)
    order = torch.tensor([3, 0, 4, 1, 2])
    found = cholesky_in_order(mean_gram(z), 4, order)
    assert found.order.view(5, 4).div(4, rounding_mode="floor").T.unique(dim=0).tolist() == [order.tolist()]
    permuted = (order[:, None] * 4 + torch.arange(4)).flatten()
    r = torch.linalg.qr(z[:, permuted]).R / TOKENS**0.5
    for blocks in range(5):  # the authors' formula: ‖R₁[i:, i:] W_removedᵀ‖
        corner = (r[blocks * 4 :, blocks * 4 :] @ weight[:, permuted[blocks * 4 :]].T).square().sum().item()
        assert found.left_over(weight)[blocks * 4].item() == pytest.approx(corner, rel=1e-9)


def test_the_loudest_remainder_is_chosen_whatever_the_basis_inside_a_block():
    z, weight = correlated(20), normal(6, 20)
    found = cholesky_by_energy(mean_gram(z), 4, weight)
    order = (found.order[::4] // 4).tolist()
    columns = torch.arange(20).view(5, 4)
    for done in range(5):  # brute force: project the kept blocks out and look
        kept = columns[order[:done]].flatten()
        rest = z - z[:, kept] @ torch.linalg.lstsq(z[:, kept], z).solution if done else z
        energies = [(rest[:, columns[b]] @ weight[:, columns[b]].T).square().sum().item() for b in range(5)]
        assert max(set(range(5)) - set(order[:done]), key=energies.__getitem__) == order[done]
    turn = torch.block_diag(*(normal(4, 4, seed=seed) for seed in range(5)))
    turned = cholesky_by_energy(mean_gram(z @ turn), 4, torch.linalg.solve(turn, weight.T).T)
    assert (turned.order[::4] // 4).tolist() == order
    torch.testing.assert_close(
        turned.left_over(torch.linalg.solve(turn, weight.T).T)[::4], found.left_over(weight)[::4]
    )


def test_a_rotation_inside_a_head_changes_the_papers_choice_but_not_ours():
    unit = attention(4, 4, 3)
    z, weights = aligned_heads(4, 3, noise=0.3), weights_of(unit)
    chosen = {"energy": set(), "pivot": set()}
    for seed in range(8):
        turn = torch.block_diag(*(torch.linalg.qr(normal(3, 3, seed=10 * seed + head)).Q for head in range(4)))
        stats = {"o": observed(z @ turn)}
        for method in (STAT, PIVOT):
            errors = tuple(o.error for o in method.options(unit, weights | {"o": weights["o"] @ turn}, stats))
            chosen[method.selection].add(tuple(round(error, 6) for error in errors))
    assert len(chosen["energy"]) == 1 < len(chosen["pivot"])


# --- the method on one unit -------------------------------------------------------------------------------------------


@selections
@pytest.mark.parametrize(
    "unit",
    [mlp(20), mlp(20, makers=("up",)), mlp(20, makers=("gate_up",)), attention(5, 5, 4), attention(6, 3, 2)],
    ids=["gated", "plain", "fused", "heads", "grouped"],
)
def test_the_predicted_error_is_the_measured_one_at_every_size(unit, method):
    last, weights = LAST[unit.role], weights_of(unit)
    z = correlated(weights[last].shape[1])
    coupling, stats = coupling_of(unit), {last: observed(z)}
    options = method.options(unit, weights, stats)
    assert [(o.amount, o.nbytes) for o in options] == [(o.amount, o.nbytes) for o in method.sizes(unit, 8)]
    assert options[0].amount == 0
    assert options[0].error == pytest.approx((z @ weights[last].T).square().sum(-1).mean().item(), rel=1e-12)
    assert all(first.error >= second.error and first.nbytes < second.nbytes for first, second in pairwise(options))
    assert options[-1].error == 0
    assert options[-1].nbytes == 8 * sum(weight.numel() for weight in weights.values())
    for option in options[1:]:
        made = method.compress(unit, weights, {}, stats, option.amount)
        kept = _kept(made["q" if last == "o" else next(iter(weights))], weights, coupling)
        columns = coupling.columns(kept)
        error = measured(z, weights[last], columns, made[last].to_dense())
        assert error == pytest.approx(option.error, rel=1e-9, abs=1e-10)
        assert sum(kind.nbytes() for kind in made.values()) == option.nbytes
        # least squares: what regressing the dense outputs on the kept inputs gives
        best = torch.linalg.lstsq(z[:, columns], z @ weights[last].T).solution.T
        torch.testing.assert_close(made[last].to_dense(), best, rtol=1e-6, atol=1e-6)


def _kept(maker: DenseLinear, weights: dict[str, Tensor], coupling) -> Tensor:
    """The elements whose rows are in a maker, found by comparing rows; in rising order, each with all its rows."""
    role = next(iter(weights))
    dense = maker.to_dense()
    place = [(weights[role] == row).all(1).nonzero().item() for row in dense]
    _, size = coupling.makers[role][0]
    elements = torch.tensor(place[: len(place) // len(coupling.makers[role])]).view(-1, size)[:, 0] // size
    assert place == coupling.rows(role, elements).tolist()
    assert elements.tolist() == sorted(elements.tolist())
    return elements


@selections
def test_without_the_correction_the_same_heads_lose_many_times_more(method):
    unit = attention(6, 6, 4)
    z, weights = aligned_heads(6, 4), weights_of(unit)
    made = method.compress(unit, weights, {}, {"o": observed(z)}, 3)
    columns = coupling_of(unit).columns(_kept(made["q"], weights, coupling_of(unit)))
    sliced = measured(z, weights["o"], columns, weights["o"][:, columns])
    assert measured(z, weights["o"], columns, made["o"].to_dense()) < 1e-3 * sliced


def test_choosing_by_what_goes_out_loses_less_than_choosing_by_what_comes_in():
    unit = mlp(24)
    z, weights = correlated(24), weights_of(unit)
    weights["down"] = weights["down"] * torch.logspace(-1, 1, 24, dtype=torch.float64)[torch.arange(24) * 7 % 24]
    ours = [option.error for option in STAT.options(unit, weights, {"down": observed(z)})]
    plain = pivoted_cholesky(mean_gram(z)).left_over(weights["down"]).tolist()
    assert sum(ours[1:-1]) < sum(plain[1:-1])


def test_copied_neurons_and_heads_go_without_any_error():
    unit = mlp(16)
    half, weights = correlated(8), weights_of(unit)
    z = torch.cat([half, 2 * half], dim=1)
    assert STAT.options(unit, weights, {"down": observed(z)})[8].error == pytest.approx(0, abs=1e-12)
    unit = attention(6, 6, 3)
    half, weights = correlated(9), weights_of(unit)
    mixed = half @ torch.block_diag(*(normal(3, 3, seed=seed) for seed in range(3)))
    options = STAT.options(unit, weights, {"o": observed(torch.cat([half, mixed], dim=1))})
    assert options[3].error == pytest.approx(0, abs=1e-12 * options[0].error)


def test_a_ridge_bounds_the_error_from_above_and_the_coefficients_too():
    unit, method = mlp(20), InterpolativePruning(ridge=0.01)
    z, weights = correlated(20, tokens=12), weights_of(unit)
    stats, power = {"down": observed(z)}, z.square().mean(0)
    for option in method.options(unit, weights, stats)[1:]:
        made = method.compress(unit, weights, {}, stats, option.amount)
        columns = _kept(made["gate"], weights, coupling_of(unit))
        other = torch.zeros_like(weights["down"])
        other[:, columns] = made["down"].to_dense()
        slack = 0.01 * (power * (weights["down"] - other).square()).sum().item()
        assert measured(z, weights["down"], columns, made["down"].to_dense()) + slack == pytest.approx(option.error)
    plain = STAT.compress(unit, weights, {}, stats, 12)["down"].to_dense()
    assert method.compress(unit, weights, {}, stats, 12)["down"].to_dense().norm() < plain.norm()


def test_an_input_that_was_never_observed_counts_every_neuron_alike():
    unit, weights = mlp(10), weights_of(mlp(10))
    options = STAT.options(unit, weights, {"down": Stats({Gram: Gram(10)})})
    norms = weights["down"].square().sum(0).sort().values
    assert options[-2].error == pytest.approx(norms[0].item())
    assert options[0].error == pytest.approx(norms.sum().item())


def test_badly_conditioned_activations_are_named(caplog):
    unit = mlp(16)
    z = correlated(16) * torch.logspace(0, -9, 16, dtype=torch.float64)
    STAT.compress(unit, weights_of(unit), {}, {"down": observed(z)}, 2)
    assert not caplog.records
    STAT.compress(unit, weights_of(unit), {}, {"down": observed(z)}, 15)
    assert "condition" in caplog.text


@selections
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_biases_are_kept_and_nothing_is_written_over(method, dtype):
    unit = attention(6, 3, 2)
    weights = {role: weight.to(dtype) for role, weight in weights_of(unit).items()}
    biases = {role: normal(len(weight), seed=9).to(dtype) for role, weight in weights.items()}
    stats = {"o": observed(correlated(12).to(dtype))}
    before = {role: weight.clone() for role, weight in weights.items()}, stats["o"][Gram].mean().clone()
    made = method.compress(unit, weights, biases, stats, 2)
    again = method.compress(unit, weights, biases, stats, 2)
    coupling = coupling_of(unit)
    kept = _kept(made["q"], weights, coupling)
    for role in ("q", "k", "v"):
        assert torch.equal(made[role].dense.bias, biases[role][coupling.rows(role, kept)])
    assert torch.equal(made["o"].dense.bias, biases["o"])
    for role, kind in made.items():
        assert {tensor.dtype for tensor in kind.state_dict().values()} == {dtype}
        assert all(torch.equal(tensor, again[role].state_dict()[name]) for name, tensor in kind.state_dict().items())
        assert torch.equal(weights[role], before[0][role])
    assert torch.equal(stats["o"][Gram].mean(), before[1])
    whole = method.compress(unit, weights, biases, stats, 3)
    assert all(torch.equal(whole[role].dense.weight, weights[role]) for role in weights)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [0, 21, -1, 2.0, True, None, {"kept": 3}])
def test_an_amount_outside_the_unit_is_refused(amount):
    unit = mlp(20)
    with pytest.raises(RecipeError, match="1 to 20"):
        STAT.compress(unit, weights_of(unit), {}, {"down": observed(correlated(20))}, amount)


@pytest.mark.parametrize("wrong", [{"selection": "size"}, {"ridge": -1.0}, {"ridge": float("nan")}])
def test_a_field_out_of_range_is_refused(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        InterpolativePruning(**wrong)


@selections
def test_numbers_that_are_not_finite_are_refused(method):
    unit = attention(4, 4, 2)
    weights = weights_of(unit)
    z = correlated(8)
    z[3, 1] = float("inf")
    with pytest.raises(NumericalError, match="statistic"):
        method.options(unit, weights, {"o": observed(z)})
    weights["o"][0, 5] = float("nan")
    with pytest.raises(NumericalError, match="block:attention: o has"):
        method.options(unit, weights, {"o": observed(correlated(8))})


def test_units_whose_heads_cannot_go_are_refused_with_the_reason():
    with pytest.raises(AnatomyError, match="by the configuration"):
        STAT.check(attention(4, 4, 4, flexible=False))
    with pytest.raises(AnatomyError, match="do not divide"):
        STAT.check(attention(5, 2, 4))
    for family, reason in {"phi3": "one matrix", "gpt2": "one matrix", "opt": "by the configuration"}.items():
        for unit in anatomy_of(tiny_model(family)).units:
            if unit.role == "attention":
                with pytest.raises(AnatomyError, match=reason):
                    STAT.check(unit)
            else:
                STAT.check(unit)
    sites = mlp(20).sites | {"up": site("up", 19, 12)}
    with pytest.raises(AnatomyError, match="19"):
        STAT.check(Unit("block:mlp", "mlp", 0, sites, "", None, True))


# --- whole models -----------------------------------------------------------------------------------------------------


def linear_weight(module: nn.Module) -> Tensor:
    weight = module.get_parameter("weight").detach()
    return weight if isinstance(module, nn.Linear) else weight.T  # Conv1D stores it transposed


def prune(model, method: InterpolativePruning, amount) -> dict[str, tuple[int, float]]:
    """Gather the Gram matrices of a model, then put what the method makes in place, rebuilt from plain values.

    `amount` is given a coupling and says how many elements stay.  Unit → how many, and the predicted error.
    """
    units = [unit for unit in anatomy_of(model).units if method_takes(method, unit)]
    stats, hooks, done = {}, [], {}
    for unit in units:
        reader = model.get_submodule(unit.sites[LAST[unit.role]].name)
        stats[unit.name] = Stats({Gram: Gram(unit.sites[LAST[unit.role]].in_features)})
        hooks.append(reader.register_forward_pre_hook(watch(stats[unit.name])))
    run(model)
    for hook in hooks:
        hook.remove()
    for unit in units:
        modules = {role: model.get_submodule(part.name) for role, part in unit.sites.items()}
        weights = {role: linear_weight(module) for role, module in modules.items()}
        biases = {role: module.bias.detach() for role, module in modules.items() if module.bias is not None}
        kept, of_unit = amount(coupling_of(unit)), {LAST[unit.role]: stats[unit.name]}
        done[unit.name] = kept, method.options(unit, weights, of_unit)[kept].error
        for role, kind in method.compress(unit, weights, biases, of_unit, kept).items():
            made = Made.of(kind)
            rebuilt = made.build()
            rebuilt.load_state_dict(made.state, assign=True)
            model.set_submodule(unit.sites[role].name, rebuilt)
    return done


def watch(stats: Stats):
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        stats.update(arguments[0].detach().flatten(0, -2))

    return hook


def method_takes(method: InterpolativePruning, unit: Unit) -> bool:
    try:
        method.check(unit)
    except AnatomyError:
        return False
    return True


@torch.no_grad()
def run(model) -> Tensor:
    return model(**tiny_batch()).logits


@selections
@families
def test_a_pruned_model_runs_and_all_of_it_kept_is_the_dense_one(family, method):
    model = tiny_model(family).double()
    dense = run(model)
    prune(model, method, lambda coupling: coupling.count)
    assert torch.equal(run(model), dense)

    model = tiny_model(family).double()
    spans = []
    done = prune(
        model, method, lambda coupling: spans.append(coupling.count // 2 * coupling.width) or coupling.count // 2
    )
    assert len(done) == 4
    tokens = tiny_batch()["input_ids"].numel()
    for (_, error), span in zip(done.values(), spans, strict=True):
        # gemma2 keeps 32 columns of the 24 tokens: as many span all of them, and nothing is lost but rounding
        assert error > 0 if span < tokens else 0 <= error < 1e-12
    narrow = run(model)
    assert narrow.isfinite().all()
    assert not torch.allclose(narrow, dense)


@pytest.mark.parametrize("family", ["phi3", "gpt2", "gpt_neox", "opt"])
def test_where_heads_have_to_stay_neurons_may_go(family):
    model = tiny_model(family).double()
    done = prune(model, STAT, lambda coupling: coupling.count - 3)
    assert {name.rpartition(":")[2] for name in done} == {"mlp"}
    assert run(model).isfinite().all()


def silence(model, coupled: dict[str, list[int]], mute: bool) -> None:
    """Zero what some elements send out; if asked also v of such heads, so that there is nothing to send."""
    with torch.no_grad():
        for unit in anatomy_of(model).units:
            coupling, elements = coupling_of(unit), torch.tensor(coupled[unit.role])
            last = model.get_submodule(unit.sites[coupling.last].name)
            last.weight[:, coupling.columns(elements)] = 0
            if mute and unit.role == "attention":
                value = model.get_submodule(unit.sites["v"].name)
                value.weight[coupling.rows("v", elements)] = 0
                if value.bias is not None:
                    value.bias[coupling.rows("v", elements)] = 0


@families
@pytest.mark.parametrize("mute", [False, True], ids=["unheard", "mute"])
def test_a_model_padded_with_heads_and_neurons_that_do_nothing_loses_exactly_these(family, mute):
    padded = {"attention": [1], "mlp": [0, 7, 8, 43]}
    model = tiny_model(family).double()
    silence(model, padded, mute)
    dense = run(model)
    widths = {site.name: site.in_features for site in anatomy_of(model).sites}
    done = prune(model, STAT, lambda coupling: coupling.count - len(padded[ROLE[coupling.last]]))
    assert all(error == 0 for _, error in done.values())
    assert torch.linalg.norm(run(model) - dense) <= 1e-10 * torch.linalg.norm(dense)
    narrowed = {name for name, module in model.named_modules() if isinstance(module, DenseLinear)}
    assert any(model.get_submodule(name).in_features < widths[name] for name in narrowed)


def test_the_papers_pivots_lose_silent_heads_too():
    padded = {"attention": [2], "mlp": [5]}
    model = tiny_model("bert").double()
    silence(model, padded, mute=True)
    dense = run(model)
    prune(model, PIVOT, lambda coupling: coupling.count - 1)
    assert torch.linalg.norm(run(model) - dense) <= 1e-10 * torch.linalg.norm(dense)


@pytest.mark.parametrize("role", ["attention", "mlp"])
@pytest.mark.parametrize("family", ["qwen2", "bert"])
def test_the_output_of_a_unit_in_its_model_is_off_by_what_was_predicted(family, role):
    """Through activation, biases and grouped queries; all else is kept whole."""
    model = tiny_model(family).double()
    unit = next(unit for unit in anatomy_of(model).units if unit.role == role)
    dense = output_of(model, unit)
    done = prune(model, STAT, lambda c: c.count // 2 if c.name == unit.name else c.count)
    error = (output_of(model, unit) - dense).square().sum(-1).mean().item()
    assert error == pytest.approx(done[unit.name][1], rel=1e-10)


def output_of(model, unit: Unit) -> Tensor:
    """What the last linear of a unit returns, [tokens, out]."""
    seen: list[Tensor] = []
    last = model.get_submodule(unit.sites[LAST[unit.role]].name)
    hook = last.register_forward_hook(lambda module, inputs, output: seen.append(output.flatten(0, -2)))
    run(model)
    hook.remove()
    return seen[0]

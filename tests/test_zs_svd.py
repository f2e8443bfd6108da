"""Signed predictions of the loss, and the division that lets them cancel.

W is the weight, D the gradient of the mean loss in it, u_i the eigenvectors of W E[x xᵀ] Wᵀ.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from tersely.allocate import ALLOCATORS, POINTS, Curve, curve_of, zero_sum
from tersely.allocate.balance import FLOOR
from tersely.anatomy import anatomy_of
from tersely.checkpoint import open_source
from tersely.errors import NumericalError, RecipeError
from tersely.estimate import estimate
from tersely.estimate.memory import SPARE
from tersely.gradients import gather
from tersely.linalg.truncation import output_basis
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.methods.low_rank.zs_svd import ZeroSumSVD, changes
from tersely.option import Option
from tersely.pipeline import run
from tersely.prepare import prepare
from tersely.recipe import CacheStep, Calibration, MethodStep, Recipe
from tersely.stats import Gram, MeanGradient, Stats

SHAPES = {"wide": (10, 24), "tall": (24, 10), "square": (16, 16), "row": (1, 9), "column": (9, 1)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
EXACT = ZeroSumSVD(damping=0.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def observed(x: Tensor, gradient: Tensor) -> Stats:
    stats = Stats({Gram: Gram(x.shape[1]), MeanGradient: MeanGradient(gradient.numel())})
    stats[Gram].update(x)
    stats[MeanGradient].update(gradient.flatten()[None])
    return stats


def case(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Stats]:
    loudness = torch.logspace(0.5, -1, shape[1], dtype=torch.float64)
    x = normal(300, shape[1], seed=1) * loudness @ normal(shape[1], shape[1], seed=2)
    gradient = normal(*shape, seed=3)
    return normal(*shape), x, gradient, observed(x, gradient)


# --- the prediction ---------------------------------------------------------------------------------------------------


@every_shape
def test_a_drift_is_the_gradient_times_what_a_rank_drops(shape):
    weight, _, gradient, stats = case(shape)
    nothing, *options = EXACT.options(weight, stats)
    assert nothing.drift == pytest.approx(-(gradient * weight).sum().item(), rel=1e-9)
    for option in options:
        dropped = EXACT.compress(weight, stats, option.amount).to_dense().double() - weight
        assert option.drift == pytest.approx((gradient * dropped).sum().item(), rel=1e-6, abs=1e-8)
    assert options[-1].drift == 0.0


@every_shape
def test_it_is_what_the_authors_find_in_whitened_coordinates(shape):
    """-σ_i (Uᵀ H V)_ii with W L = U Σ Vᵀ and H = D L⁻ᵀ."""
    weight, x, gradient, stats = case(shape)
    root = torch.linalg.cholesky(x.T @ x / len(x))
    u, sigma, v = torch.linalg.svd(weight @ root, full_matrices=False)
    mapped = gradient @ torch.linalg.inv(root.T)
    wanted = -sigma * (u.T @ mapped @ v.T).diagonal()
    found = changes(output_basis(weight, stats[Gram].mean()), gradient)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@every_shape
def test_truncation_and_errors_are_those_of_whitening(shape):
    weight, _, _, stats = case(shape)
    ours, theirs = ZeroSumSVD().options(weight, stats), WhitenedSVD().options(weight, stats)
    assert [(o.amount, o.nbytes) for o in ours] == [(o.amount, o.nbytes) for o in theirs]
    assert [o.error for o in ours] == pytest.approx([o.error for o in theirs], rel=1e-9, abs=1e-9 * theirs[0].error)
    made, wanted = (kind().compress(weight, stats, 1).to_dense() for kind in (ZeroSumSVD, WhitenedSVD))
    assert torch.equal(made, wanted)


@every_shape
def test_the_second_order_adds_half_a_square_for_every_component(shape):
    weight, _, _, stats = case(shape)
    first = [option.drift for option in EXACT.options(weight, stats)]
    second = [option.drift for option in replace(EXACT, second_order=True).options(weight, stats)]
    for (more, less), (above, below) in zip(pairwise(first), pairwise(second), strict=True):
        assert above - below == pytest.approx(more - less + (more - less) ** 2 / 2, rel=1e-9, abs=1e-12)


def test_components_without_energy_move_nothing():
    weight, x, gradient, _ = case((16, 16))
    poor = weight[:, :3] @ normal(3, 16, seed=4)
    for matrix, seen in ((poor, x), (torch.zeros(16, 16, dtype=torch.float64), x)):
        for option in EXACT.options(matrix, observed(seen, gradient))[4:]:
            assert option.drift == pytest.approx(0, abs=1e-9)
    still = EXACT.options(weight, observed(x, torch.zeros_like(weight)))
    assert {option.drift for option in still} == {0.0}


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_louder_inputs_move_nothing_and_steeper_losses_move_in_proportion(scale):
    weight, x, gradient, stats = case((10, 24))
    drifts = torch.tensor([option.drift for option in EXACT.options(weight, stats)])
    for seen, factor in ((observed(scale * x, gradient), 1.0), (observed(x, scale * gradient), scale)):
        found = torch.tensor([option.drift for option in EXACT.options(weight, seen)])
        torch.testing.assert_close(found / factor, drifts, rtol=1e-4, atol=1e-6)


def test_gradients_that_are_not_finite_are_refused():
    weight, x, gradient, _ = case((6, 8))
    gradient[2, 3] = math.nan
    for ask in (EXACT.options, lambda *told: EXACT.compress(*told, 2)):
        with pytest.raises(NumericalError, match=r"gradients .* not finite"):
            ask(weight, observed(x, gradient))


# --- against the loss -------------------------------------------------------------------------------------------------


def mean_loss(model: Any, rows: Tensor) -> Tensor:
    logits = model(rows, use_cache=False).logits.double()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


# gpt2 stores its weights turned, and has biases
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_small_part_of_a_component_moves_the_real_loss_as_predicted(family, model_folder):
    """δ_i against differences of the loss, for the first, a middle and the last component of several weights."""
    folder = model_folder(family, dtype=torch.float64)
    source = open_source(folder)
    anatomy, rows = anatomy_of(source.skeleton()), torch.randint(3, 60, (5, 16), generator=torch.Generator())
    found = gather(source, anatomy, anatomy.sites, (MeanGradient,), rows)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    step = 3e-3  # norms are in float32 whatever comes
    for site in anatomy.sites[::5]:
        parameter = model.get_submodule(site.name).weight.data
        weight = (parameter.T if site.transposed else parameter).clone()
        stats = found[site.name]
        assert stats[MeanGradient].tokens == len(rows)
        basis = output_basis(weight, normal(site.in_features, site.in_features).square().mean(0))
        predicted = changes(basis, stats[MeanGradient].mean().view(weight.shape))
        for number in (0, len(predicted) // 2, len(predicted) - 1):
            (up, down), (up_before, down_before) = basis.factors(number + 1), basis.factors(number)
            component = up @ down - up_before @ down_before
            losses = []
            for part in (-step, step):
                moved = weight - part * component
                parameter.copy_(moved.T if site.transposed else moved)
                with torch.no_grad():
                    losses.append(mean_loss(model, rows).item())
            parameter.copy_(weight.T if site.transposed else weight)
            slope = (losses[1] - losses[0]) / (2 * step)
            assert predicted[number].item() == pytest.approx(slope, rel=5e-3, abs=1e-5)


# --- curves -----------------------------------------------------------------------------------------------------------


@given(st.integers(2, 900), st.integers(2, 40))
@settings(max_examples=30, deadline=None, database=None)
def test_drifts_survive_thinning_and_those_that_do_not_pay_are_kept_apart(ranks, part):
    options = [Option(r, 10 * r, float(ranks - r + 1), (-1.0) ** r * r) for r in range(ranks + 1)]
    dense = 10 * ranks * part // 40 + 1
    curve = curve_of("site", options, dense)
    *useful, last = curve.options
    assert last == Option(None, dense, 0.0, 0.0)
    offered = set(options)
    assert all(option in offered and option.nbytes < dense for option in useful)
    assert all(option in offered and option.nbytes >= dense for option in curve.costly)
    assert len(useful) == min(POINTS, (dense - 1) // 10) and len(curve.costly) <= POINTS
    assert [*useful, *curve.costly][-1] == options[-1]
    without = curve_of("site", [replace(option, drift=None) for option in options], dense)
    assert without.costly == () and without.options[-1].drift is None


# --- the division -----------------------------------------------------------------------------------------------------


def signed_curve(site: str, moves: list[float], step: int, breaks_even: int) -> Curve:
    """Component k takes `step` bytes and moves the loss by moves[k]; ranks from `breaks_even` on do not pay."""
    drifts = [math.fsum(moves[rank:]) for rank in range(len(moves) + 1)]
    options = [Option(r, r * step, float(len(moves) - r), drift) for r, drift in enumerate(drifts)]
    return curve_of(site, options, breaks_even * step)


moves = st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=4, max_size=12)


@st.composite
def signed_curves(draw: st.DrawFn) -> list[Curve]:
    found = []
    for site in range(draw(st.integers(1, 4))):
        of_site = draw(moves)
        found.append(signed_curve(str(site), of_site, draw(st.integers(1, 9)), draw(st.integers(2, len(of_site)))))
    return found


def by_hand(curves: list[Curve], budget: int) -> tuple[dict[str, Any], float, bool]:
    """The rule as it is written, looking through all sites at every step; with the sum, and whether a sign ran out."""
    paths = {c.site: [*c.options[:-1], *c.costly] for c in curves}  # by rising bytes, dense above all of them
    at, dense = {c.site: len(paths[c.site]) for c in curves}, {c.site: c.dense_bytes for c in curves}

    def drift(site: str, place: int) -> float:
        return paths[site][place].drift if place < len(paths[site]) else 0.0

    def stored(site: str) -> int:
        return min(paths[site][at[site]].nbytes, dense[site]) if at[site] < len(paths[site]) else dense[site]

    total, one_sided = 0.0, False
    while sum(map(stored, at)) > budget:
        offers = {s: drift(s, at[s] - 1) - drift(s, at[s]) for s in at if at[s] > 0}
        above = {s: d for s, d in offers.items() if paths[s][at[s] - 1].nbytes >= FLOOR * dense[s]}
        offers = above or offers
        rising = {s: d for s, d in offers.items() if d >= 0}
        falling = {s: d for s, d in offers.items() if d < 0}
        one_sided |= not (rising if total <= 0 else falling)
        heap = (rising or falling) if total <= 0 else (falling or rising)
        names = list(at)
        share = {s: (paths[s][at[s]].nbytes if at[s] < len(paths[s]) else dense[s]) / dense[s] for s in at}
        site = min(heap, key=lambda s: (abs(heap[s]), -share[s], names.index(s)))
        total += heap[site]
        at[site] -= 1
    reached = {s: paths[s][at[s]] if at[s] < len(paths[s]) else None for s in at}
    amounts = {s: o.amount if o is not None and o.nbytes < dense[s] else None for s, o in reached.items()}
    return amounts, total, one_sided


@settings(max_examples=300, deadline=None, database=None)
@given(curves=signed_curves(), share=st.floats(0, 1))
def test_it_is_the_rule_as_written(curves, share):
    least, dense = (sum(c.options[place].nbytes for c in curves) for place in (0, -1))
    budget = least + round(share * (dense - least))
    plan = zero_sum(curves, budget)
    amounts, total, one_sided = by_hand(curves, budget)
    assert {site: choice.amount for site, choice in plan.choices.items()} == amounts
    assert plan.nbytes <= budget
    largest = max(
        abs(b.drift - a.drift) for c in curves for a, b in pairwise([*c.options[:-1], *c.costly, c.options[-1]])
    )
    if not one_sided:
        assert abs(total) <= largest + 1e-9, "the sum is within one component of zero while both signs last"


@settings(max_examples=200, deadline=None, database=None)
@given(curves=signed_curves(), first=st.floats(0, 1), second=st.floats(0, 1))
def test_the_budget_is_met_to_one_component_and_more_bytes_take_nothing_away(curves, first, second):
    least, dense = (sum(c.options[place].nbytes for c in curves) for place in (0, -1))
    less, more = sorted(least + round(share * (dense - least)) for share in (first, second))
    small, large = zero_sum(curves, less), zero_sum(curves, more)
    component = max(b.nbytes - a.nbytes for c in curves for a, b in pairwise(c.options))
    assert less - component < small.nbytes <= less or small.nbytes == dense
    assert all(small.choices[site].nbytes <= large.choices[site].nbytes for site in small.choices)


def test_nobody_is_emptied_while_others_can_give():
    """A site that moves nothing would be gone before any other is touched."""
    still = signed_curve("still", [0.0] * 20, 10, 20)
    moving = signed_curve("moving", [1.0, -1.0] * 10, 10, 20)
    for budget in range(20, 400, 10):
        plan = zero_sum([still, moving], budget)
        shares = {site: choice.nbytes / choice.dense_bytes for site, choice in plan.choices.items()}
        assert shares["still"] >= FLOOR or shares["moving"] <= FLOOR
    assert zero_sum([still, moving], 260).choices["still"].nbytes == FLOOR * 200
    assert zero_sum([still, moving], 20).nbytes == 20


def test_of_sites_that_move_alike_none_goes_first():
    alike = [signed_curve(str(number), [0.0] * 20, 10, 20) for number in range(3)]
    taken = [choice.nbytes for choice in zero_sum(alike, 400).choices.values()]
    assert max(taken) - min(taken) <= 10


def test_what_does_not_pay_is_passed_through_and_given_back():
    """The second site drops three components that free nothing, and is dense in the end."""
    pays = signed_curve("pays", [0.1] * 10, 10, 10)
    costs = signed_curve("costs", [-0.01] * 20, 10, 10)
    plan = zero_sum([pays, costs], 190)
    assert plan.choices["pays"].amount == 9 and plan.choices["costs"].amount is None


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(model_folder: Callable[..., Path], text_file: Path) -> Callable[..., Recipe]:
    def make(step: Any) -> Recipe:
        return Recipe(str(model_folder()), [step], Calibration([str(text_file)], 8, 16))

    return make


@pytest.mark.parametrize("pivot", [False, True])
def test_a_run_meets_its_budget_in_real_bytes(pivot, recipe, tmp_path, monkeypatch):
    seen: list[list[Curve]] = []
    entry = ALLOCATORS["zero_sum"]
    monkeypatch.setitem(
        ALLOCATORS,
        "zero_sum",
        replace(entry, rule=lambda curves, budget: seen.append(curves) or zero_sum(curves, budget)),
    )
    step = MethodStep("zs_svd", keep=0.6, allocate="zero_sum", options={"pivot": pivot})
    result = run(prepare(recipe(step), tmp_path / "out"))
    (row,) = [row for row in result.report.rows if row.name == "touched weights"]
    component = max(b.nbytes - a.nbytes for c in seen[-1] for a, b in pairwise(c.options))
    assert 0.6 * row.before - component < row.value <= 0.6 * row.before
    assert all(option.drift is not None for curve in seen[-1] for option in (*curve.options, *curve.costly))


@pytest.mark.parametrize(
    "step",
    [
        MethodStep("svd_llm", keep=0.6, allocate="zero_sum"),
        MethodStep("modegpt", keep=0.6, allocate="zero_sum"),
        CacheStep("latent", keep=0.6, allocate="zero_sum"),
    ],
    ids=lambda step: step.name,
)
def test_methods_that_predict_no_change_of_the_loss_are_refused_before_any_work(step, recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"zero_sum .* those of \w+ predict none; use zs_svd"):
        prepare(recipe(step), tmp_path / "out")
    with pytest.raises(RecipeError, match="predicts none"):
        zero_sum([curve_of("site", [Option(1, 4, 1.0)], 10)], 5)


def test_a_forecast_counts_the_whole_model_where_it_is_in_memory_at_once(recipe, model_folder):
    """For gradients, with the statistics of all linears; where it is measured, and where plans of it are."""

    def forecast(method: str, **asked: Any) -> int:
        return estimate(recipe(MethodStep(method, **({"keep": 0.6} | asked)))).memory_bytes

    alone, source = forecast("svd_llm"), open_source(model_folder())
    sites, whole = anatomy_of(source.skeleton()).sites, source.nbytes()
    gradients = 8 * sum(site.out_features * site.in_features for site in sites)
    assert forecast("zs_svd") > alone + whole + gradients
    assert forecast("svd_llm", allocate="lems") == pytest.approx(alone + SPARE * whole, abs=2)
    assert forecast("svd_llm", keep=None, perplexity=50.0) == pytest.approx(alone + SPARE * 2 * whole, abs=2)
    assert forecast("svd_llm", allocate="importance") == alone

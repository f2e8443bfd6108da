"""Truncation in two metrics: the theorem, its limits, and what it does to the loss of a model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tersely import gradients, sweeps
from tersely.errors import AnatomyError, NumericalError, RecipeError
from tersely.kinds import dense_weight
from tersely.methods.low_rank.kfac_svd import TwoSidedSVD
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.pipeline import run
from tersely.prepare import prepare
from tersely.recipe import Calibration, MethodStep, Recipe
from tersely.stats import Gram, OutputGram, Stats
from tersely.verify import verify

SHAPES = {"wide": (10, 24), "tall": (24, 10), "square": (16, 16), "row": (1, 9), "column": (9, 1)}
EXACT = TwoSidedSVD(shrink_inputs=0.0, shrink_gradients=0.0)

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(width: int, seed: int, tokens: int = 300) -> Tensor:
    loudness = torch.logspace(0.5, -1.5, width, dtype=torch.float64)
    return normal(tokens, width, seed=seed) * loudness @ normal(width, width, seed=seed + 1)


def observed(x: Tensor, g: Tensor) -> Stats:
    stats = Stats({Gram: Gram(x.shape[1]), OutputGram: OutputGram(g.shape[1])})
    stats[Gram].update(x)
    stats[OutputGram].update(g)
    return stats


def case(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Stats]:
    x, g = correlated(shape[1], 1), correlated(shape[0], 5)
    return normal(*shape), x, g, observed(x, g)


def shrunk(gram: Tensor, share: float) -> Tensor:
    return (1 - share) * gram + share * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


# --- the theorem ------------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize(("of_inputs", "of_gradients"), [(0.1, 0.3), (0.0, 0.0), (1.0, 0.5)])
def test_it_loses_the_dropped_singular_values_of_the_weight_whitened_twice(shape, of_inputs, of_gradients):
    """‖L_rᵀ (W - W') L_c‖² = Σ_{i>r} σ_i²; both as the options say and as the module turns out."""
    weight, x, g, stats = case(shape)
    method = TwoSidedSVD(shrink_inputs=of_inputs, shrink_gradients=of_gradients)
    columns = torch.linalg.cholesky(shrunk(x.T @ x / len(x), of_inputs))
    rows = torch.linalg.cholesky(shrunk(g.T @ g / len(g), of_gradients))
    sigma = torch.linalg.svdvals(rows.T @ weight @ columns)
    options = method.options(weight, stats)
    for option in options[1:]:
        made = method.compress(weight, stats, option.amount).to_dense()
        wanted = sigma[option.amount :].square().sum().item()
        lost = (rows.T @ (weight - made) @ columns).square().sum().item()
        assert lost == pytest.approx(wanted, rel=1e-6, abs=1e-10 * options[0].error)
        assert option.error == pytest.approx(wanted, rel=1e-6, abs=1e-10 * options[0].error)
    assert options[0].error == pytest.approx(sigma.square().sum().item(), rel=1e-7)


@every_shape
def test_it_is_what_the_authors_make_with_two_inverses(shape):
    weight, x, g, stats = case(shape)
    columns = torch.linalg.cholesky(shrunk(x.T @ x / len(x), 0.1))
    rows = torch.linalg.cholesky(shrunk(g.T @ g / len(g), 0.3))
    u, s, v = torch.linalg.svd(rows.T @ weight @ columns, full_matrices=False)
    rank = max(1, min(shape) // 2)
    wanted = torch.linalg.inv(rows.T) @ (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(columns)
    made = TwoSidedSVD().compress(weight, stats, rank).to_dense()
    torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-7)


def test_the_error_is_what_independent_inputs_and_gradients_lose():
    """E(gᵀ Δ x)² over all pairs of a token and a gradient: twice the second-order term of the loss."""
    weight, x, g, stats = case((10, 24))
    option = EXACT.options(weight, stats)[4]
    change = weight - EXACT.compress(weight, stats, 4).to_dense()
    pairs = (g @ change @ x.T).square().mean().item()
    assert option.error == pytest.approx(pairs, rel=1e-6)


@pytest.mark.parametrize("rank", [2, 5, 8])
def test_nothing_of_that_rank_loses_less(rank):
    weight, x, g, stats = case((10, 24))

    def lost(made: Tensor) -> float:
        return (g @ (weight - made) @ x.T).square().mean().item()

    best = lost(EXACT.compress(weight, stats, rank).to_dense())
    assert best < lost(WhitenedSVD(damping=0.0).compress(weight, stats, rank).to_dense())
    module = EXACT.compress(weight, stats, rank)
    for seed in range(5):
        up, down = module.up.weight.detach().clone(), module.down.weight.detach().clone()
        up += 1e-3 * normal(*up.shape, seed=seed)
        down += 1e-3 * normal(*down.shape, seed=seed + 50)
        assert best < lost(up @ down)


# --- its limits -------------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("how", ["white gradients", "no gradients", "all shrunk"])
def test_where_outputs_count_alike_it_is_whitening(how, shape):
    weight, x, g, stats = case(shape)
    method = EXACT
    if how == "white gradients":
        stats = observed(x, torch.eye(shape[0], dtype=torch.float64) * shape[0] ** 0.5)
    elif how == "no gradients":
        stats = observed(x, torch.zeros(7, shape[0]))
    else:
        power = g.square().mean()
        stats, method = observed(x, g / power.sqrt()), replace(EXACT, shrink_gradients=1.0)
    whitening = WhitenedSVD(damping=0.0)
    for ours, theirs in zip(method.options(weight, stats), whitening.options(weight, stats), strict=True):
        assert (ours.amount, ours.nbytes) == (theirs.amount, theirs.nbytes)
        assert ours.error == pytest.approx(theirs.error, rel=1e-7, abs=1e-12)
    rank = max(1, min(shape) // 2)
    made, wanted = (m.compress(weight, stats, rank).to_dense() for m in (method, whitening))
    torch.testing.assert_close(made, wanted, rtol=1e-8, atol=1e-9)


@every_shape
def test_at_full_rank_the_weight_comes_back(shape):
    weight, _, _, stats = case(shape)
    for method in (EXACT, TwoSidedSVD()):
        made = method.compress(weight, stats, min(shape)).to_dense()
        torch.testing.assert_close(made, weight, rtol=1e-8, atol=1e-8)


def test_few_tokens_and_fewer_gradients_are_enough_for_numbers():
    """Both matrices are singular, and nothing is shrunk."""
    weight, stats = normal(16, 20), observed(correlated(20, 1, tokens=3), correlated(16, 5, tokens=2))
    energy = EXACT.options(weight, stats)[0].error
    assert EXACT.options(weight, stats)[2].error < 1e-6 * energy  # two gradients feel two directions
    for rank in (1, 2, 9, 16):
        assert EXACT.compress(weight, stats, rank).to_dense().isfinite().all()
    torch.testing.assert_close(EXACT.compress(weight, stats, 16).to_dense(), weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_units_do_not_matter(factor):
    weight, x, g, stats = case((10, 24))
    method = TwoSidedSVD()
    made = method.compress(weight, stats, 4).to_dense()
    torch.testing.assert_close(method.compress(weight, observed(x, factor * g), 4).to_dense(), made)
    torch.testing.assert_close(method.compress(weight, observed(factor * x, g), 4).to_dense(), made)
    torch.testing.assert_close(method.compress(factor * weight, stats, 4).to_dense(), factor * made)


@pytest.mark.parametrize("shape", [(10, 24), (24, 10)])
def test_factors_share_their_range(shape):
    weight, _, _, stats = case(shape)
    made = TwoSidedSVD().compress(weight, stats, 5)
    torch.testing.assert_close(made.up.weight.norm(dim=0), made.down.weight.norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pivot", [False, True])
def test_the_result_has_the_dtype_of_the_weight_and_the_bytes_that_were_promised(dtype, pivot):
    weight, _, _, stats = case((16, 16))
    method, weight = TwoSidedSVD(pivot=pivot), weight.to(dtype)
    option = next(option for option in method.options(weight, stats) if option.amount == 6)
    made = method.compress(weight, stats, 6)
    assert made.nbytes() == option.nbytes
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    assert dense_weight(made).isfinite().all()


def test_what_is_refused():
    weight, x, g, stats = case((10, 24))
    for fields in ({"shrink_inputs": -0.1}, {"shrink_gradients": 1.1}, {"shrink_inputs": float("nan")}):
        with pytest.raises(RecipeError, match=rf"kfac_svd: {next(iter(fields))}"):
            TwoSidedSVD(**fields)
    for rank in (0, 11):
        with pytest.raises(RecipeError, match="wanted 1 to 10"):
            TwoSidedSVD().compress(weight, stats, rank)
    with pytest.raises(NumericalError, match="gradients have entries that are not finite"):
        TwoSidedSVD().options(weight, observed(x, g * torch.inf))
    with pytest.raises(NumericalError, match="input statistic has entries that are not finite"):
        TwoSidedSVD().options(weight, observed(x * torch.inf, g))
    with pytest.raises(KeyError, match="no OutputGram was gathered for this linear"):
        TwoSidedSVD().options(weight, Stats({Gram: stats[Gram]}))


# --- in a model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(model_folder: Callable[..., Path], text_file: Path) -> Recipe:
    return Recipe(str(model_folder()), [MethodStep("kfac_svd", keep=0.6)], Calibration([str(text_file)], 8, 32))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows at every backward pass over the calibration windows."""
    counted: list[int] = []
    usual = gradients.gather

    def gather(*arguments: Any) -> dict[str, Stats]:
        counted.append(len(arguments[2]))
        return usual(*arguments)

    monkeypatch.setattr(gradients, "gather", gather)
    return counted


def with_step(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, step=[replace(recipe.step[0], **changes)])


@pytest.mark.parametrize(
    ("method", "propagate", "allocate"),
    [
        ("kfac_svd", "none", "uniform"),
        ("kfac_svd", "none", "greedy"),
        ("kfac_svd", "block", "greedy"),
        ("kfac_svd", "input", "uniform"),
        ("fwsvd", "none", "greedy"),
        ("fwsvd", "block", "uniform"),
    ],
)
def test_gradients_are_gathered_once_whatever_is_propagated(method, propagate, allocate, recipe, passes, tmp_path):
    run(prepare(with_step(recipe, method=method, propagate=propagate, allocate=allocate), tmp_path / "out"))
    assert len(passes) == 1
    assert all(check.passed for check in verify(tmp_path / "out"))
    assert not list(tmp_path.rglob("*fisher*")) and not list(tmp_path.rglob("*output_gram*"))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.bfloat16), *((family, torch.float32) for family in ("gpt2", "gpt_neox", "phi3"))],
    ids=str,
)
def test_a_linear_is_shown_its_own_gradients(family, dtype, recipe, model_folder, tmp_path):
    """Also where weights are stored the other way round, and fused ones."""
    shown: list[tuple[Tensor, Stats]] = []
    usual = TwoSidedSVD.compress

    def compress(method: Any, weight: Tensor, stats: Stats, amount: int) -> Any:
        shown.append((weight, stats))
        return usual(method, weight, stats, amount)

    asked = replace(with_step(recipe, allocate="uniform"), model=str(model_folder(family, dtype=dtype)))
    prepared = prepare(asked, tmp_path / "out")
    source, sites = prepared.source, prepared.anatomy.sites
    wanted = gradients.gather(source, prepared.anatomy, sites, [OutputGram], prepared.windows.tokens)
    stored = [source.tensor(f"{site.name}.weight").clone() for site in sites]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TwoSidedSVD, "compress", compress)
        run(prepared)
    assert len(shown) == len(sites)
    for (weight, stats), site, tensor in zip(shown, sites, stored, strict=True):  # all in order of execution
        assert torch.equal(weight, tensor.T if site.transposed else tensor)
        assert torch.equal(stats[OutputGram].mean(), wanted[site.name][OutputGram].mean())
        assert stats[OutputGram].mean().shape == (site.out_features,) * 2
        assert stats[Gram].mean().shape == (site.in_features,) * 2


def test_a_store_serves_later_sizes_and_other_targets(recipe, passes, tmp_path):
    statistics, alone = tmp_path / "statistics", tmp_path / "alone"
    first, other = (
        with_step(recipe, target=["mlp"]),
        with_step(recipe, target=["attention"], propagate="block", keep=0.8),
    )
    run(prepare(first, tmp_path / "first"), statistics=statistics)
    run(prepare(other, tmp_path / "other"), statistics=statistics)
    assert len(passes) == 1
    run(prepare(other, alone))
    weights = load_file(alone / "model.safetensors")
    for name, tensor in load_file(tmp_path / "other" / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("propagate", ["none", "block"])
def test_a_stopped_run_goes_on_without_a_second_pass_and_ends_with_the_same_bytes(
    propagate, recipe, passes, tmp_path, monkeypatch
):
    recipe = with_step(recipe, propagate=propagate)
    run(prepare(recipe, tmp_path / "whole"))
    usual, written = sweeps._commit_unit, []

    def commit(job: Any, index: int, unit: Any) -> Any:
        if written:
            raise KeyboardInterrupt
        written.append(index)
        return usual(job, index, unit)

    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "_commit_unit", commit)
        with pytest.raises(KeyboardInterrupt):
            run(prepare(recipe, tmp_path / "out"))
    run(prepare(recipe, tmp_path / "out"))
    assert len(passes) == 2
    for name in ("model.safetensors", "plan.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_step_after_another_takes_the_gradients_of_what_is_there(recipe, passes, tmp_path):
    """Of the factors, which are linears like any other."""
    first = MethodStep("svd", target=["mlp"], keep=0.7, allocate="uniform")
    second = replace(recipe.step[0], target=["attention", "*.up"], keep=0.8)
    run(prepare(replace(recipe, step=[first, second]), tmp_path / "out"))
    assert passes == [2 * (4 + 3)]
    assert all(check.passed for check in verify(tmp_path / "out"))


def test_an_encoder_is_refused_and_said_why(recipe, model_folder, tmp_path):
    for method in ("fwsvd", "kfac_svd"):
        asked = replace(with_step(recipe, method=method), model=str(model_folder("bert")))
        with pytest.raises(AnatomyError, match="BertForMaskedLM predicts no next token"):
            run(prepare(asked, tmp_path / method))

"""Factors in one byte and two: exact bytes, rounding that is known and repaired, and a folder that opens.

(f) of Dobi-SVD's claims: a rank k of a weight of shape (m, n) takes 2 k max(m, n) bytes and its scales, and the round
trip hardly moves the model.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersely.errors import AnatomyError, CheckpointError, NumericalError, RecipeError
from tersely.kinds import Made, RemappedLinear
from tersely.kinds.remapped import remapped_bytes
from tersely.linalg.codebook import dynamic_levels, levels_of, nearest_level
from tersely.methods.low_rank.dobi import DobiSVD
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.pipeline import compress, evaluate, load, run
from tersely.prepare import prepare
from tersely.recipe import recipe_from
from tersely.stats import Gram, Stats, WindowFactors

SHARED = Path(__file__).parents[2] / "shared"
SHAPES = {
    "wide": (10, 24),
    "tall": (24, 10),
    "square": (16, 16),
    "two rows": (2, 5),
    "one column": (7, 1),
    "one": (1, 1),
}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_method = pytest.mark.parametrize("method", [DobiSVD, WhitenedSVD])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def directions(weight: Tensor) -> Tensor:
    return torch.linalg.svd(weight, full_matrices=False).U


def off(module: RemappedLinear, weight: Tensor) -> float:
    return ((module.to_dense().double() - weight).norm() / weight.norm()).item()


# --- the codebook -----------------------------------------------------------------------------------------------------


def test_the_codebook_has_256_levels_that_reach_over_seven_decades():
    levels = dynamic_levels(torch.float64)
    assert len(levels) == 256 and (levels.diff() > 0).all()
    assert levels[-1] == 1 and 0 in levels.tolist()
    assert levels.abs()[levels != 0].min().item() == pytest.approx(5.5e-7)
    inner = levels[levels.abs() < 1]
    assert torch.allclose(inner, -inner.flip(0))
    highest = levels[(levels > 0.1) & (levels < 1)]
    assert len(highest) == 64
    torch.testing.assert_close(highest.diff(), torch.full((63,), 0.9 / 64, dtype=torch.float64))


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None, database=None)
def test_no_level_is_nearer(values):
    x = torch.tensor(values, dtype=torch.float64)
    chosen = levels_of(nearest_level(x), torch.float64)
    nearest = (x[:, None] - dynamic_levels(torch.float64)).abs().min(1).values
    torch.testing.assert_close((x - chosen).abs(), nearest, rtol=0, atol=1e-15)


def test_a_level_is_its_own_nearest():
    for dtype in (torch.float32, torch.float64):
        codes = torch.arange(256, dtype=torch.uint8)
        assert torch.equal(nearest_level(levels_of(codes, dtype)), codes)


# --- the kind ---------------------------------------------------------------------------------------------------------


@every_shape
def test_bytes_are_those_of_the_paper_and_one_scale(shape):
    weight = normal(*shape)
    for rank in range(1, min(shape) + 1):
        module = RemappedLinear.of(weight, directions(weight)[:, :rank])
        assert module.nbytes() == 2 * rank * max(shape) + 2 * rank == remapped_bytes(shape, rank)
        (one, two) = (t.numel() for t in (torch.cat([module.up, module.down]), module.rest))
        assert one == 2 * rank * min(shape) and two == rank * (max(shape) - min(shape))
        assert {t.dtype for t in module.state_dict().values() if t.numel()} <= {torch.uint8, torch.int16}
    full = remapped_bytes(shape, min(shape)) - 2 * min(shape)
    assert full == 2 * shape[0] * shape[1], "full rank costs what the weight costs in 16 bits"


@every_shape
def test_full_rank_is_the_weight_up_to_rounding(shape):
    weight = normal(*shape)
    assert off(RemappedLinear.of(weight, directions(weight)), weight) < 0.016


@every_shape
def test_smaller_ranks_are_the_first_components_of_larger_ones(shape):
    weight = normal(*shape)
    whole = RemappedLinear.of(weight, directions(weight)).factors()
    for rank in range(1, min(shape) + 1):
        part = RemappedLinear.of(weight, directions(weight)[:, :rank]).factors()
        for few, all_of_them in zip(part, whole, strict=True):
            assert torch.equal(few, all_of_them[:rank])


def test_feedback_repairs_more_than_rounding_both_sides_leaves():
    weight = normal(48, 64)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)

    def rounded(rows: Tensor) -> Tensor:
        scale = rows.abs().amax(1, keepdim=True)
        return levels_of(nearest_level(rows / scale), torch.float64) * scale

    apart = rounded((u * s).T).T @ rounded(vh)
    assert off(RemappedLinear.of(weight, u), weight) < 0.95 * ((apart - weight).norm() / weight.norm()).item()


@pytest.mark.parametrize("power", [-60, 0, 60])
def test_the_unit_of_a_weight_changes_no_code(power):
    weight = normal(10, 24)
    plain, scaled = (RemappedLinear.of(w, directions(weight)) for w in (weight, weight * 2.0**power))
    for name in ("up", "down", "rest", "scales"):
        assert torch.equal(getattr(plain, name), getattr(scaled, name))
    assert scaled.exponent == plain.exponent + power
    assert torch.equal(scaled.to_dense(), plain.to_dense() * 2.0**power)


def test_zeros_and_repeated_directions_are_no_special_case():
    assert not RemappedLinear.of(torch.zeros(4, 6), normal(4, 2).float()).to_dense().any()
    weight = normal(4, 6)
    twice = RemappedLinear.of(weight, directions(weight)[:, [0, 0, 1]])
    once = RemappedLinear.of(weight, directions(weight)[:, [0, 1]])
    assert off(twice, weight) <= off(once, weight) * (1 + 1e-3)
    assert not RemappedLinear.of(weight, torch.zeros(4, 2, dtype=torch.float64)).to_dense().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    weight, broken = normal(4, 6), normal(4, 6)
    broken[1, 2] = bad
    with pytest.raises(NumericalError, match="finite"):
        RemappedLinear.of(broken, directions(weight))
    with pytest.raises(NumericalError, match="overflows"):
        RemappedLinear.of(torch.full_like(weight, 1e308), torch.ones(4, 2, dtype=torch.float64))


def test_a_rank_that_no_weight_has_is_refused():
    for rank in (0, 5):
        with pytest.raises(CheckpointError, match=rf"rank {rank} with 4 rows and 8 columns; wanted 1 to 4"):
            RemappedLinear(8, 4, rank)


def test_casting_the_model_changes_no_number():
    weight = normal(10, 24).float()
    module = RemappedLinear.of(weight, directions(weight.double())[:, :6].float())
    dense = module.to_dense()
    assert torch.equal(module.half().to_dense(), dense)
    again = Made.of(module).build()
    again.load_state_dict(Made.of(module).state, strict=True, assign=True)
    assert torch.equal(again.to_dense(), dense)
    assert module(normal(3, 24).half()).dtype == torch.float16


# --- methods ----------------------------------------------------------------------------------------------------------


def seen(width: int) -> Stats:
    stats = Stats({Gram: Gram(width), WindowFactors: WindowFactors(width)})
    for number in range(4):
        stats.update(normal(50, width, seed=number) * torch.logspace(0, -1, width, dtype=torch.float64))
    return stats


@every_method
@every_shape
def test_errors_are_those_of_what_is_stored(method, shape):
    weight, stats = normal(*shape), seen(shape[1])
    asked, gram = method(damping=0, remap=True), stats[Gram].mean()
    assert [(o.amount, o.nbytes) for o in asked.options(weight, stats)] == [
        (rank, remapped_bytes(shape, rank)) for rank in range(min(shape) + 1)
    ]
    for option in asked.options(weight, stats)[1:]:
        module = asked.compress(weight, stats, option.amount)
        assert isinstance(module, RemappedLinear) and module.nbytes() == option.nbytes
        lost = weight - module.to_dense().double()
        energy = ((weight @ gram) * weight).sum().item()
        assert option.error == pytest.approx(((lost @ gram) * lost).sum().item(), rel=1e-4, abs=1e-9 * energy)


@every_method
def test_nothing_is_left_that_a_later_step_could_compress(method):
    assert method(remap=True).leaves == ()
    assert method.leaves == method().leaves == ("down", "up") and method(pivot=True).leaves == ("down", "rest")
    with pytest.raises(RecipeError, match="pivot and remap"):
        method(remap=True, pivot=True)


def recipe(model: Path, text: Path, *steps: dict[str, object]):
    calibration = {"source": [str(text)], "length": 32, "samples": 16}
    return recipe_from({"model": str(model), "step": list(steps), "calibration": calibration})


CUT = {"method": "svd_llm", "keep": 0.3, "remap": True, "allocate": "uniform"}


def test_a_folder_opens_with_the_bytes_that_were_planned(model_folder, text_file, tmp_path):
    run(prepare(recipe(model_folder(), text_file, CUT), tmp_path / "out"))
    model = load(tmp_path / "out")
    found = [module for module in model.modules() if isinstance(module, RemappedLinear)]
    assert len(found) == 14
    for module in found:
        assert module.nbytes() == remapped_bytes((module.out_features, module.in_features), module.rank)
    with pytest.raises(AnatomyError, match="nothing"):
        later = {"method": "rtn", "target": ["*.down"], "width": 4}
        prepare(recipe(model_folder(), text_file, CUT, later), tmp_path / "second")


def test_a_stock_model_does_not_take_its_tensors(model_folder, text_file, tmp_path):
    run(prepare(recipe(model_folder(), text_file, CUT), tmp_path / "out"))
    with pytest.raises(RuntimeError, match=r"size mismatch for model.layers.0.mlp.gate_proj.weight"):
        load(model_folder()).load_state_dict(load(tmp_path / "out").state_dict(), strict=False)


@pytest.mark.skipif(not SHARED.exists(), reason="the reference model is not here")
def test_the_round_trip_hardly_moves_the_reference_model(tmp_path):
    """Every linear at full rank: all that is lost is rounding."""
    model, texts = SHARED / "models/reference", [str(SHARED / "data/wikitext-2/wiki.valid.raw")]
    compress(model, tmp_path / "out", method="svd_llm", keep=0.55, allocate="uniform", propagate="none",
             options={"remap": True}, calibrate=texts, samples=16, length=256)  # fmt: skip
    opened = load(tmp_path / "out")
    ranks = [(m.rank, min(m.in_features, m.out_features)) for m in opened.modules() if isinstance(m, RemappedLinear)]
    assert len(ranks) == 28 and all(rank == full for rank, full in ranks)
    assert not any(isinstance(m, nn.Linear) for name, m in opened.named_modules() if "layers" in name)
    before, after = (
        evaluate(folder, texts, length=256, windows=8)["texts"][0]["perplexity"] for folder in (model, tmp_path / "out")
    )
    assert abs(after / before - 1) < 0.02


def test_in_float16_a_small_weight_loses_no_more_than_a_large_one():
    weight, x = normal(64, 64) / 16, normal(8, 64, seed=1).half()
    for size in (1.0, 1e-4):
        small = (weight * size).half()
        module = RemappedLinear.of(small, directions(small.double()))
        exact = x.double() @ module.to_dense().double().T
        assert (module(x).double() - exact).norm() < 2e-3 * exact.norm()

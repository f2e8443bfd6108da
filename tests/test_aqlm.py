"""Additive codes: each step lowers what it says it lowers, and the method does what its paper says it does.

W is a weight, W' what it becomes, G the metric, L = tr((W - W') G (W - W')ᵀ).
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tersely.errors import NumericalError, RecipeError
from tersely.kinds.codebook import CodebookLinear
from tersely.linalg.additive import (
    Additive,
    Wanted,
    beam_search,
    feed_back,
    fit_codebooks,
    fit_scales,
    group_feedback,
    kmeans,
    nearest_centre,
    residual_kmeans,
)
from tersely.methods.quantize.aqlm import AQLM
from tersely.methods.quantize.gptq import GPTQ
from tersely.pipeline import compress, load
from tersely.stats import Gram, Stats
from tersely.verify import verify


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_gram(gram: Tensor) -> Stats:
    return Stats({Gram: Gram.restore({"sum": gram.double(), "tokens": torch.tensor(1)})})


def realistic(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A square weight whose spectrum decays, and the Gram matrix of inputs that are correlated and of which some
    channels are loud."""
    decay = torch.arange(1, size + 1, dtype=torch.float64) ** -0.5
    turns = [torch.linalg.qr(normal(size, size, seed=seed))[0] for seed in range(3)]
    weight = turns[0] * decay @ turns[1].T
    weight = 0.02 * weight / weight.square().mean().sqrt() + 0.01 * normal(size, size, seed=4)
    x = normal(4 * size, size, seed=5) * decay @ turns[2].T * torch.exp(0.7 * normal(size, seed=6))
    return weight.to(dtype), x.T @ x / len(x)


def lost(method: AQLM | GPTQ, weight: Tensor, gram: Tensor) -> dict[str, tuple[float, float]]:
    """Amount → true bits of a weight, and tr(Δ G Δᵀ) as a share of the whole."""
    whole, *options = method.options(weight, of_gram(gram))
    return {str(o.amount): (8 * o.nbytes / weight.numel(), (o.error or 0) / (whole.error or 1)) for o in options}


def wide_matrix(size: int = 1024, dtype: torch.dtype = torch.bfloat16) -> dict[str, tuple[float, float]]:
    """What a wide matrix loses by bits, beside GPTQ: ``python -c "import test_aqlm as t; print(t.wide_matrix())"``."""
    weight, gram = realistic(size, dtype)
    asked = [(1, 6, 4), (1, 8, 8), (2, 6, 8), (2, 7, 8), (2, 8, 8), (1, 8, 4), (3, 8, 8)]
    rows = {
        f"aqlm {books} x {bits}, groups of {group}": lost(AQLM(books, bits, group), weight, gram)
        for books, bits, group in asked
    }
    rows |= {f"gptq, {width} bits": lost(GPTQ(width=width, shrink=True), weight, gram) for width in (2, 3)}
    return {name: next(iter(found.values())) for name, found in rows.items()}


def case(
    rows: int = 24, columns: int = 22, group: int = 4, books: int = 2, entries: int = 8
) -> tuple[Additive, Wanted]:
    """Codes by chance; the group does not divide the width."""
    metric = (lambda x: x.T @ x / len(x))(normal(60, columns, seed=1) @ normal(columns, columns, seed=2))
    wanted = Wanted.of(normal(rows, columns), metric, group)
    codes = torch.randint(0, entries, (rows, wanted.groups, books), generator=generator())
    return Additive(
        normal(books, entries, group, seed=3), 0.5 + torch.rand(rows, generator=generator()).double(), codes
    ), wanted


# --- the start --------------------------------------------------------------------------------------------------------


def test_centres_are_the_means_of_what_is_nearest_to_them():
    vectors = normal(600, 3)
    centres = kmeans(vectors, 10, generator(), iterations=500)
    nearest = nearest_centre(vectors, centres)
    assert torch.equal(nearest, torch.cdist(vectors, centres).argmin(1))
    for number, centre in enumerate(centres):
        torch.testing.assert_close(vectors[nearest == number].mean(0), centre, rtol=0, atol=2e-2)


def test_as_many_centres_as_vectors_lose_nothing_and_no_centre_is_idle():
    vectors = normal(7, 3)
    assert kmeans(vectors, 8, generator()).shape == (8, 3)
    assert torch.cdist(vectors, kmeans(vectors, 8, generator())).amin(1).max() == 0
    twice = normal(40, 3).repeat(5, 1)
    assert len(nearest_centre(twice, kmeans(twice, 30, generator())).unique()) >= 29


def test_every_book_takes_something_away():
    wanted = Wanted.of(normal(64, 64), torch.eye(64).double(), 8)
    losses = [wanted.loss(residual_kmeans(wanted, books, 32, generator())) for books in (1, 2, 3)]
    assert losses[0] > losses[1] > losses[2] > 0


# --- books and scales -------------------------------------------------------------------------------------------------


def test_scales_solve_their_equation():
    now, wanted = case()
    fitted = fit_scales(now, wanted)
    scales = fitted.scales.clone().requires_grad_()
    wanted.losses(replace(fitted, scales=scales).values()).sum().backward()
    torch.testing.assert_close(scales.grad, torch.zeros_like(scales), rtol=0, atol=1e-9)
    assert (wanted.losses(fitted.values()) <= wanted.losses(now.values()) + 1e-9).all()


def test_conjugate_gradients_give_the_least_squares():
    """Against the system that is nowhere written out: a column for every number of the books."""
    now, wanted = case()
    root = torch.linalg.cholesky(wanted.metric[:22, :22])
    unit = torch.eye(now.codebooks.numel(), dtype=torch.float64).view(-1, *now.codebooks.shape)
    system = torch.stack([(replace(now, codebooks=one).values()[:, :22] @ root).flatten() for one in unit], 1)
    best = torch.linalg.lstsq(system, (wanted.weight[:, :22] @ root).flatten()[:, None], driver="gelsd").solution
    least = wanted.loss(replace(now, codebooks=best.view_as(now.codebooks)))
    fitted = fit_codebooks(now, wanted, iterations=200, tolerance=1e-10)
    assert wanted.loss(fitted) == pytest.approx(least, rel=1e-6)
    assert wanted.loss(fit_codebooks(now, wanted)) <= 1.02 * least, "ten iterations"


@pytest.mark.parametrize("rate", [1e-4, 1e-3, 1e-2])
def test_adam_ends_above_them(rate):
    """The paper's step; `rate` 1e-4 is its own."""
    now, wanted = case()
    books = now.codebooks.clone().requires_grad_()
    adam = torch.optim.Adam([books], lr=rate, betas=(0.0, 0.95), amsgrad=True)
    for _ in range(100):
        adam.zero_grad()
        wanted.losses(replace(now, codebooks=books).values()).sum().backward()
        adam.step()
    trained = wanted.loss(replace(now, codebooks=books.detach()))
    assert wanted.loss(fit_codebooks(now, wanted)) < trained < wanted.loss(now)


def test_a_codeword_that_nobody_uses_stays():
    now, wanted = case()
    now = replace(now, codes=now.codes.clamp(max=6))
    fitted = fit_codebooks(now, wanted)
    assert torch.equal(fitted.codebooks[:, 7], now.codebooks[:, 7])
    assert not torch.equal(fitted.codebooks[:, :7], now.codebooks[:, :7])


# --- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beam", [1, 2, 5])
def test_a_search_makes_no_row_worse_and_knows_what_it_gains(beam):
    now, wanted = case(columns=90)  # more groups than are visited together
    before = wanted.losses(now.values())
    for _ in range(2):
        now, change = beam_search(now, wanted, beam, generator())
        after = wanted.losses(now.values())
        assert (change <= 0).all()
        torch.testing.assert_close(after - before, change, rtol=1e-8, atol=1e-8 * before.max().item())
        before = after


def test_a_wider_beam_ends_lower():
    now, wanted = case(rows=100)
    ends = [wanted.loss(beam_search(now, wanted, beam, generator())[0]) for beam in (1, 4, 16)]
    assert ends[0] > ends[1] > ends[2]


def test_rows_are_searched_one_by_one(monkeypatch):
    now, wanted = case()
    together, _ = beam_search(now, wanted, 3, generator())
    monkeypatch.setattr("tersely.linalg.additive.SEARCHED", 100)
    assert torch.equal(beam_search(now, wanted, 3, generator())[0].codes, together.codes)


def test_of_white_inputs_one_book_gives_the_nearest_codeword():
    now, wanted = case(columns=24, books=1)
    wanted = replace(wanted, metric=torch.eye(24, dtype=torch.float64))
    vectors = (wanted.weight / now.scales[:, None]).view(-1, 4)
    nearest = torch.cdist(vectors, now.codebooks[0]).argmin(1).view(24, 6, 1)
    assert torch.equal(beam_search(now, wanted, 1, generator())[0].codes, nearest)
    assert torch.equal(feed_back(now, wanted, group_feedback(wanted), 1).codes, nearest)


def test_a_beam_that_holds_everything_finds_the_best_of_all():
    now, wanted = case(rows=5, columns=4, group=2, books=2, entries=4)
    found, _ = beam_search(now, wanted, 4**4, generator())
    every = torch.tensor(list(itertools.product(range(4), repeat=4))).view(-1, 2, 2)
    losses = [wanted.losses(replace(now, codes=codes.expand(5, 2, 2)).values()) for codes in every]
    torch.testing.assert_close(wanted.losses(found.values()), torch.stack(losses).amin(0))


def test_feedback_with_one_group_finds_the_best_of_all():
    now, wanted = case(rows=5, columns=3, group=3, books=2, entries=4)
    found = feed_back(now, wanted, group_feedback(wanted), 16)
    every = torch.tensor(list(itertools.product(range(4), repeat=2))).view(-1, 1, 2)
    losses = [wanted.losses(replace(now, codes=codes.expand(5, 1, 2)).values()) for codes in every]
    torch.testing.assert_close(wanted.losses(found.values()), torch.stack(losses).amin(0))


def test_feedback_starts_lower_than_a_search_from_kmeans_ends():
    weight, gram = realistic(96, torch.float64)
    wanted = Wanted.of(weight, gram + 1e-3 * gram.diagonal().mean() * torch.eye(96), 4)
    now = residual_kmeans(wanted, 2, 16, generator())
    searched, _ = beam_search(now, wanted, 4, generator())
    assert wanted.loss(feed_back(now, wanted, group_feedback(wanted), 4)) < wanted.loss(searched) < wanted.loss(now)


# --- the method -------------------------------------------------------------------------------------------------------


def test_gaussian_weights_at_two_bits_lose_about_nine_per_cent():
    """The paper's format before any metric; a grid with groups of 64 loses .209, Shannon's limit is .0625."""
    weight = normal(512, 256, dtype=torch.float32)
    method = AQLM(2, 8, beam=1, tolerance=0.05)
    off = weight - method.compress(weight, of_gram(torch.eye(256)), {"codebooks": 2, "bits": 8}).to_dense()
    assert 0.0625 < off.square().sum() / weight.square().sum() < 0.097


def test_knowing_the_inputs_pays():
    weight, gram = realistic(128)
    amount, method = {"codebooks": 2, "bits": 5}, AQLM(2, 5, 4)
    errors = []
    for known in (gram, torch.eye(128)):
        off = (weight - method.compress(weight, of_gram(known), amount).to_dense()).double()
        errors.append(((off @ gram) * off).sum().item())
    assert errors[0] < 0.7 * errors[1]


def test_it_loses_less_than_gptq_in_fewer_bits():
    weight, gram = realistic(256, torch.bfloat16)
    ((bits, error),) = lost(AQLM(1, 7, 4), weight, gram).values()
    ((of_gptq, error_of_gptq),) = lost(GPTQ(width=2, shrink=True), weight, gram).values()
    assert bits < of_gptq and error < error_of_gptq


def test_only_what_was_asked_for_is_offered():
    offered = [o.amount for o in AQLM().sizes((64, 64), 2)[1:]]
    assert len(offered) == 12 and {"codebooks": 2, "bits": 8} in offered
    assert [o.amount for o in AQLM(2, 5).sizes((64, 64), 2)] == [0, {"codebooks": 2, "bits": 5}]
    assert {o.amount["bits"] for o in AQLM(width=12).sizes((64, 64), 2)[1:]} == {12}
    with pytest.raises(RecipeError, match="wanted"):
        AQLM(2, 5).compress(normal(8, 8), of_gram(torch.eye(8)), {"codebooks": 2, "bits": 6})


@pytest.mark.parametrize(
    "wrong",
    [
        {"codebooks": 0},
        {"width": 17},
        {"group": 0},
        {"beam": 0},
        {"tolerance": 0.0},
        {"tolerance": 1.0},
        {"damping": -1.0},
        {"damping": float("inf")},
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(RecipeError, match="wanted"):
        AQLM(**wrong)


def small(weight: Tensor, gram: Tensor, **settings: int) -> CodebookLinear:
    return AQLM(2, 3, 4, **settings).compress(weight, of_gram(gram), {"codebooks": 2, "bits": 3})


def test_a_seed_gives_the_same_again_and_another_something_else():
    weight, gram = realistic(32)
    first = small(weight, gram).to_dense()
    assert torch.equal(small(weight, gram).to_dense(), first)
    assert not torch.equal(small(weight, gram, seed=1).to_dense(), first)


@pytest.mark.parametrize("unit", [2.0**100, 2.0**-100])
def test_the_unit_of_inputs_does_not_matter(unit):
    weight, gram = realistic(32)
    assert torch.equal(small(weight, gram * unit).to_dense(), small(weight, gram).to_dense())


def test_poor_statistics_give_finite_weights_that_stay_near():
    weight, gram = realistic(34)
    one, silent = normal(34), torch.arange(34) % 3 < 1
    masked = gram * ~silent * ~silent[:, None]
    for known in (
        torch.outer(one, one),
        torch.zeros(34, 34),
        masked,
        torch.diag(10.0 ** torch.arange(-17, 17).double()),
    ):
        made = small(weight, known).to_dense()
        assert made.isfinite().all()
        assert (made - weight).square().sum() < 4 * weight.square().sum()
    with pytest.raises(NumericalError, match="finite"):
        small(weight, gram * torch.inf)


def test_codes_fit_the_books_that_are_stored():
    """Rounding to bfloat16 moves the books; no single codeword of a row could be better for them."""
    weight, _ = realistic(64, torch.bfloat16)
    made = AQLM(1, 4, 4, beam=1).compress(weight, of_gram(torch.eye(64)), {"codebooks": 1, "bits": 4})
    books, scales = made.codebooks.double(), made.scales.double() * 2.0**made.exponent
    vectors = weight.double().view(64, 16, 4)
    offs = (vectors[:, :, None] - scales[:, None, None, None] * books[0]).square().sum(-1)
    chosen = offs.gather(2, made.unpacked().long())[..., 0]
    torch.testing.assert_close(chosen, offs.amin(2), rtol=1e-4, atol=0)


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_refinement_trains_books_scales_and_norms_and_leaves_the_codes(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path
):
    """The paper's second half."""
    asked = {
        "method": "aqlm",
        "options": {"codebooks": 1, "width": 3, "beam": 1},
        "calibrate": [str(text_file)],
        "length": 16,
        "samples": 32,
    }
    compress(model_folder(), tmp_path / "cut", **asked)
    done = compress(model_folder(), tmp_path / "tuned", refine={"epochs": 3, "batch": 4, "held_out": 0.25}, **asked)
    (step,) = done.report.steps
    assert all(block["after"] <= block["before"] for block in step["refined"].values())
    assert step["refined"]["model.layers.0"]["after"] < step["refined"]["model.layers.0"]["before"]
    cut, tuned = (load(tmp_path / name).state_dict() for name in ("cut", "tuned"))
    assert cut.keys() == tuned.keys()
    first = [name for name in cut if ".layers.0." in name]
    for what in (".codebooks", ".scales", "layernorm.weight"):
        names = [name for name in first if name.endswith(what)]
        assert names and not any(torch.equal(cut[name], tuned[name]) for name in names), what
    for name in first:
        assert not name.endswith(".codes") or torch.equal(cut[name], tuned[name])
    assert all(check.passed for check in verify(tmp_path / "tuned"))
    again = load(tmp_path / "tuned").state_dict()
    assert all(torch.equal(again[name], tuned[name]) for name in tuned)

"""Fast operations beside their references, and what happens where they cannot be built."""

import logging
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tersely.errors import NumericalError
from tersely.kernels import (
    attention,
    best_ranges,
    causal_attention,
    native,
    ranges,
    reference_only,
    round_block,
    rounding,
)
from tersely.linalg.grid import Scales, fit_grid, fit_table, float_zeros, wide
from tersely.linalg.hessian import feedback, sweep_blocks
from tersely.methods.quantize.gptq import rounded_with_feedback

needs_compiler = pytest.mark.skipif(not native._compiler(), reason="no C++ compiler: references run")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread_of(width: int):
    x = normal(3 * width, width, seed=1) @ normal(width, width, seed=2)
    return feedback(x.T @ x, damping=0.01, loudest_first=True)


def swept(weight, grid, spread, block=128):
    rounding = grid.rounding(weight, spread.order)
    done = sweep_blocks(weight, spread, partial(round_block, rounding), block=block)
    return rounding.codes, done.off, done.cost


def forget():
    for kept in (native.library, native._compiler, attention._entry, ranges._entry, rounding._entry):
        if hasattr(kept, "cache_clear"):  # what a test has put there goes by itself
            kept.cache_clear()


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A cache with nothing in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    forget()
    yield tmp_path / "tersely" / "kernels"
    forget()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (64, 33), (65, 128), (200, 300)])
@pytest.mark.parametrize(("bits", "group", "form"), [(2, 0, "asymmetric"), (3, 16, "symmetric"), (8, 64, "asymmetric")])
def test_rounding_is_the_reference(shape, dtype, bits, group, form):
    weight, spread = normal(*shape).to(dtype), spread_of(shape[1])
    grid = fit_grid(weight, bits, group, form)
    assert attention._entry() is not None
    codes, off, cost = swept(weight, grid, spread)
    with reference_only():
        expected, wanted, price = swept(weight, grid, spread)
    assert torch.equal(codes, expected) and codes.dtype == torch.uint8
    torch.testing.assert_close(off, wanted)
    assert off.dtype == dtype and cost == pytest.approx(price, rel=1e-5)


@needs_compiler
def test_scales_of_columns_and_free_zero_points_are_the_reference():
    weight, spread = normal(70, 96), spread_of(96)
    columns = Scales.of(normal(96, seed=3).abs() + 0.5)
    grid = fit_grid(weight, 3, 32, columns=columns)
    free = type(grid)(3, 32, grid.scales, float_zeros(grid.zeros(torch.float32) + 0.3), None, columns)
    for case in (grid, free):
        codes, off, _ = swept(weight, case, spread)
        with reference_only():
            expected, wanted, _ = swept(weight, case, spread)
        assert torch.equal(codes, expected)
        torch.testing.assert_close(off, wanted)
        torch.testing.assert_close(weight - case.levels(codes.T.contiguous()), off.T[:, spread.order.argsort()])


@needs_compiler
def test_neither_threads_nor_blocks_change_anything(monkeypatch):
    weight, spread = normal(300, 100), spread_of(100)
    grid = fit_grid(weight, 3, 16)
    one = swept(weight, grid, spread)
    monkeypatch.setattr("tersely.kernels.rounding.WORTH_A_THREAD", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)  # more than there are tiles
    many = swept(weight, grid, spread)
    assert torch.equal(one[0], many[0]) and torch.equal(one[1], many[1])
    assert all(torch.equal(one[0], swept(weight, grid, spread, block=block)[0]) for block in (1, 7, 64, 1000))


def test_tables_of_levels_go_by_the_reference():
    weight, spread = normal(20, 64), spread_of(64)
    grid = fit_table(weight, "nf4", 32)
    codes, lost = rounded_with_feedback(weight, grid, spread)
    with reference_only():
        expected, price = rounded_with_feedback(weight, grid, spread)
    assert torch.equal(codes, expected) and lost == price


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_either(wrong):
    weight, spread = normal(20, 64), spread_of(64)
    grid = fit_grid(weight, 4, 32)
    weight[3, 5] = wrong
    with pytest.raises(NumericalError, match="diverged"):
        rounded_with_feedback(weight, grid, spread)
    with reference_only(), pytest.raises(NumericalError, match="diverged"):
        rounded_with_feedback(weight, grid, spread)


# --- ranges -----------------------------------------------------------------------------------------------------------


def lost(weight, grid):
    return float((weight - grid.levels(grid.nearest(weight))).double().abs().pow(2.4).sum())


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (40, 128), (7, 1000)])
@pytest.mark.parametrize(
    ("bits", "group", "form"),
    [(2, 0, "asymmetric"), (3, 16, "symmetric"), (4, 33, "symmetric_full"), (8, 64, "asymmetric")],
)
def test_ranges_are_those_of_the_reference(shape, bits, group, form):
    weight = normal(*shape) * normal(shape[0], 1, seed=1)
    weight[0, 0] = 0
    assert ranges._entry() is not None
    found = fit_grid(weight, bits, group, form, shrink=True)
    with reference_only():
        expected = fit_grid(weight, bits, group, form, shrink=True)
    same = (found.scales.raw == expected.scales.raw).double().mean()
    assert same > 0.99 or found.scales.raw.numel() < 100  # of two that are as good as equal either may be taken
    assert lost(weight, found) == pytest.approx(lost(weight, expected), rel=1e-5, abs=1e-12)


@needs_compiler
def test_of_many_grids_the_first_of_the_best_is_taken(monkeypatch):
    """Against brute force, grids of random scales and zero points, and on many threads."""
    weight = normal(9, 50)
    scales, zeros = normal(6, 9, 3, seed=1).abs() + 0.05, normal(6, 9, 3, seed=2).mul(3).round().clamp(0, 7)
    scales[4], zeros[4] = scales[1], zeros[1]
    padded = torch.nn.functional.pad(weight, (0, 7)).view(1, 9, 3, 19).double()
    s, z = scales.double()[..., None], zeros.double()[..., None]
    errors = (padded - (((padded / s).round() + z).clamp(0, 7) - z) * s).abs().pow(2.4).sum(-1)
    wanted = errors.argmin(0)
    assert (wanted != 4).all()
    assert torch.equal(best_ranges(weight, scales, zeros, size=19, top=7), wanted)
    monkeypatch.setattr(ranges, "WORTH_A_THREAD", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: 20)
    assert torch.equal(best_ranges(weight, scales, zeros, size=19, top=7), wanted)
    with reference_only():
        assert torch.equal(best_ranges(weight, scales, zeros, size=19, top=7), wanted)


# --- attention --------------------------------------------------------------------------------------------------------


def heads(batch: int, length: int, count: int, width: int, seed: int) -> torch.Tensor:
    """As models have them: tokens first, then heads."""
    return normal(batch, length, count, width, seed=seed).transpose(1, 2)


def agrees(query, key, value, **more) -> None:
    """As exact as PyTorch's own in the same dtype, or as the rounding of the largest product allows."""
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), **more)
    theirs = scaled_dot_product_attention(query, key, value, **more)
    found = causal_attention(query, key, value, **more)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    scale = query.shape[-1] ** -0.5 if more.get("scale") is None else more["scale"]
    largest = float(query.norm(dim=-1).max() * key.norm(dim=-1).max()) * scale
    assert (found - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-7 * (1 + largest)


@needs_compiler
@pytest.mark.parametrize("length", [1, 7, 8, 31, 33, 64, 200])
@pytest.mark.parametrize(("count", "shared", "width", "wide"), [(4, 4, 32, 32), (4, 2, 16, 48), (3, 1, 128, 80)])
def test_attention_is_that_of_pytorch(length, count, shared, width, wide, monkeypatch):
    query, key, value = (
        heads(2, length, count, width, 0),
        heads(2, length, shared, width, 1),
        heads(2, length, shared, wide, 2),
    )
    grouped = {"enable_gqa": True} if count != shared else {}
    with monkeypatch.context() as patched:
        patched.setattr(
            "torch.nn.functional.scaled_dot_product_attention", lambda *given, **more: pytest.fail("not ours")
        )
        causal_attention(query, key, value, is_causal=True, **grouped)
    agrees(query, key, value, is_causal=True, **grouped)
    agrees(query.contiguous(), key.contiguous(), value.contiguous(), is_causal=True, scale=0.7, **grouped)
    agrees(100 * query, key, value, is_causal=True, **grouped)  # one key has nearly all the weight


@needs_compiler
def test_threads_change_nothing_in_attention(monkeypatch):
    given = [heads(3, 50, 4, 16, seed) for seed in range(3)]
    one = causal_attention(*given, is_causal=True)
    monkeypatch.setattr(attention, "WORTH_A_THREAD", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: 50)
    assert torch.equal(causal_attention(*given, is_causal=True), one)


def test_any_other_attention_is_left_to_pytorch():
    query, key, value = (heads(2, 20, 4, 16, seed) for seed in range(3))
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    agrees(query, key, value)
    agrees(query, key, value, attn_mask=mask)
    agrees(query[..., :12], key[..., :12], value, is_causal=True)
    agrees(query[:, :, :5], key, value)
    agrees(query.transpose(2, 3), key.transpose(2, 3), value.transpose(2, 3), is_causal=True)
    assert causal_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), is_causal=True).dtype == torch.bfloat16
    assert causal_attention(query.requires_grad_(), key, value, is_causal=True).requires_grad
    with pytest.raises(RuntimeError):
        causal_attention(query, key[:, :2], value[:, :2], is_causal=True)


@needs_compiler
def test_what_is_not_a_number_stays_that():
    query, key, value = (heads(1, 40, 2, 16, seed) for seed in range(3))
    key[0, 1, 20, 3] = float("nan")
    with torch.no_grad():
        found = causal_attention(query, key, value, is_causal=True)
    assert torch.isfinite(found[0, 0]).all() and torch.isfinite(found[0, 1, :20]).all()
    assert found[0, 1, 20:].isnan().all()


# --- building ---------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("flag", ["-march=native", "-O2", "-march=none-such"])
def test_code_for_any_processor_gives_the_same(fresh, monkeypatch, flag):
    """A compiler that does not know the one at hand builds for all of its kind."""
    monkeypatch.setattr(native, "FOR_THIS_PROCESSOR", flag)
    agrees(heads(1, 50, 2, 48, 0), heads(1, 50, 2, 48, 1), heads(1, 50, 2, 48, 2), is_causal=True)
    weight, spread = normal(70, 40), spread_of(40)
    grid = fit_grid(weight, 3, 16)
    codes, off, _ = swept(weight, grid, spread)
    with reference_only():
        expected, wanted, _ = swept(weight, grid, spread)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(off, wanted)
    shrunk = fit_grid(weight, 3, 16, shrink=True)
    with reference_only():
        assert lost(weight, shrunk) == pytest.approx(lost(weight, fit_grid(weight, 3, 16, shrink=True)), rel=1e-5)
    assert len(list(fresh.iterdir())) == 3


@needs_compiler
def test_attention_by_plain_instructions_is_as_exact_and_not_taken(fresh, monkeypatch):
    monkeypatch.setattr(native, "FOR_THIS_PROCESSOR", "-O2")
    found = native.library("attention", "-ffp-contract=fast")
    if found.worth_it():
        pytest.skip("all processors of this kind fuse")
    assert attention._entry() is None
    monkeypatch.setattr(attention, "_entry", lambda: attention.declared(found))
    agrees(heads(2, 50, 2, 48, 0), heads(2, 50, 2, 48, 1), heads(2, 50, 2, 48, 2), is_causal=True)


@needs_compiler
def test_a_kernel_is_built_once_and_mended_where_it_is_damaged(fresh, tmp_path, monkeypatch):
    assert attention._entry() is not None
    (built,) = fresh.iterdir()
    forget()
    with monkeypatch.context() as patched:
        patched.setattr(native, "_build", lambda *given: pytest.fail("built again"))
        assert attention._entry() is not None
    elsewhere = tmp_path / "elsewhere"  # a library that is open keeps its name
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere))
    damaged = elsewhere / "tersely" / "kernels" / built.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(built.read_bytes()[:100])
    forget()
    assert attention._entry() is not None
    assert damaged.stat().st_size == built.stat().st_size and list(damaged.parent.iterdir()) == [damaged]


@pytest.mark.parametrize("command", ["", "no-such-compiler", "false", "false --with 'an option'"])
def test_without_a_compiler_the_reference_runs_and_one_line_says_so(fresh, monkeypatch, caplog, command):
    if command:
        monkeypatch.setenv("CXX", command)
    else:
        monkeypatch.setenv("PATH", os.devnull)
    weight, spread = normal(20, 64), spread_of(64)
    grid = fit_grid(wide(weight), 4, 32)
    with caplog.at_level(logging.WARNING):
        codes, _ = rounded_with_feedback(weight, grid, spread)
        rounded_with_feedback(weight, grid, spread)
        agrees(*(heads(1, 20, 2, 16, seed) for seed in range(3)), is_causal=True)
    assert 1 <= len(caplog.messages) <= 2 and all("PyTorch run" in line for line in caplog.messages)
    with reference_only():
        assert torch.equal(codes, rounded_with_feedback(weight, grid, spread)[0])
    assert not fresh.exists() or not list(fresh.iterdir())


@needs_compiler
def test_a_place_that_cannot_be_written_is_no_error(fresh, monkeypatch, caplog):
    blocked = Path(os.environ["XDG_CACHE_HOME"], "file")
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert attention._entry() is None
    assert "cannot build" in caplog.text

"""SINQ: the published iteration step by step, scales of columns that change what they should, and nothing else.

W is a weight, W' what it becomes, t the scales of its columns, I(W) its imbalance.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from families import tiny_batch, tiny_config, tiny_model
from tersely.anatomy import anatomy_of
from tersely.errors import AnatomyError, NumericalError, RecipeError
from tersely.linalg.grid import Scales, fit_grid
from tersely.linalg.hessian import feedback
from tersely.linalg.sinkhorn import balance, column_balance
from tersely.methods.quantize.gptq import GPTQ, rounded_with_feedback
from tersely.methods.quantize.rtn import RoundToNearest
from tersely.methods.quantize.sinq import SinkhornNormalized, magnitude
from tersely.rewrite.pre_sinq import FoldedSinkhorn
from tersely.stats import AbsMean, Gram, Stats


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def uneven(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Rows and columns whose deviations are log-normal."""
    return (
        normal(rows, columns, seed=seed)
        * (0.4 * normal(rows, 1, seed=seed + 1)).exp()
        * (0.5 * normal(1, columns, seed=seed + 2)).exp()
    )


def observed(x: Tensor) -> Stats:
    stats = Stats({Gram: Gram(x.shape[1]), AbsMean: AbsMean(x.shape[1])})
    stats.update(x)
    return stats


def imbalance(matrix: Tensor) -> float:
    deviations = torch.cat([matrix.std(0), matrix.std(1)])
    return (deviations.max() / deviations.min().clamp(min=1e-12)).item()


def relative(weight: Tensor, dense: Tensor) -> float:
    return ((weight - dense).norm() / weight.norm()).item()


# --- the iteration ----------------------------------------------------------------------------------------------------

WORKED = torch.tensor([[4.0, -1.0, 0.5, 0.1], [-3.0, 1.0, 0.2, -0.3], [2.0, 0.5, -0.4, 0.2]], dtype=torch.float64)


def published(matrix: Tensor, rounds: int) -> tuple[Tensor, Tensor, list[float]]:
    """The iteration as it is written down, entry by entry: log scales of rows and columns, and every imbalance."""
    rows, columns = matrix.shape

    def deviation(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))

    def clamp(value: float, low: float, high: float) -> float:
        return min(max(value, low), high)

    def of(c: list[list[float]]) -> tuple[list[float], list[float]]:
        return [deviation(row) for row in c], [deviation([row[j] for row in c]) for j in range(columns)]

    w = matrix.tolist()
    row, column = of(w)
    tau = min(clamp(sd, 1e-3, 1e3) for sd in row + column) + 1e-6
    u, v = [0.0] * rows, [0.0] * columns
    best, best_u, best_v = max(row + column) / max(min(row + column), 1e-12), u, v
    stopped, seen = False, []
    for _ in range(rounds):
        c = [[w[i][j] / math.exp(v[j]) / math.exp(u[i]) for j in range(columns)] for i in range(rows)]
        row, column = of(c)
        now = max(row + column) / max(min(row + column), 1e-12)
        seen.append(now)
        if now <= best:
            best, best_u, best_v = now, u, v
        else:
            stopped = True
        if not stopped:
            v = [
                clamp(log + math.log(clamp(clamp(sd, 1e-3, 1e3) / tau, 0.7, 2.0)), -0.3, 10)
                for log, sd in zip(v, column, strict=True)
            ]
            u = [
                clamp(log + math.log(clamp(clamp(sd, 1e-3, 1e3) / tau, 0.7, 2.0)), -0.3, 10)
                for log, sd in zip(u, row, strict=True)
            ]
    return torch.tensor(best_u, dtype=torch.float64), torch.tensor(best_v, dtype=torch.float64), seen


def test_the_iteration_by_hand():
    """Two steps on 3 x 4: τ is the deviation of the last column, to which every step leads."""
    deviations = torch.cat([WORKED.std(1), WORKED.std(0)])
    expected = [2.1618, 1.7347, 1.0210, 3.6056, 1.0408, 0.4583, 0.2646]
    torch.testing.assert_close(deviations, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-5)
    tau = deviations.min() + 1e-6
    # all but the last two columns exceed τ at least twice: their logarithms rise by log 2
    first = (deviations / tau).clamp(0.7, 2).log()
    assert first.div(math.log(2)).tolist() == pytest.approx([1, 1, 1, 1, 1, math.log2(0.4583 / 0.2646), 0], abs=1e-3)
    mu, t, left = balance(WORKED[None], 2)
    torch.testing.assert_close(torch.cat([mu[0], t[0]]), first.exp())
    assert left.item() == pytest.approx(imbalance(WORKED / mu[0][:, None] / t[0]), rel=1e-9)
    assert left.item() < imbalance(WORKED)


@pytest.mark.parametrize("rounds", [1, 2, 3, 5, 8, 16])
def test_every_step_is_the_published_one(rounds):
    for matrix in (WORKED, uneven(20, 7), uneven(5, 12, seed=9) * 30, uneven(8, 8) * 3e-3):
        u, v, seen = published(matrix, rounds)
        mu, t, left = balance(matrix[None], rounds)
        torch.testing.assert_close(mu[0].log(), u, rtol=0, atol=1e-9)
        torch.testing.assert_close(t[0].log(), v, rtol=0, atol=1e-9)
        assert left.item() == pytest.approx(min(seen), rel=1e-9)


def test_imbalances_are_those_that_the_card_has():
    """The sequence overshoots, and the best iterate is kept: none is worse than the start."""
    falls, rises = 0, 0
    for seed in range(0, 30, 3):
        matrix = uneven(256, 64, seed=seed)
        found = [balance(matrix[None], rounds)[2].item() for rounds in range(1, 17)]
        assert all(later <= earlier for earlier, later in pairwise(found))
        assert found[0] == pytest.approx(imbalance(matrix), rel=1e-9)
        falls += found[-1] < found[0] / 4
        mu, t, left = balance(matrix[None], 16)
        assert left.item() == pytest.approx(imbalance(matrix / mu[0][:, None] / t[0]), rel=1e-9)
        _, _, seen = published(matrix[:, :20], 16)
        rises += max(later / earlier for earlier, later in pairwise(seen)) > 1
    assert falls == 10 and rises > 0
    even = normal(256, 64)
    assert imbalance(even) < 1.9 and balance(even[None], 16)[2].item() < 1.01


def test_slabs_do_not_see_each_other():
    slabs = torch.stack([uneven(10, 6), 100 * uneven(10, 6, seed=5), normal(10, 6)])
    together = balance(slabs, 16)
    for place, slab in enumerate(slabs):
        for of_all, alone in zip(together, balance(slab[None], 16), strict=True):
            torch.testing.assert_close(of_all[place], alone[0])


def test_a_last_slab_may_be_narrower_and_lines_are_left_alone():
    weight = uneven(12, 50)
    deviation = weight.std()
    t = column_balance(weight, 16, 16)
    torch.testing.assert_close(t[48:], balance((weight / deviation)[None, :, 48:], 16)[1][0])
    torch.testing.assert_close(t[16:32], balance((weight / deviation)[None, :, 16:32], 16)[1][0])
    for line in (weight[:1], weight[:, :1], weight[:1, :1]):
        assert (column_balance(line, 16, 16) == 1).all()
    assert (column_balance(weight[:, :17], 16, 16)[16:] == 1).all()


@pytest.mark.parametrize("power", [-110, -20, 40])
def test_the_unit_of_a_weight_does_not_matter(power):
    """The constants of the iteration are absolute; the weight is divided by its deviation first."""
    weight = uneven(16, 40).float()
    assert torch.equal(column_balance(weight * 2.0**power, 16, 16), column_balance(weight, 16, 16))


def test_rows_and_columns_of_zeros_are_survived():
    weight = uneven(12, 32)
    weight[3], weight[:, 5] = 0.0, 0.0
    for matrix in (weight, torch.zeros(4, 32), torch.full((4, 32), 0.3)):
        t = column_balance(matrix, 16, 16)
        assert t.isfinite().all() and (t > 0).all()
        module = SinkhornNormalized(group=16).compress(matrix, Stats(), 4)
        assert relative(matrix, module.to_dense()) < 0.2 or not matrix.any()


# --- the method -------------------------------------------------------------------------------------------------------


def test_scaling_the_rows_changes_no_code():
    """They have a scale and a zero point of their own anyway; hence μ is not stored."""
    weight = uneven(64, 64)
    mu, t, _ = balance((weight / weight.std())[None], 16)
    columns = Scales.of(t[0])
    for bits in (2, 3, 4):
        plain = fit_grid(weight, bits, 64, columns=columns, format="float32")
        guided = fit_grid(weight / mu[0][:, None], bits, 64, columns=columns, format="float32")
        differ = plain.nearest(weight) != guided.nearest(weight / mu[0][:, None])
        assert not differ.any()


def test_uneven_columns_gain_and_even_ones_lose_nothing():
    """Card: .515 → .449, .249 → .191, .119 → .0904 at 2, 3, 4 bits; white Gaussian matrices .0903 → .0908."""
    known = {2: (0.515, 0.449), 3: (0.249, 0.191), 4: (0.119, 0.0904)}
    for bits, (before, after) in known.items():
        lost = {"rtn": 0.0, "sinq": 0.0}
        for seed in range(0, 30, 3):
            weight = uneven(256, 64, seed=seed)
            lost["rtn"] += relative(weight, RoundToNearest().compress(weight, Stats(), bits).to_dense()) / 10
            lost["sinq"] += relative(weight, SinkhornNormalized().compress(weight, Stats(), bits).to_dense()) / 10
        assert lost["rtn"] == pytest.approx(before, rel=0.06)
        assert lost["sinq"] == pytest.approx(after, rel=0.06)
    even = normal(256, 256)
    plain = relative(even, RoundToNearest().compress(even, Stats(), 4).to_dense())
    assert relative(even, SinkhornNormalized().compress(even, Stats(), 4).to_dense()) < 1.015 * plain


def test_outputs_gain_most_where_inputs_are_quiet_when_columns_are_large():
    weight = uneven(256, 64)
    x = normal(500, 64, seed=8) / weight.std(0)
    lost = []
    for method in (RoundToNearest(), SinkhornNormalized()):
        off = weight - method.compress(weight, Stats(), 3).to_dense()
        lost.append(((x @ off.T).norm() / (x @ weight.T).norm()).item())
    assert lost[1] < 0.65 * lost[0]


def test_without_rounds_it_is_rounding_to_nearest():
    weight = uneven(32, 100)
    ours = SinkhornNormalized(rounds=1).compress(weight, Stats(), 3)
    assert torch.equal(ours.codes, RoundToNearest().compress(weight, Stats(), 3).codes)


@pytest.mark.parametrize(
    ("asked", "bits"),
    [
        ({}, 3),
        ({"scale": "log8"}, 4),
        ({"shift": False}, 4),
        ({"levels": "nf4"}, 4),
        ({"levels": "nf4", "shift": False, "scale": "log8"}, 4),
        ({"levels": "nf3"}, 3),
        ({"robust": True}, 3),
        ({"calibrated": True}, 3),
        ({"feedback": True}, 3),
        ({"calibrated": True, "feedback": True, "levels": "nf4"}, 4),
    ],
)
@pytest.mark.parametrize("shape", [(24, 64), (7, 50)])
def test_options_say_what_compress_makes(asked, bits, shape):
    method, weight, stats = (
        SinkhornNormalized(group=16, **asked),
        uneven(*shape),
        observed(uneven(300, shape[1], seed=4)),
    )
    nothing, *options = method.options(weight, stats)
    metric = stats[Gram].mean() if method.needs else torch.eye(shape[1], dtype=torch.float64)
    assert nothing.error == pytest.approx((weight @ metric @ weight.T).trace().item(), rel=1e-9)
    (option,) = (option for option in options if option.amount == bits)
    module = method.compress(weight, stats, bits)
    off = weight - module.to_dense()
    assert module.nbytes() == option.nbytes and module.columns is not None
    assert option.error == pytest.approx((off @ metric @ off.T).trace().item(), rel=1e-6)


def test_bytes_by_hand():
    """128 x 128 at 3 bits in groups of 64: codes, two scales a row, two zero points in a byte, and the columns."""
    sizes = {o.amount: o.nbytes for o in SinkhornNormalized().sizes((128, 128), 4)}
    assert sizes[3] == 128 * (48 + 4 + 1) + 256
    (_, nf4) = SinkhornNormalized(levels="nf4", scale="log8").sizes((128, 128), 4)
    assert nf4.nbytes == 128 * (64 + 2 + 4) + 256


def test_with_feedback_scales_of_columns_need_no_hessian_of_their_own():
    """GPTQ on W / t with diag(t) H diag(t) decides alike."""
    weight, stats = uneven(20, 48), observed(uneven(300, 48, seed=4) @ normal(48, 48, seed=6))
    gram = stats[Gram].mean()
    t = Scales.of(column_balance(weight, 16, 16))
    values = t.values().double()
    grid = fit_grid(weight, 3, 16, columns=t)
    inner = fit_grid(weight / values, 3, 16)
    assert torch.equal(grid.scales.raw, inner.scales.raw)
    spread = feedback(gram, damping=0.01, loudest_first=False)
    damped = gram + spread.added * torch.eye(48, dtype=torch.float64)
    ours, lost = rounded_with_feedback(weight, grid, spread)
    scaled = feedback(values[:, None] * damped * values, damping=0.0, loudest_first=False)
    theirs, _ = rounded_with_feedback(weight / values, inner, scaled)
    assert torch.equal(ours, theirs)
    off = weight - grid.levels(ours)
    assert lost == pytest.approx((off @ gram @ off.T).trace().item(), rel=1e-9)


def test_feedback_without_scaling_is_gptq():
    weight, stats = uneven(20, 48), observed(uneven(300, 48, seed=4) @ normal(48, 48, seed=6))
    ours = SinkhornNormalized(group=16, rounds=1, feedback=True).compress(weight, stats, 3)
    assert torch.equal(ours.codes, GPTQ(group=16).compress(weight, stats, 3).codes)


def test_calibration_is_never_worse_than_none_in_its_own_norm():
    for seed in range(3):
        weight, x = uneven(32, 64, seed=seed), uneven(400, 64, seed=seed + 20)
        stats = observed(x)
        metric = stats[Gram].mean()
        for bits in (2, 3, 4):
            blind, seeing = (
                magnitude(weight - SinkhornNormalized(calibrated=c).compress(weight, stats, bits).to_dense(), metric)
                for c in (False, True)
            )
            assert seeing <= blind * (1 + 1e-6)


def test_the_norm_of_calibration_is_the_mean_error_of_an_output():
    """Up to √(2/π), as errors are sums over many inputs and nearly normal, whatever the inputs are."""
    weight = uneven(64, 128)
    x = normal(2000, 128, seed=3).sign() * normal(2000, 128, seed=4).abs() ** 2 @ normal(128, 128, seed=5)
    off = weight - RoundToNearest().compress(weight, Stats(), 3).to_dense().double()
    told = math.sqrt(2 / math.pi) * magnitude(off, observed(x)[Gram].mean())
    assert told == pytest.approx((x @ off.T).abs().mean(0).sum().item(), rel=0.02)


def test_the_unit_of_the_inputs_does_not_matter():
    weight, x = uneven(16, 48), uneven(200, 48, seed=4)
    x[:, 7] = 0.0
    for asked in ({"calibrated": True}, {"feedback": True}):
        method = SinkhornNormalized(group=16, **asked)
        codes = [method.compress(weight, observed(x * unit), 3).codes for unit in (1.0, 2.0**-90, 2.0**90)]
        assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])


def test_wrong_requests_are_refused():
    for wrong in (
        {"levels": "nf5"},
        {"levels": "nf4", "width": 3},
        {"rounds": 0},
        {"scale": "float8"},
        {"group": -1},
        {"robust": True, "shift": False},
        {"damping": -1.0},
        {"shift": False, "width": 1},
    ):
        with pytest.raises(RecipeError, match=r"wanted|known"):
            SinkhornNormalized(**wrong)
    with pytest.raises(RecipeError, match="wanted 4"):
        SinkhornNormalized(levels="nf4").compress(normal(4, 8), Stats(), 3)
    with pytest.raises(NumericalError, match="finite"):
        SinkhornNormalized(group=4).compress(normal(4, 8) / 0, Stats(), 3)


# --- without overhead -------------------------------------------------------------------------------------------------


def rewritten(rewrite: FoldedSinkhorn, family: str, **settings: object) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits before and after, and what changed."""
    config = tiny_config(family)
    for name, value in settings.items():
        setattr(config, name, value)
    model = tiny_model(family, config=config)
    anatomy = anatomy_of(model)
    rewrite.check(anatomy, model.config)
    with torch.no_grad():
        before = model(**tiny_batch()).logits
        state = dict(model.state_dict())
        changed: dict[str, Tensor] = {}
        for index in range(len(anatomy.blocks)):
            changed |= rewrite.block(anatomy, index, state, {})
        model.load_state_dict(state | changed)
        return before, model(**tiny_batch()).logits, changed


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("values", [False, True])
def test_folded_scales_leave_the_logits(family, values):
    before, after, changed = rewritten(FoldedSinkhorn(group=8, sweeps=2, values=values), family)
    assert changed
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


def test_folded_scales_leave_the_logits_where_linears_have_biases():
    rewrite = FoldedSinkhorn(group=0, values=True)
    before, after, _ = rewritten(rewrite, "llama", attention_bias=True, mlp_bias=True)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


def test_every_matrix_is_divided_by_the_scales_of_its_own():
    """q, k and v by those of their rows stacked, down by those of itself: over their medians."""
    model = tiny_model("llama")
    _, _, changed = rewritten(FoldedSinkhorn(group=8), "llama")
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    block = "model.layers.0."
    stacked = torch.cat([state[f"{block}self_attn.{part}_proj.weight"] for part in "qkv"])
    t = column_balance(stacked, 8, 16)
    t = t / t.median()
    for part in "qkv":
        name = f"{block}self_attn.{part}_proj.weight"
        torch.testing.assert_close(changed[name].double(), state[name] / t, rtol=1e-6, atol=1e-7)
    gain = f"{block}input_layernorm.weight"
    torch.testing.assert_close(changed[gain].double(), state[gain] * t, rtol=1e-6, atol=1e-7)
    down = f"{block}mlp.down_proj.weight"
    t = column_balance(state[down], 8, 16)
    torch.testing.assert_close(changed[down].double(), state[down] / (t / t.median()), rtol=1e-6, atol=1e-7)
    assert f"{block}self_attn.o_proj.weight" not in changed


def test_what_cannot_be_folded_is_said():
    assert FoldedSinkhorn().left_alone(anatomy_of(tiny_model("gpt2"))).values()
    model = tiny_model("bert")
    with pytest.raises(AnatomyError, match="residual stream itself"):
        FoldedSinkhorn().check(anatomy_of(model), model.config)
    for wrong in ({"group": -1}, {"rounds": 0}, {"sweeps": 0}):
        with pytest.raises(RecipeError, match="wanted"):
            FoldedSinkhorn(**wrong)

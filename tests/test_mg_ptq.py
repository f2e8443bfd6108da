"""Widths for columns: bytes are met exactly, one width is GPTQ, and the network sees no scale and no seed.

W is a weight, H = G + λI the damped mean of x xᵀ, H⁻¹ = Uᵀ U; e_jk = ‖w_j - Q_k(w_j)‖² / U_jj².
"""

import itertools
import json
import math
from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tersely
from tersely import sweeps
from tersely.errors import NumericalError, RecipeError
from tersely.kinds.columns import order_bytes
from tersely.linalg.grid import FORMS
from tersely.linalg.hessian import feedback
from tersely.methods.quantize.column_budget import RowBytes, divide, row_bytes
from tersely.methods.quantize.gptq import GPTQ
from tersely.methods.quantize.graph_network import adjacency, logits, train
from tersely.methods.quantize.mg_ptq import MixedColumns, sign_grid
from tersely.stats import Gram, Stats
from tersely.steps import compressing
from tersely.steps.learning import taught

WIDTHS = (1, 2, 3, 4)
SHAPES = {"even": (6, 128), "ragged": (5, 100), "narrow": (4, 7), "one column": (3, 1), "one row": (1, 40)}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_network = pytest.mark.parametrize("network", ["graph", "mlp", "none"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


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


def quick(**asked) -> MixedColumns:
    return MixedColumns(**{"steps": 30, "shrink": False} | asked)


def widths_of(module) -> list[int]:
    """Column → its width."""
    found = [0] * module.in_features
    for part, places in zip(module.parts, module.places().split([p.in_features for p in module.parts]), strict=True):
        for column in places.tolist():
            found[column] = part.bits
    return found


# --- one width is GPTQ ------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_with_one_width_it_is_gptq_bit_for_bit(shape, form, bits):
    weight, stats = normal(*shape, dtype=torch.float32), observed(correlated(shape[1]))
    for group, order in ((16, True), (0, False)):
        gptq = GPTQ(group=group, grid=form, act_order=order, width=bits)
        ours = quick(group=group, grid=form, act_order=order, widths=(bits,))
        _, (_, error) = [o.error for o in ours.options(weight, stats)], gptq.options(weight, stats)
        (_, offered), wanted = ours.options(weight, stats), gptq.compress(weight, stats, bits)
        module = ours.compress(weight, stats, offered.amount)
        assert offered.error == pytest.approx(error.error, rel=1e-4, abs=1e-7 * gptq.options(weight, stats)[0].error)
        (part,) = module.parts
        assert part.spec() == wanted.spec()
        for name, tensor in wanted.state_dict().items():
            assert torch.equal(part.state_dict()[name], tensor), name
        assert torch.equal(module.to_dense(), wanted.to_dense())


def test_a_column_by_itself_loses_what_is_said_of_it():
    """With uncorrelated inputs, no damping and one group nothing is passed on: Σ e_jk is the error of GPTQ."""
    weight, gram = normal(6, 20), torch.diag(torch.logspace(-2, 2, 20, dtype=torch.float64))
    for width in (1, 2, 3):
        method = quick(widths=(width,), network="none", damping=0.0, group=0)
        seen = method._seen(weight, of_gram(gram))
        assert method.options(weight, of_gram(gram))[1].error == pytest.approx(
            seen.costs.sum().item() * 2.0 ** (2 * int(torch.frexp(weight.abs().max()).exponent)), rel=1e-6
        )


def test_one_bit_is_sign_and_mean():
    weight = normal(5, 70)
    grid = sign_grid(weight, 32)
    levels = grid.levels(grid.nearest(weight)).double()
    assert torch.equal(levels.sign(), weight.sign())
    for rows, off in zip(weight.split(32, 1), levels.split(32, 1), strict=True):
        torch.testing.assert_close(off.abs()[:, 0], rows.abs().mean(1), rtol=1e-3, atol=0)
        best = (rows - off).square().sum()
        assert all((rows - off * by).square().sum() >= best * (1 - 1e-6) for by in (0.9, 1.1))
    weight[1] = 0
    assert not sign_grid(weight, 0).levels(sign_grid(weight, 0).nearest(weight))[1].any()


# --- budgets ----------------------------------------------------------------------------------------------------------


def by_brute_force(costs: numpy.ndarray, budget: RowBytes, nbytes: int) -> float:
    columns, count = costs.shape
    every = numpy.array(list(itertools.product(range(count), repeat=columns)))
    counts = (every[..., None] == numpy.arange(count)).sum(1)
    total = costs[numpy.arange(columns), every].sum(1)
    return float(total[budget.of(counts) == nbytes].min())


def price(costs: numpy.ndarray, places: numpy.ndarray) -> float:
    return float(costs[numpy.arange(len(costs)), places].sum())


def convex(columns: int, count: int, seed: int) -> numpy.ndarray:
    falls = -numpy.sort(-numpy.random.default_rng(seed).exponential(size=(columns, count)), 1)
    return falls.sum(1, keepdims=True) - numpy.cumsum(falls, 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 99), st.data())
def test_of_convex_costs_and_even_prices_it_is_the_optimum(columns, seed, data):
    """Steps by what they gain: no other division of so many bits loses less."""
    costs = convex(columns, 4, seed)
    budget = RowBytes(WIDTHS, numpy.array([[width * n for n in range(columns + 1)] for width in WIDTHS]))
    bits = data.draw(st.integers(columns, 4 * columns))
    places = divide(costs, budget, bits)
    assert budget.of(numpy.bincount(places, minlength=4)) == bits
    assert price(costs, places) == pytest.approx(by_brute_force(costs, budget, bits), rel=1e-9, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 99), st.sampled_from([0, 2, 4]), st.booleans(), st.data())
def test_with_metadata_and_any_costs_the_bytes_are_met_and_two_widths_are_exact(columns, seed, group, zeros, data):
    costs = numpy.random.default_rng(seed).normal(size=(columns, 4))
    for widths in (WIDTHS, (2, 3)):
        budget = row_bytes(columns, widths, group, zeros=zeros)
        nbytes = budget.met(data.draw(st.integers(int(budget.even.min()), int(budget.even.max()))))
        mine = costs[:, : len(widths)]
        places = divide(mine, budget, nbytes)
        assert budget.of(numpy.bincount(places, minlength=len(widths))) == nbytes
        least = by_brute_force(mine, budget, nbytes)
        assert price(mine, places) >= least - 1e-9
        if len(widths) == 2:
            assert price(mine, places) == pytest.approx(least, rel=1e-9, abs=1e-9)


def test_what_cannot_be_met_is_said():
    budget = row_bytes(8, WIDTHS, 0, zeros=True)
    assert budget.met(2) is None
    with pytest.raises(ValueError, match="rows of 2 bytes"):
        divide(numpy.zeros((8, 4)), budget, 2)


@example(3, 240, 0, "asymmetric", 0.1)
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from([0, 16, 64, 128]),
    st.sampled_from(FORMS),
    st.sampled_from([0.1, 0.25, 1.0]),
)
def test_no_option_takes_more_than_the_mean_that_it_stands_for(rows, columns, group, form, spacing):
    """Nor less by a byte a row or more, where means lie that near; the last is all columns at the widest."""
    method = MixedColumns(group=group, grid=form, spacing=spacing)
    _, *sizes = method.sizes((rows, columns), 2)
    budget = row_bytes(columns, WIDTHS, group, zeros=form == "asymmetric")
    assert [s.nbytes for s in sizes] == sorted({s.nbytes for s in sizes})
    for size in sizes:
        assert size.nbytes == rows * size.amount["row"] + order_bytes(columns)
    assert sizes[-1].amount["row"] == budget.even[-1] and sizes[0].amount["row"] == budget.even.min()
    for size in sizes[1:-1]:
        mean = 8 * size.nbytes / (rows * columns)
        asked = math.ceil(mean / spacing - 1e-9) * Fraction(str(spacing))  # 43 steps of .1 are 4.3, in floats less
        assert budget.met(float((asked * rows * columns / 8 - order_bytes(columns)) / rows)) == size.amount["row"]


@every_network
@every_shape
def test_what_is_made_takes_what_was_said(network, shape):
    weight, stats = normal(*shape, dtype=torch.float32), observed(correlated(shape[1]))
    method = quick(network=network, group=16, spacing=0.5)
    whole, *options = method.options(weight, stats)
    assert [o.nbytes for o in (whole, *options)] == [s.nbytes for s in method.sizes(shape, 4)]
    gram = stats[Gram].mean()
    for option in options[:: max(1, len(options) // 3)]:
        module = method.compress(weight, stats, option.amount)
        assert module.nbytes() == option.nbytes
        off = weight.double() - module.to_dense()
        assert ((off @ gram) * off).sum().item() == pytest.approx(option.error, rel=1e-4, abs=1e-7 * whole.error)


# --- what it is worth -------------------------------------------------------------------------------------------------


@every_network
def test_at_the_bytes_of_two_bits_it_loses_less_than_two_bits_for_all(network):
    """Powers of inputs that differ by a thousand, as those of trained models do."""
    width = 128
    x = normal(500, width, seed=3) * torch.logspace(1, -2, width, dtype=torch.float64)
    x = x + 0.5 * x.roll(1, 1)
    weight, stats = normal(96, width, seed=4, dtype=torch.float32), observed(x)
    even = GPTQ(width=2, group=64).options(weight, stats)[1]
    method = quick(network=network, steps=150)
    ours = [o for o in method.options(weight, stats) if 0 < o.nbytes <= even.nbytes][-1]
    assert ours.nbytes <= even.nbytes
    assert ours.error < 0.8 * even.error


# --- the network ------------------------------------------------------------------------------------------------------


def test_without_couplings_there_is_no_graph():
    """A diagonal Gram matrix: U is diagonal, and the graph network is the network without edges, bit for bit."""
    weight, gram = normal(5, 24, dtype=torch.float32), torch.diag(torch.logspace(-1, 1, 24, dtype=torch.float64))
    spread = feedback(gram, damping=0.01, loudest_first=True)
    torch.testing.assert_close(adjacency(spread.inverse(), spread.order).to_dense(), torch.eye(24, dtype=torch.float64))
    methods = [quick(network=network, group=8) for network in ("graph", "mlp")]
    graph, mlp = (method.options(weight, of_gram(gram)) for method in methods)
    assert graph == mlp


def test_edges_are_symmetric_normalised_and_few():
    spread = feedback(observed(correlated(90))[Gram].mean(), damping=0.01, loudest_first=True)
    reach = adjacency(spread.inverse(), spread.order).to_dense()
    assert torch.equal(reach != 0, (reach != 0).T) and torch.allclose(reach, reach.T)
    assert (reach.diagonal() > 0).all() and ((reach != 0).sum(1) >= 33).all()
    assert torch.linalg.eigvalsh(reach).abs().max() <= 1 + 1e-9  # what the normalisation is for


@pytest.mark.parametrize("power", [-60, 3, 60])
def test_the_units_of_weights_and_inputs_change_nothing_that_is_learned(power):
    weight, x, method = normal(8, 30), correlated(30), quick(group=8)
    before = method.lesson(weight, observed(x))
    for after in (
        method.lesson(weight * 2.0**power, observed(x)),
        method.lesson(weight, observed(x * 2.0 ** (power // 2))),
    ):
        torch.testing.assert_close(after.features, before.features, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(after.reach.to_dense(), before.reach.to_dense(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(after.costs, before.costs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("network", ["graph", "mlp"])
def test_columns_that_look_alike_are_treated_alike(network):
    """Features, neighbours and errors are all the same: so are the widths, where one for all takes the asked bytes."""
    width = 32
    values = normal(width)  # every row and every column holds these, in another order
    weight = torch.stack([values.roll(shift) for shift in range(width)])
    stats = of_gram(torch.eye(width, dtype=torch.float64))
    method = quick(network=network, group=0, shrink=True, widths=(2, 3, 4))
    graph = method.lesson(weight, stats)
    said = logits(train([graph], method.widths, 30, 0), graph, torch.tensor([2.0, 3.0, 4.0]), 3.0)
    torch.testing.assert_close(said, said[:1].expand_as(said), rtol=0, atol=1e-9)
    budget = row_bytes(width, method.widths, 0, zeros=True)
    offered = [s.amount for s in MixedColumns(group=0, widths=(2, 3, 4), spacing=0.01).sizes((width, width), 4)]
    for place, bits in enumerate(method.widths):
        amount = {"row": int(budget.even[place]), "widths": [2, 3, 4]}
        assert amount in offered
        fine = quick(network=network, group=0, shrink=True, widths=(2, 3, 4), spacing=0.01)
        assert set(widths_of(fine.compress(weight, stats, amount))) == {bits}


def test_the_seed_decides_and_nothing_else_is_random():
    weight, stats = normal(8, 60, dtype=torch.float32), observed(correlated(60))
    first = quick(group=16).options(weight, stats)
    torch.manual_seed(77)
    assert quick(group=16).options(weight, stats) == first
    others = [quick(group=16, seed=seed).options(weight, stats) for seed in (1, 2)]
    assert all([o.nbytes for o in other] == [o.nbytes for o in first] for other in others)
    assert first != others[0] or first != others[1]


def test_a_network_learns_what_the_sum_of_errors_asks_for():
    """After training the chosen widths lose little more, by that sum, than the least there is."""
    weight, x = normal(64, 96, dtype=torch.float32), normal(500, 96, seed=3)
    stats = observed(x * torch.logspace(1, -1.5, 96, dtype=torch.float64))
    lost = {}
    for network in ("graph", "none"):
        method = quick(network=network, steps=200)
        seen = method._seen(weight, stats)
        state = method._network(seen.graph) if seen.graph else None
        widths = method._divided(seen, state, method._budget(96).met(30))
        lost[network] = seen.costs[torch.arange(96), torch.tensor(widths) - 1].sum().item()
    assert lost["none"] <= lost["graph"] * (1 + 1e-9)
    assert lost["graph"] < 1.5 * lost["none"]


# --- poor data --------------------------------------------------------------------------------------------------------


@every_network
@pytest.mark.parametrize("tokens", [1, 5])
def test_few_tokens_still_give_numbers(network, tokens):
    weight, stats = normal(6, 40, dtype=torch.float32), observed(correlated(40, tokens))
    method = quick(network=network, group=16)
    options = method.options(weight, stats)
    assert all(math.isfinite(o.error) for o in options)
    assert method.compress(weight, stats, options[3].amount).to_dense().isfinite().all()


@every_network
def test_silent_inputs_get_no_bits_that_others_need(network):
    x = correlated(48)
    x[:, 10:20] = 0
    weight, method = normal(6, 48, dtype=torch.float32), quick(network=network, group=16, widths=(2, 3, 4))
    _, *options = method.options(weight, observed(x))
    even = method._budget(48).even.tolist()
    for amount in (option.amount for option in options if option.amount["row"] not in even):
        module = method.compress(weight, observed(x), amount)
        widths = widths_of(module)
        assert not module.to_dense()[:, 10:20].any()
        assert network != "none" or sum(widths[10:20]) / 10 < sum(widths) / 48


@pytest.mark.parametrize("power", [-30, -12, 12, 30])
def test_ten_to_any_power_is_survived(power):
    weight, x = normal(6, 40), correlated(40)
    plain = quick(group=16).options(weight, observed(x))
    for changed in (
        quick(group=16).options(weight * 10.0**power, observed(x)),
        quick(group=16).options(weight, observed(x * 10.0**power)),
    ):
        assert [o.nbytes for o in changed] == [o.nbytes for o in plain]
        assert changed[-1].error / changed[0].error == pytest.approx(plain[-1].error / plain[0].error, rel=0.05)


def test_what_is_not_finite_is_refused():
    weight, stats = normal(4, 12), observed(correlated(12))
    weight[1, 2] = math.nan
    with pytest.raises(NumericalError, match="finite"):
        quick().options(weight, stats)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"network": "tree"}, "network"),
        ({"widths": (3, 2)}, "rising"),
        ({"widths": ()}, "one or more"),
        ({"widths": (0, 2)}, "1 to 8"),
        ({"spacing": 0.0}, "spacing"),
        ({"group": -1}, "group"),
        ({"steps": 0}, "steps"),
        ({"damping": -1.0}, "damping"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_asked_is_refused(asked, message):
    with pytest.raises(RecipeError, match=message):
        MixedColumns(**asked)


# --- once for all linears ---------------------------------------------------------------------------------------------


def test_what_was_learned_is_plain_and_tells_the_method_all_it_needs():
    linears = [(normal(rows, 30, seed=rows, dtype=torch.float32), observed(correlated(30))) for rows in (5, 8)]
    method = quick(group=8)
    learned = method.learned([method.lesson(*linear) for linear in linears])
    knows = method.taught(json.loads(json.dumps(learned)))
    assert not knows.learns
    amount = method.sizes((8, 30), 4)[4].amount
    first, second = knows.compress(*linears[1], amount), knows.compress(*linears[1], amount)
    assert torch.equal(first.to_dense(), second.to_dense()) and first.nbytes() == second.nbytes()
    state = train([method.lesson(*linear) for linear in linears], WIDTHS, method.steps, method.seed)
    assert all(torch.equal(tensor, state[name]) for name, tensor in knows.state.items())


@pytest.fixture
def teaching(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many linears each training saw, in a flow where methods are taught before the sweeps."""
    seen: list[int] = []
    learned = MixedColumns.learned

    def counted(self, lessons):
        seen.append(len(lessons))
        return learned(self, lessons)

    monkeypatch.setattr(MixedColumns, "learned", counted)
    monkeypatch.setattr(compressing, "compress", lambda job, refining: sweeps.compress(taught(job), refining))
    return seen


@pytest.mark.parametrize("propagate", ["none", "block"])
def test_a_run_learns_once_from_all_linears_and_reopens_bit_for_bit(
    propagate, teaching, model_folder, text_file, tmp_path
):
    asked = {"method": "mg_ptq", "bits": 4.0, "allocate": "uniform", "propagate": propagate}
    asked |= {"calibrate": [str(text_file)], "samples": 8, "length": 32}
    asked |= {"options": {"steps": 20, "shrink": False, "group": 16}}
    results = [tersely.compress(model_folder(), tmp_path / name, **asked) for name in ("one", "two")]
    assert teaching == [14, 14]  # two blocks of seven linears, each run once
    sites = results[0].report.sites
    assert 8 * sum(site.nbytes for site in sites) <= 4.0 * sum(s.out_features * s.in_features for s in sites)
    models = [tersely.load(tmp_path / name) for name in ("one", "two")]
    tokens = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        first, second = (model(tokens).logits for model in models)
    assert torch.equal(first, second) and first.isfinite().all()


def test_the_network_none_learns_nothing(teaching, model_folder, text_file, tmp_path):
    tersely.compress(
        model_folder(), tmp_path / "out", method="mg_ptq", bits=4.5, calibrate=[str(text_file)], samples=8, length=32,
        options={"network": "none", "shrink": False, "spacing": 1.0},
    )  # fmt: skip
    assert teaching == []

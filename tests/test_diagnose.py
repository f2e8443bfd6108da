"""A diagnosis of something known says what is known: spectra of given singular values, planted outliers, attention of
given shape, and the identities of the JoMA theory."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import tersely
from tersely.anatomy import Site, anatomy_of
from tersely.checkpoint import open_source, read_tokenizer
from tersely.diagnose import DIAGNOSES, Row, diagnose, joma, tables
from tersely.diagnose.base import Seen, Subject
from tersely.diagnose.joma import HeadSums
from tersely.diagnose.outliers import SPIKE, Moments, Tokens, spikes
from tersely.diagnose.redundancy import angle
from tersely.diagnose.sensitivity import Foretold
from tersely.diagnose.spectra import spectrum
from tersely.errors import AnatomyError, CheckpointError, NumericalError, RecipeError
from tersely.journal import Journal
from tersely.linalg.truncation import output_basis
from tersely.methods import METHODS
from tersely.recipe import Calibration
from tersely.sensitivity import Laboratory
from tersely.stats import Gram, Stats
from tersely.targets import SiteTarget
from tersely.windows import read_windows

DEMO = Path(tersely.__file__).parent / "assets" / "demo"
quick = settings(max_examples=60, deadline=None, database=None)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=draw(seed), dtype=torch.float64)


def orthogonal(side: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(side, side, seed=seed)).Q


def of_weight(weight: Tensor):
    return spectrum(output_basis(weight, vectors=False).energy)


def value(rows: list[Row], name: str, measure: str):
    (found,) = [row["value"] for row in rows if (row["name"], row["measure"]) == (name, measure)]
    return found


# --- spectra ----------------------------------------------------------------------------------------------------------


@quick
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), rank=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_rank_lies_between_one_and_the_rank(rows, columns, rank, seed):
    rank = min(rank, rows, columns)
    found = of_weight(normal(rows, rank, seed=seed) @ normal(rank, columns, seed=seed + 100))
    assert 1 <= found.stable_rank <= rank + 1e-9
    assert 1 - 1e-9 <= found.effective_rank <= rank + 1e-6
    assert 1 <= found.rank90 <= found.rank99 <= rank


@pytest.mark.parametrize("side", [1, 2, 7, 40])
def test_an_orthogonal_weight_uses_all_directions_alike(side):
    found = of_weight(orthogonal(side))
    assert found.stable_rank == pytest.approx(side)
    assert found.effective_rank == pytest.approx(side)
    assert found.rank90 == math.ceil(0.9 * side)
    assert found.rank99 == math.ceil(0.99 * side)


@pytest.mark.parametrize("scale", [1e-140, 1e-8, 1e12, 1e140])
def test_the_scale_of_a_weight_does_not_matter(scale):
    weight = normal(6, 9)
    before, after = of_weight(weight), of_weight(weight * scale)
    assert after.stable_rank == pytest.approx(before.stable_rank)
    assert after.effective_rank == pytest.approx(before.effective_rank)
    assert (after.rank90, after.rank99) == (before.rank90, before.rank99)


def test_a_known_spectrum_gives_known_numbers():
    """Energies 4, 2, 1, 1: shares 1/2, 1/4, 1/8, 1/8, of entropy 7/4 ln 2."""
    singular = torch.tensor([2.0, 2**0.5, 1.0, 1.0], dtype=torch.float64)
    found = of_weight(orthogonal(4) @ torch.diag(singular) @ orthogonal(4, seed=1))
    assert found.stable_rank == pytest.approx(2.0)
    assert found.effective_rank == pytest.approx(2**1.75)
    assert (found.rank90, found.rank99) == (4, 4)
    steep = spectrum(torch.tensor([0.9, 0.09, 0.009, 0.001], dtype=torch.float64))
    assert (steep.rank90, steep.rank99) == (1, 2)


def test_a_zero_weight_has_no_directions():
    assert of_weight(torch.zeros(3, 5)) == spectrum(torch.zeros(0)) == spectrum(torch.zeros(4))
    assert of_weight(torch.zeros(3, 5)).stable_rank == 0.0


@quick
@given(rows=st.integers(2, 8), columns=st.integers(2, 8), seed=st.integers(0, 99))
def test_what_a_truncation_loses_is_bounded_by_its_last_singular_value(rows, columns, seed):
    """‖W - W_r‖² ≤ ‖W‖² - r σ_r²."""
    energy = output_basis(normal(rows, columns, seed=seed), vectors=False).energy
    for rank in range(1, len(energy) + 1):
        assert energy[rank:].sum() <= energy.sum() - rank * energy[rank - 1] + 1e-9


def test_broken_spectra_are_refused():
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(NumericalError, match="not finite"):
            spectrum(torch.tensor([1.0, bad]))


# --- statistics of outliers -------------------------------------------------------------------------------------------


def test_kurtosis_of_known_samples():
    signs = Moments(3)
    signs.update(torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]]))
    assert signs.kurtosis() == pytest.approx(1.0)  # the least there is
    gauss = Moments(100)
    for seed in range(5):
        gauss.update(normal(2000, 100, seed=seed) + 2.0)
    assert gauss.kurtosis() == pytest.approx(3.0, abs=0.03)
    constant = Moments(4)
    constant.update(torch.full((3, 4), 7.0))
    assert constant.kurtosis() is None
    assert Moments(4).kurtosis() is None


@pytest.mark.parametrize("kind", [Moments, Tokens])
def test_statistics_merge_and_come_back(kind):
    x = normal(10, 6)
    whole, first, second = kind(6), kind(6), kind(6)
    whole.update(x)
    first.update(x[:4])
    second.update(x[4:])
    first.merge(second)
    assert torch.allclose(first.mean(), whole.mean(), rtol=1e-12)
    back = kind.restore(whole.state())
    assert torch.equal(back.mean(), whole.mean())
    assert back.tokens == first.tokens == 10


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(NumericalError, match="not finite"):
        Tokens(2).update(torch.tensor([[1.0, float("nan")]]))


# --- attention --------------------------------------------------------------------------------------------------------


def heads_of(attention: Tensor) -> list[joma.Head]:
    sums = HeadSums(attention.shape[1])
    sums.update(attention)
    return sums.heads()


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.float64).tril()


def test_attention_to_everything_is_dense():
    uniform = (causal(9) / causal(9).sum(1, keepdim=True)).expand(2, 3, 9, 9)
    wanted = sum(math.log(keys) for keys in range(2, 10)) / 8
    for head in heads_of(uniform):
        assert head.entropy == pytest.approx(wanted)
        assert head.uniform == pytest.approx(wanted)
        # without the sink one key fewer
        assert head.without_sink == pytest.approx(sum(math.log(keys) for keys in range(1, 9)) / 8)
        assert head.sink == pytest.approx(sum(1 / keys for keys in range(2, 10)) / 8)
        assert head.peaked == 0.0
        assert head.flag == "dense"


def test_attention_to_itself_is_sparse_and_to_the_first_token_a_sink():
    itself = torch.eye(6, dtype=torch.float64)
    first = torch.zeros(6, 6, dtype=torch.float64)
    first[:, 0] = 1.0
    spread = causal(6) / causal(6).sum(1, keepdim=True)  # says which keys the mask allows
    own, sink, _ = heads_of(torch.stack([itself, first, spread])[None])
    assert (own.entropy, own.peaked, own.sink, own.flag) == (0.0, 1.0, 0.0, "sparse")
    assert own.without_sink == 0.0
    assert (sink.entropy, sink.peaked, sink.sink, sink.flag) == (0.0, 1.0, 1.0, "sink-only")
    assert sink.without_sink is None


def test_both_sides_of_a_token_are_counted_where_it_sees_both():
    (head,) = heads_of(torch.full((1, 1, 8, 8), 1 / 8))
    assert head.entropy == pytest.approx(math.log(8)) == pytest.approx(head.uniform)


def test_batches_add_up():
    attention = normal(4, 2, 7, 7).masked_fill(causal(7) == 0, -torch.inf).softmax(-1)
    sums = HeadSums(2)
    sums.update(attention[:1])
    sums.update(attention[1:])
    for ours, whole in zip(sums.heads(), heads_of(attention), strict=True):
        assert ours.entropy == pytest.approx(whole.entropy, rel=1e-12)
        assert ours.without_sink == pytest.approx(whole.without_sink, rel=1e-12)
        assert ours.uniform == pytest.approx(whole.uniform, rel=1e-12)
    with pytest.raises(NumericalError, match="not finite"):
        sums.update(attention * float("nan"))


# --- the theory of joint dynamics -------------------------------------------------------------------------------------


FREQUENCIES = torch.rand(6, 10, generator=draw(1), dtype=torch.float64) / 3


def toy(kind, activation, *, rate: float, temperature: float = 1.0) -> joma.Joint:
    return joma.train_jointly(
        FREQUENCIES,
        normal(6, 5, seed=2),
        kind,
        activation,
        rate=rate,
        steps=round(1 / rate),
        generator=draw(3),
        temperature=temperature,
    )


def drift(kind, activation, rate: float, temperature: float = 1.0) -> float:
    course = toy(kind, activation, rate=rate, temperature=temperature)
    kept = joma.conserved(kind, course, temperature)
    assert (course.logits[-1] - course.logits[0]).abs().max() > 1e-3  # something was learned
    return ((kept - kept[0]).abs().max() / kept[0].abs().max()).item()


@pytest.mark.parametrize("activation", [lambda h: h, torch.relu, torch.tanh], ids=["linear", "relu", "tanh"])
@pytest.mark.parametrize("kind", ["linear", "exp"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_attention_and_mlp_move_together(kind, activation, temperature):
    """Conserved by the flow, so broken by steps in proportion to their length."""
    coarse = drift(kind, activation, 0.01, temperature)
    fine = drift(kind, activation, 0.002, temperature)
    assert fine < 5e-4
    assert coarse / fine == pytest.approx(5, rel=0.15)


def test_softmax_attention_follows_the_mlp_approximately():
    course = toy("softmax", lambda h: h, rate=0.01)
    seen = [joma.attention_of("softmax", FREQUENCIES, z, 1.0).mean(0) for z in course.logits]
    predicted = joma.logits_from_nodes(course, torch.stack(seen).mean(0))
    assert joma.normalised_correlation(predicted, course.logits[-1] - course.logits[0]) > 0.95
    assert torch.stack(seen).sum(1) == pytest.approx(torch.ones(len(seen)).numpy())
    with pytest.raises(ValueError, match="nothing exactly"):
        joma.conserved("softmax", course)


def test_a_linear_mlp_makes_one_winner():
    strengths = torch.tensor([1.0, 0.7, 0.4, -0.9], dtype=torch.float64)
    course = joma.grow(strengths, 0.98 * math.sqrt(math.pi / 2), 4000)
    ratio = torch.erf(course[1:] / math.sqrt(2)) / strengths
    assert ((ratio - ratio[:, :1]) / ratio[:, :1]).abs().max() < 1e-6
    attention = (course.square() / 2).softmax(1)
    entropy = -torch.xlogy(attention, attention).sum(1)
    assert (entropy.diff() < 1e-12).all()
    assert course[-1].abs().argmax() == 0
    with pytest.raises(ValueError, match=r"infinite at t = 1\.253"):
        joma.grow(strengths, 1.26, 10)


def test_a_nonlinear_mlp_converges_at_the_speed_of_attention():
    targets = torch.tensor([2.0, 1.0, 1.5, -0.5], dtype=torch.float64)
    v, integral = joma.converge(targets, 3.0, 3000)
    assert (-(1 - v / targets).log()[1:] / integral[1:] - 1).abs().max() < 1e-4
    # late, the rates of two tokens have the ratio exp((μ_j² - μ_k²) / 2)
    late = integral.diff(dim=0)[-1]
    wanted = ((targets[1] ** 2 - targets[3] ** 2) / 2).exp()
    assert late[1] / late[3] == pytest.approx(wanted.item(), rel=0.03)


def test_attention_gets_sparse_and_then_dense_again():
    """The three numbers of the paper's toy; they vary with the draw of the targets, by a third in other draws."""
    targets = 1 + 3 * torch.rand(10, generator=draw(0), dtype=torch.float64)
    entropy = joma.entropy_of_learning(targets)
    assert entropy[0].item() == pytest.approx(math.log(10))
    assert entropy.min().item() == pytest.approx(0.90, abs=0.03)
    assert int(entropy.argmin()) == pytest.approx(630, abs=20)
    assert entropy[-1].item() == pytest.approx(1.42, abs=0.03)


def test_the_bounce_needs_targets_of_different_size():
    entropy = joma.entropy_of_learning(torch.full((10,), 2.0, dtype=torch.float64), steps=500)
    assert entropy.min().item() == pytest.approx(math.log(10))


def test_correlation():
    x = normal(50)
    assert joma.normalised_correlation(x, 3 * x + 2) == pytest.approx(1.0)
    assert joma.normalised_correlation(x, -x) == pytest.approx(-1.0)
    assert joma.normalised_correlation(x, torch.ones_like(x)) == 0.0


# --- redundancy -------------------------------------------------------------------------------------------------------


@quick
@given(seed=st.integers(0, 99), width=st.integers(1, 8))
def test_an_angle_is_a_metric(seed, width):
    a, b, c = (normal(20, width, seed=3 * seed + k) for k in range(3))
    assert ((angle(a, b) >= 0) & (angle(a, b) <= 1)).all()
    assert torch.equal(angle(a, b), angle(b, a))
    assert (angle(a, c) <= angle(a, b) + angle(b, c) + 1e-7).all()  # which the arc cosine is good to
    assert angle(a, 3 * a).max() < 1e-7
    torch.testing.assert_close(angle(a, -a), torch.ones(20, dtype=torch.float64), rtol=0, atol=1e-7)
    torch.testing.assert_close(angle(a, -b), 1 - angle(a, b), rtol=0, atol=1e-7)


# --- sensitivity ------------------------------------------------------------------------------------------------------


@quick
@given(out=st.integers(1, 6), width=st.integers(1, 6), length=st.integers(2, 20), seed=st.integers(0, 99))
def test_what_is_foretold_is_the_second_order_of_every_token(out, width, length, seed):
    weight, made = normal(out, width, seed=seed), torch.nn.Linear(width, out, bias=False).double()
    x, g = normal(3, length, width, seed=seed + 100), normal(3, length, out, seed=seed + 200)
    y = x @ weight.T
    with torch.no_grad():
        one = Foretold(made)
        for part in (slice(0, 1), slice(1, 3)):
            one.add(x[part], y[part], g[part].float())
        e = made(x) - y
    rise, error = (row["value"] for row in one.rows("a", "b"))
    assert rise == pytest.approx(0.5 * (g * e).sum(-1).square().mean().item(), rel=1e-5, abs=1e-12)
    assert error == pytest.approx((e.square().sum() / y.square().sum()).item(), rel=1e-5)


# --- models -----------------------------------------------------------------------------------------------------------

families = pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3", "mixtral", "bert"])


@families
def test_every_diagnosis_of_a_model_is_plain_and_complete(family, model_folder, text_file):
    found = diagnose(str(model_folder(family)), texts=[str(text_file)], samples=4, length=16)
    assert set(found) == {name for name in DIAGNOSES if family != "bert" or name != "sensitivity"}  # predicts nothing
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for rows in found.values():
        assert rows and all(list(row) == ["name", "measure", "value", "unit"] for row in rows)
        for table in tables(rows):
            assert all(len(line) == len(table.headings) for line in table.lines)
    for head in (row for row in found["joma"] if row["measure"] == "entropy"):
        assert 0 <= head["value"] <= math.log(16)
    for row in found["spectra"]:
        if "rank" in row["measure"]:
            assert 1 <= row["value"] <= 64


def test_the_same_seed_sees_the_same(model_folder, text_file):
    asked = {"what": ["outliers"], "texts": [str(text_file)], "samples": 3, "length": 16}
    assert diagnose(str(model_folder()), **asked) == diagnose(str(model_folder()), **asked)


def test_spectra_of_a_model_are_those_of_its_weights(model_folder, text_file):

    folder = model_folder("gpt2")
    rows = diagnose(str(folder), ["spectra"], [str(text_file)], samples=4, length=16)["spectra"]
    weight = AutoModelForCausalLM.from_pretrained(folder).transformer.h[1].mlp.c_fc.weight
    name = "transformer.h.1.mlp.c_fc"
    squares = torch.linalg.svdvals(weight.detach().double()).square()
    assert value(rows, name, "stable rank") == pytest.approx((squares.sum() / squares[0]).item(), rel=1e-9)
    assert value(rows, name, "smaller side") == 32


def test_attention_of_a_model_is_its_own(model_folder, text_file):
    """A head's entropy, from the probabilities that the model itself returns."""

    folder = model_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    windows = torch.randint(3, 60, (5, 12), generator=draw(0))
    layers = joma.watch(model, windows)
    with torch.no_grad():
        attention = model(windows, output_attentions=True).attentions[1].double()[:, 2, 1:]
    entropy = -(attention * (attention + 1e-30).log()).sum(-1).mean()
    assert layers[1][2].entropy == pytest.approx(entropy.item(), rel=1e-6)
    assert layers[1][2].sink == pytest.approx(attention[..., 0].mean().item(), rel=1e-6)
    assert layers[0][0].uniform == pytest.approx(sum(math.log(t) for t in range(2, 13)) / 11)


def test_a_block_that_does_nothing_is_the_first_that_could_go(model_folder, copy_of, text_file):
    def silence(state):
        for name in state:
            if name.startswith("model.layers.1.") and name.endswith(("o_proj.weight", "down_proj.weight")):
                state[name].zero_()

    rows = diagnose(damaged(copy_of(model_folder()), silence), ["redundancy"], [str(text_file)], samples=4, length=16)
    rows = rows["redundancy"]
    assert value(rows, "model.layers.1", "influence") == pytest.approx(0, abs=1e-12)
    assert value(rows, "model.layers.1", "growth") == pytest.approx(1)
    assert value(rows, "model.layers.0", "influence") > 1e-4
    assert value(rows, "1 in a row", "from block") == 1
    assert value(rows, "1 in a row", "least distance") == pytest.approx(0, abs=1e-7)


def test_the_influence_of_a_block_is_what_the_model_itself_says(model_folder, text_file):
    folder = model_folder()
    rows = diagnose(str(folder), ["redundancy"], [str(text_file)], samples=5, length=16)["redundancy"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    asked = Calibration(source=[str(text_file)], samples=5, length=16)
    tokens = read_windows(asked, AutoTokenizer.from_pretrained(folder), model.config, 0, None).tokens
    with torch.no_grad():
        before, after = (state.double() for state in model(tokens, output_hidden_states=True).hidden_states[:2])
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1).mean().item()
    assert value(rows, "model.layers.0", "influence") == pytest.approx(1 - cosine, rel=1e-6)
    growth = (after.norm(dim=-1) / before.norm(dim=-1)).mean().item()
    assert value(rows, "model.layers.0", "growth") == pytest.approx(growth, rel=1e-6)


def test_sensitivity_does_not_depend_on_how_a_function_is_written_down(model_folder, copy_of, text_file):

    def gain(state):
        state["model.layers.1.mlp.up_proj.weight"] /= 8
        state["model.layers.1.mlp.down_proj.weight"] *= 8

    asked = {"what": ["sensitivity"], "texts": [str(text_file)], "samples": 4, "length": 16}
    plain = diagnose(str(model_folder()), **asked)["sensitivity"]
    louder = diagnose(damaged(copy_of(model_folder()), gain), **asked)["sensitivity"]
    for name in ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"):
        for measure in ("rise at half size", "error at half size", "rise at 4 bits", "error at 4 bits"):
            assert value(louder, name, measure) == pytest.approx(value(plain, name, measure), rel=1e-3)
    assert all(row["value"] > 0 for row in plain if row["measure"].startswith(("rise", "error")))


def test_sensitivity_orders_linears_as_measured_losses_do(tmp_path):
    """Of the bundled model, each linear cut alone; the output errors that every method goes by do far worse."""
    asked = Calibration(source=["stdlib:train[:200000]"], samples=16, length=128)
    rows = diagnose(str(DEMO), ["sensitivity"], asked.source, samples=16, length=128)["sensitivity"]
    source = open_source(DEMO)
    anatomy = anatomy_of(source.skeleton())
    windows = read_windows(asked, read_tokenizer(DEMO), source.config, 0, None).tokens
    laboratory = Laboratory(source, anatomy, windows, "cpu", Journal(tmp_path, 64 * "0"), None, "kl")
    subject = Subject(source, anatomy, windows, "cpu")
    measured = {}
    for seen in subject.blocks([Gram]):
        for site in seen.sites:
            rank = site.out_features * site.in_features // (2 * (site.out_features + site.in_features))
            target = SiteTarget(site, METHODS["svd_llm"]())
            (option,) = [one for one in target.sizes(4) if one.amount == rank]
            (measured[site.name],) = laboratory.harm(len(measured), target, seen.inputs, [option]).values()
    order = {
        measure: spearmanr([value(rows, name, measure) for name in measured], list(measured.values())).statistic
        for measure in ("rise at half size", "error at half size")
    }
    assert order["rise at half size"] > 0.95
    assert order["rise at half size"] > order["error at half size"] + 0.1


def test_sensitivity_is_refused_where_no_token_is_predicted(model_folder, text_file):
    with pytest.raises(AnatomyError, match="predicts no next token"):
        diagnose(str(model_folder("bert")), ["sensitivity"], [str(text_file)], samples=4, length=16)


def damaged(folder, change) -> str:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_a_planted_channel_is_found(model_folder, copy_of, text_file):
    def plant(state):
        state["model.layers.1.input_layernorm.weight"][11] *= 300

    folder = damaged(copy_of(model_folder()), plant)
    rows = diagnose(folder, ["outliers"], [str(text_file)], samples=4, length=16)["outliers"]
    assert value(rows, "model.layers.1:attention.in", "channel") == 11
    assert value(rows, "model.layers.1:attention.in", "channel peak") > 50
    assert value(rows, "model.layers.1:attention.in", "kurtosis") > 10
    assert value(rows, "model.layers.0:attention.in", "channel peak") < 10


def test_a_planted_token_is_found(model_folder, copy_of, text_file):
    """One word of the text gets an embedding that is larger by far; the blocks carry it on."""

    words = AutoTokenizer.from_pretrained(model_folder())(text_file.read_text())["input_ids"]
    rare = min(set(words), key=words.count)

    def plant(state):
        state["model.embed_tokens.weight"][rare] = 0
        state["model.embed_tokens.weight"][rare, 5] = 5000

    folder = damaged(copy_of(model_folder()), plant)
    rows = diagnose(folder, ["outliers"], [str(text_file)], samples=64, length=16)["outliers"]
    for block in ("model.layers.0", "model.layers.1"):
        assert value(rows, block, "token") == rare
        assert value(rows, block, "channel") == 5
        assert value(rows, block, "token peak") > 100
        assert 0 < value(rows, block, "outlier tokens") < 0.2
        assert 0 <= value(rows, block, "position") < 16


def test_a_planted_spike_is_the_first_of_all_projections(model_folder, copy_of, text_file):
    """One hidden channel of an MLP, 3000 times as loud for one token and compensated in the next matrix."""

    def plant(state):
        rows = state["model.layers.0.mlp.up_proj.weight"]
        rows[7] *= 3000
        state["model.layers.0.mlp.down_proj.weight"][:, 7] /= 3000

    folder = damaged(copy_of(model_folder()), plant)
    rows = diagnose(folder, ["outliers"], [str(text_file)], samples=4, length=16)["outliers"]
    largest = {row["name"]: row["value"] for row in rows if row["measure"] == "largest input"}
    assert max(largest, key=largest.__getitem__) == "model.layers.0.mlp.down_proj"
    outputs = {row["name"]: row["value"] for row in rows if row["measure"] == "largest output"}
    assert max(outputs, key=outputs.__getitem__) == "model.layers.0.mlp.up_proj"


def test_a_single_spiking_token_is_flagged():
    site = Site("down", "mlp.down", 0, "block:mlp.middle", 4, 4, False, False)

    def seen(x: Tensor) -> Seen:
        read = Tokens(4)
        read.update(x)
        return Seen(0, "block", (site,), {site.reads: Stats({Tokens: read})}, {site.name: Stats({Tokens: read})})

    x = normal(100, 4)
    assert value(spikes(seen(x)), "down", "flag") is None
    x[17, 2] = 100 * SPIKE
    assert value(spikes(seen(x)), "down", "flag") == "spike"
    assert value(spikes(seen(x)), "down", "largest input") == 100 * SPIKE
    assert value(spikes(seen(torch.zeros(5, 4))), "down", "spike") is None


@pytest.mark.parametrize("what", DIAGNOSES)
def test_broken_weights_are_refused(what, model_folder, copy_of, text_file):
    def plant(state):
        state["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
        state["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")

    folder = damaged(copy_of(model_folder()), plant)
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in .*q_proj\.weight"):
        diagnose(folder, [what], [str(text_file)], samples=2, length=16)


@pytest.mark.parametrize("what", DIAGNOSES)
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_broken_weights_that_no_block_reads_are_refused(name, what, model_folder, copy_of, text_file):
    def plant(state):
        state[name].view(-1)[0] = float("inf")

    folder = damaged(copy_of(model_folder()), plant)
    with pytest.raises(CheckpointError, match=f"NaN or infinite weights in {name}"):
        diagnose(folder, [what], [str(text_file)], samples=2, length=16)


def test_an_unknown_diagnosis_is_named(model_folder):
    with pytest.raises(RecipeError, match="did you mean 'spectra'"):
        diagnose(str(model_folder()), ["spectrum"])


def test_a_compressed_folder_can_be_looked_at(compressed, text_file):
    found = diagnose(str(compressed()), texts=[str(text_file)], samples=4, length=16)
    names = {row["name"] for row in found["spectra"]}
    assert "model.layers.0.mlp.down_proj.up" in names
    assert value(found["joma"], "model.layers.0", "stable rank") >= 1

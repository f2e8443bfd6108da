"""Spikes are found where they were planted, and keeping what spikes from a common scale restores the model.

A spike is planted as a scale: a row of an up projection times f, and the column of the down projection that reads it by
1 / f, leaves the function as it was.
"""

import copy
import json
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import tiny_batch, tiny_model
from tersely.allocate import ALLOCATORS, Curve, Measures
from tersely.anatomy import Site, anatomy_of
from tersely.diagnose import DIAGNOSES, diagnose
from tersely.errors import NumericalError, RecipeError
from tersely.kinds.quantized import quantized_bytes
from tersely.methods.quantize.spike_aware import PROTECTED, SpikeAware
from tersely.option import Option
from tersely.pipeline import compress
from tersely.stats import Gram, Peaks, Stats
from tersely.stats.peaks import spike, weight_spike

UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def planted(model: PreTrainedModel, by: float = 300.0) -> PreTrainedModel:
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_submodule(UP).weight[5] *= by
        model.get_submodule(DOWN).weight[:, 5] /= by
    return model


def read_by(model: PreTrainedModel, site: Site) -> Stats:
    """What a linear of a model reads on the tiny batch."""
    stats = Stats({kind: kind(site.in_features) for kind in (Gram, Peaks)})
    hook = model.get_submodule(site.name).register_forward_pre_hook(lambda module, read: stats.update(read[0].detach()))
    with torch.no_grad():
        model(**tiny_batch())
    hook.remove()
    return stats


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**tiny_batch()).logits.double()


def in_integers(model: PreTrainedModel, method: SpikeAware, bits: int, dense: tuple[str, ...] = ()) -> PreTrainedModel:
    """All linears but those that stay dense."""
    made = copy.deepcopy(model)
    for site in anatomy_of(model).sites:
        if site.name not in dense:
            weight = model.get_submodule(site.name).weight.detach()
            made.set_submodule(site.name, method.compress(weight, read_by(model, site), bits))
    return made


# --- the score --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_spike_is_the_largest_over_the_median_peak(scale):
    x = scale * torch.tensor([[1.0, -2.0], [4.0, 0.0], [0.5, 0.25], [-64.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
    peaks = Peaks(2)
    peaks.update(x)
    largest, usual = peaks.mean().tolist()  # peaks 2, 4, 0.5, 64, 2
    assert (largest, usual) == (64.0 * scale, pytest.approx(2.0 * scale, rel=0.005))
    assert spike(largest, usual) == pytest.approx(32.0, rel=0.005)
    assert weight_spike(x) == pytest.approx(32.0)


def test_a_spike_of_nothing_is_none_and_one_above_nothing_is_infinite():
    assert spike(0.0, 0.0) == 0.0 and spike(1.0, 0.0) == math.inf
    assert weight_spike(torch.zeros(3, 4)) == 0.0


def test_planting_changes_no_function():
    model = tiny_model("llama").double()
    torch.testing.assert_close(logits(planted(model)), logits(model))


def scores(model: PreTrainedModel) -> dict[str, float]:
    """By falling spike."""
    found = {}
    for site in anatomy_of(model).sites:
        of_input = spike(*read_by(model, site)[Peaks].mean().tolist())
        found[site.name] = max(of_input, weight_spike(model.get_submodule(site.name).weight))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def test_the_planted_projections_score_highest():
    assert set(list(scores(planted(tiny_model("llama"))))[:2]) == {UP, DOWN}


# --- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [6, 8])
def test_one_scale_serves_all_of_a_weight_and_bytes_are_exact(bits):
    weight, stats = normal(7, 20), Stats({kind: kind(20) for kind in (Gram, Peaks)})
    stats.update(normal(50, 20, seed=1))
    made = SpikeAware().compress(weight, stats, bits)
    assert len(made.scales.unique()) == 1
    assert made.input_bits == bits and made.bound.view(torch.float32).item() == pytest.approx(stats[Peaks].mean()[0])
    step = weight.abs().max().item() / (2 ** (bits - 1) - 1)
    assert (weight - made.to_dense()).abs().max() <= step / 2 * 1.001
    (size,) = SpikeAware(width=bits).sizes((7, 20), 4)[1:]
    assert size.nbytes == made.nbytes() == quantized_bytes((7, 20), bits, 0, zeros=False) + 4


def test_what_spikes_is_protected_at_the_same_bytes():
    weight, x = normal(7, 20), normal(50, 20, seed=1)
    plain, loud = (Stats({kind: kind(20) for kind in (Gram, Peaks)}) for _ in range(2))
    plain.update(x)
    spiking = x.clone()
    spiking[11, 3] = 1000.0
    loud.update(spiking)
    large = weight.clone()
    large[2] *= 300
    method = SpikeAware(width=8)
    usual = method.compress(weight, plain, 8)
    for made in (method.compress(weight, loud, 8), method.compress(large, plain, 8)):
        assert made.input_bits == PROTECTED and len(made.scales.unique()) > 1
        assert made.nbytes() == usual.nbytes()
    assert SpikeAware(width=8, spike=math.inf).compress(large, loud, 8).input_bits == 8


def test_predicted_errors_are_the_measured_ones():
    """The rounding of inputs counts as even noise, which it nearly is."""
    weight, x = normal(40, 60), normal(4000, 60, seed=1)
    stats = Stats({kind: kind(60) for kind in (Gram, Peaks)})
    stats.update(x)
    for option in SpikeAware().options(weight, stats)[1:]:
        made = SpikeAware().compress(weight, stats, option.amount)
        measured = (x @ weight.T - made(x)).square().sum(-1).mean().item()
        assert option.error == pytest.approx(measured, rel=0.05)


def test_protecting_the_planted_restores_and_protecting_others_does_not():
    model = planted(tiny_model("llama"))
    wanted, never = logits(model), SpikeAware(spike=math.inf)

    def off(made: PreTrainedModel) -> float:
        return (logits(made) - wanted).norm().item() / wanted.norm().item()

    others = [s.name for s in anatomy_of(model).sites if s.name not in (UP, DOWN)]
    naive, kept = off(in_integers(model, never, 8)), off(in_integers(model, never, 8, (UP, DOWN)))
    random = [off(in_integers(model, never, 8, (others[place], others[-place - 1]))) for place in range(3)]
    _, second, third, *_ = scores(model).values()
    by_itself = off(in_integers(model, SpikeAware(spike=math.sqrt(second * third)), 8))
    assert kept < 0.2 * naive and by_itself < 0.2 * naive
    assert min(random) > 0.7 * naive


@pytest.mark.parametrize("wrong", [{"width": 1}, {"width": 9}, {"spike": 0.0}, {"spike": float("nan")}], ids=str)
def test_settings_that_do_not_exist_are_refused(wrong):
    with pytest.raises(RecipeError, match="wanted"):
        SpikeAware(**wrong)


def test_inputs_that_are_silent_or_not_finite():
    weight, stats = normal(4, 6), Stats({kind: kind(6) for kind in (Gram, Peaks)})
    stats.update(torch.zeros(5, 6))
    assert SpikeAware().compress(weight, stats, 8)(normal(2, 6)).isfinite().all()
    stats.update(torch.full((1, 6), float("inf")))
    with pytest.raises(NumericalError, match="finite"):
        SpikeAware().compress(weight, stats, 8)


# --- the allocator ----------------------------------------------------------------------------------------------------


def curves() -> list[Curve]:
    sizes = {"a": 100, "b": 100, "c": 300, "d": 100}
    return [Curve(n, size, None, (Option(8, size // 2, None), Option(None, size, None))) for n, size in sizes.items()]


@pytest.mark.parametrize(
    ("budget", "dense"), [(300, ""), (349, ""), (350, "b"), (400, "bd"), (549, "bd"), (550, "bdc"), (600, "abcd")]
)
def test_the_budget_keeps_the_highest_spikes_dense(budget, dense):
    measures = Measures(spikes={"a": 1.0, "b": 90.0, "c": 4.0, "d": 40.0})
    plan = ALLOCATORS["spikes"].divide(curves(), budget, measures)
    assert {site for site, choice in plan.choices.items() if choice.amount is None} == set(dense)
    assert plan.nbytes <= budget


def test_planted_spikes_stay_dense_in_a_run_and_are_diagnosed(model_folder, tmp_path, text_file):
    folder = tmp_path / "model"
    model = planted(AutoModelForCausalLM.from_pretrained(model_folder("llama")))
    model.save_pretrained(folder)
    for file in model_folder("llama").iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    sites = anatomy_of(model).sites
    elements = sum(site.out_features * site.in_features for site in sites)
    smallest = sum(quantized_bytes((s.out_features, s.in_features), 8, 64, zeros=True) for s in sites)
    both = sum(3 * s.out_features * s.in_features for s in sites if s.name in (UP, DOWN))
    compress(
        folder,
        tmp_path / "out",
        method="rtn",
        options={"width": 8},
        allocate="spikes",
        bits=8 * (smallest + both) / elements,
        calibrate=[str(text_file)],
        length=32,
        samples=8,
    )
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())["steps"][0]["sites"]
    assert {name for name, choice in plan.items() if choice["amount"] is None} == {UP, DOWN}
    rows = diagnose(folder, ["outliers"], [str(text_file)], samples=4, length=32)["outliers"]
    spiky = {row["name"]: row["value"] for row in rows if row["measure"] == "weight spike"}
    assert max(spiky, key=spiky.__getitem__) == UP and "outliers" in DIAGNOSES


def test_the_loss_of_a_planted_model_is_that_of_the_dense_one_with_integers_where_nothing_spikes():
    """In nats, on the tokens themselves."""
    model = planted(tiny_model("llama"))
    tokens = tiny_batch()["input_ids"]

    def loss(made: PreTrainedModel) -> float:
        return cross_entropy(logits(made)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()

    assert loss(in_integers(model, SpikeAware(), 8)) == pytest.approx(loss(model), rel=0.02)

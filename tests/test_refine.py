"""Blocks that are trained once they are cut: towards what they gave before, never further away, and the same whenever a
run is stopped."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tersely import checkpoint, journal
from tersely.anatomy import anatomy_of
from tersely.calibrate import Blocks, Replay
from tersely.checkpoint import open_source
from tersely.errors import NumericalError, RecipeError
from tersely.kinds import LinearKind, LowRankLinear, Made, QuantizedLinear, SharedLinear, SumLinear
from tersely.methods.low_rank.svd import PlainSVD
from tersely.methods.quantize.rtn import RoundToNearest
from tersely.pipeline import run
from tersely.prepare import prepare
from tersely.recipe import Calibration, MethodStep, Recipe, Refinement, TrainStep, read_recipe, recipe_from
from tersely.refine import Refined, Refiner, Refining, _FormerOutput, _own
from tersely.stats import Stats
from tersely.train.relax import Relaxed
from tersely.verify import verify

ASKED = Refinement(epochs=3, rate=3e-3, batch=4, held_out=0.25)
GENTLE = Refinement(epochs=2, rate=1e-3, batch=8, held_out=0.25)
SAMPLES = 48


class Bench:
    """The first block of a tiny model, and the same block with its linears cut to a rank."""

    def __init__(self, folder: Path, rank: int = 4) -> None:
        self.source = open_source(folder)
        self.anatomy = anatomy_of(self.source.skeleton())
        self.blocks = Blocks(self.source, self.anatomy, "cpu")
        generator = torch.Generator().manual_seed(0)
        self.windows = torch.randint(3, 60, (18, 12), generator=generator)
        self._rank = rank

    def dense(self) -> nn.Module:
        return self.blocks.dense(0)

    def cut(self, cut: Callable[[Tensor], LinearKind] | None = None) -> nn.Module:
        """`cut`: weight → what stands for it; a decomposition to the rank by default."""
        replaced = {}
        for site in self.anatomy.sites:
            if site.block == 0:
                weight = self.source.tensor(f"{site.name}.weight")
                weight = weight.T.contiguous() if site.transposed else weight
                kind = PlainSVD().compress(weight, Stats(), self._rank) if cut is None else cut(weight)
                if site.bias:
                    kind.set_bias(self.source.tensor(f"{site.name}.bias"))
                replaced[site.name] = Made.of(kind)
        return self.blocks.cut(0, replaced)

    def refiner(self, asked: Refinement = ASKED, seed: int = 0) -> Refiner:
        return Refiner(Refining(asked, self.windows, seed), self.source, self.anatomy, "cpu")

    @torch.no_grad()
    def error(self, block: nn.Module) -> float:
        """Over all windows."""
        replay = Replay(self.source, self.anatomy, self.windows, "cpu")
        wanted, missing = 0.0, 0.0
        for batch in range(len(replay)):
            arguments, keywords = replay.arguments(batch)
            there, given = (b(replay.hidden(batch), *arguments, **keywords).double() for b in (self.dense(), block))
            missing, wanted = missing + (given - there).square().sum().item(), wanted + there.square().sum().item()
        return missing / wanted


@pytest.fixture(scope="module")
def bench(model_folder: Callable[..., Path]) -> Bench:
    return Bench(model_folder())


def numbers(block: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in block.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- a block ----------------------------------------------------------------------------------------------------------


def test_a_block_comes_nearer_to_what_it_gave_and_everything_in_it_has_trained(bench):
    block = bench.cut()
    before, cut = numbers(block), bench.error(block)
    found = bench.refiner().refine(block, bench.dense())
    assert 0 < found.after < found.before
    assert bench.error(block) < cut
    after = numbers(block)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert any("norm" in name for name in before)  # norms are among them
    modes = zip(block.parameters(), bench.cut().parameters(), strict=True)
    assert all(parameter.requires_grad == other.requires_grad for parameter, other in modes)
    assert found.tokens == found.steps * ASKED.batch * bench.windows.shape[1]


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_errors_are_those_of_the_windows_held_out(share, bench):
    """Batches of one window: what is held out is known by the rule of the loop."""
    asked = replace(ASKED, batch=1, held_out=share, epochs=2)
    refiner, block = bench.refiner(asked), bench.cut()
    stream = refiner._shifted  # its windows in the order they were shuffled into
    total = len(stream)
    count = round(share * total)
    held = [(2 * number + 1) * total // (2 * count) for number in range(count)]

    @torch.no_grad()
    def mean_error() -> float:
        missing = []
        for batch in held:
            arguments, keywords = stream.arguments(batch)
            there, given = (b(stream.hidden(batch), *arguments, **keywords).double() for b in (bench.dense(), block))
            missing.append((given - there).square().mean().item())
        return sum(missing) / len(missing)

    @torch.no_grad()
    def energy() -> float:
        squares = []
        for batch in range(total):
            arguments, keywords = stream.arguments(batch)
            squares.append(bench.dense()(stream.hidden(batch), *arguments, **keywords).double().square().mean().item())
        return sum(squares) / total

    unit, before = energy(), mean_error()
    found = refiner.refine(block, bench.dense())
    assert found.before == pytest.approx(before / unit, rel=1e-5)
    assert found.after == pytest.approx(mean_error() / unit, rel=1e-5)


@pytest.mark.parametrize("rate", [1e-6, 1e-2, 0.3])
def test_no_rate_makes_it_worse_on_the_windows_held_out(rate, bench):
    block = bench.cut()
    before = numbers(block)
    found = bench.refiner(replace(ASKED, rate=rate)).refine(block, bench.dense())
    assert found.after <= found.before
    assert (found.kept == 0) == same(before, numbers(block)) == (found.after == found.before)
    if rate > 0.1:
        assert found.kept == 0


def test_patience_ends_a_block_that_gains_nothing(bench):
    found = bench.refiner(replace(ASKED, rate=0.3, epochs=50, patience=2)).refine(bench.cut(), bench.dense())
    whole = bench.refiner(ASKED).refine(bench.cut(), bench.dense())
    assert found.steps == whole.steps // ASKED.epochs * 2  # two passes


def test_a_block_that_lost_nothing_stays_as_it_is(bench):
    block = bench.dense()
    before = numbers(block)
    assert bench.refiner().refine(block, bench.dense()) == Refined(0.0, 0.0, 0, 0, 0)
    assert same(before, numbers(block))


def test_the_seed_decides(bench):
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))  # the global generator does not
        block = bench.cut()
        bench.refiner(seed=seed).refine(block, bench.dense())
        found.append(numbers(block))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_the_numbers_train_in_full_and_what_was_measured_is_what_is_stored(dtype, model_folder):
    bench = Bench(model_folder(dtype=dtype))
    for rate in (3e-3, 0.3):
        block = bench.cut()
        before = numbers(block)
        found = bench.refiner(replace(ASKED, rate=rate)).refine(block, bench.dense())
        assert {parameter.dtype for parameter in block.parameters()} == {dtype}
        assert {tensor.dtype for tensor in block.state_dict().values() if tensor.is_floating_point()} == {dtype}
        assert (found.kept == 0) == same(before, numbers(block)) == (rate > 0.1)
        # refined once more with the same windows held out, it begins with what it ended with
        again = bench.refiner(replace(ASKED, epochs=1)).refine(block, bench.dense())
        assert again.before == pytest.approx(found.after, rel=1e-4)


def test_steps_too_small_for_half_precision_add_up(model_folder):
    """A rate far below what a bfloat16 can resolve of a norm's gain of about one."""
    bench = Bench(model_folder(dtype=torch.bfloat16))
    block = bench.cut()
    found = bench.refiner(replace(ASKED, rate=5e-4, epochs=8)).refine(block, bench.dense())
    assert found.after < found.before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_size_of_hidden_states_does_not_matter(size, dtype):
    """The unit of the loss is the error at the start."""
    generator = torch.Generator().manual_seed(0)
    wanted = (size * torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)).to(dtype)
    error = size * torch.randn(3, 4, 5, dtype=torch.float64, generator=generator) / 4
    unit = (error.double().square().mean().sqrt()).item()
    given = (wanted.double() + error).to(dtype).requires_grad_()
    loss = _FormerOutput(SimpleNamespace(hidden=lambda number: wanted), unit)(given, None, torch.tensor([[0]]))
    assert loss.item() == pytest.approx(1, rel=0.05)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    loss.backward()
    assert given.grad.isfinite().all() and given.grad.any()


def test_a_training_that_leaves_the_numbers_leaves_the_block_as_it_was(bench):
    block = bench.cut()
    before = numbers(block)
    with pytest.raises(NumericalError, match="lower rate"):
        bench.refiner(replace(ASKED, rate=1e30)).refine(block, bench.dense())
    assert same(before, numbers(block))
    block.get_parameter("mlp.down_proj.up.weight").data[0, 0] = math.inf
    with pytest.raises(NumericalError, match="before it is refined"):
        bench.refiner().refine(block, bench.dense())


def test_both_streams_go_on_together(bench):
    refiner, block = bench.refiner(), bench.cut()
    refiner.refine(block, bench.dense())
    refiner.advance(block, bench.dense())
    assert refiner._shifted.at == refiner._dense.at == 1
    refiner.advance(bench.blocks.dense(1), bench.blocks.dense(1))  # of a block that an earlier run had finished
    assert refiner._shifted.at == refiner._dense.at == 2


# --- codes ------------------------------------------------------------------------------------------------------------


def to_codes(weight: Tensor) -> QuantizedLinear:
    return RoundToNearest(group=8).compress(weight, Stats(), 2)


def to_codes_of_factors(weight: Tensor) -> LowRankLinear:
    factors = PlainSVD().compress(weight, Stats(), 4)
    factors.down, factors.up = to_codes(factors.down.weight.detach()), to_codes(factors.up.weight.detach())
    return factors


def to_a_sum(weight: Tensor) -> SumLinear:
    base = to_codes(weight)
    rest = PlainSVD().compress(weight - base.to_dense().to(weight.dtype), Stats(), 2)
    return SumLinear.of([base, rest])


def to_a_sum_of_codes(weight: Tensor) -> SumLinear:
    base = to_codes(weight)
    return SumLinear.of([base, to_codes_of_factors(weight - base.to_dense().to(weight.dtype))])


LEARNING = replace(ASKED, epochs=8, rate=1e-3, code_rate=0.02)
QUANTIZED = {"codes": to_codes, "factors": to_codes_of_factors, "sum": to_a_sum, "codes in a sum": to_a_sum_of_codes}
every_quantized = pytest.mark.parametrize("cut", QUANTIZED.values(), ids=QUANTIZED)


def quantized(block: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: part for name, part in block.named_modules() if isinstance(part, QuantizedLinear)}


@every_quantized
@pytest.mark.parametrize("optimiser", ["adam", "sign"])
def test_codes_and_ranges_train_and_keep_their_form(cut, optimiser, bench):
    block = bench.cut(cut)
    before = {name: copy.deepcopy(part) for name, part in quantized(block).items()}
    error = bench.error(block)
    found = bench.refiner(replace(LEARNING, optimiser=optimiser)).refine(block, bench.dense())
    assert 0 < found.after < found.before and bench.error(block) < error
    after = quantized(block)
    assert after.keys() == before.keys() and len(after) >= 7
    for name, part in after.items():
        assert part.spec() == before[name].spec() and part.nbytes() == before[name].nbytes()
    changed = [n for n, part in after.items() if not torch.equal(part.codes, before[n].codes)]
    rescaled = [n for n, part in after.items() if not torch.equal(part.scales, before[n].scales)]
    assert len(rescaled) > len(after) / 2
    assert len(changed) > len(after) / 2 or cut is to_codes_of_factors  # the dense factors are not known
    assert not any(isinstance(part, Relaxed) for part in block.modules())


@every_quantized
def test_codes_are_never_worse_on_the_windows_held_out(cut, bench):
    block = bench.cut(cut)
    before, dense = copy.deepcopy(block.state_dict()), bench.dense()
    found = bench.refiner(replace(ASKED, code_rate=3.0, rate=0.3, epochs=2)).refine(block, dense)
    assert found.kept == 0 and found.after == found.before
    assert same(before, block.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_codes_train_in_half_precision_and_what_was_measured_is_what_is_stored(dtype, model_folder):
    bench = Bench(model_folder(dtype=dtype))
    block = bench.cut(to_codes)
    found = bench.refiner(LEARNING).refine(block, bench.dense())
    assert found.after < found.before
    assert {tensor.dtype for tensor in block.state_dict().values() if tensor.is_floating_point()} == {dtype}
    again = bench.refiner(replace(ASKED, epochs=1)).refine(block, bench.dense())
    assert again.before == pytest.approx(found.after, rel=1e-4)


def test_codes_of_an_earlier_step_stay(bench):
    """Only what this step has replaced is written down."""
    site = next(site for site in bench.anatomy.sites if site.block == 0)
    inside = site.name.removeprefix(f"{bench.anatomy.blocks[0]}.")
    dense = bench.dense()
    kept = to_codes(dense.get_submodule(inside).weight.detach())
    dense.set_submodule(inside, kept)
    block = bench.cut(to_codes)
    block.set_submodule(inside, copy.deepcopy(kept))
    bench.refiner().refine(block, dense)
    assert torch.equal(block.get_submodule(inside).codes, kept.codes)
    assert torch.equal(block.get_submodule(inside).scales, kept.scales)


def test_a_training_of_codes_that_leaves_the_numbers_leaves_the_block_as_it_was(bench):
    block = bench.cut(to_codes)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(NumericalError, match="lower rate"):
        bench.refiner(replace(ASKED, rate=1e30)).refine(block, bench.dense())
    assert same(before, block.state_dict())
    assert not any(isinstance(part, Relaxed) for part in block.modules())


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(model_folder: Callable[..., Path], text_file: Path) -> Recipe:
    step = MethodStep("aa_svd", keep=0.6, allocate="uniform", propagate="input", refine=GENTLE)
    return Recipe(str(model_folder()), [step], Calibration([str(text_file)], SAMPLES, 16))


def unrefined(recipe: Recipe) -> Recipe:
    return replace(recipe, step=[replace(recipe.step[0], refine=None)])


def test_what_trained_reaches_the_checkpoint_and_costs_no_byte(recipe, tmp_path):
    refined, plain = tmp_path / "refined", tmp_path / "plain"
    report = run(prepare(recipe, refined)).report
    run(prepare(unrefined(recipe), plain))
    first, second, dense = (load_file(folder / "model.safetensors") for folder in (refined, plain, Path(recipe.model)))
    assert {name: tensor.shape for name, tensor in first.items()} == {name: t.shape for name, t in second.items()}
    manifests = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (refined, plain)]
    assert manifests[0] == manifests[1]
    norms = [name for name in first if "layernorm" in name]
    assert norms and all(torch.equal(second[name], dense[name]) for name in norms)
    assert any(not torch.equal(first[name], dense[name]) for name in norms)
    outside = [name for name in dense if "layers" not in name]
    assert outside and all(torch.equal(first[name], dense[name]) for name in outside)
    (step,) = report.steps
    assert set(step["refined"]) == {"model.layers.0", "model.layers.1"}
    assert all(figures["after"] <= figures["before"] for figures in step["refined"].values())
    assert report.recipe["step"][0]["refine"]["epochs"] == GENTLE.epochs
    assert "[step.refine]" in (refined / "recipe.toml").read_text()
    assert report.seconds["refine"] > 0
    assert all(check.passed for check in verify(refined))


@pytest.mark.parametrize(
    ("family", "step"),
    [
        ("llama", MethodStep("modegpt", keep=0.7, propagate="block")),
        ("qwen3", MethodStep("svd", keep=0.6, allocate="uniform", target=["mlp"], propagate="block")),
        ("gpt2", MethodStep("rtn", propagate="block", options={"width": 3})),
        ("bert", MethodStep("svd_llm", keep=0.6, allocate="uniform", options={"pivot": True})),
        ("gemma3_text", MethodStep("svd_llm", keep=0.6, allocate="greedy")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.method,
)
def test_whatever_cuts_can_be_refined(family, step, model_folder, text_file, tmp_path):
    recipe = Recipe(
        str(model_folder(family)), [replace(step, refine=GENTLE)], Calibration([str(text_file)], SAMPLES, 16)
    )
    report = run(prepare(recipe, tmp_path / "out")).report
    refined = report.steps[0]["refined"].values()
    assert refined and all(figures["after"] <= figures["before"] for figures in refined)
    assert any(figures["after"] < figures["before"] for figures in refined)
    assert all(check.passed for check in verify(tmp_path / "out"))


def test_other_text_and_other_windows_are_another_result(recipe, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(" ".join(text_file.read_text().split()[::-1]))
    found = []
    for number, asked in enumerate((GENTLE, replace(GENTLE, text=[str(other)]), replace(GENTLE, samples=40))):
        out = tmp_path / f"out-{number}"
        tried = replace(recipe, step=[replace(recipe.step[0], refine=asked)])
        prepared = prepare(tried, out)
        assert len(prepared.texts[0].tokens) == (asked.samples or SAMPLES)
        assert prepared.texts[0].sources == tuple(asked.text or recipe.calibration.source)
        run(prepared)
        found.append((out / "model.safetensors").read_bytes())
    assert len(set(found)) == 3


def test_by_default_it_sees_the_calibration_windows(recipe, tmp_path):
    prepared = prepare(recipe, tmp_path / "out")
    assert torch.equal(prepared.texts[0].tokens, prepared.windows.tokens)


def test_a_method_without_statistics_reads_text_for_its_refinement(recipe, tmp_path):
    step = MethodStep("svd", keep=0.6, allocate="uniform", propagate="block", refine=GENTLE)
    report = run(prepare(replace(recipe, step=[step]), tmp_path / "out")).report
    assert report.steps[0]["refined"]


def test_where_it_fails_it_stops_or_leaves_the_block_as_it_was_cut(recipe, tmp_path):
    wild = replace(recipe.step[0], refine=replace(GENTLE, rate=1e30))
    with pytest.raises(NumericalError, match=r"model\.layers\.0 while it is refined.*lower rate"):
        run(prepare(replace(recipe, step=[wild]), tmp_path / "out"))
    lenient = replace(recipe, step=[replace(wild, on_failure="dense")])
    report = run(prepare(lenient, tmp_path / "lenient")).report
    assert set(report.degraded) == {"model.layers.0", "model.layers.1"}
    assert "not refined" in report.degraded["model.layers.0"]
    run(prepare(unrefined(recipe), tmp_path / "plain"))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("lenient", "plain"))
    assert same(first, second)


def kills(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Stop the run after so many files are in their places; 0: never.  How many there were."""
    usual, written = checkpoint.commit, [0]

    def commit(path: Path, write: Callable[[Path], Any]) -> None:
        usual(path, write)
        written[0] += 1
        if written[0] == count:
            raise KeyboardInterrupt

    for module in (journal, checkpoint):
        monkeypatch.setattr(module, "commit", commit)
    return written


def test_stopped_anywhere_it_ends_with_the_same_bytes(recipe, monkeypatch, tmp_path):
    names = ("model.safetensors", "config.json", "plan.json", "recipe.toml")
    with monkeypatch.context() as patch:
        files = kills(patch, 0)
        run(prepare(recipe, tmp_path / "whole"))
    wanted = {name: (tmp_path / "whole" / name).read_bytes() for name in names}
    figures = json.loads((tmp_path / "whole" / "report.json").read_text())["steps"][0]["refined"]
    for count in range(2, files[0] + 1, 4):
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            kills(patch, count)
            with pytest.raises(KeyboardInterrupt):
                run(prepare(recipe, out))
        run(prepare(recipe, out))
        assert {name: (out / name).read_bytes() for name in names} == wanted, f"stopped at file {count}"
        assert json.loads((out / "report.json").read_text())["steps"][0]["refined"] == figures
        shutil.rmtree(out)


def test_a_later_step_takes_what_was_refined(recipe, tmp_path):
    steps = [recipe.step[0], MethodStep("rtn", target=["*.down", "*.up"], propagate="none", options={"width": 8})]
    run(prepare(replace(recipe, step=steps), tmp_path / "two"))
    run(prepare(recipe, tmp_path / "one"))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    norms = [name for name in first if "norm" in name]
    assert norms and all(torch.equal(first[name], second[name]) for name in norms)


def test_refined_codes_reach_the_checkpoint_and_go_on_learning_from_logits(recipe, tmp_path):
    asked = replace(GENTLE, epochs=6, code_rate=0.02)
    blockwise = MethodStep("rtn", options={"width": 2, "group": 8}, propagate="block", refine=asked)
    together = TrainStep(["logits"], relax="rounding", tokens=4_000, rate=0.02, held_out=4, patience=9)
    alone = replace(together, options={"width": 2, "group": 8, "start": "nearest"})
    steps = {"plain": [replace(blockwise, refine=None)], "refined": [blockwise], "both": [blockwise, together]}
    steps |= {"together": [alone]}
    reports = {name: run(prepare(replace(recipe, step=s), tmp_path / name)).report for name, s in steps.items()}
    tensors = {name: load_file(tmp_path / name / "model.safetensors") for name in steps}
    configs = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in steps}
    modules = {name: config["quantization_config"]["modules"] for name, config in configs.items()}
    assert all(manifest == modules["plain"] for manifest in modules.values())
    codes = [name for name in tensors["plain"] if name.endswith(".codes")]
    assert codes
    for first, second in (("plain", "refined"), ("plain", "together"), ("refined", "both")):
        one, other = tensors[first], tensors[second]
        assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in other.items()}
        assert any(not torch.equal(one[name], other[name]) for name in codes), second
    assert all(block["after"] < block["before"] for block in reports["refined"].steps[0]["refined"].values())
    for name in ("both", "together"):
        losses = [m["losses"]["logits"] for m in reports[name].steps[-1]["training"]["held_out"]]
        assert min(losses) <= losses[0]
        assert all(check.passed for check in verify(tmp_path / name))


# --- what is refused --------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"propagate": "none", "refine": {}}, r"behind compressed blocks.*choose block or input"),
    "base": ({"base": "elsewhere", "refine": {}}, "a difference to a base"),
    "epochs": ({"refine": {"epochs": 0}}, "epochs = 0; wanted 1 or more"),
    "rate": ({"refine": {"rate": 0.0}}, r"rate = 0\.0; wanted above 0"),
    "code_rate": ({"refine": {"code_rate": 0.0}}, r"code_rate = 0\.0; wanted above 0"),
    "optimiser": ({"refine": {"optimiser": "newton"}}, "optimiser"),
    "decay": ({"refine": {"decay": -1.0}}, "decay = -1.0; wanted 0 or more"),
    "held_out": ({"refine": {"held_out": 0.6}}, "held_out = 0.6; wanted above 0 and at most 0.5"),
    "patience": ({"refine": {"patience": 0}}, "patience = 0; wanted 1 or more"),
    "text": ({"refine": {"text": []}}, "an empty list of texts"),
    "samples": ({"refine": {"samples": 0}}, "samples = 0; wanted 1 or more"),
    "unknown": ({"refine": {"epoch": 3}}, "epochs"),
    "kind": ({"refine": {"rate": "fast"}}, r"refine\.rate"),
}


@pytest.mark.parametrize(("said", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused_before_anything(said, message):
    with pytest.raises(RecipeError, match=message):
        recipe_from({"model": "m", "step": [{"method": "svd_llm", "keep": 0.5, **said}]})


def test_a_single_batch_is_refused_before_anything_is_written(recipe, tmp_path):
    few = replace(recipe, step=[replace(recipe.step[0], refine=replace(GENTLE, batch=64))])
    with pytest.raises(RecipeError, match="48 windows in batches of 64 are a single batch"):
        prepare(few, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_written_reads_back(recipe, tmp_path):
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert read_recipe(tmp_path / "recipe.toml") == recipe
    other = replace(recipe, step=[replace(recipe.step[0], refine=replace(GENTLE, rate=1e-5))])
    assert len({r.fingerprint() for r in (recipe, other, unrefined(recipe))}) == 3


def test_a_factor_that_several_blocks_share_does_not_train():
    block = nn.Module()
    block.alone = SharedLinear(6, 4, 2, "alone", owner=True, same_input=True)
    block.across = SharedLinear(6, 4, 2, "across", owner=True, same_input=False)
    assert _own(block) == ["alone.down.weight", "alone.up.weight", "across.up.weight"]

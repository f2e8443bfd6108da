"""The bench: rows side by side, what they cost, what is refused, and two models compared window by window."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from tersely import memory
from tersely.bench import BENCHES, Bench, Entry, Setting, check_bench, entry_of, markdown, run_bench, running
from tersely.cli import main
from tersely.errors import AnatomyError, CheckpointError, NumericalError, RecipeError
from tersely.evaluation import cut, measure_perplexity, paired, paired_over, peak_within, window_losses
from tersely.evaluation.paired import NORMAL_QUANTILE
from tersely.journal import locked
from tersely.pipeline import load, quiet
from tersely.recipe import Calibration, read_recipe, recipe_from
from tersely.tables import build, settled
from tersely.text import read_text

ENTRIES = (Entry("svd"), Entry("svd_llm", "greedy", "block", {"damping": 1e-4}))
HEAL = {"train": ["tokens"], "relax": "adapter", "rank": 2, "tokens": 64, "batch": 1, "held_out": 0}


@pytest.fixture
def in_a_hurry(monkeypatch):
    """Nothing is collected before a peak is measured: among all objects of a test run that takes longer than a row."""
    monkeypatch.setattr(memory, "_hand_back", lambda: None)


@pytest.fixture
def bench(model_folder, text_file, in_a_hurry):
    """A function: entries, and whatever else a bench may be told → a bench of a tiny model."""

    def make(*entries, **more):
        text = str(text_file)
        said = {"keeps": [0.8, 0.5], "texts": [text], "calibration": Calibration([text], samples=4, length=32)}
        said |= {"model": str(model_folder()), "length": 32, "windows": 4}
        return Bench(entries=entries or ENTRIES, **(said | more))

    return make


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_bench_goes_on_with_the_first_missing_row(bench, tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    whole = run_bench(bench(), file, "command", quiet)
    assert [(r["method"], r["keep"]) for r in whole] == [(m, k) for k in (0.8, 0.5) for m in ("svd", "svd_llm")]
    assert whole[1]["options"] == {"allocate": "greedy", "propagate": "block", "damping": 1e-4}
    assert all(row["trained_on"] is None and row["dense_perplexity"] == whole[0]["dense_perplexity"] for row in whole)

    content = json.loads(file.read_text())
    assert content["rows"] == whole
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    file.write_text(json.dumps(content | {"rows": whole[:3]}))
    made = []
    usual = running.compressed
    monkeypatch.setattr(running, "compressed", lambda *given: made.append((given[0], given[2])) or usual(*given))
    again = run_bench(bench(), file, "command", quiet)
    assert made == [(ENTRIES[1], 0.5)]
    varying = {"seconds", "stages", "bytes", "peak_bytes", "resident_bytes"}  # reports hold times, whose digits vary
    assert [{k: v for k, v in row.items() if k not in varying} for row in again] == [
        {k: v for k, v in row.items() if k not in varying} for row in whole
    ]
    with pytest.raises(RecipeError, match="another bench"):
        run_bench(bench(), file, "another command", quiet)
    table = markdown(whole, "command")
    stages = table.partition("## Where the seconds go")[2].splitlines()
    assert cells(stages[4])[2:] == [stage for stage in whole[0]["stages"] if stage != "everything"]
    assert f"{whole[0]['perplexity']:.2f} ({whole[0]['kl']:.3f})" in table


def test_statistics_outlive_a_stop_and_leave_with_the_last_row(bench, tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    usual = running.compressed
    jobs = bench(Entry("svd_llm", "uniform", "none"), Entry("asvd", "uniform", "none"), keeps=[0.5])

    def stops_at_asvd(entry, *given):
        if entry.method == "asvd":
            raise KeyboardInterrupt
        return usual(entry, *given)

    monkeypatch.setattr(running, "compressed", stops_at_asvd)
    with pytest.raises(KeyboardInterrupt):
        run_bench(jobs, file, "command", quiet)
    assert list((tmp_path / "rows.work" / "statistics").rglob("*.gram.safetensors"))
    monkeypatch.undo()
    assert len(run_bench(jobs, file, "command", quiet)) == 2
    assert not (tmp_path / "rows.work").exists()


def test_two_benches_on_one_file_do_not_lose_rows_of_each_other(bench, tmp_path):
    file, lock = tmp_path / "rows.json", tmp_path / "rows.work" / "lock"
    with locked(lock, AssertionError("nobody else is here")):
        with pytest.raises(RecipeError, match="a bench is at work on it"):
            run_bench(bench(keeps=[0.5]), file, "command", quiet)
        assert not file.exists()
    assert len(run_bench(bench(keeps=[0.5]), file, "command", quiet)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_a_row_says_its_size_in_both_conventions_and_what_it_took(bench, tmp_path):
    (row,) = run_bench(bench(Entry("svd_llm", "uniform"), keeps=[0.5]), tmp_path / "rows.json", "command", quiet)
    assert row["kept"] == pytest.approx(0.5, abs=0.05) and row["kept"] <= 0.5
    assert row["removed"] == 1 - row["kept"]
    assert row["relative_perplexity"] == row["perplexity"] / row["dense_perplexity"]
    assert row["degraded"] == 0 and row["seconds"] > 0 and row["group"] == "untrained"
    assert row["peak_bytes"] is None or row["peak_bytes"] >= row["resident_bytes"] > 0


def test_steps_before_and_after_stand_around_the_one_that_is_sized(bench, tmp_path):
    entry = Entry("svd_llm", "uniform", steps=({"rewrite": "smooth"},), then=(HEAL, HEAL | {"rank": 1}))
    recipe = entry.recipe(bench().setting, 0.7)
    assert [step.name for step in recipe.step] == ["smooth", "svd_llm", "adapter", "adapter"]
    assert recipe.step[1].keep == 0.7 and recipe.step[3].options == {"rank": 1}
    (row,) = run_bench(bench(entry, keeps=[0.7]), tmp_path / "rows.json", "command", quiet)
    assert row["group"] == "trained" and row["trained_on"] == bench().texts
    assert entry.way.startswith("smooth → svd_llm (uniform) → adapter (objective tokens, rank 2, tokens 64")
    table = markdown([row], "command")
    assert f"| {bench().texts[0]} |" in table and entry.way in table


def test_groups_stand_in_tables_of_their_own(bench, tmp_path):
    entries = Entry("svd"), Entry("rtn", options={"width": 8}, sizes=None, group="8-bit factors")
    rows = run_bench(bench(*entries, keeps=[0.8]), tmp_path / "rows.json", "command", quiet)
    assert [row["group"] for row in rows] == ["untrained", "8-bit factors"]
    table = markdown(rows, "command")
    # results, what it takes, and where the seconds go
    assert table.count("### Untrained") == 3 and table.count("### 8-bit factors") == 3
    assert "###" not in markdown(rows[:1], "command")


@pytest.mark.parametrize("name", BENCHES)
def test_every_entry_has_a_line_of_its_own_and_a_recipe(name, bench):
    entries = BENCHES[name]
    assert len({entry.way for entry in entries}) == len(entries)
    for entry in entries:
        entry.recipe(bench().setting, None if entry.sizes is None else 0.5)


# --- what has no result -----------------------------------------------------------------------------------------------


def test_a_way_that_is_refused_is_a_row_and_no_end(bench, tmp_path):
    refused = Entry("svd", options={"target": ["nonsense"]})
    jobs, file = bench(refused, Entry("svd"), keeps=[0.8]), tmp_path / "rows.json"
    check_bench(jobs, file, "command")
    none, done = run_bench(jobs, file, "command", quiet)
    assert "nonsense" in none["refused"] and "perplexity" not in none and done["perplexity"] > 0
    assert run_bench(jobs, file, "command", quiet) == [none, done]
    table = markdown([none, done], "command")
    (line,) = [line for line in table.splitlines() if "| refused |" in line]
    assert cells(line)[:3] == ["svd (target nonsense)", "0.8", "refused"]


def test_numbers_that_are_not_finite_are_a_row_and_no_end(bench, tmp_path, monkeypatch):
    def diverges(*given, **more):
        raise NumericalError("a logit is not finite")

    monkeypatch.setattr(running, "measure_windows", diverges)
    rows = run_bench(bench(keeps=[0.5]), tmp_path / "rows.json", "command", quiet)
    assert len(rows) == 2 and all(row["failed"] == "a logit is not finite" for row in rows)
    assert "## What it takes" not in markdown(rows, "command")


def test_what_no_row_could_survive_is_refused_before_work(bench, tmp_path, text_file):
    file = tmp_path / "rows.json"
    with pytest.raises(AnatomyError, match="nonsense"):
        check_bench(bench(Entry("svd", options={"target": ["nonsense"]})), file, "command")
    with pytest.raises(RecipeError, match=r"keep 1\.5"):
        bench(keeps=[1.5])
    with pytest.raises(RecipeError, match="takes 64"):
        check_bench(bench(texts=[f"{text_file}[:90]"], length=64), file, "command")
    with pytest.raises(RecipeError, match="calibration text"):
        check_bench(bench(calibration=Calibration([f"{text_file}[:90]"], length=64)), file, "command")
    with pytest.raises(RecipeError, match="make it first"):
        check_bench(bench(), tmp_path / "nowhere" / "rows.json", "command")
    with pytest.raises((RecipeError, CheckpointError)):
        check_bench(bench(model=str(tmp_path)), file, "command")
    assert not file.exists()


def test_the_command_writes_rows_and_a_table(bench, tmp_path, monkeypatch, text_file):
    monkeypatch.setitem(BENCHES, "low-rank", ENTRIES[:1])
    file = tmp_path / "rows.json"
    given = ["bench", "low-rank", bench().model, "--json", str(file), "--keep", "0.8", "0.5", "--text", str(text_file)]
    given += [f"{text_file}[:900]", "--calibrate", str(text_file), "--length", "32", "--windows", "2"]
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert not ended.value.code
    rows = json.loads(file.read_text())["rows"]
    assert [(row["keep"], row["text"]) for row in rows] == [(k, t) for k in (0.8, 0.5) for t in given[9:11]]
    table = file.with_suffix(".md").read_text()
    (line,) = [line for line in table.splitlines() if line.startswith("| svd ") and " / " in line]
    relative = [math.sqrt(a["relative_perplexity"] * b["relative_perplexity"]) for a, b in (rows[:2], rows[2:])]
    assert cells(line)[3] == " / ".join(f"{one:.2f}" for one in relative)


# --- a recipe as an entry ---------------------------------------------------------------------------------------------


def _as_run(entry: Entry) -> list[tuple[object, ...]]:
    """The steps of an entry with every default in its place."""
    first, *more = settled(entry.recipe(Setting("somewhere", Calibration()), 0.7)).step
    said = first.name, build(first), first.allocate, first.propagate, first.refine, first.temper
    return [said, *((step,) for step in more)]


@pytest.mark.parametrize("name", ["low_rank_best", "low_rank_best_trained"])
def test_the_recipes_of_the_family_are_rows_of_its_bench(name):
    best = entry_of(read_recipe(Path(__file__).parents[1] / "recipes" / f"{name}.toml"))
    for trained in [part for part in (best.options.get("refine"), *best.then) if part]:
        del trained["text"]  # rows of a bench learn the text that all are calibrated on
    assert _as_run(best) in [_as_run(one) for one in BENCHES["low-rank"] if one.sizes == "keep" and not one.steps]


def test_a_recipe_is_an_entry_of_its_sized_step():
    steps = [
        {"rewrite": "smooth", "strength": 0.4},
        {"method": "aa_svd", "keep": 0.8, "anchor": 0.5, "allocate": "lems", "propagate": "input", "target": ["mlp"]},
        HEAL,
    ]
    entry = entry_of(recipe_from({"model": "somewhere", "step": steps}))
    assert (entry.method, entry.allocate, entry.propagate) == ("aa_svd", "lems", "input")
    assert entry.options == {"anchor": 0.5, "target": ["mlp"]}
    assert entry.steps == (steps[0],) and entry.then == (HEAL,)
    refined = entry_of(
        recipe_from(
            {"model": "somewhere", "step": [{"method": "svd_llm", "keep": 0.8, "refine": {"epochs": 3}, "pivot": True}]}
        )
    )
    assert refined.options == {"refine": {"epochs": 3}, "pivot": True} and refined.compared_with == "trained"
    assert refined.way == "svd_llm (greedy, block, refine epochs 3, pivot True)"
    for wrong in ([{"rewrite": "smooth"}], [{"method": "svd", "keep": 0.8}, {"method": "svd", "keep": 0.5}]):
        with pytest.raises(RecipeError, match="exactly one step"):
            entry_of(recipe_from({"model": "somewhere", "step": wrong}))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_peak_is_that_of_what_runs_inside():
    with peak_within() as first:
        kept = torch.ones(10_000_000)
        del kept
    if first.before is None:
        pytest.skip("this system does not let the high-water mark be set back")
    with peak_within() as second:
        pass
    assert first.highest - first.before >= 39_000_000
    assert second.highest - second.before < 20_000_000


# --- window by window -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [32, 12])
def test_losses_of_windows_add_up_to_the_perplexity(stride, model_folder, tokenizer, text_file):
    model = load(model_folder())
    windows = cut(read_text(str(text_file), "evaluation"), tokenizer, model.config, length=32, stride=stride, limit=7)
    losses, counts = window_losses(model, windows), windows.predictions()
    assert losses.shape == (7,) and losses.dtype == torch.float64 and counts.sum() == windows.predicted
    mean = (losses * counts).sum() / counts.sum()
    assert math.exp(mean) == pytest.approx(measure_perplexity(model, windows), rel=1e-12)
    alone = cut(read_text(str(text_file), "evaluation"), tokenizer, model.config, length=32, stride=stride, limit=1)
    assert window_losses(model, alone)[0] == pytest.approx(float(losses[0]), rel=1e-6)


def scattered(count, seed):
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_pairing_removes_what_both_models_find_hard():
    hard = 5 + 3 * scattered(400, 0)
    first, second = hard + 0.05 * scattered(400, 1), hard + 0.1 + 0.05 * scattered(400, 2)
    found = paired(first, second)
    differences = first - second
    assert found.difference == pytest.approx(float(differences.mean()))
    assert found.standard_error == pytest.approx(float(differences.std()) / 20)
    assert found.ratio == pytest.approx(math.exp(float(first.mean())) / math.exp(float(second.mean())))
    assert abs(found.difference + 0.1) < 4 * found.standard_error < 0.02  # of the losses themselves it is 0.15
    assert found.normal[1] - found.difference == pytest.approx(NORMAL_QUANTILE * found.standard_error)
    assert found.is_lower and found.windows == 400
    # normal differences: both intervals say the same
    assert found.bootstrap == pytest.approx(found.normal, abs=0.1 * found.standard_error * 2 * NORMAL_QUANTILE)
    assert found.ratio_interval[0] < found.ratio < found.ratio_interval[1] < 1
    assert paired(first, second) == found and paired(first, second, seed=1).bootstrap != found.bootstrap
    back = paired(second, first)
    assert back.difference == -found.difference and not back.is_lower


def test_the_interval_covers_the_truth_as_often_as_it_says():
    covered = 0
    for trial in range(200):
        found = paired(scattered(60, trial), torch.zeros(60, dtype=torch.float64))
        covered += found.bootstrap[0] <= 0 <= found.bootstrap[1]
    assert 180 <= covered <= 199  # 190 expected, and the bootstrap of few windows is a little narrow


def test_texts_count_the_same_however_long_they_are():
    long, short = scattered(900, 0) + 1, scattered(30, 1) - 2
    found = paired_over([(long, torch.zeros_like(long)), (short, torch.zeros_like(short))])
    assert found.difference == pytest.approx(float(long.mean() + short.mean()) / 2)
    assert found.standard_error == pytest.approx(math.sqrt(float(long.var() / 900 + short.var() / 30)) / 2)
    assert found.windows == 930


def test_equal_models_differ_by_nothing():
    losses = scattered(10, 0)
    found = paired(losses, losses)
    assert (found.difference, found.standard_error, found.ratio, found.is_lower) == (0, 0, 1, False)


def test_what_is_no_pair_is_refused():
    losses = scattered(5, 0)
    with pytest.raises(RecipeError, match="no pairs"):
        paired(losses, losses[:4])
    with pytest.raises(RecipeError, match="no scatter"):
        paired(losses[:1], losses[:1])
    with pytest.raises(RecipeError, match="no text"):
        paired_over([])
    with pytest.raises(NumericalError, match="window 2"):
        paired(losses, losses.masked_fill(torch.arange(5) == 2, math.inf))


# --- the verdict ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool():
    """tools/low_rank_verdict.py as a module."""
    path = Path(__file__).parents[1] / "tools" / "low_rank_verdict.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look up their hints
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]


@pytest.fixture
def trial(tool, model_folder, text_file, in_a_hurry, monkeypatch):
    """A function: whatever differs from svd_llm against two others at one size, two seeds → a trial on three texts."""
    monkeypatch.setattr(tool, "of_pairs", lambda *_: math.inf)  # of random numbers, nothing is modelled

    def make(**more):
        said = {"model": str(model_folder()), "best": {1.0: Entry("svd_llm", "uniform", "none")}, "keeps": (0.5,)}
        said |= {"others": [Entry("svd", "uniform", "none"), Entry("svd", options={"target": ["nonsense"]})]}
        said |= {"texts": [str(text_file), f"{text_file}[:4000]", f"{text_file}[4000:8000]"], "seeds": (0, 1)}
        said |= {"calibration": Calibration([str(text_file)], samples=4, length=32), "length": 32, "windows": 6}
        return tool.Trial(**(said | more))

    return make


def test_the_verdict_pairs_the_best_with_the_strongest_other_per_seed(tool, trial, tmp_path):
    out = tmp_path / "verdict"
    asked = trial()
    content = tool.run(asked, out, "command")
    rows = {(row["way"], row["seed"]): row for row in content["rows"]}
    assert len(rows) == 6 and sum("refused" in row for row in rows.values()) == 2
    assert json.loads((tmp_path / "verdict.json").read_text())["rows"] == content["rows"]
    places = [*asked.texts, tool.OTHERS]
    assert [(said["place"], said["seed"]) for said in content["verdict"]] == [(p, s) for p in places for s in (0, 1)]
    for said in content["verdict"]:
        texts = asked.texts[1:] if said["place"] == tool.OTHERS else [said["place"]]
        ours, theirs = rows["svd_llm (uniform, none)", said["seed"]], rows["svd (uniform, none)", said["seed"]]
        assert said["strongest"] == "svd (uniform, none)"
        assert said["ratio"] == pytest.approx(tool.perplexity(ours, texts) / tool.perplexity(theirs, texts))
        assert said["lower"] == (max(said["normal"][1], said["bootstrap"][1]) < 0)
    table = (tmp_path / "verdict.md").read_text()
    assert " ± " in table and table.count("| refused |") == 2 and f"## {tool.OTHERS}" in table
    assert not list((tmp_path / "verdict.work").glob("statistics-*"))


def test_a_verdict_goes_on_and_takes_more_seeds(tool, trial, tmp_path, monkeypatch):
    out, file = tmp_path / "verdict", tmp_path / "verdict.json"
    others = [Entry("svd", "uniform", "none")]
    whole = tool.run(trial(seeds=(0,), others=others), out, "command")
    made = []
    usual = tool.compressed
    monkeypatch.setattr(tool, "compressed", lambda entry, setting, *rest: made.append(
        (entry.method, setting.seed)) or usual(entry, setting, *rest))  # fmt: skip
    next((tmp_path / "verdict.work" / "losses").glob("svd_llm-*")).unlink()
    again = tool.run(trial(others=others), out, "another command")
    assert made == [("svd_llm", 0), ("svd_llm", 1), ("svd", 1)]
    perplexities = {row["way"]: row.get("perplexity") for row in again["rows"] if row["seed"] == 0}
    assert perplexities == {row["way"]: row.get("perplexity") for row in whole["rows"]}
    with pytest.raises(RecipeError, match="another model"):
        tool.run(trial(windows=5), out, "command")
    assert json.loads(file.read_text())["commands"] == ["command", "another command"]


def test_a_text_that_the_dense_model_does_not_model_is_marked_and_left_out(tool, trial, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "of_pairs", lambda *_: 1.0)
    content = tool.run(trial(seeds=(0,), others=[Entry("svd")]), tmp_path / "verdict", "command")
    assert not any(one["modelled"] for one in content["dense"])
    assert tool.OTHERS not in tool.places(content)
    assert "no: the dense model does not model it" in (tmp_path / "verdict.md").read_text()


def test_pairs_of_tokens_predict_what_follows_from_the_one_before(tool):
    cycle = torch.arange(400) % 4  # every token says which one comes
    assert tool.of_pairs(cycle, 4) == pytest.approx(1 / (1 - 0.75 / 50 * (1 - 51 / 204)), rel=5e-3)
    noise = torch.randint(0, 16, (40_000,), generator=torch.Generator().manual_seed(0))
    assert tool.of_pairs(noise, 16) == pytest.approx(16, rel=0.01)
    assert tool.of_pairs(torch.tensor([0, 0, 0, 3, 3, 3]), 4) == pytest.approx(7)  # 3 was not seen: one of 3 + 4


def test_others_are_named_as_the_bench_prints_them(tool, tmp_path):
    best = tool.entry_named("svd_llm (uniform, none)")
    others = tool.rivals_of([best], None, None)
    assert best.way not in {entry.way for entry in others} and len(others) > 5
    assert {entry.compared_with for entry in others} == {"untrained"}
    assert [entry.way for entry in tool.rivals_of([best], ["asvd (uniform, none)"], None)] == ["asvd (uniform, none)"]
    with pytest.raises(RecipeError, match="unknown way"):
        tool.entry_named("svd_llm (unifrom, none)")
    recipe = tmp_path / "best.toml"
    recipe.write_text('model = "somewhere"\n[[step]]\nmethod = "svd"\nkeep = 0.8\n')
    assert tool.entry_named(str(recipe)).way == "svd (greedy, block)"


@pytest.mark.parametrize(("sizes", "keep"), [((0.7, 0.9), 0.8), ((0.75, 0.45), 0.6), ((0.9, 0.7), 0.8)])
def test_of_two_recipes_as_near_the_first_is_judged(tool, sizes, keep):
    assert tool.judged({size: size for size in sizes}, keep) == sizes[0]


def test_of_several_recipes_each_is_judged_at_the_sizes_nearest_to_its_own(tool, trial, tmp_path):
    best = {0.5: Entry("svd_llm", "uniform", "none"), 0.8: Entry("asvd", "uniform", "none")}
    others = [Entry("svd", "uniform", "none")]
    content = tool.run(trial(best=best, others=others, keeps=(0.9, 0.6), seeds=(0,)), tmp_path / "one", "command")
    judged = {said["keep"]: said["way"] for said in content["verdict"]}
    assert judged == {0.9: "asvd (uniform, none)", 0.6: "svd_llm (uniform, none)"}
    assert {said["strongest"] for said in content["verdict"]} == {"svd (uniform, none)"}
    table = (tmp_path / "one.md").read_text()
    assert "Judged at keep 0.9: **asvd (uniform, none)**" in table
    # a run that goes on with one more recipe: what it judges elsewhere is no rival
    best[0.9] = Entry("svd", "uniform", "none")
    content = tool.run(trial(best=best, others=[], keeps=(0.9,), seeds=(0,)), tmp_path / "one", "command")
    assert not any("strongest" in said for said in content["verdict"])


def test_recipes_that_sizes_do_not_tell_apart_are_refused(tool, tmp_path):
    for number, keep in enumerate((0.8, 0.9, 0.9)):
        text = f'model = "somewhere"\n[[step]]\nmethod = "svd"\nkeep = {keep}\n'
        (tmp_path / f"{number}.toml").write_text(text)
    one, other, twin = (str(tmp_path / f"{number}.toml") for number in range(3))
    assert sorted(tool.best_of([one, other])) == [0.8, 0.9]
    with pytest.raises(RecipeError, match=r"keep 0\.9 is that of another"):
        tool.best_of([one, other, twin])
    with pytest.raises(RecipeError, match="name recipes"):
        tool.best_of([one, "svd (uniform, none)"])

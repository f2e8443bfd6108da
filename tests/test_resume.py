"""A run that is stopped anywhere goes on and ends with the same bytes; statistics serve every later run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tersely import calibrate, checkpoint, job, journal, sweeps
from tersely.errors import CheckpointError, DamageError, RecipeError
from tersely.methods import METHODS
from tersely.pipeline import run
from tersely.prepare import identity, known_by, prepare
from tersely.recipe import Calibration, MethodStep, Recipe, RewriteStep, TrainStep
from tersely.settings import Refinement
from tersely.verify import verify

# What does not tell when and how often a run was interrupted.
SAME = ("model.safetensors", "config.json", "plan.json", "recipe.toml", "tokenizer.json", "LICENSE")


@pytest.fixture
def recipe(model_folder: Callable[..., Path], text_file: Path) -> Recipe:
    """One step: a sweep for the curves, a sweep that compresses."""
    return Recipe(str(model_folder()), [MethodStep("svd_llm", keep=0.6)], Calibration([str(text_file)], 4, 16))


class Kill:
    """Stops runs after so many files are in their places, or in the middle of writing the last of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written = 0
        self._usual, self._patch = journal.commit, monkeypatch

    @contextmanager
    def at(self, count: int, *, midway: bool = False) -> Iterator[None]:
        self.written = 0

        def commit(path: Path, write: Callable[[Path], None]) -> None:
            self.written += 1
            if self.written == count and midway:
                self._usual(path, lambda temporary: half(temporary, write))
            self._usual(path, write)
            if self.written == count:
                raise KeyboardInterrupt

        def half(temporary: Path, write: Callable[[Path], None]) -> None:
            write(temporary)
            os.truncate(temporary, temporary.stat().st_size // 2)
            raise KeyboardInterrupt

        with self._patch.context() as patch:
            for module in (journal, checkpoint):
                patch.setattr(module, "commit", commit)
            yield


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Kill:
    return Kill(monkeypatch)


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in SAME}


def stopped(recipe: Recipe, out: Path) -> bool:
    """Whether a run was stopped before its end."""
    try:
        run(prepare(recipe, out))
    except KeyboardInterrupt:
        return True
    return False


def two_steps(recipe: Recipe) -> Recipe:
    """The second step, data-free, takes the factors of the first one; the first one is not part of the result."""
    mlp, factors = replace(recipe.step[0], target=["mlp"]), MethodStep("svd", target=["attention.q", "*.up"], keep=0.7)
    return replace(recipe, step=[mlp, factors])


def spilling(recipe: Recipe) -> Recipe:
    """Statistics of the dense model go through the disk."""
    return replace(recipe, step=[replace(recipe.step[0], propagate="none")])


def sharded(recipe: Recipe) -> Recipe:
    return replace(recipe, step=[replace(recipe.step[0], allocate="uniform", propagate="input")], shard_size="20KB")


@pytest.mark.parametrize("midway", [False, True], ids=["between files", "in the middle of one"])
def test_stopped_anywhere_it_ends_with_the_same_bytes(midway, recipe, kill, tmp_path):
    """Between files with two sweeps over the model; in their middle with one sweep and statistics on the disk."""
    recipe = spilling(recipe) if midway else recipe
    whole, out = tmp_path / "whole", tmp_path / "out"
    with kill.at(0):
        run(prepare(recipe, whole))
    wanted, names, files = contents(whole), {path.name for path in whole.iterdir()}, kill.written
    assert files > 20
    for count in range(1, files + 1, 2 if midway else 1):
        with kill.at(count, midway=midway):
            assert stopped(recipe, out)
        run(prepare(recipe, out))
        assert contents(out) == wanted, f"stopped at file {count}"
        assert {path.name for path in out.iterdir()} == names, f"stopped at file {count}"
        shutil.rmtree(out)


@pytest.mark.parametrize("change", [two_steps, sharded], ids=lambda change: change.__name__)
def test_stopped_again_and_again_it_ends_with_the_same_bytes(change, recipe, kill, tmp_path):
    """A little later each time."""
    recipe = change(recipe)
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(prepare(recipe, whole))
    count, going = 0, True
    while going:
        count += 2
        with kill.at(count, midway=count % 4 == 0):
            going = stopped(recipe, out)
    assert count >= 10
    for path in whole.iterdir():
        if path.suffix in (".safetensors", ".toml") or path.name in ("config.json", "plan.json", checkpoint.INDEX):
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert all(check.passed for check in verify(out))


def pickled(folder: Path) -> Path:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_a_checkpoint_that_must_be_renamed_first_goes_on_too(recipe, kill, copy_of, model_folder, tmp_path):
    recipe = replace(recipe, model=str(pickled(copy_of(model_folder()))))
    run(prepare(recipe, tmp_path / "whole"))
    for count in (1, 2, 3):
        for midway in (False, True):
            out = tmp_path / f"out-{count}-{midway}"
            with kill.at(count, midway=midway):
                assert stopped(recipe, out)
            run(prepare(recipe, out))
            assert contents(out) == contents(tmp_path / "whole")


def test_what_was_renamed_for_one_model_never_serves_another(recipe, kill, copy_of, model_folder, tmp_path):
    one = pickled(copy_of(model_folder()))
    with kill.at(2, midway=True):  # all weights are renamed, and nothing says yet for which run
        assert stopped(replace(recipe, model=str(one)), tmp_path / "out")
    shutil.move(one, tmp_path / "one")
    # the same shapes, other numbers
    tensors = {name: tensor.flip(0) for name, tensor in load_file(model_folder() / "model.safetensors").items()}
    torch.save(tensors, tmp_path / "one" / "pytorch_model.bin")
    shutil.copytree(tmp_path / "one", one)
    for out, fresh in ((tmp_path / "out", True), (tmp_path / "whole", False)):
        run(prepare(replace(recipe, model=str(one)), out, fresh=fresh))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_renamed_checkpoint_leaves_nothing_where_the_recipe_is_wrong(recipe, copy_of, model_folder, tmp_path):
    dense = str(pickled(copy_of(model_folder())))
    (tmp_path / "short.txt").write_text("w5 w6")
    short = replace(recipe, model=dense, calibration=replace(recipe.calibration, source=[str(tmp_path / "short.txt")]))
    with pytest.raises(RecipeError, match="2 tokens"):
        prepare(short, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match="2 tokens"):
        prepare(short, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


KILLED = """
import json, os, sys
from pathlib import Path
from tersely import checkpoint, journal
from tersely.pipeline import run
from tersely.prepare import prepare
from tersely.recipe import recipe_from

usual, left = journal.commit, [int(sys.argv[3])]

def commit(path, write):
    usual(path, write)
    left[0] -= 1
    if not left[0]:
        os._exit(77)

journal.commit = checkpoint.commit = commit
run(prepare(recipe_from(json.loads(sys.argv[1])), Path(sys.argv[2])))
"""


def test_another_process_goes_on_with_what_a_killed_one_left(recipe, tmp_path):
    plain = asdict(recipe)
    plain["step"] = [{k: v for k, v in step.items() if v is not None} for step in plain["step"]]
    plain = {key: value for key, value in plain.items() if value is not None}
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(plain), str(out), "8"], capture_output=True, text=True
    )
    assert done.returncode == 77, done.stderr
    assert {path.name for path in (out / ".tersely").iterdir()} >= {"run.json", "lock"}
    assert not (out / "config.json").exists()
    run(prepare(recipe, out))
    run(prepare(recipe, tmp_path / "whole"))
    assert contents(out) == contents(tmp_path / "whole")


def test_finished_blocks_are_not_compressed_again(recipe, kill, tmp_path, monkeypatch):
    cut: list[int] = []
    usual = METHODS["svd_llm"].compress

    def compress(method: Any, weight: Any, stats: Any, amount: int) -> Any:
        cut.append(amount)
        return usual(method, weight, stats, amount)

    with kill.at(8):  # of the run, of the step, two curves, the plan, two of the first block, one of the second
        assert stopped(recipe, tmp_path / "out")
    monkeypatch.setattr(METHODS["svd_llm"], "compress", compress)
    run(prepare(recipe, tmp_path / "out"))
    resumed = len(cut)
    run(prepare(recipe, tmp_path / "whole"))
    assert 0 < resumed < len(cut) - resumed


@pytest.mark.parametrize("last", [False, True], ids=["the first file gone", "the last file gone"])
def test_stopped_while_tidying_up_it_is_still_one_or_the_other(last, recipe, tmp_path, monkeypatch):
    """What is left says that the run is unfinished, and the same command goes on."""
    out = tmp_path / "out"

    def one_file_gone(folder: Path) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        files[-1 if last else 0].unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal.shutil, "rmtree", one_file_gone)
        assert stopped(recipe, out)
    run(prepare(recipe, out))
    assert all(check.passed for check in verify(out))
    assert not (out / ".tersely").exists()


def test_stopped_while_another_run_is_cleared_away_nothing_goes_on_from_the_rest(recipe, unfinished, tmp_path):
    """Whatever was removed first."""
    other = replace(recipe, step=[replace(recipe.step[0], keep=0.9)])
    removed = journal._remove
    for number in range(3):  # so that some may be gone and some not
        (unfinished / journal.FOLDER / f"unit-{number}").write_text("")
    for gone in (0, 1, 1):
        left = iter(range(gone))

        def remove(path: Path, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            removed(path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal, "_remove", remove)
            with pytest.raises(KeyboardInterrupt):
                run(prepare(other, unfinished, fresh=True))
        for asked in (recipe, other):
            with pytest.raises(CheckpointError, match=r"unfinished run of another recipe.*--fresh"):
                prepare(asked, unfinished)
    run(prepare(other, unfinished, fresh=True))
    run(prepare(other, tmp_path / "whole"))
    assert contents(unfinished) == contents(tmp_path / "whole")


def test_what_a_run_left_that_was_killed_at_its_very_end_is_removed(recipe, tmp_path):
    run(prepare(recipe, tmp_path / "out"))
    (tmp_path / "out" / ".tersely.done").mkdir()
    with pytest.raises(CheckpointError, match="holds no unfinished run"):
        prepare(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / ".tersely.done").exists()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(recipe: Recipe, kill: Kill, tmp_path: Path) -> Path:
    """A folder with a run of `recipe` that was stopped."""
    with kill.at(6):
        assert stopped(recipe, tmp_path / "unfinished")
    return tmp_path / "unfinished"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_recipe_is_refused_unless_it_starts_over(recipe, unfinished, tmp_path):
    out, before = unfinished, snapshot(unfinished)
    others = {
        "keep": replace(recipe, step=[replace(recipe.step[0], keep=0.7)]),
        "seed": replace(recipe, seed=1),
        "option": replace(recipe, step=[replace(recipe.step[0], options={"damping": 1e-3})]),
        "calibration": replace(recipe, calibration=replace(recipe.calibration, samples=5)),
    }
    for name, other in others.items():
        with pytest.raises(CheckpointError, match=r"unfinished run of another recipe.*--fresh"):
            prepare(other, out)
        assert snapshot(out) == before, name
    run(prepare(others["keep"], out, fresh=True))
    run(prepare(others["keep"], tmp_path / "whole"))
    assert contents(out) == contents(tmp_path / "whole")


def test_another_model_under_the_same_name_is_another_run(recipe, kill, copy_of, model_folder, tmp_path):
    dense = copy_of(model_folder())
    recipe = replace(recipe, model=str(dense))
    with kill.at(6):
        assert stopped(recipe, tmp_path / "out")
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(model_folder(tie_word_embeddings=True) / name, dense / name)
    with pytest.raises(CheckpointError, match="unfinished run of another recipe"):
        prepare(recipe, tmp_path / "out")


def test_a_wrong_recipe_that_would_start_over_destroys_nothing(recipe, unfinished):
    before = snapshot(unfinished)
    with pytest.raises(RecipeError, match="smallest"):
        prepare(replace(recipe, step=[replace(recipe.step[0], keep=1e-5)]), unfinished, fresh=True)
    assert snapshot(unfinished) == before


@pytest.mark.parametrize("fresh", [False, True])
def test_a_finished_run_and_a_foreign_folder_are_refused(fresh, recipe, compressed, copy_of, tmp_path):
    finished, foreign = copy_of(compressed()), tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "diary.txt").write_text("today")
    (tmp_path / "file").write_text("a file")
    for out in (finished, foreign):
        before = snapshot(out)
        with pytest.raises(CheckpointError, match=f"{out.name} exists and holds no unfinished run"):
            prepare(recipe, out, fresh=fresh)
        assert snapshot(out) == before
    with pytest.raises(RecipeError, match="file is a file"):
        prepare(recipe, tmp_path / "file", fresh=fresh)
    assert (tmp_path / "file").read_text() == "a file"


def test_files_are_on_the_disk_before_they_bear_their_names(tmp_path, monkeypatch):
    """Or a crash of the machine could leave a name without its content."""
    happened: list[str] = []
    rename = Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: happened.append("synced"))
    monkeypatch.setattr(Path, "replace", lambda old, new: happened.append("renamed") or rename(old, new))
    journal.commit_text(tmp_path / "file", "text")
    assert happened == ["synced", "renamed", "synced"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_folder_is_as_good_as_none(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    run(prepare(recipe, tmp_path / "out"))
    assert all(check.passed for check in verify(tmp_path / "out"))


# --- one run at a time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [False, True])
def test_while_a_run_works_another_one_is_kept_out(fresh, recipe, unfinished, tmp_path):
    one, other = prepare(recipe, unfinished), prepare(recipe, unfinished, fresh=fresh)
    before = snapshot(unfinished)
    with one.journal.alone():
        for begin in (lambda: prepare(recipe, unfinished, fresh=fresh), lambda: run(other)):
            with pytest.raises(CheckpointError, match=r"unfinished: another run is at work in it; .* another folder"):
                begin()
            assert snapshot(unfinished) == before | {".tersely/lock": b""}
        run(one)
    run(prepare(recipe, tmp_path / "whole"))
    assert contents(unfinished) == contents(tmp_path / "whole")


@pytest.mark.parametrize("fresh", [False, True])
def test_what_ended_while_another_run_got_ready_is_left_alone(fresh, recipe, unfinished):
    late = prepare(recipe, unfinished, fresh=fresh)
    run(prepare(recipe, unfinished))
    before = snapshot(unfinished)
    with pytest.raises(CheckpointError, match="exists and holds no unfinished run"):
        run(late)
    assert snapshot(unfinished) == before
    assert all(check.passed for check in verify(unfinished))


def test_a_refused_run_removes_nothing_that_another_one_began_meanwhile(recipe, tmp_path, monkeypatch):
    def another_begins(out: Path, needed: int) -> None:
        with journal.Journal(out, "another").alone():
            pass
        raise CheckpointError("the disk is full")

    monkeypatch.setattr("tersely.prepare._check_disk", another_begins)
    with pytest.raises(CheckpointError, match="the disk is full"):
        prepare(recipe, tmp_path / "out")
    assert (tmp_path / "out" / ".tersely" / "lock").is_file()


def test_the_first_of_several_processes_holds_the_lock_for_all(recipe, unfinished, monkeypatch):
    with prepare(recipe, unfinished).journal.alone():
        monkeypatch.setenv("RANK", "1")
        with prepare(recipe, unfinished).journal.alone():
            pass


def test_without_locks_runs_go_on(recipe, tmp_path, monkeypatch):
    def refused(file: object, how: int) -> None:
        raise OSError("no locks here")

    with monkeypatch.context() as patch:
        patch.setattr(journal.fcntl, "flock", refused)
        run(prepare(recipe, tmp_path / "no locks on the disk"))
    monkeypatch.setattr(journal, "fcntl", None)
    run(prepare(recipe, tmp_path / "no locks at all"))
    assert contents(tmp_path / "no locks at all") == contents(tmp_path / "no locks on the disk")


# --- what makes a run the same ----------------------------------------------------------------------------------------


@pytest.fixture
def begun(recipe: Recipe, kill: Kill, copy_of: Callable[[Path], Path], text_file: Path, tmp_path: Path) -> Recipe:
    """A recipe whose run in "out" was stopped; its model and its text may be changed."""
    model, text = copy_of(Path(recipe.model)), Path(shutil.copy(text_file, tmp_path / "words.txt"))
    asked = replace(recipe, model=str(model), calibration=replace(recipe.calibration, source=[str(text)]))
    with kill.at(6):
        assert stopped(asked, tmp_path / "out")
    return asked


def test_paths_and_times_do_not_make_another_run(begun, tmp_path, monkeypatch):
    """Nor does a file that nobody reads."""
    model, text = Path(begun.model), Path(begun.calibration.source[0])
    for path in (*model.iterdir(), text):
        os.utime(path, (1, 1))
    (model / ".hidden").write_text("")
    prepare(begun, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    shutil.move(text, "moved.txt")
    near = replace(begun, model=model.name, calibration=replace(begun.calibration, source=["moved.txt"]))
    run(prepare(near, Path("out")))
    run(prepare(near, Path("whole")))
    different = {
        name for name, content in contents(tmp_path / "out").items() if content != contents(Path("whole"))[name]
    }
    assert not different


def test_paths_of_texts_and_bases_inside_of_steps_do_not_make_another_run(recipe, model_folder, tmp_path, monkeypatch):
    text, base, adapter = (
        Path(shutil.copytree(model_folder(), tmp_path / name)) for name in ("text", "base", "adapter")
    )
    (text / "words.txt").write_text("w5 w6")

    def known(folder: Path, words: str) -> list[str]:
        steps = [
            TrainStep(["tokens"], text=[words]),
            MethodStep("svd", keep=0.6, refine=Refinement(text=[words])),
            RewriteStep("merge_adapter", {"adapter": str(folder / "adapter")}),
            MethodStep("delta_come", base=str(folder / "base")),
        ]
        return [identity(replace(recipe, step=[step]), base, calibrated=True) for step in steps]

    monkeypatch.chdir(tmp_path)
    before = known(tmp_path, str(text / "words.txt"))
    assert known(Path(), "text/words.txt") == before
    (text / "words.txt").write_text("w6 w5")
    for folder in (base, adapter):
        (folder / "config.json").write_text("{}")
    assert not set(known(tmp_path, str(text / "words.txt"))) & set(before)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "words.txt"])
def test_other_contents_are_another_run(name, begun, tmp_path):
    path = tmp_path / name if name.endswith(".txt") else Path(begun.model) / name
    kept = path.stat()
    content = path.read_bytes()
    if name == "model.safetensors":
        tensors = {name: tensor.flip(0) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        changed = {
            "tokenizer.json": (b'"w7"', b'"wx"'),
            "config.json": (b"1e-06", b"1e-05"),
            "words.txt": (b"w7", b"w8"),
        }
        assert changed[name][0] in content
        path.write_bytes(content.replace(*changed[name]))
    assert path.stat().st_size == kept.st_size
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    with pytest.raises(CheckpointError, match="unfinished run of another recipe, model or text"):
        prepare(begun, tmp_path / "out")
    path.write_bytes(content)
    prepare(begun, tmp_path / "out")


def test_one_number_of_a_large_model_is_noticed(recipe, kill, copy_of, tmp_path, monkeypatch):
    """Of a large file pieces are compared first; all weights are, once they have been read."""
    for name, size in (("WHOLE", 2000), ("PIECE", 16), ("PIECES", 2)):
        monkeypatch.setattr(f"tersely.prepare.{name}", size)
    model = copy_of(Path(recipe.model))
    asked = replace(recipe, model=str(model))
    with kill.at(6):
        assert stopped(asked, tmp_path / "out")
    before = known_by(model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert known_by(model) == before
    with pytest.raises(CheckpointError, match="unfinished run of another recipe, model or text"):
        prepare(asked, tmp_path / "out")
    run(prepare(asked, tmp_path / "out", fresh=True))
    run(prepare(asked, tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- what is damaged --------------------------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if how == "truncated" else b"\x00garbage" * 20)


def test_damage_names_the_file_and_how_to_start_over(recipe, kill, tmp_path):
    """Every file that an unfinished run of two steps made itself: most are read by whoever goes on."""
    recipe, out = two_steps(spilling(recipe)), tmp_path / "out"
    run(prepare(recipe, tmp_path / "whole"))
    with kill.at(35):
        assert stopped(recipe, out)
    kept = Path(shutil.copytree(out, tmp_path / "kept"))
    said = set()
    made = [path for path in sorted(kept.rglob("*")) if path.suffix in (".json", ".safetensors")]
    for number, path in enumerate(path for path in made if not path.name.startswith("tokenizer")):
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        damaged = out / path.relative_to(kept)
        spoil(damaged, "truncated" if number % 2 else "garbage")
        try:
            run(prepare(recipe, out))
        except DamageError as error:
            assert str(damaged) in str(error) or str(damaged.parent) in str(error)
            assert str(error).endswith("start over with --fresh")
            said.add(damaged.name)
            run(prepare(recipe, out, fresh=True))
        assert contents(out) == contents(tmp_path / "whole"), damaged
    assert said >= {"run.json", "plan.json", "0000.json", "0000.safetensors", "config.json", "model.safetensors"}


def test_a_damaged_copy_under_other_names_is_made_anew(recipe, kill, copy_of, model_folder, tmp_path):
    recipe, out = replace(recipe, model=str(pickled(copy_of(model_folder())))), tmp_path / "out"
    with kill.at(8):
        assert stopped(recipe, out)
    (weights,) = (out / ".tersely").glob("source-*/model.safetensors")
    spoil(weights, "truncated")
    with pytest.raises(DamageError, match=r"model\.safetensors: truncated or damaged.*--fresh"):
        prepare(recipe, out)
    run(prepare(recipe, out, fresh=True))
    run(prepare(recipe, tmp_path / "whole"))
    assert contents(out) == contents(tmp_path / "whole")


def test_damaged_statistics_of_several_runs_are_to_be_removed(recipe, tmp_path):
    recipe, statistics = spilling(recipe), tmp_path / "statistics"
    run(prepare(recipe, tmp_path / "one"), statistics=statistics)
    (file,) = statistics.rglob("0000.gram.safetensors")
    spoil(file, "truncated")
    with pytest.raises(CheckpointError, match=f"{file.name}: damaged .*; remove it, what it held is measured again"):
        run(prepare(recipe, tmp_path / "two"), statistics=statistics)
    file.unlink()
    run(prepare(recipe, tmp_path / "two"), statistics=statistics)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# --- statistics that are kept -----------------------------------------------------------------------------------------


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with every replay of a model."""
    begun: list[object] = []

    class Counted(calibrate.Replay):
        def __init__(self, *arguments: Any) -> None:
            begun.append(self)
            super().__init__(*arguments)

    for module in (job, sweeps):
        monkeypatch.setattr(module, "Replay", Counted)
    return begun


@pytest.mark.parametrize(("propagate", "first", "later"), [("none", 1, 0), ("block", 2, 1)])
def test_statistics_are_measured_once(propagate, first, later, recipe, replays, tmp_path):
    """Behind compressed blocks there is nothing to reuse: that sweep stays."""
    recipe = replace(recipe, step=[replace(recipe.step[0], propagate=propagate)])
    smaller = replace(recipe, step=[replace(recipe.step[0], keep=0.4)])
    for number, asked in enumerate((recipe, smaller)):
        plain, kept = tmp_path / f"plain-{number}", tmp_path / f"kept-{number}"
        run(prepare(asked, plain))
        replays.clear()
        run(prepare(asked, kept), statistics=tmp_path / "statistics")
        assert len(replays) == (later if number else first)
        assert contents(kept) == contents(plain)


def test_behind_the_last_block_that_is_asked_about_nothing_is_computed(recipe, tmp_path, monkeypatch):
    """Nobody reads what the last block returns: it runs as far as its last input that is asked for."""
    runs: list[bool] = []
    observe = calibrate.Replay.observe

    def noted(self: calibrate.Replay, *arguments: Any, advance: bool, **keywords: Any) -> None:
        runs.append(advance)
        observe(self, *arguments, advance=advance, **keywords)

    monkeypatch.setattr(calibrate.Replay, "observe", noted)
    run(prepare(spilling(recipe), tmp_path / "out"))
    assert runs == [True] * (len(runs) - 1) + [False]


def test_statistics_serve_every_choice_of_targets_and_no_other_input(recipe, replays, model_folder, tmp_path):
    recipe = spilling(recipe)
    step = recipe.step[0]
    statistics = tmp_path / "statistics"
    only_mlp = replace(recipe, step=[replace(step, target=["mlp.down"])])
    run(prepare(only_mlp, tmp_path / "mlp"), statistics=statistics)
    others = [
        (replace(recipe, step=[replace(step, allocate="uniform")]), 0),
        (replace(recipe, step=[replace(step, options={"damping": 1e-3})]), 0),
        (replace(recipe, seed=7), 1),
        (replace(recipe, calibration=replace(recipe.calibration, samples=5)), 1),
        (replace(recipe, dtype="bfloat16"), 1),
        (replace(recipe, model=str(model_folder(tie_word_embeddings=True))), 1),
        (replace(recipe, step=[MethodStep("asvd", keep=0.6, propagate="none")]), 1),
        (recipe, 0),
    ]
    for number, (asked, wanted) in enumerate(others):
        replays.clear()
        run(prepare(asked, tmp_path / f"{number}"), statistics=statistics)
        assert len(replays) == wanted, asked
        run(prepare(asked, tmp_path / f"{number}-plain"))
        assert contents(tmp_path / f"{number}") == contents(tmp_path / f"{number}-plain")


def test_statistics_that_were_cut_short_are_completed(recipe, kill, tmp_path):
    recipe = spilling(recipe)
    run(prepare(recipe, tmp_path / "whole"))
    for count in (3, 4, 5, 6):
        out, statistics = tmp_path / f"out-{count}", tmp_path / f"statistics-{count}"
        with kill.at(count, midway=True), pytest.raises(KeyboardInterrupt):
            run(prepare(recipe, out), statistics=statistics)
        run(prepare(recipe, out), statistics=statistics)
        assert contents(out) == contents(tmp_path / "whole")

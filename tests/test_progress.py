"""What is said while something takes long, what is measured of it, and how it ends when it is told to."""

import io
import json
import mmap
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tersely import memory, progress, sweeps
from tersely.cli import application, main
from tersely.job import Clock, PartProgress, tell_site
from tersely.memory import peak_memory, peak_of_stage, peak_within
from tersely.pipeline import compress, run
from tersely.prepare import prepare
from tersely.progress import Reporter, Stage, duration
from tersely.recipe import Calibration, Evaluation, MethodStep, Recipe

BYTES = 40_000_000
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="this system does not tell what a process holds")


class Time:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    moved = Time()
    monkeypatch.setattr(progress, "time", moved)
    monkeypatch.setattr(progress, "resident_memory", lambda device=None: 1_420_000_000)
    return moved


@pytest.fixture
def lines(clock: Time, capsys: pytest.CaptureFixture[str]) -> Iterator[Reporter]:
    """A reporter without a terminal."""
    with Reporter(Console(file=io.StringIO())) as reporter:
        yield reporter


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


# --- lines ------------------------------------------------------------------------------------------------------------


def test_a_block_is_a_line_with_its_worst_site(lines, clock, capsys):
    lines("compressing blocks", 0, 3)
    for block, errors in enumerate([(0.01, 0.5), (0.02, None), (0.25,)], start=1):
        for n, error in enumerate(errors):
            lines.site(f"layers.{block}.{n}", error)
        clock.now += 12.34
        lines("compressing blocks", block, 3)
    assert said(capsys) == [
        "compressing blocks: 1 of 3, 2 sites, worst layers.1.1 with error 0.5, 12 s, 1.42 GB, about 25 s left",
        "compressing blocks: 2 of 3, 2 sites, worst layers.2.0 with error 0.02, 12 s, 1.42 GB, about 12 s left",
        "compressing blocks: 3 of 3, 1 site, worst layers.3.0 with error 0.25, 12 s, 1.42 GB, all in 37 s",
    ]


def test_quick_blocks_share_a_line_and_none_of_their_sites_is_lost(lines, clock, capsys):
    for block in range(41):
        if block:
            lines.site(f"layers.{block}", block / 100)
        lines("compressing blocks", block, 40)
        clock.now += 0.125
    found = [re.search(r": (\d+) of 40, (\d+) sites?, worst layers\.(\d+) ", line) for line in said(capsys)]
    assert [match.groups() for match in found] == [(str(n), "8", str(n)) for n in (8, 16, 24, 32, 40)]


def test_long_stages_are_told_of_less_and_less_often(lines, clock, capsys):
    for step in range(36_001):
        lines("training steps", step, 36_000)
        clock.now += 1
    told = [
        int(re.match(r"training steps: (\d+) of 36000, 1\.42 GB, (about|all in) ", line)[1]) for line in said(capsys)
    ]
    gaps = [after - before for before, after in pairwise(told[:-1])]
    assert gaps[0] == 5 and gaps == sorted(gaps) and 1000 < gaps[-1] < 2000
    assert told[-1] == 36_000 and len(told) < 200


def test_what_a_former_run_finished_took_no_time(lines, clock, capsys):
    lines("compressing blocks", 18, 20)
    clock.now += 30
    lines("compressing blocks", 19, 20)
    (line,) = said(capsys)
    assert line.endswith("about 30 s left")  # not two seconds


def test_of_a_unit_that_goes_on_the_time_it_took_is_taken_off(clock):
    stage = Stage("compressing blocks", 2, 4, begun=0.0, changed=20.0)
    assert [stage.remaining(now) for now in (20, 25, 29, 31, 99)] == [20, 15, 11, 10, 10]
    assert Stage("compressing blocks", 0, 4, begun=0.0).remaining(7) is None


def test_a_stage_within_another_does_not_end_with_a_line(lines, clock, capsys):
    lines("compressing blocks", 0, 2)
    for block in (1, 2):
        for step in range(4):
            lines("training steps", step, 3)
            clock.now += 1
        lines.site(f"layers.{block}", 0.1)
        lines("compressing blocks", block, 2)
    assert [line.split(",")[0] for line in said(capsys)] == ["compressing blocks: 1 of 2", "compressing blocks: 2 of 2"]


def test_how_far_it_came_is_told_of_the_outermost_stage(lines):
    assert lines.reached() == ""
    lines("measuring blocks", 4, 4)
    assert lines.reached() == "measuring blocks, 4 of 4 done"
    lines("compressing blocks", 1, 4)
    lines("training steps", 3, 90)
    assert lines.reached() == "compressing blocks, 1 of 4 done"


def test_a_part_names_itself_and_hands_sites_on(lines, clock, capsys):
    part = PartProgress(lines, "step 2 of 3")
    part("compressing blocks", 0, 1)
    tell_site(part, "layers.0", 0.5)
    part("compressing blocks", 1, 1)
    (line,) = said(capsys)
    assert line.startswith("step 2 of 3, compressing blocks: 1 of 1, 1 site, worst layers.0 with error 0.5, ")
    heard: list[tuple] = []
    tell_site(lambda *told: heard.append(told), "layers.0", 0.5)  # who takes three arguments is not told of sites
    assert heard == []


def test_times_are_written_for_people():
    times = (0.04, 9.94, 9.96, 99.4, 99.6, 5999, 6000, 12_345)
    assert [duration(seconds) for seconds in times] == [
        "0.0 s", "9.9 s", "10 s", "99 s", "2 min", "1 h 40 min", "1 h 40 min", "3 h 26 min",
    ]  # fmt: skip


# --- on a terminal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 100])
def test_a_terminal_shows_a_bar_and_the_last_site(width, clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    with Reporter(Console(file=screen, force_terminal=True, width=width, legacy_windows=False)) as reporter:
        reporter("compressing blocks", 0, 22)
        for block in (1, 2):
            reporter.site("layers.0.mlp", 0.1)
            reporter.site(f"layers.{block}.mlp[/bold]", 0.0312)
            clock.now += 60
            reporter("compressing blocks", block, 22)
        clock.now += 30
        reporter("windows of [bold]", 0, 5)
        reporter._bars.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "2/22" in shown and "0/5" in shown
    assert "layers.2.mlp[/bold], relative error 0.0312" in shown  # a name is no markup
    if width == 100:
        assert "compressing blocks" in shown and "windows of [bold]" in shown
        assert "2 min, 1.42 GB, about 20 min left" in shown
    assert all(len(line) <= width for line in re.split(r"[\r\n]+", shown))


# --- what a run tells -------------------------------------------------------------------------------------------------


class Heard:
    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.sites: list[tuple[str, float | None]] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        self.calls.append((what, done, total))

    def site(self, name: str, error: float | None) -> None:
        self.sites.append((name, error))


@pytest.mark.parametrize("allocate", ["uniform", "greedy"])
def test_a_run_tells_of_every_block_and_every_site(allocate, model_folder, text_file, tmp_path, capsys):
    heard = Heard()
    given = {"method": "svd_llm", "keep": 0.6, "allocate": allocate, "calibrate": [str(text_file)], "samples": 4}
    result = compress(model_folder(), tmp_path / "out", **given, length=16, progress=heard)
    blocks = [call for call in heard.calls if call[0] == sweeps.COMPRESSING]
    assert list(dict.fromkeys(blocks)) == [(sweeps.COMPRESSING, done, 2) for done in range(3)]
    cut = [site for site in result.report.sites if site.amount is not None]
    assert [one for one in heard.sites if one[1] is not None] == [(site.name, site.measured_error) for site in cut]
    assert [call for call in heard.calls if call[0] == "measuring blocks"] == (
        [("measuring blocks", done, 2) for done in range(3)] if allocate == "greedy" else []
    )
    assert capsys.readouterr().err == ""
    compress(model_folder(), tmp_path / "quiet", **given, length=16)
    assert capsys.readouterr() == ("", "")


# --- memory by stage --------------------------------------------------------------------------------------------------


def hold(seconds: float = 0.3, nbytes: int = BYTES) -> None:
    """Hold pages of the system's own: what is asked of an allocator may come from what earlier tests freed there."""
    with mmap.mmap(-1, nbytes) as held:
        for page in range(0, nbytes, mmap.PAGESIZE):
            held[page] = 1
        time.sleep(seconds)


@on_linux
def test_the_peak_of_a_stage_is_its_own():
    """The second stage reaches less than the first one, and the mark of the process cannot tell."""
    with peak_of_stage() as first:
        hold(nbytes=3 * BYTES)
    with peak_of_stage() as second:
        hold()
    with peak_of_stage() as third:
        pass
    assert first.highest - first.before >= 0.95 * 3 * BYTES
    assert 0.95 * BYTES <= second.highest - second.before < 2 * BYTES
    assert third.highest - third.before < 0.5 * BYTES


@on_linux
def test_a_stage_that_sets_the_record_is_measured_by_the_mark_however_short(monkeypatch):
    monkeypatch.setattr(memory, "SAMPLED_FIRST", 3600.0)
    with peak_within():
        with peak_of_stage() as found:
            hold(0.0)
        assert found.highest - found.before >= 0.95 * BYTES
        assert peak_memory() == found.highest


@on_linux
def test_measuring_a_stage_leaves_the_mark_of_the_process_to_others():
    with peak_within() as around:
        hold(0.0)
        with peak_of_stage():
            pass
    assert around.highest - around.before >= 0.95 * BYTES


def test_nobody_goes_on_measuring_after_a_stage():
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), peak_of_stage():
        raise KeyboardInterrupt
    assert threading.active_count() == before


def test_where_the_system_does_not_tell_nothing_is_said(monkeypatch):
    monkeypatch.setattr(memory, "_resident", lambda what: None)
    clock = Clock()
    with clock("replay"):
        pass
    assert clock.peaks == {} and clock.seconds.keys() == {"replay"}
    assert peak_memory() > 10**6  # since the process began, every system does


class Card:
    """What CUDA tells of tensors, without a CUDA device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = self.mark = 0
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: self.held)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: self.mark)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: setattr(self, "mark", self.held))
        monkeypatch.setattr(memory, "_measuring", {0: []})
        monkeypatch.setattr(memory, "_forgotten", {0: 0})

    def take(self, count: int) -> None:
        self.held += count
        self.mark = max(self.mark, self.held)


def test_a_mark_that_is_set_back_is_not_lost_to_those_around(monkeypatch):
    card, device = Card(monkeypatch), torch.device("cuda")
    card.take(50)
    card.take(-40)
    clock = Clock("cuda")
    with peak_within(device) as around:
        card.take(20)
        card.take(-20)
        with clock("replay"):
            card.take(7)
            card.take(-7)
        with clock("factorise"):
            card.take(3)
        with clock("replay"):
            card.take(1)
    assert clock.peaks == {"replay": 17, "factorise": 13}
    assert (around.before, around.highest) == (10, 30)
    assert peak_memory(device) == 50


@on_linux
def test_the_report_tells_time_and_memory_of_the_same_stages(model_folder, text_file, tmp_path):
    texts = [str(text_file)]
    evaluation = Evaluation(texts, length=16, windows=4)
    step = MethodStep("svd_llm", keep=0.6)
    recipe = Recipe(str(model_folder()), [step], Calibration(texts, 4, 16), evaluation=evaluation)
    out = tmp_path / "out"
    run(prepare(recipe, out))
    report = json.loads((out / "report.json").read_text())
    stages = report["seconds"].keys() - {"everything"}
    assert report["peak_bytes_by_stage"].keys() == stages >= {"replay", "factorise", "curves", "evaluate"}
    assert all(10**7 < peak <= report["peak_bytes"] for peak in report["peak_bytes_by_stage"].values())
    assert report["steps"][0]["peak_bytes_by_stage"].keys() == report["steps"][0]["seconds"].keys()
    assert report["resumed"] is False


# --- told to end ------------------------------------------------------------------------------------------------------

PATIENCE = 900.0
"""Seconds until a process is given up on: the machine may be busy with something else."""

DEMO = Path(str(files("tersely").joinpath("assets/demo")))


def flags(out: Path, text: Path) -> list[str]:
    said = ["--method", "svd_llm", "--keep", "0.7", "--calibrate", str(text), "--samples", "128", "--length", "256"]
    return ["compress", str(DEMO), str(out), *said, "--threads", "1"]


def told_to_end(number: signal.Signals, command: list[str], out: Path, blocks: int) -> re.Match[str]:
    """Run a command until so many blocks are finished; what it says when it then gets a signal."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + PATIENCE
    while len(list(out.glob(".tersely/work-0/.tersely/blocks/*.json"))) < blocks:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.001)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    assert not (out / "config.json").exists()
    said = r"interrupted at compressing blocks, (\d) of 4 done; what is finished is kept, go on with: (.+)"
    found = re.fullmatch(f"error: {said}", err.splitlines()[-1])
    assert found is not None, err
    assert int(found[1]) in (blocks - 1, blocks)  # that it is kept is known before it is told
    return found


def test_told_to_end_it_says_how_to_go_on_and_that_ends_with_the_same_bytes(text_file, tmp_path, interruptible):
    text, out, whole = tmp_path / "a text.txt", tmp_path / "it's out", tmp_path / "whole"
    text.write_text(8 * f"{text_file.read_text()}\n")
    tersely = [sys.executable, "-m", "tersely"]
    first = told_to_end(signal.SIGINT, [*tersely, *flags(out, text), "--fresh"], out, 1)
    assert shlex.split(first[2]) == [*tersely, *flags(out, text)]  # with --fresh it would begin anew
    second = told_to_end(signal.SIGTERM, shlex.split(first[2]), out, 3)
    assert second[2] == first[2]
    last = subprocess.run(second[2], shell=True, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert last.returncode == 0, last.stderr
    assert "compressing blocks: 4 of 4" in last.stderr
    assert json.loads((out / "report.json").read_text())["resumed"] is True
    undisturbed = subprocess.run([*tersely, *flags(whole, text)], capture_output=True, text=True, check=False)
    assert undisturbed.returncode == 0, undisturbed.stderr
    for name in ("model.safetensors", "config.json", "plan.json", "recipe.toml"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_what_cannot_go_on_says_so(model_folder, capsys, monkeypatch):
    def interrupted(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tersely.pipeline.evaluate", interrupted)
    monkeypatch.setattr(application, "debugging", False)
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(model_folder()), "--text", "a b.txt"])
    command = shlex.join(["tersely", "eval", str(model_folder()), "--text", "a b.txt"])
    assert ended.value.code == 1
    assert said(capsys)[-1] == f"error: interrupted; begin anew with: {command}"


@pytest.mark.parametrize("swallow", [False, True], ids=["comes out as another", "does not come out"])
def test_a_signal_that_a_library_makes_something_else_of_is_heeded(
    swallow, model_folder, text_file, tmp_path, capsys, monkeypatch, interruptible
):
    """C code that asks an object for what it may not have takes every exception for a no."""
    cut, calls = sweeps._cut, []

    def like_c(*arguments: Any) -> None:
        calls.append(arguments)
        try:
            if len(calls) == 6:
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if not swallow:
                raise ValueError("could not determine the shape of it") from None
        cut(*arguments)

    monkeypatch.setattr(sweeps, "_cut", like_c)
    monkeypatch.setattr(application, "debugging", False)
    said_so = ["--method", "svd", "--keep", "0.6", "--target", "mlp", "attention.o"]
    with pytest.raises(SystemExit) as ended:
        main(["compress", str(model_folder()), str(tmp_path / "out"), *said_so])
    assert ended.value.code == 1
    assert said(capsys)[-1].startswith("error: interrupted at compressing blocks, ")
    assert len(calls) == 6

"""Other people's packages as rows, with a script in the place of a package: none of them is needed here."""

import json
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tersely.anatomy import anatomy_of
from tersely.bench import PEERS, Bench, Entry, Peer, check_bench, dequantized, markdown, peers_in, run_bench
from tersely.bench import peers as module
from tersely.bench.entry import GROUPS, Setting
from tersely.checkpoint import open_source, read_tokenizer
from tersely.cli import main
from tersely.errors import RecipeError
from tersely.evaluation import folder_bytes
from tersely.pipeline import quiet
from tersely.recipe import Calibration
from tersely.windows import read_windows

SCRIPTS = Path(__file__).parents[1] / "bench" / "peers"

SCRIPT = """
import json, shutil, sys
from dataclasses import replace
from pathlib import Path
import numpy
from safetensors.numpy import load_file, save_file

request = json.loads(Path(sys.argv[1]).read_text())
what = request["settings"].get("what")
if what == "fails":
    raise ImportError("the package needs a graphics card")
if what == "sleeps":
    import time
    time.sleep(30)
out, model = Path(request["out"]), Path(request["model"])
out.mkdir()
tensors = load_file(model / "model.safetensors")
touched = [f"{name}.weight" for name in request["linears"]]
if what == "nan":
    tensors[touched[0]][0, 0] = numpy.nan
if what == "half":
    del tensors[touched[0]]
if what == "zero":
    tensors |= {name: numpy.zeros_like(tensors[name]) for name in touched}
save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
shutil.copy(model / "config.json", out)
if what == "silent":
    sys.exit()
if what == "keeps":
    shutil.copy(sys.argv[1], model.parent / "request.json")
    shutil.copy(request["windows"], model.parent / "windows.safetensors")
codes = sum(tensors[name].size for name in touched) * request["bits"] // 8
said = {"seconds": 0.5, "resident_bytes": 100, "peak_bytes": 150, "versions": {}}
said["stored"] = {"codes": codes, "scales": 16}
(out / "measured.json").write_text(json.dumps(said))
"""


@pytest.fixture
def scripts(tmp_path):
    """A folder of scripts with a single one, and its environment, which is ours."""
    folder = tmp_path / "bench" / "peers"
    folder.mkdir(parents=True)
    (folder / "with_fake.py").write_text(SCRIPT)
    environment = tmp_path / ".peers" / "fake"
    (environment / "bin").mkdir(parents=True)
    (environment / "installed").touch()
    python = environment / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return folder


@pytest.fixture
def fake(scripts):
    def make(what=None, group="untrained", width=4):
        options = {"width": width, "group": 64} | ({} if what is None else {"what": what})
        return Peer("fake", options, group, "rtn", scripts)

    return make


@pytest.fixture
def setting(model_folder, text_file):
    return Setting(str(model_folder()), Calibration([str(text_file)], samples=4, length=32))


@pytest.fixture
def bench(setting, text_file):
    def make(*entries):
        return Bench(setting.model, entries, [0.5], [str(text_file)], setting.calibration, 32, 4)

    return make


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_peer_that_writes_the_dense_model_is_the_dense_model(bench, fake, tmp_path):
    file = tmp_path / "rows.json"
    ours, theirs = run_bench(bench(Entry("rtn", sizes=None, options={"width": 4}), fake()), file, "command", quiet)
    assert theirs["method"] == "peer:fake" and theirs["options"] == {"width": 4, "group": 64}
    assert theirs["perplexity"] == theirs["dense_perplexity"] == ours["dense_perplexity"]
    assert theirs["kl"] == 0 and theirs["top1"] == 1
    assert ours.keys() <= theirs.keys()
    assert theirs["protocol"] == ours["protocol"] and theirs["protocol"]["dtype"] == "float32"
    assert (theirs["seconds"], theirs["peak_bytes"], theirs["resident_bytes"]) == (0.5, 150, 100)
    assert not (tmp_path / "rows.work").exists()
    table = markdown([ours, theirs], "command")
    assert len([line for line in table.splitlines() if line.startswith("| peer:fake (width 4, group 64) |")]) == 3
    assert "dequantized" in table and "dequantized" not in markdown([ours], "command")


def test_bytes_are_those_of_the_format(setting, fake, tmp_path):
    made = dequantized(fake(), setting, tmp_path / "out")
    source = open_source(Path(setting.model))
    sites = anatomy_of(source.skeleton()).sites
    weights = sum(site.in_features * site.out_features for site in sites)
    assert made.costs["touched_bytes"] == weights // 2 + 16
    assert made.costs["bits_per_weight"] == pytest.approx(4 + 128 / weights)
    assert made.costs["kept"] == pytest.approx(made.costs["touched_bytes"] / (4 * weights))
    # the dense folder, but for its card, the header of its weights, and what became smaller
    missing = folder_bytes(Path(setting.model)) - made.costs["bytes"]
    header = Path(setting.model, "model.safetensors").stat().st_size - source.nbytes()
    card = Path(setting.model, "README.md").stat().st_size
    assert missing == 4 * weights - made.costs["touched_bytes"] + header + card


def test_a_peer_sees_the_windows_that_we_see(setting, fake, tmp_path, copy_of):
    setting = Setting(str(copy_of(Path(setting.model))), setting.calibration, seed=3)
    dequantized(fake("keeps", width=3), setting, tmp_path / "out")
    request = json.loads((tmp_path / "request.json").read_text())
    config = open_source(Path(setting.model)).config
    windows = read_windows(setting.calibration, read_tokenizer(Path(setting.model)), config, 3, None)
    assert torch.equal(load_file(tmp_path / "windows.safetensors")["tokens"], windows.tokens)
    assert (request["bits"], request["group"], request["seed"]) == (3, 64, 3)
    assert request["threads"] == torch.get_num_threads()
    assert all(re.fullmatch(r"model\.layers\.\d\.(self_attn|mlp)\.\w+_proj", name) for name in request["linears"])


def test_what_learned_stands_with_what_learned(bench, fake, tmp_path, text_file):
    rows = run_bench(bench(fake(), fake("zero", "trained")), tmp_path / "rows.json", "command", quiet)
    assert [(row["group"], row["trained_on"]) for row in rows] == [("untrained", None), ("trained", [str(text_file)])]
    assert rows[1]["kl"] > 0


def test_ours_stand_beside_a_package_window_by_window(bench, fake, tmp_path):
    symmetric = Entry("rtn", sizes=None, options={"width": 4, "grid": "symmetric"})
    others = Entry("rtn", sizes=None, options={"width": 3}), Entry("svd")
    job = replace(bench(Entry("rtn", sizes=None, options={"width": 4}), symmetric, *others, fake()), chosen={4: "svd"})
    file = tmp_path / "rows.json"
    rows = run_bench(job, file, "command", quiet)
    beside = json.loads(file.read_text())["beside_peers"]
    assert [one["ours"] for one in beside] == ["rtn (width 4)", "rtn (width 4, grid symmetric)", "svd"]
    for one, ours in zip(beside, (rows[0], rows[1], rows[3]), strict=True):
        # the package wrote the dense model: the ratio is that to dense, and its interval holds it
        low, high = one["ratio_interval"]
        assert one["ratio"] == pytest.approx(ours["relative_perplexity"], rel=1e-6)
        assert low <= one["ratio"] <= high and one["lower"] == (high < 1)
        assert one["perplexity"] == [ours["perplexity"], rows[4]["perplexity"]]
    table = markdown(rows, "command", beside)
    lines = table.partition("## Beside other packages")[2].partition("## What it takes")[0].splitlines()
    assert sum(line.startswith("| peer:fake") for line in lines) == 3
    # a bench that is complete keeps what it said, though the losses are gone
    assert run_bench(job, file, "command", quiet) == rows
    assert json.loads(file.read_text())["beside_peers"] == beside


# --- what has no result -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("fails", "exit status 1: ImportError: the package needs a graphics card"),
        ("nan", "NaN or infinite weights in model.layers.0"),
        ("half", "model.layers.0"),
        ("silent", "no measured.json"),
    ],
)
def test_a_peer_that_fails_is_a_row_that_says_why(what, reason, bench, fake, tmp_path):
    file = tmp_path / "rows.json"
    failed, done = run_bench(bench(fake(what), fake()), file, "command", quiet)
    assert reason in failed["failed"] and "perplexity" not in failed and done["perplexity"] > 0
    assert str(tmp_path) not in failed["failed"]
    assert run_bench(bench(fake(what), fake()), file, "command", quiet) == [failed, done]
    assert reason in markdown([failed, done], "command")


def test_one_that_never_ends_is_stopped(setting, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    assert dequantized(fake("sleeps"), setting, tmp_path / "out") == {"failed": "stopped after 0.5 seconds"}


def test_one_that_is_not_installed_says_so(setting, fake, tmp_path, scripts):
    environment = tmp_path / ".peers" / "fake"
    (environment / "installed").unlink()
    assert "make peers" in dequantized(fake(), setting, tmp_path / "out")["failed"]
    (environment / "install.log").write_text("Collecting fake\n")
    assert "has not ended" in dequantized(fake(), setting, tmp_path / "out")["failed"]
    (environment / "install.log").write_text("Collecting fake\nERROR: No matching distribution found for fake\n")
    assert dequantized(fake(), setting, tmp_path / "out") == {
        "failed": "does not install: ERROR: No matching distribution found for fake"
    }
    (environment / "installed").touch()
    (environment / "bin" / "python").chmod(0o644)
    assert "does not run" in dequantized(fake(), setting, tmp_path / "out")["failed"] or os.geteuid() == 0


def test_nothing_but_peers_is_a_bench_too(bench, fake, tmp_path):
    check_bench(bench(fake("fails")), tmp_path / "rows.json", "command")
    with pytest.raises(SystemExit) as ended:
        main(["bench", "peers", bench().model, "--json", str(tmp_path / "rows.json")])
    assert ended.value.code == 2
    with pytest.raises(RecipeError, match="with_hqq"):
        peers_in(tmp_path)


# --- the scripts and their table --------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.folder(None))
def test_every_peer_has_a_script_a_pinned_package_and_a_line_of_its_own(peer):
    if not SCRIPTS.is_dir():
        pytest.skip("the scripts lie in the repository, not in the package")
    (script,) = [one.script for one in peers_in(SCRIPTS) if one.folder(None) == peer.folder(None)]
    # its own environment holds nothing of ours
    assert not re.search(r"^\s*(from|import) tersely", script.read_text(), flags=re.MULTILINE)
    assert re.fullmatch(rf"{peer.package}==[\d.]+\n", (SCRIPTS / f"{peer.package}.txt").read_text())
    assert peer.group in GROUPS
    assert sum(other.folder(None) == peer.folder(None) for other in PEERS) == 1

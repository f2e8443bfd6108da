"""Other people's packages as rows: the same model, the same calibration windows, the same evaluation.

A peer runs in an environment of its own, which `make peers` builds, since packages pin each other away and one changes
how Python starts.  Its script (``bench/peers/with_NAME.py``) reads one JSON file, quantizes the linears named there
with the package's own functions, and leaves a plain model folder in which these are dense again: what the codes stand
for, in float32.  That folder is evaluated like any other, so a row says what was chosen, not whose kernels round how.

Seconds and memory are what the script measures around the package's call: no start, no import, no reading, no writing
(a row of ours has all but start and import).  Bytes are counted from the format: codes at their bits, scales, zero
points and second scales at theirs; a folder's bytes are those of the dense one with that in the place of the weights.
Packages run on the processor, with as many threads as this process has.
What a peer writes is checked (every tensor there, of its shape, finite), and one that does not install, fails, or
writes nonsense is a row that says so.
"""

import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tersely import own_text
from tersely.anatomy import anatomy_of, needs_first_token
from tersely.bench.entry import Group, Setting
from tersely.checkpoint import Source, carried_files, locate, open_source, read_tokenizer
from tersely.errors import RecipeError, TerselyError
from tersely.journal import commit_tensors, commit_text
from tersely.report.naming import PEER
from tersely.windows import read_windows

PATIENCE = 3600.0
"""Seconds after which a package is stopped."""

LONGEST_REASON = 300
WINDOWS = "windows.safetensors"


@dataclass(frozen=True)
class Peer:
    """One way of one package; beside `Entry`, a row of a bench."""

    package: str
    """As it is installed: the script is with_PACKAGE.py, the environment .peers/PACKAGE."""
    options: dict[str, Any]
    """`width` and `group`, and what the script is told beyond them."""
    group: Group = "untrained"
    counterpart: str = ""
    """Our method by the same algorithm, whose rows of this group stand beside it."""
    scripts: Path = Path("bench/peers")
    """The folder of scripts; the environments lie in .peers, two folders up."""

    sizes = None
    """A package is asked for a width, not for a size."""

    @property
    def method(self) -> str:
        return PEER + self.package

    @property
    def compared_with(self) -> Group:
        return self.group

    @property
    def script(self) -> Path:
        return self.scripts / f"with_{self.package.replace('-', '_')}.py"

    @property
    def environment(self) -> Path:
        return self.scripts.absolute().parents[1] / ".peers" / self.package

    def described(self) -> dict[str, Any]:
        return dict(self.options)

    def folder(self, size: float | None) -> str:
        words = (f"{key}-{value}" for key, value in self.options.items())
        return "-".join(["peer", self.package, *words])


WAYS: tuple[tuple[str, dict[str, Any], Group, str], ...] = (
    ("hqq", {}, "untrained", "hqq"),
    ("sinq", {}, "untrained", "sinq"),
    ("llmcompressor", {"algorithm": "rtn"}, "untrained", "rtn"),
    ("llmcompressor", {"algorithm": "gptq"}, "untrained", "gptq"),
    ("llmcompressor", {"algorithm": "awq"}, "untrained", "awq"),
    ("auto-round", {"steps": 200}, "trained", "rtn"),
)
PEERS = tuple(
    Peer(package, {"width": width, "group": 64, **options}, group, counterpart)
    for width in (8, 4, 3, 2)
    for package, options, group, counterpart in WAYS
)
"""The packages and their ways, on the grid that most of them are tuned for: groups of 64, with zero points.  The script
of sinq also knows asinq, which takes many minutes on a processor, and the normal-float levels, see there."""


def peers_in(scripts: Path) -> tuple[Peer, ...]:
    """All packages, run by the scripts of a folder.  Raises RecipeError if they are not there."""
    peers = tuple(replace(peer, scripts=scripts) for peer in PEERS)
    if missing := sorted({peer.script.name for peer in peers if not peer.script.is_file()}):
        raise RecipeError(f"--peers {scripts}: no {', '.join(missing)} in it; give the folder bench/peers")
    return peers


@dataclass(frozen=True)
class Dequantized:
    """A folder of dense weights that a package left, and what the row says of it beside its quality."""

    out: Path
    costs: dict[str, Any]


def dequantized(peer: Peer, setting: Setting, out: Path) -> "Dequantized | dict[str, str]":
    """Let a package quantize every linear of the blocks; the folder `out` must not be there.

    A dictionary that says why if nothing came of it.
    """
    source = open_source(locate(setting.model))
    sites = anatomy_of(source.skeleton()).sites
    request = {
        "model": str(source.folder.absolute()),
        "linears": [site.name for site in sites],
        "windows": str(_windows_file(setting, source, out.parent).absolute()),
        **asked(peer.options, setting.seed),
    }
    said = run_script(peer, request, out)
    if isinstance(said, str):
        return {"failed": said}
    try:
        _check(out, source)
    except (OSError, TerselyError) as error:
        return {"failed": f"what the script left cannot be used: {_shortened(str(error), out)}"}
    stored, seconds = sum(said["stored"].values()), said["seconds"]
    weights = sum(site.out_features * site.in_features for site in sites)
    dense = sum(source.stored_bytes(f"{site.name}.weight") for site in sites)
    carried = sum(path.stat().st_size for path in (*carried_files(source.folder), source.folder / "config.json"))
    costs = {
        "bytes": source.nbytes() - dense + stored + carried,
        "touched_bytes": stored,
        "kept": stored / dense,
        "removed": 1 - stored / dense,
        "bits_per_weight": 8 * stored / weights,
        "mean_error": None,
        "left_dense": 0,
        "degraded": 0,
        "seconds": seconds,
        "stages": {"everything": seconds},
        "peak_bytes": said["peak_bytes"],
        "resident_bytes": said["resident_bytes"],
        "trained_on": sorted(setting.calibration.source) if peer.group == "trained" else None,
        "stored": said["stored"],
        "versions": said["versions"],
    }
    return Dequantized(out, costs)


def run_script(peer: Peer, request: dict[str, Any], out: Path) -> dict[str, Any] | str:
    """Run a package's script in its environment: what it measured, or why nothing came of it.

    `request` is what it reads, but for `out`, the folder that it makes.
    """
    if not (peer.environment / "installed").exists():
        return _not_installed(peer)
    file = out.parent / f"{out.name}.request.json"
    commit_text(file, json.dumps(request | {"out": str(out.absolute())}, indent=1) + "\n")
    # nothing of our own environment may be found by theirs, and no package is to fetch anything
    ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    threads = str(request["threads"])
    environment = {name: value for name, value in os.environ.items() if name not in ours} | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONNOUSERSITE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [str(peer.environment / "bin" / "python"), str(peer.script.absolute()), str(file.absolute())]
    try:
        done = subprocess.run(
            command, cwd=out.parent, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {PATIENCE:g} seconds"
    except OSError as error:
        return f"the environment does not run: {error.strerror}; remove it and build it with make peers"
    finally:
        file.unlink(missing_ok=True)
    if done.returncode != 0:
        return f"exit status {done.returncode}: {_shortened(_last_line(done.stderr) or 'nothing was said', out)}"
    try:
        said = json.loads((out / "measured.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "the script left no measured.json that can be read"
    if missing := {"seconds", "resident_bytes", "peak_bytes", "stored", "versions"} - said.keys():
        return f"the script did not say {', '.join(sorted(missing))}"
    return dict(said)


def asked(options: dict[str, Any], seed: int) -> dict[str, Any]:
    """The part of a request that is the same for a model and for a single matrix."""
    return {
        "bits": options["width"],
        "group": options["group"],
        "settings": {key: value for key, value in options.items() if key not in ("width", "group")},
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def _windows_file(setting: Setting, source: Source, folder: Path) -> Path:
    """The calibration windows of this bench, those that our own methods see."""
    first_token = needs_first_token(source.config)
    tokenizer = read_tokenizer(source.folder)
    first = tokenizer.bos_token_id if first_token else None
    windows = read_windows(setting.calibration, tokenizer, source.config, setting.seed, first)
    shape = windows.own, windows.tokens.shape[1]
    own = [own_text.write(source, tokenizer, shape, setting.seed, first, setting.device)] if windows.own else []
    folder.mkdir(parents=True, exist_ok=True)
    commit_tensors(folder / WINDOWS, {"tokens": torch.cat([windows.tokens, *own])})
    return folder / WINDOWS


def _check(out: Path, source: Source) -> None:
    """Raises TerselyError unless the folder holds every tensor of the model, of its shape, and finite."""
    left = open_source(out)
    shapes, wanted = ({name: one.shape for name, one in of.stored.items()} for of in (left, source))
    if shapes != wanted:
        other = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
        raise RecipeError(f"missing, strange or of another shape: {', '.join(other[:3])}")
    left.check_weights()


def _not_installed(peer: Peer) -> str:
    log = peer.environment / "install.log"
    if not log.is_file():
        return "not installed here; make peers builds its environment"
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("ERROR")]
    return (
        f"does not install: {_shortened(lines[0], log)}" if lines else "its installation has not ended; run make peers"
    )


def _last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _shortened(reason: str, place: Path) -> str:
    """One line, without the folders of this machine where it was said."""
    for folder in (place.absolute().parent, Path.cwd()):
        reason = reason.replace(f"{folder}{os.sep}", "")
    line = " ".join(reason.split())
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}…"

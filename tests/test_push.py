"""To the hub: what goes is what was verified and shown, and what the hub refuses is said with advice."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects

from tersely import push
from tersely.cli import application, main
from tersely.errors import CheckpointError, RecipeError
from tersely.pipeline import compress
from tersely.push import _paths, check_repo, pack
from tersely.verify import CHECKSUMS, checksums

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tersely_(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function: arguments of the command → exit status, standard output, standard error."""
    monkeypatch.setattr(application, "debugging", False)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


class Hub:
    """What of huggingface_hub's API is called, in memory; it takes files as the real one does."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, dict[str, bytes]] = {}
        """Branch → name → content."""
        self.private = False
        self.fails: dict[str, Exception] = {}

    def _called(self, name: str, **said: Any) -> None:
        self.calls.append((name, said))
        if name in self.fails:
            raise self.fails[name]

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> None:
        self._called("create_repo", repo_id=repo_id, private=private, exist_ok=exist_ok)
        if "main" not in self.files:
            self.files["main"], self.private = {".gitattributes": b""}, bool(private)

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool = False) -> None:
        self._called("create_branch", repo_id=repo_id, branch=branch, exist_ok=exist_ok)
        self.files.setdefault(branch, dict(self.files["main"]))

    def model_info(self, repo_id: str, *, revision: str | None = None) -> Any:
        self._called("model_info", repo_id=repo_id, revision=revision)
        names = [SimpleNamespace(rfilename=name) for name in self.files[revision or "main"]]
        return SimpleNamespace(private=self.private, siblings=names)

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        revision: str | None,
        commit_message: str,
        allow_patterns: list[str],
    ) -> Any:
        self._called("upload_folder", repo_id=repo_id, revision=revision, commit_message=commit_message)
        there = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        for name in filter_repo_objects(there, allow_patterns=allow_patterns):
            self.files[revision or "main"][name] = (folder_path / name).read_bytes()
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def refuse(self, call: str, status: int) -> None:
        request = SimpleNamespace(method="POST", url="https://hub")
        response: Any = SimpleNamespace(status_code=status, headers={}, request=request)
        self.fails[call] = HfHubHTTPError(f"{status} Client Error\nand many lines more", response=response)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(push, "HfApi", lambda: made)
    return made


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for the hub fails."""

    def never() -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(push, "HfApi", never)


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def shown(printed: str) -> dict[str, int]:
    """Files of a listing, and their bytes."""
    found = re.findall(r"^ *([\d,]+) B  (\S.*)$", printed, flags=re.MULTILINE)
    return {name: int(size.replace(",", "")) for size, name in found if not name.startswith("in ")}


# --- what goes --------------------------------------------------------------------------------------------------------


def test_what_is_shown_is_what_goes_and_it_is_what_was_verified(tersely_, compressed, copy_of, hub):
    folder = copy_of(compressed())
    (folder / "weights[1].json").write_text("{}")  # a name that is a pattern of another one
    (folder / "weights1.txt").write_text("not asked for")
    listed = json.loads((folder / CHECKSUMS).read_text()) | {"weights[1].json": checksums(folder)["weights[1].json"]}
    (folder / CHECKSUMS).write_text(json.dumps(listed))
    (folder / ".config.json.77.writing").write_text("torn")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "config.json").write_text("{}")
    (folder / "notes").mkdir()
    (folder / "notes" / "README.md").write_text("mine")

    status, printed, err = tersely_("push", folder, "owner/small", "--dry-run")
    assert (status, err, hub.calls) == (0, "", [])
    assert shown(printed) == {name: (folder / name).stat().st_size for name in (*listed, CHECKSUMS)}
    assert f"{sum(shown(printed).values()):,} B  in {len(listed) + 1} files" in printed
    for line in (
        "to https://huggingface.co/owner/small, branch main",
        "stays here: .cache (hidden)",
        "stays here: .config.json.77.writing (a temporary name, left by a process that was killed)",
        "stays here: notes (a folder)",
        "stays here: weights1.txt (not in checksums.json)",
        "nothing was sent",
    ):
        assert line in printed

    status, again, err = tersely_("push", folder, "owner/small", "--with-paths")
    assert status == 0, err
    assert again.splitlines()[:-1] == printed.splitlines()[:-1]
    assert again.splitlines()[-1] == "published: https://huggingface.co/owner/small (https://hub/owner/small/commit/1)"
    assert hub.files["main"] == {".gitattributes": b""} | contents(folder, *shown(printed))
    assert [name for name, _ in hub.calls] == ["create_repo", "model_info", "upload_folder"]
    # the same again: what is there already is of the same names
    assert tersely_("push", folder, "owner/small", "--with-paths")[0] == 0


def test_a_dry_run_needs_neither_network_nor_token(compressed, tmp_path):
    """In a process of its own, whose home is empty and which may open no connection."""
    script = f"""
import socket, sys
def never(*arguments, **keywords):
    raise AssertionError("the network was asked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = never
from tersely.cli import main
main(["push", {str(compressed())!r}, "owner/small", "--dry-run"])
"""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=own | {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hub")},
    )
    assert done.returncode == 0, done.stderr
    assert "nothing was sent" in done.stdout


def test_branch_message_and_privacy_are_passed_on(tersely_, compressed, hub):
    given = ["--with-paths", "--private", "--branch", "four-bits", "--message", "smaller"]
    status, printed, err = tersely_("push", compressed(), "owner/small", *given)
    assert status == 0, err
    assert "branch four-bits" in printed
    said = dict(hub.calls)
    assert said["create_repo"] == {"repo_id": "owner/small", "private": True, "exist_ok": True}
    assert said["create_branch"] == {"repo_id": "owner/small", "branch": "four-bits", "exist_ok": True}
    assert said["upload_folder"] == {"repo_id": "owner/small", "revision": "four-bits", "commit_message": "smaller"}
    assert CHECKSUMS in hub.files["four-bits"] and CHECKSUMS not in hub.files["main"]


# --- what is refused before anything leaves ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repo", ["small", "owner/", "/small", "a/b/c", "owner/sm all", "owner/small.git", "owner--x/y", ""]
)
def test_what_is_no_repository_is_refused(repo, tersely_, compressed, nobody):
    with pytest.raises(RecipeError, match=r"wanted OWNER/NAME, such as owner/llama-small"):
        check_repo(repo)
    status, out, err = tersely_("push", compressed(), repo)
    assert (status, out) == (2, "")
    assert repr(repo) in err and len(err.splitlines()) == 1


def damaged(folder: Path, how: str) -> None:
    match how:
        case "not ours":
            (folder / CHECKSUMS).unlink()
        case "unfinished":
            (folder / ".tersely").mkdir()
        case "changed":
            (folder / "tokenizer_config.json").write_text("{}")
        case "cut short":
            whole = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(whole[:-100])
        case "added":
            shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
        case "missing":
            (folder / "config.json").unlink()
        case "half recorded":
            listed = json.loads((folder / CHECKSUMS).read_text())
            (folder / CHECKSUMS).write_text(json.dumps({k: v for k, v in listed.items() if k != "README.md"}))
        case "no folder":
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("not ours", r"no checksums\.json; tersely did not write it"),
        ("unfinished", "holds an unfinished run"),
        ("changed", r"checksums: changed since they were written: tokenizer_config\.json"),
        ("cut short", r"checksums: changed since they were written: model\.safetensors"),
        ("added", r"checksums: not written by the run that made this folder: other\.safetensors"),
        ("missing", r"checksums: missing: config\.json"),
        ("half recorded", r"does not list README\.md; a recording was stopped"),
        ("no folder", "no such folder"),
    ],
)
@pytest.mark.parametrize("flags", [["--dry-run"], ["--with-paths"]])
def test_a_folder_that_fails_is_refused(how, message, flags, tersely_, compressed, copy_of, nobody):
    folder = copy_of(compressed())
    damaged(folder, how)
    status, _, err = tersely_("push", folder, "owner/small", *flags)
    assert status == 2
    assert re.search(message, err), err


def test_weights_that_are_not_finite_are_refused(compressed, copy_of):
    """Even where the checksums are right."""
    from safetensors.torch import load_file, save_file

    folder = copy_of(compressed())
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / CHECKSUMS).write_text(json.dumps(checksums(folder)))
    with pytest.raises(CheckpointError, match=r"not fit to be published, weights: .*NaN"):
        pack(folder, "owner/small")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("report.json", "{", r"report\.json: cannot be read as JSON"),
        ("report.json", '{"model": 3}', r"report\.json: model: "),
        ("plan.json", "{", r"plan\.json: damaged \("),
        ("recipe.toml", "[[", r"recipe\.toml: damaged \("),
    ],
)
def test_records_that_are_damaged_are_refused(name, content, message, tersely_, compressed, copy_of, nobody):
    """Even where the checksums are right."""
    folder = copy_of(compressed())
    (folder / name).write_text(content)
    (folder / CHECKSUMS).write_text(json.dumps(checksums(folder)))
    status, _, err = tersely_("push", folder, "owner/small", "--dry-run")
    assert status == 2
    assert re.search(rf"^error: .*{message}", err), err


@pytest.mark.parametrize("flag", ["--branch", "--message"])
def test_empty_words_are_refused(flag, tersely_, compressed, nobody):
    status, _, err = tersely_("push", compressed(), "owner/small", flag, " ")
    assert status == 2
    assert f"{flag} is empty" in err


# --- places of this machine -------------------------------------------------------------------------------------------


def test_places_of_this_machine_are_shown_and_not_published_unasked(tersely_, compressed, model_folder, hub):
    folder, model = compressed(), str(model_folder())
    status, printed, _ = tersely_("push", folder, "owner/small", "--dry-run")
    assert status == 0
    assert f"names a place of this machine: {model} (in recipe.toml, report.json)" in printed
    assert f"recipe.toml and report.json call it {model}" in printed
    assert "the card links to none, since it was a local folder" in printed
    status, _, err = tersely_("push", folder, "owner/small")
    assert status == 2
    assert re.search(r"the files name \d+ places of this machine, such as /.*; give --with-paths", err)
    assert hub.calls == []


def test_a_model_given_by_a_relative_path_is_shown_and_goes(
    tersely_, model_folder, text_file, tmp_path, monkeypatch, hub
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder(), tmp_path / "models" / "llama")
    shutil.copy(text_file, tmp_path / "mine.txt")
    compress("models/llama", "out", method="svd", keep=0.6, calibrate=["mine.txt"], length=16, samples=4)
    status, printed, err = tersely_("push", "out", "owner/small")
    assert status == 0, err
    assert "names a path: models/llama (in recipe.toml, report.json)" in printed
    assert "names a path: mine.txt (in" in printed
    assert "place of this machine" not in printed
    assert str(tmp_path) not in "".join(
        content.decode(errors="replace") for content in hub.files["main"].values()
    )  # the whole folder says no more than that


def test_paths_are_found_wherever_they_stand(tmp_path):
    files = {
        "recipe.toml": 'model = "/mnt/disk/my models/llama"\nsource = ["~/t.txt"]\nrelative = "../t.txt"\n',
        "report.json": json.dumps(
            {"warnings": ["in /mnt/disk/x.txt, a line"], "a": "C:\\Users\\me", "b": "nats/token"}
        ),
        "config.json": json.dumps(
            {"quantization_config": {"base": {"model": str(tmp_path)}}, "note": "see /a/b/c there", "by": "/its/maker"}
        ),
        "report.html": "<p>a/b 1/2/3 https://e.org/x/y/z</p><p>/mnt/disk/my models/llama, &#x2F;opt&#47;a</p>",
        "README.md": "x <br/> [a](/b) `/var/tmp/q`.",
        "tokenizer.json": json.dumps({"vocab": {"/usr/bin/env": 1}}),
        "model.safetensors": "/not/read/at/all",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    absolute, relative = _paths(tmp_path, files)
    assert absolute["/mnt/disk/my models/llama"] == ("recipe.toml", "report.html")
    assert absolute["~/t.txt"] == ("recipe.toml",)
    assert absolute["/mnt/disk/x.txt"] == ("report.json",)
    assert absolute["C:\\Users\\me"] == ("report.json",)
    assert absolute[str(tmp_path)] == ("config.json",)
    assert absolute["/opt/a"] == ("report.html",)
    assert absolute["/var/tmp/q"] == ("README.md",)
    known = set(absolute) - {"/mnt/disk/my"}  # in a sentence a path ends at a blank
    assert len(known) == 7
    assert relative == {"../t.txt": ("recipe.toml",)}


def test_a_folder_that_opens_with_a_local_base_says_so(model_folder, copy_of, text_file, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    base, tuned = model_folder(), copy_of(model_folder())
    state = load_file(tuned / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith("_proj.weight"):
            tensor += 0.01 * torch.randn(tensor.shape, generator=generator)
    save_file(state, tuned / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "delta"
    compress(tuned, out, method="svd", base=str(base), keep=0.5, calibrate=[str(text_file)], length=16, samples=4)
    said = pack(out, "owner/delta").base
    assert f"opens together with {base} alone, which nobody else has" in said


# --- what the hub refuses ---------------------------------------------------------------------------------------------


def test_a_public_repository_does_not_take_what_was_to_be_private(tersely_, compressed, hub):
    hub.files["main"] = {}
    status, _, err = tersely_("push", compressed(), "owner/small", "--with-paths", "--private")
    assert status == 2
    assert "owner/small exists and is public; --private does not hide it" in err
    assert hub.files["main"] == {}


def test_a_model_that_is_not_ours_is_not_written_over(tersely_, compressed, hub):
    there = {"config.json": b"theirs", "model.safetensors": b"theirs"}
    hub.files["main"] = dict(there)
    status, _, err = tersely_("push", compressed(), "owner/small", "--with-paths")
    assert status == 2
    assert "holds a model that tersely did not write; choose another name" in err
    assert hub.files["main"] == there


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model.bin", "modeling_x.py"])
def test_weights_of_another_model_are_not_mixed_with_ours(name, tersely_, compressed, hub):
    """A reader would take them for a part of what is pushed, or read them instead."""
    there = {
        name: b"theirs",
        "README.md": b"theirs",
        "onnx/model.bin": b"in a folder",
        "model.gguf": b"read by its name",
    }
    hub.files["main"] = dict(there)
    status, _, err = tersely_("push", compressed(), "owner/small", "--with-paths")
    assert status == 2
    assert f"holds files that would be read as parts of this model: {name};" in err
    assert hub.files["main"] == there


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (401, "the hub does not know who you are; run `hf auth login`, or set HF_TOKEN"),
        (403, "your token may not write there"),
        (404, "the hub has no such owner, repository or branch"),
        (500, "the hub refuses with status 500"),
        (LocalTokenNotFoundError("no token"), "the hub does not know who you are"),
        (OfflineModeIsEnabled("offline"), "unset HF_HUB_OFFLINE"),
        (ConnectionError("no route"), "cannot be reached; is there a network?"),
    ],
)
@pytest.mark.parametrize(
    ("call", "status", "so_far"),
    [("create_repo", 2, "nothing was sent"), ("upload_folder", 1, "not all of it was sent")],
)
def test_what_goes_wrong_is_said_with_advice(error, advice, call, status, so_far, tersely_, compressed, hub):
    if isinstance(error, int):
        hub.refuse(call, error)
    else:
        hub.fails[call] = error
    found, _, err = tersely_("push", compressed(), "owner/small", "--with-paths")
    assert found == status
    assert advice in err and so_far in err and "owner/small" in err
    assert len(err.splitlines()) == 1
    if status == 1:  # and the same command goes on
        hub.fails.clear()
        assert tersely_("push", compressed(), "owner/small", "--with-paths")[0] == 0
    else:
        assert "upload_folder" not in dict(hub.calls)


def test_an_interrupt_while_sending_is_told(tersely_, compressed, hub, monkeypatch):
    def stop(**said: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "upload_folder", stop)
    status, _, err = tersely_("push", compressed(), "owner/small", "--with-paths")
    assert status == 1
    assert "interrupted" in err and "push" in err


def test_the_real_api_takes_what_it_is_given():
    """The calls of the fake are calls of the real one."""
    import inspect

    from huggingface_hub import HfApi

    for name in ("create_repo", "create_branch", "model_info", "upload_folder"):
        real = inspect.signature(getattr(HfApi, name)).parameters
        assert inspect.signature(getattr(Hub, name)).parameters.keys() <= real.keys()

"""A finished folder on the hub.

What goes is what ``checksums.json`` lists, and the list: what was verified is what is published.  Everything else that
lies in the folder stays here.  Before anything leaves the machine the folder is verified (all but opening it whole,
which a machine that compressed a model block by block may not have the memory for), and it is looked at for names of
places on this machine: what is published once cannot be taken back.
"""

import fnmatch
import glob
import html
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from tersely.checkpoint import TOKENIZER_FILES
from tersely.errors import CheckpointError, RecipeError
from tersely.report.reading import read_report
from tersely.verify import CHECKSUMS, LOADED, Check, verify

NEEDED = ("README.md", "config.json", "recipe.toml", "report.json")
"""What every folder of ours lists."""

OURS = ("README.md", "plan.json", "recipe.toml", "report.html", "report.json")
"""Files that tersely writes about a run, in which a path may stand inside a sentence."""

UNREAD = (*TOKENIZER_FILES, "*.index.json", "added_tokens.json", "merges.txt", "special_tokens_map.json", CHECKSUMS)
"""Files of words and names that are no paths, whatever they look like."""

WHOLE_CHECKS = 3
"""Of `verify`: checksums, manifest, weights."""

_WHOLE = re.compile(r"(/[^/\n]+){2,}/?|~/.+|[A-Za-z]:[\\/][^\n]+")
_INSIDE = re.compile(r"(?<![\w.:/<~-])/(?:[^\s/\"'<>|:;,()\[\]{}\\`]+/)+[^\s/\"'<>|:;,()\[\]{}\\`]*")


@dataclass(frozen=True)
class Parcel:
    """What would go, and what its receivers would learn."""

    folder: Path
    repo: str
    files: tuple[tuple[str, int], ...]
    """Name and bytes."""
    left_out: tuple[tuple[str, str], ...]
    """Name, and why it stays here."""
    absolute: Mapping[str, tuple[str, ...]]
    """Absolute path on this machine → the files that name it."""
    relative: Mapping[str, tuple[str, ...]]
    """The same of paths that say less."""
    base: str
    """What the files say of the dense model, in a sentence."""

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self.files)

    @property
    def url(self) -> str:
        return f"{constants.ENDPOINT}/{self.repo}"


def pack(
    folder: Path, repo: str, seen: Callable[[Check], object] = lambda check: None, *, trust_remote_code: bool = False
) -> Parcel:
    """Look at a folder without a network; `seen` is called with every check that it passes.

    Raises RecipeError for a repository that could not exist, CheckpointError for a folder that tersely did not write or
    did not finish, or that is not as it was written.
    """
    check_repo(repo)
    for check in islice(verify(folder, trust_remote_code=trust_remote_code), WHOLE_CHECKS):
        if not check.passed:
            raise CheckpointError(f"{folder} is not fit to be published, {check.name}: {check.detail}")
        seen(check)
    listed = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    if lacking := [name for name in NEEDED if name not in listed]:
        raise CheckpointError(
            f"{folder}: {CHECKSUMS} does not list {', '.join(lacking)}; a recording was stopped, give "
            f"`tersely eval {folder} --card` again"
        )
    read_report(folder)
    names = sorted([*listed, CHECKSUMS])
    absolute, relative = _paths(folder, names)
    return Parcel(
        folder=folder,
        repo=repo,
        files=tuple((name, (folder / name).stat().st_size) for name in names),
        left_out=tuple((path.name, _why(path)) for path in sorted(folder.iterdir()) if path.name not in names),
        absolute=absolute,
        relative=relative,
        base=_base(folder),
    )


def check_repo(repo: str) -> None:
    """Raises RecipeError for what is no OWNER/NAME."""
    wanted = "wanted OWNER/NAME, such as owner/llama-small"
    if repo.count("/") != 1:
        raise RecipeError(f"repository {repo!r}; {wanted}")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(f"repository {repo!r}; {wanted} ({str(error).rstrip('.')})") from error


def address(parcel: Parcel, *, private: bool = False, branch: str | None = None) -> None:
    """Find or make the repository, and the branch.

    Raises CheckpointError where the hub would not take the parcel, and where its reader would get something else:
    weights of another model, or in public what was to be private.  No file has been sent then.
    """
    api = HfApi()
    with _advised(parcel.repo, "nothing was sent"):
        api.create_repo(parcel.repo, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(parcel.repo, branch=branch, exist_ok=True)
        found = api.model_info(parcel.repo, revision=branch)
    if private and not found.private:
        raise CheckpointError(f"{parcel.url} exists and is public; --private does not hide it, choose another name")
    ours = {name for name, _ in parcel.files}
    there = [file.rfilename for file in found.siblings or []]
    if "config.json" in there and CHECKSUMS not in there:
        raise CheckpointError(f"{parcel.url} holds a model that tersely did not write; choose another name")
    others = [name for name in there if "/" not in name and name.endswith(LOADED) and name not in ours]
    if others:
        raise CheckpointError(
            f"{parcel.url} holds files that would be read as parts of this model: {', '.join(sorted(others)[:5])}; "
            "choose another name, or remove them there"
        )


def send(parcel: Parcel, *, message: str, branch: str | None = None) -> str:
    """Upload, all of the parcel and nothing else; returns the address of the commit.

    Raises CheckpointError where that fails; what has arrived by then is not sent again by the next call.
    """
    with _advised(parcel.repo, "not all of it was sent"):
        commit = HfApi().upload_folder(
            repo_id=parcel.repo,
            folder_path=parcel.folder,
            revision=branch,
            commit_message=message,
            allow_patterns=[glob.escape(name) for name, _ in parcel.files],
        )
    return str(commit.commit_url)


@contextmanager
def _advised(repo: str, so_far: str) -> Iterator[None]:
    """The hub's refusals in words that say what to do."""
    try:
        yield
    except Exception as error:  # a dozen kinds, some of them its transport's
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{repo}: {_advice(error)} ({said}); {so_far}") from error


def _advice(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "the network is switched off; unset HF_HUB_OFFLINE"
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "the hub does not know who you are; run `hf auth login`, or set HF_TOKEN, with a token that may write"
    if status == 403:
        return "your token may not write there; take one that may, or an owner that is yours"
    if status == 404:
        return "the hub has no such owner, repository or branch, or hides it from your token"
    if status is not None:
        return f"the hub refuses with status {status}"
    return f"the hub at {constants.ENDPOINT} cannot be reached; is there a network?"


# --- what its receivers would learn -----------------------------------------------------------------------------------


def _why(path: Path) -> str:
    if path.name.endswith(".writing") and path.name.startswith("."):
        return "a temporary name, left by a process that was killed"
    if path.name.startswith("."):
        return "hidden"
    return "a folder" if path.is_dir() else f"not in {CHECKSUMS}"


def _base(folder: Path) -> str:
    recipe = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    linked = ModelCard.load(folder / "README.md").data.get("base_model")
    said = f"the card links to {linked}" if linked else "the card links to none, since it was a local folder"
    difference = (config.get("quantization_config") or {}).get("base")
    if difference is not None and linked is None:
        return f"{said}; this folder opens together with {difference['model']} alone, which nobody else has"
    return f"{said}; recipe.toml and report.json call it {recipe['model']}"


Found = dict[str, tuple[str, ...]]


def _paths(folder: Path, names: Iterable[str]) -> tuple[Found, Found]:
    """Absolute and relative paths, and the files that name them."""
    read = {
        name: (folder / name).read_text(encoding="utf-8", errors="replace")
        for name in names
        if name.endswith((".json", ".toml", ".md", ".html")) and not any(fnmatch.fnmatch(name, one) for one in UNREAD)
    }
    absolute: set[str] = set()
    relative: set[str] = set()
    for name, content in read.items():
        try:
            values = list(_strings(name, content))
        except ValueError as error:
            raise CheckpointError(f"{folder / name}: damaged ({error}); fetch or write it again") from error
        for value in values:
            if _WHOLE.fullmatch(value):
                # what came with the model may name places of its makers, which are known already
                if name in OURS or Path(value).expanduser().exists():
                    absolute.add(value)
            elif name in OURS:
                absolute |= {inside.rstrip(".") for inside in _INSIDE.findall(value)}
                if name == "recipe.toml" and _is_relative(value):
                    relative.add(value)
    plain = {name: html.unescape(content) for name, content in read.items()}
    # as it stands in a sentence, or as JSON and TOML write it
    spelled = {path: (path, json.dumps(path)[1:-1]) for path in absolute | relative}
    where = {
        path: tuple(name for name, content in plain.items() if any(spelling in content for spelling in spellings))
        for path, spellings in spelled.items()
    }
    return {path: where[path] for path in sorted(absolute)}, {path: where[path] for path in sorted(relative)}


def _strings(name: str, content: str) -> Iterator[str]:
    """Every value of a structured file, or all of another as one."""
    if name.endswith(".json"):
        yield from _leaves(json.loads(content))
    elif name.endswith(".toml"):
        yield from _leaves(tomllib.loads(content))
    else:
        yield html.unescape(content)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from (key, *_leaves(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)


def _is_relative(value: str) -> bool:
    """Whether a value of a recipe names a file or a folder by its way from here."""
    path = value.partition("[")[0]
    return path.startswith(("./", "../")) or (("/" in path or "." in path) and Path(path).exists())

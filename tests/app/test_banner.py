"""What stands on the screen when a server is ready."""

import socket
from types import SimpleNamespace

import pytest

from app import cli
from app.settings import Settings

TOLD = {
    "model_id": "a model",
    "model_sha": "0" * 64,
    "kind": "embedder",
    "dimension": 3,
    "device": "cpu",
    "dtype": "float32",
    "kernel": "SDPA attention",
    "threads": 1,
    "max_input_length": 1,
    "max_batch_tokens": 1,
    "max_queue_tokens": 1,
    "max_client_batch_size": 1,
}


def banner(settings=None, **told):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return cli._banner(SimpleNamespace(**TOLD | told), sock, settings or Settings())


@pytest.mark.parametrize("settings", [{"api_key": "sesame"}, {"api_key_file": "/run/sesame"}])
def test_a_first_request_has_a_place_for_the_key_where_one_is_asked_for(settings):
    last = banner(Settings(**settings)).splitlines()[-1]
    assert last.startswith("try      curl http://127.0.0.1:")
    assert ' -H "Authorization: Bearer $KEY" -d ' in last
    assert "sesame" not in last
    assert "$KEY" not in banner(Settings(admin_key="sesame"))


@pytest.mark.parametrize(
    ("machine", "built", "device", "slow"),
    [
        ("x86_64", [], "cpu", True),
        ("x86_64", ["model._kernels_avx2"], "cpu", False),
        ("x86_64", [], "cuda:0", False),
        ("aarch64", [], "cpu", False),
    ],
)
def test_kernels_that_were_not_built_are_told(monkeypatch, machine, built, device, slow):
    monkeypatch.setattr(cli.platform, "machine", lambda: machine)
    monkeypatch.setattr(cli, "find_spec", lambda name: name in built)
    assert ("no compiled kernels" in banner(device=device)) == slow

"""The process as its operator sees it: start, stop, keys, what it says about itself."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import save_checkpoint
from servers import BERTD, run_bertd, running_server, until

pytestmark = pytest.mark.system

CHINESE = ["吃苹果", "苹果手机"]


def test_the_banner_says_what_was_decided(server):
    for word in ("all-MiniLM-L6-v2", "53aa51172d142c89", "cpu", "float32", "linear", "threads", "256 tokens", "curl http://"):
        assert word in server.banner


def test_info_has_the_keys_of_tei_and_ours(server):
    info = server.client.get("/info").json()
    assert info["model_id"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert info["model_sha"].startswith("53aa51172d142c89")
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert info["max_client_batch_size"] == 3000
    assert (info["max_input_length"], info["dimension"], info["dtype"]) == (256, 384, "float32")
    assert info["threads"] >= 1
    assert info["tokens_per_second"] > 0


def test_health_and_ready_are_empty_and_public(server):
    for path in ("/health", "/ping", "/ready"):
        for method in ("GET", "HEAD"):
            response = server.client.request(method, path)
            assert (response.status_code, response.content) == (200, b"")


def test_a_request_id_is_kept_or_made(server):
    assert server.client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = {server.client.get("/health", headers={"x-request-id": "x" * 500}).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2


def test_the_docs_page_needs_no_other_host(server):
    page = server.client.get("/docs").text
    assert "https://" not in page
    assert server.client.get("/static-offline-docs/swagger-ui-bundle.js").status_code == 200
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {
        "/embed",
        "/embed_all",
        "/similarity",
        "/tokenize",
        "/decode",
        "/info",
        "/health",
        "/ready",
        "/metrics",
    } <= paths.keys()
    assert {"200", "400", "413", "422", "429", "500", "503", "504"} <= paths["/embed"]["post"]["responses"].keys()


def test_a_key_is_asked_for_before_the_body(make_checkpoint):
    with running_server(model=make_checkpoint(), api_key="sesame") as server:
        assert server.client.post("/embed", json={"inputs": "a"}).status_code == 401
        assert server.client.post("/embed", json={"inputs": "a"}, headers={"authorization": "Bearer wrong"}).status_code == 401
        refused = server.client.get("/info", headers={"authorization": "sesame"})
        assert refused.json()["error_type"] == "Unauthorized"
        assert refused.headers["www-authenticate"] == "Bearer"
        key = {"authorization": "Bearer sesame"}
        assert server.client.post("/embed", json={"inputs": "a"}, headers=key).status_code == 200
        for public in ("/health", "/ready", "/metrics", "/docs", "/static-offline-docs/swagger-ui.css"):
            assert server.client.get(public).status_code == 200
        with socket.create_connection(server.address, timeout=10) as connection:
            connection.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 401")


def test_a_chinese_checkpoint_with_only_a_vocab_txt_tells_contexts_apart(make_checkpoint):
    with running_server(model=make_checkpoint()) as server:
        answers = server.post("/embed_all", inputs=CHINESE, return_tokens=True).json()
        rows = []
        for text, answer in zip(CHINESE, answers, strict=True):
            place = next(n for n, token in enumerate(answer["tokens"]) if token["text"] == "苹")
            token = answer["tokens"][place]
            assert text[token["start"] : token["end"]] == "苹"
            rows.append(np.array(answer["embeddings"][place]))
        assert np.linalg.norm(rows[0] - rows[1]) > 0.01


def test_a_killed_engine_comes_back_and_nobody_gets_a_wrong_answer(make_checkpoint):
    with running_server(model=make_checkpoint()) as server:
        before = server.post("/embed", inputs="abc").json()
        (engine,) = server.children()
        os.kill(engine, signal.SIGKILL)
        assert server.post("/embed", inputs="abc").json() == before
        assert server.children() != [engine]
        assert server.client.get("/ready").status_code == 200
        assert "bertd_engine_restarts_total 1.0" in server.client.get("/metrics").text


def test_a_stopped_server_leaves_no_process(make_checkpoint):
    with running_server(model=make_checkpoint()) as server:
        children = server.children()
        assert children
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_engine_does_not_outlive_a_server_that_is_killed(make_checkpoint):
    with running_server(exit_code=-signal.SIGKILL, model=make_checkpoint()) as server:
        (engine,) = server.children()
        server.process.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and os.path.exists(f"/proc/{engine}"):
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{engine}")


def one_line(done):
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("bertd: ")
    return line


def test_a_port_in_use_is_one_clear_line(make_checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} can't be listened on" in one_line(
            run_bertd("serve", "--port", port, "--model", make_checkpoint())
        )


def test_a_port_that_another_takes_while_the_server_starts_is_one_clear_line(make_checkpoint):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        command = [*BERTD, "serve", "--port", str(port), "--model", str(make_checkpoint())]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
            until(lambda: engines_of(server))
            taken.listen()
            try:
                stdout, stderr = server.communicate(timeout=60)
            finally:
                server.kill()
        done = subprocess.CompletedProcess(command, server.returncode, stdout, stderr)
        assert f"127.0.0.1:{port} can't be listened on" in one_line(done)


def test_a_hangup_while_the_server_starts_ends_nothing(make_checkpoint):
    command = [*BERTD, "serve", "--port", "0", "--model", str(make_checkpoint())]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as server:
        until(lambda: engines_of(server))
        server.send_signal(signal.SIGHUP)
        assert server.stdout.readline().startswith("model")
        server.terminate()
        assert server.wait(30) == 0


def engines_of(server):
    return Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()


def test_a_folder_without_weights_is_one_clear_line(tmp_path):
    save_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "holds no weights" in one_line(run_bertd("serve", "--port", 0, "--model", tmp_path))


def test_a_missing_tensor_is_one_clear_line(tmp_path):
    from safetensors.torch import load_file, save_file

    save_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    line = one_line(run_bertd("serve", "--port", 0, "--model", tmp_path))
    assert "missing encoder.layer.1.output.dense.bias [32]" in line


def test_an_unknown_model_is_one_clear_line_that_says_every_way():
    line = one_line(run_bertd("serve", "--port", 0, "--model", "nobody/nothing"))
    for way in ("Name a folder", "install a package", "make the Hub reachable"):
        assert way in line


def test_a_bad_option_is_one_clear_line():
    assert "--port is 'many'; wanted a valid integer" in one_line(run_bertd("serve", "--port", "many"))
    assert "BERTD_THREADS" in one_line(run_bertd("info", BERTD_THREADS="-1"))


def test_info_prints_what_would_be_served(make_checkpoint):
    done = run_bertd("info", "--model", make_checkpoint(), "--threads", 1, BERTD_API_KEY="sesame", BERTD_ADMIN_KEY="open")
    info = json.loads(done.stdout)
    assert (info["dimension"], info["threads"], info["model_type"]) == (32, 1, {"embedding": {"pooling": "cls"}})
    assert not {"sesame", "open"} & set(re.findall(r"\w+", done.stdout + done.stderr))


def test_embed_writes_what_the_server_answers(server, tmp_path):
    from safetensors.numpy import load_file

    texts = [f"text\u2028number\x0b{n} " * (n % 10 + 1) for n in range(700)]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t} if n % 2 else t) + "\n" for n, t in enumerate(texts)))
    wanted = np.array(server.post("/embed", inputs=texts).json(), dtype=np.float32)

    done = run_bertd("embed", tmp_path / "texts.txt")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "texts.npy"), wanted, rtol=0, atol=2e-6)
    assert "were longer" not in done.stderr

    assert run_bertd("embed", tmp_path / "texts.jsonl", "-o", tmp_path / "out.jsonl", "--dimensions", 8).returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]]
    assert [line["text"] for line in lines] == texts
    short = wanted[:, :8] / np.linalg.norm(wanted[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose([line["embedding"] for line in lines], short, rtol=0, atol=1e-5)

    assert run_bertd("embed", tmp_path / "texts.txt", "-o", tmp_path / "out.safetensors", "--no-normalize").returncode == 0
    raw = load_file(tmp_path / "out.safetensors")["embeddings"]
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "one\n\ntwo\n", "line 2 is empty"),
        ("a.txt", "", "is empty"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "line 2 holds no text"),
        ("a.jsonl", "{\n", "line 1 holds no text"),
    ],
)
def test_embed_names_the_bad_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    assert message in one_line(run_bertd("embed", tmp_path / name))
    assert "wanted one of" in one_line(run_bertd("embed", tmp_path / name, "-o", tmp_path / "out.csv"))

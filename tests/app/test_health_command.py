"""`bertd health`: the probe of the image."""

import socket
from threading import Thread

import pytest
from servers import run_bertd, running_server

pytestmark = pytest.mark.system


def health(port, **settings):
    return run_bertd("health", "--port", port, **settings)


def test_a_server_that_is_well(make_checkpoint):
    with running_server(model=make_checkpoint(), url_prefix="/api") as server:
        port = server.address[1]
        done = health(port, BERTD_URL_PREFIX="/api", BERTD_HOST="0.0.0.0", http_proxy="http://127.0.0.1:1")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        elsewhere = health(port, BERTD_URL_PREFIX="/other")
    assert elsewhere.returncode == 1
    assert f"the server on 127.0.0.1:{port} is not well: 404" in elsewhere.stderr


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = health(port)
    assert done.returncode == 1
    assert f"bertd: no server answers on 127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\ngone", "is not well: 503 gone"),
        (b"who knows\r\n\r\n", "no server answers"),
        (b"", "no server answers"),
    ],
)
def test_another_answer(answer, message):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_once():
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = Thread(target=answer_once)
        thread.start()
        done = health(listener.getsockname()[1])
        thread.join()
    assert done.returncode == 1
    assert message in done.stderr

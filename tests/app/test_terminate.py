"""SIGTERM before there is a server that takes it."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from servers import BERTD

pytestmark = pytest.mark.system


def test_a_server_that_still_starts_ends_and_leaves_nothing(make_checkpoint):
    command = [*BERTD, "serve", "--port", "0", "--model", str(make_checkpoint())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (engines := children.read_text().split()):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "ready" not in output
    assert "Traceback" not in errors
    deadline = time.monotonic() + 30
    while Path(f"/proc/{engines[0]}").exists():  # it sees the end of its socket as soon as it looks
        assert time.monotonic() < deadline
        time.sleep(0.05)

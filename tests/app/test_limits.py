"""What the container's limits do to the server, in real control groups."""

import json

import pytest
from groups import limited_group, python_in

pytestmark = pytest.mark.system


def info_under(mebibytes, folder):
    """`bertd info` under a limit of memory: exit code, standard output, standard error."""
    limit = mebibytes * 2**20
    with limited_group("memory", v1={"memory.limit_in_bytes": limit}, v2={"memory.max": str(limit)}) as group:
        done = python_in(group, "-m", "app.cli", "info", "--model", str(folder))
    return done.returncode, done.stdout, done.stderr.strip()


def test_an_engine_that_needs_more_memory_than_there_is_says_so(make_checkpoint):
    code, _, message = info_under(96, make_checkpoint())
    assert code == 1
    assert message == (
        "bertd: the engine process was killed while it started, most likely because it needs more memory than the 96 MiB "
        "that the container may use; allow it more, or serve a smaller model"
    )


def test_the_limit_of_memory_is_told(make_checkpoint):
    code, output, message = info_under(1024, make_checkpoint())
    assert code == 0, message
    assert json.loads(output)["memory_limit"] == 2**30


def test_a_quota_decides_the_threads(make_checkpoint):
    quota = {"cpu.cfs_period_us": 100_000, "cpu.cfs_quota_us": 150_000}
    with limited_group("cpu", v1=quota, v2={"cpu.max": "150000 100000"}) as group:
        done = python_in(group, "-m", "app.cli", "info", "--model", str(make_checkpoint()))
    assert json.loads(done.stdout)["threads"] == 1

"""Control groups with limits, made on this machine."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

_TOP = Path("/sys/fs/cgroup")
_ENTER = "import os, sys; open(sys.argv[1], 'w').write('0'); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"


@contextmanager
def limited_group(controller: str, v1: Mapping[str, int], v2: Mapping[str, str]) -> Iterator[Path]:
    """A group under limits of the version that is there; where none may be made, the test is skipped."""
    one = _TOP / controller
    group = (one if one.is_dir() else _TOP) / f"bertd-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group may be made here: {error}")
    try:
        for name, value in (v1 if one.is_dir() else v2).items():
            (group / name).write_text(str(value))
        yield group
    except OSError as error:
        pytest.skip(f"no limit may be set here: {error}")
    finally:
        group.rmdir()


def python_in(group: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a group to its end."""
    command = [sys.executable, "-c", _ENTER, str(group / "cgroup.procs"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

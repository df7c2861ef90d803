"""What limits a process, in hierarchies of control groups of every shape, and under a real quota."""

from collections.abc import Callable
from pathlib import Path

import pytest
from groups import limited_group, python_in

from model.cgroup import available_cores, core_limit, memory_limit

V2 = "30 23 0:26 / {root} rw,nosuid - cgroup2 cgroup2 rw"
CPU = "33 31 0:29 / {root}/cpu rw - cgroup cgroup rw,cpu"
BOTH = "33 31 0:29 / {root}/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct"
MEMORY = "34 31 0:30 / {root}/memory rw - cgroup cgroup rw,memory"
HYBRID = "41 31 0:38 / {root}/unified rw - cgroup2 cgroup2 rw"
NO_MEMORY_LIMIT = "9223372036854771712\n"  # as the kernel writes it in version 1


@pytest.fixture
def processes_limits(tmp_path: Path) -> Callable[..., tuple[float | None, int | None]]:
    """A function that lays out a hierarchy in files, and tells the limits of a process in it."""

    def limits(mounts: list[str], own: list[str], files: dict[str, str]) -> tuple[float | None, int | None]:
        proc, root = tmp_path / "proc", tmp_path / "cgroup"
        proc.mkdir()
        (proc / "cgroup").write_text("".join(f"{line}\n" for line in own))
        (proc / "mountinfo").write_text(
            "".join(f"{line.format(root=root)}\n" for line in ["1 0 8:1 / / rw - ext4 /dev/a rw", *mounts])
        )
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content)
        return core_limit(proc), memory_limit(proc)

    return limits


@pytest.mark.parametrize(
    ("mounts", "own", "files", "wanted"),
    [
        # version 2, its own namespace: the container's group is the root
        ([V2], ["0::/"], {"cpu.max": "150000 100000\n", "memory.max": "536870912\n"}, (1.5, 2**29)),
        ([V2], ["0::/"], {"cpu.max": "max 100000\n", "memory.max": "max\n"}, (None, None)),
        ([V2], ["0::/"], {}, (None, None)),
        # version 2, a nested group: the least of it and of all above it
        ([V2], ["0::/a/b"], {"a/b/cpu.max": "400000 100000", "a/cpu.max": "300000 100000", "cpu.max": "max 100000"}, (3.0, None)),
        ([V2], ["0::/a/b"], {"a/b/cpu.max": "20000 10000", "a/cpu.max": "300000 100000"}, (2.0, None)),
        ([V2], ["0::/a/b"], {"a/b/memory.max": "max", "a/memory.max": "1000000", "memory.max": "2000000"}, (None, 1_000_000)),
        # a group beside the process's own does not count
        ([V2], ["0::/a/b"], {"a/c/cpu.max": "100000 100000", "c/memory.max": "1"}, (None, None)),
        # version 2, the host's path of a container that has only its own part mounted
        ([V2.replace(" / ", " /pods/x ")], ["0::/pods/x"], {"cpu.max": "200000 100000"}, (2.0, None)),
        (
            [V2.replace(" / ", " /pods/x ")],
            ["0::/pods/x/y"],
            {"y/cpu.max": "100000 100000", "cpu.max": "200000 100000"},
            (1.0, None),
        ),
        ([V2], ["0::/../other"], {"cpu.max": "100000 100000"}, (1.0, None)),
        ([V2.replace(" / ", " /pods/x ")], ["0::/elsewhere"], {"cpu.max": "100000 100000"}, (1.0, None)),
        # version 1, each controller by itself or two at one place
        ([CPU], ["1:cpu:/"], {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, (4.0, None)),
        ([CPU], ["1:cpu:/"], {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, (None, None)),
        (
            [BOTH, MEMORY],
            ["4:memory:/kube/pod", "3:cpu,cpuacct:/kube/pod"],
            {
                "cpu,cpuacct/kube/pod/cpu.cfs_quota_us": "50000",
                "cpu,cpuacct/kube/pod/cpu.cfs_period_us": "100000",
                "memory/kube/pod/memory.limit_in_bytes": NO_MEMORY_LIMIT,
                "memory/kube/memory.limit_in_bytes": "4294967296",
                "memory/memory.limit_in_bytes": NO_MEMORY_LIMIT,
            },
            (0.5, 2**32),
        ),
        (
            [CPU.replace(" / ", " /docker/1f ")],
            ["1:cpu:/docker/1f"],
            {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"},
            (2.5, None),
        ),
        # both versions at once: version 2 without controllers, version 1 with them
        (
            [CPU, MEMORY, HYBRID],
            ["2:memory:/m", "1:cpu:/c", "0::/u"],
            {"cpu/c/cpu.cfs_quota_us": "100000", "cpu/c/cpu.cfs_period_us": "50000", "memory/m/memory.limit_in_bytes": "5"},
            (2.0, 5),
        ),
        # what is broken is no limit
        ([V2], ["0::/"], {"cpu.max": "broken\n", "memory.max": "\n"}, (None, None)),
        ([V2], ["0::/"], {"cpu.max": "100000 0\n"}, (None, None)),
        ([CPU], ["1:cpu:/"], {"cpu/cpu.cfs_quota_us": "100000\n"}, (None, None)),
        ([MEMORY], ["1:cpu:/"], {"memory/memory.limit_in_bytes": "5"}, (None, None)),
        ([MEMORY], ["1:cpu:/"], {"memory/cpu.cfs_quota_us": "100000", "memory/cpu.cfs_period_us": "100000"}, (None, None)),
        ([MEMORY], ["2:memory:/"], {"memory/memory.limit_in_bytes": NO_MEMORY_LIMIT}, (None, None)),
        ([], ["0::/"], {}, (None, None)),
    ],
)
def test_the_least_limit_counts(processes_limits, mounts, own, files, wanted) -> None:
    assert processes_limits(mounts, own, files) == wanted


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert (core_limit(tmp_path), memory_limit(tmp_path)) == (None, None)


def test_there_is_always_a_core() -> None:
    assert available_cores() >= 1


@pytest.mark.system
def test_threads_under_a_real_quota() -> None:
    code = "from model.cgroup import available_cores, core_limit; print(core_limit(), available_cores())"
    quota = {"cpu.cfs_period_us": 100_000, "cpu.cfs_quota_us": 150_000}
    with limited_group("cpu", v1=quota, v2={"cpu.max": "150000 100000"}) as group:
        assert python_in(group, "-c", code).stdout == "1.5 1\n"


@pytest.mark.system
def test_memory_under_a_real_limit() -> None:
    code = "from model.cgroup import memory_limit; print(memory_limit())"
    with limited_group("memory", v1={"memory.limit_in_bytes": 2**28}, v2={"memory.max": str(2**28)}) as group:
        assert python_in(group, "-c", code).stdout == f"{2**28}\n"

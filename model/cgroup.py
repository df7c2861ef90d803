"""What the container lets this process use, out of its control groups: cores and bytes of memory.

A process is in one group of each hierarchy, and every group above it may have a limit too: the least counts. A container often
sees only its own part of a hierarchy, mounted as if that were all of it.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

_PROC = Path("/proc/self")
_UNLIMITED = 2**60  # bytes; version 1 has no word for it, and says a little less than 2 ** 63


def core_limit(proc: Path = _PROC) -> float | None:
    """How many cores the process may keep busy, 1.5 for one and a half; None without a quota."""
    return _least(_cores, proc, "cpu")


def available_cores() -> int:
    """The cores that this process may use: its affinity, within the container's quota.

    Rounded down: threads that use up a quota stand still, all of them, until its next period, and the API process lives on
    what a fraction leaves over.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(core_limit() or cores)))


def memory_limit(proc: Path = _PROC) -> int | None:
    """How many bytes the processes of the container may use together; None without a limit."""
    limit = _least(_bytes, proc, "memory")
    return None if limit is None else int(limit)


def _least(limit_of: Callable[[Path], float | None], proc: Path, controller: str) -> float | None:
    return min((limit for group in _groups(proc, controller) if (limit := limit_of(group)) is not None), default=None)


def _groups(proc: Path, controller: str) -> Iterator[Path]:
    """The folders of the groups that may limit the process: its own in each hierarchy of version 2, and of version 1 with that
    controller, and all above them."""
    memberships = [line.split(":", 2)[1:] for line in _lines(proc / "cgroup")]
    own = {name: path for names, path in memberships for name in names.split(",")}  # under "" for version 2
    for line in _lines(proc / "mountinfo"):
        mount, _, filesystem = line.partition(" - ")
        root, point = mount.split()[3:5]
        kind, _, options = filesystem.split()[:3]
        if kind == "cgroup2" and "" in own:
            yield from _upwards(Path(point), root, own[""])
        elif kind == "cgroup" and controller in options.split(",") and controller in own:
            yield from _upwards(Path(point), root, own[controller])


def _upwards(point: Path, root: str, path: str) -> Iterator[Path]:
    """The folder of the group `path` where `root` of its hierarchy is mounted at `point`, and those above it that can be seen."""
    inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
    yield from (point / above for above in (inside, *inside.parents))


def _cores(group: Path) -> float | None:
    for files in ((group / "cpu.max",), (group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us")):
        match _numbers(*files):
            case [quota, period] if quota > 0 and period > 0:
                return quota / period
    return None


def _bytes(group: Path) -> float | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        match _numbers(group / name):
            case [limit] if limit < _UNLIMITED:
                return limit
    return None


def _numbers(*files: Path) -> list[float]:
    """What stands in files that hold nothing but numbers; nothing where one is missing or says `max`."""
    try:
        return [float(word) for file in files for word in file.read_text().split()]
    except (OSError, ValueError):
        return []


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:  # another system than Linux
        return []

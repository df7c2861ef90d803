"""The image gets the versions that the tests had, each by its digest."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
}


def locked(name):
    """Packages of a lock file -> their versions and how many digests each has."""
    text = (ROOT / f"deploy/requirements-{name}.txt").read_text()
    entries = re.findall(r"^(\S+?)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.M)
    found = {canonicalize_name(package): (version, hashes.count("sha256")) for package, version, hashes in entries}
    assert len(found) == len(re.findall(r"^[^\s#]", text, re.M)), "a package without a digest"
    return found


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_versions_are_those_that_the_tests_run_with(name):
    versions = {package: version for package, (version, _) in locked(name).items()}
    assert versions.items() >= {(package, PINNED[package]) for package in versions.keys() & PINNED.keys()}


@pytest.mark.parametrize(("name", "elsewhere"), [("cpu", {"torch"}), ("cuda", set())])
def test_every_dependency_is_locked(name, elsewhere):
    wanted = {canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"]}
    assert wanted - elsewhere <= locked(name).keys()
    assert not elsewhere & locked(name).keys()


def test_the_cpu_image_has_no_libraries_of_a_gpu():
    assert not [name for name in locked("cpu") if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_what_builds_is_locked_too():
    wanted = {canonicalize_name(Requirement(line).name) for line in PROJECT["build-system"]["requires"]}
    assert locked("build").keys() >= wanted

"""docker-compose.yml as a real implementation of compose reads it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def services(*profiles, **environment):
    """The services that would run under these profiles."""
    command = [sys.executable, "-m", "podman_compose", *(f"--profile={profile}" for profile in profiles), "config"]
    options = {"cwd": ROOT, "env": os.environ | environment, "capture_output": True, "text": True}
    done = subprocess.run(command, check=True, timeout=60, **options)
    return yaml.safe_load(done.stdout)["services"]


@pytest.fixture(scope="module")
def everything():
    return services("gpu", "monitoring")


def test_bertd_runs_alone_unless_a_profile_is_named():
    assert services().keys() == {"bertd"}
    assert services("monitoring").keys() == {"bertd", "prometheus", "grafana"}


@pytest.mark.parametrize("name", ["bertd", "bertd-gpu", "prometheus", "grafana"])
def test_every_service_is_shut_in(everything, name):
    service = everything[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert {"memory", "pids"} <= service["deploy"]["resources"]["limits"].keys()
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert not service["image"].endswith(":latest")


@pytest.mark.parametrize(("name", "target"), [("bertd", "cpu"), ("bertd-gpu", "cuda")])
def test_the_images_are_targets_of_the_dockerfile(everything, name, target):
    service = everything[name]
    assert service["build"] == {"context": str(ROOT), "target": target}
    assert f" AS {target}\n" in (ROOT / "Dockerfile").read_text()
    assert service["volumes"] == ["data:/data"]
    assert service["tmpfs"] == ["/tmp"]
    assert service["stop_grace_period"] == "45s"


def test_a_gpu_is_asked_for(everything):
    (device,) = everything["bertd-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_settings_of_the_environment_reach_the_server():
    assert services(BERTD_MODEL="bert-base-chinese", BERTD_API_KEY="sesame")["bertd"]["environment"] == {
        "BERTD_MODEL": "bert-base-chinese",
        "BERTD_API_KEY": "sesame",
        "BERTD_DTYPE": "",
        "BERTD_LOG_LEVEL": "",
    }


@pytest.mark.parametrize("file", ["docker-compose.yml", "deploy/kubernetes/kustomization.yml"])
def test_the_setting_that_no_image_can_do_is_named(file):
    locks = [(ROOT / f"deploy/requirements-{target}.txt").read_text() for target in ("cpu", "cuda")]
    assert not any("opentelemetry-exporter" in lock for lock in locks)
    assert "BERTD_OTLP_ENDPOINT" in (ROOT / file).read_text()


def test_what_is_mounted_from_here_is_here(everything):
    sources = [mount.split(":")[0] for service in everything.values() for mount in service["volumes"]]
    assert {"./deploy/prometheus", "./deploy/grafana/dashboards"} <= set(sources)
    assert all((ROOT / source).is_dir() for source in sources if source.startswith("."))

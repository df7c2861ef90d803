"""The dashboard asks only for what is there, and says what it shows."""

import json
import re

import pytest
import yaml
from stack import DEPLOY

from app.metrics import Metrics
from app.record import PROBES

DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/bertd.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
EXPRESSIONS += [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
ALERTS = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]

EXPORTED = {"up"} | {
    name + suffix
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", Metrics().exposition()[0].decode(), re.M)
    for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
}

_WORDS = {"by", "on", "group_left", "or"}


def metrics_in(expression):
    """The names of metrics in an expression: what is no label, no function, no word of the language."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|on|group_left) \([^)]*\)", " ", expression)
    return set(re.findall(r"\b[a-z_]+\b(?!\s*\()", bare)) - _WORDS


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_says_what_it_shows(panel):
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]


def test_panels_lie_side_by_side_and_have_numbers_of_their_own():
    places = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) == 23
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.parametrize("expression", [*EXPRESSIONS, *(alert["expr"] for alert in ALERTS)])
def test_only_metrics_that_are_there(expression):
    assert metrics_in(expression)
    assert metrics_in(expression) <= EXPORTED


@pytest.mark.parametrize("expression", [e for e in (*EXPRESSIONS, *(a["expr"] for a in ALERTS)) if "bertd_requests_total" in e])
def test_probes_are_no_requests(expression):
    """Neither above nor below a line of division: a server without traffic is asked by nobody else."""
    left_out = re.findall(r'bertd_requests_total\{route!~"([^"]+)"', expression)
    assert len(left_out) == expression.count("bertd_requests_total")
    assert all(set(routes.split("|")) == PROBES for routes in left_out)


@pytest.mark.system
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_expression_has_an_answer(expression, prometheus):
    """In a real Prometheus, soon after the first scrapes: it can be parsed, and there are series for its labels."""
    instance = "{}:{}".format(*prometheus.bertd.address)
    asked = expression.replace("$__rate_interval", "1m").replace("$instance", re.escape(instance).replace("\\", "\\\\"))
    if asked.endswith("> 0"):  # shown only where something happened
        asked = asked.removesuffix("> 0")
    assert prometheus.wait_for(lambda: prometheus.query(asked))


def test_the_data_source_and_the_folder_of_dashboards_are_provisioned():
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", "http://prometheus:9090", True)
    (provider,) = yaml.safe_load((provisioning / "dashboards/bertd.yml").read_text())["providers"]
    compose = yaml.safe_load((DEPLOY.parent / "docker-compose.yml").read_text())
    mounts = {mount.split(":")[1]: mount.split(":")[0] for mount in compose["services"]["grafana"]["volumes"]}
    assert mounts[provider["options"]["path"]] == "./deploy/grafana/dashboards"
    assert mounts["/etc/grafana/provisioning"] == "./deploy/grafana/provisioning"

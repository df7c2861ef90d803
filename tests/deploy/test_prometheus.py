"""A real Prometheus scrapes the server, and our alerts come when they should."""

import math
import re
import subprocess

import pytest
import yaml
from stack import DEPLOY, require

from app.metrics import STAGES

pytestmark = pytest.mark.system


def promtool(*arguments, **options):
    command = [require("promtool"), *arguments]
    return subprocess.run(command, cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=60, check=False, **options)


def test_the_server_is_scraped_and_its_requests_are_counted(prometheus):
    prometheus.wait_for(lambda: prometheus.query("up == 1"))
    (target,) = prometheus.client.get("/api/v1/targets").json()["data"]["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    for _ in range(7):
        assert prometheus.bertd.post("/embed", inputs=["abc", "de"]).status_code == 200
    prometheus.wait_for(lambda: prometheus.number('bertd_requests_total{route="/embed",status="200"}') == 7)
    assert prometheus.number("bertd_texts_total") == 14
    assert prometheus.number('bertd_engine_state{state="ready"}') == 1
    assert prometheus.number("sum(bertd_refused_total)") == 0


def test_the_first_request_of_a_status_is_seen_by_a_rate(prometheus):
    """A series that is not there before its first request has no rate in it."""
    rate = 'increase(bertd_refused_total{reason="Empty"}[1m])'
    prometheus.wait_for(lambda: prometheus.query(rate))
    assert prometheus.bertd.post("/embed", inputs=[]).status_code == 400
    prometheus.wait_for(lambda: prometheus.number(rate) > 0)


def test_quantiles_of_every_stage(prometheus):
    quantile = "histogram_quantile(0.99, sum by (le, stage) (rate(bertd_stage_seconds_bucket[1m])))"

    def quantiles():
        prometheus.bertd.post("/embed", inputs="abc")
        found = {series["metric"]["stage"]: float(series["value"][1]) for series in prometheus.query(quantile)}
        return found if found and not any(map(math.isnan, found.values())) else None

    found = prometheus.wait_for(quantiles)
    assert found.keys() == {*STAGES}
    assert all(0 < seconds <= 60 for seconds in found.values())


def test_every_alert_can_be_evaluated_and_none_is_raised(prometheus):
    def quiet():  # a scrape that came late on a busy machine makes one pending for a moment
        (group,) = prometheus.client.get("/api/v1/rules").json()["data"]["groups"]
        return {(rule["health"], rule["state"]) for rule in group["rules"]} == {("ok", "inactive")}

    prometheus.wait_for(quiet)


def test_our_metrics_have_no_lint(prometheus):
    done = promtool("check", "metrics", input=prometheus.bertd.client.get("/metrics").text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_configuration_and_the_rules_are_sound():
    done = promtool("check", "config", "prometheus.yml")
    assert "prometheus.yml is valid" in done.stdout
    assert "FAILED" not in done.stdout + done.stderr
    assert done.returncode == 0


def test_the_alerts_come_when_they_should_and_only_then():
    done = promtool("test", "rules", "alerts_test.yml")
    assert done.returncode == 0, done.stdout
    assert "SUCCESS" in done.stdout


def test_every_alert_is_explained_to_who_is_woken():
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"][0]["rules"]
    page = (DEPLOY.parent / "docs/operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(Bertd\w+)` \| (\w+) \|", page, re.M)
    assert rows == [(rule["alert"], rule["labels"]["severity"]) for rule in rules]
    tests = (DEPLOY / "prometheus/alerts_test.yml").read_text()
    assert all(re.search(rf"alertname: {alert}\n +exp_alerts:\n", tests) for alert, _ in rows)

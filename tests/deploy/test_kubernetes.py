"""deploy/kubernetes: Kubernetes takes it, and its parts fit each other, the image and the server."""

import re
import shutil
import subprocess
from decimal import Decimal

import kubernetes_validate
import pytest
import yaml
from stack import DEPLOY

from app.main import create_api, refusal
from app.metrics import Metrics
from app.settings import Settings

FOLDER = DEPLOY / "kubernetes"
DOCKERFILE = (DEPLOY.parent / "Dockerfile").read_text(encoding="utf-8")
VERSION = kubernetes_validate.latest_version()
ROUTES = create_api(refusal).openapi()["paths"]


def read(name):
    return yaml.safe_load((FOLDER / f"{name}.yml").read_text(encoding="utf-8"))


DEPLOYMENT, SERVICE, AUTOSCALER = read("deployment"), read("service"), read("autoscaler")
BUDGET, MONITOR, ADAPTER = read("disruption-budget"), read("service-monitor"), read("prometheus-adapter")
KUSTOMIZATION = read("kustomization")
BUILT_IN = [DEPLOYMENT, SERVICE, AUTOSCALER, BUDGET]
RESOURCES = [*BUILT_IN, MONITOR]  # whose kind comes with an operator
TEMPLATE = DEPLOYMENT["spec"]["template"]
POD = TEMPLATE["spec"]
(CONTAINER,) = POD["containers"]
(PORT,) = CONTAINER["ports"]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def selects(selector, labels):
    return selector.items() <= labels.items()


def cores(quantity):
    """A number of cores as Kubernetes has it: 2, or 2500m."""
    return Decimal(quantity[:-1]) / 1000 if quantity.endswith("m") else Decimal(quantity)


@pytest.fixture(scope="module")
def settings():
    """What the server reads of the environment that a pod gives it."""
    (generated,) = KUSTOMIZATION["configMapGenerator"]
    assert CONTAINER["envFrom"] == [{"configMapRef": {"name": generated["name"]}}]
    pairs = dict(literal.split("=", 1) for literal in generated["literals"])
    named = {variable["name"]: variable.get("value", "of a Secret") for variable in CONTAINER["env"]}
    of_the_image = dict(re.findall(r"^ +(BERTD_\w+)=([^\s\\]+)", DOCKERFILE, re.M))
    return Settings.read(of_the_image | pairs | named)


def assert_taken(resource):
    """By Kubernetes, and strictly: a field that it does not know is a mistake of ours."""
    kubernetes_validate.validate(resource, VERSION, strict=True)


@pytest.mark.parametrize("resource", BUILT_IN, ids=lambda resource: resource["kind"])
def test_kubernetes_takes_it(resource):
    assert_taken(resource)


def test_what_kustomize_makes_of_it_is_taken_too():
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", FOLDER], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    made = {resource["kind"]: resource for resource in yaml.safe_load_all(done.stdout)}
    assert made.keys() == {resource["kind"] for resource in RESOURCES} | {"ConfigMap"}
    assert made.pop("ServiceMonitor") == MONITOR
    for resource in made.values():
        assert_taken(resource)
    (container,) = made["Deployment"]["spec"]["template"]["spec"]["containers"]
    (image,) = KUSTOMIZATION["images"]
    assert container["image"] == f"{image['newName']}:{image['newTag']}"
    assert container["envFrom"] == [{"configMapRef": {"name": made["ConfigMap"]["metadata"]["name"]}}]


def test_every_file_is_applied_or_is_for_the_adapter():
    here = sorted(path.name for path in FOLDER.iterdir())
    assert sorted([*KUSTOMIZATION["resources"], "kustomization.yml", "prometheus-adapter.yml"]) == here


def test_every_file_is_explained():
    page = (DEPLOY.parent / "docs/operations.md").read_text(encoding="utf-8")
    assert [path.name for path in FOLDER.iterdir() if f"| `{path.name}` |" not in page] == []


def test_the_page_makes_the_secret_that_the_pods_look_for():
    page = (DEPLOY.parent / "docs/operations.md").read_text(encoding="utf-8")
    (reference,) = (variable["valueFrom"]["secretKeyRef"] for variable in CONTAINER["env"])
    assert f"kubectl create secret generic {reference['name']} --from-file={reference['key']}=/dev/stdin" in page
    assert reference["optional"] is True


def test_everything_that_selects_pods_finds_those_of_the_deployment():
    labels = TEMPLATE["metadata"]["labels"]
    spread = [constraint["labelSelector"]["matchLabels"] for constraint in POD["topologySpreadConstraints"]]
    owners = (DEPLOYMENT["spec"]["selector"]["matchLabels"], BUDGET["spec"]["selector"]["matchLabels"])
    for selector in (*owners, SERVICE["spec"]["selector"], *spread):
        assert selector
        assert selects(selector, labels)
    target = AUTOSCALER["spec"]["scaleTargetRef"]
    metadata = DEPLOYMENT["metadata"]
    assert target == {"apiVersion": DEPLOYMENT["apiVersion"], "kind": DEPLOYMENT["kind"], "name": metadata["name"]}


def test_pods_are_spread_over_nodes_and_zones_without_a_condition():
    places = {place["topologyKey"]: place["whenUnsatisfiable"] for place in POD["topologySpreadConstraints"]}
    assert places == dict.fromkeys(("kubernetes.io/hostname", "topology.kubernetes.io/zone"), "ScheduleAnyway")


def test_the_service_leads_to_the_port_of_the_server(settings):
    (port,) = SERVICE["spec"]["ports"]
    assert port["targetPort"] == PORT["name"]
    assert PORT["containerPort"] == settings.port
    assert f"\nEXPOSE {settings.port}\n" in DOCKERFILE
    assert settings.host == "0.0.0.0"


def test_the_monitor_finds_the_service_and_scrapes_what_is_there():
    assert selects(MONITOR["spec"]["selector"]["matchLabels"], SERVICE["metadata"]["labels"])
    (endpoint,) = MONITOR["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in SERVICE["spec"]["ports"]}
    assert "get" in ROUTES[endpoint["path"]]


def test_alerts_name_the_job_that_the_operator_makes_of_the_service():
    alerts = (DEPLOY / "prometheus/alerts.yml").read_text(encoding="utf-8")
    assert set(re.findall(r'\bjob="(\w+)"', alerts)) == {SERVICE["metadata"]["name"]}


@pytest.mark.parametrize("name", PROBES)
def test_probes_ask_for_routes_that_are_there_and_open_to_all(name):
    probe = CONTAINER[name]["httpGet"]
    assert probe["port"] == PORT["name"]
    assert "get" in ROUTES[probe["path"]]
    assert "401" not in ROUTES[probe["path"]]["get"]["responses"]


def test_an_engine_that_starts_again_costs_a_pod_its_traffic_and_never_its_life():
    paths = [CONTAINER[name]["httpGet"]["path"] for name in PROBES]
    assert paths == ["/ready", "/ready", "/health"]


def test_accepted_requests_have_their_whole_grace_period_after_the_pause(settings):
    pause = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pause > 0
    assert POD["terminationGracePeriodSeconds"] >= pause + settings.grace_period + 5
    assert settings.grace_period >= settings.request_timeout


def test_an_update_never_has_fewer_pods_than_before():
    assert "replicas" not in DEPLOYMENT["spec"]
    assert DEPLOYMENT["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert AUTOSCALER["spec"]["minReplicas"] > BUDGET["spec"]["maxUnavailable"] > 0


def test_the_pod_keeps_to_the_restricted_profile_of_kubernetes():
    context, own = POD["securityContext"], CONTAINER["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"]["type"] == "RuntimeDefault"
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert own["readOnlyRootFilesystem"] is True
    assert POD["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & POD.keys()
    assert all(volume.keys() & {"emptyDir", "persistentVolumeClaim"} for volume in POD["volumes"])


def test_the_user_is_that_of_the_image_and_may_write_where_it_does(settings):
    user, group = map(int, re.search(r"^USER (\d+):(\d+)$", DOCKERFILE, re.M).groups())
    context = POD["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (user, group, group)
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in POD["volumes"]}
    assert set(mounts.values()) == {"/tmp", settings.data_dir}


def test_the_image_is_a_target_of_the_dockerfile():
    (image,) = KUSTOMIZATION["images"]
    name, target = CONTAINER["image"].split(":")
    assert image["name"] == name
    assert f" AS {target}\n" in DOCKERFILE


def test_the_encoder_has_a_core_for_each_of_its_threads(settings):
    resources = CONTAINER["resources"]
    threads = settings.threads or int(cores(resources["limits"]["cpu"]))
    assert 1 <= threads <= cores(resources["requests"]["cpu"])
    assert threads < cores(resources["limits"]["cpu"]), "nothing is left for the API process"
    assert resources["requests"]["memory"] == resources["limits"]["memory"]


def test_the_autoscaler_counts_what_the_adapter_serves():
    """An adapter's rule without a name of its own serves a metric under that of its series."""
    wanted = {metric["pods"]["metric"]["name"] for metric in AUTOSCALER["spec"]["metrics"] if metric["type"] == "Pods"}
    rules = ADAPTER["rules"]["custom"]
    assert wanted == {re.match(r"\w+", rule["seriesQuery"])[0] for rule in rules}
    assert wanted
    gauges = set(re.findall(r"^# TYPE (\w+) gauge$", Metrics().exposition()[0].decode(), re.M))
    assert wanted <= gauges
    for rule in rules:
        assert all(f'{label}!=""' in rule["seriesQuery"] for label in rule["resources"]["overrides"])
        assert {overridden["resource"] for overridden in rule["resources"]["overrides"].values()} == {"namespace", "pod"}
        assert "name" not in rule


def test_resources_that_the_autoscaler_counts_are_requested():
    (counted,) = (metric["resource"] for metric in AUTOSCALER["spec"]["metrics"] if metric["type"] == "Resource")
    assert counted["name"] in CONTAINER["resources"]["requests"]


def test_more_pods_come_sooner_than_they_go():
    behavior = AUTOSCALER["spec"]["behavior"]
    up, down = behavior["scaleUp"], behavior["scaleDown"]
    assert up["stabilizationWindowSeconds"] < down["stabilizationWindowSeconds"]
    assert max(p["periodSeconds"] for p in up["policies"]) <= min(p["periodSeconds"] for p in down["policies"])
    assert AUTOSCALER["spec"]["minReplicas"] < AUTOSCALER["spec"]["maxReplicas"]


@pytest.mark.system
def test_prometheus_answers_what_the_adapter_asks(prometheus):
    (rule,) = ADAPTER["rules"]["custom"]
    name = re.match(r"\w+", rule["seriesQuery"])[0]
    query = rule["metricsQuery"].replace("<<.Series>>", name).replace("<<.LabelMatchers>>", 'job="bertd"')
    query = query.replace("<<.GroupBy>>", "instance")
    (series,) = prometheus.wait_for(lambda: prometheus.query(query))
    assert series["metric"] == {"instance": "{}:{}".format(*prometheus.bertd.address)}


def test_names_and_labels_are_the_same_everywhere():
    assert [resource for resource in RESOURCES if resource["metadata"] != DEPLOYMENT["metadata"]] == []

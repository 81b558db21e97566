"""What the files in deploy/ promise of each other, and of whoever runs what they start."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from peculium_server.config import PORT_DEFAULT
from peculium_server.files import ownership_problem
from tests.deploy.started import (
    COMPOSE,
    DEPLOY,
    DOCKERFILE,
    IMAGE,
    KUBERNETES,
    ROOT,
    compose,
    documents,
    instruction,
    manifests,
    pods,
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USER = int(instruction("USER").partition(":")[0])
ROOT_USER = 0
POSTGRES, OTLP, DNS = 5432, 4317, 53
SERVICES: dict[str, Any] = compose()["services"]
PODS = pods()
pod_of_each = pytest.mark.parametrize("pod", PODS.values(), ids=PODS)


def test_every_file_means_the_version_that_this_is() -> None:
    version = PROJECT["version"]
    assert f'image.version="{version}"' in DOCKERFILE.read_text()
    used = {each["image"] for each in SERVICES.values() if each["image"].startswith(f"{IMAGE}:")}
    assert used == {f"{IMAGE}:{version}"}
    for path in KUBERNETES.rglob("kustomization.yaml"):
        [image] = documents(path)[0]["images"]
        assert (image["name"], image["newTag"]) == (IMAGE, version)


def test_every_other_image_is_pinned_to_a_version() -> None:
    images = {each["image"] for each in SERVICES.values() if not each["image"].startswith(IMAGE)}
    images.add(instruction("ARG").partition("=")[2])
    assert all(re.search(r":v?\d+\.\d+", image) for image in images), images


def test_the_image_runs_as_an_unprivileged_user_whom_every_file_means() -> None:
    assert USER >= 10_000
    assert instruction("USER") == f"{USER}:{USER}"
    assert f"user={USER}:{USER}\n" in (DEPLOY / "compose" / "secrets.sh").read_text()
    for pod in PODS.values():
        said = pod["spec"]["securityContext"]
        assert {said["runAsUser"], said["runAsGroup"], said["fsGroup"]} == {USER}


def test_the_image_has_what_the_lock_names_and_is_stopped_by_what_drains() -> None:
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    assert instruction("STOPSIGNAL") == "SIGTERM"
    assert instruction("EXPOSE") == str(PORT_DEFAULT)
    installing = re.findall(r"\binstall\b(.*?)(?:&&|$)", text, re.MULTILINE)
    assert installing
    for options in installing:
        assert "--require-hashes" in options or "--no-deps --no-index" in options, options


def locked(path: Path) -> dict[str, str]:
    """What a lock has of each package: its version and hashes, on whichever platforms."""
    text = re.sub(r" ; .*", " \\\\", path.read_text())
    blocks = re.findall(r"^([\w.\-\[\]]+)(==.*\n(?: .*\n?)*)", text, re.MULTILINE)
    return {name: said.rstrip() for name, said in blocks}


@pytest.mark.parametrize("name", ["server.lock", "build.lock"])
def test_the_image_is_made_of_what_everything_is_tested_with(name: str) -> None:
    everything, image = locked(ROOT / "requirements.lock"), locked(DEPLOY / "container" / name)
    assert image
    assert {name: everything.get(name) for name in image} == image


def test_the_image_has_all_that_a_server_needs_and_nothing_to_develop_with() -> None:
    image = locked(DEPLOY / "container" / "server.lock").keys()
    extras = PROJECT["optional-dependencies"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", each, maxsplit=1)[0].lower() for each in requirements}

    assert names([*PROJECT["dependencies"], *extras["server"]]) <= image
    others = set().union(*(names(extras[name]) for name in ("dev", "embedded", "parquet")))
    assert image & (others | {"hatchling", "pip", "setuptools"}) == {"packaging"} & image


def test_the_context_of_the_image_is_what_its_file_copies() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    allowed = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    for path in " ".join(copied).split():
        assert (ROOT / path).exists(), path
        assert any(Path(path).match(pattern) for pattern in allowed), path


@pod_of_each
def test_a_pod_may_do_nothing_but_its_work(pod: Any) -> None:
    spec = pod["spec"]
    assert spec["serviceAccountName"] == "peculium"
    assert manifests()["ServiceAccount/peculium"]["automountServiceAccountToken"] is False
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]


@pod_of_each
def test_the_server_takes_private_keys_with_the_mode_that_they_have_in_a_pod(pod: Any) -> None:
    secrets = [each["secret"] for each in pod["spec"]["volumes"] if "secret" in each]
    assert secrets
    for secret in secrets:
        # They are root's; with fsGroup the kubelet lets the group read them, whatever is said.
        mode = secret["defaultMode"] | 0o440
        assert ownership_problem(ROOT_USER, mode, user=USER) is None
        assert secret["secretName"] in (ROOT / "docs/operating/deploy.md").read_text()


@pod_of_each
def test_every_mount_has_a_volume_and_every_volume_a_mount(pod: Any) -> None:
    [container] = pod["spec"]["containers"]
    mounts = [mount["name"] for mount in container["volumeMounts"]]
    assert sorted(mounts) == sorted(volume["name"] for volume in pod["spec"]["volumes"])


def test_the_owner_of_the_database_is_nobody_whom_a_server_connects_as() -> None:
    users = {
        name: {each["secret"]["secretName"] for each in pod["spec"]["volumes"] if "secret" in each}
        for name, pod in PODS.items()
    }
    assert users["Job/peculium-migrate"] == {"peculium-database-owner"}
    assert "peculium-database-owner" not in users["Deployment/peculium"]
    for service in ("server-1", "server-2"):
        assert "database_owner" not in SERVICES[service]["secrets"]


def test_whatever_selects_servers_selects_their_pods_and_no_others() -> None:
    found = manifests()
    deployment = found["Deployment/peculium"]["spec"]
    selectors = [
        deployment["selector"]["matchLabels"],
        found["Service/peculium"]["spec"]["selector"],
        found["PodDisruptionBudget/peculium"]["spec"]["selector"]["matchLabels"],
        found["NetworkPolicy/peculium"]["spec"]["podSelector"]["matchLabels"],
        *(
            each["labelSelector"]["matchLabels"]
            for each in deployment["template"]["spec"]["topologySpreadConstraints"]
        ),
    ]
    labels = deployment["template"]["metadata"]["labels"]
    assert selectors == [labels] * len(selectors)
    other = PODS["Job/peculium-migrate"]["metadata"]["labels"]
    assert found["NetworkPolicy/peculium-migrate"]["spec"]["podSelector"]["matchLabels"] == other
    assert not labels.items() <= other.items()


def ports(rules: list[Any]) -> set[int]:
    # A rule without ports, or without anybody, would mean all of them.
    assert all(rule["ports"] and (rule.get("from") or rule.get("to")) for rule in rules)
    return {port["port"] for rule in rules for port in rule["ports"]}


def test_pods_are_reached_and_reach_out_at_the_ports_that_they_need_only() -> None:
    found = manifests()
    assert found["NetworkPolicy/nobody"]["spec"] == {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
    }
    server = found["NetworkPolicy/peculium"]["spec"]
    assert ports(server["ingress"]) == {PORT_DEFAULT}
    assert ports(server["egress"]) == {DNS, POSTGRES, OTLP}
    migrate = found["NetworkPolicy/peculium-migrate"]["spec"]
    assert "ingress" not in migrate
    assert ports(migrate["egress"]) == {DNS, POSTGRES}
    assert all(set(each["policyTypes"]) == {"Ingress", "Egress"} for each in (server, migrate))


def test_the_service_is_headless_and_leads_to_the_port_that_is_listened_on() -> None:
    service = manifests()["Service/peculium"]["spec"]
    assert service["clusterIP"] == "None"
    [port] = service["ports"]
    [container] = PODS["Deployment/peculium"]["spec"]["containers"]
    [opened] = container["ports"]
    assert port["port"] == opened["containerPort"] == PORT_DEFAULT
    assert port["targetPort"] == opened["name"]
    probed = {container[probe]["tcpSocket"]["port"] for probe in ("startupProbe", "livenessProbe")}
    assert probed == {opened["name"]}


def test_a_server_is_always_left() -> None:
    deployment = manifests()["Deployment/peculium"]["spec"]
    assert deployment["replicas"] >= 2
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    budget = manifests()["PodDisruptionBudget/peculium"]["spec"]
    assert budget["maxUnavailable"] < deployment["replicas"]


def test_every_manifest_is_one_of_a_kustomization_or_comes_before_them() -> None:
    listed = {KUBERNETES / "namespace.yaml"}
    for path in KUBERNETES.rglob("kustomization.yaml"):
        [kustomization] = documents(path)
        assert kustomization["namespace"] == "peculium"
        listed |= {path, *(path.parent / name for name in kustomization["resources"])}
    assert listed == set(KUBERNETES.rglob("*.yaml"))


def test_only_this_machine_reaches_what_compose_publishes() -> None:
    published = {name: port for name, each in SERVICES.items() for port in each.get("ports", ())}
    assert set(published) == {"server-1", "server-2", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for port in published.values())
    for server in ("server-1", "server-2"):
        assert published[server].endswith(f":{PORT_DEFAULT}")


def test_compose_has_no_password_and_hands_over_every_secret_that_is_made() -> None:
    assert not re.search(r"PASSWORD(:|=(?!\$\$\(cat ))", COMPOSE.read_text())
    made = (DEPLOY / "compose" / "secrets.sh").read_text()
    secrets = compose()["secrets"]
    for name, secret in secrets.items():
        assert secret["file"] == f"secrets/{name}"
        assert name in made
    used = {name for each in SERVICES.values() for name in each.get("secrets", ())}
    assert used == set(secrets)
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/deploy/compose/secrets/", "/deploy/compose/.env"} <= set(ignored)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_waits_for_what_there_is_to_wait_for(name: str) -> None:
    for awaited, how in SERVICES[name].get("depends_on", {}).items():
        other = SERVICES[awaited]
        match how["condition"]:
            case "service_healthy":
                assert "healthcheck" in other
            case "service_completed_successfully":
                assert "restart" not in other
            case condition:
                assert condition == "service_started"
                assert "healthcheck" not in other


def test_every_file_that_compose_mounts_is_there() -> None:
    mounted = [
        mount.split(":")[0]
        for each in SERVICES.values()
        for mount in each.get("volumes", ())
        if mount.startswith(".")
    ]
    assert len(mounted) == 8
    assert all((COMPOSE.parent / path).is_file() for path in mounted)


def test_what_servers_tell_arrives_where_it_is_shown() -> None:
    folder = COMPOSE.parent
    [collector] = documents(folder / "collector.yaml")
    [tempo] = documents(folder / "tempo.yaml")
    [sources] = documents(folder / "grafana" / "datasources.yaml")
    receiver = collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"]
    told = urlsplit(SERVICES["server-1"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"])
    assert (told.hostname, told.port) == ("collector", int(receiver.rpartition(":")[2]))
    for pipeline in collector["service"]["pipelines"].values():
        for part in ("receivers", "processors", "exporters"):
            assert set(pipeline[part]) <= set(collector[part])
    traces = collector["exporters"]["otlp/tempo"]["endpoint"]
    listened = tempo["distributor"]["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"]
    assert traces == f"tempo:{listened.rpartition(':')[2]}"
    metrics = urlsplit(collector["exporters"]["otlphttp/prometheus"]["endpoint"])
    assert (metrics.hostname, metrics.path) == ("prometheus", "/api/v1/otlp")
    assert "--web.enable-otlp-receiver" in SERVICES["prometheus"]["command"]
    shown = {each["type"]: urlsplit(each["url"]) for each in sources["datasources"]}
    assert shown["prometheus"].netloc == metrics.netloc
    assert shown["tempo"].netloc == f"tempo:{tempo['server']['http_listen_port']}"
    networks = [set(SERVICES[name]["networks"]) for name in ("collector", "prometheus", "tempo")]
    assert all("telemetry" in each for each in networks)


def test_grafana_has_the_dashboard_where_it_looks_for_it() -> None:
    [provided] = documents(COMPOSE.parent / "grafana" / "dashboards.yaml")
    [provider] = provided["providers"]
    mounts = {each.split(":")[0]: each.split(":")[1] for each in SERVICES["grafana"]["volumes"]}
    place = Path(mounts["../grafana/peculium.json"])
    assert str(place.parent) == provider["options"]["path"]
    variables = SERVICES["grafana"]["environment"]
    assert variables["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == str(place)
    json.loads((COMPOSE.parent / "../grafana/peculium.json").read_text())

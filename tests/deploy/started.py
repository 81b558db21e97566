"""How the files in deploy/ start the program, read as those read them who start it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose" / "compose.yaml"
DOCKERFILE = DEPLOY / "container" / "Dockerfile"
KUBERNETES = DEPLOY / "kubernetes"
IMAGE = "peculium"


class Started(NamedTuple):
    """The program, as one of the files starts it."""

    where: str
    arguments: list[str]
    environment: dict[str, str]
    files: list[str]
    """Files that it may read, or folders of them."""
    stop_seconds: float | None
    """After how long it is killed when it was told to stop; None: that is left to others."""
    probes: list[list[str]]
    """Commands that are to tell how it is."""


def documents(path: Path) -> list[Any]:
    """What is in a file of YAML."""
    return list(yaml.safe_load_all(path.read_text()))


def compose() -> Any:
    """The file for Compose."""
    [document] = documents(COMPOSE)
    return document


def manifests() -> dict[str, Any]:
    """Kubernetes' objects, by kind and name; kustomizations are by their folders' names."""
    found = {}
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        for document in documents(path):
            name = document.get("metadata", {}).get("name", path.parent.name)
            found[f"{document['kind']}/{name}"] = document
    return found


def pods() -> dict[str, Any]:
    """What pods are made of, by what makes them."""
    return {
        name: manifest["spec"]["template"]
        for name, manifest in manifests().items()
        if "template" in manifest.get("spec", {})
    }


def every_start() -> list[Started]:
    """All of them."""
    return [*_of_image(), *_of_systemd(), *_of_compose(), *_of_kubernetes()]


def instruction(name: str) -> str:
    """The last instruction of this name in the Dockerfile, without it."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    return str(re.findall(rf"^{name} (.*)$", text, re.MULTILINE)[-1])


def settings_in(text: str) -> dict[str, str]:
    """The variables of a file with one in each line."""
    return dict(re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE))


def _of_image() -> Iterator[Started]:
    assert json.loads(instruction("ENTRYPOINT")) == [IMAGE]
    variables = dict(each.split("=", 1) for each in shlex.split(instruction("ENV")))
    probe = json.loads(instruction("HEALTHCHECK").partition("CMD")[2])
    yield Started("image", json.loads(instruction("CMD")), variables, [], None, [probe])


def _of_systemd() -> Iterator[Started]:
    unit = (DEPLOY / "peculium.service").read_text()
    directives = re.findall(r"^(\w+)=(.*)$", unit, re.MULTILINE)
    said = dict(directives)
    program, *arguments = shlex.split(said["ExecStart"])
    assert Path(program).name == IMAGE
    files = ["/etc/peculium/tls.crt", "/etc/peculium/keys.toml"]
    for name, value in directives:
        if name == "LoadCredential":
            files.append(f"/run/credentials/peculium.service/{value.partition(':')[0]}")
    settings = settings_in((DEPLOY / "peculium.env").read_text())
    yield Started("systemd", arguments, settings, files, float(said["TimeoutStopSec"]), [])


def _of_compose() -> Iterator[Started]:
    for name, service in compose()["services"].items():
        if service["image"].partition(":")[0] != IMAGE:
            continue
        variables = {key: str(value) for key, value in service["environment"].items()}
        files = [f"/run/secrets/{secret}" for secret in service["secrets"]]
        stop = service.get("stop_grace_period")
        probes = [service["healthcheck"]["test"][1:]] if "healthcheck" in service else []
        seconds = None if stop is None else float(stop.removesuffix("s"))
        yield Started(name, service["command"], variables, files, seconds, probes)


def _of_kubernetes() -> Iterator[Started]:
    for name, pod in pods().items():
        spec = pod["spec"]
        [container] = spec["containers"]
        variables: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            variables |= _generated(source["configMapRef"]["name"])
        variables |= {each["name"]: each.get("value", "") for each in container["env"]}
        files = [mount["mountPath"] for mount in container["volumeMounts"]]
        asked = [each["exec"]["command"] for each in _probes(container) if "exec" in each]
        stop = spec.get("terminationGracePeriodSeconds")
        yield Started(name, container["args"], variables, files, stop, asked)


def _probes(container: Any) -> list[Any]:
    return [value for key, value in container.items() if key.endswith("Probe")]


def _generated(name: str) -> dict[str, str]:
    """What kustomize puts into a ConfigMap."""
    for path in KUBERNETES.rglob("kustomization.yaml"):
        for generator in documents(path)[0].get("configMapGenerator", ()):
            if generator["name"] == name:
                [file] = generator["envs"]
                return settings_in((path.parent / file).read_text())
    raise KeyError(name)

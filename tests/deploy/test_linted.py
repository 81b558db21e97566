"""What those say of the files in deploy/ who know such files: schemas, and linters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.started import COMPOSE, DEPLOY, DOCKERFILE, KUBERNETES, ROOT

PROGRAMS = Path(sys.executable).parent
MANIFESTS = sorted(set(KUBERNETES.rglob("*.yaml")) - set(KUBERNETES.rglob("kustomization.yaml")))


def assert_accepts(*command: str | Path) -> None:
    linted = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_yaml_is_written_as_the_rest_of_it() -> None:
    assert_accepts(PROGRAMS / "yamllint", "--strict", "deploy")


def test_compose_would_read_its_file() -> None:
    assert_accepts(
        *(PROGRAMS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)
    )


@pytest.mark.parametrize("version", ["1.27", "1.37"])
def test_kubernetes_would_read_the_manifests(version: str) -> None:
    program = PROGRAMS / "kubernetes-validate"
    assert_accepts(program, "--kubernetes-version", version, "--strict", *MANIFESTS)


def test_the_dockerfile_does_what_is_known_to_be_good() -> None:
    assert_accepts(PROGRAMS / "hadolint", "--failure-threshold", "info", DOCKERFILE)


def test_the_shell_means_what_it_says() -> None:
    assert_accepts(PROGRAMS / "shellcheck", *DEPLOY.rglob("*.sh"))


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("vendor.compose-spec", "services: {server: {image: x, dependson: []}}"),
        ("kubernetes", "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {port: 1}"),
    ],
)
def test_what_is_misspelt_would_be_found(kind: str, wrong: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(wrong)
    command = [str(PROGRAMS / "check-jsonschema"), "--builtin-schema", kind]
    if kind == "kubernetes":
        command = [str(PROGRAMS / "kubernetes-validate"), "--strict"]
    command.append(str(tmp_path / "wrong.yaml"))
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0

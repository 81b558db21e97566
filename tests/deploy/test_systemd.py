from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from peculium_server.core.operations import Role
from peculium_server.identity import Identities
from tests.deploy.started import DEPLOY, settings_in


def test_the_key_file_to_begin_with_is_one_and_shows_every_role() -> None:
    assert not Identities.load(DEPLOY / "keys.toml").dev_mode
    shown = set(re.findall(r'^role = "(\w+)"$', (DEPLOY / "keys.toml").read_text(), re.MULTILINE))
    assert shown == {role.name.lower() for role in Role if role is not Role.SYSTEM}


def test_prometheus_comes_to_where_the_servers_page_is() -> None:
    page = settings_in((DEPLOY / "peculium.env").read_text())["PECULIUM_METRICS_LISTEN"]
    assert f'targets: ["{page}"]' in (DEPLOY / "prometheus" / "prometheus.yaml").read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    # The unit's own program need not be installed where the tests run.
    unit = tmp_path / "peculium.service"
    text = (DEPLOY / "peculium.service").read_text()
    unit.write_text(text.replace("/opt/peculium/bin/peculium", "/bin/true"))
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], check=False, capture_output=True, text=True
    )
    assert verified.returncode == 0, verified.stderr

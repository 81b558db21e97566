from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from peculium_server.config import SERVER_SETTINGS
from peculium_server.core.operations import Role
from peculium_server.identity import Identities

DEPLOY = Path(__file__).parent.parent / "deploy"


def settings_in(text: str) -> dict[str, str]:
    return dict(re.findall(r"^(PECULIUM_[A-Z_]+)=(.*)$", text, re.MULTILINE))


def test_every_setting_that_deploy_names_is_one_of_the_servers_and_has_a_value_it_takes() -> None:
    known = {setting.variable: setting for setting in SERVER_SETTINGS}
    found = settings_in((DEPLOY / "peculium.env").read_text())
    assert found
    for variable, value in found.items():
        known[variable].parse(value)


def test_systemd_waits_longer_for_the_server_to_stop_than_the_server_drains() -> None:
    drain = settings_in((DEPLOY / "peculium.env").read_text())["PECULIUM_DRAIN_SECONDS"]
    unit = (DEPLOY / "peculium.service").read_text()
    stop = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert stop is not None
    assert int(stop[1]) > int(drain)


def test_the_key_file_to_begin_with_is_one_and_shows_every_role() -> None:
    assert not Identities.load(DEPLOY / "keys.toml").dev_mode
    shown = set(re.findall(r'^role = "(\w+)"$', (DEPLOY / "keys.toml").read_text(), re.MULTILINE))
    assert shown == {role.name.lower() for role in Role if role is not Role.SYSTEM}


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

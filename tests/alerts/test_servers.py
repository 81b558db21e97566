"""Alerts from end to end: a server, a receiver and the SDK, each a program of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import peculium
from peculium import AlertKind, Client, DeliveryState, Role, Webhook
from peculium.errors import IdTaken, Malformed, PermissionDenied, TooMany, WebhooksOff
from peculium_server.core.alerts import RULES_MAX
from peculium_server.webhooks.keys import WebhookKeys
from tests.alerts.documented import verified
from tests.alerts.receiver import Receiver, receiving
from tests.server import RunningServer, StartServer
from tests.sweeper.fleet import new_id
from tests.system.world import dump


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


@pytest.fixture
def server(start_server: StartServer, served_database: str, tmp_path: Path) -> RunningServer:
    WebhookKeys.make(tmp_path / "webhook-key")
    return start_server(
        *("--database-url", served_database, "--alert-seconds", "1"),
        *("--webhook-key-file", str(tmp_path / "webhook-key"), "--webhook-loopback"),
    )


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with peculium.connect(server.address) as connected:
        yield connected


def run(server: RunningServer, *arguments: str) -> list[dict[str, object]]:
    """What the command line says to machines."""
    command = [sys.executable, "-m", "peculium_server", *arguments]
    ran = subprocess.run(
        [*command, "--json", "--target", server.address],
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in ran.stdout.splitlines()]


def checked(told: dict[str, Any], webhook: Webhook) -> dict[str, Any]:
    """What a message says, if it is one that the webhook's secret has signed."""
    at = float(told["headers"]["webhook-timestamp"])
    assert verified(webhook.secret, told["headers"], told["body"].encode(), at)
    document: dict[str, Any] = json.loads(told["body"])
    return document


def followed(client: Client, count: int) -> list[str]:
    """The first things that are told to somebody who follows a tree and its alerts."""
    kinds: list[str] = []
    for watched in client.audit.watch("acme", from_beginning=True, alerts=True):
        kinds += [entry.kind for entry in watched.entries]
        kinds += [f"alert {alert.kind.name}" for alert in watched.alerts]
        if len(kinds) == count:
            break
    return kinds


def test_what_is_found_is_sent_to_the_receiver_and_told_to_who_follows_with_no_secret_anywhere(
    server: RunningServer,
    client: Client,
    receiver: Receiver,
    served_database: str,
    tmp_path: Path,
) -> None:
    client.admin.grant("acme", unit="calls", amount=100, holder="dev")
    webhook = client.webhooks.create(receiver.url("status/200"), budget="acme")
    assert client.webhooks.test(webhook.webhook_id).status == 200
    assert checked(receiver.next(), webhook)["type"] == "webhook.test"
    client.alerts.create("acme", percent=62.5)
    client.alerts.create("acme", AlertKind.FREEZE)
    client.open("acme").spend(63)
    data = checked(receiver.next(), webhook)["data"]
    assert (data["budget"], data["used"], data["threshold"]) == ("acme", "63", "63")
    client.admin.freeze("acme", "a person's words")
    assert checked(receiver.next(), webhook)["type"] == "budget.freeze"
    kinds = followed(client, 5)
    # What an alert is of comes before it.
    assert kinds.index("SPEND") < kinds.index("alert USED")
    assert kinds.index("FREEZE") < kinds.index("alert FREEZE")
    assert [each.kind for each in client.alerts.found("acme")] == [AlertKind.USED, AlertKind.FREEZE]
    [crossed, _] = run(server, "alerts", "list", "acme", "--oldest-first")
    assert (crossed["amount"], crossed["threshold"]) == (63, 63)
    assert [each["kind"] for each in run(server, "alerts", "rules")] == ["used", "freeze"]
    server.stop()
    with psycopg.connect(served_database) as connection:
        rows = [row for rows in dump(connection).values() for row in rows]
    everything = "\n".join([*server.said, *rows, repr(webhook)])
    assert receiver.url("status/200") in everything
    assert webhook.secret is not None
    for secret in (webhook.secret[6:], (tmp_path / "webhook-key").read_text().strip()):
        assert secret not in everything


def test_rules_and_webhooks_are_made_once_for_one_id_and_what_cannot_be_is_refused(
    client: Client,
) -> None:
    client.admin.grant("acme", unit="calls", amount=100, holder="dev")
    rule_id, webhook_id = new_id(), new_id()
    url = "https://receiver.example/"
    secrets = set()
    for _ in range(2):
        client.alerts.create("acme", amount=5, rule_id=rule_id)
        secrets.add(client.webhooks.create(url, webhook_id=webhook_id).secret)
    assert len(secrets) == 1
    assert [each.rule_id for each in client.alerts.rules()] == [rule_id]
    assert [each.webhook_id for each in client.webhooks.list()] == [webhook_id]
    with pytest.raises(IdTaken):
        client.alerts.create("acme", amount=6, rule_id=rule_id)
    with pytest.raises(IdTaken):
        client.webhooks.create(url + "else", webhook_id=webhook_id)
    with pytest.raises(Malformed, match="is not a public address"):
        client.webhooks.create("https://10.1.2.3/")
    for wrong in ({"percent": 0.001}, {"percent": 5.0, "amount": 5}, {}, {"amount": 0}):
        with pytest.raises(Malformed):
            client.alerts.create("acme", **wrong)
    for amount in range(1, RULES_MAX):
        client.alerts.create("acme", amount=amount)
    with pytest.raises(TooMany) as caught:
        client.alerts.create("acme", amount=1)
    assert caught.value.limit == RULES_MAX
    client.alerts.delete(rule_id)
    client.alerts.create("acme", amount=1)
    client.webhooks.delete(webhook_id)
    assert client.webhooks.list() == ()
    assert client.webhooks.replay(client.webhooks.create(url).webhook_id) == 0
    assert list(client.webhooks.deliveries(webhook_id, states=[DeliveryState.DEAD])) == []


def test_a_server_without_a_key_says_so(running_server: RunningServer) -> None:
    with peculium.connect(running_server.address) as client, pytest.raises(WebhooksOff):
        client.webhooks.create("https://receiver.example/")
    assert any("without a webhook_key_file" in line for line in running_server.said)


def test_an_admin_who_is_limited_to_some_roots_has_rules_there_and_no_webhooks(
    server: RunningServer, client: Client
) -> None:
    own, other = [
        client.admin.grant(name, unit="calls", amount=100, holder="dev").ref
        for name in ("acme", "elsewhere")
    ]
    theirs = client.alerts.create(other, amount=5)
    key = client.admin.keys.create("tenant", roles=[Role.ADMIN], roots=[own]).key
    with peculium.connect(server.address, api_key=key.reveal()) as tenant:
        rule = tenant.alerts.create("acme", amount=5)
        assert [each.rule_id for each in tenant.alerts.rules("acme")] == [rule.rule_id]
        assert list(tenant.alerts.found("acme")) == []
        assert tenant.alerts.delete(rule.rule_id).deleted_by == "tenant"
        refused: list[Callable[[], object]] = [
            lambda: tenant.alerts.create(other, amount=5),
            lambda: tenant.alerts.delete(theirs.rule_id),
            lambda: tenant.alerts.delete(new_id()),
            lambda: list(tenant.alerts.rules()),
            lambda: list(tenant.alerts.found()),
            lambda: tenant.webhooks.create("https://receiver.example/", budget=own),
            tenant.webhooks.list,
            lambda: list(tenant.webhooks.deliveries()),
        ]
        for ask in refused:
            with pytest.raises(PermissionDenied):
                ask()


def test_the_command_line_makes_shows_and_ends_rules_and_webhooks(
    server: RunningServer, client: Client, receiver: Receiver, tmp_path: Path
) -> None:
    client.admin.grant("acme", unit="calls", amount=100, holder="dev")
    made = run(server, "alerts", "create", "acme", "--used", "50%", "--used", "7", "--overrun")
    assert [(each["percent"], each["amount"], each["kind"]) for each in made] == [
        (50.0, None, "used"),
        (None, 7, "used"),
        (None, None, "overrun"),
    ]
    [ended] = run(server, "alerts", "delete", str(made[0]["rule_id"]))
    assert ended["deleted_by"] == "dev"
    [webhook] = run(server, "webhooks", "create", receiver.url("status/503"), "--budget", "acme")
    assert str(webhook["secret"]).startswith("whsec_")
    webhook_id = str(webhook["webhook_id"])
    client.open("acme").spend(7)
    receiver.next()
    [alert] = run(server, "audit", "watch", "--alerts", "--from-beginning", "--limit", "3")[-1:]
    assert alert["alert"]["amount"] == 7  # type: ignore[index]
    alert_id = str(alert["alert"]["alert_id"])  # type: ignore[index]
    assert run(server, "webhooks", "replay", webhook_id, "--alert", alert_id) == [{"deliveries": 1}]
    assert receiver.next()["headers"]["webhook-id"] == alert_id
    [delivery] = run(server, "webhooks", "deliveries", webhook_id)
    assert (delivery["alert_id"], delivery["state"]) == (alert_id, "pending")
    [listed] = run(server, "webhooks", "list")
    assert (listed["url"], "secret" in listed) == (receiver.url("status/503"), False)
    assert run(server, "webhooks", "delete", webhook_id)[0]["deleted_by"] == "dev"
    new_key = tmp_path / "another"
    command = [sys.executable, "-m", "peculium_server", "webhooks", "new-key", str(new_key)]
    subprocess.run(command, check=True, capture_output=True)
    assert isinstance(WebhookKeys.load(new_key), WebhookKeys)

"""A ledger with one of everything, and a request for each method that it would accept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from psycopg import sql

from peculium.v1 import (
    admin_service_pb2 as admin,
    alerts_pb2,
    audit_service_pb2 as audit,
    ledger_service_pb2 as ledger,
    types_pb2,
)
from peculium_server.webhooks.keys import WebhookKeys
from tests.system.wire import (
    HOLDER,
    Held,
    Told,
    Wire,
    delegated,
    grant_of,
    granted,
    header,
    new_id,
    new_secret,
    reserve_of,
    spend_of,
    token_id,
)

LEDGER = "/peculium.v1.LedgerService/"
ADMIN = "/peculium.v1.AdminService/"
AUDIT = "/peculium.v1.AuditService/"
METHODS = [
    f"/{service.full_name}/{method.name}"
    for file in (ledger, admin, audit)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
KEY_METHODS = {f"{ADMIN}{name}Key" for name in ("Create", "Rotate", "Revoke")} | {
    ADMIN + "ListKeys"
}
"""About who may call, not about budgets: the first key that is made ends the development mode of a server."""
LEVELS_MAX = 16


@dataclass
class World:
    """Budgets and holds in every state that a test can bring about."""

    acme: Held
    """A root held by token, with 1,000,000."""
    acme_before: Held
    """The same with a token that was consumed."""
    spent: ledger.SpendRequest
    """What was recorded of it."""
    child: Held
    """Below acme, with 100 and a live hold of 10."""
    other: Held
    """Another root."""
    service: bytes
    """A root held by `dev`, with 1,000."""
    live: bytes
    live_secret: bytes
    """A hold of the service, and its secret."""
    settled: bytes
    settled_secret: bytes
    """A hold of the service that was settled."""
    owned: Held
    """Below acme; `dev` accepted it."""
    leased: Held
    """Below acme, for an hour; may be renewed for a day."""
    expired: Held
    """Below acme; its lease has ended."""
    revoked: Held
    """Below a closed budget below acme."""
    frozen: Held
    """Below acme, frozen by an admin."""
    overrun: Held
    """A root that was billed beyond what it had."""
    deepest: Held
    """As deep as a tree can be."""
    parent: Held
    """Just above."""
    rule: admin.CreateAlertRuleRequest
    """What acme is watched for."""
    ended_rule: bytes
    webhook: admin.CreateWebhookRequest
    """Where what is found in acme is sent to, which is nobody."""
    ended_webhook: bytes
    prefix: str = ""
    """Of the names of all its roots."""

    def of_service(
        self, proof: types_pb2.Authority | None = None, operation_id: bytes | None = None
    ) -> types_pb2.OperationHeader:
        return header(self.service, self.service, proof or HOLDER, operation_id)

    def of_admin(self) -> types_pb2.OperationHeader:
        return header(self.service, self.service)

    def of_hold(self) -> types_pb2.OperationHeader:
        """The header of what ends the live hold."""
        return self.of_service(types_pb2.Authority(secret=self.live_secret))


def webhook_flags(directory: Path) -> tuple[str, ...]:
    """Of a server that has webhooks, and does nothing about alerts by itself."""
    key = directory / "webhook-key"
    WebhookKeys.make(key)
    return ("--webhook-key-file", str(key), "--webhook-loopback", "--alert-seconds", "0")


def make_world(wire: Wire, prefix: str = "") -> World:
    """Bring everything about, by requests like any other."""
    acme = granted(wire, f"{prefix}acme", 1_000_000)
    acme_before, spent = _spent(wire, acme)
    child = delegated(wire, acme, "child", 100)
    delegated(wire, child, "below", 1)
    _reserve(wire, child, 10)
    owned = delegated(wire, acme, "owned", 100)
    _accept(wire, owned)
    leased = delegated(
        wire,
        acme,
        "leased",
        100,
        lease=Duration(seconds=3600),
        lease_latest=Duration(seconds=86400),
    )
    expired = delegated(wire, acme, "expired", 100, lease=Duration(seconds=1))
    closed = delegated(wire, acme, "closed", 100)
    revoked = delegated(wire, closed, "revoked", 50)
    _revoke(wire, acme, closed)
    frozen = delegated(wire, acme, "frozen", 100)
    wire.admin.Freeze(admin.FreezeRequest(header=header(frozen.root_id, frozen.budget_id)))
    parent = deepest = granted(wire, f"{prefix}deep", 100)
    for level in range(LEVELS_MAX - 1):
        above, deepest = deepest, delegated(wire, deepest, f"level-{level}", 100)
        parent = above
    service = grant_of(f"{prefix}service", 1_000, holder="dev")
    wire.admin.Grant(service)
    service_id = service.header.root_id
    live, live_secret = _hold_of(wire, service_id)
    settled, settled_secret = _hold_of(wire, service_id)
    _settle(wire, service_id, service_id, settled, settled_secret, 60)
    overrun = granted(wire, f"{prefix}overrun", 100)
    hold, hold_secret = _reserve(wire, overrun, 50)
    _settle(wire, overrun.root_id, overrun.budget_id, hold, hold_secret, 10**18)
    _wait_until_expired(wire, expired)
    return World(
        acme=acme,
        acme_before=acme_before,
        spent=spent,
        child=child,
        other=granted(wire, f"{prefix}other", 100),
        service=service_id,
        live=live,
        live_secret=live_secret,
        settled=settled,
        settled_secret=settled_secret,
        owned=owned,
        leased=leased,
        expired=expired,
        revoked=revoked,
        frozen=frozen,
        overrun=overrun,
        deepest=deepest,
        parent=parent,
        rule=_watched(wire, acme),
        ended_rule=_ended(wire, _watched(wire, acme)),
        webhook=_told(wire, acme),
        ended_webhook=_ended_webhook(wire, _told(wire, acme)),
        prefix=prefix,
    )


def _watched(wire: Wire, budget: Held) -> admin.CreateAlertRuleRequest:
    request = admin.CreateAlertRuleRequest(
        rule_id=new_id(),
        budget=types_pb2.BudgetRef(root_id=budget.root_id, budget_id=budget.budget_id),
        kind=alerts_pb2.ALERT_KIND_USED,
        basis_points=8_000,
    )
    wire.admin.CreateAlertRule(request)
    return request


def _ended(wire: Wire, rule: admin.CreateAlertRuleRequest) -> bytes:
    wire.admin.DeleteAlertRule(admin.DeleteAlertRuleRequest(rule_id=rule.rule_id))
    return rule.rule_id


def _told(wire: Wire, budget: Held) -> admin.CreateWebhookRequest:
    request = admin.CreateWebhookRequest(
        webhook_id=new_id(),
        url="http://127.0.0.1:9/nobody",
        budget=types_pb2.BudgetRef(root_id=budget.root_id, budget_id=budget.budget_id),
    )
    wire.admin.CreateWebhook(request)
    return request


def _ended_webhook(wire: Wire, webhook: admin.CreateWebhookRequest) -> bytes:
    wire.admin.DeleteWebhook(admin.DeleteWebhookRequest(webhook_id=webhook.webhook_id))
    return webhook.webhook_id


def _spent(wire: Wire, budget: Held) -> tuple[Held, ledger.SpendRequest]:
    before = Held(budget.root_id, budget.budget_id, budget.secret)
    following = new_secret()
    request = spend_of(budget, 1)
    request.next_token_id = token_id(following)
    wire.ledger.Spend(request)
    budget.secret = following
    return before, request


def _reserve(wire: Wire, budget: Held, amount: int) -> tuple[bytes, bytes]:
    following, secret = new_secret(), new_secret()
    request = reserve_of(budget, amount)
    request.next_token_id, request.hold_token_id = token_id(following), token_id(secret)
    wire.ledger.Reserve(request)
    budget.secret = following
    return request.hold_id, secret


def _hold_of(wire: Wire, root_id: bytes) -> tuple[bytes, bytes]:
    """A new hold of a root that is held by its principal."""
    hold_id, secret = new_id(), new_secret()
    wire.ledger.Reserve(
        ledger.ReserveRequest(
            header=header(root_id, root_id, HOLDER),
            amount=100,
            hold_id=hold_id,
            hold_token_id=token_id(secret),
        )
    )
    return hold_id, secret


def _settle(
    wire: Wire, root_id: bytes, budget_id: bytes, hold_id: bytes, secret: bytes, actual: int
) -> None:
    proof = types_pb2.Authority(secret=secret)
    wire.ledger.Settle(
        ledger.SettleRequest(
            header=header(root_id, budget_id, proof), hold_id=hold_id, actual=actual
        )
    )


def _accept(wire: Wire, budget: Held) -> None:
    following = new_secret()
    wire.ledger.Accept(
        ledger.AcceptRequest(header=budget.header(), next_token_id=token_id(following))
    )
    budget.secret = following


def _revoke(wire: Wire, budget: Held, below: Held) -> None:
    following = new_secret()
    wire.ledger.Revoke(
        ledger.RevokeRequest(
            header=budget.header(),
            next_token_id=token_id(following),
            descendant_id=below.budget_id,
        )
    )
    budget.secret = following


def _wait_until_expired(wire: Wire, budget: Held) -> None:
    """Ask until the database's clock is past the lease; each question records nothing."""
    request = spend_of(budget, 1)
    request.header.dry_run = True
    for _ in itertools.count():
        answer = wire.send(LEDGER + "Spend", request)
        if isinstance(answer, Told):
            # Where the server sweeps, that may have come first.
            assert answer.reason in {"BUDGET_EXPIRED", "BUDGET_CLOSED"}
            return


def accepted_requests(world: World) -> dict[str, Message]:
    """For each method about budgets a request that says all it can, and would be accepted; operations run dry."""
    requests = dict(_by_agents(world)) | dict(_by_admins(world)) | dict(_by_auditors(world))
    for request in requests.values():
        if "header" in request.DESCRIPTOR.fields_by_name:
            operation_header: types_pb2.OperationHeader = getattr(request, "header")  # noqa: B009 - not every message has one
            operation_header.dry_run = True
            operation_header.labels["run"] = "7"
            operation_header.traceparent = f"00-{'1' * 32}-{'2' * 16}-01"
    return requests


def _usage() -> types_pb2.Usage:
    return types_pb2.Usage(
        provider="openai", model="small", input_tokens=1, output_tokens=2, cached_tokens=1
    )


def _by_agents(world: World) -> Iterator[tuple[str, Message]]:
    acme = world.acme
    following = token_id(new_secret())
    reserve = reserve_of(acme, 10)
    reserve.ttl.seconds = 60
    yield LEDGER + "Reserve", reserve
    yield (
        LEDGER + "Settle",
        ledger.SettleRequest(
            header=world.of_hold(),
            hold_id=world.live,
            actual=5,
            keep_open=True,
            next_hold_token_id=following,
            reference="req-1",
            usage=_usage(),
        ),
    )
    yield LEDGER + "Release", ledger.ReleaseRequest(header=world.of_hold(), hold_id=world.live)
    yield (
        LEDGER + "Extend",
        ledger.ExtendRequest(
            header=world.of_hold(),
            hold_id=world.live,
            ttl=Duration(seconds=60),
            next_hold_token_id=following,
        ),
    )
    spend = spend_of(acme, 10)
    spend.reference = "req-2"
    spend.usage.CopyFrom(_usage())
    yield LEDGER + "Spend", spend
    yield (
        LEDGER + "Delegate",
        ledger.DelegateRequest(
            header=acme.header(), next_token_id=following, children=[child_spec("new", 10)]
        ),
    )
    yield (
        LEDGER + "Accept",
        ledger.AcceptRequest(header=acme.header(), next_token_id=following),
    )
    yield (
        LEDGER + "Recover",
        ledger.RecoverRequest(
            header=header(world.owned.root_id, world.owned.budget_id, HOLDER),
            next_token_id=following,
        ),
    )
    yield (
        LEDGER + "Fund",
        ledger.FundRequest(
            header=acme.header(),
            next_token_id=following,
            descendant_id=world.leased.budget_id,
            amount=10,
            lease=Duration(seconds=60),
        ),
    )
    yield (
        LEDGER + "Renew",
        ledger.RenewRequest(
            header=world.leased.header(), next_token_id=following, lease=Duration(seconds=60)
        ),
    )
    yield (
        LEDGER + "Return",
        ledger.ReturnRequest(header=world.child.header(), next_token_id=following, amount=10),
    )
    yield (
        LEDGER + "Revoke",
        ledger.RevokeRequest(
            header=acme.header(), next_token_id=following, descendant_id=world.child.budget_id
        ),
    )
    yield (
        LEDGER + "Resolve",
        ledger.ResolveRequest(
            header=world.of_service(), hold_id=world.live, actual=5, reason="it crashed"
        ),
    )
    dry = spend_of(acme, 10)
    dry.header.dry_run = True
    yield LEDGER + "Batch", ledger.BatchRequest(operations=[ledger.Operation(spend=dry)])
    named = types_pb2.BudgetRef(root_id=acme.root_id, budget_id=acme.budget_id)
    yield (
        LEDGER + "GetBudget",
        ledger.LedgerServiceGetBudgetRequest(budget=named, authority=acme.proof),
    )
    yield (
        LEDGER + "ListHolds",
        ledger.ListHoldsRequest(budget=named, authority=acme.proof, page_size=10),
    )


def child_spec(name: str, amount: int) -> types_pb2.ChildSpec:
    """A child that says all it can."""
    return types_pb2.ChildSpec(
        budget_id=new_id(),
        name=name,
        amount=amount,
        token_id=token_id(new_secret()),
        holder="svc",
        lease=Duration(seconds=60),
        lease_latest=Duration(seconds=120),
        labels={"team": "research"},
        overrun_factor=2,
    )


def _by_admins(world: World) -> Iterator[tuple[str, Message]]:
    acme = header(world.acme.root_id, world.acme.budget_id)
    yield ADMIN + "Grant", grant_of("new", 10, secret=new_secret(), holder="svc")
    yield ADMIN + "TopUp", admin.TopUpRequest(header=acme, amount=10)
    yield ADMIN + "Withdraw", admin.WithdrawRequest(header=acme, amount=10)
    yield ADMIN + "Freeze", admin.FreezeRequest(header=acme, reason="why")
    yield ADMIN + "Unfreeze", admin.UnfreezeRequest(header=acme, reason="why")
    yield (
        ADMIN + "Recover",
        admin.AdminServiceRecoverRequest(
            header=world.of_admin(),
            next_token_id=token_id(new_secret()),
            holder="svc",
            holds=[
                types_pb2.HoldRotation(hold_id=world.live, next_token_id=token_id(new_secret()))
            ],
        ),
    )
    yield (
        ADMIN + "Resolve",
        admin.AdminServiceResolveRequest(
            header=world.of_admin(), hold_id=world.settled, actual=5, reason="the bill"
        ),
    )
    # These cannot run dry: what they ask for is so by now.
    yield ADMIN + "CreateAlertRule", world.rule
    yield (
        ADMIN + "ListAlertRules",
        admin.ListAlertRulesRequest(budget=world.rule.budget, page_size=10),
    )
    yield ADMIN + "DeleteAlertRule", admin.DeleteAlertRuleRequest(rule_id=world.ended_rule)
    yield ADMIN + "CreateWebhook", world.webhook
    yield ADMIN + "ListWebhooks", admin.ListWebhooksRequest()
    yield ADMIN + "DeleteWebhook", admin.DeleteWebhookRequest(webhook_id=world.ended_webhook)
    webhook_id = world.webhook.webhook_id
    yield ADMIN + "TestWebhook", admin.TestWebhookRequest(webhook_id=webhook_id)
    yield (
        ADMIN + "ListDeliveries",
        admin.ListDeliveriesRequest(
            webhook_id=webhook_id, states=[alerts_pb2.DELIVERY_STATE_DEAD], page_size=10
        ),
    )
    yield ADMIN + "ReplayDeliveries", admin.ReplayDeliveriesRequest(webhook_id=webhook_id)


def _by_auditors(world: World) -> Iterator[tuple[str, Message]]:
    acme = types_pb2.BudgetRef(root_id=world.acme.root_id, budget_id=world.acme.budget_id)
    by_path = types_pb2.BudgetRef(path=f"{world.prefix}acme/child")
    yield AUDIT + "GetBudget", audit.GetBudgetRequest(budget=by_path)
    yield AUDIT + "ListBudgets", audit.ListBudgetsRequest(below=acme, page_size=10)
    yield (
        AUDIT + "ListEntries",
        audit.ListEntriesRequest(budget=acme, page_size=10, reach=audit.REACH_TREE),
    )
    yield AUDIT + "GetStatement", audit.GetStatementRequest(budget=acme, reach=audit.REACH_TREE)
    by_day = audit.UsageGrouping(by=audit.UsageGrouping.BY_DAY)
    yield AUDIT + "GetUsage", audit.GetUsageRequest(budget=by_path, group_by=[by_day])
    yield AUDIT + "GetLineage", audit.GetLineageRequest(budget=by_path, page_size=10)
    yield AUDIT + "WatchEntries", audit.WatchEntriesRequest(budget=acme, reach=audit.REACH_SUBTREE)
    yield AUDIT + "Verify", audit.VerifyRequest(tree=acme)
    yield AUDIT + "Export", audit.ExportRequest(tree=acme)
    yield AUDIT + "ListCheckpoints", audit.ListCheckpointsRequest(page_size=10)
    yield AUDIT + "ListRefusals", audit.ListRefusalsRequest(budget=acme, page_size=10)
    yield (
        AUDIT + "ListSecurityEvents",
        audit.ListSecurityEventsRequest(budget=acme, page_size=10),
    )
    yield AUDIT + "ProveEntry", audit.ProveEntryRequest(budget=acme, seq=1)
    yield AUDIT + "ListAlerts", audit.ListAlertsRequest(budget=acme, page_size=10)


_TABLES = sql.SQL(
    "SELECT format('%I.%I', nspname, relname) FROM pg_class JOIN pg_namespace"
    " ON pg_namespace.oid = relnamespace WHERE relkind IN ('r', 'p') AND NOT relispartition"
    " AND nspname NOT IN ('pg_catalog', 'information_schema') AND relname <> 'refusals' ORDER BY 1"
)


def dump(connection: psycopg.Connection) -> dict[str, list[str]]:
    """Every row of every table, as text; but not what counts refusals, which is written now and then."""
    with connection.transaction():
        tables = [name for (name,) in connection.execute(_TABLES)]
        assert tables
        return {
            table: [
                row
                for (row,) in connection.execute(
                    sql.SQL("SELECT each::text FROM {} AS each ORDER BY 1").format(sql.SQL(table))
                )
            ]
            for table in tables
        }

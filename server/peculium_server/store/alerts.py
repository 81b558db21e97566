"""The statements about alerts: rules, what is new for them, what they have found, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Executable,
    SmallInteger,
    Text,
    and_,
    any_,
    bindparam,
    delete,
    func,
    literal_column,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP

from peculium_server.core.alerts import (
    Alert,
    AlertKind,
    DeliveryState,
    Numbered,
    Rule,
    Webhook,
)
from peculium_server.core.operations import Kind
from peculium_server.core.state import HoldState
from peculium_server.store import rows
from peculium_server.store.clauses import (
    AFTER,
    BUDGET,
    ID,
    LANE,
    LIMIT,
    ROOT,
    UNTIL,
    columns,
    first,
    in_positions,
)
from peculium_server.store.schema import (
    alert_progress,
    alert_rules,
    alerts,
    entries,
    webhook_deliveries,
    webhooks,
)
from peculium_server.store.statements import CLOCK, compiled, inserted, unnested
from peculium_server.store.wire import Statement

_TIME: Final = TIMESTAMP(timezone=True)
_ROOTS = bindparam("root_ids", type_=ARRAY(ID))
_RULE = bindparam("rule_id", type_=ID)
_WEBHOOK = bindparam("webhook_id", type_=ID)
_NUMBERS = bindparam("numbers", type_=ARRAY(BigInteger))
_BY = bindparam("by", type_=Text())
_NOW = bindparam("now", type_=_TIME)
_ZERO, _ONE = (literal_column(number, BigInteger) for number in "01")
_NOTHING = literal_column("''", Text)


class Progress(NamedTuple):
    """How far alerts have come. Two that are equal are of one moment: nothing has changed between."""

    positions: tuple[int, ...]
    """By lane: up to this position everything was looked at."""
    alerts: int
    """How many alerts were recorded: the number of the last one."""
    changes: int
    """How often rules and webhooks were made and deleted."""
    looked_at: int
    """When somebody has looked for the last time."""
    more: bool
    """That time there was more than it could look at."""


class Delivery(NamedTuple):
    """An alert for a webhook, and what became of it."""

    webhook_id: bytes
    number: int
    """The alert's."""
    state: DeliveryState
    attempts: int
    """Since it was made, or replayed."""
    next_at: int
    """When it is tried next; a server that tries it has until then."""
    last_at: int | None
    """When it was tried last."""
    last_status: int
    """The HTTP status of the last answer; 0 if there was none."""
    last_problem: str
    """What went wrong the last time; empty if nothing did."""


# -- Rows ---------------------------------------------------------------------------------------------

RULE_COLUMNS: Final = Rule._fields
RULE_CHANGES: Final = ("armed", "due", "crossings")
ALERT_COLUMNS: Final = ("number", "recorded_at", *Alert._fields)
WEBHOOK_COLUMNS: Final = Webhook._fields
DELIVERY_COLUMNS: Final = Delivery._fields

_ALERT_KIND: Final = {int(kind): kind for kind in AlertKind}
_STATE: Final = {int(state): state for state in DeliveryState}


def _to_progress(row: Sequence[Any]) -> Progress:
    return Progress(tuple(row[0]), *row[1:])


def _to_rule(row: Sequence[Any]) -> Rule:
    rule = Rule._make(row)
    return rule._replace(line=tuple(rule.line), kind=_ALERT_KIND[rule.kind])


def _to_numbered(row: Sequence[Any]) -> Numbered:
    alert = Alert._make(row[2:])
    alert = alert._replace(line=tuple(alert.line), kind=_ALERT_KIND[alert.kind])
    return Numbered(row[0], row[1], alert)


def _to_delivery(row: Sequence[Any]) -> Delivery:
    return Delivery._make((*row[:2], _STATE[row[2]], *row[3:]))


def _to_listed(row: Sequence[Any]) -> tuple[Delivery, bytes]:
    return _to_delivery(row[:-1]), row[-1]


def _line_text(line: Sequence[bytes]) -> str:
    """Ids as a text, as which arrays travel within arrays."""
    return "{" + ",".join(each.hex() for each in line) + "}"


def _by_column(names: Sequence[str], of: Sequence[Sequence[Any]]) -> dict[str, Any]:
    return dict(zip(names, zip(*of, strict=True), strict=True)) if of else dict.fromkeys(names, ())


def rule_values(rule: Rule) -> dict[str, Any]:
    """What `add_rule` takes."""
    return _by_column(RULE_COLUMNS, [rule._replace(line=_line_text(rule.line))])  # type: ignore[arg-type]


def rule_changes(changed: Sequence[Rule]) -> dict[str, Any]:
    """What `save_rules` takes."""
    names = ("rule_id", *RULE_CHANGES)
    return _by_column(names, [[getattr(rule, name) for name in names] for rule in changed])


def alert_values(numbered: Sequence[Numbered]) -> dict[str, Any]:
    """What `add_alerts` takes."""
    return _by_column(
        ALERT_COLUMNS,
        [(*each[:2], *each.alert._replace(line=_line_text(each.alert.line))) for each in numbered],  # type: ignore[arg-type]
    )


def webhook_values(webhook: Webhook) -> dict[str, Any]:
    """What `add_webhook` takes."""
    return _by_column(WEBHOOK_COLUMNS, [webhook])


def delivery_values(deliveries: Sequence[Delivery]) -> dict[str, Any]:
    """What `add_deliveries` takes."""
    return _by_column(DELIVERY_COLUMNS, deliveries)


# -- How far it is, and what is new -------------------------------------------------------------------


def _progress() -> Executable:
    return select(*columns(alert_progress, Progress._fields)).where(alert_progress.c.singleton)


def _save_progress() -> Executable:
    return (
        update(alert_progress)
        .where(alert_progress.c.singleton)
        .values(
            positions=bindparam("positions", type_=ARRAY(BigInteger)),
            alerts=bindparam("alerts", type_=BigInteger),
            changes=bindparam("changes", type_=BigInteger),
            looked_at=bindparam("looked_at", type_=_TIME),
            more=bindparam("more", type_=Boolean()),
        )
    )


_NEW = (entries.c.lane == LANE, *in_positions(), entries.c.root_id == any_(_ROOTS))


def _moved() -> Executable:
    """Of some trees of a lane those that have entries between two positions."""
    return select(entries.c.root_id).distinct().where(*_NEW)


_DISPUTED: Final = f"'02{int(HoldState.DISPUTED):02x}'"
"""In the encoding a hold's state follows its key, 2. Other bytes may look like that."""


def _events() -> Executable:
    """Entries of some trees that may tell of an event, and all that do."""
    kinds: list[ColumnElement[int]] = [
        literal_column(str(int(kind))) for kind in (Kind.SETTLE, Kind.RESOLVE)
    ]
    encoded = func.encode(entries.c.effect, literal_column("'hex'"))
    return (
        select(*columns(entries, rows.ENTRY_COLUMNS))
        .where(
            *_NEW,
            or_(
                entries.c.kind == literal_column(str(int(Kind.FREEZE))),
                and_(entries.c.budget_id == entries.c.root_id, entries.c.overrun.is_not(None)),
                and_(
                    entries.c.kind.in_(kinds),
                    func.strpos(encoded, literal_column(_DISPUTED)) > _ZERO,
                ),
            ),
        )
        .order_by(entries.c.position, entries.c.part)
        .limit(LIMIT)
    )


# -- Rules --------------------------------------------------------------------------------------------

_LIVE_RULE = alert_rules.c.deleted_at.is_(None)


def _rules(*which: ColumnElement[bool]) -> Executable:
    """Rules that were not deleted, by id."""
    return (
        select(*columns(alert_rules, RULE_COLUMNS))
        .where(_LIVE_RULE, *which)
        .order_by(alert_rules.c.rule_id)
    )


def _list_rules(*which: ColumnElement[bool]) -> Executable:
    behind = alert_rules.c.rule_id > bindparam("after", type_=ID)
    listed: Any = _rules(*which, behind)
    executable: Executable = listed.limit(LIMIT)
    return executable


def _rule() -> Executable:
    """A rule, deleted or not."""
    return select(*columns(alert_rules, RULE_COLUMNS)).where(alert_rules.c.rule_id == _RULE)


def _count_rules() -> Executable:
    """How many there are in a tree, and in all trees."""
    in_tree = and_(alert_rules.c.lane == LANE, alert_rules.c.root_id == ROOT)
    return select(func.count().filter(in_tree), func.count()).where(_LIVE_RULE)


def _end_rule() -> Executable:
    return (
        update(alert_rules)
        .where(alert_rules.c.rule_id == _RULE, _LIVE_RULE)
        .values(deleted_at=CLOCK, deleted_by=_BY)
    )


def _save_rules() -> Executable:
    keys = unnested(rule_id=ID, armed=Boolean(), due=Boolean(), crossings=BigInteger())
    return (
        update(alert_rules)
        .where(alert_rules.c.rule_id == keys.c.rule_id)
        .values({name: keys.c[name] for name in RULE_CHANGES})
    )


# -- Alerts -------------------------------------------------------------------------------------------


def _alerts(*which: ColumnElement[bool], descending: bool = False) -> Executable:
    number = alerts.c.number
    behind = number < AFTER if descending else number > AFTER
    return (
        select(*columns(alerts, ALERT_COLUMNS))
        .where(behind, *which)
        .order_by(number.desc() if descending else number)
        .limit(LIMIT)
    )


_OF_TREE = alerts.c.root_id == ROOT
_OF_SUBTREE = and_(_OF_TREE, any_(alerts.c.line) == BUDGET)
_OF_BUDGET = and_(_OF_TREE, alerts.c.budget_id == BUDGET)
REACHES: Final[dict[str, tuple[ColumnElement[bool], ...]]] = {
    "ledger": (),
    "tree": (_OF_TREE,),
    "subtree": (_OF_SUBTREE,),
    "budget": (_OF_BUDGET,),
}
"""Whose alerts: of rules on these budgets."""


def _numbered() -> Executable:
    """Some alerts by their numbers."""
    return (
        select(*columns(alerts, ALERT_COLUMNS))
        .where(alerts.c.number == any_(_NUMBERS))
        .order_by(alerts.c.number)
    )


def _oldest_kept() -> Executable:
    """The number up to which the first alerts are older than a time; NULL if none is."""
    some = (
        select(alerts.c.number, alerts.c.recorded_at)
        .order_by(alerts.c.number)
        .limit(LIMIT)
        .subquery("some")
    )
    return select(func.max(some.c.number)).where(some.c.recorded_at < _NOW)


# -- Webhooks and deliveries --------------------------------------------------------------------------

_DELIVERY = webhook_deliveries.c
_PENDING = _DELIVERY.state == literal_column(str(int(DeliveryState.PENDING)))
_DEAD = _DELIVERY.state == literal_column(str(int(DeliveryState.DEAD)))


def _webhooks(*which: ColumnElement[bool]) -> Executable:
    return select(*columns(webhooks, WEBHOOK_COLUMNS)).where(*which).order_by(webhooks.c.webhook_id)


def _end_webhook() -> Executable:
    return (
        update(webhooks)
        .where(webhooks.c.webhook_id == _WEBHOOK, webhooks.c.deleted_at.is_(None))
        .values(deleted_at=CLOCK, deleted_by=_BY)
    )


def _kill_deliveries() -> Executable:
    """Try what is pending for a webhook no more."""
    return (
        update(webhook_deliveries)
        .where(_DELIVERY.webhook_id == _WEBHOOK, _PENDING)
        .values(
            state=literal_column(str(int(DeliveryState.DEAD))),
            last_problem=bindparam("problem", type_=Text()),
        )
    )


def _due_webhooks() -> Executable:
    """Webhooks for which something is to be tried."""
    return select(_DELIVERY.webhook_id).distinct().where(_PENDING, _DELIVERY.next_at <= _NOW)


def _claim() -> Executable:
    """Take some of what is to be tried for a webhook, for so long; nobody else takes it meanwhile.

    Of two who claim at once the second finds another time to try next than it has looked for.
    """
    other = webhook_deliveries.alias("other")
    due = (
        select(other.c.number)
        .where(
            other.c.webhook_id == _WEBHOOK,
            other.c.state == literal_column(str(int(DeliveryState.PENDING))),
            other.c.next_at <= _NOW,
        )
        .order_by(other.c.next_at, other.c.number)
        .limit(LIMIT)
    )
    return (
        update(webhook_deliveries)
        .where(
            _DELIVERY.webhook_id == _WEBHOOK,
            _DELIVERY.number.in_(due),
            _PENDING,
            _DELIVERY.next_at <= _NOW,
        )
        .values(
            attempts=_DELIVERY.attempts + _ONE,
            next_at=bindparam("until", type_=_TIME),
        )
        .returning(*columns(webhook_deliveries, DELIVERY_COLUMNS))
    )


def _finish() -> Executable:
    """Say what became of a delivery, unless somebody else has tried it since it was claimed."""
    return (
        update(webhook_deliveries)
        .where(
            _DELIVERY.webhook_id == _WEBHOOK,
            _DELIVERY.number == bindparam("number", type_=BigInteger),
            _DELIVERY.attempts == bindparam("attempts", type_=SmallInteger),
            _PENDING,
        )
        .values(
            state=bindparam("state", type_=SmallInteger),
            next_at=bindparam("next_at", type_=_TIME),
            last_at=CLOCK,
            last_status=bindparam("status", type_=SmallInteger),
            last_problem=bindparam("problem", type_=Text()),
        )
    )


def _list_deliveries() -> Executable:
    """Deliveries with their alerts' ids, the latest first, by number and webhook; of some webhooks only."""
    some = bindparam("webhook_ids", type_=ARRAY(ID))
    states = bindparam("states", type_=ARRAY(SmallInteger))
    return (
        select(*columns(webhook_deliveries, DELIVERY_COLUMNS), alerts.c.alert_id)
        .select_from(
            webhook_deliveries.join(alerts, alerts.c.number == webhook_deliveries.c.number)
        )
        .where(
            or_(func.cardinality(some) == _ZERO, _DELIVERY.webhook_id == any_(some)),
            or_(func.cardinality(states) == _ZERO, _DELIVERY.state == any_(states)),
            or_(
                _DELIVERY.number < AFTER,
                and_(_DELIVERY.number == AFTER, _DELIVERY.webhook_id > _WEBHOOK),
            ),
        )
        .order_by(_DELIVERY.number.desc(), _DELIVERY.webhook_id)
        .limit(LIMIT)
    )


def _delivered_alerts() -> Executable:
    """Of some alerts the numbers of those that a webhook is, or was, to be told."""
    return (
        select(alerts.c.alert_id, alerts.c.number)
        .select_from(
            alerts.join(
                webhook_deliveries,
                and_(_DELIVERY.webhook_id == _WEBHOOK, _DELIVERY.number == alerts.c.number),
            )
        )
        .where(alerts.c.alert_id == any_(bindparam("alert_ids", type_=ARRAY(ID))))
    )


def _replay(*which: ColumnElement[bool]) -> Executable:
    return (
        update(webhook_deliveries)
        .where(_DELIVERY.webhook_id == _WEBHOOK, *which)
        .values(
            state=literal_column(str(int(DeliveryState.PENDING))),
            attempts=_ZERO,
            next_at=CLOCK,
        )
        .returning(_DELIVERY.number)
    )


# -- What is old --------------------------------------------------------------------------------------


def _forget_up_to(table: Any) -> Executable:
    return delete(table).where(table.c.number <= UNTIL)


def _forget_deleted(table: Any) -> Executable:
    return delete(table).where(table.c.deleted_at < _NOW)


RECIPES: dict[str, tuple[Executable, Callable[[Sequence[Any]], Any]]] = {
    "alert_clock": (select(CLOCK), first),
    "progress": (_progress(), _to_progress),
    "save_progress": (_save_progress(), tuple),
    "moved": (_moved(), first),
    "events": (_events(), rows.to_entry),
    "rules": (_rules(true()), _to_rule),
    "rules_of_subtree": (
        _list_rules(alert_rules.c.root_id == ROOT, any_(alert_rules.c.line) == BUDGET),
        _to_rule,
    ),
    "list_rules": (_list_rules(), _to_rule),
    "rule": (_rule(), _to_rule),
    "count_rules": (_count_rules(), tuple),
    "add_rule": (inserted(alert_rules, RULE_COLUMNS), tuple),
    "end_rule": (_end_rule(), tuple),
    "save_rules": (_save_rules(), tuple),
    "add_alerts": (inserted(alerts, ALERT_COLUMNS), tuple),
    **{
        f"alerts_of_{name}{suffix}": (_alerts(*which, descending=descending), _to_numbered)
        for name, which in REACHES.items()
        for suffix, descending in (("", False), ("_descending", True))
    },
    "numbered_alerts": (_numbered(), _to_numbered),
    "oldest_kept": (_oldest_kept(), first),
    "live_webhooks": (_webhooks(webhooks.c.deleted_at.is_(None)), Webhook._make),
    "webhook": (_webhooks(webhooks.c.webhook_id == _WEBHOOK), Webhook._make),
    "add_webhook": (inserted(webhooks, WEBHOOK_COLUMNS), tuple),
    "end_webhook": (_end_webhook(), tuple),
    "kill_deliveries": (_kill_deliveries(), tuple),
    "add_deliveries": (inserted(webhook_deliveries, DELIVERY_COLUMNS), tuple),
    "due_webhooks": (_due_webhooks(), first),
    "claim": (_claim(), _to_delivery),
    "finish_delivery": (_finish(), tuple),
    "delivered_alerts": (_delivered_alerts(), tuple),
    "list_deliveries": (_list_deliveries(), _to_listed),
    "replay_some": (_replay(_DELIVERY.number == any_(_NUMBERS)), first),
    "replay_dead": (_replay(_DEAD), first),
    "forget_alerts": (_forget_up_to(alerts), tuple),
    "forget_deliveries": (_forget_up_to(webhook_deliveries), tuple),
    "forget_rules": (_forget_deleted(alert_rules), tuple),
    "forget_webhooks": (_forget_deleted(webhooks), tuple),
}

STATEMENTS: dict[str, Statement] = {
    name: compiled(name, executable, row) for name, (executable, row) in RECIPES.items()
}

"""Which roles may call what, and how a call names trees: one table, with a row for every method."""

from __future__ import annotations

from enum import Enum, auto
from typing import Final, NamedTuple

from peculium.v1 import admin_service_pb2, audit_service_pb2, ledger_service_pb2
from peculium_server.core.operations import Role


class Names(Enum):
    """How a method names trees: by that it is known where a caller is held to its own.

    `scope` decides, and is asked in one place for each of these.
    """

    OPERATION = auto()
    """By the header of its operation. `Operator`."""
    OPERATIONS = auto()
    """By the headers of its operations: each is refused on its own. `Operator`."""
    BUDGET = auto()
    """By a budget. `Reader`."""
    BUDGET_OR_ROOTS = auto()
    """By a budget; without one it lists roots, of which callers see their own. `Reader`, `Listing`."""
    BUDGET_OR_ALL = auto()
    """By a budget; without one it tells of all trees. `Reader`."""
    RULE = auto()
    """By an alert rule, which is of one tree. `Alerts`."""
    ALL = auto()
    """It concerns all trees, or one that there is not yet. `IdentityInterceptor`."""
    NONE = auto()
    """It tells of no tree."""


class Row(NamedTuple):
    """What is said of a method."""

    roles: tuple[Role, ...]
    """Who may call it."""
    names: Names


def _rows(roles: tuple[Role, ...], names: Names, *methods: str) -> dict[str, Row]:
    return dict.fromkeys(methods, Row(roles, names))


_OPERATE: Final = (Role.AGENT, Role.ADMIN)
_ADMINISTER: Final = (Role.ADMIN,)
_AUDIT: Final = (Role.AUDITOR, Role.ADMIN)

_BY_SERVICE: Final[dict[str, dict[str, Row]]] = {
    ledger_service_pb2.DESCRIPTOR.services_by_name["LedgerService"].full_name: {
        **_rows(_OPERATE, Names.OPERATION, "Reserve", "Settle", "Release", "Extend", "Spend"),
        **_rows(_OPERATE, Names.OPERATION, "Delegate", "Accept", "Recover", "Fund", "Renew"),
        **_rows(_OPERATE, Names.OPERATION, "Return", "Revoke", "Resolve"),
        **_rows(_OPERATE, Names.OPERATIONS, "Batch"),
        **_rows(_OPERATE, Names.BUDGET, "GetBudget", "ListHolds"),
    },
    admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name: {
        **_rows(_ADMINISTER, Names.ALL, "Grant"),
        **_rows(_ADMINISTER, Names.OPERATION, "TopUp", "Withdraw", "Freeze", "Unfreeze"),
        **_rows(_ADMINISTER, Names.OPERATION, "Recover", "Resolve"),
        **_rows(_ADMINISTER, Names.ALL, "CreateKey", "RotateKey", "RevokeKey"),
        **_rows(_AUDIT, Names.ALL, "ListKeys"),
        **_rows(_ADMINISTER, Names.BUDGET, "CreateAlertRule"),
        **_rows(_ADMINISTER, Names.BUDGET_OR_ALL, "ListAlertRules"),
        **_rows(_ADMINISTER, Names.RULE, "DeleteAlertRule"),
        **_rows(_ADMINISTER, Names.ALL, "CreateWebhook", "ListWebhooks", "DeleteWebhook"),
        **_rows(_ADMINISTER, Names.ALL, "TestWebhook", "ListDeliveries", "ReplayDeliveries"),
    },
    audit_service_pb2.DESCRIPTOR.services_by_name["AuditService"].full_name: {
        **_rows(_AUDIT, Names.BUDGET, "GetBudget", "ListEntries", "GetStatement", "GetUsage"),
        **_rows(_AUDIT, Names.BUDGET, "GetLineage", "ProveEntry"),
        **_rows(_AUDIT, Names.BUDGET_OR_ROOTS, "ListBudgets"),
        **_rows(_AUDIT, Names.BUDGET_OR_ALL, "WatchEntries", "Verify", "Export", "ListRefusals"),
        **_rows(_AUDIT, Names.BUDGET_OR_ALL, "ListAlerts", "ListSecurityEvents"),
        **_rows(_AUDIT, Names.NONE, "ListCheckpoints"),
    },
}

ROWS: Final[dict[str, Row]] = {
    f"/{service}/{method}": row
    for service, methods in _BY_SERVICE.items()
    for method, row in methods.items()
}
"""By the method's full name."""

PERMISSIONS: Final[dict[str, tuple[Role, ...]]] = {
    method: row.roles for method, row in ROWS.items()
}
"""By the method's full name. Who has several of the roles acts in the first one."""

SERVICES: Final = tuple(_BY_SERVICE)
"""Full names of the ledger's services."""

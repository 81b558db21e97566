"""Which roles may call what: one table, in which every method of every service has a row."""

from __future__ import annotations

from typing import Final

from peculium.v1 import admin_service_pb2, audit_service_pb2, ledger_service_pb2
from peculium_server.core.operations import Role

_OPERATE: Final = (Role.AGENT, Role.ADMIN)
_ADMINISTER: Final = (Role.ADMIN,)
_AUDIT: Final = (Role.AUDITOR, Role.ADMIN)

_BY_SERVICE: Final[dict[str, dict[str, tuple[Role, ...]]]] = {
    ledger_service_pb2.DESCRIPTOR.services_by_name["LedgerService"].full_name: {
        "Reserve": _OPERATE,
        "Settle": _OPERATE,
        "Release": _OPERATE,
        "Extend": _OPERATE,
        "Spend": _OPERATE,
        "Delegate": _OPERATE,
        "Accept": _OPERATE,
        "Recover": _OPERATE,
        "Fund": _OPERATE,
        "Renew": _OPERATE,
        "Return": _OPERATE,
        "Revoke": _OPERATE,
        "Resolve": _OPERATE,
        "Batch": _OPERATE,
        "GetBudget": _OPERATE,
        "ListHolds": _OPERATE,
    },
    admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name: {
        "Grant": _ADMINISTER,
        "TopUp": _ADMINISTER,
        "Withdraw": _ADMINISTER,
        "Freeze": _ADMINISTER,
        "Unfreeze": _ADMINISTER,
        "Recover": _ADMINISTER,
        "Resolve": _ADMINISTER,
    },
    audit_service_pb2.DESCRIPTOR.services_by_name["AuditService"].full_name: {
        "GetBudget": _AUDIT,
        "ListBudgets": _AUDIT,
        "ListEntries": _AUDIT,
        "GetStatement": _AUDIT,
        "GetUsage": _AUDIT,
        "GetLineage": _AUDIT,
        "WatchEntries": _AUDIT,
        "Verify": _AUDIT,
        "ListCheckpoints": _AUDIT,
        "ProveEntry": _AUDIT,
        "Export": _AUDIT,
    },
}

PERMISSIONS: Final[dict[str, tuple[Role, ...]]] = {
    f"/{service}/{method}": roles
    for service, methods in _BY_SERVICE.items()
    for method, roles in methods.items()
}
"""By the method's full name. Who has several of the roles acts in the first one."""

SERVICES: Final = tuple(_BY_SERVICE)
"""Full names of the ledger's services."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor import FileDescriptor

from peculium.v1 import admin_service_pb2, audit_service_pb2, ledger_service_pb2
from peculium_server.core.operations import Role
from peculium_server.rpc.permissions import PERMISSIONS

ROLES = {
    "LedgerService": {Role.AGENT, Role.ADMIN},
    "AdminService": {Role.ADMIN},
    "AuditService": {Role.AUDITOR, Role.ADMIN},
}
FOR_OTHERS_TOO = {"/peculium.v1.AdminService/ListKeys": {Role.AUDITOR}}
FILES: list[FileDescriptor] = [
    ledger_service_pb2.DESCRIPTOR,
    admin_service_pb2.DESCRIPTOR,
    audit_service_pb2.DESCRIPTOR,
]
METHODS = {
    f"/{service.full_name}/{method.name}": service.name
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
}


def test_every_method_has_a_row_and_no_row_is_without_a_method() -> None:
    assert set(PERMISSIONS) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("role", Role)
def test_a_role_may_call_the_services_that_are_made_for_it(method: str, role: Role) -> None:
    allowed = ROLES[METHODS[method]] | FOR_OTHERS_TOO.get(method, set())
    assert (role in PERMISSIONS[method]) is (role in allowed)


def test_nobody_calls_in_the_name_of_the_ledger_itself() -> None:
    assert all(Role.SYSTEM not in roles for roles in PERMISSIONS.values())

"""TLS: what the server presents, whose certificates it takes, and new ones when the files change.

gRPC asks before each handshake. Whoever is connected already keeps what the connection began with.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc

from peculium_server.certificates import (
    CertificateUnusable,
    check_authorities,
    check_pair,
    expiry,
)
from peculium_server.files import PrivateFileUnusable, Version, read_private, version_of

_PEM: Final = "x509_pem_cert"
"""What gRPC calls the certificate of a client."""

_logger = logging.getLogger(__name__)


class TlsInvalid(Exception):
    """TLS cannot be served with these files; says which, and why."""


class TlsFiles(NamedTuple):
    """Where the server's certificate is, and those who may vouch for clients."""

    certificate: Path
    key: Path
    client_authorities: Path | None

    @property
    def paths(self) -> Sequence[Path]:
        """All of them."""
        return [path for path in self if path is not None]


class Tls:
    """The server's side of TLS."""

    def __init__(self, files: TlsFiles) -> None:
        """Read the files.

        Raises:
            TlsInvalid: They cannot be used.
        """
        self._files = files
        self._lock = threading.Lock()
        """gRPC asks on threads of its own."""
        self._versions = _versions(files.paths)
        self._configuration = _load(files)

    def credentials(self, *, client_certificates: bool) -> grpc.ServerCredentials:
        """Credentials for a port.

        Args:
            client_certificates: Whoever has none, or none that an authority vouches for, cannot connect.
        """
        given = self._configuration

        def changed() -> Any:
            """What the next handshakes are to be done with, if not with what was given before."""
            nonlocal given
            newest = self._newest()
            if newest is given:
                return None
            given = newest
            return newest

        return grpc.dynamic_ssl_server_credentials(given, changed, client_certificates)

    def refresh(self) -> None:
        """Read the files again if they have changed. Those that cannot be used change nothing."""
        versions = _versions(self._files.paths)
        with self._lock:
            if versions == self._versions:
                return
            # Tried once only: until they change again, the same is wrong with them.
            self._versions = versions
            try:
                self._configuration = _load(self._files)
            except TlsInvalid as error:
                _logger.warning(
                    "the TLS files have changed and CANNOT BE USED, those before stay in use: %s",
                    error,
                )
                return
        _logger.warning(
            "the TLS files have changed and were read again; the certificate expires at %s",
            expiry(self._files.certificate.read_bytes()).isoformat(),
        )

    def _newest(self) -> Any:
        """What the next handshake is to be done with. Never raises: gRPC would end the handshake."""
        try:
            self.refresh()
        except Exception:
            _logger.exception("the TLS files could not be looked at")
        return self._configuration


def peer_certificate(context: Any) -> bytes | None:
    """The certificate that the client of a call has presented, as PEM; None if it has none."""
    presented = context.auth_context().get(_PEM)
    return None if not presented else bytes(presented[0])


def _load(files: TlsFiles) -> Any:
    """The configuration as gRPC takes it.

    Raises:
        TlsInvalid: The files cannot be used.
    """
    try:
        chain = files.certificate.read_bytes()
        authorities = (
            None if files.client_authorities is None else files.client_authorities.read_bytes()
        )
    except OSError as error:
        raise TlsInvalid(f"{error.filename}: cannot be read: {error.strerror}") from error
    try:
        key = read_private(files.key)
    except PrivateFileUnusable as error:
        raise TlsInvalid(f"{files.key}: {error}") from error
    try:
        check_pair(chain, key)
    except CertificateUnusable as error:
        raise TlsInvalid(f"{files.certificate}, {files.key}: {error}") from error
    if authorities is not None:
        try:
            check_authorities(authorities)
        except CertificateUnusable as error:
            raise TlsInvalid(f"{files.client_authorities}: {error}") from error
    return grpc.ssl_server_certificate_configuration([(key, chain)], authorities)


def _versions(paths: Sequence[Path]) -> tuple[Version | None, ...]:
    return tuple(version_of(path) for path in paths)

"""X.509 certificates: whom a client's names, and what is wrong with the server's own before it is used."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from peculium_server.core.limits import SECOND_US
from peculium_server.identity import Certificate
from peculium_server.keyfile import spiffe_problem

_REMEMBERED: Final = 4_096
"""Certificates of clients: each call of a connection has the same."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class CertificateUnusable(Exception):
    """A certificate does not say what it has to; says what is wrong with it."""


@lru_cache(_REMEMBERED)
def read_certificate(pem: bytes) -> Certificate:
    """Whom a client's certificate names: by its one URI, as SPIFFE has it.

    That it is good, that is whose signature it has, the transport has found out.

    Raises:
        CertificateUnusable: It has no URI, or several, or one that is no SPIFFE id.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        uris = _uris(certificate)
    except ValueError:
        raise CertificateUnusable("is unreadable") from None
    if len(uris) != 1:
        raise CertificateUnusable(f"must have one URI among its names, and has {len(uris)}")
    problem = spiffe_problem(uris[0])
    if problem is not None:
        raise CertificateUnusable(f"has a URI that {problem}")
    passed = certificate.not_valid_after_utc - _EPOCH
    return Certificate(uris[0], (passed.days * 86_400 + passed.seconds) * SECOND_US)


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def check_pair(chain: bytes, key: bytes) -> None:
    """Make sure that a server can present a certificate: the transport itself would say so to nobody.

    Raises:
        CertificateUnusable: It is none, or the key is none, or is another one's.
    """
    try:
        certificate = x509.load_pem_x509_certificates(chain)[0]
    except ValueError:
        raise CertificateUnusable("the certificate is not one as PEM") from None
    try:
        private = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError):
        # Not what is wrong with it: a part of it may be the key.
        raise CertificateUnusable(
            "the key is not a private key as PEM without a password"
        ) from None
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if certificate.public_key().public_bytes(*form) != private.public_key().public_bytes(*form):
        raise CertificateUnusable("the key is not that of the certificate")


def check_authorities(chain: bytes) -> None:
    """Make sure that clients' certificates can be checked.

    Raises:
        CertificateUnusable: There is no certificate.
    """
    try:
        x509.load_pem_x509_certificates(chain)
    except ValueError:
        raise CertificateUnusable("there is no certificate of an authority as PEM") from None


def expiry(chain: bytes) -> datetime:
    """When the first certificate of a chain expires."""
    return x509.load_pem_x509_certificates(chain)[0].not_valid_after_utc

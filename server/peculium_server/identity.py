"""Who calls: by API keys of the ledger's database and of a file, or by a certificate.

Nobody asks the database for each call. What was done to keys is read from it every second, so that one which
was made, rotated or revoked at another server is so here within `REFRESH_SECONDS` and the time of a read; where
it happens, it is so at once. A server that could not read for `STALE_SECONDS_MAX` lets nobody call whom only
the database knows: it may be they were revoked.

As long as the ledger has never had a key, and neither a file nor certificates say who may call, there is one
principal, `dev`, who may do everything: for a laptop, never for a network.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from peculium_server.core.keys import Key, KeyAct, fold
from peculium_server.core.operations import Role
from peculium_server.files import Version, version_of
from peculium_server.keyfile import KeyFile, KeysInvalid
from peculium_server.store.errors import LedgerCorrupt, StoreError, StoreUnavailable
from peculium_server.store.keys import KeysSince

DEV_PRINCIPAL: Final = "dev"

REFRESH_SECONDS: Final = 1.0
"""How often is read what was done to keys."""
REFRESH_SECONDS_MAX: Final = 3.0
"""A read that takes longer is given up, and begun anew."""
STALE_SECONDS_MAX: Final = 10.0
"""What was read longer ago is not relied upon."""

KEY_PREFIX: Final = "pek_"
_KEY_DOMAIN: Final = b"peculium.key.v1\x00"
_SECOND_US: Final = 1_000_000

_logger = logging.getLogger(__name__)


class KeysOutdated(Exception):
    """It was not possible for too long to read which keys are valid."""

    def __str__(self) -> str:
        return "which keys are valid was not read for too long"


class Identity(NamedTuple):
    """An authenticated caller."""

    principal: str
    roles: frozenset[Role]
    roots: frozenset[bytes] | None = None
    """The trees that this caller is limited to; None: all."""
    key_id: bytes | None = None
    """The key of the database that they call with, if it is one."""


DEV: Final = Identity(DEV_PRINCIPAL, frozenset({Role.AGENT, Role.ADMIN, Role.AUDITOR}))


class Certificate(NamedTuple):
    """What a client's certificate says, of which the transport has found that it is good."""

    spiffe_id: str
    expires_at: int
    """Microseconds since the Unix epoch; connections may live longer than what they began with."""


class KeySource(Protocol):
    """Where the keys of the ledger are read."""

    async def since(self, number: int, /) -> KeysSince:
        """What was done after an act; see `peculium_server.store.keys.Keys`."""
        ...


class _Known(NamedTuple):
    """Who calls with some text, and until when."""

    identity: Identity
    until: int | None


class Identities:
    """Everybody who may call."""

    def __init__(
        self,
        file: KeyFile | None,
        source: KeySource | None = None,
        *,
        development: bool = False,
    ) -> None:
        """Know nobody yet but those of a file.

        Args:
            file: Those whom a file names, if there is one.
            source: Where the ledger's own keys are read; none: it has none.
            development: Whoever calls is `dev`, as long as nothing says who may call.
        """
        self._file = file
        self._source = source
        self._development = development and file is None
        self._refreshing = asyncio.Lock()
        self._keys: dict[bytes, Key] = {}
        self._last = 0
        """The number of the last act that is known."""
        self._by_digest: dict[bytes, _Known] = {}
        self._read_at: float | None = None
        """On the machine's clock; a little before the database's clock was read."""
        self._now_then = 0
        self._tried: Version | None = None
        """Of the file that was tried last and could not be used."""

    @classmethod
    def dev(cls) -> Identities:
        """Whoever calls is `dev` and may do everything."""
        return cls(None, development=True)

    @classmethod
    def load(cls, path: Path, source: KeySource | None = None) -> Identities:
        """Those of a key file, and of the ledger.

        Raises:
            KeysInvalid: The file cannot be read, or something is wrong with it; names every problem.
        """
        return cls(KeyFile.load(path), source)

    @property
    def dev_mode(self) -> bool:
        """Say whether anybody who can connect may do everything."""
        return self._development and not self._last

    @property
    def nobody(self) -> bool:
        """Say whether nobody at all may call: there is no key yet."""
        return not self._development and self._file is None and not self._last

    @property
    def keys(self) -> Sequence[Key]:
        """All keys of the ledger, by id, as they were known at the last refresh."""
        return [self._keys[key_id] for key_id in sorted(self._keys)]

    def now(self) -> int:
        """The database's clock, in microseconds since the Unix epoch. It may be ahead a little, not behind.

        Raises:
            KeysOutdated: It was not read for too long.
        """
        if self._read_at is None:
            raise KeysOutdated
        passed = time.monotonic() - self._read_at
        if passed > STALE_SECONDS_MAX:
            raise KeysOutdated
        return self._now_then + int(passed * _SECOND_US)

    def identify(self, key: str | None, certificate: Certificate | None = None) -> Identity | None:
        """The caller who presents this key, or else this certificate; None if nobody does.

        Raises:
            KeysOutdated: It cannot be told, because the database did not say for too long.
        """
        if self.dev_mode:
            if self._source is not None:
                # The ledger may have got its first key meanwhile.
                self.now()
            return DEV
        if key is not None:
            return self._by_key(key)
        return None if certificate is None else self._by_certificate(certificate)

    def _by_key(self, key: str) -> Identity | None:
        # A lookup by digest: how long it takes says nothing about the keys.
        digest = digest_of(key)
        found = None if self._file is None else self._file.keys.get(digest)
        if found is not None:
            if found.expires_at is not None and found.expires_at <= self.now():
                return None
            return Identity(found.principal, frozenset({found.role}), found.roots)
        if self._source is None:
            return None
        now = self.now()
        known = self._by_digest.get(digest)
        if known is None or (known.until is not None and known.until <= now):
            return None
        return known.identity

    def _by_certificate(self, certificate: Certificate) -> Identity | None:
        if certificate.expires_at <= self.now():
            return None
        rule = None if self._file is None else self._file.rule_of(certificate.spiffe_id)
        if rule is None:
            # It is known who calls; that they may do nothing is told to them by every method.
            return Identity(certificate.spiffe_id, frozenset())
        return Identity(certificate.spiffe_id, frozenset({rule.role}), rule.roots)

    # -- Keeping up ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep up with what is done to keys, and with the file, until cancelled."""
        failing = False
        while True:
            self._reload()
            try:
                await self.refresh()
            except StoreError as error:
                if not failing:
                    _logger.warning("keys cannot be read: %s", error)
                failing = True
            else:
                if failing:
                    _logger.warning("keys are read again")
                failing = False
            await asyncio.sleep(REFRESH_SECONDS)

    async def refresh(self) -> None:
        """Learn what was done to keys until now.

        Raises:
            StoreError: The database does not say.
        """
        if self._source is None:
            return
        async with self._refreshing:
            begun, known, last = time.monotonic(), self._keys, self._last
            try:
                async with asyncio.timeout(REFRESH_SECONDS_MAX):
                    since = await self._source.since(last)
                    if since.last < last:
                        # The ledger was restored to its past: what was learnt is not so any more.
                        known, last = {}, 0
                        since = await self._source.since(0)
            except TimeoutError:
                raise StoreUnavailable("keys were not read in time") from None
            if since.acts or last != self._last:
                self._learn(known, last, since.acts)
            self._read_at, self._now_then = begun, since.now

    def _learn(self, known: dict[bytes, Key], last: int, acts: Sequence[KeyAct]) -> None:
        """Know all keys, after those that were known when so many acts were, and more acts."""
        if [act.number for act in acts] != list(range(last + 1, last + 1 + len(acts))):
            raise LedgerCorrupt(f"acts on keys are missing after number {last}")
        try:
            keys = fold(known, acts)
        except ValueError as error:
            raise LedgerCorrupt(str(error)) from error
        if self.dev_mode and acts:
            _logger.warning("the ledger has its first key: from now on everybody needs one")
        self._keys, self._last = keys, last + len(acts)
        self._by_digest = {digest: who for key in keys.values() for digest, who in _known(key)}

    def _reload(self) -> None:
        """Read the file again if it has changed. One that cannot be used changes nothing."""
        if self._file is None or self._file.is_current(self._tried):
            return
        self._tried = version_of(self._file.path)
        try:
            self._file = KeyFile.load(self._file.path)
        except KeysInvalid as error:
            _logger.warning("the key file CANNOT BE USED, the one before stays in force: %s", error)
        else:
            _logger.warning("the key file has changed and was read again")


def digest_of(key: str) -> bytes:
    """What a key is known by. One that Peculium has made has a digest that nothing else can have."""
    text = key.encode(errors="surrogatepass")
    return hashlib.sha256(_KEY_DOMAIN + text if key.startswith(KEY_PREFIX) else text).digest()


def _known(key: Key) -> list[tuple[bytes, _Known]]:
    """With which texts one calls as a key says, and until when each is valid."""
    if key.revoked_at is not None:
        return []
    identity = Identity(
        key.principal,
        frozenset(key.roles),
        None if key.roots is None else frozenset(key.roots),
        key.key_id,
    )
    return [
        (
            secret.digest,
            _Known(
                identity,
                min(
                    (end for end in (secret.until, key.expires_at) if end is not None), default=None
                ),
            ),
        )
        for secret in key.secrets
    ]

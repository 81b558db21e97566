"""A file of what a client must not forget: its secrets, and the operations of unknown outcome.

Encrypted with AES-256-GCM under a key of the user's. Needs `pip install peculium[journal]`.

A file is a header, which says what it is and has a salt, and records. Each record is a length and a sealed
piece of JSON. Its key is derived from the user's and the salt, its nonce is its number: so no nonce
is used twice, and records cannot be changed, swapped or taken from another file. What can be done to it without
a trace is to cut off its end; then less is known, as if the process had died a little earlier. A file is never
continued by another process: whoever opens it writes what still matters to a new one in its place.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import stat
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self
from weakref import WeakSet

from peculium import _codec as codec
from peculium._ids import id_text
from peculium._recorder import Recorder, Subject, subject_of
from peculium._requests import MadeChild, Operation, Rotated, restored
from peculium.capability import BudgetRef
from peculium.errors import JournalLocked, JournalUnreadable, Malformed, NotSupported
from peculium.v1 import types_pb2
from peculium.values import HoldInfo, HoldState

KEY_BYTES = 32
_MAGIC = b"PECJRNL1"
_SALT_BYTES = 32
_NONCE_BYTES = 12
_LENGTH = struct.Struct(">I")
_COMPACT_BYTES_MIN = 1 << 20
_COMPACT_FACTOR = 4
_DOMAIN = b"peculium.journal.v1"
_MODE = 0o600

_log = logging.getLogger("peculium")


@dataclass(slots=True)
class Token:
    """A live token's secret, and what is known of whose it is."""

    secret: bytes = field(repr=False)
    name: str
    """The budget's path if that is known, otherwise its id."""
    capability: bool = False
    """It is in a capability, not in a handle."""
    info: HoldInfo | None = None
    """The hold, if it is a hold's."""
    outcome: bytes = b""
    """What gave the hold its token, as the ledger told it."""


@dataclass(slots=True)
class Attempt:
    """An operation that may have been sent, and the name of its budget."""

    operation: Operation
    name: str


class Left(NamedTuple):
    """What the process before this one has left."""

    tokens: dict[Subject, Token]
    unknown: list[Attempt]
    """Whose outcome is not known, in the order in which they were to be sent."""
    refused: list[Attempt]
    """That were refused, and may win late."""


class _State:
    """What a file's records add up to."""

    def __init__(self) -> None:
        self.tokens: dict[Subject, Token] = {}
        self.unknown: dict[bytes, Attempt] = {}
        self.refused: dict[bytes, Attempt] = {}

    def sending(self, operation: Operation, name: str, secret: bytes | None) -> None:
        self.unknown[operation.operation_id] = Attempt(operation, name)
        if secret is not None:
            self.have(subject_of(operation), secret, name)

    def have(self, subject: Subject, secret: bytes | None, name: str) -> Token | None:
        token = None
        if secret is not None:
            known = self.tokens.get(subject) or Token(secret, name)
            token = Token(secret, name, info=known.info, outcome=known.outcome)
        self.put(subject, token)
        return token

    def put(self, subject: Subject, token: Token | None) -> None:
        if token is None:
            self.tokens.pop(subject, None)
        else:
            self.tokens[subject] = token

    def refuse(self, operation_id: bytes) -> None:
        attempt = self.unknown.pop(operation_id, None)
        if attempt is not None:
            self.refused[operation_id] = attempt

    def end(self, operation_id: bytes) -> None:
        self.unknown.pop(operation_id, None)
        self.refused.pop(operation_id, None)

    def apply(self, record: list[Any]) -> None:
        """Add a record that was read."""
        match record:
            case ["op", packed, name, secret]:
                self.sending(_operation(packed), name, _bytes(secret))
            case ["token", [root_id, budget_id, hold_id], packed]:
                subject = tuple(map(bytes.fromhex, (root_id, budget_id, hold_id)))
                self.put((subject[0], subject[1], subject[2]), _token(packed))
            case ["refused", operation_id]:
                self.refuse(bytes.fromhex(operation_id))
            case ["end", operation_id]:
                self.end(bytes.fromhex(operation_id))
            case ["all", *records]:
                for each in records:
                    self.apply(each)
            case _:
                # The first record says nothing: it shows whether the key is right.
                pass

    def records(self) -> Iterator[list[Any]]:
        """As few records as say the same. The tokens are last: they are what they are by now."""
        unknown, refused = list(self.unknown.values()), list(self.refused.values())
        for attempt in refused + unknown:
            yield ["op", _packed(attempt.operation), attempt.name, None]
        for attempt in refused:
            yield ["refused", attempt.operation.operation_id.hex()]
        for subject, token in list(self.tokens.items()):
            yield _of_token(subject, token)


class Journal(Recorder):
    """A client's memory on disk, for one client of one process at a time.

    Pass it to `connect`. Before a request is sent, what it contains is on the disk: that costs one `fsync`
    for each request, however many operations it has. Operators' calls are not in it.
    """

    durable = True

    def __init__(self, path: str | os.PathLike[str], *, key: bytes) -> None:
        """Open the file, or make it.

        Args:
            path: Where it is. Nobody but its owner may read it, and it is on a local disk.
            key: 32 bytes, from `new_key()`; without it the file is worthless.

        Raises:
            Malformed: The key is not 32 bytes.
            NotSupported: `peculium[journal]` is not installed.
            JournalLocked: Another process, or another client, has it open.
            JournalUnreadable: The key is another one, or the file was changed, or others may read it.
            OSError: It cannot be read or written.
        """
        if type(key) is not bytes or len(key) != KEY_BYTES:
            problem = f"must be {KEY_BYTES} bytes"
            raise Malformed(f"key: {problem}", facts={"field": "key", "problem": problem})
        self._path = Path(path)
        self._key = key
        self._lock = threading.Lock()
        self._pending: deque[list[Any]] = deque()
        self._broken = False
        self._used = False
        self._state = _State()
        self._size = self._size_renewed = 0
        self._file = _opened(self._path)
        try:
            for record in _read(self._file, self._path, key):
                self._state.apply(record)
            self._sealing = self._renew()
        except BaseException:
            self._release()
            raise
        state = self._state
        self._inherited: Left | None = Left(
            dict(state.tokens), list(state.unknown.values()), list(state.refused.values())
        )
        _JOURNALS.add(self)

    @staticmethod
    def new_key() -> bytes:
        """A key. Keep it where the file is not."""
        return secrets.token_bytes(KEY_BYTES)

    def __repr__(self) -> str:
        return f"<Journal {self._path}>"

    # --- what a client does ---

    def use(self) -> Self:
        """Be the journal of a client, once.

        Raises:
            JournalLocked: It is, or was, another client's.
        """
        if self._used:
            raise JournalLocked(f"the journal {self._path} is another client's: open it again")
        self._used = True
        return self

    def is_unknown(self, operation: Operation) -> bool:
        """Whether it is still not known what became of it."""
        return operation.operation_id in self._state.unknown

    @property
    def left(self) -> Left:
        """What the process before this one has left, until it is `taken_over`."""
        return self._inherited or Left({}, [], [])

    def taken_over(self) -> None:
        """What was left has its handles again."""
        self._inherited = None

    def live(self) -> list[tuple[Subject, Token]]:
        """Of the tokens that the process before this one had or made, those that are live."""
        left = self.left
        subjects = dict.fromkeys(left.tokens)
        for attempt in left.unknown:
            subjects |= dict.fromkeys(_concerned(attempt.operation))
        tokens = self._state.tokens
        return [(subject, tokens[subject]) for subject in subjects if subject in tokens]

    @staticmethod
    def ref(subject: Subject, token: Token) -> BudgetRef:
        """The budget that a token belongs to, or from which its hold was reserved."""
        root_id, budget_id, _ = subject
        return BudgetRef(_path(token.name, budget_id), root_id, budget_id)

    def token(self, subject: Subject) -> Token | None:
        """The live token, as far as is known by now."""
        return self._state.tokens.get(subject)

    # --- what is said to it ---

    def sending(self, name: str, operation: Operation, /, *, secret: bytes | None) -> None:
        """See `Recorder`."""
        state, operation_id = self._state, operation.operation_id
        if operation.dry_run or operation_id in state.unknown or operation_id in state.refused:
            return
        state.sending(operation, name, secret)
        self._pending.append(["op", _packed(operation), name, _hex(secret)])

    def accepted(
        self,
        name: str,
        operation: Operation,
        outcome: types_pb2.Outcome,
        /,
        *,
        secret: bytes | None,
        alone: bool,
    ) -> None:
        """See `Recorder`."""
        if outcome.dry_run:
            return
        self._end(operation.operation_id)
        if alone:
            self.outrun(operation)
        if operation.produced is not None or operation.closes:
            subject = subject_of(operation)
            left = operation.produced if operation.kind == "recover" else secret
            self._pending.append(_of_token(subject, self._state.have(subject, left, name)))
        root_id = operation.root_id
        for child in operation.children:
            if child.secret is not None:
                path = _path(name, operation.budget_id)
                child_name = f"{path}/{child.name}" if path else id_text(child.budget_id)
                token = Token(child.secret, child_name, capability=True)
                self._put((root_id, child.budget_id, b""), token)
        told = outcome.SerializeToString()
        made = [*operation.rotated]
        if operation.hold_secret is not None:
            made.append(Rotated(codec.hold_info(outcome.hold), operation.hold_secret))
        for info, hold_secret in made:
            subject = root_id, operation.budget_id, info.hold_id
            self._put(subject, Token(hold_secret, name, info=info, outcome=told))

    def refused(self, operation: Operation) -> None:
        """See `Recorder`."""
        if operation.operation_id in self._state.unknown:
            self._state.refuse(operation.operation_id)
            self._pending.append(["refused", operation.operation_id.hex()])

    def ended(self, operation: Operation) -> None:
        """See `Recorder`."""
        if operation.operation_id in self._state.unknown:
            self._end(operation.operation_id)

    def outrun(self, operation: Operation) -> None:
        """See `Recorder`."""
        subject = subject_of(operation)
        for operation_id, attempt in list(self._state.refused.items()):
            if subject_of(attempt.operation) == subject:
                self._end(operation_id)

    def keep(self, subject: Subject, secret: bytes, name: str, *, capability: bool) -> None:
        """See `Recorder`."""
        self._put(subject, Token(secret, name, capability=capability))

    def leave(self, subject: Subject, secret: bytes) -> None:
        """See `Recorder`."""
        self.forget(subject, secret)
        self.flush()

    def forget(self, subject: Subject, secret: bytes) -> None:
        """The token is dead, or not this client's any more."""
        token = self._state.tokens.get(subject)
        if token is not None and token.secret == secret:
            self._put(subject, None)

    def _end(self, operation_id: bytes) -> None:
        self._state.end(operation_id)
        self._pending.append(["end", operation_id.hex()])

    def _put(self, subject: Subject, token: Token | None) -> None:
        self._state.put(subject, token)
        self._pending.append(_of_token(subject, token))

    # --- the file ---

    def flush(self) -> None:
        """See `Recorder`. Many may flush at once; what each has said is on the disk when it returns."""
        with self._lock:
            if self._broken or self._file < 0:
                raise OSError(errno.EIO, "the journal was closed, or could not be written before")
            if not self._pending:
                return
            try:
                said = [self._pending.popleft() for _ in range(len(self._pending))]
                # One record, so that what a crash cuts off is the last one, and was not relied on.
                data = self._sealing(["all", *said])
                _write(self._file, data)
                os.fsync(self._file)
                self._size += len(data)
                if self._size > max(_COMPACT_BYTES_MIN, _COMPACT_FACTOR * self._size_renewed):
                    self._sealing = self._renew()
            except BaseException:
                # Nobody knows what is on the disk now.
                self._broken = True
                raise

    def close(self) -> None:
        """Write what was said, and let others open the file."""
        if self._file < 0:
            return
        try:
            self.flush()
        except OSError as error:
            # Who finds out later that something has ended has lost nothing.
            _log.warning("the journal was closed without what was said last: %s", error)
        finally:
            self._release()

    def _release(self) -> None:
        file, self._file = self._file, -1
        os.close(file)

    def _renew(self) -> Callable[[list[Any]], bytes]:
        """Write what matters into a new file, and put it in the old one's place.

        The new one is locked before it is there, so that at no time nobody has the lock.
        """
        salt = secrets.token_bytes(_SALT_BYTES)
        seal = _sealing(_cipher(self._key, salt))
        records = [["journal"], *self._state.records()]
        data = b"".join((_MAGIC, salt, *map(seal, records)))
        path = self._path.with_name(f"{self._path.name}.new")
        path.unlink(missing_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write(file, data)
            os.fsync(file)
            path.replace(self._path)
            _sync_directory(self._path.parent)
        except BaseException:
            os.close(file)
            raise
        self._release()
        self._file = file
        self._size = self._size_renewed = len(data)
        return seal


_JOURNALS: WeakSet[Journal] = WeakSet()


def _close_all() -> None:
    """In a forked child: the lock is its parent's, and ends with it."""
    for journal in list(_JOURNALS):
        if journal._file >= 0:  # noqa: SLF001 - this module's own
            journal._release()  # noqa: SLF001 - this module's own


os.register_at_fork(after_in_child=_close_all)


def _path(name: str, budget_id: bytes) -> str:
    return "" if name == id_text(budget_id) else name


def _concerned(operation: Operation) -> Iterator[Subject]:
    """Whose tokens an operation renews or makes."""
    root_id, budget_id = operation.root_id, operation.budget_id
    yield subject_of(operation)
    if operation.hold_id:
        yield root_id, budget_id, operation.hold_id
    for child in operation.children:
        yield root_id, child.budget_id, b""
    for info, _ in operation.rotated:
        yield root_id, budget_id, info.hold_id


def _opened(path: Path) -> int:
    """The file, which nobody else has open, and nobody else may read."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        file = os.open(path, flags, _MODE)
        try:
            status = os.fstat(file)
            _check_own(path, status)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = path.stat()
            if (there.st_dev, there.st_ino) == (status.st_dev, status.st_ino):
                return file
        except BlockingIOError:
            os.close(file)
            raise JournalLocked(f"another process has the journal {path}") from None
        except BaseException:
            os.close(file)
            raise
        # Its owner has just renewed it.
        os.close(file)


def _check_own(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise JournalUnreadable(f"{path} is not a file of this user's own")
    if status.st_mode & 0o077:
        raise JournalUnreadable(f"others may read {path}: its mode has to be 0600")


def _read(file: int, path: Path, key: bytes) -> Iterator[list[Any]]:
    """The records of a file. What a crash left half-written at its end was never relied on."""
    with os.fdopen(os.dup(file), "rb") as reader:
        data = reader.read()
    if not data:
        return
    at = len(_MAGIC) + _SALT_BYTES
    if not data.startswith(_MAGIC) or len(data) < at:
        raise JournalUnreadable(f"{path} is no journal of this version")
    cipher, count = _cipher(key, data[len(_MAGIC) : at]), 0
    while at < len(data):
        length = int.from_bytes(data[at : at + _LENGTH.size])
        start, at = at + _LENGTH.size, at + _LENGTH.size + length
        record = _unsealed(cipher, count, data[start:at])
        if record is None:
            if count and (at >= len(data) or not length):
                # Of what was not written, zeros may be there.
                return
            raise JournalUnreadable(f"the key is not that of {path}, or the file was changed")
        count += 1
        yield record


def _cipher(key: bytes, salt: bytes) -> Any:
    """What seals the records of one file."""
    # Only here, so that who has no journal needs no cryptography.
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - see above
        from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415 - see above
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415 - see above
    except ImportError as error:
        raise NotSupported("a journal needs the package's extra `journal`") from error
    return AESGCM(HKDF(SHA256(), KEY_BYTES, salt, _DOMAIN).derive(key))


def _sealing(cipher: Any) -> Callable[[list[Any]], bytes]:
    """Seals one record after the other: the number of each is its nonce."""
    count = 0

    def seal(record: list[Any]) -> bytes:
        nonlocal count
        nonce, count = count.to_bytes(_NONCE_BYTES), count + 1
        sealed: bytes = cipher.encrypt(nonce, json.dumps(record).encode(), _DOMAIN)
        return _LENGTH.pack(len(sealed)) + sealed

    return seal


def _unsealed(cipher: Any, count: int, sealed: bytes) -> list[Any] | None:
    from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - as in `_cipher`

    try:
        record: list[Any] = json.loads(
            cipher.decrypt(count.to_bytes(_NONCE_BYTES), sealed, _DOMAIN)
        )
    except (InvalidTag, ValueError):
        return None
    return record


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


# --- records ---


def _hex(value: bytes | None) -> str | None:
    return None if value is None else value.hex()


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else bytes.fromhex(text)


def _packed(operation: Operation) -> dict[str, Any]:
    return {
        "kind": operation.kind,
        "message": operation.message.SerializeToString().hex(),
        "produced": _hex(operation.produced),
        "closes": operation.closes,
        "hold_id": operation.hold_id.hex(),
        "hold_secret": _hex(operation.hold_secret),
        "children": [
            [child.budget_id.hex(), child.name, _hex(child.secret)] for child in operation.children
        ],
        "rotated": [[_packed_info(info), secret.hex()] for info, secret in operation.rotated],
    }


def _operation(packed: dict[str, Any]) -> Operation:
    return restored(
        packed["kind"],
        bytes.fromhex(packed["message"]),
        produced=_bytes(packed["produced"]),
        closes=packed["closes"],
        hold_id=bytes.fromhex(packed["hold_id"]),
        hold_secret=_bytes(packed["hold_secret"]),
        children=tuple(
            MadeChild(bytes.fromhex(budget_id), name, _bytes(secret))
            for budget_id, name, secret in packed["children"]
        ),
        rotated=tuple(
            Rotated(_info(info), bytes.fromhex(secret)) for info, secret in packed["rotated"]
        ),
    )


def _of_token(subject: Subject, token: Token | None) -> list[Any]:
    packed = None
    if token is not None:
        packed = {
            "secret": token.secret.hex(),
            "name": token.name,
            "capability": token.capability,
            "info": None if token.info is None else _packed_info(token.info),
            "outcome": token.outcome.hex(),
        }
    return ["token", [part.hex() for part in subject], packed]


def _token(packed: dict[str, Any] | None) -> Token | None:
    if packed is None:
        return None
    return Token(
        bytes.fromhex(packed["secret"]),
        packed["name"],
        packed["capability"],
        None if packed["info"] is None else _info(packed["info"]),
        bytes.fromhex(packed["outcome"]),
    )


def _packed_info(info: HoldInfo) -> list[Any]:
    return [
        info.hold_id.hex(),
        info.budget_id.hex(),
        info.state.value,
        info.amount,
        info.remaining,
        info.booked,
        info.disputed,
        info.created_at.isoformat(),
        info.expires_at.isoformat(),
    ]


def _info(packed: list[Any]) -> HoldInfo:
    hold_id, budget_id, state, amount, remaining, booked, disputed, created_at, expires_at = packed
    return HoldInfo(
        bytes.fromhex(hold_id),
        bytes.fromhex(budget_id),
        HoldState(state),
        amount,
        remaining,
        booked,
        disputed,
        datetime.fromisoformat(created_at),
        datetime.fromisoformat(expires_at),
    )

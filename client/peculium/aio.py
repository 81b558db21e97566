"""The client for asyncio. `peculium.client` is generated from this module: the same verbs, blocking.

Every verb takes `timeout`, in seconds; without it, the client's own applies. Within it an operation
is sent again, under the same id, while its answer is unknown or the ledger unavailable. Every verb
may raise what `peculium.errors` draws: `Refused`, `Invalid` or `Unavailable`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from peculium import _codec as codec, _requests as requests
from peculium._aio_alerts import Alerts, Webhooks
from peculium._aio_audit import Audit
from peculium._aio_keys import Keys
from peculium._aio_sender import Pending, Sender
from peculium._coalescer import Line, Ticket
from peculium._config import TIMEOUT_SECONDS_DEFAULT, Tls, configure
from peculium._handles import Handle, caller
from peculium._ids import id_text, new_id, new_secret, token_id
from peculium._limits import PAGE_SIZE_MAX, ROTATIONS_MAX
from peculium._recorder import Recorder, Subject, subject_of
from peculium._requests import Asked, HoldTarget, Operation, Rotated, Target
from peculium._trace import carrier_of, read_carrier, traceparent
from peculium.capability import BudgetRef, Capability, Receiver
from peculium.errors import (
    BudgetChanged,
    BudgetClosed,
    BudgetExpired,
    BudgetHeld,
    CapabilityMoved,
    CapabilityUnknown,
    DeadlineExceeded,
    HoldEnded,
    Invalid,
    LedgerUnavailable,
    NotTokenHeld,
    OutcomeUnknown,
    PeculiumError,
    Refused,
)
from peculium.journal import Attempt, Journal
from peculium.money import Usage
from peculium.v1 import ledger_service_pb2, types_pb2
from peculium.values import (
    Balances,
    BudgetInfo,
    BudgetState,
    Child,
    Custody,
    Delegated,
    HoldInfo,
    IfHeld,
    Receipt,
    Seconds,
)

if TYPE_CHECKING:
    from grpc.aio import UnaryUnaryMultiCallable


class _Asking(Protocol):
    """An operator's request."""

    @property
    def header(self) -> types_pb2.OperationHeader:
        """What every operation carries."""
        ...


class _Telling(Protocol):
    """A response that tells an outcome."""

    @property
    def outcome(self) -> types_pb2.Outcome:
        """What happened."""
        ...


_Request = TypeVar("_Request", bound=_Asking)
_Response = TypeVar("_Response", bound=_Telling)

_LOOKS_MAX = 8
"""How often a budget is looked at again that changes between the look and the claim."""

_log = logging.getLogger("peculium")


def connect(
    target: str | None = None,
    *,
    api_key: str | None = None,
    timeout: float = TIMEOUT_SECONDS_DEFAULT,
    tls: Tls | bool | None = None,
    allow_insecure: bool = False,
    journal: Journal | None = None,
) -> Client:
    """Make a client of a ledger. Nothing is sent yet; use it as a context manager, or close it.

    Args:
        target: Where the ledger is, as host:port or any name that grpc knows. Absent: the
            environment's `PECULIUM_TARGET`, or 127.0.0.1:7415.
        api_key: The caller's credential. Absent: the environment's `PECULIUM_API_KEY`, or none.
        timeout: How many seconds a verb may take unless it says otherwise.
        tls: Encrypt the connection, or do not; a `Tls` says with which certificates. Absent: as the
            environment says with `PECULIUM_TLS`, `PECULIUM_TLS_CA_FILE`, `PECULIUM_TLS_CLIENT_CERT_FILE`,
            `PECULIUM_TLS_CLIENT_KEY_FILE` and `PECULIUM_TLS_SERVER_NAME`, or not.
        allow_insecure: Send the key in clear text to other machines: only where something else
            encrypts the connection.
        journal: Where to keep what this process must not forget, for its successor to `resume`.

    Raises:
        Malformed: An argument is not as it has to be.
        InsecureCredentials: The key would travel in clear text beyond this machine.
        JournalLocked: The journal is another client's.
    """
    config = configure(
        target, api_key=api_key, timeout=timeout, tls=tls, allow_insecure=allow_insecure
    )
    return Client(Sender(config, recorder=None if journal is None else journal.use()), journal)


class Client:
    """A connection to a ledger, for any number of budgets. Made by `connect`.

    Attributes:
        admin: What operators may do.
        audit: What auditors may ask.
        alerts: What is watched for, and what was found.
        webhooks: Whom alerts are sent to.
    """

    def __init__(self, sender: Sender, journal: Journal | None = None) -> None:
        self._sender = sender
        self._journal = journal
        self._unresolved: dict[tuple[str, bytes], Ticket] = {}
        """Accepts and recoveries of unknown outcome, so that the next attempt finds out first."""
        self.audit = Audit(sender)
        self.admin = Admin(sender, self.audit)
        self.alerts = Alerts(sender)
        self.webhooks = Webhooks(sender)

    async def __aenter__(self) -> Self:
        """Connect."""
        await self._sender.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finish what is on its way, and disconnect."""
        await self.close()

    async def close(self) -> None:
        """Finish what is on its way, within bounds, and disconnect. Handles are of no use then."""
        await self._sender.close()

    async def open(
        self,
        path: str,
        *,
        carrier: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Budget:
        """Use a budget that is held by this client's principal.

        Args:
            path: Names from the root downwards, joined by "/".
            carrier: The W3C trace context that came along: what is asked of this handle outside of any
                span belongs to that trace.
            timeout: In seconds.

        Raises:
            CapabilityUnknown: There is no such budget, or it is another's.
            Invalid: It is held by token: accept its capability, or recover it.
        """
        info = await self._find(path, timeout)
        if info.custody is not Custody.PRINCIPAL:
            raise Invalid(
                "the budget is held by token: accept its capability, or recover it", budget=path
            )
        target = Target(info.ref.root_id, info.ref.budget_id, by_token=False)
        line = Line(path, linear=False, handed=read_carrier(carrier))
        return Budget(self._sender, info.ref, target, line)

    async def accept(
        self,
        capability: Capability | str,
        *,
        carrier: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Budget:
        """Become the owner of a budget that was handed over: its token is renewed and bound.

        Args:
            capability: As it was received, or its text.
            carrier: The W3C trace context that came with it: what is asked of this handle outside of any
                span belongs to that trace. Absent: that of the capability itself.
            timeout: In seconds.

        Raises:
            Malformed: The text is not a capability's.
            CapabilityMoved: It was accepted here before.
            TokenConsumed: Somebody else accepted it, or its sender took it back.
            CapabilityUnknown: It is for somebody else, or for nothing.
        """
        if isinstance(capability, str):
            capability = Capability.parse(capability)
        secret = capability.take(caller())
        ref = capability.ref
        handed = read_carrier(capability.carrier if carrier is None else carrier)
        try:
            ticket = await self._resolved(
                ("accept", token_id(secret)),
                Line(str(ref), linear=True, secret=secret, handed=handed),
                requests.accept(Target(ref.root_id, ref.budget_id, by_token=True), _asked()),
                timeout,
            )
        except BaseException:
            capability.put_back()
            raise
        return Budget(
            self._sender, ref, Target(ref.root_id, ref.budget_id, by_token=True), ticket.line
        )

    def receiver(self) -> Receiver:
        """Make the secret of a budget that somebody else is to delegate to this client."""
        return Receiver()

    async def recover(
        self,
        budget: str | BudgetRef,
        *,
        carrier: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Budget:
        """Take a token-held budget back on its holder's word, whoever has its token now.

        The older token is fenced: its next use is `TokenConsumed`, with `fenced_by`. Holds that can
        still be settled are listed by `holds()`; `reattach()` gives handles of them.

        Args:
            budget: Its path, or its reference.
            carrier: As in `open`.
            timeout: In seconds.

        Raises:
            CapabilityUnknown: There is no such budget, or it is another's.
            NotTokenHeld: It is held by its principal: open it.
        """
        ref = budget if isinstance(budget, BudgetRef) else (await self._find(budget, timeout)).ref
        return await self._recover(ref, None, read_carrier(carrier), timeout)

    async def claim(
        self,
        budget: str | BudgetRef,
        *,
        if_held: IfHeld,
        idle: Seconds | None = None,
        carrier: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Budget:
        """Become the one who holds a token-held budget, for a job that a queue may deliver twice.

        A budget counts as held from the first use of its token on: its acceptance, a recovery, or any
        operation. Of any number who claim it at once with `SKIP`, one gets it.

        Args:
            budget: Its path, or its reference. This client's principal is its holder.
            if_held: `FENCE`: take it over, as `recover`; `SKIP`: leave it to whoever holds it.
            idle: With `SKIP`: it does not count as held any more when it has no live holds and nobody
                has used it for so many seconds, by the ledger's clock; absent: it does for ever.
            carrier: As in `open`.
            timeout: In seconds, for each call that it takes.

        Raises:
            BudgetHeld: Somebody holds it (with `SKIP`).
            BudgetClosed: The job is done: it was given back, or revoked.
            BudgetExpired: Its lease has ended.
            CapabilityUnknown: There is no such budget, or its holder is another.
            NotTokenHeld: It is held by its principal: open it.
        """
        looks = 1
        while True:
            found = await self._look(budget, timeout)
            info = codec.budget_info(found.budget, found.ledger)
            _check_open(info)
            fence = if_held is IfHeld.FENCE or ("recover", info.ref.budget_id) in self._unresolved
            if not fence and _is_held(found, idle):
                raise _held(found, info)
            try:
                if_seq = None if fence else info.seq
                return await self._recover(info.ref, if_seq, read_carrier(carrier), timeout)
            except BudgetChanged:
                if looks == _LOOKS_MAX:
                    raise
                looks += 1

    async def resume(self, *, timeout: float | None = None) -> Resumed:
        """Take over what the process before this one has left in the journal.

        What became of each operation whose outcome it did not know is found out first. None is
        done that was not done, but for a settle or release of a hold that is still there. Then
        there are handles for all that is live. Do this before anything else with those budgets.

        Args:
            timeout: In seconds, for each call that it takes.

        Raises:
            Invalid: The client has no journal.
            Unavailable: There was no answer. Nothing is lost: try again later.
        """
        journal = self._journal
        if journal is None:
            raise Invalid("the client has no journal: pass one to connect")
        left = journal.left
        lines: dict[Subject, Line] = {}
        for attempt in left.refused:
            self._sender.beware(_line_of(lines, journal, attempt), attempt.operation)
        for attempt in left.unknown:
            operation, line = attempt.operation, _line_of(lines, journal, attempt)
            if not journal.is_unknown(operation):
                # A call of this before has found it out.
                continue
            try:
                happened = await self._happened(line, operation, timeout)
            except CapabilityUnknown as error:
                _log.warning("what became of an operation is not told to this principal: %s", error)
                happened = True
                journal.ended(operation)
            if happened:
                continue
            if operation.must_finish:
                await self._end_late(journal, line, operation, timeout)
            elif operation.by_holder:
                journal.ended(operation)
                self._sender.beware(line, operation)
            else:
                journal.refused(operation)
                self._sender.beware(line, operation)
        resumed = await self._handles(journal, lines, timeout)
        journal.taken_over()
        return resumed

    async def _happened(self, line: Line, operation: Operation, timeout: float | None) -> bool:
        """Find out whether an operation is recorded, without doing it."""
        try:
            ticket = await self._sender.wait(self._sender.submit(line, operation.probe(), timeout))
        except CapabilityMoved:
            # An operation before it has left no token.
            return False
        except CapabilityUnknown:
            # Who is not the holder any more is told nothing; a token that consumed nothing did nothing.
            if operation.by_holder:
                raise
            return False
        except Refused:
            return False
        return _receipt(ticket).replayed

    async def _end_late(
        self, journal: Journal, line: Line, operation: Operation, timeout: float | None
    ) -> None:
        """Say what a call has cost whose process died before that was heard."""
        secret = line.secret
        try:
            await self._sender.wait(self._sender.submit(line, operation, timeout))
        except (CapabilityMoved, Refused) as error:
            _log.warning("a hold that a process has left was not ended: %s", error)
            if secret is not None:
                journal.forget(subject_of(operation), secret)

    async def _handles(
        self, journal: Journal, lines: dict[Subject, Line], timeout: float | None
    ) -> Resumed:
        """Make handles of all tokens that are live."""
        sender = self._sender
        budgets: list[Budget] = []
        holds: list[Hold] = []
        capabilities: list[Capability] = []
        for subject, token in journal.live():
            root_id, budget_id, hold_id = subject
            ref = journal.ref(subject, token)
            line = lines.get(subject) or Line(token.name, linear=True)
            line.secret = token.secret
            if token.capability:
                capabilities.append(_watched(sender.recorder, ref, token.secret, ""))
            elif not hold_id:
                budget = Budget(sender, ref, Target(root_id, budget_id, by_token=True), line)
                try:
                    await budget.info(timeout=timeout)
                except CapabilityUnknown:
                    # Somebody else has it, or it was given back.
                    journal.forget(subject, token.secret)
                else:
                    budgets.append(budget)
            elif token.info is not None:
                receipt = codec.receipt(types_pb2.Outcome.FromString(token.outcome))
                target = HoldTarget(root_id, token.info.budget_id, token.info.hold_id)
                holds.append(Hold(sender, target, line, receipt, (), info=token.info))
        return Resumed(tuple(budgets), tuple(holds), tuple(capabilities))

    async def _recover(
        self, ref: BudgetRef, if_seq: int | None, handed: str, timeout: float | None
    ) -> Budget:
        target = Target(ref.root_id, ref.budget_id, by_token=False)
        asked = requests.recover(target, _asked(), if_seq=if_seq)
        line = Line(str(ref), linear=False, handed=handed)
        ticket = await self._resolved(("recover", ref.budget_id), line, asked, timeout)
        by_token = Target(ref.root_id, ref.budget_id, by_token=True)
        return Budget(self._sender, ref, by_token, _own_line(ref, ticket, handed))

    async def _find(self, path: str, timeout: float | None) -> BudgetInfo:
        found = await self._look(path, timeout)
        return codec.budget_info(found.budget, found.ledger)

    async def _look(
        self, budget: str | BudgetRef, timeout: float | None
    ) -> ledger_service_pb2.LedgerServiceGetBudgetResponse:
        request = ledger_service_pb2.LedgerServiceGetBudgetRequest(
            budget=requests.budget_ref(budget), authority=requests.authority(None)
        )
        sender = self._sender
        return await sender.unary(sender.ledger.GetBudget, request, timeout, budget=str(budget))

    async def _resolved(
        self, key: tuple[str, bytes], line: Line, operation: Operation, timeout: float | None
    ) -> Ticket:
        """Have an operation done that makes a handle, or find out what became of it before."""
        ticket = self._unresolved.get(key)
        again = ticket is not None
        if ticket is None:
            ticket = self._unresolved[key] = self._sender.submit(line, operation, timeout)
        elif ticket.awaited:
            raise CapabilityMoved("this is being done at the same time", budget=line.name)
        try:
            if again:
                await self._sender.wait_again(ticket, timeout)
            else:
                await self._sender.wait(ticket)
        except (Refused, Invalid, LedgerUnavailable, DeadlineExceeded):
            self._unresolved.pop(key, None)
            raise
        self._unresolved.pop(key, None)
        return ticket


@dataclass(frozen=True, slots=True)
class Resumed:
    """What a process has left that can be gone on with.

    Attributes:
        budgets: Its token-held budgets.
        holds: Its holds that were not ended. Their calls may have been made.
        capabilities: Of budgets that it made and had not handed over.
    """

    budgets: tuple[Budget, ...]
    holds: tuple[Hold, ...]
    capabilities: tuple[Capability, ...]


class Budget(Handle):
    """The authority over one budget, in this object and nowhere else.

    Any number of tasks may use it at once: what they ask at the same time travels together, in order,
    and each gets its own answer.
    """

    def __init__(self, sender: Sender, ref: BudgetRef, target: Target, line: Line) -> None:
        super().__init__(sender.process, "budget")
        self._sender = sender
        self._ref = ref
        self._target = target
        self._line = line

    @property
    def ref(self) -> BudgetRef:
        """Which budget, without authority: can be copied, pickled, stored and logged."""
        return self._ref

    @property
    def _about(self) -> str:
        return str(self._ref)

    def __repr__(self) -> str:
        return f"<Budget {self._ref}>"

    # --- spending ---

    def reserve(
        self,
        amount: int,
        *,
        ttl: Seconds | None = None,
        labels: Mapping[str, str] | None = None,
        unbilled: Sequence[type[BaseException]] = (),
        wait: float | None = None,
        dry_run: bool = False,
        timeout: float | None = None,
    ) -> Pending[Hold]:
        """Set money aside for one call.

        Use the hold as a context manager, and settle it inside. Leaving without that by an
        exception listed in `unbilled` releases the hold; leaving in any other way spends all of it,
        since the call may have been billed.

        Args:
            amount: The most that the call can cost, at least 1, in the tree's unit.
            ttl: Until the hold becomes due to lapse, 1 second to 7 days; absent: 10 minutes. A hold
                that lapses is not refunded.
            labels: For attribution. The hold says them again when it is settled.
            unbilled: Exceptions that mean that the provider did not bill the call.
            wait: How many seconds to wait while holds of this very process could free enough.
            dry_run: Decide, but set nothing aside.
            timeout: In seconds; `wait` comes on top.

        Raises:
            BudgetExhausted: Less is available, with `available`, `held`, `requested` and `remedy`.
            BudgetClosed: It, or one above it, is closed; or expired or frozen (as named).
            TreeOverrun: The tree's root was billed beyond what it had.
            CapabilityMoved: The authority is not in this handle any more.
        """
        self._check()
        asked = _asked(labels, dry_run=dry_run)
        operation = requests.reserve(self._target, asked, amount=amount, ttl=ttl)
        return Pending(self._reserve(operation, dict(asked.labels), tuple(unbilled), timeout, wait))

    async def _reserve(
        self,
        operation: Operation,
        labels: Mapping[str, str],
        unbilled: tuple[type[BaseException], ...],
        timeout: float | None,
        wait: float | None,
    ) -> Hold:
        ticket = await self._sender.wait(self._sender.submit(self._line, operation, timeout, wait))
        # Not as it was asked first: a reserve that waited was made anew, with other secrets.
        made, outcome = _operation(ticket), _outcome(ticket)
        line = Line(self._line.name, linear=True, secret=made.hold_secret, handed=self._line.handed)
        target = HoldTarget(made.root_id, made.budget_id, made.hold_id)
        receipt = codec.receipt(outcome)
        return Hold(
            self._sender, target, line, receipt, unbilled, labels=labels, dry_run=outcome.dry_run
        )

    async def spend(
        self,
        amount: int,
        *,
        reference: str = "",
        usage: Usage | None = None,
        labels: Mapping[str, str] | None = None,
        dry_run: bool = False,
        timeout: float | None = None,
    ) -> Receipt:
        """Book a cost that was known before.

        Args:
            amount: At least 1, in the tree's unit; refused beyond what is available.
            reference: The provider's id of the call, up to 256 bytes.
            usage: What the provider reported.
            labels: For attribution.
            dry_run: Decide, but book nothing.
            timeout: In seconds.

        Raises:
            BudgetExhausted: Less is available.
        """
        asked = _asked(labels, dry_run=dry_run)
        return await self._do(
            requests.spend(self._target, asked, amount=amount, reference=reference, usage=usage),
            timeout,
        )

    # --- children ---

    async def delegate(
        self,
        children: Sequence[Child],
        *,
        labels: Mapping[str, str] | None = None,
        dry_run: bool = False,
        timeout: float | None = None,
    ) -> list[Delegated]:
        """Make child budgets, all or none, to be handed over.

        Args:
            children: 1 to 256.
            labels: Of the operation; a child's own labels are its own.
            dry_run: Decide, but make nothing.
            timeout: In seconds.

        Raises:
            BudgetExhausted: Less is available than the children get together.
            NameTaken: A child has or had one of the names.
        """
        self._check()
        asked = _asked(labels, dry_run=dry_run)
        operation = requests.delegate(self._target, asked, children=children)
        ticket = await self._sender.wait(self._sender.submit(self._line, operation, timeout))
        return _delegated(ticket, self._ref, self._sender.recorder)

    @asynccontextmanager
    async def delegate_here(
        self,
        amount: int,
        *,
        lease: Seconds | None = None,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        overrun_factor: int | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[Budget]:
        """Make a child budget for a part of this program, which gives back what is left at the end.

        If it was handed over or given back meanwhile, nothing is done at the end.

        Args:
            amount: What it gets, in the tree's unit.
            lease: How long it lives if this process dies; absent: as long as its parent.
            name: Unique among the children; absent: made up.
            labels: Labels that stay with the child.
            overrun_factor: How many times its amount a hold may bill beyond it.
            timeout: For making it and for giving it back, each in seconds.

        Raises:
            BudgetExhausted: Less is available.
        """
        child = Child(
            name or f"here-{new_id().hex()}",
            amount,
            lease=lease,
            labels=labels or {},
            overrun_factor=overrun_factor,
        )
        [made] = await self.delegate([child], timeout=timeout)
        target = Target(made.ref.root_id, made.ref.budget_id, by_token=True)
        secret = made.capability.take(caller())
        line = Line(str(made.ref), linear=True, secret=secret, handed=read_carrier(made.carrier))
        subject = made.ref.root_id, made.ref.budget_id, b""
        self._sender.recorder.keep(subject, secret, line.name, capability=False)
        budget = Budget(self._sender, made.ref, target, line)
        try:
            yield budget
        except Exception as original:
            try:
                if not budget.moved:
                    await budget.give_back(cascade=True, timeout=timeout)
            except PeculiumError as error:
                _note(original, error)
            raise
        except BaseException:
            if not budget.moved:
                # A cancellation goes on at once; the money goes back in the background.
                asked = requests.give_back(target, _asked(), amount=None, cascade=True)
                self._sender.detach(line, asked)
            raise
        if not budget.moved:
            await budget.give_back(cascade=True, timeout=timeout)

    async def fund(
        self,
        descendant: BudgetRef,
        amount: int,
        *,
        lease: Seconds | None = None,
        labels: Mapping[str, str] | None = None,
        dry_run: bool = False,
        timeout: float | None = None,
    ) -> Receipt:
        """Move more money to a budget below this one.

        Args:
            descendant: A child, or a budget further below.
            amount: In the tree's unit; 0 renews the lease only.
            lease: Its new lease, from now.
            labels: For attribution.
            dry_run: Decide, but move nothing.
            timeout: In seconds.

        Raises:
            BudgetExhausted: Less is available.
            DescendantUnknown: There is no such budget below this one.
        """
        return await self._do(
            requests.fund(
                self._target,
                _asked(labels, dry_run=dry_run),
                descendant_id=descendant.budget_id,
                amount=amount,
                lease=lease,
            ),
            timeout,
        )

    async def revoke(self, descendant: BudgetRef, *, timeout: float | None = None) -> Receipt:
        """Close a budget below this one, at once, with everything below it.

        Args:
            descendant: A child, or a budget further below.
            timeout: In seconds.

        Raises:
            DescendantUnknown: There is no such budget below this one.
        """
        operation = requests.revoke(self._target, _asked(), descendant_id=descendant.budget_id)
        return await self._do(operation, timeout)

    # --- the budget itself ---

    async def renew(self, lease: Seconds, *, timeout: float | None = None) -> Receipt:
        """Prolong the lease, at most up to the latest end that the parent set.

        Args:
            lease: From now.
            timeout: In seconds.

        Raises:
            BudgetExpired: It has ended.
        """
        return await self._do(requests.renew(self._target, _asked(), lease=lease), timeout)

    async def give_back(
        self, amount: int | None = None, *, cascade: bool = False, timeout: float | None = None
    ) -> Receipt:
        """Give money back to the parent; without an amount all of it, which closes the budget.

        Args:
            amount: At least 1, in the tree's unit; absent: everything.
            cascade: Close it also with live holds (they stay in flight) and open children.
            timeout: In seconds.

        Raises:
            LiveHolds: It has live holds.
            OpenChildren: It has an open child.
            NotForRoots: It has no parent.
        """
        operation = requests.give_back(self._target, _asked(), amount=amount, cascade=cascade)
        if amount is not None:
            return await self._do(operation, timeout)
        with self._moving("was given back"):
            return _receipt(
                await self._sender.wait(self._sender.submit(self._line, operation, timeout))
            )

    async def hand_over(self, *, timeout: float | None = None) -> Capability:
        """Move the authority out of this handle, to be sent to another process.

        Args:
            timeout: In seconds, for whatever is still on its way.

        Raises:
            NotTokenHeld: It is held by its principal, who needs no capability but its path.
        """
        if not self._target.by_token:
            raise NotTokenHeld(
                "the budget is held by its principal: nothing can be handed over, open it by its "
                "path instead",
                budget=self._about,
            )
        with self._moving("was handed over"):
            return await self._take_out(timeout)

    async def recover(self, *, timeout: float | None = None) -> Receipt:
        """Take the budget back on its holder's word, after its token was lost to somebody else.

        Args:
            timeout: In seconds.

        Raises:
            CapabilityUnknown: This client's principal is not its holder.
            NotTokenHeld: It is held by its principal and cannot be lost.
        """
        self._check()
        target = Target(self._ref.root_id, self._ref.budget_id, by_token=False)
        ticket = await self._sender.wait(
            self._sender.submit(
                Line(self._about, linear=False, handed=self._line.handed),
                requests.recover(target, _asked()),
                timeout,
            )
        )
        self._line = _own_line(self._ref, ticket, self._line.handed)
        return _receipt(ticket)

    async def resolve(
        self, hold_id: bytes, actual: int, reason: str, *, timeout: float | None = None
    ) -> Receipt:
        """Say what a hold of this budget has cost although its handle is lost.

        Args:
            hold_id: As `holds()` lists it; live or lapsed.
            actual: The total for the hold's whole life, in the tree's unit.
            reason: Why, 1 to 512 bytes.
            timeout: In seconds.

        Raises:
            HoldUnknown: The budget has no such hold.
            HoldEnded: It was settled or released; only an admin may resolve it now.
        """
        operation = requests.resolve(
            self._target, _asked(), hold_id=hold_id, actual=actual, reason=reason
        )
        return await self._do(operation, timeout)

    async def info(self, *, timeout: float | None = None) -> BudgetInfo:
        """Read the budget. Consumes nothing.

        Args:
            timeout: In seconds.
        """
        self._check()
        async with self._sender.section(self._line, timeout) as secret:
            request = ledger_service_pb2.LedgerServiceGetBudgetRequest(
                budget=self._named(), authority=self._proof(secret)
            )
            response = await self._sender.unary(
                self._sender.ledger.GetBudget, request, timeout, budget=self._about
            )
        found = codec.budget_info(response.budget, response.ledger)
        self._ref = found.ref
        self._line.name = str(found.ref)
        return found

    async def balances(self, *, timeout: float | None = None) -> Balances:
        """Read the budget's money. Consumes nothing.

        Args:
            timeout: In seconds.
        """
        return (await self.info(timeout=timeout)).balances

    async def holds(self, *, timeout: float | None = None) -> list[HoldInfo]:
        """List the holds that can still be settled or resolved, the oldest first.

        Args:
            timeout: For each page of a thousand, in seconds.
        """
        self._check()
        found: list[HoldInfo] = []
        async with self._sender.section(self._line, timeout) as secret:
            request = ledger_service_pb2.ListHoldsRequest(
                budget=self._named(), authority=self._proof(secret), page_size=PAGE_SIZE_MAX
            )
            while True:
                page = await self._sender.unary(
                    self._sender.ledger.ListHolds, request, timeout, budget=self._about
                )
                found.extend(codec.hold_info(hold) for hold in page.holds)
                if not page.next_page_token:
                    return found
                request.page_token = page.next_page_token

    async def reattach(
        self,
        holds: Iterable[HoldInfo] | None = None,
        *,
        unbilled: Sequence[type[BaseException]] = (),
        timeout: float | None = None,
    ) -> list[Hold]:
        """Get handles of holds whose own are lost, for example with the process that had them.

        Each hold gets a new token: whoever has an older handle of it is fenced, so do this before
        reserving from this handle. Those that are ended meanwhile by their older handles are left
        out. Settle or release each; what nobody knows anything of is best left to lapse.

        Args:
            holds: As `holds()` lists them; absent: all that can still be settled.
            unbilled: As in `reserve`, for each of them.
            timeout: In seconds, for each call that it takes.

        Raises:
            NotTokenHeld: The budget is held by its principal: `resolve` ends its holds without handles.
            CapabilityUnknown: This client's principal is not the budget's holder.
            HoldUnknown: The budget has no such hold.
        """
        self._check()
        if not self._target.by_token:
            raise NotTokenHeld(
                "the budget is held by its principal: its holds are ended by `resolve`, without handles",
                budget=self._about,
            )
        left = await self.holds(timeout=timeout) if holds is None else list(holds)
        made: list[Hold] = []
        while left:
            part = left[:ROTATIONS_MAX]
            try:
                made += await self._rotated(part, tuple(unbilled), timeout)
            except HoldEnded:
                # By its older handle, meanwhile. The rest gets fewer, and never more.
                ids = {hold.hold_id for hold in left}
                left = [hold for hold in await self.holds(timeout=timeout) if hold.hold_id in ids]
            else:
                left = left[ROTATIONS_MAX:]
        return made

    async def _rotated(
        self,
        holds: list[HoldInfo],
        unbilled: tuple[type[BaseException], ...],
        timeout: float | None,
    ) -> list[Hold]:
        rotated = [Rotated(hold, new_secret()) for hold in holds]
        target = Target(self._ref.root_id, self._ref.budget_id, by_token=False)
        receipt = await self._do(requests.recover(target, _asked(), holds=rotated), timeout)
        made = []
        for hold, secret in rotated:
            line = Line(self._about, linear=True, secret=secret, handed=self._line.handed)
            held = HoldTarget(self._ref.root_id, hold.budget_id, hold.hold_id)
            made.append(Hold(self._sender, held, line, receipt, unbilled, info=hold))
        return made

    async def _take_out(self, timeout: float | None) -> Capability:
        async with self._sender.section(self._line, timeout) as secret:
            if secret is None:
                raise _closed(self._about)
            self._line.secret = None
        recorder, ref = self._sender.recorder, self._ref
        recorder.keep((ref.root_id, ref.budget_id, b""), secret, str(ref), capability=True)
        return _watched(recorder, ref, secret, traceparent() or self._line.handed)

    async def _do(self, operation: Operation, timeout: float | None) -> Receipt:
        self._check()
        return _receipt(
            await self._sender.wait(self._sender.submit(self._line, operation, timeout))
        )

    def _named(self) -> types_pb2.BudgetRef:
        return types_pb2.BudgetRef(root_id=self._ref.root_id, budget_id=self._ref.budget_id)

    def _proof(self, secret: bytes | None) -> types_pb2.Authority:
        if self._target.by_token and secret is None:
            raise _closed(self._about)
        return requests.authority(secret)


class Hold(Handle):
    """Money set aside for one call, and the only right to settle it.

    Attributes:
        receipt: What the reservation did, or the recovery that gave it a handle again.
    """

    def __init__(
        self,
        sender: Sender,
        target: HoldTarget,
        line: Line,
        receipt: Receipt,
        unbilled: tuple[type[BaseException], ...],
        *,
        labels: Mapping[str, str] | None = None,
        info: HoldInfo | None = None,
        dry_run: bool = False,
    ) -> None:
        super().__init__(sender.process, "hold")
        self._sender = sender
        self._target = target
        self._line = line
        self._unbilled = unbilled
        self._labels = labels
        """Those of its reservation. What a call has cost is attributed by what its settle says."""
        self._end: Ticket | None = None
        """The settle or release whose outcome is not known here yet."""
        self._info = info
        """As it was found; None: as the receipt of its reservation says."""
        self.receipt = receipt
        if dry_run:
            self._moved = "was a dry run: nothing is set aside"

    async def __aenter__(self) -> Self:
        """Enter; the hold is made already."""
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the hold if nobody did: released if surely not billed, otherwise spent whole."""
        if self._moved is not None:
            return
        released = exc is not None and isinstance(exc, self._unbilled)
        operation = (
            requests.release(self._target, _asked())
            if released
            else self._settling(None, "", None, estimated=True)
        )
        how = "was released" if released else "was spent whole"
        if exc is not None and not isinstance(exc, Exception):
            # A cancellation goes on at once; the hold is ended in the background.
            self._moved = f"{how} on {type(exc).__name__}"
            self._sender.detach(self._line, operation)
            return
        try:
            await self._finish(operation, how, None)
        except PeculiumError as error:
            if exc is None:
                raise
            _note(exc, error)

    @property
    def info(self) -> HoldInfo:
        """As it was reserved, or found."""
        info = self._info or self.receipt.hold
        if info is None:
            raise AssertionError("a reservation has a hold")
        return info

    @property
    def hold_id(self) -> bytes:
        """Its id, 16 bytes."""
        return self._target.hold_id

    @property
    def amount(self) -> int:
        """As reserved, in the tree's unit."""
        return self.info.amount

    @property
    def _about(self) -> str:
        return self._line.name

    def __repr__(self) -> str:
        return f"<Hold {id_text(self.hold_id)} of {self._about}>"

    async def settle(
        self,
        actual: int | None = None,
        *,
        reference: str = "",
        usage: Usage | None = None,
        estimated: bool = False,
        keep_open: bool = False,
        labels: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Receipt:
        """Book what the call has cost. What is left flows back; more than was held is booked too.

        Args:
            actual: In the tree's unit; absent: all that the hold has left. With `keep_open`: since
                the last settle.
            reference: The provider's id of the call, up to 256 bytes, for reconciliation.
            usage: What the provider reported.
            estimated: The provider reported nothing; `actual` is this program's own estimate.
            keep_open: The call goes on (streaming). An increment beyond what the hold has left is
                booked and ends the hold.
            labels: For attribution; absent: those that it was reserved with, in this process.
            timeout: In seconds.

        Raises:
            CapabilityMoved: It was settled or released.
            TokenConsumed: An admin, or the budget's owner, resolved it.
        """
        operation = self._settling(
            actual, reference, usage, keep_open=keep_open, estimated=estimated, labels=labels
        )
        if keep_open:
            return await self._go_on(operation, timeout)
        return await self._finish(operation, "was settled", timeout)

    async def release(self, *, timeout: float | None = None) -> Receipt:
        """End the hold of a call that was surely not billed: everything flows back.

        Args:
            timeout: In seconds.

        Raises:
            CapabilityMoved: It was settled or released.
        """
        operation = requests.release(self._target, _asked())
        return await self._finish(operation, "was released", timeout)

    async def extend(self, ttl: Seconds, *, timeout: float | None = None) -> Receipt:
        """Give the hold more time.

        Args:
            ttl: From now; at most until it is 7 days old.
            timeout: In seconds.

        Raises:
            HoldLapsed: Its time was over before.
        """
        return await self._go_on(requests.extend(self._target, _asked(), ttl=ttl), timeout)

    def _settling(
        self,
        actual: int | None,
        reference: str,
        usage: Usage | None,
        *,
        keep_open: bool = False,
        estimated: bool,
        labels: Mapping[str, str] | None = None,
    ) -> Operation:
        return requests.settle(
            self._target,
            _asked(self._labels if labels is None else labels),
            actual=actual,
            keep_open=keep_open,
            reference=reference,
            usage=usage,
            estimated=estimated,
        )

    async def _go_on(self, operation: Operation, timeout: float | None) -> Receipt:
        """Do what leaves the hold open."""
        self._check()
        ticket = await self._sender.wait(self._sender.submit(self._line, operation, timeout))
        if self._line.secret is None:
            self._moved = f"was ended at {caller()} by an increment beyond what it had left"
        return _receipt(ticket)

    async def _finish(self, operation: Operation, how: str, timeout: float | None) -> Receipt:
        """Do what ends the hold; or find out whether that happened before."""
        earlier = self._end
        if earlier is not None and not earlier.awaited:
            return await self._finish_again(earlier, operation, how, timeout)
        self._move(how)
        self._end = self._sender.submit(self._line, operation, timeout)
        return await self._finished(self._end, timeout, again=False)

    async def _finish_again(
        self, earlier: Ticket, operation: Operation, how: str, timeout: float | None
    ) -> Receipt:
        """Find out what became of an earlier attempt to end the hold."""
        self._process.check(self._name)
        same = _operation(earlier).asks_the_same(operation)
        try:
            receipt = await self._finished(earlier, timeout, again=True)
        except OutcomeUnknown:
            raise
        except PeculiumError:
            if same:
                raise
            return await self._finish(operation, how, timeout)
        if not same:
            self._check()
        return receipt

    async def _finished(self, ticket: Ticket, timeout: float | None, *, again: bool) -> Receipt:
        try:
            if again:
                await self._sender.wait_again(ticket, timeout)
            else:
                await self._sender.wait(ticket)
        except (Refused, Invalid, LedgerUnavailable, DeadlineExceeded):
            # Nothing was done: the hold is what it was.
            self._end = self._moved = None
            raise
        self._end = None
        return _receipt(ticket)


class Admin:
    """What operators may do. Budgets are named by path or reference.

    Attributes:
        keys: API keys: who may call.
    """

    def __init__(self, sender: Sender, audit: Audit) -> None:
        self.keys = Keys(sender)
        self._sender = sender
        self._audit = audit

    async def grant(
        self,
        name: str,
        *,
        unit: str,
        amount: int,
        holder: str | None = None,
        receiver: Receiver | bytes | None = None,
        token: bool = False,
        labels: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Delegated:
        """Make a root.

        How it is held: with `holder` alone by that principal, who opens it by its name; otherwise by
        a token, whose secret is the receiver's or made here and handed over as `.capability`. With
        `holder` and a token (`receiver`, or `token=True`) only that principal may use the token.

        Args:
            name: Unique among the ledger's roots: 1 to 128 bytes without "/".
            unit: What is counted in the tree, for example "usd_nanos".
            amount: Put in, in that unit.
            holder: A principal.
            receiver: A `Receiver`, or the token id that it showed.
            token: Held by token although a holder is named.
            labels: Labels that stay with the root.
            timeout: In seconds.

        Raises:
            NameTaken: A root has or had the name.
            PermissionDenied: The caller is no admin.
        """
        asked = requests.grant(
            _asked(labels),
            name=name,
            unit=unit,
            amount=amount,
            holder=holder,
            receiver=receiver,
            token=token,
        )
        header = asked.request.header
        ref = BudgetRef(name, header.root_id, header.budget_id)
        receipt = await self._do(self._sender.admin.Grant, asked.request, ref, timeout)
        context = header.traceparent
        capability = _capability(ref, asked.secret, context)
        return Delegated(ref, name, amount, None, receipt, capability, carrier=carrier_of(context))

    async def top_up(
        self, budget: str | BudgetRef, amount: int, *, timeout: float | None = None
    ) -> Receipt:
        """Put more into a root; repays its overrun first.

        Args:
            budget: The root.
            amount: At least 1, in the tree's unit.
            timeout: In seconds.

        Raises:
            OnlyForRoots: It is no root.
        """
        ref = await self._locate(budget, timeout)
        request = requests.top_up(_target(ref), _asked(), amount=amount)
        return await self._do(self._sender.admin.TopUp, request, ref, timeout)

    async def withdraw(
        self, budget: str | BudgetRef, amount: int, *, timeout: float | None = None
    ) -> Receipt:
        """Take out of a root what is available.

        Args:
            budget: The root.
            amount: At least 1, in the tree's unit.
            timeout: In seconds.

        Raises:
            BudgetExhausted: Less is available.
            OnlyForRoots: It is no root.
        """
        ref = await self._locate(budget, timeout)
        request = requests.withdraw(_target(ref), _asked(), amount=amount)
        return await self._do(self._sender.admin.Withdraw, request, ref, timeout)

    async def freeze(
        self, budget: str | BudgetRef, reason: str = "", *, timeout: float | None = None
    ) -> Receipt:
        """Block new spending in a budget and everything below; calls in flight end as usual.

        Args:
            budget: Any budget.
            reason: Why, up to 512 bytes.
            timeout: In seconds.
        """
        ref = await self._locate(budget, timeout)
        request = requests.freeze(_target(ref), _asked(), reason=reason)
        return await self._do(self._sender.admin.Freeze, request, ref, timeout)

    async def unfreeze(
        self, budget: str | BudgetRef, reason: str = "", *, timeout: float | None = None
    ) -> Receipt:
        """Clear the flag that `freeze` set; a dispute still freezes.

        Args:
            budget: Any budget.
            reason: Why, up to 512 bytes.
            timeout: In seconds.
        """
        ref = await self._locate(budget, timeout)
        request = requests.unfreeze(_target(ref), _asked(), reason=reason)
        return await self._do(self._sender.admin.Unfreeze, request, ref, timeout)

    async def recover(
        self,
        budget: str | BudgetRef,
        *,
        holder: str | None = None,
        receiver: Receiver | bytes | None = None,
        token: bool = False,
        timeout: float | None = None,
    ) -> Delegated:
        """Give any budget a new token, holder or custody; what it had is fenced.

        Args:
            budget: Any budget.
            holder: As in `grant`.
            receiver: As in `grant`.
            token: As in `grant`.
            timeout: In seconds.
        """
        ref = await self._locate(budget, timeout)
        asked = requests.admin_recover(
            _target(ref), _asked(), holder=holder, receiver=receiver, token=token
        )
        receipt = await self._do(self._sender.admin.Recover, asked.request, ref, timeout)
        name = ref.path.rpartition("/")[2]
        granted = receipt.balances.granted
        context = asked.request.header.traceparent
        capability = _capability(ref, asked.secret, context)
        return Delegated(
            *(ref, name, granted, receipt.lease_expires_at, receipt, capability),
            carrier=carrier_of(context),
        )

    async def resolve(
        self,
        budget: str | BudgetRef,
        hold_id: bytes,
        actual: int,
        reason: str,
        *,
        timeout: float | None = None,
    ) -> Receipt:
        """Say what any hold has cost, also one that was settled or is disputed.

        Args:
            budget: The budget that it was reserved from.
            hold_id: Which hold.
            actual: The total for the hold's whole life, in the tree's unit.
            reason: Why, 1 to 512 bytes.
            timeout: In seconds.

        Raises:
            HoldUnknown: The budget has no such hold.
        """
        ref = await self._locate(budget, timeout)
        request = requests.admin_resolve(
            _target(ref), _asked(), hold_id=hold_id, actual=actual, reason=reason
        )
        return await self._do(self._sender.admin.Resolve, request, ref, timeout)

    async def _do(
        self,
        method: UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        ref: BudgetRef,
        timeout: float | None,
    ) -> Receipt:
        response = await self._sender.unary(
            method,
            request,
            timeout,
            budget=str(ref),
            operation_id=id_text(request.header.operation_id),
        )
        return codec.receipt(response.outcome)

    async def _locate(self, budget: str | BudgetRef, timeout: float | None) -> BudgetRef:
        if isinstance(budget, BudgetRef):
            return budget
        return (await self._audit.budget(budget, timeout=timeout)).ref


def _asked(labels: Mapping[str, str] | None = None, *, dry_run: bool = False) -> Asked:
    return Asked(labels or {}, dry_run, traceparent())


def _operation(ticket: Ticket) -> Operation:
    if ticket.operation is None:
        raise AssertionError("a section has no operation")
    return ticket.operation


def _outcome(ticket: Ticket) -> types_pb2.Outcome:
    if ticket.outcome is None:
        raise AssertionError("an operation that was waited for has its outcome")
    return ticket.outcome


def _receipt(ticket: Ticket) -> Receipt:
    return codec.receipt(_outcome(ticket))


def _own_line(ref: BudgetRef, ticket: Ticket, handed: str) -> Line:
    return Line(str(ref), linear=True, secret=_operation(ticket).produced, handed=handed)


def _capability(ref: BudgetRef, secret: bytes | None, context: str) -> Capability | None:
    if secret is None:
        return None
    return Capability(
        root_id=ref.root_id,
        budget_id=ref.budget_id,
        secret=secret,
        path=ref.path,
        carrier=carrier_of(context),
    )


def _watched(recorder: Recorder, ref: BudgetRef, secret: bytes, context: str) -> Capability:
    """A capability whose leaving is told to the recorder."""
    subject = ref.root_id, ref.budget_id, b""
    return Capability(
        root_id=ref.root_id,
        budget_id=ref.budget_id,
        secret=secret,
        path=ref.path,
        left=lambda: recorder.leave(subject, secret),
        carrier=carrier_of(context),
    )


def _line_of(lines: dict[Subject, Line], journal: Journal, attempt: Attempt) -> Line:
    """The line of an operation that a process has left: one for each token, others for themselves."""
    operation, subject = attempt.operation, subject_of(attempt.operation)
    if operation.by_holder:
        return Line(attempt.name, linear=False)
    token = journal.token(subject)
    line = lines.setdefault(subject, Line(attempt.name, linear=True))
    line.secret = None if token is None else token.secret
    return line


def _delegated(ticket: Ticket, parent: BudgetRef, recorder: Recorder) -> list[Delegated]:
    receipt = _receipt(ticket)
    outcomes = (
        {}
        if ticket.outcome is None
        else {child.budget_id: child for child in ticket.outcome.children}
    )
    made = []
    context = _operation(ticket).header.traceparent
    for child in _operation(ticket).children:
        path = f"{parent.path}/{child.name}" if parent.path else ""
        ref = BudgetRef(path, parent.root_id, child.budget_id)
        outcome = outcomes[child.budget_id]
        expires_at = (
            codec.at(outcome.lease_expires_at) if outcome.HasField("lease_expires_at") else None
        )
        capability = None
        if child.secret is not None and not receipt.dry_run:
            capability = _watched(recorder, ref, child.secret, context)
        made.append(
            Delegated(
                *(ref, child.name, outcome.granted, expires_at, receipt, capability),
                carrier=carrier_of(context),
            )
        )
    return made


def _target(ref: BudgetRef) -> Target:
    return Target(ref.root_id, ref.budget_id, by_token=False)


def _check_open(info: BudgetInfo) -> None:
    if info.state is BudgetState.CLOSED:
        raise BudgetClosed("the budget, or one above it, is closed", budget=info.path)
    if info.state is BudgetState.EXPIRED:
        raise BudgetExpired(
            "the lease of the budget, or of one above it, has ended", budget=info.path
        )


def _is_held(
    found: ledger_service_pb2.LedgerServiceGetBudgetResponse, idle: Seconds | None
) -> bool:
    if not found.HasField("token_used_at"):
        return False
    if idle is None or found.budget.holds_live:
        return True
    length = idle if isinstance(idle, timedelta) else timedelta(seconds=idle)
    return codec.at(found.at) - codec.at(found.token_used_at) < length


def _held(found: ledger_service_pb2.LedgerServiceGetBudgetResponse, info: BudgetInfo) -> BudgetHeld:
    facts = {
        "used_at": codec.at(found.token_used_at).isoformat(),
        "holds_live": str(info.holds_live),
    }
    return BudgetHeld("somebody else holds the budget", budget=info.path, facts=facts)


def _closed(budget: str) -> CapabilityMoved:
    return CapabilityMoved("the budget was given back", budget=budget)


def _note(original: BaseException, secondary: PeculiumError) -> None:
    """Keep a failure of leaving a block from hiding why it was left."""
    original.add_note(f"peculium: {type(secondary).__name__}: {secondary}")
    _log.warning("on the way out of a block: %s", secondary)

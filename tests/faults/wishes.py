"""What clients may want, at random: any kind of operation, on what they believe to be there.

Several clients share what they know, and so use the same tokens; answers may be late or missing. What
they believe is therefore often wrong, which is the point: the ledger has to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from peculium._ids import new_id, new_secret, token_id
from peculium.v1 import admin_service_pb2 as admin, ledger_service_pb2 as ledger, types_pb2
from tests.faults.checks import Refusal
from tests.faults.sending import PRINCIPAL, Answer
from tests.system.wire import HOLDER, header

GRANTED = 100_000
_CANDIDATES_MAX = 4
_STRANGERS_MAX = 20
_GONE = {"TOKEN_CONSUMED", "CAPABILITY_UNKNOWN"}
_HOLDS_MAX = 100
_CHILDREN_MAX = 100
_PURSES_MAX = 24
"""Of one client, and of all in common: enough to choose from."""


@dataclass(eq=False)
class KnownHold:
    """A hold that somebody believes in."""

    purse: Purse
    id: bytes
    amount: int
    secrets: list[bytes] = field(repr=False)
    """One of them is live, perhaps."""
    disputed: bool = False


@dataclass(eq=False)
class Purse:
    """A budget that somebody believes in."""

    root_id: bytes
    id: bytes
    parent: Purse | None
    by_token: bool
    secrets: list[bytes] = field(default_factory=list, repr=False)
    """One of them is live, perhaps."""
    closed: bool = False
    frozen: bool = False
    leased: bool = False
    strangers: int = 0
    """How often in a row nobody knew the token."""
    holds: list[KnownHold] = field(default_factory=list)
    children: list[Purse] = field(default_factory=list)

    @property
    def depth(self) -> int:
        return 1 if self.parent is None else self.parent.depth + 1


@dataclass
class Wish:
    """One operation that somebody wants, and what they believe if it is granted."""

    request: Message
    purse: Purse
    presented: bytes | None = field(default=None, repr=False)
    """The secret of the purse, or of the hold if there is one."""
    following: bytes | None = field(default=None, repr=False)
    """That which takes its place."""
    hold: KnownHold | None = None
    made: list[Purse] = field(default_factory=list)
    makers: list[Purse] | None = None
    """What its client has to itself, and gets more of."""
    held: KnownHold | None = None
    """A hold that it makes."""
    also: Callable[[], None] | None = None
    """What else is so when it was done."""

    def answered(self, answer: Answer) -> None:
        """Take over what was told, or that nothing was."""
        secrets = self.hold.secrets if self.hold is not None else self.purse.secrets
        if isinstance(answer, Refusal):
            self._refused(answer, secrets)
            return
        if isinstance(answer, types_pb2.Outcome):
            if answer.dry_run:
                return
            secrets.clear()
            self.purse.strangers = 0
            self._learn(answer)
        if self.following is not None:
            secrets.append(self.following)
            del secrets[:-_CANDIDATES_MAX]
        # Also of what may not be there: whoever uses it will be told.
        for purse in self.made:
            if purse.parent is not None and purse not in purse.parent.children:
                purse.parent.children.append(purse)
                del purse.parent.children[:-_CHILDREN_MAX]
                if self.makers is not None:
                    self.makers.append(purse)
        if self.held is not None and self.held not in self.purse.holds:
            self.purse.holds.append(self.held)
            # The oldest are left to lapse.
            del self.purse.holds[:-_HOLDS_MAX]

    def _learn(self, outcome: types_pb2.Outcome) -> None:
        if self.also is not None:
            self.also()
        hold = self.hold
        if hold is not None and outcome.HasField("hold"):
            state = outcome.hold.state
            hold.disputed = state == types_pb2.HOLD_STATE_DISPUTED
            over = {types_pb2.HOLD_STATE_SETTLED, types_pb2.HOLD_STATE_RELEASED}
            if state in over and hold in self.purse.holds:
                self.purse.holds.remove(hold)

    def _refused(self, refusal: Refusal, secrets: list[bytes]) -> None:
        if refusal.reason in _GONE and self.presented in secrets:
            secrets.remove(self.presented)
        if refusal.reason in _GONE and self.hold is not None and not secrets:
            self._forget_hold()
        if refusal.reason in _GONE and self.hold is None:
            self.purse.strangers += 1
            # Its custody was changed, or it never came to be.
            self.purse.by_token = True
            self.purse.closed = self.purse.closed or self.purse.strangers > _STRANGERS_MAX
        if refusal.reason in {"BUDGET_CLOSED", "BUDGET_UNKNOWN"}:
            self.purse.closed = True
        if refusal.reason == "BUDGET_FROZEN":
            self.purse.frozen = True

    def _forget_hold(self) -> None:
        hold = self.hold
        if hold is not None and hold in self.purse.holds and not hold.disputed:
            self.purse.holds.remove(hold)


ALL_KINDS: Mapping[str, int] = {
    "grant": 1,
    "top_up": 3,
    "withdraw": 2,
    "reserve": 26,
    "settle": 14,
    "keep_open": 7,
    "release": 5,
    "extend": 4,
    "spend": 12,
    "delegate": 6,
    "accept": 3,
    "recover": 3,
    "admin_recover": 2,
    "fund": 5,
    "renew": 3,
    "give_back": 4,
    "return_all": 2,
    "revoke": 2,
    "resolve": 3,
    "admin_resolve": 3,
    "freeze": 1,
    "unfreeze": 4,
}
"""Every kind that clients and administrators can ask for, and how often they do."""

MOVES: Mapping[str, int] = {
    "reserve": 20,
    "settle": 14,
    "release": 6,
    "delegate": 2,
    "fund": 10,
    "give_back": 10,
}
"""What moves money within a tree only."""


class Wisher:
    """Makes wishes for one client."""

    def __init__(
        self,
        chance: Random,
        shared: list[Purse],
        kinds: Mapping[str, int],
        *,
        dry_runs: bool = True,
    ) -> None:
        self.own: list[Purse] = []
        self.shared_chance = 0.4
        """How often it uses what all share."""
        self._chance = chance
        self._shared = shared
        self._kinds = list(kinds)
        self._weights = list(kinds.values())
        self._dry_runs = dry_runs

    def wish(self) -> Wish:
        """One operation."""
        for _ in range(8):
            kind = self._chance.choices(self._kinds, self._weights)[0]
            made: Wish | None = getattr(self, f"_{kind}")()
            if made is not None:
                if self._dry_runs and self._chance.random() < 0.04:
                    self._header(made).dry_run = True
                return made
        return self._grant()

    def chain(self, length: int, first: int = 0) -> list[Wish]:
        """Operations on one purse, each after the one before; the first one presents a secret.

        `first` is its index in the batch.

        What they make is known when they are answered, and so they only use what was there, and the
        holds that they make themselves.
        """
        purse = self._purse(by_token=True)
        if purse is None:
            return []
        # What the chain presents and produces is not the purse's own until it is answered.
        secret = self._chance.choice(purse.secrets)
        wishes: list[Wish] = []
        before: int | None = None
        for _ in range(length):
            reserved = [
                (index, wish.held) for index, wish in enumerate(wishes) if wish.held is not None
            ]
            if reserved and self._chance.random() < 0.3:
                index, hold = self._chance.choice(reserved)
                wishes.append(self._settled_after(purse, hold, first + index))
                continue
            make = self._chance.choice(
                (self._reserve, self._spend, self._delegate, self._give_back)
            )
            wish = make(purse)
            if wish is None:
                continue
            head = self._header(wish)
            if before is None:
                head.authority.secret = secret
                wish.presented = secret
            else:
                head.authority.after = first + before
                wish.presented = wishes[before].following
            before = len(wishes)
            wishes.append(wish)
        return wishes

    def _settled_after(self, purse: Purse, hold: KnownHold, index: int) -> Wish:
        after = types_pb2.Authority(after=index)
        request = ledger.SettleRequest(
            header=header(purse.root_id, purse.id, after),
            hold_id=hold.id,
            actual=self._chance.randint(0, hold.amount),
        )
        return Wish(request, purse, presented=hold.secrets[0], hold=hold)

    # -- What there is to choose from -----------------------------------------------------------------

    @property
    def _purses(self) -> list[Purse]:
        shared = self._shared if self._chance.random() < self.shared_chance else self.own
        del self.own[:-_PURSES_MAX]
        return [purse for purse in shared or self._shared if not purse.closed]

    def _purse(self, *, by_token: bool | None = None, root: bool | None = None) -> Purse | None:
        found = [
            purse
            for purse in self._purses
            if (by_token is None or purse.by_token is by_token)
            and (root is None or (purse.parent is None) is root)
            and (purse.secrets or not purse.by_token)
        ]
        return self._chance.choice(found) if found else None

    def _hold(self) -> KnownHold | None:
        holds = [hold for purse in self._purses for hold in purse.holds if hold.secrets]
        return self._chance.choice(holds) if holds else None

    def _family(self) -> tuple[Purse, Purse] | None:
        """A purse, and one below it."""
        found = [
            purse
            for purse in self._purses
            if purse.children and (purse.secrets or not purse.by_token)
        ]
        if not found:
            return None
        purse = self._chance.choice(found)
        below = self._chance.choice(purse.children)
        if below.children and self._chance.random() < 0.4:
            below = self._chance.choice(below.children)
        return purse, below

    def _amount(self) -> int:
        return self._chance.choice(
            (1, self._chance.randint(1, 300), self._chance.randint(1, 5_000))
        )

    def _seconds(self, rarely_short: float, long: int) -> Duration:
        short = self._chance.random() < rarely_short
        return Duration(seconds=self._chance.randint(1, 3) if short else long)

    # -- Requests ---------------------------------------------------------------------------------------

    @staticmethod
    def _header(wish: Wish) -> types_pb2.OperationHeader:
        found: types_pb2.OperationHeader = wish.request.header  # type: ignore[attr-defined]
        return found

    def _by(self, purse: Purse, message: Message) -> Wish:
        """A wish by the purse's own authority, which the message has not got yet."""
        wish = Wish(message, purse)
        proof = HOLDER
        if purse.by_token:
            wish.presented = self._chance.choice(purse.secrets) if purse.secrets else new_secret()
            wish.following = new_secret()
            message.next_token_id = token_id(wish.following)  # type: ignore[attr-defined]
            proof = types_pb2.Authority(secret=wish.presented)
        self._header(wish).CopyFrom(header(purse.root_id, purse.id, proof))
        return wish

    def _grant(self) -> Wish:
        root_id = new_id()
        by_token = self._chance.random() < 0.6
        purse = Purse(root_id, root_id, None, by_token)
        if by_token:
            purse.secrets.append(new_secret())
        self.own.append(purse)
        request = admin.GrantRequest(
            header=header(root_id, root_id),
            name=f"root-{root_id.hex()}",
            unit="calls",
            amount=self._chance.choice((0, GRANTED)),
            token_id=token_id(purse.secrets[0]) if by_token else b"",
            holder="" if by_token and self._chance.random() < 0.5 else PRINCIPAL,
        )
        # Its first secret stays what it is: nothing was there to be replaced.
        return Wish(request, purse, following=purse.secrets[0] if by_token else None)

    def _top_up(self) -> Wish | None:
        return self._administered(
            lambda head: admin.TopUpRequest(header=head, amount=self._amount()), root=True
        )

    def _withdraw(self) -> Wish | None:
        return self._administered(
            lambda head: admin.WithdrawRequest(header=head, amount=self._amount()), root=True
        )

    def _freeze(self) -> Wish | None:
        return self._administered(lambda head: admin.FreezeRequest(header=head), frozen=True)

    def _unfreeze(self) -> Wish | None:
        purses = [purse for purse in self._purses if purse.frozen] or self._purses
        purse = self._chance.choice(purses) if purses else None
        return self._administered(
            lambda head: admin.UnfreezeRequest(header=head), frozen=False, purse=purse
        )

    def _administered(
        self,
        make: Callable[[types_pb2.OperationHeader], Message],
        *,
        root: bool | None = None,
        frozen: bool | None = None,
        purse: Purse | None = None,
    ) -> Wish | None:
        purse = purse or self._purse(root=root)
        if purse is None:
            return None
        chosen = purse
        wish = Wish(make(header(chosen.root_id, chosen.id)), chosen)
        # Its token stays what it is.
        wish.also = lambda: None
        wish.purse = Purse(chosen.root_id, chosen.id, chosen.parent, by_token=False)
        if frozen is not None:
            wish.also = lambda: setattr(chosen, "frozen", frozen)
        return wish

    def _reserve(self, purse: Purse | None = None) -> Wish | None:
        purse = purse or self._purse()
        if purse is None:
            return None
        secret = new_secret()
        amount = self._amount()
        hold = KnownHold(purse, new_id(), amount, [secret])
        wish = self._by(
            purse,
            ledger.ReserveRequest(
                amount=amount,
                ttl=self._seconds(0.3, 600),
                hold_id=hold.id,
                hold_token_id=token_id(secret),
            ),
        )
        wish.held = hold
        return wish

    def _spend(self, purse: Purse | None = None) -> Wish | None:
        purse = purse or self._purse()
        return (
            None
            if purse is None
            else self._by(purse, ledger.SpendRequest(amount=self._amount(), reference="r"))
        )

    def _of_hold(
        self, make: Callable[[types_pb2.OperationHeader, KnownHold], Message], *, rotates: bool
    ) -> Wish | None:
        hold = self._hold()
        if hold is None:
            return None
        secret = self._chance.choice(hold.secrets)
        proof = types_pb2.Authority(secret=secret)
        request = make(header(hold.purse.root_id, hold.purse.id, proof), hold)
        wish = Wish(request, hold.purse, presented=secret, hold=hold)
        if rotates:
            wish.following = new_secret()
            request.next_hold_token_id = token_id(wish.following)  # type: ignore[attr-defined]
        return wish

    def _settle(self) -> Wish | None:
        def make(head: types_pb2.OperationHeader, hold: KnownHold) -> Message:
            # Rarely far beyond what was held: overrun, or a dispute.
            actual = self._chance.choice(
                (hold.amount, self._chance.randint(0, hold.amount), *[0] * 2)
            )
            if self._chance.random() < 0.08:
                actual = hold.amount * self._chance.randint(2, 5)
            usage = types_pb2.Usage(provider="p", model="m", input_tokens=actual)
            return ledger.SettleRequest(
                header=head, hold_id=hold.id, actual=actual, usage=usage, reference="bill"
            )

        return self._of_hold(make, rotates=False)

    def _keep_open(self) -> Wish | None:
        def make(head: types_pb2.OperationHeader, hold: KnownHold) -> Message:
            # Now and then more than is left, which closes it.
            actual = self._chance.randint(0, max(1, hold.amount // 2))
            return ledger.SettleRequest(header=head, hold_id=hold.id, actual=actual, keep_open=True)

        return self._of_hold(make, rotates=True)

    def _release(self) -> Wish | None:
        return self._of_hold(
            lambda head, hold: ledger.ReleaseRequest(header=head, hold_id=hold.id), rotates=False
        )

    def _extend(self) -> Wish | None:
        return self._of_hold(
            lambda head, hold: ledger.ExtendRequest(
                header=head, hold_id=hold.id, ttl=self._seconds(0.5, 600)
            ),
            rotates=True,
        )

    def _delegate(self, purse: Purse | None = None) -> Wish | None:
        purse = purse or self._purse()
        if purse is None or purse.depth > 6:
            return None
        children, specs = [], []
        for _ in range(self._chance.choice((1, 1, 1, 2, 4))):
            child = Purse(purse.root_id, new_id(), purse, self._chance.random() < 0.6)
            if child.by_token:
                child.secrets.append(new_secret())
            spec = types_pb2.ChildSpec(
                budget_id=child.id,
                name=f"child-{child.id.hex()}",
                amount=self._chance.choice((0, self._amount(), self._amount())),
                token_id=token_id(child.secrets[0]) if child.by_token else b"",
                holder="" if child.by_token and self._chance.random() < 0.5 else PRINCIPAL,
                overrun_factor=self._chance.randint(0, 2),
            )
            if self._chance.random() < 0.25:
                spec.lease.CopyFrom(self._seconds(0.6, 600))
                spec.lease_latest.CopyFrom(Duration(seconds=3600))
                child.leased = True
            children.append(child)
            specs.append(spec)
        if self._chance.random() < 0.03 and purse.children:
            # A name that a sibling has.
            specs[0].name = f"child-{self._chance.choice(purse.children).id.hex()}"
        wish = self._by(purse, ledger.DelegateRequest(children=specs))
        wish.made, wish.makers = children, self.own
        return wish

    def _accept(self) -> Wish | None:
        purse = self._purse(by_token=True)
        return None if purse is None else self._by(purse, ledger.AcceptRequest())

    def _recover(self) -> Wish | None:
        """By the holder, whatever became of the token; some of the holds get new tokens, too."""
        purses = [purse for purse in self._purses if purse.by_token]
        if not purses:
            return None
        purse = self._chance.choice([p for p in purses if not p.secrets] or purses)
        return self._recovering(
            purse, ledger.RecoverRequest(header=header(purse.root_id, purse.id, HOLDER))
        )

    def _admin_recover(self) -> Wish | None:
        """By an administrator: sometimes it is held by its principal afterwards."""
        purses = self._purses
        if not purses:
            return None
        lost = [purse for purse in purses if purse.by_token and not purse.secrets]
        purse = self._chance.choice(lost or purses)
        request = admin.AdminServiceRecoverRequest(
            header=header(purse.root_id, purse.id), holder=PRINCIPAL
        )
        if self._chance.random() < 0.8:
            return self._recovering(purse, request)
        wish = Wish(request, purse)
        wish.also = lambda: setattr(purse, "by_token", False)
        return wish

    def _recovering(self, purse: Purse, request: Message) -> Wish:
        following = new_secret()
        request.next_token_id = token_id(following)  # type: ignore[attr-defined]
        wish = Wish(request, purse, following=following)
        wish.also = lambda: setattr(purse, "by_token", True)
        if purse.holds and self._chance.random() < 0.5:
            some = self._chance.sample(purse.holds, min(len(purse.holds), 2))
            new = {hold.id: new_secret() for hold in some}
            for hold in some:
                request.holds.add(  # type: ignore[attr-defined]
                    hold_id=hold.id, next_token_id=token_id(new[hold.id])
                )

            def rotated() -> None:
                purse.by_token = True
                for hold in some:
                    hold.secrets[:] = [new[hold.id]]

            wish.also = rotated
        return wish

    def _fund(self) -> Wish | None:
        family = self._family()
        if family is None:
            return None
        purse, below = family
        request = ledger.FundRequest(descendant_id=below.id, amount=self._chance.randint(0, 300))
        if below.leased and self._chance.random() < 0.5:
            request.lease.CopyFrom(self._seconds(0.3, 600))
        return self._by(purse, request)

    def _renew(self) -> Wish | None:
        leased = [
            purse
            for purse in self._purses
            if purse.leased and (purse.secrets or not purse.by_token)
        ]
        if not leased:
            return None
        request = ledger.RenewRequest(lease=self._seconds(0.3, 600))
        return self._by(self._chance.choice(leased), request)

    def _give_back(self, purse: Purse | None = None) -> Wish | None:
        purse = purse or self._purse(root=False)
        return (
            None if purse is None else self._by(purse, ledger.ReturnRequest(amount=self._amount()))
        )

    def _return_all(self) -> Wish | None:
        purse = self._purse(root=False)
        if purse is None:
            return None
        closing = purse
        request = ledger.ReturnRequest(all=True, cascade=self._chance.random() < 0.4)
        wish = self._by(closing, request)
        request.next_token_id = b""
        wish.following = None
        wish.also = lambda: setattr(closing, "closed", True)
        return wish

    def _revoke(self) -> Wish | None:
        family = self._family()
        if family is None:
            return None
        purse, below = family
        wish = self._by(purse, ledger.RevokeRequest(descendant_id=below.id))
        wish.also = lambda: setattr(below, "closed", True)
        return wish

    def _resolve(self) -> Wish | None:
        hold = self._hold()
        if hold is None or (hold.purse.by_token and not hold.purse.secrets):
            return None
        request = ledger.ResolveRequest(
            hold_id=hold.id, actual=self._chance.randint(0, 2 * hold.amount), reason="a bill"
        )
        return self._by(hold.purse, request)

    def _admin_resolve(self) -> Wish | None:
        disputed = [h for purse in self._purses for h in purse.holds if h.disputed]
        hold = self._chance.choice(disputed) if disputed else self._hold()
        if hold is None:
            return None
        resolved = hold
        request = admin.AdminServiceResolveRequest(
            header=header(hold.purse.root_id, hold.purse.id),
            hold_id=hold.id,
            actual=self._chance.randint(0, hold.amount),
            reason="a bill",
        )
        alias = Purse(hold.purse.root_id, hold.purse.id, hold.purse.parent, by_token=False)
        wish = Wish(request, alias)

        def over() -> None:
            resolved.disputed = False
            if resolved in resolved.purse.holds:
                resolved.purse.holds.remove(resolved)

        wish.also = over
        return wish

"""The audit of the audit: make a ledger, tamper with it as a superuser, and ask who notices.

    python -m tests.tampering [--entries N] [--seed S] [--only WORDS] [--folder D]

Progress goes to the error stream. The last line of standard output is the verdict as JSON; the exit code is
1 unless every tampering was found and named, and nothing was said of a ledger that nobody had touched.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

import psycopg

from peculium_server.embedded import MAJOR_VERSION
from peculium_server.signing import SigningKey
from tests.bench.ledgers import Ledger, Postgres
from tests.faults.progress import say
from tests.server import STOP_SECONDS_MAX, RunningServer, ServerFailed
from tests.tampering import making
from tests.tampering.auditing import Audited, Auditor, Expected
from tests.tampering.making import QUIET, MakingFailed, Sealed
from tests.tampering.scene import Scene, key_ids
from tests.tampering.tamperings import BESIDE, UNNOTICED, Tampering, Trace, all_tamperings

ENTRIES_DEFAULT: Final = 100_000
_TAIL_OPERATIONS: Final = 120
"""Recorded after the last checkpoint, beside what is left to collect."""
_PAUSES: Final = 4
"""While others write, it is paused for so many times as long as it was verified."""
_VERIFIED_EVERY: Final = 4
"""After one in so many tamperings what was put back is verified; in the end it is compared with what was
there."""
_OF_OTHERS: Final = {"position", "batch"}
"""In a lane the operation behind a gap is named, of an atomic batch an operation that is left: whosever it is."""
_SERVER: Final = {"PECULIUM_CALL_SECONDS_MAX": "3600"}
"""A verification of everything takes as long as it takes."""


@dataclass
class Verdict:
    """What the campaign comes to."""

    entries: int = 0
    verify_online_s: float = 0.0
    verify_offline_s: float = 0.0
    tamperings: int = 0
    found: int = 0
    false_alarms: int = 0
    quiet: int = 0
    """Verifications of a ledger that nobody had touched."""
    problems: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether everything was found, and nothing else."""
        return self.found == self.tamperings and not self.false_alarms and not self.problems

    def line(self) -> str:
        """The verdict as JSON, with exactly the keys that readers know."""
        return json.dumps(
            {
                "entries": self.entries,
                "verify_online_s": round(self.verify_online_s, 1),
                "verify_offline_s": round(self.verify_offline_s, 1),
                "tamperings": self.tamperings,
                "found": self.found,
                "false_alarms": self.false_alarms,
            }
        )


class Campaign:
    """One ledger, and everything that is done to it."""

    def __init__(self, postgres: Postgres, folder: Path, seed: int) -> None:
        self.verdict = Verdict()
        self.done: list[Tampering] = []
        self._postgres = postgres
        self._folder = folder
        self._seed = seed
        self._ledger = Ledger.made(postgres, "audit")
        self._sealed = Sealed.with_new_keys(folder)
        self._keys = key_ids(self._sealed.keys)

    def run(self, entries: int, wanted: Callable[[str], bool]) -> None:
        """Make the ledger, verify it, and tamper with it.

        Args:
            entries: How many it has, at least.
            wanted: Which tamperings are done, by their names.
        """
        say(f"a ledger of {entries:,} entries is made")
        self._make(entries)
        with self._serving(QUIET) as auditor:
            self._finish_making(auditor.address, entries)
            self._verify_all(auditor, first=True)
        with Scene.prepared(self._ledger.dsn, self._chance("victims")) as scene:
            last = scene.checkpoints[-1]
            published = {last["number"]: last["hash"]}
            forger = SigningKey.make(self._folder / "forger.pem")
            tamperings = [
                each for each in all_tamperings(self._sealed.keys, forger) if wanted(each.name)
            ]
            with self._serving(QUIET) as auditor:
                for each in tamperings:
                    if not each.noticed:
                        self._tamper(each, scene, published, lambda: nullcontext(auditor))
            for each in tamperings:
                if each.noticed:
                    self._tamper(each, scene, published, lambda: self._serving(QUIET))
            self.verdict.problems += [f"{name} was not put back" for name in scene.differing()]
        with self._serving(QUIET) as auditor:
            say("after everything was put back, by a server that was started anew")
            self._verify_all(auditor, first=False)

    def _chance(self, name: str) -> Random:
        return Random(f"{self._seed} {name}")

    # -- The ledger ------------------------------------------------------------------------------------

    def _make(self, entries: int) -> None:
        for number, share in enumerate((0.5, 1.0)):
            settings = self._sealed.settings(number)
            with self._server(settings) as server, self._verifying_meanwhile(server):
                if not number:
                    asyncio.run(making.make_specimens(server.address))
                asyncio.run(
                    making.grow(
                        server.address,
                        self._ledger,
                        round(entries * share),
                        self._chance(f"clients {number}"),
                        f"deep-{number}",
                    )
                )
                making.wait_until_sealed(self._ledger)

    def _finish_making(self, address: str, entries: int) -> None:
        """Record something that nothing seals, and nobody collects."""
        asyncio.run(making.do_a_little(address, self._chance("tail"), _TAIL_OPERATIONS))
        asyncio.run(making.leave_something_to_collect(address))
        lacking = making.missing(self._ledger, entries)
        if lacking:
            raise MakingFailed(f"the ledger lacks {', '.join(lacking)}")
        self._ledger.vacuum()
        say(f"  {making.tell(self._ledger)}")

    @contextmanager
    def _server(self, settings: Mapping[str, str]) -> Iterator[RunningServer]:
        server = self._postgres.start_server(
            "--database-url", self._ledger.dsn, **_SERVER, **settings
        )
        try:
            yield server
            server.stop()
        finally:
            server.end()

    @contextmanager
    def _serving(self, settings: Mapping[str, str]) -> Iterator[Auditor]:
        with (
            self._server(settings) as server,
            Auditor.of(server.address, self._folder, self._keys) as auditor,
        ):
            yield auditor

    # -- What nobody has touched -----------------------------------------------------------------------

    @contextmanager
    def _verifying_meanwhile(self, server: RunningServer) -> Iterator[None]:
        """Verify again and again while others write."""
        over = threading.Event()

        def verify() -> None:
            with Auditor.of(server.address, self._folder, self._keys) as auditor:
                over_by_now = False
                while not over_by_now:
                    begun = time.monotonic()
                    self._quiet("while others write", auditor.online())
                    self._quiet("while others write", auditor.offline())
                    over_by_now = over.wait(_PAUSES * (time.monotonic() - begun))

        verifying = threading.Thread(target=verify)
        verifying.start()
        try:
            yield
        finally:
            over.set()
            verifying.join()

    def _verify_all(self, auditor: Auditor, *, first: bool) -> None:
        online, offline = auditor.online(), auditor.offline()
        say(f"  verified online in {online.seconds:.1f} s, offline in {offline.seconds:.1f} s")
        for name, audited in (("online", online), ("offline", offline)):
            self._quiet(f"{name}, the whole ledger", audited)
        if first:
            self.verdict.entries = online.entries
            self.verdict.verify_online_s = online.seconds
            self.verdict.verify_offline_s = offline.seconds
            if offline.entries != online.entries:
                self.verdict.problems.append("not everything was exported")

    def _quiet(self, when: str, audited: Audited) -> None:
        """Note what was said of a ledger that nobody has touched."""
        self.verdict.quiet += 1
        self.verdict.false_alarms += bool(audited.findings)
        for finding in audited.findings:
            self.verdict.problems.append(f"false alarm {when}: {finding}")

    # -- What somebody has --------------------------------------------------------------------------------

    def _stopped(self, tampering: Tampering) -> list[str]:
        """Start a server that is to stop by itself; what is wrong with what it does."""
        try:
            with self._server(QUIET) as server:
                server.process.wait(STOP_SECONDS_MAX)
            said = "\n".join(server.said)
        except ServerFailed as error:
            said = str(error)
        if tampering.stops not in said:
            return [f"a server does not say why it stops: {said}"]
        tampering.found.append("online: servers stop; offline: nothing is exported")
        return []

    def _audited(
        self,
        tampering: Tampering,
        trace: Trace,
        scene: Scene,
        published: Mapping[int, bytes],
        serving: Callable[[], AbstractContextManager[Auditor]],
    ) -> list[str]:
        """Verify what was tampered with; what is wrong with what is found."""
        told = published if tampering.published else {}
        problems: list[str] = []
        with serving() as auditor:
            for tree in [None] if trace.whole else sorted(trace.trees):
                if tree is not None and not scene.is_there(tree):
                    continue
                online = auditor.online(tree, published=told)
                problems += judged(tampering, "online", trace, online, trace.online)
                if trace.offline or tampering.lost:
                    offline = auditor.offline(tree, published=told)
                    problems += judged(tampering, "offline", trace, offline, trace.offline)
                else:
                    tampering.found.append(f"offline: {trace.why}")
                if tampering.forger:
                    for name, audited in (
                        ("online", auditor.online(tree, keys_known=False)),
                        ("offline", auditor.offline(tree, keys_known=False)),
                    ):
                        problems += [
                            f"{name}, without the public key, it is found: {finding}"
                            for finding in audited.findings
                        ]
        return problems

    def _tamper(
        self,
        tampering: Tampering,
        scene: Scene,
        published: Mapping[int, bytes],
        serving: Callable[[], AbstractContextManager[Auditor]],
    ) -> None:
        try:
            trace = tampering.do(scene)
        except (psycopg.Error, LookupError) as error:
            self.verdict.tamperings += 1
            self.verdict.problems.append(f"{tampering.name}: it could not be done: {error}")
            scene.restore_all()
            return
        if tampering.stops:
            problems = self._stopped(tampering)
        else:
            problems = self._audited(tampering, trace, scene, published, serving)
        scene.restore(trace.trees)
        if len(self.done) % _VERIFIED_EVERY == 0:
            with serving() as auditor:
                for tree in filter(scene.is_there, trace.trees):
                    self._quiet(f"after {tampering.name}", auditor.online(tree))
        if not tampering.lost:
            self.verdict.tamperings += 1
            self.verdict.found += not problems
        self.verdict.problems += [f"{tampering.name}: {problem}" for problem in problems]
        self.done.append(tampering)
        say(f"  {tampering.name}: {'; '.join(problems or tampering.found or [tampering.lost])}")


def judged(
    tampering: Tampering,
    who: str,
    trace: Trace,
    audited: Audited,
    expected: Sequence[Expected],
) -> Iterator[str]:
    """What is wrong with what was found."""
    if not expected:
        assert tampering.lost, tampering.name
        tampering.found.append(f"{who}: not found")
        if audited.findings:
            yield f"{who}: it is found, which nobody thought: {audited.findings[0]}"
        return
    named = audited.named(expected)
    if named is None:
        what = " and ".join(map(str, audited.findings)) or "nothing"
        yield f"{who}: it is not named; what is found is {what}"
        return
    tampering.found.append(f"{who}: {named.rule}")
    for finding in audited.findings:
        blamed = {b"", *trace.trees, *trace.also}
        if finding.root_id not in blamed and finding.rule not in _OF_OTHERS:
            yield f"{who}: another tree is blamed: {finding}"
        if tampering.published and "published" not in finding.detail:
            yield f"{who}: it is found without what was published: {finding}"


# --- what is told of it ---


def report(campaign: Campaign, seed: int) -> str:
    """What a run came to, as `docs/operating/tampering.md` shows it."""
    verdict = campaign.verdict
    lines = [
        (
            f"Seed {seed}; {os.cpu_count()} processors, Python {platform.python_version()},"
            f" PostgreSQL {MAJOR_VERSION}. {verdict.quiet} verifications of what nobody had touched."
        ),
        "",
        "| what was done | online | offline |",
        "| --- | --- | --- |",
    ]
    for each in campaign.done:
        online, offline = (
            next((one.partition(": ")[2] for one in each.found if one.startswith(f"{who}:")), "?")
            for who in ("online", "offline")
        )
        lines.append(f"| {each.name} | {online} | {offline} |")
    lines += ["", "Not noticed, as nothing depends on it:", ""]
    lines += [f"- `{column}`: {why}" for column, why in UNNOTICED.items()]
    lines += ["", "Tables of which no verification says anything:", ""]
    lines += [f"- `{table}`: {why}" for table, why in BESIDE.items()]
    lost = [each for each in campaign.done if each.lost]
    if lost:
        lines += ["", "Not to be found by any verification:", ""]
        lines += [f"- {each.name}: {each.lost}" for each in lost]
    return "\n".join([*lines, "", f"    {verdict.line()}"]) + "\n"


def main() -> int:
    """Run the campaign: 0 if everything was found and named, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.tampering", description=__doc__)
    parser.add_argument("--entries", type=int, default=ENTRIES_DEFAULT)
    parser.add_argument("--seed", type=int, default=None, help="default: one of its own")
    parser.add_argument("--only", default="", help="only what has these words in its name")
    parser.add_argument("--folder", type=Path, default=None, help="keep the report here")
    arguments = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if arguments.seed is None else arguments.seed
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="peculium-audit-"))
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    # To be told to end is to be interrupted: what was started has to be stopped.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    begun = time.monotonic()
    say(f"seed {seed}, in {folder}")
    with Postgres.running(folder) as postgres:
        campaign = Campaign(postgres, folder, seed)
        campaign.run(arguments.entries, lambda name: arguments.only in name)
    verdict = campaign.verdict
    told = report(campaign, seed)
    (folder / "report.md").write_text(told)
    say(told)
    for problem in verdict.problems:
        say(f"NOT CLEAN: {problem}")
    say(f"{time.monotonic() - begun:.0f} s; again: make audit SEED={seed}")
    if verdict.clean and arguments.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.write(verdict.line() + "\n")
    return 0 if verdict.clean else 1


if __name__ == "__main__":
    sys.exit(main())

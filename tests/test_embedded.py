"""An embedded Postgres keeps what was committed, whoever is killed, and refuses what is not its own."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import psycopg
import pytest

from peculium_server import embedded
from peculium_server.embedded import EmbeddedPostgres, EmbeddedPostgresError

AS_ROOT = os.geteuid() == 0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may enter: pytest's own are closed to the user who serves root."""
    path = Path(tempfile.mkdtemp(prefix="peculium-embedded-"))
    path.chmod(0o755)
    yield path
    for process in _servers_in(path):
        process.kill()
    shutil.rmtree(path)


@pytest.fixture
def data_dir(folder: Path) -> Path:
    return folder / "data"


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """A data directory with a cluster that was shut down: a copy of it saves an initdb."""
    path = Path(tempfile.mkdtemp(prefix="peculium-embedded-"))
    EmbeddedPostgres.start(path).stop()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def existing(made: Path, data_dir: Path) -> Path:
    subprocess.run(["cp", "--archive", str(made), str(data_dir)], check=True)
    return data_dir


def test_a_new_directory_gets_a_cluster_that_nobody_else_can_enter(data_dir: Path) -> None:
    steps: list[str] = []
    with EmbeddedPostgres.start(data_dir, progress=steps.append) as server:
        facts = _ask(
            server.dsn,
            "SELECT current_setting('server_version_num')::int / 10000, current_database(),"
            " current_setting('listen_addresses'), current_setting('data_checksums')",
        )
    assert facts == (embedded.MAJOR_VERSION, "peculium", "", "on")
    assert data_dir.stat().st_mode & 0o777 == 0o700
    assert (data_dir / "cluster").stat().st_mode & 0o777 == 0o700
    assert [step.split()[0] for step in steps] == ["Creating", "Starting"]


@pytest.mark.parametrize("name", ["fsync", "full_page_writes", "synchronous_commit"])
def test_what_is_committed_is_durable_unless_settings_say_otherwise(
    existing: Path, name: str
) -> None:
    with EmbeddedPostgres.start(existing) as server:
        assert _ask(server.dsn, f"SELECT current_setting('{name}')") == ("on",)
    with EmbeddedPostgres.start(existing, settings={name: "off"}) as server:
        assert _ask(server.dsn, f"SELECT current_setting('{name}')") == ("off",)


def test_a_restart_keeps_the_data(existing: Path) -> None:
    with EmbeddedPostgres.start(existing) as server:
        _write(server.dsn)
    assert not _servers_in(existing)
    with EmbeddedPostgres.start(existing) as server:
        assert _written(server.dsn)


async def test_a_process_that_is_busy_with_grpc_can_start_and_stop_it(existing: Path) -> None:
    async def echo(request: bytes, context: object) -> bytes:
        return request

    server = grpc.aio.server()
    handler: Any = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("any", {"Call": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_unary("/any/Call")

        async def keep_calling() -> None:
            while True:
                await call(b"")

        busy = [asyncio.create_task(keep_calling()) for _ in range(8)]
        for _ in range(3):
            postgres = await asyncio.to_thread(EmbeddedPostgres.start, existing)
            await asyncio.to_thread(postgres.stop)
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
    await server.stop(None)


def test_stopping_twice_is_stopping_once(existing: Path) -> None:
    server = EmbeddedPostgres.start(existing)
    server.stop()
    server.stop()
    assert not _servers_in(existing)


def test_a_stop_does_not_wait_for_clients(existing: Path) -> None:
    with EmbeddedPostgres.start(existing) as server:
        client = psycopg.connect(server.dsn)
        client.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError), client:
        client.execute("SELECT 1")
    assert not _servers_in(existing)


def test_a_killed_postmaster_is_replaced_and_loses_nothing(existing: Path) -> None:
    killed = EmbeddedPostgres.start(existing)
    _write(killed.dsn)
    os.kill(killed.pid, signal.SIGKILL)
    psutil.wait_procs(_servers_in(existing), timeout=30)
    assert (existing / "cluster" / "postmaster.pid").exists()
    with EmbeddedPostgres.start(existing) as server:
        assert server.pid != killed.pid
        assert _written(server.dsn)
    killed.stop()


def test_a_killed_postmaster_is_replaced_while_its_backends_still_die(existing: Path) -> None:
    killed = EmbeddedPostgres.start(existing)
    _write(killed.dsn)
    backend = psutil.Process(killed.pid).children()[0]
    backend.suspend()
    os.kill(killed.pid, signal.SIGKILL)
    psutil.Process(killed.pid).wait(timeout=30)
    threading.Timer(0.5, backend.resume).start()
    with EmbeddedPostgres.start(existing) as server:
        assert backend not in _servers_in(existing)
        assert _written(server.dsn)
    killed.stop()


def test_a_pid_file_that_names_another_program_by_now_is_stale(existing: Path) -> None:
    killed = EmbeddedPostgres.start(existing)
    _write(killed.dsn)
    os.kill(killed.pid, signal.SIGKILL)
    psutil.wait_procs(_servers_in(existing), timeout=30)
    pid_file = existing / "cluster" / "postmaster.pid"
    # Postgres looks only whether there is such a process of its own user, not what it is.
    with _stranger(existing) as stranger:
        lines = pid_file.read_text().splitlines()
        pid_file.write_text("\n".join([str(stranger.pid), *lines[1:]]) + "\n")
        with EmbeddedPostgres.start(existing) as server:
            assert _written(server.dsn)
        assert stranger.poll() is None
    killed.stop()


def test_a_second_user_adopts_the_server_and_the_last_one_stops_it(existing: Path) -> None:
    first = EmbeddedPostgres.start(existing)
    second = EmbeddedPostgres.start(existing)
    assert second.pid == first.pid
    first.stop()
    assert _ask(second.dsn, "SELECT 1") == (1,)
    second.stop()
    assert not _servers_in(existing)


def test_many_processes_that_start_at_once_share_one_server(data_dir: Path) -> None:
    servers: list[EmbeddedPostgres] = []
    threads = [
        threading.Thread(target=lambda: servers.append(EmbeddedPostgres.start(data_dir)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({server.pid for server in servers}) == 1
    assert len(servers) == 4
    for server in servers:
        server.stop()
    assert not _servers_in(data_dir)


def test_a_user_that_was_killed_no_longer_keeps_the_server_running(existing: Path) -> None:
    script = (
        "import sys, time; from peculium_server.embedded import EmbeddedPostgres;"
        " server = EmbeddedPostgres.start(sys.argv[1]); print(server.pid, flush=True);"
        " time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(existing)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        pid = int(other.stdout.readline())
        other.kill()
    with EmbeddedPostgres.start(existing) as server:
        assert server.pid == pid
    assert not _servers_in(existing)


def test_an_initdb_that_was_killed_is_begun_anew(existing: Path) -> None:
    shutil.move(existing / "cluster", existing / "cluster.new-dead")
    (existing / "cluster.new-dead" / "PG_VERSION").unlink()
    with EmbeddedPostgres.start(existing) as server:
        assert _ask(server.dsn, "SELECT current_database()") == ("peculium",)
    assert not list(existing.glob("cluster.new-*"))


def test_a_cluster_of_another_major_version_is_refused_and_left_alone(existing: Path) -> None:
    other = embedded._wheel_programs().parents[1] / "pginstall" / "bin"
    before = _digest(existing / "cluster")
    with pytest.raises(
        EmbeddedPostgresError,
        match=rf"made by PostgreSQL {embedded.MAJOR_VERSION}, and PostgreSQL 16\.\d+ cannot read it",
    ):
        EmbeddedPostgres.start(existing, bin_dir=other)
    assert _digest(existing / "cluster") == before
    EmbeddedPostgres.start(existing).stop()


def test_somebody_elses_directory_is_refused_and_left_alone(data_dir: Path) -> None:
    data_dir.mkdir(mode=0o755)
    (data_dir / "thesis.tex").touch()
    with pytest.raises(EmbeddedPostgresError, match="not empty"):
        EmbeddedPostgres.start(data_dir)
    assert data_dir.stat().st_mode & 0o777 == 0o755
    assert data_dir.stat().st_uid == os.geteuid()


def test_a_server_that_does_not_come_up_says_why(existing: Path) -> None:
    with pytest.raises(
        EmbeddedPostgresError, match=r"unrecognized configuration parameter .thrift"
    ):
        EmbeddedPostgres.start(existing, settings={"thrift": "on"})
    with EmbeddedPostgres.start(existing) as server:
        assert _ask(server.dsn, "SELECT 1") == (1,)


def test_a_missing_installation_says_what_to_do(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_WHEEL", "a_wheel_that_is_not_installed")
    with pytest.raises(EmbeddedPostgresError, match=r"peculium\[embedded\]"):
        EmbeddedPostgres.start(data_dir)
    assert not data_dir.exists()


def test_a_path_too_long_for_a_socket_gets_one_elsewhere(existing: Path, folder: Path) -> None:
    deep = folder / ("d" * 60) / ("e" * 60)
    deep.parent.mkdir()
    existing.rename(deep)
    with EmbeddedPostgres.start(deep) as server:
        assert _ask(server.dsn, "SELECT 1") == (1,)
        socket_dir = Path(str(psycopg.conninfo.conninfo_to_dict(server.dsn)["host"]))
        assert socket_dir.stat().st_mode & 0o777 == 0o700
    assert not socket_dir.exists()


def test_a_path_with_quotes_and_blanks_is_a_path(existing: Path, folder: Path) -> None:
    odd = folder / 'it\'s a "data" $dir & more'
    existing.rename(odd)
    with EmbeddedPostgres.start(odd) as server:
        assert _ask(server.dsn, "SELECT 1") == (1,)


def test_the_socket_needs_no_password_and_tcp_does(existing: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with EmbeddedPostgres.start(existing, port=port) as server:
        password = (existing / "password").read_text()
        assert _ask(server.dsn, "SELECT inet_server_addr()") == (None,)
        assert _ask(server.tcp_dsn, "SELECT inet_server_port()") == (port,)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(server.tcp_dsn.replace(password, "guess"))
        assert password not in repr(server) + server.dsn
    assert (existing / "password").stat().st_mode & 0o777 == 0o600


def test_without_a_port_there_is_no_tcp(existing: Path) -> None:
    with (
        EmbeddedPostgres.start(existing) as server,
        pytest.raises(EmbeddedPostgresError, match="without a TCP port"),
    ):
        _ = server.tcp_dsn


@pytest.mark.skipif(not AS_ROOT, reason="only root can run it as somebody else")
class TestRoot:
    """Postgres refuses to run as root, so root's server runs as an ordinary user."""

    def test_the_server_is_an_ordinary_users_process(self, existing: Path) -> None:
        with EmbeddedPostgres.start(existing) as server:
            assert psutil.Process(server.pid).uids().real != 0
            assert existing.stat().st_uid == psutil.Process(server.pid).uids().real

    def test_the_user_can_be_named(self, data_dir: Path) -> None:
        with EmbeddedPostgres.start(data_dir, run_as="nobody") as server:
            assert psutil.Process(server.pid).username() == "nobody"
        with EmbeddedPostgres.start(data_dir) as server:
            assert psutil.Process(server.pid).username() == "nobody"

    @pytest.mark.parametrize("name", ["root", "no-such-user"])
    def test_a_user_who_cannot_run_it_is_refused(self, data_dir: Path, name: str) -> None:
        with pytest.raises(EmbeddedPostgresError, match="refuses to run as root"):
            EmbeddedPostgres.start(data_dir, run_as=name)

    def test_a_directory_that_the_user_cannot_enter_is_refused_and_stays_closed(
        self, folder: Path
    ) -> None:
        closed = folder / "closed"
        closed.mkdir(mode=0o700)
        with pytest.raises(EmbeddedPostgresError, match=f"cannot enter {closed}"):
            EmbeddedPostgres.start(closed / "data")
        assert closed.stat().st_mode & 0o777 == 0o700

    def test_programs_that_the_user_cannot_reach_are_copied(
        self, folder: Path, existing: Path
    ) -> None:
        closed = folder / "closed"
        package = embedded._wheel_programs().parents[1]
        shutil.copytree(package, closed / package.name, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")
        shutil.copytree(libraries, closed / libraries.name, symlinks=True)
        closed.chmod(0o700)
        programs = closed / package.name / f"pginstall{embedded.MAJOR_VERSION}" / "bin"
        with EmbeddedPostgres.start(existing, bin_dir=programs) as server:
            assert str(existing) in psutil.Process(server.pid).exe()
        with EmbeddedPostgres.start(existing, bin_dir=programs) as server:
            assert _ask(server.dsn, "SELECT 1") == (1,)
        assert len(list(existing.glob("software*"))) == 1
        assert closed.stat().st_mode & 0o777 == 0o700


def test_an_ordinary_user_runs_it_as_itself(folder: Path) -> None:
    account = pwd.getpwnam("nobody") if AS_ROOT else pwd.getpwuid(os.geteuid())
    programs = embedded._wheel_programs()
    if AS_ROOT:
        user = embedded._Account(account.pw_name, account.pw_uid, account.pw_gid)
        os.chown(folder, account.pw_uid, account.pw_gid)
        if embedded._closed_to(programs, user) is not None:
            programs = embedded._copy_programs(programs, folder)

    def session() -> None:
        data_dir = folder / "own"
        with EmbeddedPostgres.start(data_dir, bin_dir=programs) as server:
            assert psutil.Process(server.pid).uids().real == account.pw_uid
            _write(server.dsn)
        with EmbeddedPostgres.start(data_dir, bin_dir=programs) as server:
            assert _written(server.dsn)
        assert data_dir.stat().st_uid == account.pw_uid

    _as_user(account, session)


def _as_user(account: pwd.struct_passwd, action: Callable[[], None]) -> None:
    """Run the action in a child process of that user; forked, since it may reach no interpreter."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            if AS_ROOT:
                os.setgroups([])
                os.setgid(account.pw_gid)
                os.setuid(account.pw_uid)
            action()
        except BaseException:  # noqa: BLE001 - the child must end here, whatever happened
            os.write(writer, traceback.format_exc().encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        failure = pipe.read()
    os.waitpid(child, 0)
    assert not failure, failure


@contextlib.contextmanager
def _stranger(data_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the server's user that has nothing to do with Postgres."""
    owner = data_dir.stat().st_uid
    with subprocess.Popen(["sleep", "600"], user=owner if AS_ROOT else None) as process:
        try:
            yield process
        finally:
            process.kill()


def _digest(folder: Path) -> dict[str, bytes]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).digest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _servers_in(path: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.name() == "postgres" and process.cwd().startswith(str(path)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _write(dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TABLE written AS SELECT 42 AS answer")


def _written(dsn: str) -> bool:
    return _ask(dsn, "SELECT answer FROM written") == (42,)


def _ask(dsn: str, query: str) -> tuple[object, ...]:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row

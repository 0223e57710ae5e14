"""A private, real PostgreSQL server for the tests that want one; they skip where it is not installed.

It listens on 127.0.0.1 alone, at a free port, for one user with a password drawn anew, and is gone with the session.
"""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ranksearch.tracking.pages import HOST, free_port

USER = "ranksearch"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Callable[[], str]]:
    """Gives the URL of a new, empty database with each call."""
    with _server() as server:
        yield server.new_database


@pytest.fixture
def postgres_server() -> Iterator["Server"]:
    """A server of the test's own, which it may stop and start."""
    with _server() as server:
        yield server


def _initdb() -> Path | None:
    """Debian keeps it out of the path."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *map(Path, filter(None, [shutil.which("initdb")]))]
    return max(found, default=None, key=lambda path: (path.parent.parent.name.isdecimal(), str(path)))


@contextmanager
def _server() -> Iterator["Server"]:
    """A server that is ready."""
    initdb = _initdb()
    if initdb is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg2")
    password, port = secrets.token_hex(16), free_port(0)
    # Not pytest's own folder, which is closed to the user that PostgreSQL runs as in place of root.
    with tempfile.TemporaryDirectory(prefix="postgres-", dir="/tmp") as folder:
        data, log, secret = (Path(folder) / name for name in ("data", "log", "secret"))
        secret.write_text(password)
        options = _as_another_than_root(Path(folder), secret)
        login = [f"--username={USER}", f"--pwfile={secret}", "--auth=scram-sha-256"]
        subprocess.run([initdb, "-D", data, "-N", *login], check=True, capture_output=True, **options)
        settings = {"listen_addresses": HOST, "port": port, "unix_socket_directories": "", "fsync": "off"}
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        server = Server(log, [initdb.with_name("postgres"), "-D", data, *words], options, port, password)
        server.start()
        try:
            yield server
        finally:
            server.stop()


class Server:
    """A server that can be away for a while."""

    def __init__(self, log: Path, command: Sequence[str | Path], options: dict[str, Any], port: int, password: str):
        self.port, self.password = port, password
        self._log, self._command, self._options = log, command, options

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(self._command, stdout=output, stderr=output, **self._options)
        give_up = time.monotonic() + 60
        while not _answers(self.port, self.password):
            assert self._process.poll() is None and time.monotonic() < give_up, self._log.read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        """Its "fast shutdown", which does not wait for connections."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=30)

    def new_database(self) -> str:
        """The URL of a new, empty database."""
        import psycopg2

        name = f"test_{secrets.token_hex(4)}"
        connection = psycopg2.connect(dbname="postgres", host=HOST, port=self.port, user=USER, password=self.password)
        # PostgreSQL makes no database within a transaction.
        connection.autocommit = True
        connection.cursor().execute(f"create database {name}")
        connection.close()
        return f"postgresql+psycopg2://{USER}:{self.password}@{HOST}:{self.port}/{name}"


def _as_another_than_root(*owned: Path) -> dict[str, Any]:
    """How PostgreSQL's programs are run, which root may not; their user owns these paths."""
    if os.geteuid() != 0:
        return {"cwd": owned[0]}
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    for path in owned:
        os.chown(path, user.pw_uid, user.pw_gid)
    return {"cwd": owned[0], "user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _answers(port: int, password: str) -> bool:
    import psycopg2

    try:
        psycopg2.connect(dbname="postgres", host=HOST, port=port, user=USER, password=password).close()
    except psycopg2.OperationalError:
        return False
    return True

"""Starts SGLang servers, watches them, starts those again that end, stops them."""

import contextlib
import fcntl
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from trd_megatron.config import EngineConfig, ServersConfig
from trd_megatron.engine import server_command
from trd_megatron.engine.base import EngineFailedError, Weights
from trd_megatron.engine.server_process import Server, end_groups, reserve_port
from trd_megatron.errors import UserError
from trd_megatron.progress import bar
from trd_megatron.run_dir import write_json

LIST = "servers.json"
GIVE_UP_AFTER = 5  # deaths in a row, without being healthy in between
BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0  # doubled from death to death
PORT_TRIES = 5
LOOK_EVERY_S = 0.25
TERM_S = 15.0  # cuda: for a server to give GPU memory back; SGLang takes 4 s idle and up to 11 s with requests running
_list_lock = threading.Lock()  # student's and teacher's servers stand in one list


class LaunchedServers:
    """The SGLang servers of one role (student or teacher), each a process group of its own.

    host, ports: where they listen; without ports, at free ones. logs: the folder of <role>-<i>.log and servers.json.
    say hears in one line of every death and return. failed: set once no server of the role is left, nor will come back.

    A thread of its own starts and watches the servers. They die with this process however it ends: Linux ties them to the life
    of the thread that started them.
    """

    def __init__(
        self,
        role: str,
        weights: Weights,
        engine: EngineConfig,
        logs: Path,
        say: Callable[[str], None],
        *,
        host: str = "127.0.0.1",
        ports: Sequence[int] | None = None,
        api_key: str | None = None,
    ) -> None:
        self.role, self.logs = role, logs
        self.failed: EngineFailedError | UserError | None = None
        self._weights, self._engine, self._say = weights, engine, say
        self._host, self._ports, self._key = host, ports, api_key
        self._settings: ServersConfig = getattr(engine, role)
        self._servers: list[Server] = []
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock: IO[str] | None = None  # on the logs of the role
        self._outlived: EngineFailedError | None = None
        self._began = False  # all have been healthy once; from then on a death is not the caller's mistake
        self._python = ""

    @property
    def urls(self) -> list[str]:
        """Of the running servers, in the order of their numbers; final once `start` has returned."""
        return [server.url for server in self._servers]

    def start(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Starts all and waits until all are healthy. Raises UserError or EngineFailedError with the line of the log that says why, and
        what `meanwhile` raises, which is called again and again."""
        start_all([self], meanwhile)

    def use(self, weights: Weights) -> None:
        """What a restart loads from now on. A server that is just starting is started anew; those that run are the caller's to update."""
        self._weights = weights

    def check(self) -> None:
        """Raises what ended the watch, if something did: no server of the role is left, nor will come back."""
        if self.failed is not None:
            raise self.failed

    def stop(self) -> None:
        """Ends every process of the servers' groups: SIGTERM, then SIGKILL. May be called twice, and `start` after it.

        Raises EngineFailedError if one outlives that: its GPU is still taken.
        """
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._outlived is not None:
            raise self._outlived

    @property
    def healthy(self) -> int:
        """Servers that have become healthy and run."""
        return sum(server.state == "healthy" for server in self._servers)

    def launch(self) -> None:
        """Starts the watching thread, which starts the servers; returns at once. UserError if they cannot be started at all."""
        assert self._thread is None, "stop them first"
        self._python = server_command.interpreter(self._engine)
        for index in range(self._settings.data_parallel_size):
            self._gpus(index)  # fails here if there are too few
        ports = self._ports or [0] * self._settings.data_parallel_size
        with contextlib.ExitStack() as on_error:
            lock = on_error.enter_context(_locked(self.logs, self.role))
            kept = [on_error.enter_context(reserve_port(self._host, port)) for port in ports]
            on_error.pop_all()
        self._lock = lock
        self._servers = [Server(i, self._host, port, self.logs / f"{self.role}-{i}.log") for i, port in enumerate(kept)]
        self._stopping.clear()
        self._began, self.failed, self._outlived = False, None, None
        self._thread = threading.Thread(target=self._watch, name=f"{self.role} servers", daemon=True)
        self._thread.start()

    def _gpus(self, index: int) -> list[str]:
        return server_command.gpus_of(self.role, self._settings, index) if self._engine.device == "cuda" else []

    def _watch(self) -> None:
        try:
            while not self._stopping.is_set() and self.failed is None:
                for server in self._servers:
                    self._look_at(server)
                if self.healthy == len(self._servers):
                    self._began = True
                self._stopping.wait(LOOK_EVERY_S)
        except (EngineFailedError, UserError) as error:
            self.failed = error
        except BaseException as error:
            self.failed = EngineFailedError(f"the {self.role} servers are not watched any more: {type(error).__name__}: {error}")
            raise
        finally:
            try:
                end_groups(self._servers, TERM_S if self._engine.device == "cuda" else 0)
            except EngineFailedError as error:
                self._outlived = error
            finally:
                for server in self._servers:
                    server.state = "waiting"
                    server.kept_port.close()
                self._write_list(running=False)

    def _look_at(self, server: Server) -> None:
        now = time.monotonic()
        if server.state == "given up":
            return
        if server.state == "waiting":
            if now >= server.next_start:
                self._spawn(server)
            return
        code = server.exit_code()
        if code is not None:
            end_groups([server], term_s=0)  # its scheduler may hang on
            self._died(server, f"ended with {_how(code)}")
        elif server.state == "starting":
            if server.weights != self._weights:
                end_groups([server], term_s=0)
                self._spawn(server)
            elif server.is_healthy():
                server.state, server.failures = "healthy", 0
                if self._began:
                    self._say(f"{self.role} server {server.url} is healthy again, {time.monotonic() - server.began:.0f} s after its start")
            elif server.port_was_taken():
                end_groups([server], term_s=0)
                self._died(server, "found its port taken")
            elif now - server.began > self._engine.start_timeout_s:
                end_groups([server], term_s=0)
                self._died(server, f"was not healthy within engine.start_timeout_s={self._engine.start_timeout_s:g}")

    def _spawn(self, server: Server) -> None:
        weights = self._weights
        command = server_command.command(self._python, self.role, weights, self._engine, server.host, server.port)
        environment = server_command.environment(self._engine, self._gpus(server.index), self._key)
        if self._engine.device == "cpu":
            environment |= server_command.thread_settings(len(self._servers))
        server.spawn(command, environment, weights, self._key)
        self._write_list(running=True)

    def _died(self, server: Server, how: str) -> None:
        """After its processes are gone: another start, now or later, or the end."""
        was_healthy = server.state == "healthy"
        server.state = "waiting"
        server.failures += 1
        what = f"{self.role} server {server.url} {how}: {server.reason()} (log: {server.log})"
        if not self._began and not was_healthy:
            if self._ports is None and server.failures <= PORT_TRIES and server.port_was_taken():
                server.kept_port.close()
                server.keep(reserve_port(server.host, 0))
                return
            raise _first_failure(self.role, what, self._settings.extra_args)
        if server.failures >= GIVE_UP_AFTER:
            server.state = "given up"
            self._say(f"{what}; given up after {server.failures} deaths in a row")
            if all(other.state == "given up" for other in self._servers):
                raise EngineFailedError(f"no {self.role} server is left: {what}")
            return
        wait = 0.0 if was_healthy else min(BACKOFF_S * 2 ** (server.failures - 1), MAX_BACKOFF_S)
        server.next_start = time.monotonic() + wait
        self._say(f"{what}; starting it again{f' in {wait:g} s' if wait else ''}")

    def _write_list(self, running: bool) -> None:
        """servers.json: for people who want to know what runs where. Nothing reads it."""
        path = self.logs / LIST
        with _list_lock:
            old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            rows = [row for row in old if row["role"] != self.role]
            for server in self._servers if running else []:
                if server.process is not None:
                    pid, started = server.process.pid, server.started_at
                    rows.append({"role": self.role, "url": server.url, "pid": pid, "started": started, "log": str(server.log.absolute())})
            write_json(path, rows)


def _locked(logs: Path, role: str) -> IO[str]:
    """Takes the logs of a role for this process, until the file is closed. Raises UserError if others' servers write there."""
    try:
        logs.mkdir(parents=True, exist_ok=True)
        file = (logs / f".{role}.lock").open("w")
    except OSError as error:
        raise UserError(f"{logs} cannot be written ({error.strerror}): choose another run_dir=PATH") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"other {role} servers write their logs to {logs}: stop them, or choose another run_dir=PATH") from None
    return file


def start_all(groups: Sequence[LaunchedServers], meanwhile: Callable[[], None] = lambda: None) -> None:
    """Starts the servers of several roles side by side and waits until all are healthy; if that fails, none is left running."""
    total = sum(getattr(group._engine, group.role).data_parallel_size for group in groups)
    began = time.monotonic()
    try:
        for group in groups:
            group.launch()
        with bar("servers", total, "server") as shown:
            healthy = 0
            while healthy < total:
                time.sleep(0.1)
                meanwhile()
                for group in groups:
                    group.check()
                now = sum(group.healthy for group in groups)
                shown.advance(now - healthy)
                healthy = now
                shown.note(f"{time.monotonic() - began:.0f} s, logs in {groups[0].logs}")
    except BaseException:
        stop_all(groups)
        raise


def stop_all(groups: Sequence[LaunchedServers]) -> None:
    """Stops the servers of several roles, all of them whatever happens to one. Raises EngineFailedError as `stop` does."""
    with contextlib.ExitStack() as stack:
        for group in reversed(groups):
            stack.callback(group.stop)


def _first_failure(role: str, what: str, extra_args: Sequence[str]) -> EngineFailedError | UserError:
    if not any(complaint in what for complaint in ("unrecognized arguments", "expected one argument", "invalid choice")):
        return EngineFailedError(what)
    if any(word.split("=")[0] in what for word in extra_args):
        return UserError(f"engine.{role}.extra_args: {what}")
    return UserError(f"this SGLang does not know a flag of ours, it needs to be 0.5.23 or newer (engine.python): {what}")


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"

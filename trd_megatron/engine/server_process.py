"""One SGLang server: a process group, a port that is kept for it, a log."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from trd_megatron.engine.base import EngineFailedError, Weights
from trd_megatron.errors import UserError

HEALTH_TIMEOUT_S = 5.0
KILL_S = 10.0
ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}
# Not through a proxy that the user's environment names.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
# The last line of a traceback, or of argparse.
_REASON = re.compile(r"^(?:\[[^]]*\] )?(?:\w+\.)*(\w*(?:Error|Exception|Exit|Interrupt)\b: .+|.*\berror: .+)$")
_PORT_TAKEN = re.compile(r"address already in use", re.IGNORECASE)
_AFTERMATH = "is dead"  # the main process about one that it started, after that one's own traceback


def reserve_port(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not listen, so that Linux gives the port (0: a free one) to nobody who asks for any, while a
    server that binds this very port gets it. Raises UserError if a server listens there."""
    kept = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        kept.bind((host, port))
    except (OSError, OverflowError) as error:
        kept.close()
        raise UserError(
            f"cannot serve at {host}:{port} ({getattr(error, 'strerror', None) or error}): choose another --port or --host"
        ) from None
    return kept


def group_members(group: int) -> list[psutil.Process]:
    """The processes of a group that have not ended."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


@dataclass
class Server:
    """One server and what is known of it. Only the thread that watches it starts and stops it."""

    index: int
    host: str
    kept_port: socket.socket
    log: Path
    state: Literal["waiting", "starting", "healthy", "given up"] = "waiting"
    weights: Weights | None = None  # those it was started with
    failures: int = 0  # deaths since it was last healthy
    next_start: float = 0.0  # monotonic
    began: float = 0.0  # monotonic: of the last start
    started_at: str = ""
    process: subprocess.Popen[bytes] | None = None
    port: int = field(init=False)
    _log_start: int = 0
    _copier: threading.Thread | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.keep(self.kept_port)

    def keep(self, port: socket.socket) -> None:
        """Takes a reserved port."""
        self.kept_port, self.port = port, int(port.getsockname()[1])

    @property
    def url(self) -> str:
        """Where others reach it."""
        return self._url(socket.gethostname() if self.host in ANY_HOST else self.host)

    def _url(self, host: str) -> str:
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def spawn(self, command: Sequence[str], environment: dict[str, str], weights: Weights, secret: str | None) -> None:
        """Starts it as a process group of its own. `secret` never reaches the log: SGLang logs all its arguments."""
        self.began, self.started_at = time.monotonic(), time.strftime("%Y-%m-%d %H:%M:%S")
        self.state, self.weights = "starting", weights
        with self.log.open("ab") as log:
            log.write(f"--- {self.started_at} starting with weights {weights.label}: {' '.join(command)}\n".encode())
            log.flush()
            self._log_start = log.tell()
            out = log if secret is None else subprocess.PIPE
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        if secret is not None:
            self._copier = threading.Thread(target=self._copy_log, args=(self.process, secret.encode()), daemon=True)
            self._copier.start()

    def _copy_log(self, process: subprocess.Popen[bytes], secret: bytes) -> None:
        assert process.stdout is not None
        with process.stdout, self.log.open("ab", buffering=0) as log:
            for line in process.stdout:
                log.write(line.replace(secret, b"***"))

    def is_healthy(self) -> bool:
        """Whether it answers, and not another server that took its port."""
        assert self.process is not None
        try:
            with _open(f"{self._url(ANY_HOST.get(self.host, self.host))}/health", timeout=HEALTH_TIMEOUT_S) as answer:
                return answer.status == 200 and self._listens()
        except OSError:  # not listening yet, 503 while it starts, or slow: the next look tells
            return False

    def _listens(self) -> bool:
        assert self.process is not None
        for member in group_members(self.process.pid):
            with contextlib.suppress(psutil.Error):
                if any(c.status == psutil.CONN_LISTEN and c.laddr.port == self.port for c in member.net_connections("tcp")):
                    return True
        return False

    def exit_code(self) -> int | None:
        """None while it runs."""
        assert self.process is not None
        return self.process.poll()

    def last_words(self) -> list[str]:
        """What it has written since its last start."""
        if self._copier is not None and self.process is None:
            self._copier.join(timeout=5)  # what is left in the pipe
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace").splitlines()

    def reason(self) -> str:
        """The line of its log that says why it ended, as far as one can tell."""
        lines = [line.strip() for line in self.last_words() if line.strip()]
        errors = [line for line in lines if _REASON.match(line)]
        first_hand = [line for line in errors if _AFTERMATH not in line]
        return (first_hand or errors or lines or ["it wrote nothing"])[-1][:400]

    def port_was_taken(self) -> bool:
        """Whether it says so; SGLang does not end then."""
        return any(_PORT_TAKEN.search(line) for line in self.last_words())

    def signal(self, number: int) -> None:
        """To the server itself, which ends its own processes."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def is_gone(self) -> bool:
        """Whether no process of the group is left. Kills those that have lost the server itself."""
        assert self.process is not None
        if self.exit_code() is None:
            return False
        if not group_members(self.process.pid):
            return True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return False


def end_groups(servers: Sequence[Server], term_s: float) -> None:
    """SIGTERM, so that SGLang gives GPU memory back in order; after `term_s` (0: at once) SIGKILL. Returns when nothing is left of
    the groups. Raises EngineFailedError if something outlives SIGKILL."""
    left = [server for server in servers if server.process is not None]
    for number, seconds in ((signal.SIGTERM, term_s), (signal.SIGKILL, KILL_S)):
        if seconds == 0:
            continue
        for server in left:
            server.signal(number)
        deadline = time.monotonic() + seconds
        while left and time.monotonic() < deadline:
            left = [server for server in left if not server.is_gone()]
            time.sleep(0.05 if left else 0)
    if left:
        names = ", ".join(f"{server.url} (process group {server.process.pid})" for server in left if server.process is not None)
        raise EngineFailedError(f"servers do not end, even on SIGKILL, and hold their memory: {names}")
    for server in servers:
        server.process = None

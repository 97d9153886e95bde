"""The sides of a benchmark in processes of their own: the parent's end (Child, receive) and the child's (main).

A child runs `serve(job, connection)` of a module of this package. It sends Failed where that raises, and ends when the parent
closes the connection.
"""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from trd_megatron import processes

# A child is started with this, the connection's file descriptor and its module: it ties itself to its parent before slow imports.
COMMAND = "from trd_megatron import processes; processes.die_with_parent(); from trd_megatron.bench import children; children.main()"


@dataclass(frozen=True)
class Failed:
    error: str  # one line


class ChildFailedError(Exception):
    """A child raised or died; its error in one line."""


class Child:
    """The parent's end of one child."""

    def __init__(self, module: str, job: Any, threads: int, log: Path, environment: dict[str, str] | None = None) -> None:
        """Starts it. module: of this package, with `serve`. log: where its output goes. environment: on top of this process's."""
        variables = dict(os.environ) | {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1", processes.PARENT: str(os.getpid())}
        variables |= environment or {}
        variables.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self.connection, other = Pipe()
        self._log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(other.fileno()), module],
                env=variables,
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                process_group=0,  # Ctrl-C is ours to hear
            )
        other.close()  # so that the child's death is an end of file here
        self.send(job)

    def send(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the child is dead: receiving tells why
            self.connection.send(message)

    def last_words(self) -> str:
        """Why it ended by itself, in one line."""
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return "the process was killed: out of memory?"
        lines = self._log.read_text(errors="replace").split("\n")
        return f"the process ended with exit code {code}: {next((line for line in reversed(lines) if line.strip()), 'no output')[:300]}"

    def end(self) -> None:
        """Ends the process, with what it started (compilers)."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def receive(children: Sequence[Child], expected: type) -> list[Any]:
    """One message of every child, in their order. Raises ChildFailedError with the first bad one."""
    replies: dict[Connection, Any] = {}
    by_connection = {child.connection: child for child in children}
    while waiting := by_connection.keys() - replies.keys():
        for connection in wait(waiting):
            assert isinstance(connection, Connection)
            try:
                reply = connection.recv()
            except (EOFError, ConnectionResetError):
                raise ChildFailedError(by_connection[connection].last_words()) from None
            if isinstance(reply, Failed):
                raise ChildFailedError(reply.error)
            assert isinstance(reply, expected)
            replies[connection] = reply
    return [replies[child.connection] for child in children]


def main() -> None:
    """The child: serves the parent at the connection whose file descriptor is the first argument."""
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(OSError):  # a wish: where memory runs out, Linux is to end this process and not the parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        job = connection.recv()
        importlib.import_module(f"trd_megatron.bench.{sys.argv[2]}").serve(job, connection)
    except EOFError:  # the parent is through
        return
    except Exception as error:
        connection.send(Failed(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]))

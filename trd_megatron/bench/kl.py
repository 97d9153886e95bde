"""`trd bench kl`: time and memory of ways to compute one loss, forward KL(teacher‖student) over the whole vocabulary and its gradient.

The inputs are drawn once and lie in files that every child process maps. Each side has one fresh process per number of tokens.
The processes take turns, one at a time and round by round, so that what else the machine does hits all sides.
"""

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from trd_megatron import __version__, processes
from trd_megatron.bench import kl_report
from trd_megatron.bench.kl_child import COMMAND, Failed, HostMemory, Job, Ready, Turn
from trd_megatron.bench.kl_report import Row, Status
from trd_megatron.bench.kl_sides import DTYPES, SIDES, write_inputs
from trd_megatron.errors import UserError
from trd_megatron.progress import Bar, bar
from trd_megatron.run_dir import write_json

SEED = 0
# Largest relative difference between losses that should be one. The peers add up bfloat16 losses in bfloat16, in steps of 0.4 %.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
NOT_INSTALLED = "not installed (pip install -e '.[bench]')"


class DisagreementError(RuntimeError):
    """Sides that compute the same loss got different values."""


@dataclass(frozen=True)
class Settings:
    """tokens: the numbers of tokens, one table each. chunk: tokens per chunk of the sides that are products alone.

    ranks: more than 1 adds linear_kl over that many gloo ranks. Raises UserError for what cannot be measured.
    """

    sides: list[str]
    tokens: list[int]
    hidden: int
    vocab: int
    chunk: int
    threads: int
    repeats: int
    dtype: str
    device: str
    ranks: int

    def __post_init__(self) -> None:
        if unknown := [side for side in self.sides if side not in SIDES]:
            raise UserError(f"--sides {unknown[0]}: no such side; there are {', '.join(SIDES)}")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype}: it must be one of {', '.join(DTYPES)}")
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"--device {self.device}: it must be cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no GPU")
        if self.ranks > 1 and self.device == "cuda":
            raise UserError("--ranks is for --device cpu: the ranks speak gloo")
        counts = {"tokens": min(self.tokens), "hidden": self.hidden, "vocab": self.vocab, "chunk": self.chunk}
        counts |= {"threads": self.threads, "repeats": self.repeats, "ranks": self.ranks}
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"--{name} {value}: it must be at least 1")
        if self.vocab % self.ranks:
            raise UserError(f"--ranks {self.ranks}: --vocab {self.vocab} must be a multiple of it")

    @property
    def title(self) -> str:
        sizes = f"hidden {self.hidden}, vocabulary {self.vocab}, {self.dtype}, {self.device}"
        return f"{sizes}, {self.threads} thread{'s' * (self.threads > 1)}, median of {self.repeats}"


class _SideFailedError(Exception):
    """A child raised or died; its error in one line."""


class _Team:
    """The processes of one side at one number of tokens: one, or one per rank."""

    def __init__(self, settings: Settings, side: str, tokens: int, ranks: int, folder: Path) -> None:
        self.rows = [Row(side, tokens, rank, ranks, max(1, settings.threads // ranks)) for rank in range(ranks)]
        self._settings, self._inputs, self._own = settings, folder, folder / f"{tokens}-{side}-{ranks}"
        self._children: dict[Connection, tuple[Row, subprocess.Popen]] = {}

    def start(self) -> None:
        if not SIDES[self.rows[0].side].installed:
            self._leave("not installed", NOT_INSTALLED)
            return
        self._own.mkdir()
        settings = self._settings
        for row in self.rows:
            connection, other = Pipe()
            self._children[connection] = (row, self._start(row, other.fileno()))
            other.close()  # so that the child's death is an end of file here
            job = Job(
                side=row.side,
                tokens=row.tokens,
                hidden=settings.hidden,
                vocab=settings.vocab,
                chunk=settings.chunk,
                dtype=settings.dtype,
                device=settings.device,
                threads=row.threads,
                folder=self._inputs,
                rank=row.rank,
                ranks=row.ranks,
                store=self._own / "store",
            )
            self._send(connection, job)

    def _start(self, row: Row, descriptor: int) -> subprocess.Popen:
        environment = dict(os.environ) | {
            "OMP_NUM_THREADS": str(row.threads),
            "TORCHINDUCTOR_CACHE_DIR": str(self._own / "inductor"),  # nothing compiled before is found
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # more would start processes that are busy while others are timed
            "PYTHONSAFEPATH": "1",
            processes.PARENT: str(os.getpid()),
        }
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with self._log(row).open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(descriptor)],
                env=environment,
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl-C is ours to hear
            )

    def _log(self, row: Row) -> Path:
        return self._own / f"{row.rank}.log"

    @property
    def alive(self) -> bool:
        return bool(self._children)

    def wait_ready(self) -> None:
        with self._failures():
            self._receive(Ready)

    def warm_up(self) -> None:
        self._turn(timed=False)

    def measure(self) -> None:
        self._turn(timed=True)

    def _turn(self, timed: bool) -> None:
        with self._failures():
            for connection in self._children:
                self._send(connection, "go")
            for row, turn in self._receive(Turn):
                row.loss, row.memory_bytes = turn.loss, turn.memory
                if timed:
                    row.seconds.append(turn.seconds)

    @staticmethod
    def _send(connection: Connection, message: Job | str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the child is dead: receiving tells why
            connection.send(message)

    def _receive(self, expected: type) -> list[tuple[Row, Any]]:
        """One message of every child. Raises _SideFailedError with the first bad one."""
        replies: list[tuple[Row, Any]] = []
        waiting = set(self._children)
        while waiting:
            for connection in wait(waiting):
                assert isinstance(connection, Connection)
                row, process = self._children[connection]
                try:
                    reply = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise _SideFailedError(self._last_words(row, process)) from None
                if isinstance(reply, Failed):
                    raise _SideFailedError(reply.error)
                assert isinstance(reply, expected)
                replies.append((row, reply))
                waiting.remove(connection)
        return replies

    def _last_words(self, row: Row, process: subprocess.Popen) -> str:
        code = process.wait()
        if code == -signal.SIGKILL:
            return "the process was killed: out of memory?"
        lines = self._log(row).read_text(errors="replace").split("\n")
        return f"the process ended with exit code {code}: {next((line for line in reversed(lines) if line.strip()), 'no output')[:300]}"

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except _SideFailedError as error:
            self.end()
            self._leave("failed", str(error))

    def _leave(self, status: Status, error: str) -> None:
        for row in self.rows:
            row.status, row.error, row.loss, row.seconds, row.memory_bytes = status, error, None, [], None

    def end(self) -> None:
        """Ends the processes, with what they started (compilers)."""
        for connection, (_, process) in self._children.items():
            connection.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._children = {}


def benchmark(settings: Settings, out: Path, on_tokens: Callable[[list[Row]], None] = lambda rows: None) -> list[Row]:
    """Measures and writes out/bench_kl.json and out/bench_kl.png anew after each number of tokens; calls on_tokens with its rows.

    A side that fails or is not installed has rows that say so. Raises DisagreementError where losses that should be one differ,
    UserError where memory cannot be measured or the inputs have no room.
    """
    if not os.access(next(folder for folder in (out, *out.absolute().parents) if folder.exists()), os.W_OK) or out.is_file():
        raise UserError(f"--out {out}: not a folder that can be written")
    out.mkdir(parents=True, exist_ok=True)
    if settings.device == "cpu":
        try:
            HostMemory()
        except OSError as error:
            raise UserError(f"memory cannot be measured on this system: {error}") from None
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="trd-bench-") as name:
        folder = Path(name)
        need = 2 * (settings.vocab + max(settings.tokens)) * settings.hidden * DTYPES[settings.dtype].itemsize
        if shutil.disk_usage(folder).free < need:
            raise UserError(f"the inputs need {need / 2**30:.1f} GiB in {folder.parent}, which has less; set TMPDIR to another folder")
        write_inputs(folder, max(settings.tokens), settings.hidden, settings.vocab, settings.dtype, SEED)
        for tokens in settings.tokens:
            measured = _measure(settings, tokens, folder)
            rows += measured
            write_json(out / "bench_kl.json", _record(settings, rows))
            kl_report.plot(rows, settings.title, out / "bench_kl.png")
            on_tokens(measured)
    return rows


def _measure(settings: Settings, tokens: int, folder: Path) -> list[Row]:
    teams = [_Team(settings, side, tokens, 1, folder) for side in settings.sides]
    if settings.ranks > 1:
        teams.append(_Team(settings, "linear_kl", tokens, settings.ranks, folder))
    rows = [row for team in teams for row in team.rows]
    try:
        with bar(f"{tokens} tokens", total=len(teams) * (2 + settings.repeats), unit="calls") as progress:
            for team in teams:
                team.start()
            _round(teams, _Team.wait_ready, progress, "starts")
            _round(teams, _Team.warm_up, progress, "warms up")
            _check_losses(rows, TOLERANCE[settings.dtype])
            for repeat in range(settings.repeats):
                _round(teams[::-1] if repeat % 2 else teams, _Team.measure, progress, f"call {repeat + 1}")
    finally:
        for team in teams:
            team.end()
    return rows


def _round(teams: list[_Team], do: Callable[[_Team], None], progress: Bar, what: str) -> None:
    for team in teams:
        if team.alive:
            progress.note(f"{team.rows[0].side} {what}")
            do(team)
        progress.advance()


def _check_losses(rows: list[Row], tolerance: float) -> None:
    for agrees in ("full", "top64"):
        losses = {row.name: row.loss for row in rows if SIDES[row.side].agrees == agrees and row.loss is not None}
        first = next(iter(losses.values()), 0.0)
        if not all(abs(loss - first) <= tolerance * abs(first) for loss in losses.values()):  # so that NaN does not pass
            values = ", ".join(f"{name} {loss:.6g}" for name, loss in losses.items())
            raise DisagreementError(f"the losses at {rows[0].tokens} tokens differ by more than {tolerance} of their value: {values}")


def _record(settings: Settings, rows: list[Row]) -> dict[str, Any]:
    versions: dict[str, str | None] = {"trd_megatron": __version__}
    for name in ("torch", "triton", "liger-kernel", "trl"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    machine = {"processor": _processor(), "cores": os.cpu_count()}
    machine["gpu"] = torch.cuda.get_device_name() if settings.device == "cuda" else None
    return {
        "settings": asdict(settings) | {"seed": SEED},
        "versions": versions,
        "machine": machine,
        "results": [row.json() for row in rows],
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()

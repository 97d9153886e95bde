"""`trd bench kl`: time and memory of ways to compute one loss, forward KL(teacher‖student) over the whole vocabulary and its gradient.

The inputs are drawn once and lie in files that every child process maps. Each side has one fresh process per number of tokens.
The processes take turns, one at a time and round by round, so that what else the machine does hits all sides.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trd_megatron.bench import kl_report, record
from trd_megatron.bench.children import Child, ChildFailedError, receive
from trd_megatron.bench.kl_child import Job, Ready, Turn
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
        record.check_device(self.device)
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


class _Team:
    """The processes of one side at one number of tokens: one, or one per rank."""

    def __init__(self, settings: Settings, side: str, tokens: int, ranks: int, folder: Path) -> None:
        self.rows = [Row(side, tokens, rank, ranks, max(1, settings.threads // ranks)) for rank in range(ranks)]
        self._settings, self._inputs, self._own = settings, folder, folder / f"{tokens}-{side}-{ranks}"
        self._children: list[Child] = []

    def start(self) -> None:
        if not SIDES[self.rows[0].side].installed:
            self._leave("not installed", NOT_INSTALLED)
            return
        self._own.mkdir()
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": str(self._own / "inductor"),  # nothing compiled before is found
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # more would start processes that are busy while others are timed
        }
        settings = self._settings
        for row in self.rows:
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
            self._children.append(Child("kl_child", job, row.threads, self._own / f"{row.rank}.log", environment))

    @property
    def alive(self) -> bool:
        return bool(self._children)

    def wait_ready(self) -> None:
        with self._failures():
            receive(self._children, Ready)

    def warm_up(self) -> None:
        self._turn(timed=False)

    def measure(self) -> None:
        self._turn(timed=True)

    def _turn(self, timed: bool) -> None:
        with self._failures():
            for child in self._children:
                child.send("go")
            for row, turn in zip(self.rows, receive(self._children, Turn), strict=True):
                row.loss, row.memory_bytes = turn.loss, turn.memory
                if timed:
                    row.seconds.append(turn.seconds)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except ChildFailedError as error:
            self.end()
            self._leave("failed", str(error))

    def _leave(self, status: Status, error: str) -> None:
        for row in self.rows:
            row.status, row.error, row.loss, row.seconds, row.memory_bytes = status, error, None, [], None

    def end(self) -> None:
        for child in self._children:
            child.end()
        self._children = []


def benchmark(settings: Settings, out: Path, on_tokens: Callable[[list[Row]], None] = lambda rows: None) -> list[Row]:
    """Measures and writes out/bench_kl.json and out/bench_kl.png anew after each number of tokens; calls on_tokens with its rows.

    A side that fails or is not installed has rows that say so. Raises DisagreementError where losses that should be one differ,
    UserError where memory cannot be measured or the inputs have no room.
    """
    record.prepare(out, settings.device)
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
    return {
        "settings": asdict(settings) | {"seed": SEED},
        "versions": record.versions(["torch", "triton", "liger-kernel", "trl"]),
        "machine": record.machine(settings.device),
        "results": [row.json() for row in rows],
    }

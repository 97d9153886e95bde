"""`trd bench learner`: a step of training in our learner and in a Hugging Face + PEFT loop; speed, memory, and where our time goes.

Each side has one process per model. The two take turns, step by step, so that what else the machine does hits both. They start
from the same adapters, and the benchmark fails if loss or gradient norm of the first step differ: they do the same work.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trd_megatron.bench import learner_report, learner_work, record
from trd_megatron.bench.children import Child, ChildFailedError, receive
from trd_megatron.bench.learner_child import Job, Ready, Turn
from trd_megatron.bench.learner_peer import batches
from trd_megatron.bench.learner_profile import Profile
from trd_megatron.bench.learner_report import Row
from trd_megatron.builtin_models import resolve_model
from trd_megatron.convert.architecture import Architecture
from trd_megatron.errors import UserError
from trd_megatron.learner.packing import Sample
from trd_megatron.progress import bar
from trd_megatron.run_dir import write_json

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # largest relative difference of loss and gradient norm in the first step
ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


class DisagreementError(RuntimeError):
    """The two sides' first steps differ."""


@dataclass(frozen=True)
class Settings:
    """batch: samples of one step. repeats: timed steps of each side. Raises UserError for what cannot be measured."""

    models: list[str]
    batch: int
    repeats: int
    threads: int
    device: str
    dtype: str
    profile: bool

    def __post_init__(self) -> None:
        record.check_device(self.device)
        if self.dtype not in TOLERANCE:
            raise UserError(f"--dtype {self.dtype}: it must be one of {', '.join(TOLERANCE)}")
        if self.profile and self.device != "cpu":
            raise UserError("--profile is for --device cpu: give --no-profile")
        for name, value in {"batch": self.batch, "repeats": self.repeats, "threads": self.threads}.items():
            if value < 1:
                raise UserError(f"--{name} {value}: it must be at least 1")

    @property
    def title(self) -> str:
        sizes = f"{self.batch} samples a step, at most {learner_work.BATCH_TOKENS} tokens a forward, {self.dtype}, {self.device}"
        return f"{sizes}, {self.threads} thread{'s' * (self.threads > 1)}, median of {self.repeats}"


@dataclass
class Result:
    """One model. peer_padding: share of the tokens in the peer's forwards that is padding."""

    rows: list[Row]
    peer_padding: float
    profile: Profile | None = None

    def json(self) -> dict[str, Any]:
        found = self.profile
        shares = found and asdict(found) | {"products": found.products, "attention": found.attention, "share": found.share}
        ratios = learner_report.ratios(self.rows)
        return {"sides": [row.json() for row in self.rows], "ratios": ratios, "peer_padding": self.peer_padding, "profile": shares}


class _Side:
    """One side's process, and its row. After a failure the row says so and the other side goes on alone."""

    def __init__(self, row: Row, job: Job, log: Path) -> None:
        self.row = row
        self._child: Child | None = Child("learner_child", job, job.threads, log, ONE_RANK)

    def wait_ready(self) -> None:
        with self._failures() as child:
            if child:
                self.row.loaded_bytes = receive([child], Ready)[0].memory

    def step(self, timed: bool) -> None:
        with self._failures() as child:
            if child:
                child.send("go")
                turn = receive([child], Turn)[0]
                self.row.losses.append(turn.loss)
                self.row.grad_norms.append(turn.grad_norm)
                self.row.memory_bytes = turn.memory
                if timed:
                    self.row.seconds.append(turn.seconds)

    def profile(self) -> Profile | None:
        with self._failures() as child:
            if child:
                child.send("profile")
                return receive([child], Profile)[0]
        return None

    @contextlib.contextmanager
    def _failures(self) -> Iterator[Child | None]:
        try:
            yield self._child
        except ChildFailedError as error:
            self.end()
            row = self.row
            row.error, row.seconds, row.losses, row.grad_norms, row.memory_bytes, row.loaded_bytes = str(error), [], [], [], None, None

    def end(self) -> None:
        if self._child:
            self._child.end()
            self._child = None


def benchmark(settings: Settings, out: Path, on_model: Callable[[Result], None] = lambda result: None) -> list[Result]:
    """Measures and writes out/bench_learner.json anew after each model; calls on_model with its result.

    Raises DisagreementError where the sides' first steps differ, UserError for a model or folder that cannot be used.
    """
    record.prepare(out, settings.device)
    folders = [resolve_model(model) for model in settings.models]
    results: list[Result] = []
    for model, folder in zip(settings.models, folders, strict=True):
        results.append(_measure(settings, model, folder))
        write_json(out / "bench_learner.json", _record(settings, results))
        on_model(results[-1])
    return results


def _measure(settings: Settings, model: str, folder: Path) -> Result:
    vocab_size = Architecture.from_hf(folder).vocab_size
    config, samples = learner_work.config(settings.device, settings.dtype), learner_work.samples(settings.batch, vocab_size)
    tokens = sum(len(sample.student_prompt_ids) + sample.response_tokens for sample in samples)
    rows = [Row(side, model, tokens) for side in ("ours", "peer")]
    result = Result(rows, _padding(samples))
    sides: list[_Side] = []
    with tempfile.TemporaryDirectory(prefix="trd-bench-") as name, bar("steps", 2 * (1 + settings.repeats), "steps") as progress:
        try:
            for row in rows:
                job = Job(row.side, folder, samples, config, settings.threads, Path(name) / "adapters.safetensors")
                progress.note(f"{row.side} loads")
                sides.append(_Side(row, job, Path(name) / f"{row.side}.log"))
                sides[-1].wait_ready()  # the peer takes over the adapters that ours wrote
            for number in range(1 + settings.repeats):
                for side in sides[::-1] if number % 2 else sides:
                    progress.note(side.row.side)
                    side.step(timed=number > 0)
                    progress.advance()
                if number == 0:
                    check_agreement(rows, TOLERANCE[settings.dtype])
            if settings.profile:
                result.profile = sides[0].profile()
        finally:
            for side in sides:
                side.end()
    return result


def check_agreement(rows: list[Row], tolerance: float) -> None:
    """Raises DisagreementError where the first step's loss or gradient norm differ by more than `tolerance` of their value."""
    ours, peer = rows
    if ours.error or peer.error:
        return
    for what, one, other in (("losses", ours.losses[0], peer.losses[0]), ("gradient norms", ours.grad_norms[0], peer.grad_norms[0])):
        if not abs(one - other) <= tolerance * abs(other):  # so that NaN does not pass
            values = f"ours {one:.8g}, peer {other:.8g}"
            raise DisagreementError(f"{ours.model}: the {what} of the first step differ by more than {tolerance} of their value: {values}")


def _padding(samples: list[Sample]) -> float:
    real = padded = 0
    for batch in batches(samples, learner_work.BATCH_TOKENS):
        for prompts in ([s.student_prompt_ids for s in batch], [s.teacher_prompt_ids for s in batch]):
            lengths = [len(prompt) + sample.response_tokens for prompt, sample in zip(prompts, batch, strict=True)]
            real, padded = real + sum(lengths), padded + len(lengths) * max(lengths)
    return 1 - real / padded


def _record(settings: Settings, results: list[Result]) -> dict[str, Any]:
    return {
        "settings": asdict(settings) | {"batch_tokens": learner_work.BATCH_TOKENS},
        "versions": record.versions(["torch", "transformers", "peft", "megatron-core"]),
        "machine": record.machine(settings.device),
        "results": [result.json() for result in results],
    }

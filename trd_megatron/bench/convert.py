"""`trd bench convert`: speed and peak memory of the conversions, beside `cp` of the same files on the same disk.

Both read a source that is not in the page cache and are through when their files are on the disk: conversions sync what they write,
and after cp every file is synced. They take turns, so that what else the machine and its disk do hits both. A conversion runs in a
process of its own, which has imported everything before the clock starts.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trd_megatron.bench import convert_model, record
from trd_megatron.bench.children import Child, receive
from trd_megatron.bench.convert_child import Done, Job, Ready
from trd_megatron.bench.convert_report import Row
from trd_megatron.convert import commands
from trd_megatron.convert.operations import FILE_BYTES
from trd_megatron.convert.output import SPARE
from trd_megatron.convert.weight_files import Weights
from trd_megatron.errors import UserError
from trd_megatron.progress import bar
from trd_megatron.run_dir import write_json


class DisagreementError(RuntimeError):
    """The model is not bit-equal after its way to Megatron and back."""


@dataclass(frozen=True)
class Settings:
    """size: bytes of the model's weights, at least. repeats: runs of each conversion, and of cp."""

    size: int
    repeats: int

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise UserError(f"--repeats {self.repeats}: it must be at least 1")
        convert_model.shape(self.size)

    @property
    def title(self) -> str:
        model = convert_model.shape(self.size)
        return f"{model.nbytes / 1e9:.2f} GB, Llama with {model.layers} layers of width {model.hidden}, bfloat16, median of {self.repeats}"


def benchmark(settings: Settings, out: Path, on_row: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Measures and writes out/bench_convert.json anew after each conversion; calls on_row with its row.

    Works in a temporary folder in `out`, which is always deleted. Raises DisagreementError where the model comes back changed,
    UserError for a folder that cannot be used or has too little room, ChildFailedError where a conversion fails.
    """
    record.prepare(out, "cpu")
    model = convert_model.shape(settings.size)
    needed, free = 3 * model.nbytes + 4 * SPARE, shutil.disk_usage(out).free  # source, its conversion, and one more of either
    if free < needed:
        raise UserError(f"--out {out}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; --size makes a smaller model")
    load = os.getloadavg()[0]
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory(prefix="temporary-", dir=out) as name,
        bar("runs", 2 * 3 * settings.repeats, "runs") as progress,
    ):
        folder = Path(name)
        progress.note("makes the model")
        hf, megatron, back, adapter = (folder / part for part in ("hf", "megatron", "back", "adapter"))
        nbytes = convert_model.write_model(model, hf)
        convert_model.write_adapter(hf, adapter)
        plan = [
            ("hf-to-megatron", hf, megatron, Job("hf_to_megatron", {"hf_path": str(hf), "megatron_path": megatron})),
            ("megatron-to-hf", megatron, back, Job("megatron_to_hf", {"megatron_path": megatron, "hf_path": back})),
            (
                "merge-lora", hf, folder / "merged",
                Job("merge_lora", {"base_path": str(hf), "adapter_path": adapter, "output_path": folder / "merged"}),
            ),
        ]  # fmt: skip
        for conversion, source, target, job in plan:
            row = Row(conversion, nbytes)
            for number in range(settings.repeats):
                sides: list[tuple[str, Callable[[], None]]] = [
                    (conversion, lambda source=source, target=target, job=job, row=row: _convert(job, source, target, row)),  # type: ignore[misc]
                    ("cp", lambda source=source, row=row: _copy(source, folder / "copy", row)),  # type: ignore[misc]
                ]
                for side, run in sides[::-1] if number % 2 else sides:
                    progress.note(f"{conversion}: {side}")
                    run()
                    progress.advance()
            if target == back:
                progress.note("compares")
                _check_equal(hf, back)
            if target != megatron:
                shutil.rmtree(target)
            rows.append(row)
            write_json(out / "bench_convert.json", _record(settings, rows, load))
            on_row(row)
    return rows


def _convert(job: Job, source: Path, target: Path, row: Row) -> None:
    """One conversion in a new process; what an earlier one wrote makes room."""
    shutil.rmtree(target, ignore_errors=True)
    log = target.with_name(f"{target.name}.log")
    start = time.perf_counter()
    child = Child("convert_child", job, torch.get_num_threads(), log, commands.ENVIRONMENT)
    try:
        row.import_bytes = receive([child], Ready)[0].memory
        row.start_seconds.append(time.perf_counter() - start)
        _drop_pages(source)
        child.send("go")
        done = receive([child], Done)[0]
    finally:
        child.end()
    row.seconds.append(done.seconds)
    row.memory_bytes.append(done.memory)


def _copy(source: Path, target: Path, row: Row) -> None:
    _drop_pages(source)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)
    row.cp_seconds.append(time.perf_counter() - start)
    for path in _files(target):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    row.cp_synced_seconds.append(time.perf_counter() - start)
    shutil.rmtree(target)


def _drop_pages(folder: Path) -> None:
    """Takes the files of a folder out of the page cache. What is not yet on the disk stays there, so it is synced first."""
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _check_equal(one: Path, other: Path) -> None:
    ours, theirs = Weights(one), Weights(other)
    if ours.shapes != theirs.shapes or ours.dtypes != theirs.dtypes:
        raise DisagreementError("the model has other tensors after hf-to-megatron and megatron-to-hf")
    for name in ours.shapes:
        if not torch.equal(ours.read(name).view(torch.int16), theirs.read(name).view(torch.int16)):
            raise DisagreementError(f"{name} has other values after hf-to-megatron and megatron-to-hf")


def _record(settings: Settings, rows: list[Row], load: float) -> dict[str, Any]:
    model = convert_model.shape(settings.size)
    return {
        "settings": asdict(settings) | {"hidden": model.hidden, "layers": model.layers, "file_bytes": FILE_BYTES},
        "versions": record.versions(["torch", "safetensors", "transformers"]),
        "machine": record.machine("cpu") | {"load_before": load},
        "results": [row.json() for row in rows],
    }

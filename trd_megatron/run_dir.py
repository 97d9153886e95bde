"""What lies where in a run, and the rules that make a run resumable.

Every stage owns one folder with a manifest. The manifest's fingerprint is a hash of the settings that the stage reads, of
its outside inputs (the user's file, model folders) and of the fingerprints of the stages to its left. A folder whose
manifest is done and carries the wanted fingerprint is skipped; one with the wanted fingerprint that is still running goes
on where it stopped; one with another fingerprint is moved to stale/, never deleted, and comes back when it is wanted again.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from trd_megatron import __version__
from trd_megatron.errors import UserError

MANIFEST = "manifest.json"
LOCK = ".lock"
ROW_GROUP = 256  # rows of a parquet file that are read or written at once
SERVERS = "servers"  # logs of SGLang servers; `trd serve` makes it before there is a run
LAUNCH = "launch"  # scripts and logs of a launched run's jobs; `trd launch` makes it before there is a run
IN_ROUND = ("rollouts", "refined", "train", "adapter", "hf", "eval")  # folders that every round has
RECORDED_VERSIONS = ("torch", "transformers", "megatron-core", "pyarrow", "math-verify")


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that shape its results."""
    found = {"trd_megatron": __version__}
    for name in RECORDED_VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_temporary(path: Path) -> bool:
    """Whether atomic_write made it: what a kill leaves behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` that replaces it when the block ends well; on an error `path` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


@dataclass
class Manifest:
    """What a stage folder holds and from what it was made. seconds: working time over all attempts but those that were killed,
    without server_start_seconds, for which it waited for servers to start."""

    stage: str
    status: str  # running | done
    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    counts: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    seconds: float = 0.0
    server_start_seconds: float = 0.0
    started: str = ""
    finished: str = ""

    @staticmethod
    def read(folder: Path) -> "Manifest | None":
        """The manifest of a stage folder, None if there is none. Raises UserError if it cannot be read."""
        path = folder / MANIFEST
        if not path.exists():
            return None
        try:
            return Manifest(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): move {folder} away and run again") from None

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, dataclasses.asdict(self))


class RunDir:
    """The folder of a run, and the view of one of its rounds: with several rounds the folders IN_ROUND lie in rounds/<round>/.

    Raises UserError if `path` is a file, holds something else than a run, or holds a run of another experiment.
    """

    def __init__(self, path: str | Path, experiment: str) -> None:
        self.path = Path(path)
        self.round = 0
        self._work = self.path  # where the folders IN_ROUND lie
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run_dir={self.path} is a file: choose another run_dir=PATH")
        if self.path.is_dir() and any(path.name not in (LOCK, SERVERS, LAUNCH) and not _is_temporary(path) for path in self.path.iterdir()):
            if not self.config_file.exists():
                raise UserError(f"run_dir={self.path} holds other files and no config.yaml: choose an empty run_dir=PATH")
            held = read_config(self.path).get("name")
            if held != experiment:
                raise UserError(f"run_dir={self.path} holds a run of experiment '{held}', not '{experiment}': choose another run_dir=PATH")

    config_file = property(lambda self: self.path / "config.yaml")
    problems = property(lambda self: self.folder("problems"))
    rollouts = property(lambda self: self.folder("rollouts"))
    refined = property(lambda self: self.folder("refined"))
    train = property(lambda self: self.folder("train"))
    checkpoints = property(lambda self: self.folder("train") / "checkpoints")
    hf = property(lambda self: self.folder("hf"))
    eval = property(lambda self: self.folder("eval"))
    report = property(lambda self: self.folder("report"))
    stale = property(lambda self: self.path / "stale")

    def folder(self, name: str) -> Path:
        """A stage's folder in this view: problems, rollouts, eval/base, ..."""
        top, _, _ = name.partition("/")
        if top not in IN_ROUND:
            return self.path / name
        # Of a run that had one round, until gather_rounds moves it.
        waits = self.round == 0 and not (self._work / top).exists() and (self.path / top).exists()
        return (self.path if waits else self._work) / name

    def in_round(self, number: int, rounds: int) -> "RunDir":
        """The view of round `number`, from 0, in a run of so many rounds. A run that had several keeps rounds/ when it has one again."""
        view = copy.copy(self)
        view.round = number
        view._work = self._rounds / str(number) if rounds > 1 or self._rounds.is_dir() else self.path
        return view

    _rounds = property(lambda self: self.path / "rounds")

    def gather_rounds(self, rounds: int) -> None:
        """Moves what was made with one round into rounds/0, where it belongs in a run of several. To be called under `lock`.

        Each folder is renamed; a kill between two leaves the rest to the next call. Raises UserError if a folder is in both places.
        """
        first = self.in_round(0, rounds)._work
        if first == self.path:
            return
        for name in IN_ROUND:
            source, target = self.path / name, first / name
            if not source.exists():
                continue
            if target.exists():
                raise UserError(f"{source} and {target} are both there, and a run of several rounds has the second: move one away")
            first.mkdir(parents=True, exist_ok=True)
            source.rename(target)

    def write_config(self, config: dict[str, Any]) -> None:
        with atomic_write(self.config_file) as file:
            yaml.safe_dump(config, file, sort_keys=False, allow_unicode=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process. Raises UserError if another process works in it; a dead holder's lock is void."""
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK).open("w")
        except OSError as error:
            raise UserError(f"run_dir={self.path} cannot be written ({error.strerror}): choose another run_dir=PATH") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process works in {self.path}: wait for it, or choose another run_dir=PATH") from None
            for path in self.path.rglob(".*.tmp"):  # a killed process left it
                if path.is_file():
                    path.unlink()
            yield


def read_config(path: Path) -> dict[str, Any]:
    """The resolved configuration of an existing run. Raises UserError if there is none or it cannot be read."""
    try:
        values = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not a run directory: it has no config.yaml") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path / 'config.yaml'} is damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path / 'config.yaml'} is damaged: it is not a mapping")
    return values


class StageFolder:
    """One stage's folder while the stage works on it: opened with the wanted fingerprint, closed with the counts."""

    def __init__(self, run: RunDir, stage: str, folder: Path, settings: dict[str, Any], inputs: dict[str, str], kept: bool = True) -> None:
        """kept False: what was made otherwise is not parked in stale/ but made anew each time."""
        self.run, self.stage, self.folder, self.settings, self.inputs, self.kept = run, stage, folder, settings, inputs, kept
        self.fingerprint = digest({"stage": stage, "settings": settings, "inputs": inputs})

    def state(self) -> str:
        """done (can be skipped), running (can go on), stale (made otherwise), or missing."""
        manifest = Manifest.read(self.folder)
        if manifest is not None and manifest.fingerprint == self.fingerprint:
            return manifest.status
        parked = Manifest.read(self._parked(self.fingerprint))
        if parked is not None:
            return parked.status
        return "missing" if manifest is None else "stale"

    def _parked(self, fingerprint: str) -> Path:
        return self.run.stale / f"{self.stage}-{fingerprint[:16]}"

    def open(self) -> Manifest:
        """Makes the folder ready: parks what was made otherwise, brings back what was parked, or starts anew."""
        manifest = Manifest.read(self.folder)
        if manifest is None and self.folder.exists() and any(not _is_temporary(path) for path in self.folder.iterdir()):
            # A folder without a manifest was never a finished stage's: the manifest is the first file written.
            raise UserError(f"{self.folder} holds files but no {MANIFEST}: move it away and run again")
        self._park(manifest)
        if manifest is not None and manifest.fingerprint != self.fingerprint:
            manifest = None
        if manifest is None:
            parked = self._parked(self.fingerprint)
            if parked.exists():
                shutil.rmtree(self.folder, ignore_errors=True)  # at most what a kill left behind
                parked.rename(self.folder)
                manifest = Manifest.read(self.folder)
        if manifest is None:
            manifest = Manifest(self.stage, "running", self.fingerprint, self.settings, self.inputs, started=_now())
            self.folder.mkdir(parents=True, exist_ok=True)
            manifest.write(self.folder)
        return manifest

    def bring(self, make: Callable[[Path], None]) -> None:
        """Parks what was made otherwise, and lets `make` put a finished folder with the wanted fingerprint into its place."""
        self._park(Manifest.read(self.folder))
        shutil.rmtree(self.folder, ignore_errors=True)  # at most what a kill left behind
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        make(self.folder)

    def _park(self, manifest: Manifest | None) -> None:
        if manifest is None or manifest.fingerprint == self.fingerprint:
            return
        if self.kept:
            target = self._parked(manifest.fingerprint)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.folder.rename(target)
        else:
            shutil.rmtree(self.folder)

    def pause(self, manifest: Manifest, seconds: float) -> None:
        """Notes the working time of an attempt that did not finish."""
        manifest.seconds += seconds
        manifest.write(self.folder)

    def close(self, manifest: Manifest, counts: dict[str, Any], seconds: float) -> None:
        """Marks the stage done."""
        manifest.status, manifest.counts, manifest.finished = "done", counts, _now()
        manifest.seconds += seconds
        manifest.versions = versions()
        manifest.write(self.folder)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# Shards


def shard_path(folder: Path, index: int) -> Path:
    """part-00007.parquet"""
    return folder / f"part-{index:05d}.parquet"


def write_parquet(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> int:
    """Writes rows atomically, ROW_GROUP of them in memory at a time, and returns how many they were. A missing key or a wrong type
    raises before anything is replaced."""
    count, remaining = 0, iter(rows)
    with atomic_write(path, "wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while group := list(islice(remaining, ROW_GROUP)):
            table = pa.Table.from_pylist(group, schema=schema)
            for name in schema.names:
                if not schema.field(name).nullable and table.column(name).null_count:
                    raise ValueError(f"column {name} must not be null")
            writer.write_table(table)
            count += len(group)
    return count


@contextlib.contextmanager
def _parquet_file(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            if file.schema_arrow.names != schema.names:
                raise UserError(f"{path} has columns {file.schema_arrow.names}, expected {schema.names}")
            yield file
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({str(error).splitlines()[0]})") from None


def read_columns(path: Path, schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    """Some columns of a shard. Raises UserError if it is damaged or has other columns than `schema`."""
    with _parquet_file(path, schema) as file:
        return file.read(columns=list(columns)).select(list(columns))


def read_groups(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """A large file, ROW_GROUP rows in memory at a time. Raises UserError as `read_columns` does."""
    with _parquet_file(path, schema) as file:
        for index in range(file.num_row_groups):
            yield file.read_row_group(index)


def read_parquet(path: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    """Reads a shard. Raises UserError if it is damaged or has other columns than `schema`."""
    return read_columns(path, schema, schema.names).to_pylist()


def packed_ids(column: pa.ChunkedArray) -> "list[array[int]]":
    """The lists of a column of list<int32>, in 4 bytes an element (a list of Python integers takes 36). No list may be null."""
    found = []
    for chunk in column.chunks:
        values = memoryview(chunk.values.to_numpy()).cast("B")
        for start, end in pairwise(chunk.offsets.to_pylist()):
            found.append(array("i"))
            found[-1].frombytes(values[4 * start : 4 * end])
    return found


def merge_shards(folder: Path, target: Path, schema: pa.Schema) -> None:
    """All rows of a stage folder in one file, in shard order, written atomically. Its origins are those of all of them."""
    shards = sorted(folder.glob("part-*.parquet"))
    schema = with_origins(schema, origins(shards))
    with atomic_write(target, "wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for path in shards:
            writer.write_table(read_columns(path, schema, schema.names).cast(schema))


_ORIGINS = b"trd_megatron.origins"  # key in a parquet file's metadata
Origins = dict[str, list[Any]]  # "engines" and "graders" -> what they were, one after the other, each once


def with_origins(schema: pa.Schema, values: Origins) -> pa.Schema:
    """The schema of a file that says what made its rows."""
    return schema.with_metadata({_ORIGINS: json.dumps(values, sort_keys=True)})


def origins(paths: Sequence[Path]) -> Origins:
    """What made the rows of these files: the different origins in their order. Raises UserError if one is damaged."""
    found: Origins = {}
    for path in paths:
        try:
            metadata = pq.read_schema(path).metadata or {}
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} cannot be read as parquet ({str(error).splitlines()[0]})") from None
        for name, values in json.loads(metadata.get(_ORIGINS, b"{}")).items():
            known = found.setdefault(name, [])
            known += [value for value in values if value not in known]
    return found


def read_shards(folder: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    """All rows of a stage folder, in shard order."""
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in read_parquet(path, schema)]

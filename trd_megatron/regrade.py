"""`trd grade`: grades a run's samples anew, file by file, without drawing any.

What depends on the verdicts follows: the first attempt's label beside each rewrite, manifests, eval/summary.json and the report.
RUN/.grading.json remembers the files that are done, so that an interrupted grading goes on.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trd_megatron import pipeline, preflight
from trd_megatron.config import Config, to_dict
from trd_megatron.errors import UserError
from trd_megatron.evaluate import benchmarks
from trd_megatron.progress import Bar, bar
from trd_megatron.records import REFINED, TRAJECTORY
from trd_megatron.run_dir import Manifest, RunDir, atomic_write, origins, with_origins, write_json
from trd_megatron.stages import evaluate, prepare
from trd_megatron.stages.generate import counts, graded_columns
from trd_megatron.verify.grader import Grader, kind

JOURNAL = ".grading.json"
Key = tuple[str, int]  # problem_id, sample_index


@dataclass(frozen=True)
class _File:
    """One file of samples. problems: by id. label: what the summary calls it. first: the rollouts' labels, of a file of rewrites."""

    path: Path
    label: str
    schema: pa.Schema
    problems: Callable[[], Mapping[str, Mapping[str, Any]]]
    first: Callable[[], Mapping[Key, bool | None]] | None = None

    @property
    def rows(self) -> int:
        return int(pq.read_metadata(self.path).num_rows)


@dataclass
class Changes:
    """label -> (old verdict, new verdict) -> samples, those that stayed the same included."""

    of: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)

    def add(self, label: str, found: Counter[tuple[str, str]]) -> None:
        self.of.setdefault(label, Counter()).update(found)

    @property
    def samples(self) -> int:
        return sum(found.total() for found in self.of.values())

    def lines(self) -> Iterator[tuple[str, str, str, int]]:
        """(label, old, new, samples) of what is another verdict now."""
        for label, found in self.of.items():
            for (old, new), count in sorted(found.items()):
                if old != new:
                    yield label, old, new, count


def regrade(config: Config, run_dir: RunDir) -> Changes:
    """Grades rollouts, rewrites and evaluations, of every round, that were made with the run's settings; config.verify may be another.

    Raises UserError if there are none, if another process works in the run, or if programs cannot be run safely here.
    """
    preflight.check_grading(config)
    with run_dir.lock():
        works = list(pipeline.works(config, run_dir))
        current = [work for work in works if work.stage.generates and _is_current(work)]
        files = [file for work in current for file in _files(work)]
        if not files:
            raise UserError(
                f"{run_dir.path} holds no samples that were made with its settings: `trd run` makes them, in its stage rollout; "
                f"`trd status {run_dir.path}` shows where it stands"
            )
        changes = _grade_files(config, run_dir, files)
        for work in current:
            _recount(work)
        done = [work for work in current if work.folder.state() == "done"]
        for view in {work.run_dir for work in done if work.stage.group == "evaluate"}:
            pipeline.write_summary(done, view)
        run_dir.write_config(to_dict(config))
        _report(works[-1])
        (run_dir.path / JOURNAL).unlink()
    return changes


def _is_current(work: pipeline.Work) -> bool:
    """Whether what lies in its folder, finished or begun, was made with the run's settings."""
    manifest = Manifest.read(work.folder.folder)
    return manifest is not None and manifest.fingerprint == work.folder.fingerprint


def _files(work: pipeline.Work) -> Iterator[_File]:
    folder, config, view = work.folder.folder, work.config, work.run_dir
    if work.stage.group != "evaluate":
        refined = work.stage.name == "refine"
        for path in sorted(folder.glob("part-*.parquet")):
            first = (lambda: _labels(view.rollouts)) if refined else None
            yield _File(path, work.name, REFINED if refined else TRAJECTORY, lambda: prepare.read(view), first)
        return
    for benchmark in config.evaluate.benchmarks:
        name = benchmarks.name(benchmark)
        whole = folder / f"{name}.parquet"

        def problems(benchmark: str = benchmark) -> dict[str, dict[str, Any]]:
            return {row["problem_id"]: row for row in evaluate.problems_of(config, benchmark, view)}

        for path in [whole] if whole.exists() else sorted((folder / f".{name}.parts").glob("part-*.parquet")):
            yield _File(path, f"{work.name} {name}", TRAJECTORY, problems)


def _labels(rollouts: Path) -> dict[Key, bool | None]:
    """The rollouts' passed."""
    found: dict[Key, bool | None] = {}
    for path in sorted(rollouts.glob("part-*.parquet")):
        table = graded_columns(path, TRAJECTORY)
        keys = zip(table["problem_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
        found |= dict(zip(keys, table["passed"].to_pylist(), strict=True))
    return found


def _grade_files(config: Config, run_dir: RunDir, files: list[_File]) -> Changes:
    """Those that RUN/.grading.json does not have yet. The changes are of all."""
    with Grader(config.verify) as grader:
        settings = {name: value for name, value in to_dict(config)["verify"].items() if name != "workers"}
        how = {"verify": settings, "grader": grader.facts({"math", "code"} if config.task == "code" else {"math"})}
        journal = _read_journal(run_dir.path / JOURNAL, how)
        changes = Changes()
        names = {file: str(file.path.relative_to(run_dir.path)) for file in files}
        for file in files:
            for old, new, count in journal.get(names[file], []):
                changes.add(file.label, Counter({(old, new): count}))
        left = [file for file in files if names[file] not in journal]
        cached: tuple[Any, Any, Any] = (None, None, None)  # label, problems, first labels: files of one label follow each other
        with bar("grade", sum(file.rows for file in files), "samples", start=changes.samples) as progress:
            for file in left:
                if cached[0] != file.label:
                    cached = (file.label, file.problems(), file.first() if file.first else None)
                found = _grade_file(file, cached[1], cached[2], grader, progress)
                journal[names[file]] = [[old, new, count] for (old, new), count in found.items()]
                write_json(run_dir.path / JOURNAL, {"how": how, "files": journal})
                changes.add(file.label, found)
        if not left:
            write_json(run_dir.path / JOURNAL, {"how": how, "files": journal})
    return changes


def _read_journal(path: Path, how: dict[str, Any]) -> dict[str, list[Any]]:
    """Files that are done -> their changes; empty if they were graded in another way, or if there is no readable journal."""
    try:
        journal = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path} is damaged: delete it, and everything is graded again") from None
    return journal["files"] if journal["how"] == how else {}


def _grade_file(
    file: _File,
    problems: Mapping[str, Mapping[str, Any]],
    first: Mapping[Key, bool | None] | None,
    grader: Grader,
    progress: Bar,
) -> Counter[tuple[str, str]]:
    """Writes the file anew with other verdicts, a row group at a time. (old, new) -> samples."""
    found: Counter[tuple[str, str]] = Counter()
    kinds: set[str] = set()
    made_by = origins([file.path])
    with pq.ParquetFile(file.path) as source:
        if source.schema_arrow.names != file.schema.names:
            raise UserError(f"{file.path} has columns {source.schema_arrow.names}, expected {file.schema.names}")
        ids = {problem for group in range(source.num_row_groups) for problem in _column(source, group, "problem_id")}
        unknown = ids - problems.keys()
        if unknown:
            raise UserError(f"{file.path}: its problem '{min(unknown)}' is not among the run's: move {file.path.parent} away and run again")
        kinds = {which for problem in ids if (which := kind(problems[problem])) is not None}
        schema = with_origins(file.schema, made_by | {"graders": [grader.facts(kinds)]})
        with atomic_write(file.path, "wb") as target, pq.ParquetWriter(target, schema, compression="zstd") as writer:
            for group in range(source.num_row_groups):
                table = _graded(source.read_row_group(group), problems, first, grader, found, progress)
                writer.write_table(table.cast(schema))
    return found


def _column(source: pq.ParquetFile, group: int, name: str) -> list[Any]:
    values: list[Any] = source.read_row_group(group, columns=[name])[name].to_pylist()
    return values


def _graded(
    table: pa.Table,
    problems: Mapping[str, Mapping[str, Any]],
    first: Mapping[Key, bool | None] | None,
    grader: Grader,
    found: Counter[tuple[str, str]],
    progress: Bar,
) -> pa.Table:
    names = ("problem_id", "sample_index", "finish_reason", "response", "verdict")
    ids, samples, finished, responses, before = (table[name].to_pylist() for name in names)
    drawn = [index for index, reason in enumerate(finished) if reason != "abort"]
    new: dict[str, list[Any]] = {name: [None] * len(ids) for name in ("passed", "verdict", "extracted_answer")}
    for index, verdict in zip(drawn, grader.grade([(problems[ids[index]], responses[index]) for index in drawn]), strict=True):
        progress.advance()
        if verdict is not None:
            for name in new:
                new[name][index] = getattr(verdict, name)
    progress.advance(len(ids) - len(drawn))
    found.update((old or "not graded", now or "not graded") for old, now in zip(before, new["verdict"], strict=True))
    if first is not None:
        new["initial_passed"] = [first[key] for key in zip(ids, samples, strict=True)]
    for name, values in new.items():
        position = table.schema.get_field_index(name)
        table = table.set_column(position, table.schema.field(position), pa.array(values, table.schema.field(position).type))
    return table


def _recount(work: pipeline.Work) -> None:
    """The manifest of a finished stage, after its verdicts changed."""
    folder = work.folder.folder
    manifest = Manifest.read(folder)
    assert manifest is not None
    if manifest.status != "done":
        return
    if work.stage.group == "evaluate":
        for name in manifest.counts:
            manifest.counts[name] |= evaluate.measured(folder / f"{name}.parquet")
    else:
        paths = sorted(folder.glob("part-*.parquet"))
        schema = REFINED if work.stage.name == "refine" else TRAJECTORY
        manifest.counts |= counts(pa.concat_tables([graded_columns(path, schema) for path in paths])) | origins(paths)
    manifest.write(folder)


def _report(work: pipeline.Work) -> None:
    """Writes the report anew, if it was there."""
    manifest = Manifest.read(work.folder.folder)
    if manifest is None or not _is_current(work) or manifest.status != "done":
        return
    started = time.monotonic()
    work.folder.close(manifest, work.stage.run(work.config, work.run_dir, work.folder.folder), time.monotonic() - started)

"""A finished run as report.compare reads it: its configuration, manifests, samples, metrics and costs."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from trd_megatron.config import Config, get, leaves, of_run
from trd_megatron.errors import UserError
from trd_megatron.evaluate import benchmarks
from trd_megatron.evaluate.figures import Samples
from trd_megatron.records import REFINED, TRAJECTORY
from trd_megatron.report import tables
from trd_megatron.run_dir import Manifest, RunDir, read_columns

GRADED = ("problem_id", "sample_index", "finish_reason", "passed", "verdict", "response_ids")


@dataclass(frozen=True)
class Run:
    """One finished run. last: the view of its last round. stages: label -> manifest of what the figures stand on."""

    path: Path
    config: Config
    last: RunDir
    stages: Mapping[str, Manifest]

    @staticmethod
    def read(path: Path) -> "Run":
        """Raises UserError if `path` is no run, or not finished."""
        config = of_run(path)
        whole = RunDir(path, config.name)
        last = whole.in_round(config.rounds - 1, config.rounds)
        folders = {"evaluate/base": whole.in_round(0, config.rounds).eval / "base"}
        if config.job == "distill":
            folders["rollout"] = last.rollouts
            if config.method.trajectory == "refined":
                folders["refine"] = last.refined
            folders |= {"train": last.train, "export/hf": last.hf}
        if config.job != "evaluate":
            folders["evaluate/student"] = last.eval / "student"
        stages = {}
        for label, folder in folders.items():
            manifest = Manifest.read(folder)
            if manifest is None or manifest.status != "done":
                state = "missing" if manifest is None else "not finished"
                raise UserError(
                    f"{path}: stage {label} is {state}; give its `trd run` command again (`trd status {path}` shows its stages)"
                )
            stages[label] = manifest
        run = Run(path, config, last, stages)
        run._check_made()
        return run

    def _check_made(self) -> None:
        """A run that was begun again with other settings has the old results until it is finished."""
        known = dict(leaves())
        for label, manifest in self.stages.items():
            other = [key for key, value in manifest.settings.items() if key in known and get(self.config, key) != value]
            other += [name for name, value in manifest.inputs.items() if name in self.stages and self.stages[name].fingerprint != value]
            if other:
                raise UserError(f"{self.path}: stage {label} was made with another {other[0]}: give its `trd run` command again")

    @property
    def method(self) -> str:
        """The row of the tables that it belongs to: of its method, and of the filter of its trajectories (the paper's section B.3)."""
        if self.config.job != "distill":
            return self.config.job
        chosen = self.config.data.filter
        return self.config.method.name if chosen == "all" else f"{self.config.method.name} ({chosen.replace('_', ' ')})"

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def benchmarks(self) -> list[str]:
        return [benchmarks.name(spec) for spec in self.config.evaluate.benchmarks]

    def folder(self, model: str) -> Path:
        """Of the samples of base, teacher or student; the first two were drawn in round 0."""
        view = self.last if model == "student" else self.last.in_round(0, self.config.rounds)
        return view.eval / model

    def evaluated(self, model: str) -> bool:
        manifest = Manifest.read(self.folder(model))
        return manifest is not None and manifest.status == "done"

    def samples(self, model: str, benchmark: str) -> Samples:
        path = self.folder(model) / f"{benchmark}.parquet"
        try:
            return Samples.of(_rows([path], TRAJECTORY))
        except ValueError as error:
            raise UserError(f"{path}: {error}; move {path.parent} away and run again") from None

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        path = self.last.train / "metrics.jsonl"
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): move {path.parent} away and run again") from None

    def trajectories(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """The rows of y_o, and of y_r where it has them. Problems are named with the seed, so that runs can be put together."""
        refined = _shards(self.last.refined, REFINED) if "refine" in self.stages else None
        both = [_shards(self.last.rollouts, TRAJECTORY), refined]
        first, second = (rows and [row | {"problem_id": f"{self.seed}/{row['problem_id']}"} for row in rows] for rows in both)
        return first or [], second

    def costs(self) -> dict[str, dict[str, Any]]:
        """tables.costs over all rounds."""
        stages: list[tuple[str, dict[str, Any] | None]] = []
        for number in range(self.config.rounds):
            view = self.last.in_round(number, self.config.rounds)
            folders = {"rollout": view.rollouts, "refine": view.refined, "train": view.train, "evaluate/student": view.eval / "student"}
            if "refine" not in self.stages:
                del folders["refine"]
            manifests = {name: Manifest.read(folder) for name, folder in folders.items()}
            stages += [(name, None if manifest is None else dataclasses.asdict(manifest)) for name, manifest in manifests.items()]
        return tables.costs(stages)


def _rows(paths: Sequence[Path], schema: pa.Schema) -> list[dict[str, Any]]:
    """Rows as report.tables takes them; the ids do not become Python objects."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        table = read_columns(path, schema, GRADED)
        lengths = pc.list_value_length(table["response_ids"])
        rows += table.drop_columns(["response_ids"]).append_column("response_tokens", lengths).to_pylist()
    return rows


def _shards(folder: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("part-*.parquet"))
    if not paths:
        raise UserError(f"{folder} holds no part-*.parquet: move it away and run again")
    return _rows(paths, schema)

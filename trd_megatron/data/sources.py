"""Where training problems come from: data.source -> its loader, what it needs, and which task its problems are for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trd_megatron.config import DataConfig
from trd_megatron.data import champ, deepscaler, hub, human_eval, parquet, taco
from trd_megatron.data.hub import HubFiles
from trd_megatron.errors import UserError

Problems = tuple[list[dict[str, Any]], dict[str, int]]  # problems (fields of records.PROBLEM), reason -> how many rows were dropped


@dataclass(frozen=True)
class Source:
    """load: from files. The files are data.path, or else those of the hub or of an installed package."""

    load: Callable[[Sequence[Path]], Problems]
    hub: HubFiles | None = None
    package: Callable[[], Path] | None = None


def _load_file(paths: Sequence[Path]) -> Problems:
    return [problem for path in paths for problem in parquet.load(path)], {}


SOURCES = {
    "file": Source(_load_file),
    "deepscaler": Source(deepscaler.load, hub=deepscaler.FILES),
    "taco": Source(taco.load, hub=taco.FILES),
    "human_eval": Source(human_eval.load, package=human_eval.locate),
    "champ": Source(champ.load, package=champ.locate),
}


def local_files(path: str) -> list[Path]:
    """The files that a data.path means: itself, or the parquet files of a folder. Raises UserError if there are none."""
    folder = Path(path)
    if not folder.is_dir():
        return [parquet.locate(path)]
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise UserError(f"data.path={path} is a folder without .parquet files")
    return files


def locate(data: DataConfig) -> list[Path]:
    """The files of the configured source, downloaded if they are not cached. Raises UserError if they cannot be had."""
    source = SOURCES[data.source]
    if data.path is not None:
        return local_files(data.path)
    if source.hub is not None:
        return hub.locate(source.hub, way_out=f"set data.path to a local copy, or fetch it first {hub.DOWNLOAD}")
    assert source.package is not None  # config_checks: data.source=file has a path
    return [source.package()]


def is_cached(data: DataConfig) -> bool:
    """Whether `locate` needs no download."""
    files = SOURCES[data.source].hub if data.source in SOURCES else None
    return files is None or data.path is not None or hub.is_cached(files)

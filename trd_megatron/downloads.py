"""`trd prepare --download-only`: everything that a run would fetch, fetched now, for machines that have no network later."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from trd_megatron.builtin_models import resolve_model
from trd_megatron.cache import cache_dir
from trd_megatron.config import Config
from trd_megatron.data import hub, sources
from trd_megatron.evaluate import benchmarks


@dataclass(frozen=True)
class Fetched:
    """what: the configuration's word for it. folder: where its files lie. size: of them all, in bytes."""

    what: str
    folder: Path
    size: int

    @classmethod
    def of(cls, what: str, files: list[Path]) -> "Fetched":
        return cls(what, files[0].parent, sum(file.stat().st_size for file in files))


def fetch(config: Config, say: Callable[[str], None]) -> Iterator[Fetched]:
    """Yields what was fetched: the problems, the benchmarks to evaluate and to exclude, the models. The newest revisions are taken.

    say hears of each before it begins. Raises UserError if something cannot be had.
    """
    data, source = config.data, sources.SOURCES.get(config.data.source)
    if source is not None and source.hub is not None and data.path is None:
        say(f"data.source={data.source}: {source.hub}")
        yield Fetched.of(f"data.source={data.source}", hub.fetch(source.hub, way_out="check the network, HF_TOKEN for gated sets"))
    elif source is not None and source.package is not None and data.path is None:
        yield Fetched.of(f"data.source={data.source}", [source.package()])
    for spec in dict.fromkeys([*data.exclude_benchmarks, *config.evaluate.benchmarks]):
        if spec != "test":
            say(f"benchmark {spec}")
            yield Fetched.of(f"benchmark {spec}", benchmarks.fetch(spec))
    for key, path in (("model.path", config.model.path), ("teacher.path", config.teacher.path)):
        if path is not None:
            say(f"{key}={path}")
            yield Fetched.of(f"{key}={path}", [file for file in resolve_model(path).iterdir() if file.is_file()])


def how_to_move(found: list[Fetched]) -> list[str]:
    """What to copy to a machine without a network, and what to set there, a line each."""
    lines = []
    places = [each.folder.resolve() for each in found]
    for variable, root in (("HF_HOME", Path(constants.HF_HOME)), ("TRD_CACHE", cache_dir())):
        inside = [place for place in places if place.is_relative_to(root.resolve())]
        places = [place for place in places if place not in inside]
        if inside:
            lines.append(f"copy {root} (links as links, e.g. with tar or rsync -a) and set {variable} to the copy")
    lines += [f"copy {place} to the same path, or install the package it belongs to" for place in dict.fromkeys(places)]
    return [*lines, "set HF_HUB_OFFLINE=1 there, so that nothing asks the network"]

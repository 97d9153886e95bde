"""A small reader of Dockerfiles and .dockerignore: what our own files use, and an error at anything else."""

import json
import re
import shlex
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

KNOWN = ("FROM", "ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR", "LABEL", "HEALTHCHECK", "EXPOSE", "CMD")
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True)
class Step:
    """One instruction. value: the rest of its lines, joined as Docker joins them."""

    word: str
    value: str

    def words(self) -> list[str]:
        """An exec form (JSON), or a command line."""
        return json.loads(self.value) if self.value.startswith("[") else shlex.split(self.value)

    def pairs(self) -> dict[str, str]:
        """ENV and LABEL: NAME=VALUE each."""
        return dict(word.split("=", 1) for word in shlex.split(self.value))


def parse(text: str) -> list[Step]:
    """Raises ValueError at an instruction that is not in KNOWN."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#") and line.strip()]
    steps = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        word, _, value = line.strip().partition(" ")
        if word not in KNOWN:
            raise ValueError(f"{word}: not known here")
        steps.append(Step(word, value.strip()))
    return steps


def expand(value: str, variables: dict[str, str]) -> str:
    """Variables as Docker fills them in outside RUN and CMD; KeyError if one has no value."""
    return VARIABLE.sub(lambda match: variables[match[1] or match[2]], value)


def arguments(steps: list[Step]) -> dict[str, str]:
    """The defaults of all ARGs; ValueError if one has two."""
    found: dict[str, str] = {}
    for step in steps:
        name, has_default, default = step.value.partition("=")
        if step.word == "ARG" and has_default and found.setdefault(name, default) != default:
            raise ValueError(f"ARG {name} has two defaults")
    return found


def copied(step: Step) -> tuple[str | None, list[str], str]:
    """COPY [--from=STAGE] SOURCE... TARGET -> stage, sources, target."""
    words = step.words()
    stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else None
    return stage, words[:-1], words[-1]


def ignored(path: Path, rules: list[str]) -> bool:
    """Whether .dockerignore leaves out `path` (relative to its folder): the last rule that fits it, or a folder it is in, decides."""
    names = [str(folder) for folder in [path, *path.parents] if str(folder) != "."]
    result = False
    for rule in rules:
        keep, pattern = rule.startswith("!"), rule.removeprefix("!")
        if any(_fits(name, pattern) for name in names):
            result = not keep
    return result


def _fits(name: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch(Path(name).name, pattern.removeprefix("**/"))
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def ignore_rules(folder: Path) -> list[str]:
    lines = (line.strip() for line in (folder / ".dockerignore").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]

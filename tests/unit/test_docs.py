"""The commands that the documentation shows are accepted."""

import re
import shlex
from pathlib import Path

import pytest

from trd_megatron import sweep
from trd_megatron.config import load

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"^(?:SGLANG_API_KEY=\S+ )?trd (?:run|serve|plan|doctor|prepare) .*experiment=.*$", re.MULTILINE)


def commands() -> list[str]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return sorted({line.split("  #")[0].strip() for page in pages for line in COMMAND.findall(page.read_text(encoding="utf-8"))})


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the user's own runs/ lie."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", commands())
def test_command_composes(command: str) -> None:
    settings = [word for word in shlex.split(command) if "=" in word and not word.startswith(("-", "SGLANG_API_KEY"))]
    if {"--multirun", "-m"} & set(command.split()):
        sweep.members(settings)
    else:
        load(settings)


def test_split_topology_composes() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith("| One node, split"))
    settings = " ".join(re.findall(r"`([^`]*)`", row)).split()
    engine = load(["experiment=opd_qwen3_1_7b", *settings]).engine
    assert engine.keep_servers
    assert len(engine.student.gpus) == len(engine.teacher.gpus) == 2

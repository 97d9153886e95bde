"""The gate before a megatron-core that was not tested; `trd run` and --allow-untested are in test_cli.py."""

import json
from importlib import metadata
from pathlib import Path

import pytest

from trd_megatron.config import load, to_dict
from trd_megatron.errors import UserError
from trd_megatron.learner import versions
from trd_megatron.learner.__main__ import main
from trd_megatron.learner.job import ERROR, Job


def test_what_was_tested_is_what_setup_installs() -> None:
    [pinned] = [line for line in metadata.requires("trd_megatron") or [] if line.startswith("megatron-core")]
    assert pinned == f"megatron-core=={versions.TESTED[-1]}"
    versions.check(versions.installed())


def test_a_rank_refuses_what_it_really_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", "0.99.0")
    monkeypatch.delenv(versions.ALLOW, raising=False)
    Job(to_dict(load(["experiment=smoke"])), "student", None, []).write(tmp_path)
    with pytest.raises(UserError, match=r"megatron-core 0\.99\.0 was not tested"):
        main([tmp_path])
    error = json.loads((tmp_path / ERROR).read_text())
    assert error["kind"] == "UserError"  # the stage shows it in one line
    assert "--allow-untested" in error["message"]


def test_a_missing_megatron_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UserError, match=r"the learner needs megatron-core: pip install megatron-core==0\.16\.1"):
        versions.installed()

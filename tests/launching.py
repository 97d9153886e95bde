"""`trd launch` in its own environment, with the real NeMo-Run (make launch-env): fixtures of tests/launch and tests/slurm."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-launch" / "bin" / "python"
TRD = ROOT / ".venv" / "bin" / "trd"

Trd = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def launch_python() -> Path:
    if not PYTHON.exists():
        pytest.skip("no .venv-launch: run `make launch-env`")
    return PYTHON


@pytest.fixture(scope="session")
def nemo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where NeMo-Run keeps its lists; else it would be ~/.nemo_run."""
    return tmp_path_factory.mktemp("nemo_run")


@pytest.fixture(scope="session")
def trd(launch_python: Path, nemo_home: Path) -> Trd:
    """Runs `trd ARGUMENTS` in the launch environment, with these variables on top."""

    def run(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"NEMORUN_HOME": str(nemo_home), "PYTHONPATH": str(ROOT)} | variables
        command = [str(launch_python), "-m", "trd_megatron.cli", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)

    return run

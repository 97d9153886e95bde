"""One real SGLang server for all tests in this folder: starting one takes half a minute."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from trd_megatron.builtin_models import model_fingerprint, resolve_model
from trd_megatron.config import EngineConfig
from trd_megatron.engine.base import Weights
from trd_megatron.engine.server import LaunchedServers
from trd_megatron.engine.server_command import VENV_PYTHON

PYTHON = Path(__file__).parents[2] / VENV_PYTHON


@dataclass
class StudentServer:
    """A running server of builtin:tiny-qwen3 on the CPU, in float32. A test that changes its weights puts them back."""

    servers: LaunchedServers
    weights: Weights
    said: list[str]

    @property
    def url(self) -> str:
        return self.servers.urls[0]


@pytest.fixture(scope="session")
def sglang_engine() -> EngineConfig:
    """Settings with which servers start here. Skips where SGLang is not installed."""
    if not PYTHON.exists():
        pytest.skip("no .venv-sglang: run `make sglang-cpu`")
    return EngineConfig(kind="sglang", device="cpu", dtype="float32", launch=True, python=str(PYTHON), start_timeout_s=240)


@pytest.fixture(scope="session")
def student_server(sglang_engine: EngineConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudentServer]:
    """The session's server. servers.use and its HTTP interface are the tests' to try."""
    folder = resolve_model("builtin:tiny-qwen3")
    weights = Weights(folder, 0, model_fingerprint(folder))
    said: list[str] = []
    servers = LaunchedServers("student", weights, sglang_engine, tmp_path_factory.mktemp("servers"), said.append)
    servers.start()
    yield StudentServer(servers, weights, said)
    servers.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """More time than other tests have: starts are slow on a busy machine. Not for those outside this folder."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(600))

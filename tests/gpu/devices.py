"""Where the body of a test runs: parameter sets whose first value is the device, skipped for what this machine lacks."""

from typing import Any

import pytest
import torch
from packaging.version import Version

from trd_megatron.learner.stack import OLDEST_TRANSFORMER_ENGINE, Installed


def cpu(*values: Any, lacks: str | None = None) -> Any:
    """("cpu", *values). lacks: why the CPU cannot run it here."""
    return _on("cpu", values, lacks)


def cuda(*values: Any, gpus: int = 1, engine: str | None = None, capability: tuple[int, int] = (0, 0)) -> Any:
    """("cuda", *values). engine: the oldest Transformer Engine that will do; capability: the oldest GPU."""
    return _on("cuda", values, _lacking(gpus, engine, capability))


def transformer_engine(*values: Any, gpus: int = 1) -> Any:
    """("cuda", *values) with any Transformer Engine that the learner uses."""
    return cuda(*values, gpus=gpus, engine=OLDEST_TRANSFORMER_ENGINE)


def _on(device: str, values: tuple[Any, ...], lacks: str | None) -> Any:
    return pytest.param(device, *values, marks=[] if lacks is None else pytest.mark.skip(reason=lacks))


def _lacking(gpus: int, engine: str | None, capability: tuple[int, int]) -> str | None:
    if torch.cuda.device_count() < gpus:
        return f"needs {gpus} CUDA GPU{'s' if gpus > 1 else ''}"
    if torch.cuda.get_device_capability() < capability:
        return f"needs compute capability {'.'.join(map(str, capability))}"
    found = Installed.find().transformer_engine
    if engine is not None and found is None:
        return "needs Transformer Engine"
    if engine is not None and Version(found) < Version(engine):
        return f"needs Transformer Engine {engine}"
    return None

"""What benchmarks check before and note beside their figures: the folder they write to, versions, the machine."""

import contextlib
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from trd_megatron import __version__
from trd_megatron.bench.memory import HostMemory
from trd_megatron.errors import UserError


def prepare(out: Path, device: str) -> None:
    """Makes the folder `out`. Raises UserError if it cannot be written, or if this system cannot measure the device's memory."""
    if not os.access(next(folder for folder in (out, *out.absolute().parents) if folder.exists()), os.W_OK) or out.is_file():
        raise UserError(f"--out {out}: not a folder that can be written")
    out.mkdir(parents=True, exist_ok=True)
    if device == "cpu":
        try:
            HostMemory()
        except OSError as error:
            raise UserError(f"memory cannot be measured on this system: {error}") from None


def check_device(device: str) -> None:
    """Raises UserError if --device names none that is here."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: it must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU")


def versions(names: Sequence[str]) -> dict[str, str | None]:
    """Of this package and of the packages `names`; None for what is not installed."""
    found: dict[str, str | None] = {"trd_megatron": __version__}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine(device: str) -> dict[str, Any]:
    """Processor, its cores, and the GPU if that is the device."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"processor": _processor(), "cores": os.cpu_count(), "gpu": gpu}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()

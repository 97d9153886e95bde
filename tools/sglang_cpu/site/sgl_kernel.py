"""Stands in for SGLang's compiled kernels, which PyPI has for CUDA only. SGLang imports names from here at start and calls none of
them on a CPU with --attention-backend torch_native; a call raises NotImplementedError instead of computing something else."""

from collections.abc import Callable
from typing import Any

__version__ = "0.0.0"


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):  # what the import system asks a module for
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name}: this environment (make sglang-cpu) has no compiled kernels")

    return missing

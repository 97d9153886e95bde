"""Everything Megatron-Core needs on a machine without a GPU. Imported only where learner.device=cpu; nothing else knows about it.

Megatron-Core asks CUDA for the current device, for random states and for `device="cuda"` tensors in a few places. Here
these are answered with the CPU.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

from trd_megatron.divergence.products import onednn_mm


def prepare() -> None:
    """Makes Megatron-Core usable in this process. What it changes fits the versions of versions.py."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    # Recomputation saves and restores random states; the one on the CPU generator is all there is.
    patched: Any = megatron_random
    patched._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    patched._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    patched.initialize_rng_tracker()
    patched._CUDA_RNG_STATE_TRACKER.reset()
    _multiply_with_onednn()


_registrations: list[torch.library.Library] = []  # they hold as long as they are referenced


def _multiply_with_onednn() -> None:
    """Routes this process's float32 matrix products through oneDNN.

    torch uses MKL for them: on two Zen 5 cores MKL reaches 190 GFLOP/s, oneDNN 430; see divergence/products.py.
    """
    if _registrations or not torch.backends.mkldnn.is_available():
        return

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = onednn_mm(a, b)
        return torch.ops.aten.mm.out(a, b, out=a.new_empty(a.shape[0], b.shape[1])) if product is None else product

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Oo]verriding a previously registered kernel.*")
        library.impl("mm", mm, "CPU", allow_override=True)
    _registrations.append(library)


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites device="cuda" arguments to the CPU, and names the types of tensors as they would be called on a GPU."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):  # asked for the name: "torch.FloatTensor"
            return result.replace("torch.", "torch.cuda.", 1)
        return result


@contextlib.contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """For the calls that have `device="cuda"` or `torch.cuda.FloatTensor` written into them (checkpointing, distributed optimizer)."""
    with _CudaMeansCpu():
        yield

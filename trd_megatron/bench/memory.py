"""Peak memory of this process, on the host and on its GPU."""

from pathlib import Path

import torch

from trd_megatron.learner.memory import peak_memory

_CPU = torch.device("cpu")


class HostMemory:
    """Growth of this process's resident set in bytes, by Linux's own high-water mark (some 100 KiB off, it counts per processor)."""

    def __init__(self) -> None:
        """Raises OSError where the mark cannot be reset."""
        self.reset()
        self._before = peak_memory(_CPU)

    def reset(self) -> None:
        """Forgets the peak so far: the mark goes down to what is resident now. What growth is counted from stays."""
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return peak_memory(_CPU) - self._before


class GPUMemory:
    """Growth of what PyTorch has allocated on the GPU, in bytes."""

    def __init__(self) -> None:
        self.reset()
        self._before = torch.cuda.memory_allocated()

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self._before

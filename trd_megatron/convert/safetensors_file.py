"""Writing a safetensors file a tensor at a time; the library's save_file needs all of them at once."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Spec:
    """What the header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write(path: Path, specs: dict[str, Spec], tensors: Iterable[torch.Tensor]) -> None:
    """Writes `tensors`, which come in the order of specs; each is let go before the next is asked for.

    Readers map the file: wide dtypes have to come first, so that every number lies at a multiple of its size.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        assert end % spec.dtype.itemsize == 0, f"{name} would not be aligned"
        header[name] = {"dtype": NAMES[spec.dtype], "shape": spec.shape, "data_offsets": (end, end + spec.nbytes)}
        end += spec.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    source = iter(tensors)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, spec in specs.items():
            tensor = next(source)
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), f"{name} is {tensor.dtype} {tuple(tensor.shape)}"
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            del tensor  # before the next one is read

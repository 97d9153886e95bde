"""The pickles in a torch_dist checkpoint (.metadata, common.pt, objects between the tensors), without running what a pickle may hold."""

import io
import pickle
import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trd_megatron.errors import UserError

METADATA = ".metadata"
COMMON = "common.pt"  # what Megatron stores beside tensors
# Classes that PyTorch's and Megatron's writers put into the metadata; anything else is refused.
ALLOWED = {
    "torch": ("Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
}  # fmt: skip


class _AllowList(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def _member(kind: type, name: str) -> Enum:
    """What Python up to 3.11.3 (Debian 12's) writes for a member of an enumeration: getattr(class, name). Nothing else is looked up."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"it looks up {name} in something else than an enumeration")
    return kind[name]


def read_metadata(checkpoint: Path) -> Metadata:
    """The metadata of a checkpoint folder. Raises UserError if it is missing, damaged, or holds anything but metadata."""
    path = checkpoint / METADATA
    try:
        metadata = _AllowList(io.BytesIO(path.read_bytes())).load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from None
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path} holds no checkpoint metadata")
    return metadata


def check_checkpoint(checkpoint: Path, keys: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors `keys`, after a look at everything that Megatron's loader would unpickle on the way to them.

    PyTorch unpickles unchecked what the metadata calls an object, whatever was asked for: `keys` must be tensors. common.pt must pass
    PyTorch's weights_only loader; Megatron-Core, once imported, adds its own classes to what that one takes. Raises UserError.
    """
    found = read_metadata(checkpoint).state_dict_metadata
    shapes = {}
    for key in keys:
        if key not in found:
            raise UserError(f"checkpoint {checkpoint} has no tensor {key}: it is of another model")
        tensor = found[key]
        if not isinstance(tensor, TensorStorageMetadata):
            raise UserError(f"checkpoint {checkpoint}: {key} is no tensor but a pickled object, which is not loaded")
        shapes[key] = tuple(tensor.size)
    path = checkpoint / COMMON
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from None
    return shapes


def _reason(error: Exception) -> str:
    """One line out of the paragraphs that PyTorch writes."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"it names {refused[1]}, which is not loaded from a checkpoint"
    detail = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return detail[1] if detail else (str(error).splitlines() or [type(error).__name__])[0]

"""Reading the metadata of a torch_dist checkpoint, which is a pickle, without running what a pickle may hold."""

import io
import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import StorageMeta

from trd_megatron.errors import UserError

METADATA = ".metadata"
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
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def read_metadata(checkpoint: Path) -> Metadata:
    """The metadata of a checkpoint folder. Raises UserError if it is missing, damaged, or holds anything but metadata."""
    path = checkpoint / METADATA
    try:
        metadata = _AllowList(io.BytesIO(path.read_bytes())).load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path} holds no checkpoint metadata")
    return metadata


class SafeReader(FileSystemReader):
    """PyTorch's reader of torch_dist folders, with the allow-list instead of a plain pickle.load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

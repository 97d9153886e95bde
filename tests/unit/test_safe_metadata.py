"""Metadata as other versions of Python pickle it."""

import io
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, TensorProperties, TensorStorageMetadata

from trd_megatron.convert.safe_metadata import METADATA, read_metadata
from trd_megatron.errors import UserError

TENSOR = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([2, 3]), [])


class _OldPickler(pickle.Pickler):
    """Enumerations as Python up to 3.11.3 (Debian 12's) writes them."""

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, (type(obj), obj._name_)) if isinstance(obj, Enum) else NotImplemented


class _Lookup:
    def __init__(self, *words: Any) -> None:
        self.words = words

    def __reduce__(self) -> Any:
        return getattr, self.words


def write(folder: Path, content: Any) -> None:
    file = io.BytesIO()
    _OldPickler(file).dump(content)
    (folder / METADATA).write_bytes(file.getvalue())


def test_an_old_python_names_enumerations_by_getattr(tmp_path: Path) -> None:
    write(tmp_path, Metadata({"a": TENSOR}))
    assert b"getattr" in (tmp_path / METADATA).read_bytes()
    found = read_metadata(tmp_path).state_dict_metadata["a"]
    assert isinstance(found, TensorStorageMetadata)
    assert found.size == torch.Size([2, 3])
    assert found.properties == TENSOR.properties


@pytest.mark.parametrize(
    "words", [(Metadata, "__init__"), (torch.Size([1]), "numel"), (TensorStorageMetadata, "__subclasses__")], ids=lambda words: words[1]
)
def test_getattr_looks_nothing_else_up(words: tuple[Any, str], tmp_path: Path) -> None:
    write(tmp_path, Metadata({"a": _Lookup(*words)}))  # type: ignore[dict-item]
    with pytest.raises(UserError, match="something else than an enumeration"):
        read_metadata(tmp_path)


def test_an_enumeration_has_members_only(tmp_path: Path) -> None:
    write(tmp_path, Metadata({"a": _Lookup(_MEM_FORMAT_ENCODING, "__subclasses__")}))  # type: ignore[dict-item]
    with pytest.raises(UserError, match="cannot be read"):
        read_metadata(tmp_path)

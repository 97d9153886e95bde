"""The weight files of a Hugging Face folder: which there are, what their headers say, and their tensors one at a time."""

import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from trd_megatron.convert.safetensors_file import NAMES
from trd_megatron.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {name: str(dtype).removeprefix("torch.") for dtype, name in NAMES.items()}


class _Shard(Protocol):
    """One open file of weights."""

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def read(self, name: str) -> torch.Tensor: ...


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt", backend="pread"):  # checks the header, and that the file is as long as it says
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._tensors = json.loads(file.read(length))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}): copy it again") from None
        self._tensors.pop("__metadata__", None)
        self._data = 8 + length

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])

    def dtype(self, name: str) -> str:
        stored = self._tensors[name]["dtype"]
        return _DTYPES.get(stored, stored)

    def read(self, name: str) -> torch.Tensor:
        # Not with get_tensor: mapped pages of the whole file would count as this process's memory, and with pread it makes a copy.
        dtype = self.dtype(name)
        check_dtype(self.path, name, dtype)
        start, end = self._tensors[name]["data_offsets"]
        tensor = torch.empty(end - start, dtype=torch.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(self._data + start)
                found = file.readinto(tensor.numpy().data)
        except OSError as error:
            raise UserError(f"{self.path}: {name} cannot be read ({error}): copy the file again") from None
        if found != end - start:
            raise UserError(f"{self.path} is truncated: copy it again")
        return tensor.view(getattr(torch, dtype)).view(self.shape(name))


class _Pickle:
    """A pytorch_model*.bin, read as weights only: no other object of a pickle is made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError:  # PyTorch's message advises to load it all the same
            raise UserError(
                f"{path} is damaged, or holds objects other than tensors, which may run code: get the model elsewhere"
            ) from None
        except Exception as error:  # a damaged file may raise anything
            raise UserError(
                f"{path} cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]}): copy it again, or save it anew"
            ) from None
        if not isinstance(self._tensors, dict) or not all(map(_is_plain_tensor, self._tensors.values())):
            raise UserError(f"{path} holds no weights by name: give the folder that save_pretrained wrote")

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].clone()


def _is_plain_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


class Weights:
    """The tensors in the weight files of a folder, whatever they are."""

    def __init__(self, folder: Path, *, allow_pickle: bool = False) -> None:
        """Reads the headers. Raises UserError if a file is missing or truncated, or if the index does not fit them."""
        self.folder = folder
        paths, self._kind = _weight_files(folder, allow_pickle)
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as PyTorch names them, where it knows them
        self._open: tuple[Path, _Shard] | None = None
        for path in paths:
            shard = self._kind(path)
            for name in shard.names():
                if name in self.files:
                    raise UserError(
                        f"{folder}: {name} lies in {self.files[name].name} and in {path.name}: delete the file that is too many"
                    )
                self.files[name], self.shapes[name], self.dtypes[name] = path, shard.shape(name), shard.dtype(name)
        index = folder / INDEX
        if index.exists():
            for name, file in _weight_map(index).items():
                if self.files.get(name) != folder / file:
                    raise UserError(f"{index} places {name} in {file}, which does not hold it: copy the folder again")

    def read(self, name: str) -> torch.Tensor:
        path = self.files[name]
        if self._open is None or path != self._open[0]:
            self._open = (path, self._kind(path))
        return self._open[1].read(name)


def check_dtype(path: Path, name: str, dtype: str) -> None:
    """Raises UserError if a tensor holds no plain floating-point numbers: quantised ones mean nothing without their scales."""
    if dtype not in _DTYPES.values():
        raise UserError(f"{path}: {name} is stored as {dtype}; only {', '.join(_DTYPES.values())} are converted, not quantised weights")


def _weight_files(folder: Path, allow_pickle: bool) -> tuple[list[Path], type[_Safetensors] | type[_Pickle]]:
    index, single = folder / INDEX, folder / SINGLE
    if index.exists():
        paths = [folder / name for name in sorted(set(_weight_map(index).values()))]
        if single.exists() and single not in paths:
            raise UserError(f"{folder} has {SINGLE} and an index of other files: delete the one that is out of date")
        for path in paths:
            if not path.is_file():
                raise UserError(f"{index} names {path.name}, which is missing: copy the folder again")
        return paths, _Safetensors
    if single.exists():
        return [single], _Safetensors
    if paths := sorted(folder.glob("*.safetensors")):
        return paths, _Safetensors
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles and not allow_pickle:
        raise UserError(
            f"{folder} has its weights in {pickles[0].name}, a pickle: hf-to-megatron and merge-lora read it with --allow-pickle"
        )
    if not pickles:
        raise UserError(f"{folder} has no *.safetensors: give the folder that save_pretrained wrote")
    return pickles, _Pickle


def _weight_map(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if all(Path(file).name == file for file in names.values()):
            return names
        reason = "it names a file outside of its folder"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error)
    raise UserError(f"{index} cannot be used ({reason}): copy it again")

"""Tensors out of a Megatron distributed checkpoint that the learner wrote, and a fully trained model as a Hugging Face folder.

The learner stores tensors whole and under Hugging Face names, so nothing has to be renamed or put together here.
"""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file

from trd_megatron.convert.safe_metadata import SafeReader
from trd_megatron.errors import UserError

_COPIED = ("*.json", "*.jinja", "*.txt", "*.model")


def read_tensors(checkpoint: Path, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint whose names are wanted.

    Needs no ranks and no Megatron: torch_dist is PyTorch's distributed checkpoint format. Raises UserError if it is damaged.
    """
    try:
        reader = SafeReader(checkpoint)
        metadata = reader.read_metadata().state_dict_metadata
        state: dict[str, Any] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in metadata.items()
            if wanted(name) and isinstance(entry, dcp.metadata.TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is wanted
            dcp.load(state, storage_reader=reader, no_dist=True)
    except (OSError, RuntimeError, ValueError, EOFError, dcp.CheckpointException) as error:
        raise UserError(f"checkpoint {checkpoint} cannot be read: {str(error).splitlines()[0]}") from error
    return state


def copy_companions(base: Path, folder: Path) -> None:
    """Makes `folder` and copies everything of a Hugging Face folder but its weights: config, tokenizer, chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in _COPIED:
        for path in base.glob(pattern):
            if path.name != "manifest.json":
                shutil.copy2(path, folder / path.name)


def write_parameters(base: Path, checkpoint: Path, folder: Path) -> None:
    """Writes the parameters of a checkpoint as a Hugging Face folder with the files, names and dtypes of `base`, a file at a time.

    Rows that pad the vocabulary are cut off. Raises UserError if the checkpoint lacks a tensor of `base` or has another shape.
    """
    copy_companions(base, folder)
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tensors = read_tensors(checkpoint, set(names).__contains__)
            for name in names:
                was = file.get_tensor(name)
                if name == "lm_head.weight" and name not in tensors:  # a tied output layer that was written out
                    tensors |= {name: next(iter(read_tensors(checkpoint, "model.embed_tokens.weight".__eq__).values()))}
                if name not in tensors:
                    raise UserError(f"checkpoint {checkpoint} has no {name}: it is not of a fully trained {base}")
                if name in ("lm_head.weight", "model.embed_tokens.weight"):
                    tensors[name] = tensors[name][: was.shape[0]]
                if tensors[name].shape != was.shape:
                    raise UserError(f"checkpoint {checkpoint}: {name} is {list(tensors[name].shape)}, in {base} {list(was.shape)}")
                tensors[name] = tensors[name].to(was.dtype).contiguous()
            file_metadata = file.metadata()
        save_file(tensors, folder / path.name, metadata=file_metadata)

"""The conversions, each from paths to a new folder. `trd convert` calls these."""

from pathlib import Path
from typing import Any

import torch

from trd_megatron.builtin_models import local
from trd_megatron.convert import bridge, huggingface, megatron, peft
from trd_megatron.convert.architecture import Architecture, UnsupportedError
from trd_megatron.convert.huggingface import HuggingFace
from trd_megatron.convert.megatron import Megatron
from trd_megatron.convert.merge_lora import Merged, check_fits
from trd_megatron.convert.output import new_folder
from trd_megatron.convert.source import Source
from trd_megatron.errors import UserError

FILE_BYTES = 2_000_000_000  # of one file of a distributed checkpoint


def hf_to_megatron(
    hf_path: str, megatron_path: Path, *, tensor_model_parallel_size: int = 1, dtype: torch.dtype | None = None, allow_pickle: bool = False
) -> None:
    """Writes a Hugging Face folder as a Megatron distributed checkpoint. Raises UserError, and then leaves nothing."""
    try:
        source = HuggingFace(local(hf_path), allow_pickle=allow_pickle)
    except UnsupportedError as error:
        way = "--backend bridge hands it over to Megatron-Bridge"
        raise UserError(f"{error}; {way if bridge.installed() else f'where Megatron-Bridge is installed, {way}'}") from None
    tp = tensor_model_parallel_size
    source.architecture.check_tensor_parallel_size(tp, hf_path, "--tensor-model-parallel-size ")
    made_by = {"command": "hf-to-megatron", "source": hf_path, "dtype": str(dtype or "the source's"), "tensor_model_parallel_size": tp}
    with new_folder(megatron_path, megatron.nbytes(source, dtype, tp), made_by) as output:
        megatron.write(
            source,
            output.folder,
            source_name=hf_path,
            tokenizer=str(megatron_path.absolute() / megatron.RELEASE / megatron.COMPANIONS),
            dtype=dtype,
            tensor_model_parallel_size=tp,
            file_bytes=FILE_BYTES,
            advance=output.advance,
            written=output.written,
        )


def megatron_to_hf(
    megatron_path: Path,
    hf_path: Path,
    *,
    base_path: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = huggingface.SHARD_BYTES,
) -> None:
    """Writes a Megatron distributed checkpoint as a Hugging Face folder. Raises UserError, and then leaves nothing."""
    source = Megatron(megatron_path, None if base_path is None else local(base_path))
    made_by = {"command": "megatron-to-hf", "source": str(megatron_path), "base": base_path, "dtype": str(dtype or "the source's")}
    _write_hf(source, hf_path, dtype, max_shard_bytes, made_by)


def merge_lora(
    base_path: str,
    adapter_path: Path,
    output_path: Path,
    *,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    max_shard_bytes: int = huggingface.SHARD_BYTES,
) -> None:
    """Writes a base model with an adapter merged into it as a Hugging Face folder. Raises UserError, and then leaves nothing."""
    source = Merged(HuggingFace(local(base_path), allow_pickle=allow_pickle), peft.read(adapter_path), dtype)
    made_by = {"command": "merge-lora", "base": base_path, "adapter": str(adapter_path), "dtype": str(dtype or "the base's")}
    _write_hf(source, output_path, dtype, max_shard_bytes, made_by)


def _write_hf(source: Source, target: Path, dtype: torch.dtype | None, max_shard_bytes: int, made_by: dict[str, Any]) -> None:
    with new_folder(target, huggingface.nbytes(source, dtype), made_by) as output:
        huggingface.write(
            source, output.folder, dtype=dtype, max_shard_bytes=max_shard_bytes, advance=output.advance, written=output.written
        )


def export_peft(megatron_path: Path, output_path: Path, *, base_path: str | None = None) -> None:
    """Writes the adapter in a checkpoint of the learner as a PEFT folder. base_path: the base to name in it, whose config it must fit.

    Raises UserError, and then leaves nothing.
    """
    adapter = peft.read_checkpoint(megatron_path)
    base = base_path or adapter.base
    check_fits(adapter, Architecture.from_hf(local(base)), base)
    made_by = {"command": "export-peft", "source": str(megatron_path), "base": base}
    with new_folder(output_path, sum(factor.nbytes for factor in adapter.factors.values()), made_by) as output:
        peft.write(adapter.factors, adapter.rank, adapter.alpha, base, output.folder)
        output.advance(sum(factor.nbytes for factor in adapter.factors.values()))

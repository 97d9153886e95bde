"""A readable account of a checkpoint of either format."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from trd_megatron.convert import megatron, output, peft, run_config
from trd_megatron.convert.architecture import Architecture
from trd_megatron.convert.torch_dist import TorchDist
from trd_megatron.convert.weight_files import Weights
from trd_megatron.errors import UserError
from trd_megatron.progress import printable

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer or an expert


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numbers(self) -> int:
        return torch.Size(self.shape).numel()


def describe(path: Path, *, every: bool) -> Iterator[RenderableType]:
    """What to print of a checkpoint. Raises UserError if it is none, or if its headers cannot be read."""
    kind, tensors, facts = _read(path)
    folder = megatron.checkpoint_folder(path) if (path / megatron.TRACKER).is_file() else path
    head = Table(title=_text(path), show_header=False, title_justify="left")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    rows: list[tuple[str, Any]] = [
        ("format", kind),
        ("tensors", f"{len(tensors)}, {sum(t.numbers for t in tensors):,} numbers, {', '.join(sorted({t.dtype for t in tensors}))}"),
        ("size", f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"),
        *facts,
    ]
    for name, value in rows:
        head.add_row(name, _text(value))
    yield head
    yield _table(tensors, every)


def _table(tensors: list[_Tensor], every: bool) -> Table:
    table = Table()
    table.add_column("tensor", overflow="fold", ratio=1)  # the names are what one came for
    for name in ("shape", "dtype", "number"):
        table.add_column(name)
    groups: dict[tuple[str, tuple[int, ...], str], list[_Tensor]] = {}
    for tensor in tensors:
        pattern = tensor.name if every else _NUMBER.sub("*", tensor.name)
        groups.setdefault((pattern, tensor.shape, tensor.dtype), []).append(tensor)
    for (pattern, shape, dtype), group in groups.items():
        table.add_row(_text(pattern), _text(list(shape)), _text(dtype), str(len(group)))
    return table


def _text(value: Any) -> Text:
    """As it is: what a file says is neither markup nor orders to the terminal."""
    return Text(printable(str(value)))


def _read(path: Path) -> tuple[str, list[_Tensor], list[tuple[str, Any]]]:
    if (path / peft.CONFIG).is_file():
        adapter = peft.read_peft(path)
        facts = [("base", adapter.base), ("rank, alpha", f"{adapter.rank}, {adapter.alpha}"), *_made_by(path)]
        tensors = [_Tensor(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in adapter.factors.items()]
        return "PEFT adapter", tensors, facts
    if (path / "config.json").is_file():
        weights = Weights(path, allow_pickle=False)
        tensors = [_Tensor(name, shape, weights.dtypes[name]) for name, shape in sorted(weights.shapes.items(), key=_natural)]
        return "Hugging Face", tensors, [*_architecture(path), *_made_by(path)]
    if not path.is_dir():
        raise UserError(f"there is no folder {path}: give a checkpoint, a hub id or builtin:NAME")
    if not (path / ".metadata").is_file() and not (path / megatron.TRACKER).is_file():
        raise UserError(f"{path} is no checkpoint: it has neither config.json, {peft.CONFIG}, .metadata nor {megatron.TRACKER}")
    folder = megatron.checkpoint_folder(path)
    checkpoint = TorchDist(folder)
    tensors = [
        _Tensor(name, checkpoint.shape(name), str(checkpoint.dtype(name)).removeprefix("torch.")) for name in sorted(checkpoint.tensors)
    ]
    facts = [*_architecture(folder / megatron.COMPANIONS), *_made_by(path), *_recorded(folder), *_adapter(folder)]
    return f"Megatron distributed checkpoint (torch_dist), {folder.name}", tensors, facts


def _natural(item: tuple[str, Any]) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in item[0].split(".")]


def _architecture(folder: Path) -> Iterator[tuple[str, Any]]:
    if not (folder / "config.json").is_file():
        return
    try:
        a = Architecture.from_hf(folder)
    except UserError as error:
        yield "architecture", error
        return
    yield "architecture", f"{a.model_type}, {a.parameter_count():,} parameters, {a.num_layers} layers, hidden size {a.hidden_size}"
    bias = ", biases on q, k, v" if a.qkv_bias else ""
    norm = ", norms on q and k" if a.qk_norm else ""
    yield "attention", f"{a.num_attention_heads} heads of {a.head_dim}, {a.num_query_groups} key/value heads{bias}{norm}"
    if a.experts is None:
        yield "mlp", a.ffn_hidden_size
    else:
        yield "experts", f"{a.experts.count} of {a.experts.ffn_hidden_size}, {a.experts.per_token} per token"
    scaling = "" if a.rope.kind == "default" else f", {a.rope.kind} scaling by {a.rope.factor:g}"
    yield "positions", f"RoPE base {a.rope.theta:g}{scaling}, up to {a.max_position_embeddings}"
    yield "vocabulary", f"{a.vocab_size}, {'tied' if a.tied_embeddings else 'untied'} embeddings"
    yield "tensor parallel", f"possible sizes {', '.join(map(str, a.tensor_parallel_sizes()))}"


def _made_by(path: Path) -> Iterator[tuple[str, Any]]:
    manifest = path / output.MANIFEST
    if manifest.is_file():
        try:
            made = json.loads(manifest.read_text(encoding="utf-8"))
            by, versions = (", ".join(f"{key} {value}" for key, value in made[key].items()) for key in ("made_by", "versions"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{manifest} is damaged ({type(error).__name__}: {error}): copy the checkpoint again") from None
        yield "made by", by
        yield "versions", versions


def _adapter(folder: Path) -> Iterator[tuple[str, Any]]:
    """Of a checkpoint of the learner."""
    settings = peft.recorded(folder) if (folder / peft.STATE).is_file() else None
    if settings:
        yield "adapter", ", ".join(f"{key} {value}" for key, value in settings.items())


def _recorded(folder: Path) -> Iterator[tuple[str, Any]]:
    """Megatron-LM's flags, from our own run_config."""
    path = folder / run_config.RUN_CONFIG
    if path.is_file():
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({(str(error).splitlines() or [''])[0]}): copy the checkpoint again") from None
        ours = content.get("trd_megatron") if isinstance(content, dict) else None  # Megatron-Bridge writes one without it
        flags = ours.get("megatron_lm_flags") if isinstance(ours, dict) else None
        if isinstance(flags, str):
            yield "Megatron-LM flags", flags

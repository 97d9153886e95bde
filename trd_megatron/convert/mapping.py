"""The name table between Hugging Face checkpoints and Megatron's GPTModel, and how each tensor is cut over ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from trd_megatron.convert.architecture import Architecture

Kind = Literal["replicated", "vocab", "qkv", "gate_up", "row"]


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors it is made of.

    kind: replicated (every rank all of it), vocab (rows, padded at the end), qkv (fused by query group, rows),
    gate_up (gate rows then up rows on each rank), row (columns: the input of a row-parallel layer).
    """

    megatron: str
    hf: tuple[str, ...]
    kind: Kind


def entries(architecture: Architecture) -> Iterator[Entry]:
    """Every parameter of the model, in Megatron's order."""
    yield Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab")
    for layer in range(architecture.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attention = f"{theirs}self_attn."
        yield Entry(f"{ours}input_layernorm.weight", (f"{theirs}input_layernorm.weight",), "replicated")
        yield Entry(f"{ours}self_attention.linear_proj.weight", (f"{attention}o_proj.weight",), "row")
        yield Entry(f"{ours}self_attention.linear_qkv.weight", tuple(f"{attention}{x}_proj.weight" for x in "qkv"), "qkv")
        if architecture.qkv_bias:
            yield Entry(f"{ours}self_attention.linear_qkv.bias", tuple(f"{attention}{x}_proj.bias" for x in "qkv"), "qkv")
        if architecture.qk_norm:
            yield Entry(f"{ours}self_attention.q_layernorm.weight", (f"{attention}q_norm.weight",), "replicated")
            yield Entry(f"{ours}self_attention.k_layernorm.weight", (f"{attention}k_norm.weight",), "replicated")
        yield Entry(f"{ours}pre_mlp_layernorm.weight", (f"{theirs}post_attention_layernorm.weight",), "replicated")
        yield Entry(f"{ours}mlp.linear_fc1.weight", (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight"), "gate_up")
        yield Entry(f"{ours}mlp.linear_fc2.weight", (f"{theirs}mlp.down_proj.weight",), "row")
    yield Entry("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated")
    if not architecture.tied_embeddings:
        yield Entry("output_layer.weight", ("lm_head.weight",), "vocab")


def expected_shapes(entry: Entry, architecture: Architecture) -> list[tuple[int, ...]]:
    """Shapes of entry.hf, in order."""
    a, tail = architecture, entry.megatron.rsplit(".", 2)[-2:]
    if entry.kind == "vocab":
        return [(a.vocab_size, a.hidden_size)]
    if entry.kind == "qkv":
        rows = [a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim, a.num_query_groups * a.head_dim]
        return [(r,) if tail[1] == "bias" else (r, a.hidden_size) for r in rows]
    if entry.kind == "gate_up":
        return [(a.ffn_hidden_size, a.hidden_size)] * 2
    if entry.kind == "row":
        inputs = a.ffn_hidden_size if tail[0] == "linear_fc2" else a.num_attention_heads * a.head_dim
        return [(a.hidden_size, inputs)]
    return [(a.head_dim if tail[0] in ("q_layernorm", "k_layernorm") else a.hidden_size,)]


def fuse_qkv(qkv: Sequence[torch.Tensor], groups: int) -> torch.Tensor:
    """Interleaves the rows by query group: for each group its query heads, its key head, its value head.

    `groups` are those in qkv = (q, k, v), weights or biases.
    """
    return torch.cat([t.unflatten(0, (groups, t.shape[0] // groups)) for t in qkv], dim=1).flatten(0, 1)


def shard(entry: Entry, tensors: list[torch.Tensor], architecture: Architecture, rank: int, size: int) -> torch.Tensor:
    """This rank's Megatron tensor from the full Hugging Face tensors (in the order of entry.hf)."""
    if entry.kind == "replicated":
        return tensors[0]
    if entry.kind == "vocab":
        rows = architecture.padded_vocab_size(size) // size
        part = tensors[0][rank * rows : (rank + 1) * rows]
        return torch.nn.functional.pad(part, (0, 0, 0, rows - part.shape[0]))
    if entry.kind == "row":
        return tensors[0].chunk(size, dim=1)[rank]
    parts = [tensor.chunk(size, dim=0)[rank] for tensor in tensors]
    return fuse_local(entry, parts, groups=architecture.num_query_groups // size)


def shard_dim(entry: Entry) -> int | None:
    """The dimension of entry.hf's tensors that tensor parallelism cuts; None: every rank holds all of it."""
    return {"replicated": None, "row": 1}.get(entry.kind, 0)


def fuse_local(entry: Entry, parts: list[torch.Tensor], groups: int) -> torch.Tensor:
    """One rank's Megatron tensor from its parts of entry.hf; `groups` are its query groups."""
    if entry.kind == "qkv":
        return fuse_qkv(parts, groups)
    return torch.cat(parts) if entry.kind == "gate_up" else parts[0]


def split_local(entry: Entry, tensor: torch.Tensor, heads: int, groups: int) -> list[torch.Tensor]:
    """The inverse of fuse_local; `heads` and `groups` are those of this rank."""
    if entry.kind == "qkv":
        per_group = heads // groups
        by_group = tensor.unflatten(0, (groups, per_group + 2, -1))  # [groups, q heads + k + v, head_dim, ...]
        return [part.flatten(0, 2) for part in by_group.split((per_group, 1, 1), dim=1)]
    return list(tensor.chunk(2)) if entry.kind == "gate_up" else [tensor]

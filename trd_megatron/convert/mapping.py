"""The name table between Hugging Face checkpoints and Megatron's GPTModel, and how each tensor is cut over ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from trd_megatron.convert.architecture import Architecture, Experts

LAYERS = "decoder.layers."
QKV = "self_attention.linear_qkv"

Kind = Literal["replicated", "vocab", "qkv", "gate_up", "row"]


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors it is made of.

    kind: replicated (every rank all of it), vocab (rows, padded at the end), qkv (fused by query group, rows),
    gate_up (gate rows then up rows on each rank), row (columns: the input of a row-parallel layer).
    """

    megatron: str  # name in a GPTModel of local layers
    hf: tuple[str, ...]
    kind: Kind
    key: str  # name of the tensor in a distributed checkpoint: all layers (and experts) stacked
    index: tuple[int, ...] = ()  # where in its leading dimensions: (), (layer,) or (layer, expert)


def entries(architecture: Architecture) -> Iterator[Entry]:
    """Every parameter of the model, in Megatron's order."""
    embedding = "embedding.word_embeddings.weight"
    yield Entry(embedding, ("model.embed_tokens.weight",), "vocab", embedding)
    for layer in range(architecture.num_layers):
        yield from _attention(architecture, layer)
        yield from _mlp(layer) if architecture.experts is None else _experts(architecture.experts, layer)
    norm, output = "decoder.final_layernorm.weight", "output_layer.weight"
    yield Entry(norm, ("model.norm.weight",), "replicated", norm)
    if not architecture.tied_embeddings:
        yield Entry(output, ("lm_head.weight",), "vocab", output)


def _attention(architecture: Architecture, layer: int) -> Iterator[Entry]:
    theirs = f"model.layers.{layer}."
    attention = f"{theirs}self_attn."
    yield _of_layer(layer, "input_layernorm.weight", (f"{theirs}input_layernorm.weight",), "replicated", f"{QKV}.layer_norm_weight")
    yield _of_layer(layer, "self_attention.linear_proj.weight", (f"{attention}o_proj.weight",), "row")
    yield _of_layer(layer, f"{QKV}.weight", tuple(f"{attention}{x}_proj.weight" for x in "qkv"), "qkv")
    if architecture.qkv_bias:
        yield _of_layer(layer, f"{QKV}.bias", tuple(f"{attention}{x}_proj.bias" for x in "qkv"), "qkv")
    if architecture.qk_norm:
        yield _of_layer(layer, "self_attention.q_layernorm.weight", (f"{attention}q_norm.weight",), "replicated")
        yield _of_layer(layer, "self_attention.k_layernorm.weight", (f"{attention}k_norm.weight",), "replicated")


def _mlp(layer: int) -> Iterator[Entry]:
    theirs = f"model.layers.{layer}."
    norm, mlp = f"{theirs}post_attention_layernorm.weight", f"{theirs}mlp."
    yield _of_layer(layer, "pre_mlp_layernorm.weight", (norm,), "replicated", "mlp.linear_fc1.layer_norm_weight")
    yield _of_layer(layer, "mlp.linear_fc1.weight", (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"), "gate_up")
    yield _of_layer(layer, "mlp.linear_fc2.weight", (f"{mlp}down_proj.weight",), "row")


def _experts(experts: Experts, layer: int) -> Iterator[Entry]:
    theirs = f"model.layers.{layer}."
    # Not fused with a linear layer that follows, so it has a name of its own in checkpoints too.
    yield _of_layer(layer, "pre_mlp_layernorm.weight", (f"{theirs}post_attention_layernorm.weight",), "replicated")
    yield _of_layer(layer, "mlp.router.weight", (f"{theirs}mlp.gate.weight",), "replicated")
    for expert in range(experts.count):
        ours, mlp = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.", f"{theirs}mlp.experts.{expert}."
        stacked, index = f"{LAYERS}mlp.experts.experts.", (layer, expert)
        gate_up = (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight")
        yield Entry(f"{ours}linear_fc1.weight", gate_up, "gate_up", f"{stacked}linear_fc1.weight", index)
        yield Entry(f"{ours}linear_fc2.weight", (f"{mlp}down_proj.weight",), "row", f"{stacked}linear_fc2.weight", index)


def _of_layer(layer: int, name: str, hf: tuple[str, ...], kind: Kind, stacked: str | None = None) -> Entry:
    """stacked: the name in checkpoints, where a norm is part of the linear layer that follows, as in Transformer Engine's."""
    return Entry(f"{LAYERS}{layer}.{name}", hf, kind, f"{LAYERS}{stacked or name}", (layer,))


def expected_shapes(entry: Entry, architecture: Architecture) -> list[tuple[int, ...]]:
    """Shapes of entry.hf, in order."""
    a, tail = architecture, entry.megatron.rsplit(".", 2)[-2:]
    if entry.kind == "vocab":
        return [(a.vocab_size, a.hidden_size)]
    if entry.kind == "qkv":
        rows = [a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim, a.num_query_groups * a.head_dim]
        return [(r,) if tail[1] == "bias" else (r, a.hidden_size) for r in rows]
    if entry.kind == "gate_up":
        return [(a.mlp_columns, a.hidden_size)] * 2
    if entry.kind == "row":
        return [(a.hidden_size, a.mlp_columns if tail[0] == "linear_fc2" else a.num_attention_heads * a.head_dim)]
    if tail[0] == "router":
        assert a.experts is not None
        return [(a.experts.count, a.hidden_size)]
    return [(a.head_dim if tail[0] in ("q_layernorm", "k_layernorm") else a.hidden_size,)]


def megatron_shape(entry: Entry, architecture: Architecture) -> tuple[int, ...]:
    """Shape of the whole Megatron tensor, over all ranks and without padding of the vocabulary."""
    shapes = expected_shapes(entry, architecture)
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


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

"""Weights into a GPTModel: out of a Hugging Face folder, or out of a Megatron distributed checkpoint (torch_dist)."""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor, apply_factories
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint import CheckpointException

from trd_megatron.convert.architecture import Architecture
from trd_megatron.convert.huggingface import HuggingFace
from trd_megatron.convert.mapping import entries, shard
from trd_megatron.convert.safe_metadata import check_checkpoint
from trd_megatron.errors import UserError
from trd_megatron.learner.parallel import Parallel


def load_hf(gpt: GPTModel, parallel: Parallel, folder: Path) -> None:
    """Raises UserError if the folder's tensors do not fit its config.json."""
    parameters = dict(gpt.named_parameters())
    source = HuggingFace(folder)
    for entry in entries(source.architecture):
        parameter = parameters.pop(entry.megatron)
        with torch.no_grad():
            parameter.copy_(shard(entry, source.read(entry), source.architecture, parallel.tp_rank, parallel.tp_size))
    assert not parameters, f"parameters without a source: {sorted(parameters)}"


def load_megatron(gpt: GPTModel, architecture: Architecture, parallel: Parallel, checkpoint: Path) -> None:
    """Through Megatron's own loader, from any layout into this one. Every rank calls it.

    Raises UserError if the checkpoint lacks a tensor, has one of another shape, or holds what would have to be unpickled unchecked.
    """
    # Objects beside the weights (Transformer Engine's fp8 scales) are pickles: left out, the learner makes its own.
    state = {name: part for name, part in gpt.sharded_state_dict().items() if not isinstance(part, ShardedObject)}
    _check_shapes(state, architecture, checkpoint)
    try:
        with parallel.megatron_device():
            loaded = dist_checkpointing.load(state, str(checkpoint))
    except (CheckpointingException, CheckpointException) as error:
        raise UserError(f"checkpoint {checkpoint} cannot be read: {str(error).splitlines()[0]}") from error
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            parameter.copy_(loaded[name])


def _check_shapes(state: ShardedStateDict, architecture: Architecture, checkpoint: Path) -> None:
    built = dict(state)
    apply_factories(built)
    wanted = {part.key: part for part in nested_values(built) if isinstance(part, ShardedTensor)}
    shapes = check_checkpoint(checkpoint, wanted)
    for key, part in wanted.items():
        found, expected = shapes[key], tuple(part.global_shape)
        if part.allow_shape_mismatch and found[0] >= architecture.vocab_size:  # padded for another number of ranks
            expected = (found[0], *expected[1:])
        if found != expected:
            raise UserError(f"{checkpoint}: {key} has shape {list(found)}, the model's config.json says {list(expected)}")

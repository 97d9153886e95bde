"""Megatron-Core's own distributed checkpoints of a Hugging Face folder, saved and loaded by the ranks of a test on any layout."""

import re
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from tests.dist.learner_cases import _logits, layout, start
from trd_megatron.config import load
from trd_megatron.convert.architecture import Architecture
from trd_megatron.convert.huggingface import HuggingFace
from trd_megatron.convert.mapping import entries, shard
from trd_megatron.errors import UserError
from trd_megatron.learner.model import Model, block_spec, gpt_model, transformer_config
from trd_megatron.learner.parallel import Parallel
from trd_megatron.learner.stack import Installed, choose

CONFIG = load(["experiment=smoke"])


class Stage:
    """This rank's part of a model. Ranks: tensor parallel innermost, then expert parallel, then pipeline parallel."""

    def __init__(self, folder: Path, tp: int, pp: int, ep: int) -> None:
        ranks = torch.distributed.get_world_size()
        learner = layout(CONFIG, tp, tp > 1, ranks // tp).learner
        self.parallel: Parallel = start(learner)  # counts pipeline and expert parallel ranks as data parallel ones
        self.architecture = Architecture.from_hf(folder)
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=tp)
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        stack = choose(learner, Installed.find())
        config = transformer_config(self.architecture, learner, self.parallel, stack)
        config.pipeline_model_parallel_size, config.expert_model_parallel_size = pp, ep
        spec = block_spec(self.architecture, stack)
        stage = TransformerBlockSubmodules(spec.layer_specs[: get_num_layers_to_build(config)], spec.layer_norm)
        first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        with mock.patch.object(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor):  # to share tied embeddings among stages
            self.gpt = gpt_model(self.architecture, config, stage, pre_process=first, post_process=last)
        self._layers_before = get_transformer_layer_offset(config)
        count = self.architecture.experts.count if self.architecture.experts else 0
        self._experts_before = parallel_state.get_expert_model_parallel_rank() * count // ep

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Under their names in the whole model; a tied embedding's copy on the last stage is output_layer.weight."""
        return {self.whole_name(name): parameter for name, parameter in self.gpt.named_parameters()}

    def whole_name(self, name: str) -> str:
        name = re.sub(r"^decoder\.layers\.(\d+)", lambda found: f"decoder.layers.{int(found[1]) + self._layers_before}", name)
        return re.sub(r"local_experts\.(\d+)", lambda found: f"local_experts.{int(found[1]) + self._experts_before}", name)

    def fill(self, folder: Path) -> None:
        """The weights of a Hugging Face folder."""
        table = {entry.megatron: entry for entry in entries(self.architecture)}
        source = HuggingFace(folder)
        for name, parameter in self.parameters().items():
            entry = table["embedding.word_embeddings.weight" if name == "output_layer.weight" and name not in table else name]
            with torch.no_grad():
                parameter.copy_(shard(entry, source.read(entry), self.architecture, self.parallel.tp_rank, self.parallel.tp_size))


def save_megatron(rank: int, folder: Path, out: Path, tp: int = 1, pp: int = 1, ep: int = 1) -> None:
    """Builds the model of a Hugging Face folder on tp x pp (x ep) ranks and saves it into `out` as Megatron itself does."""
    stage = Stage(folder, tp, pp, ep)
    stage.fill(folder)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    with stage.parallel.megatron_device():
        dist_checkpointing.save(stage.gpt.sharded_state_dict(), str(out))


def load_megatron(
    rank: int, folder: Path, checkpoint: Path, tp: int = 1, pp: int = 1, ep: int = 1, ids: list[list[int]] | None = None
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """(this rank's shard of every parameter, under its name in a whole model; the logits of each of `ids`, with pp = ep = 1).

    Weights come through Megatron's own loader; with pp = ep = 1 it is the learner that calls it.
    """
    if pp == ep == 1:
        learner = layout(CONFIG, tp, tp > 1, 1).learner
        model = Model(folder, learner, start(learner), checkpoint=checkpoint)
        parameters = {name: parameter.detach() for name, parameter in model.gpt.named_parameters()}
        return parameters, _logits(model, model.parallel, ids) if ids else []
    assert not ids
    stage = Stage(folder, tp, pp, ep)
    state = {name: part for name, part in stage.gpt.sharded_state_dict().items() if not isinstance(part, ShardedObject)}
    with stage.parallel.megatron_device():
        loaded = dist_checkpointing.load(state, str(checkpoint))
    return {stage.whole_name(name): loaded[name] for name, _ in stage.gpt.named_parameters()}, []


def load_and_save(rank: int, loads: list[tuple], saves: list[tuple]) -> list[tuple[dict[str, torch.Tensor], list[torch.Tensor]]]:
    """load_megatron and save_megatron with each of these arguments, in one start of the ranks; returns what was loaded."""
    loaded = [load_megatron(rank, *arguments) for arguments in loads]
    for arguments in saves:
        save_megatron(rank, *arguments)
    return loaded


def refusals(rank: int, loads: list[tuple[Path, Path]]) -> list[str]:
    """What the learner says to each (Hugging Face folder, checkpoint) that does not fit."""
    messages = []
    for folder, checkpoint in loads:
        try:
            load_megatron(rank, folder, checkpoint)
        except UserError as error:
            messages.append(str(error))
    return messages


def keys_and_refusals(
    rank: int, folders: list[Path], whole: list[tuple[Path, Path]], loads: list[tuple[Path, Path]]
) -> tuple[list[dict[str, tuple[int, ...]]], list[set[str]], list[str]]:
    """Per model: name in a checkpoint -> shape, of all tensors that Megatron would save, on one rank. Per (folder, checkpoint) of
    `whole`: what Megatron looks for and does not find, its objects beside the weights among them. And refusals(loads)."""
    return [_keys(folder) for folder in folders], [_not_found(*one) for one in whole], refusals(rank, loads)


def _not_found(folder: Path, checkpoint: Path) -> set[str]:
    stage = Stage(folder, 1, 1, 1)
    with stage.parallel.megatron_device():
        _, _, unexpected = dist_checkpointing.load(stage.gpt.sharded_state_dict(), str(checkpoint), strict="return_all")
    return unexpected


def _keys(folder: Path) -> dict[str, tuple[int, ...]]:
    state: dict[str, Any] = Stage(folder, 1, 1, 1).gpt.sharded_state_dict()
    apply_factories(state)
    return {part.key: tuple(part.global_shape) for part in nested_values(state) if isinstance(part, ShardedTensor)}

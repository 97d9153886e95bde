"""Logits of a checkpoint in float32, by the library that its format is for."""

import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from trd_megatron.errors import UserError


def of_huggingface(folder: Path, sequences: list[list[int]]) -> list[torch.Tensor]:
    """transformers' logits [tokens, vocabulary] of each sequence of token ids."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0] for ids in sequences]


def of_megatron(companions: Path, checkpoint: Path, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Megatron-Core's logits [tokens, vocabulary], the weights read by its own loader. companions: the folder with config.json.

    In a process of its own: without a GPU Megatron needs parts of torch replaced. Raises UserError as the loader does.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_in_child, companions, checkpoint, sequences).result()
        except BrokenProcessPool:
            raise UserError(f"{checkpoint}: the process that computed its logits died; is there memory for the whole model?") from None


def _in_child(companions: Path, checkpoint: Path, sequences: list[list[int]]) -> list[torch.Tensor]:
    warnings.simplefilter("ignore")  # Megatron's of what a machine without a GPU lacks
    from torch import distributed

    from trd_megatron.config import LearnerConfig
    from trd_megatron.learner import cpu
    from trd_megatron.learner.model import Model
    from trd_megatron.learner.packing import Cut, pack
    from trd_megatron.learner.parallel import setup

    cpu.prepare()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    config = LearnerConfig(device="cpu", dtype="float32")
    parallel = setup(config)
    model = Model(companions, config, parallel, checkpoint=checkpoint)
    packing = pack([ids[:1] for ids in sequences], [ids[1:] for ids in sequences], Cut(), parallel.device, [0] * len(sequences))
    with torch.no_grad():
        logits = model.hidden_states(packing) @ model.output_weight.T
    return list(logits[:, : model.architecture.vocab_size].split([len(ids) for ids in sequences]))

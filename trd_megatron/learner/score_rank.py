"""One rank's part of scoring (score.py): log-probabilities through training's packing, model and loss, and the likeliest ids."""

from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from trd_megatron.config import LearnerConfig
from trd_megatron.divergence import Backend, Divergence, linear_kl
from trd_megatron.learner.model import Model
from trd_megatron.learner.packing import Cut, Sample, deal, micro_batches
from trd_megatron.learner.parallel import Parallel
from trd_megatron.learner.score import SCORES
from trd_megatron.learner.stack import token_multiple
from trd_megatron.records import SCORE
from trd_megatron.run_dir import write_parquet


@torch.no_grad()
def score(config: LearnerConfig, folder: Path, samples: list[Sample], model_path: Path, parallel: Parallel) -> None:
    """Scores the responses under the student's prompts; rank 0 writes folder/scores.parquet."""
    model = Model(model_path, config, parallel)
    vocab_size, weight = model.architecture.vocab_size, model.output_weight
    cut = Cut(token_multiple(config, parallel), parallel.cp_size, parallel.cp_rank)
    lengths = torch.tensor([sample.response_tokens for sample in samples])
    starts = dict(zip((sample.problem_id for sample in samples), (lengths.cumsum(0) - lengths).tolist(), strict=True))
    # [2, response tokens of all samples]: log-probability and likeliest id. Every token is filled in on one rank of dp_cp_group.
    found = torch.zeros(2, int(lengths.sum()), dtype=torch.float64, device=parallel.device)
    model.gpt.set_is_first_microbatch()  # as a training step does
    mine = deal(samples, parallel.dp_size)[parallel.dp_rank]
    for batch in micro_batches(mine, config.max_tokens_per_micro_batch, cut, parallel.device):
        rows = batch.student
        hidden = model.hidden_states(rows)[rows.rows]
        output = linear_kl(  # the loss of training, with the model as its own teacher: only the targets' log-probabilities are of interest
            hidden,
            weight,
            hidden,
            weight,
            Divergence("forward"),
            token_weights=hidden.new_zeros(len(hidden), dtype=torch.float64),
            targets=rows.targets,
            vocab_size=vocab_size,
            tp_group=parallel.tp_group if parallel.tp_size > 1 else None,
            chunk_tokens=config.kl_chunk_tokens,
            backend=cast(Backend, config.kl_backend),
        )
        assert output.student_logprob is not None
        places = torch.cat([torch.arange(sample.response_tokens) + starts[sample.problem_id] for sample in batch.samples])
        mine_of_batch = places.to(parallel.device)[rows.responses]
        found[0, mine_of_batch] = output.student_logprob.double()
        found[1, mine_of_batch] = top_ids(hidden, weight, vocab_size, parallel, config.kl_chunk_tokens).double()
    dist.all_reduce(found, group=parallel.dp_cp_group)
    if not parallel.is_main:
        return
    logprobs, ids = (part.cpu().split(lengths.tolist()) for part in found)
    table = [{"logprobs": one.tolist(), "top_ids": [int(i) for i in best]} for one, best in zip(logprobs, ids, strict=True)]
    write_parquet(folder / SCORES, table, SCORE)


def top_ids(hidden: Tensor, weight: Tensor, vocab_size: int, parallel: Parallel, chunk_tokens: int) -> Tensor:
    """The likeliest id [T] after each of hidden [T, H], over every rank's rows of the output layer (weight [V_local, H])."""
    first = parallel.tp_rank * weight.shape[0]
    own = weight[: min(max(vocab_size - first, 0), weight.shape[0])]  # without the padding
    best = hidden.new_full((len(hidden),), -torch.inf)
    ids = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    if len(own):
        for start in range(0, len(hidden), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            best[chunk], ids[chunk] = (hidden[chunk] @ own.t()).max(1)
    ids += first
    if parallel.tp_size == 1:
        return ids
    all_best, all_ids = (x.new_empty(parallel.tp_size, len(x)) for x in (best, ids))
    dist.all_gather(list(all_best.unbind()), best, group=parallel.tp_group)
    dist.all_gather(list(all_ids.unbind()), ids, group=parallel.tp_group)
    return all_ids.gather(0, all_best.argmax(0, keepdim=True)).squeeze(0)

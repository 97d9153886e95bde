"""Megatron-Core's distributed optimizer, for training every parameter on GPUs, behind the interface of optimizer.py.

Gradients lie in float32 buckets; a bucket is reduce-scattered over the data-parallel ranks while backward goes on. Each rank
updates one contiguous piece of every bucket, whatever parameters it cuts, and the updated parameters are gathered.
"""

import copy
import math
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from trd_megatron.config import LearnerConfig
from trd_megatron.learner import fused
from trd_megatron.learner.model import Model
from trd_megatron.learner.optimizer import Optimizer, all_reduce, deal_parameters
from trd_megatron.learner.parallel import Parallel
from trd_megatron.learner.trained import Trained

BUCKET: int | None = None  # numbers in a bucket of gradients; None: Megatron's own choice, 40 million or more


class MegatronOptimizer:
    """Drop-in for Optimizer. The parameters' data move into Megatron's buffers, so build it after they are loaded."""

    def __init__(self, model: Model, config: LearnerConfig, parallel: Parallel) -> None:
        """Every parameter of `model` is trained. Its dtype is float32 or bfloat16."""
        self.trained: list[Trained] = model.trained()
        self.config, self.parallel = config, parallel
        self.owners = deal_parameters(self.trained, parallel.dp_cp_size)  # who saves each parameter's state
        half = config.dtype == "bfloat16"
        # Gradients are of the global token mean already: the ranks' are added up. Megatron would average them without this flag.
        transformer = copy.copy(model.gpt.config)
        transformer.calculate_per_token_loss = True
        buckets = DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=True, grad_reduce_in_fp32=True, bucket_size=BUCKET
        )
        settings = OptimizerConfig(
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            bf16=half,
            params_dtype=torch.bfloat16 if half else torch.float32,
            use_distributed_optimizer=True,
        )
        with parallel.megatron_device():
            self._ddp = DistributedDataParallel(transformer, buckets, model.gpt)
            [self._megatron] = get_megatron_optimizer(settings, [self._ddp], use_gloo_process_groups=False).chained_optimizers
        self._shards = self._own_shards()
        self._hold_back()

    @property
    def name(self) -> str:
        """What does the work, for logs."""
        return f"Megatron's distributed optimizer with {fused.adam_name(self._megatron.optimizer)}"

    def _own_shards(self) -> dict[int, tuple[slice, Tensor]]:
        """Parameter's index -> which part of it, flattened, this rank updates, and the float32 numbers that Adam works on."""
        megatron = self._megatron
        pairs = chain(
            zip(chain(*megatron.model_float16_groups), chain(*megatron.shard_fp32_from_float16_groups), strict=True),
            zip(chain(*megatron.model_fp32_groups), chain(*megatron.shard_fp32_groups), strict=True),
        )
        by_parameter = dict(pairs)
        shards = {}
        for index, one in enumerate(self.trained):
            if one.parameter in by_parameter:
                part = megatron._get_model_param_range_map(one.parameter)["param"]
                shards[index] = (slice(part.start, part.end), by_parameter[one.parameter])
        return shards

    def _parts(self, index: int) -> dict[str, Tensor]:
        """This rank's part of a parameter's optimizer state, flat; to be changed in place."""
        shard = self._shards[index][1]
        found = fused.moments(self._megatron.optimizer, shard)
        return found if self.config.dtype == "float32" else found | {"master": shard.detach()}

    def _state_names(self) -> list[str]:
        return ["exp_avg", "exp_avg_sq"] if self.config.dtype == "float32" else ["exp_avg", "exp_avg_sq", "master"]

    def states(self) -> dict[int, dict[str, Tensor]]:
        """As Optimizer.states: one parameter after the other is put together on its owner, in host memory."""
        ranks = dist.get_process_group_ranks(self.parallel.dp_cp_group)
        found: dict[int, dict[str, Tensor]] = {}
        for index, one in enumerate(self.trained):
            parts = self._parts(index) if index in self._shards else {}
            for name in self._state_names():
                whole = torch.zeros(one.parameter.numel(), dtype=torch.float32, device=self.parallel.device)
                if parts:
                    whole[self._shards[index][0]] = parts[name]
                if self.parallel.dp_cp_size > 1:
                    dist.reduce(whole, ranks[self.owners[index]], group=self.parallel.dp_cp_group)
                if self.owners[index] == self.parallel.dp_cp_rank:
                    found.setdefault(index, {})[name] = whole.view_as(one.parameter).cpu()
        return found

    def restore(self, states: dict[int, dict[str, Tensor]], step: int) -> None:
        """As Optimizer.restore: each parameter's owner sends it to all, who take their parts."""
        ranks = dist.get_process_group_ranks(self.parallel.dp_cp_group)
        for index, one in enumerate(self.trained):
            for name in self._state_names():
                if self.owners[index] == self.parallel.dp_cp_rank:
                    whole = states[index][name].flatten().to(self.parallel.device)
                else:
                    whole = torch.empty(one.parameter.numel(), dtype=torch.float32, device=self.parallel.device)
                if self.parallel.dp_cp_size > 1:
                    dist.broadcast(whole, ranks[self.owners[index]], group=self.parallel.dp_cp_group)
                if index in self._shards:
                    self._parts(index)[name].copy_(whole[self._shards[index][0]])
        fused.set_step(self._megatron.optimizer, step)

    def _hold_back(self) -> None:
        """Backward only adds up, until before_last_backward."""
        for bucket in self._ddp.bucket_groups:
            bucket.is_last_microbatch = False

    def before_last_backward(self) -> None:
        """Called before the backward of the last micro-batch when every data-parallel rank has one: full buckets are sent at once.

        Ranks send buckets in the order that backward fills them. A rank without a micro-batch could not know it, so then none may.
        """
        for bucket in self._ddp.bucket_groups:
            bucket.is_last_microbatch = True

    def reduce_gradients(self) -> None:
        """Adds up what ranks hold in parts. After it each rank has the gradients of its own pieces."""
        for bucket in self._ddp.bucket_groups:
            if bucket.grad_reduce_handle is None:
                bucket.start_grad_sync()
        self._ddp.finish_grad_sync()
        if self.parallel.tp_size > 1:  # same data-parallel rank, same pieces
            all_reduce([cast(Any, one.parameter).main_grad for one in self.trained if one.partial], self.parallel.tp_group)
        self._megatron.prepare_grads()

    def _gradients(self, *, cut: bool) -> list[Tensor]:
        """What Adam reads, flat: gradients of this rank's pieces of the parameters that tensor parallelism cuts or replicates."""
        pieces = [shard.grad for index, (_, shard) in self._shards.items() if (self.trained[index].shard_dim is not None) == cut]
        return [piece for piece in pieces if piece is not None]

    def gradient_norm(self) -> float:
        """Global 2-norm; what tensor parallelism cuts is added over its group, what it replicates is counted once."""
        squares = torch.stack([fused.square_sum(self._gradients(cut=cut), self.parallel.device) for cut in (False, True)])
        if self.parallel.dp_cp_size > 1:
            dist.all_reduce(squares, group=self.parallel.dp_cp_group)
        if self.parallel.tp_size > 1:
            dist.all_reduce(squares[1:], group=self.parallel.tp_group)
        return math.sqrt(float(squares.sum()))

    def step(self, rate: float, norm: float) -> None:
        """Clips to clip_grad and updates. Gradients are cleared."""
        if norm > self.config.clip_grad:
            fused.scale(self._gradients(cut=False) + self._gradients(cut=True), self.config.clip_grad / norm)
        for group in self._megatron.optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"]  # 0 for norms and biases
        self._megatron.step_with_ready_grads()
        self.zero_grad()

    def zero_grad(self) -> None:
        self._megatron.zero_grad()
        self._ddp.zero_grad_buffer()
        self._hold_back()


AnyOptimizer = Optimizer | MegatronOptimizer


def uses_megatron(config: LearnerConfig, device: torch.device) -> bool:
    """Whether Megatron's optimizer trains. It keeps main parameters in float32, so it does not do for float64."""
    return config.trainable == "full" and device.type == "cuda" and config.dtype != "float64"


def build_optimizer(model: Model, trained: list[Trained], config: LearnerConfig, parallel: Parallel) -> AnyOptimizer:
    """The optimizer of a student: Megatron's for every parameter on GPUs, ours for adapters and on the CPU."""
    if uses_megatron(config, parallel.device):
        return MegatronOptimizer(model, config, parallel)
    return Optimizer(trained, config, parallel)

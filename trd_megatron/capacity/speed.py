"""Time of generation and training from first principles: work over what the hardware could do, times the shares assumed in gpus.py."""

from dataclasses import dataclass

from trd_megatron.capacity.gpus import DECODE_BANDWIDTH, DECODE_FLOPS, GPU, KERNELS_S, LINKS, PREFILL, REDUCE_S, TRAINING
from trd_megatron.capacity.memory import BYTES, rank_adapters, rank_parameters
from trd_megatron.capacity.models import active_parameters
from trd_megatron.config import EngineConfig, LearnerConfig, ServersConfig
from trd_megatron.convert.architecture import Architecture
from trd_megatron.learner.flops import training_flops
from trd_megatron.learner.packing import Sample

MEM_FRACTION = 0.88  # of a GPU's memory for weights and KV cache, as SGLang chooses about


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of a response, and the most a response may have."""

    prompt: float
    response: float
    longest: int


@dataclass(frozen=True)
class Serving:
    """One server. weights: bytes of each GPU. kv_tokens: that fit beside them, on all its GPUs. sequences: decoded at once."""

    weights: float
    kv_tokens: float
    sequences: float


@dataclass(frozen=True)
class Timing:
    seconds: float
    gpus: int
    limit: str  # what most of the time goes to

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.gpus / 3600


def serving(model: Architecture, servers: ServersConfig, engine: EngineConfig, gpu: GPU, lengths: Lengths) -> Serving:
    """kv_tokens is at most 0 where the weights do not fit."""
    tp = servers.tensor_parallel_size
    weights = model.parameter_count() * (1 if servers.fp8 else BYTES[engine.dtype]) / tp
    room = (servers.mem_fraction_static or MEM_FRACTION) * gpu.memory - weights
    tokens = room / (kv_bytes(model, engine) / min(tp, model.num_query_groups))
    return Serving(weights, tokens, min(tokens / (lengths.prompt + lengths.response), engine.max_outstanding))


def kv_bytes(model: Architecture, engine: EngineConfig) -> int:
    """Keys and values of one token."""
    return 2 * model.num_layers * model.num_query_groups * model.head_dim * BYTES[engine.dtype]


def generation(model: Architecture, servers: ServersConfig, engine: EngineConfig, gpu: GPU, lengths: Lengths, samples: int) -> Timing:
    """Of `samples` responses over all servers: prompts, the steady state, and the last long answers with little beside them."""
    tp, count = servers.tensor_parallel_size, servers.data_parallel_size
    held = serving(model, servers, engine, gpu, lengths)
    at_once = max(min(held.sequences, samples / count), 1.0)
    flops = gpu.flops("bfloat16") * tp  # fp8 weights are not assumed to multiply faster
    context = (lengths.prompt + lengths.response / 2) * kv_bytes(model, engine) / min(tp, model.num_query_groups)

    def read(sequences: float) -> float:
        """Seconds; of experts a large batch reads all."""
        share = _touched(model) if model.experts is None else min(1.0, sequences * _touched(model))
        return (held.weights * share + sequences * context) / (gpu.bandwidth * DECODE_BANDWIDTH)

    multiply = 2 * active_parameters(model) * at_once / (flops * DECODE_FLOPS)
    fixed = KERNELS_S + (2 * model.num_layers * REDUCE_S if tp > 1 else 0.0)
    step = max(read(at_once), multiply) + fixed
    prefill = samples / count * lengths.prompt * 2 * active_parameters(model) / (flops * PREFILL)
    steady = samples / count / at_once * lengths.response * step
    tail = max(lengths.longest - lengths.response, 0) * (read(1.0) + fixed)
    parts = {"prompts": prefill, "decoding: memory bandwidth": steady, "the longest answers": tail}
    if multiply > read(at_once):
        parts["decoding: multiplying"] = parts.pop("decoding: memory bandwidth")
    return Timing(sum(parts.values()), tp * count, max(parts, key=lambda name: parts[name]))


def _touched(model: Architecture) -> float:
    """Share of the weights that one sequence's token reads."""
    return active_parameters(model) / model.parameter_count()


def training(
    learner: LearnerConfig,
    student: Architecture,
    teacher: Architecture,
    gpu: GPU,
    prompts: tuple[float, float],
    response: float,
    samples: int,
    gpus_per_node: int,
) -> Timing:
    """One epoch times learner.epochs over `samples` of mean length. prompts: the student's and the teacher's."""
    tp, ranks = learner.tensor_model_parallel_size, learner.ranks
    full = learner.trainable == "full"
    mean = Sample("", 0, [0] * round(prompts[0]), [0] * round(prompts[1]), [0] * max(round(response), 1), None)
    flops = float(training_flops(student, teacher, None if full else learner.lora, [mean]))
    tokens, width = prompts[0] + response, BYTES[learner.dtype]
    again = 2.0 * tokens * (active_parameters(student) - student.vocab_size * student.hidden_size)
    flops += {"full": again, "selective": again * 0.6, "none": 0.0}[learner.recompute]
    steps = -(-samples // learner.global_batch_size) * learner.epochs
    compute = samples * learner.epochs * flops / ranks / (gpu.flops("fp8" if learner.fp8 != "none" else "bfloat16") * TRAINING)
    # Two gathers and two scatters a layer and pass: the student's forward, backward and recomputation, the teacher's forward.
    passes = 3 if learner.recompute == "full" else 2
    moved = (
        4
        * width
        * (passes * tokens * student.num_layers * student.hidden_size + (prompts[1] + response) * teacher.num_layers * teacher.hidden_size)
    )
    shared = samples * learner.epochs * moved * (tp - 1) / tp / (ranks / tp) / (gpu.link * LINKS)
    trained = rank_parameters(student, tp) if full else rank_adapters(student, learner.lora.rank, learner.lora.targets, tp)
    copies = ranks // tp
    wire = gpu.network if ranks > gpus_per_node else gpu.link
    reduced = steps * 2 * (copies - 1) / copies * trained * 4 / (wire * LINKS)
    parts = {"multiplying": compute, "tensor parallel traffic": shared, "gradients between copies": reduced}
    return Timing(sum(parts.values()), ranks, max(parts, key=lambda name: parts[name]))

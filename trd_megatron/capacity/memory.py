"""Memory of one learner rank, counted tensor by tensor.

At the highest moment a rank holds what is there all the time (weights, adapters, gradients, optimizer), what forward keeps for backward,
and the largest of what comes and goes: one chunk of logits, one layer's backward, the optimizer's own. Shape letters: T tokens of a
micro-batch that a rank holds, R of them that predict a response token, H hidden, A = heads x head_dim, K = key/value heads x head_dim,
F = MLP columns, V vocabulary rows of a rank, r LoRA rank, b bytes of a number. `trd bench memory` holds it against measured peaks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trd_megatron.config import LearnerConfig
from trd_megatron.convert.architecture import Architecture

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
# Fixed costs of a rank. cpu: interpreter, PyTorch, Megatron and gloo as Linux counts resident pages. cuda: context, NCCL's buffers, cuBLAS'
# workspaces; assumed.
RUNTIME = {"cpu": 0.54 * 2**30, "cuda": 2.0 * 2**30}
# What allocators hold over what is asked for, of what comes and goes. cpu: glibc, which cuts freed blocks up (with MALLOC_MMAP_THRESHOLD_
# at 4 MiB it is next to nothing, and a step takes a quarter longer); fitted. cuda: PyTorch's caching allocator; assumed.
SLACK = {"cpu": 0.6, "cuda": 0.08}
_BUCKET = 32 * 2**20  # numbers that one collective of optimizer.py sends
_PROJECTIONS_OF = {  # fused layer -> (projections, column-parallel)
    "linear_qkv": (("q_proj", "k_proj", "v_proj"), True),
    "linear_proj": (("o_proj",), False),
    "linear_fc1": (("gate_proj", "up_proj"), True),
    "linear_fc2": (("down_proj",), False),
}


@dataclass(frozen=True)
class Load:
    """What a micro-batch holds: tokens of the larger of its two packings on all context-parallel ranks, and responses among them."""

    tokens: int
    response_tokens: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its highest moment. chunk, layer and update come and go: only the largest of them counts."""

    runtime: float
    weights: float
    teacher: float
    adapters: float
    gradients: float
    optimizer: float
    activations: float  # kept from forward to backward
    hidden: float  # final hidden states and their gradients
    chunk: float  # the loss's
    layer: float  # one layer's backward, recomputed or not
    update: float  # the optimizer's and the collectives' own
    slack: float

    @property
    def total(self) -> float:
        lasting = self.runtime + self.weights + self.teacher + self.adapters + self.gradients + self.optimizer
        return lasting + max(self.activations + self.hidden + max(self.chunk, self.layer), self.update) + self.slack


def learner_memory(
    learner: LearnerConfig, student: Architecture, teacher: Architecture | None, load: Load, *, supervised: bool = False
) -> Memory:
    """Of the rank that holds most. teacher None: the student itself (OPSD), or nobody when `supervised`."""
    b, tp, cuda = BYTES[learner.dtype], learner.tensor_model_parallel_size, learner.device == "cuda"
    full = learner.trainable == "full"
    tokens = -(-load.tokens // learner.context_parallel_size)
    rows = min(-(-load.response_tokens // learner.context_parallel_size), tokens)
    sharers = learner.data_parallel_size * learner.context_parallel_size

    weights = rank_parameters(student, tp) * b
    own_teacher = teacher if teacher is not None else student if full and not supervised else None
    held = 0.0
    if own_teacher is not None:
        away = learner.teacher_offload and cuda  # on a CPU the host's memory is all there is
        held = (_ends(own_teacher, tp) if away else rank_parameters(own_teacher, tp)) * b
    wide = 8 if b == 8 else 4  # of adapters, and of Adam's moments
    if full:
        trained = float(rank_parameters(student, tp))
        adapters, gradients = 0.0, trained * (max(b, 4) if cuda else b)
        optimizer = trained * (2 * wide + (wide if b < 4 else 0)) / sharers
    else:
        trained = float(rank_adapters(student, learner.lora.rank, learner.lora.targets, tp))
        adapters, gradients, optimizer = trained * wide, trained * wide, trained * 2 * wide / sharers

    kept, layer = _activations(learner, student, tokens, b)
    vocab = student.padded_vocab_size(tp) // tp
    teacher_width = 0 if supervised else (own_teacher or student).hidden_size
    # Final hidden states (gathered), their response rows, the teacher's, the loss's gradient and that of all tokens.
    hidden = b * (2 * tokens * student.hidden_size + rows * (2 * student.hidden_size + teacher_width))
    chunk = _chunk(learner, vocab, min(learner.kl_chunk_tokens, max(rows, 1)), b)
    if full:
        chunk += vocab * student.hidden_size * (wide + b)
        layer = max(layer + 2 * vocab * student.hidden_size * b, 2 * vocab * student.hidden_size * b)
    largest = vocab * student.hidden_size if full else 0
    update = largest * 2 * wide + (2 * min(trained, _BUCKET + largest) * wide if sharers > 1 else 0.0)
    parts = (weights, held, adapters, gradients, optimizer)
    moving = max(kept + hidden + max(chunk, layer), update)
    slack = SLACK[learner.device] * moving
    return Memory(RUNTIME[learner.device], *parts, kept, hidden, chunk, layer, update, slack)


def rank_parameters(architecture: Architecture, tp: int) -> int:
    """Parameters that one rank holds: norms whole, the rest cut."""
    norms = 2 * architecture.hidden_size + (2 * architecture.head_dim if architecture.qk_norm else 0)
    router = 0 if architecture.experts is None else architecture.experts.count * architecture.hidden_size
    experts = 0 if architecture.experts is None else architecture.experts.count
    bias = (architecture.num_attention_heads + 2 * architecture.num_query_groups) * architecture.head_dim if architecture.qkv_bias else 0
    cut = architecture.layer_weights(experts) - router + bias
    layers = architecture.num_layers * (cut // tp + router + norms)
    return layers + architecture.hidden_size + _ends(architecture, tp)


def _ends(architecture: Architecture, tp: int) -> int:
    """Embedding and output layer, which are one when tied."""
    return architecture.padded_vocab_size(tp) // tp * architecture.hidden_size * (1 if architecture.tied_embeddings else 2)


def rank_adapters(architecture: Architecture, rank: int, targets: Sequence[str], tp: int) -> int:
    """LoRA parameters that one rank holds: of a column-parallel layer A whole and B cut, of a row-parallel one the other way round."""
    total = 0
    for names, column in _PROJECTIONS_OF.values():
        for name in names:
            if name in targets:
                inputs, outputs = architecture.projections()[name]
                total += rank * (inputs + outputs // tp if column else inputs // tp + outputs)
    return architecture.num_layers * total


def _chunk(learner: LearnerConfig, vocab: int, rows: int, b: int) -> float:
    """The loss's buffers, docs/divergence.md#memory."""
    cuda = learner.device == "cuda"
    if cuda and learner.kl_backend != "torch" and b < 8:  # triton: in the inputs' type, no scratch
        return 2.0 * rows * vocab * b
    wide = max(b, 4)
    scratch = rows if cuda else min(16, rows)
    return 2.0 * rows * vocab * wide + (rows * vocab * b if b < 4 else 0) + scratch * vocab * wide + (0 if cuda else rows * 8192 * wide)


def _activations(learner: LearnerConfig, a: Architecture, tokens: int, b: int) -> tuple[float, float]:
    """(kept from forward to backward, highest moment of one layer's backward over that) in bytes."""
    tp, cuda = learner.tensor_model_parallel_size, learner.device == "cuda"
    cut = tp if learner.sequence_parallel else 1  # of what lies between the tensor-parallel regions
    hidden, ffn = a.hidden_size / cut, a.mlp_columns * (1 if a.experts is None else a.experts.per_token) / tp
    queries, keys = a.num_attention_heads * a.head_dim / tp, a.num_query_groups * a.head_dim / tp
    # Input and its norm; q, k, v as the layer gives them; q for its norm; rotated q and k; the output, as attention keeps it and as the
    # next product does; sines and cosines, of q and of k.
    attention = 2 * hidden + 5 * queries + 3 * keys + 4 * a.head_dim
    # Input and its norm; gate and up; silu(gate), up and their product, of which SwiGLU in one kernel keeps the product alone.
    mlp = 2 * hidden + (3 if cuda else 5) * ffn
    lora_attention = lora_mlp = weights = 0.0
    if learner.trainable == "lora":
        rank, dropout, projections = learner.lora.rank, learner.lora.dropout > 0, a.projections()
        for kind, (names, column) in _PROJECTIONS_OF.items():
            count = sum(name in learner.lora.targets for name in names)
            if not count:
                continue
            inputs = projections[names[0]][0]
            outputs = sum(projections[name][1] for name in names) / (tp if column else 1)
            inner = count * rank + (count * (inputs / cut if column else inputs / tp) * (b + 1) / b if dropout else 0)
            if kind in ("linear_qkv", "linear_proj"):
                lora_attention += inner
            else:
                lora_mlp += inner
            weights += outputs * count * rank  # every B in columns of its own
    whole = tokens * b * (attention + mlp + lora_attention + lora_mlp) + weights * b
    # Gradients of gate, up and their product, of the residual stream before and after; a product's result before it is added.
    backward = tokens * b * (3 * ffn + 3 * hidden)
    layers = a.num_layers
    if learner.recompute == "full":
        return layers * tokens * b * hidden, whole + backward
    if learner.recompute == "selective":
        insides = tokens * b * (2 if cuda else 4) * ffn  # all but the last product's input
        return layers * (whole - insides), insides + backward
    return layers * whole, backward

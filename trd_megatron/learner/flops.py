"""Model FLOPs of an optimizer step, and the GPUs' peaks that they are held against.

Model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B) compares the time of a step with the time that the step's
mathematics would take at the device's peak. Counted are matrix products alone, a multiply-add as 2 FLOPs; what is computed
twice to save memory is counted once. Attention counts the pairs that the causal mask leaves, n (n + 1) / 2 of a sequence of n
tokens, where the paper's formula counts all n^2: with long sequences this gives the lower, more honest figure.
"""

from collections.abc import Iterable

from trd_megatron.config import LoraConfig
from trd_megatron.convert.architecture import Architecture
from trd_megatron.learner.packing import Sample

# Dense TFLOP/s (no sparsity) of NVIDIA's data sheets under the name that torch.cuda.get_device_name gives; float32 without
# TF32. A part of a GPU (MIG) has another name and is not known.
_A100 = {"bfloat16": 312.0, "float32": 19.5}
_H100_SXM = {"bfloat16": 989.5, "float32": 67.0, "fp8": 1979.0}
_H100_NVL = {"bfloat16": 835.5, "float32": 60.0, "fp8": 1670.5}
PEAKS = {
    "NVIDIA A10": {"bfloat16": 125.0, "float32": 31.2},
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA L4": {"bfloat16": 121.0, "float32": 30.3, "fp8": 242.5},
    "NVIDIA L40S": {"bfloat16": 362.05, "float32": 91.6, "fp8": 733.0},
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 PCIe": {"bfloat16": 756.5, "float32": 51.0, "fp8": 1513.0},
    "NVIDIA H100 NVL": _H100_NVL,
    "NVIDIA GH200 480GB": _H100_SXM,
    "NVIDIA H200": _H100_SXM,
    "NVIDIA H200 NVL": _H100_NVL,
    "NVIDIA B200": {"bfloat16": 2250.0, "float32": 75.0, "fp8": 4500.0},
    "NVIDIA GB200": {"bfloat16": 2500.0, "float32": 80.0, "fp8": 5000.0},
}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Dense peak of one device in TFLOP/s; precision: bfloat16, float32 or fp8. None: not in the table."""
    return PEAKS.get(device_name, {}).get(precision)


def training_flops(student: Architecture, teacher: Architecture | None, lora: LoraConfig | None, samples: Iterable[Sample]) -> int:
    """Model FLOPs of one optimizer step on `samples`: both forwards, the loss's output layers, the student's backward.

    lora None: every parameter of the student is trained. teacher None: supervised training.
    """
    head = (
        2
        * student.vocab_size
        * ((2 if lora is not None else 3) * student.hidden_size + (teacher.hidden_size if teacher is not None else 0))
    )
    student_token = _forward_and_backward(student, lora)
    total = 0
    for sample in samples:
        rows = sample.response_tokens
        student_length = len(sample.student_prompt_ids) + rows
        total += student_length * student_token + 3 * _attention(student, student_length)
        if teacher is not None:
            teacher_length = len(sample.teacher_prompt_ids) + rows
            total += teacher_length * 2 * _linear_weights(teacher) + _attention(teacher, teacher_length)
        total += rows * head
    return total


def _linear_weights(architecture: Architecture) -> int:
    """Weights that a token meets in the layers' matrices, without embeddings and output layer: of experts those that it is sent to."""
    return architecture.num_layers * architecture.layer_weights(architecture.experts.per_token if architecture.experts is not None else 0)


def _forward_and_backward(architecture: Architecture, lora: LoraConfig | None) -> int:
    """FLOPs per token in the layers' matrices: forward, the gradient of the input and, of what is trained, of the weight.

    Counted for all layers alike: the gradient of the first one's input is computed, though with LoRA nothing needs it.
    """
    weights = _linear_weights(architecture)
    if lora is None:
        return 6 * weights
    return 4 * weights + 6 * architecture.adapter_parameters(lora.rank, lora.targets)


def _attention(architecture: Architecture, length: int) -> int:
    """FLOPs of the two products of attention in one sequence's forward; backward has four."""
    pairs = length * (length + 1) // 2
    return architecture.num_layers * 2 * 2 * architecture.num_attention_heads * architecture.head_dim * pairs

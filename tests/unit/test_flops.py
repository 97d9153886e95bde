"""Model FLOPs against what PyTorch's own counter sees transformers (and PEFT) do, the table of peaks, and the memory peak."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tests import tiny
from trd_megatron.config import LoraConfig
from trd_megatron.convert.architecture import Architecture, Rope
from trd_megatron.learner.flops import PEAKS, peak_tflops, training_flops
from trd_megatron.learner.memory import peak_memory
from trd_megatron.learner.packing import Sample

SAMPLES = [Sample("a", 0, [1] * 7, [1] * 12, [1] * 5), Sample("b", 0, [1] * 3, [1] * 20, [1] * 11)]
TEACHER_SIZES: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 56}


def counted(model: Any, prompt: int, rows: int, *, backward: bool) -> int:
    """FLOPs of a forward over prompt + rows tokens and the logits of `rows` of them, and backward; of attention the causal pairs."""
    length = prompt + rows

    def batched(a: list[int], b: list[int], **_: Any) -> int:
        flops = 2 * a[0] * a[1] * a[2] * b[2]
        if a[0] == 1:  # a frozen linear layer over our one sequence
            return flops
        assert a[0] == model.config.num_attention_heads  # transformers' eager attention computes all length^2 pairs
        return flops * (length + 1) // (2 * length)

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: batched})
    with torch.set_grad_enabled(backward):
        embedded = torch.randn(1, length, model.config.hidden_size, requires_grad=backward)  # as if an embedding was trained below
        with counter:
            core = getattr(model, "base_model", model)
            decoder, head = (core.model.model, core.model.lm_head) if hasattr(model, "peft_config") else (model.model, model.lm_head)
            logits = head(decoder(inputs_embeds=embedded).last_hidden_state[:, -rows:])
            if backward:
                logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"], LoraConfig().targets], ids=["full", "two", "all"])
@pytest.mark.parametrize(
    "names", [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("qwen3", "qwen3-moe")], ids=lambda names: names[1]
)
def test_model_flops_are_what_pytorch_counts(names: tuple[str, str], targets: list[str] | None, tmp_path: Path) -> None:
    folders = [tiny.make(names[0], tmp_path / "student"), tiny.make(names[1], tmp_path / "teacher", **TEACHER_SIZES)]
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager") for folder in folders
    )
    lora = None
    if targets is not None:
        lora = LoraConfig(rank=3, targets=targets)
        student = get_peft_model(student, PeftConfig(r=3, target_modules=targets))
    alone = of_teacher = 0
    for sample in SAMPLES:
        alone += counted(student, len(sample.student_prompt_ids), sample.response_tokens, backward=True)
        of_teacher += counted(teacher, len(sample.teacher_prompt_ids), sample.response_tokens, backward=False)
    architectures = [Architecture.from_hf(folder) for folder in folders]
    assert training_flops(*architectures, lora, SAMPLES) == alone + of_teacher
    assert training_flops(architectures[0], None, lora, SAMPLES) == alone  # supervised training


def test_long_sequences_are_quadratic() -> None:
    architecture = Architecture("qwen3", 36, 4096, 12288, 32, 8, 128, 151_936, 40_960, 1e-6, Rope(1e6), False, False, True)
    tokens = 38_912
    [one, two] = [
        training_flops(architecture, architecture, LoraConfig(), [Sample("p", 0, [1], [1], [1] * n)]) for n in (tokens, 2 * tokens)
    ]
    # Four causal attentions of 36 layers: student forward, backward (twice as much) and teacher forward.
    pairs = 4 * 36 * 4 * 4096 * (2 * tokens + 1) * (2 * tokens + 2) // 2 - 2 * (4 * 36 * 4 * 4096 * (tokens + 1) * (tokens + 2) // 2)
    linear_in_tokens = two - 2 * one - pairs
    assert abs(linear_in_tokens) < one / tokens * 2  # one prompt token more or less


def test_peaks() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.5
    assert peak_tflops("NVIDIA H100 PCIe", "fp8") == 1513.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp8") is None  # it has none
    assert peak_tflops("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bfloat16") is None
    assert peak_tflops("NVIDIA H100 80GB HBM3", "float64") is None
    for name, peaks in PEAKS.items():
        assert name.startswith("NVIDIA ")
        assert peaks["float32"] < peaks["bfloat16"] < peaks.get("fp8", float("inf"))
        assert 2 * peaks["bfloat16"] == pytest.approx(peaks.get("fp8", 2 * peaks["bfloat16"]), rel=0.02)


_CHILD = """
import torch
from trd_megatron.learner.memory import peak_memory
before = peak_memory(torch.device("cpu"))
torch.ones(64 * 2**20)
print(before, peak_memory(torch.device("cpu")))
"""


def test_the_memory_peak_is_this_process_alone_and_stays() -> None:
    ballast = torch.ones(256 * 2**20)  # 1 GiB here: a child that is started now must not count it
    child = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True)
    before, after = map(int, child.stdout.split())
    assert peak_memory(torch.device("cpu")) > ballast.nbytes
    assert before < 2**30
    assert 0.9 * 2**28 < after - before < 1.5 * 2**28  # the tensor is gone, its peak is not

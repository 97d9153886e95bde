"""The other side of `trd bench learner`: on-policy self-distillation as one writes it with Hugging Face transformers and PEFT.

Padded batches, gradient checkpointing, whole logits, the loss with autograd. Nothing is computed by this package's learner.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from trd_megatron.config import LearnerConfig
from trd_megatron.learner.packing import Sample

Ids = Sequence[int]


def load(folder: Path, config: LearnerConfig) -> Any:
    """The model with adapters (float32 on a bfloat16 model, PEFT's default) and gradient checkpointing."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, config.dtype), attn_implementation="sdpa")
    model.to(config.device)
    lora = config.lora
    model = get_peft_model(
        model, LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules=lora.targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model


def batches(samples: list[Sample], max_tokens: int) -> list[list[Sample]]:
    """Micro-batches, in order: as many samples as make at most `max_tokens` when all are padded to the longest."""
    groups: list[list[Sample]] = []
    for sample in samples:
        if not groups or max(one.longest for one in [*groups[-1], sample]) * (len(groups[-1]) + 1) > max_tokens:
            groups.append([])
        groups[-1].append(sample)
    return groups


def pad(prompts: Sequence[Ids], responses: Sequence[Ids], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and response mask, each [B, longest], padded on the right."""
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    attention, response_mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        attention[i, : len(row)] = 1
        response_mask[i, len(prompts[i]) : len(row)] = True
    return ids.to(device), attention.to(device), response_mask.to(device)


def response_logits(model: Any, prompts: Sequence[Ids], responses: Sequence[Ids], device: str) -> Tensor:
    """[response tokens of the batch, V]: the logits that predict them."""
    ids, attention, response = pad(prompts, responses, device)
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    return logits[:, :-1][response[:, 1:]]


def train_step(model: Any, optimizer: torch.optim.Optimizer, samples: list[Sample], config: LearnerConfig) -> tuple[float, float]:
    """One optimizer step; returns the loss (mean over the response tokens of all samples) and the gradient's norm before clipping."""
    tokens = sum(len(sample.response_ids) for sample in samples)
    total = 0.0
    for batch in batches(samples, config.max_tokens_per_micro_batch):
        responses = [sample.response_ids for sample in batch]
        with torch.no_grad(), model.disable_adapter():
            teacher = response_logits(model, [sample.teacher_prompt_ids for sample in batch], responses, config.device)
            teacher_logprobs = F.log_softmax(teacher.float(), dim=-1)
            del teacher
        student = response_logits(model, [sample.student_prompt_ids for sample in batch], responses, config.device)
        student_logprobs = F.log_softmax(student.float(), dim=-1)
        loss = F.kl_div(student_logprobs, teacher_logprobs, reduction="sum", log_target=True) / tokens
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.clip_grad)
    optimizer.step()
    optimizer.zero_grad()
    return total, norm.item()


def make_optimizer(model: Any, config: LearnerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )

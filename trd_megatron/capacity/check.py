"""The memory model held against the real learner: `trd bench memory` trains small random models for a few steps and reads the ranks' peaks.

memory.py's two constants of the CPU (RUNTIME, SLACK) were read off the cases marked `fitted` alone. BOUND is the issue's; the other cases
stood in a commit before they were run for the first time, and the model was not changed after. One of them is outside, see `outside`.
"""

import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trd_megatron.capacity.memory import Load, Memory, learner_memory
from trd_megatron.config import load, to_dict
from trd_megatron.convert.architecture import Architecture
from trd_megatron.learner.job import SAMPLES, Job, run_ranks
from trd_megatron.records import SAMPLE
from trd_megatron.run_dir import write_parquet

BOUND = 0.15
STEPS = 3

COMMON = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 8192, "tie_word_embeddings": True}
SMALL = COMMON | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 32_000}
TALL = COMMON | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 8_000, "num_attention_heads": 12}
TEACHER = COMMON | {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 10,
    "vocab_size": 32_000,
    "tie_word_embeddings": False,
}
WIDE = COMMON | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 151_936}  # Qwen3's vocabulary


@dataclass(frozen=True)
class Case:
    """A model, a layout and samples of one length. prompts: the student's and the teacher's. samples: of a step, over all ranks."""

    name: str
    student: dict[str, Any]
    prompts: tuple[int, int]
    response: int
    samples: int
    settings: Sequence[str]
    teacher: dict[str, Any] | None = None
    fitted: bool = field(default=False, kw_only=True)
    outside: bool = field(default=False, kw_only=True)  # predicted too high by more than BOUND: glibc gives large blocks back whole


def _learner(**settings: Any) -> list[str]:
    return [f"learner.{key}={value}" for key, value in settings.items()]


CASES = (
    Case("adapters, full recomputation", SMALL, (64, 256), 1024, 4, _learner(recompute="full", max_tokens_per_micro_batch=4096),
         fitted=True),
    Case("adapters, no recomputation", SMALL, (64, 256), 1024, 4, _learner(recompute="none", max_tokens_per_micro_batch=4096),
         fitted=True),
    Case("every parameter, selective", TALL, (64, 64), 448, 8,
         _learner(trainable="full", recompute="selective", max_tokens_per_micro_batch=2112)),
    Case("vocabulary of 151,936, long chunks", WIDE, (64, 128), 896, 4,
         _learner(recompute="none", kl_chunk_tokens=512, max_tokens_per_micro_batch=2112)),
    Case("2 ranks share each layer", TALL, (64, 192), 832, 4,
         _learner(recompute="none", tensor_model_parallel_size=2, sequence_parallel="true", max_tokens_per_micro_batch=4096)),
    Case("a teacher of its own", SMALL, (64, 64), 960, 4, ["mode=opd", "teacher.path=a-teacher", *_learner(recompute="selective",
         max_tokens_per_micro_batch=4096)], TEACHER),
    Case("every parameter, 2 copies", SMALL, (32, 64), 480, 8, _learner(trainable="full", recompute="full", data_parallel_size=2,
         max_tokens_per_micro_batch=2112)),
    Case("bfloat16, one long sequence", TALL, (64, 1024), 3072, 2, _learner(recompute="none", dtype="bfloat16",
         max_tokens_per_micro_batch=4160)),
    Case("2 ranks share each sequence", SMALL, (64, 128), 1408, 4, _learner(recompute="none", context_parallel_size=2,
         max_tokens_per_micro_batch=4608)),
    Case("2 ranks share each layer, activations whole", SMALL, (64, 128), 896, 4,
         _learner(recompute="selective", tensor_model_parallel_size=2, max_tokens_per_micro_batch=4096)),
    Case("rank 64, dropout", TALL, (64, 64), 448, 4, _learner(recompute="none", max_tokens_per_micro_batch=2112, **{"lora.rank": 64,
         "lora.dropout": 0.05}), outside=True),
)  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """measured: bytes, of the rank with the highest peak."""

    case: Case
    predicted: Memory
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted.total / self.measured - 1

    @property
    def error_above(self) -> float:
        """The same of what lies above the interpreter and its libraries."""
        return (self.predicted.total - self.predicted.runtime) / (self.measured - self.predicted.runtime) - 1


def check(cases: Sequence[Case] = CASES) -> Iterator[Checked]:
    """Trains each case in the real learner, on this machine's CPU. Raises LearnerFailedError if it fails."""
    with tempfile.TemporaryDirectory() as place:
        for number, case in enumerate(cases):
            yield _check(case, Path(place) / str(number))


def _check(case: Case, place: Path) -> Checked:
    student = _make(case.student, place / "student")
    teacher = None if case.teacher is None else _make(case.teacher, place / "teacher")
    config = load(["experiment=smoke", f"learner.max_steps={STEPS}", "learner.held_out_samples=1", *case.settings])
    learner = replace(config.learner, global_batch_size=case.samples, eval_interval=STEPS, checkpoint_interval=STEPS)
    config = replace(config, learner=learner)
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(case.student["vocab_size"]) for _ in range(count)]

    of_student, of_teacher = case.prompts
    rows = [
        {
            "problem_id": str(index), "sample_index": 0, "student_prompt_ids": ids(of_student), "teacher_prompt_ids": ids(of_teacher),
            "response_ids": ids(case.response), "rollout_passed": None,
        }
        for index in range(STEPS * case.samples + 1)
    ]  # fmt: skip
    folder = place / "train"
    folder.mkdir()
    write_parquet(folder / SAMPLES, rows, SAMPLE)
    Job(to_dict(config), str(student), None if teacher is None else str(teacher), [1, 2]).write(folder)
    peaks = [metrics["memory_gib"] for metrics in run_ranks(folder, learner)]
    together = min(
        learner.max_tokens_per_micro_batch // (max(case.prompts) + case.response), -(-case.samples // learner.data_parallel_size)
    )
    held = Load(together * (of_student + case.response), together * case.response)
    predicted = learner_memory(learner, Architecture.from_hf(student), None if teacher is None else Architecture.from_hf(teacher), held)
    return Checked(case, predicted, peaks[-1] * 2**30)


def _make(settings: dict[str, Any], folder: Path) -> Path:
    """A random Qwen3 of this shape in Hugging Face layout, in float32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**settings)).save_pretrained(folder)
    return folder

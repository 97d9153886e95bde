"""The work of `trd bench learner`: the models, the step's samples and its settings, the same for both sides."""

import json
import random
from pathlib import Path

from trd_megatron.config import Config, load
from trd_megatron.learner.packing import Sample

MODELS = ["builtin:smollm2-135m-instruct", "builtin:qwen3-4layers"]
LENGTHS = Path(__file__).with_name("lengths.json")
BATCH_TOKENS = 2048  # that one forward of teacher or student holds at most, padding included


def lengths() -> list[tuple[int, int, int]]:
    """Tokens of (student's prompt, teacher's prompt, response) of real trajectories; where they come from stands in the file."""
    return [(student, teacher, response) for student, teacher, response in json.loads(LENGTHS.read_text())["lengths"]]


def samples(count: int, vocab_size: int) -> list[Sample]:
    """`count` samples of random ids whose lengths go round `lengths()`; always the same ones."""
    draw, known = random.Random(0), lengths()

    def ids(length: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(length)]

    shapes = [known[i % len(known)] for i in range(count)]
    return [Sample(f"random-{i}", 0, ids(student), ids(teacher), ids(response)) for i, (student, teacher, response) in enumerate(shapes)]


def config(device: str, dtype: str) -> Config:
    """OPSD with forward KL over the whole vocabulary, adapters of rank 16 on all seven projections, full recomputation."""
    longest = max(teacher + response for _, teacher, response in lengths())
    assert longest <= BATCH_TOKENS
    return load(
        [
            "experiment=smoke",
            "method=trd",
            f"learner.device={device}",
            f"learner.dtype={dtype}",
            "learner.recompute=full",
            f"learner.max_tokens_per_micro_batch={BATCH_TOKENS}",
            "refine.max_prompt_tokens=1024",  # nothing is refined here; a config's micro-batch must hold its longest prompt
            "learner.kl_chunk_tokens=128",
            "learner.learning_rate=1e-4",
            "learner.lora.rank=16",
            "learner.lora.alpha=32",
        ]
    )

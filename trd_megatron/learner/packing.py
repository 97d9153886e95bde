"""Samples into micro-batches of packed sequences.

A sample is one response under two prompts, so each micro-batch has two packings, the student's and the teacher's. They are
aligned by response rows only: row i of both is the hidden state that predicts response token i of the micro-batch.
"""

import zlib
from dataclasses import dataclass

import torch

from trd_megatron.chat import sequence


@dataclass(frozen=True)
class Sample:
    """One trajectory to train on."""

    problem_id: str
    sample_index: int
    student_prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    response_ids: list[int]
    rollout_passed: bool | None = None

    @property
    def response_tokens(self) -> int:
        return len(self.response_ids)

    @property
    def key(self) -> int:
        """32 bits that stand for the sample, in every run."""
        return zlib.crc32(f"{self.problem_id}/{self.sample_index}".encode())

    @property
    def longest(self) -> int:
        """Length of the longer of the two sequences."""
        return max(len(self.student_prompt_ids), len(self.teacher_prompt_ids)) + len(self.response_ids)


@dataclass(frozen=True)
class Packing:
    """Sequences one after another, padded at the end (a segment of its own) to a multiple of the sequence-parallel size."""

    ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, restart in every segment
    cu_seqlens: torch.Tensor  # [segments + 1] int32
    max_length: int  # of a segment
    rows: torch.Tensor  # [R] int64: positions whose hidden state predicts a response token
    targets: torch.Tensor  # [R] int64: these response tokens
    sample_keys: torch.Tensor  # [T] int64: a number of the sample at each position, whatever it is packed with


def pack(prompts: list[list[int]], responses: list[list[int]], multiple: int, device: torch.device, keys: list[int]) -> Packing:
    """Packs prompt + response pairs; `multiple` is what the total length must be divisible by, `keys` the samples' numbers."""
    ids: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    for prompt, response in zip(prompts, responses, strict=True):
        one = sequence(prompt, response)
        responding = [i for i, is_response in enumerate(one.mask) if is_response]
        rows += [len(ids) + i - 1 for i in responding]
        targets += [one.ids[i] for i in responding]
        ids += one.ids
        lengths.append(len(one.ids))
    padding = -len(ids) % multiple
    if padding:
        ids += [0] * padding
        lengths.append(padding)
        keys = [*keys, 0]
    sizes = torch.tensor(lengths)
    return Packing(
        ids=torch.tensor(ids, device=device),
        positions=torch.cat([torch.arange(n) for n in lengths]).to(device),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).to(torch.int32).to(device),
        max_length=max(lengths),
        rows=torch.tensor(rows, device=device),
        targets=torch.tensor(targets, device=device),
        sample_keys=torch.tensor(keys).repeat_interleave(sizes).to(device),
    )


@dataclass(frozen=True)
class MicroBatch:
    samples: list[Sample]
    student: Packing
    teacher: Packing

    @property
    def response_lengths(self) -> torch.Tensor:
        """[samples] int64, in the order of the response rows."""
        return torch.tensor([sample.response_tokens for sample in self.samples])


def micro_batches(samples: list[Sample], max_tokens: int, multiple: int, device: torch.device) -> list[MicroBatch]:
    """Cuts samples, in order, into micro-batches whose student and teacher packings both hold at most `max_tokens`.

    Raises ValueError if a single sample does not fit.
    """
    groups: list[list[Sample]] = []
    student = teacher = 0
    for sample in samples:
        response = sample.response_tokens
        student_length, teacher_length = len(sample.student_prompt_ids) + response, len(sample.teacher_prompt_ids) + response
        if sample.longest > max_tokens:
            raise ValueError(f"{sample.problem_id}: {sample.longest} tokens do not fit into {max_tokens}")
        if not groups or max(student + student_length, teacher + teacher_length) > max_tokens:
            groups.append([])
            student = teacher = 0
        groups[-1].append(sample)
        student, teacher = student + student_length, teacher + teacher_length
    batches = []
    for group in groups:
        responses, keys = [s.response_ids for s in group], [s.key for s in group]
        student_side = pack([s.student_prompt_ids for s in group], responses, multiple, device, keys)
        teacher_side = pack([s.teacher_prompt_ids for s in group], responses, multiple, device, keys)
        batches.append(MicroBatch(group, student_side, teacher_side))
    return batches


def deal(samples: list[Sample], ranks: int) -> list[list[Sample]]:
    """Deals a global batch to data-parallel ranks, longest first to the rank with the fewest tokens: disjoint, complete, balanced."""
    dealt: list[list[Sample]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for sample in sorted(samples, key=lambda s: -s.longest):
        rank = load.index(min(load))
        dealt[rank].append(sample)
        load[rank] += sample.longest
    return dealt

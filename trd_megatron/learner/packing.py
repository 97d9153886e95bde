"""Samples into micro-batches of packed sequences.

A sample is one response under two prompts, so each micro-batch has two packings, the student's and the teacher's. They are
aligned by response rows only: `responses` says which response token of the micro-batch a row predicts.

Context parallelism cuts every sequence into 2 x cp_size equal pieces, of which rank r holds pieces r and 2 x cp_size - 1 - r: with causal
attention that is the same work for all (Megatron's and Transformer Engine's order).
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trd_megatron.chat import sequence


@dataclass(frozen=True)
class Sample:
    """One trajectory to train on. Ids that were read from a file are array("i"): a list of Python integers takes nine times as much."""

    problem_id: str
    sample_index: int
    student_prompt_ids: Sequence[int]
    teacher_prompt_ids: Sequence[int]  # empty: supervised training, which has no teacher
    response_ids: Sequence[int]
    rollout_passed: bool | None = None
    source: str | None = None  # supervised training: what kind of example it is

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
class Cut:
    """How a packed batch is padded and which part of it this rank holds."""

    total_multiple: int = 1  # the tokens of one context-parallel rank are a multiple of this
    cp_size: int = 1
    cp_rank: int = 0

    @property
    def sequence_multiple(self) -> int:
        """What every sequence is padded to, so that it falls into equal pieces."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    def padding(self, length: int) -> int:
        """Tokens that a batch of padded sequences, `length` in all, lacks."""
        return -length % math.lcm(self.sequence_multiple, self.cp_size * self.total_multiple)


def pieces(cu_seqlens: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """Positions [T / cp_size] in a packed batch that a context-parallel rank holds, in its order. cu_seqlens: [segments + 1]."""
    mine = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        size = (end - start) // (2 * cp_size)
        for piece in (cp_rank, 2 * cp_size - 1 - cp_rank):
            mine.append(torch.arange(start + piece * size, start + (piece + 1) * size))
    return torch.cat(mine)


@dataclass(frozen=True)
class Packing:
    """Sequences one after another, padded at their ends and at the batch's end (a segment of its own). T: tokens that this rank holds."""

    ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, restart in every segment
    cu_seqlens: Tensor  # [segments + 1] int32, of the whole batch, whatever this rank holds of it
    max_length: int  # of a whole segment
    rows: Tensor  # [R] int64: positions whose hidden state predicts a response token
    responses: Tensor  # [R] int64: which of the micro-batch's response tokens these are, in the order of the samples
    targets: Tensor  # [R] int64: their ids
    sample_keys: Tensor  # [T] int64: a number of the sample at each position, whatever it is packed with
    response_tokens: int  # of the micro-batch, on all ranks


def pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], cut: Cut, device: torch.device, keys: list[int]) -> Packing:
    """Packs prompt + response pairs; `keys` are the samples' numbers."""
    ids: list[int] = []
    predicts: list[int] = []  # for every position, the response token that its hidden state predicts, or -1
    lengths: list[int] = []
    count = 0
    for prompt, response in zip(prompts, responses, strict=True):
        one = sequence(prompt, response)
        padding = -len(one.ids) % cut.sequence_multiple
        ids += one.ids + [0] * padding
        for is_response in [*one.mask[1:], False] + [False] * padding:
            predicts.append(count if is_response else -1)
            count += is_response
        lengths.append(len(one.ids) + padding)
    padding = cut.padding(len(ids))
    if padding:
        ids += [0] * padding
        predicts += [-1] * padding
        lengths.append(padding)
        keys = [*keys, 0]
    sizes = torch.tensor(lengths)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    mine = pieces(cu_seqlens, cut.cp_size, cut.cp_rank) if cut.cp_size > 1 else slice(None)
    predicted = torch.tensor(predicts)[mine]
    rows = (predicted >= 0).nonzero().squeeze(1)
    targets = torch.tensor([token for response in responses for token in response])
    return Packing(
        ids=torch.tensor(ids)[mine].to(device),
        positions=torch.cat([torch.arange(n) for n in lengths])[mine].to(device),
        cu_seqlens=cu_seqlens.to(torch.int32).to(device),
        max_length=max(lengths),
        rows=rows.to(device),
        responses=predicted[rows].to(device),
        targets=targets[predicted[rows]].to(device),
        sample_keys=torch.tensor(keys).repeat_interleave(sizes)[mine].to(device),
        response_tokens=count,
    )


@dataclass(frozen=True)
class MicroBatch:
    samples: list[Sample]
    student: Packing
    teacher: Packing | None  # None: training without a teacher

    def of_rows(self, values: list[bool] | list[int]) -> Tensor:
        """[R] of a value per sample: the value of each of the student's response rows on this rank."""
        lengths = torch.tensor([sample.response_tokens for sample in self.samples])
        return torch.tensor(values).repeat_interleave(lengths).to(self.student.rows.device)[self.student.responses]


def micro_batches(samples: list[Sample], max_tokens: int, cut: Cut, device: torch.device, *, with_teacher: bool = True) -> list[MicroBatch]:
    """Cuts samples, in order, into micro-batches whose student and teacher packings both hold at most `max_tokens` (paddings not counted).

    with_teacher False: the student's packing alone; the samples have no teacher prompt. Raises ValueError if a single sample does not fit.
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
        student_side = pack([s.student_prompt_ids for s in group], responses, cut, device, keys)
        teacher_side = pack([s.teacher_prompt_ids for s in group], responses, cut, device, keys) if with_teacher else None
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

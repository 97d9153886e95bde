"""The smallest change of the learner's layout with which a rank's memory suffices. None of them changes a result."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from trd_megatron.capacity.memory import Memory
from trd_megatron.config import LearnerConfig
from trd_megatron.convert.architecture import Architecture

ROOM = 0.95  # of a GPU's memory that the planner fills


def smallest_change(
    learner: LearnerConfig,
    student: Architecture,
    teacher: Architecture | None,
    longest: int,
    memory: float,
    gpus_per_node: int,
    needs: Callable[[LearnerConfig], Memory],
) -> tuple[dict[str, Any], Memory] | None:
    """({key of learner: value}, memory with it), the first of what costs least that fits; None: nothing tried does.

    First one change alone, then one after another. longest: tokens of the longest sequence. memory: bytes of a GPU.
    """
    changes = list(_changes(learner, student, teacher, longest, gpus_per_node))

    def fitting(chosen: list[dict[str, Any]]) -> tuple[dict[str, Any], Memory] | None:
        together: dict[str, Any] = {}
        for change in chosen:
            together |= change
        new = replace(learner, **together)
        shared = new.tensor_model_parallel_size * new.context_parallel_size
        if learner.ranks % shared:
            return None
        if learner.ranks // shared != learner.data_parallel_size:
            together["data_parallel_size"] = learner.ranks // shared
        found = needs(replace(learner, **together))
        return (together, found) if found.total <= ROOM * memory else None

    for change in changes:
        if (found := fitting([change])) is not None:
            return found
    for count in range(2, len(changes) + 1):
        if (found := fitting(changes[:count])) is None:
            continue
        needed = changes[:count]
        for change in changes[: count - 1]:  # those that turned out not to be needed
            if (without := fitting([other for other in needed if other is not change])) is not None:
                needed, found = [other for other in needed if other is not change], without
        return found
    return None


def _changes(
    learner: LearnerConfig, student: Architecture, teacher: Architecture | None, longest: int, gpus_per_node: int
) -> Iterator[dict[str, Any]]:
    """What costs least comes first."""
    if learner.max_tokens_per_micro_batch > longest:
        yield {"max_tokens_per_micro_batch": longest}
    for recompute in ("selective", "full"):
        if ("none", "selective", "full").index(recompute) > ("none", "selective", "full").index(learner.recompute):
            yield {"recompute": recompute}
    for chunk in (256, 128):
        if chunk < learner.kl_chunk_tokens:
            yield {"kl_chunk_tokens": chunk}
    if (teacher is not None or learner.trainable == "full") and not learner.teacher_offload:
        yield {"teacher_offload": True}
    tp = learner.tensor_model_parallel_size
    sizes = set(student.tensor_parallel_sizes()) & set((teacher or student).tensor_parallel_sizes())
    for size in sorted(sizes):
        if tp < size <= gpus_per_node:
            yield {"tensor_model_parallel_size": size, "sequence_parallel": True}
    for size in (2, 4, 8):
        if size > learner.context_parallel_size:
            yield {"context_parallel_size": size}

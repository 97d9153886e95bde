"""Where weights come from: a model's tensors under their Hugging Face names, read one parameter of the name table at a time."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from trd_megatron.convert.architecture import Architecture
from trd_megatron.convert.mapping import Entry

T = TypeVar("T")


class Source(Protocol):
    """A checkpoint of either format, checked to be complete: every tensor that its architecture names is there, in its shape."""

    path: Path  # as the user wrote it
    architecture: Architecture
    companions: Path  # the folder with config.json, tokenizer, chat template

    def dtype(self, entry: Entry) -> torch.dtype:
        """Of all of an entry's tensors. Raises UserError if they differ."""
        ...

    def read(self, entry: Entry) -> list[torch.Tensor]:
        """The whole tensors entry.hf, in order. Raises UserError if they cannot be read."""
        ...


def ahead(reads: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """What each of `reads` returns, in order; while one is written, a thread reads the next."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        current: Future[T] | None = None
        for read in reads:
            following = pool.submit(read)
            if current is not None:
                yield current.result()
            current = following
        if current is not None:
            yield current.result()

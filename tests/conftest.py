"""Shared by all tests: models made on the spot go to a cache of the test session, not to the user's."""

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

_cache = tempfile.TemporaryDirectory(prefix="trd-test-cache-")
os.environ["TRD_CACHE"] = _cache.name  # before anything starts a child process
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads that wait for each other cost more than they bring
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is imported: the kernels then run on the CPU


@pytest.fixture(scope="session", autouse=True)
def _remove_cache() -> Iterator[None]:
    yield
    _cache.cleanup()

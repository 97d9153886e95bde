"""Shared by all tests: models made on the spot go to a cache of the test session, not to the user's."""

import os
import tempfile
from collections.abc import Iterator

import pytest

_cache = tempfile.TemporaryDirectory(prefix="trd-test-cache-")
os.environ["TRD_CACHE"] = _cache.name  # before anything starts a child process
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _remove_cache() -> Iterator[None]:
    yield
    _cache.cleanup()

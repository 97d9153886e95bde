"""Where what this project makes once and keeps lies: models and expected outputs. Downloads lie in the hub's own cache."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """$TRD_CACHE, or ~/.cache/trd_megatron."""
    return Path(os.environ.get("TRD_CACHE") or "~/.cache/trd_megatron").expanduser()

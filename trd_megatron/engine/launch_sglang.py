"""Becomes `python -m sglang.launch_server`. Run by its path, in the Python of the environment with SGLang: standard library only.

Before SGLang is imported it asks Linux to die with who started it, and it puts the API key, which comes in the environment, where
SGLang looks for one: SGLang knows only a flag, and flags of a command line can be read by everybody on the machine.
"""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

KEY = "SGLANG_API_KEY"


def main() -> None:
    """Runs the server until it ends."""
    spec = importlib.util.spec_from_file_location("processes", Path(__file__).parents[1] / "processes.py")
    assert spec is not None and spec.loader is not None
    processes = importlib.util.module_from_spec(spec)  # by path, because trd_megatron is not installed here
    spec.loader.exec_module(processes)
    processes.die_with_parent()
    key = os.environ.pop(KEY, None)
    if key is not None:
        sys.argv += ["--api-key", key]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

"""Benchmark of the local engine against model.generate: `trd bench engine` with the same flags."""

import sys

from trd_megatron.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "engine"]
    main()
